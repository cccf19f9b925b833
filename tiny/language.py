"""The stages `heard` and `lm`: users' sides of conversations as codes; a Moshi that learns to answer them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from codec import SHARES, finished_codec
from files import whole_file
from heard import Microphone
from loop import (
    DEVICE,
    FOLDER,
    forget,
    in_16_bits,
    needed,
    pick,
    progress,
    random_numbers,
    train,
    write_curve,
)
from mimi_min import Mimi, init_state
from moshi_min import MOSHI_FILE, NO_INPUT, Checkpoint, Moshi, MoshiConfig, delay, save_checkpoint
from speech import FRAME, NUMBERS, RATE, Speech, Turn, all_turns

PAD, EPAD = 3, 0  # of the text stream: no new word; a word comes next

# The released Moshi, only narrower: the streams and delays are the same. The tokenizer gives text_card.
MOSHI = MoshiConfig(
    dim=256,
    num_layers=5,
    num_heads=4,
    context=125,
    card=256,
    existing_text_padding_id=PAD,
    existing_text_end_padding_id=EPAD,
    depformer_dim=128,
    depformer_num_layers=2,
    depformer_num_heads=4,
    depformer_dim_feedforward=264,
)
# What config.json says besides the sizes: how to sample, and the silence to put around a recording.
SETTINGS = {
    "lm_gen_config": {"temp": 0.5, "temp_text": 0.4, "top_k": 20, "top_k_text": 5},
    "stt_config": {"audio_silence_prefix_seconds": 0.48, "audio_delay_seconds": 3.0},
}

LEAD, OWN_TAIL = 4, 8  # frames of silence before and after a sentence of Moshi when it is encoded
FRAMES = 160  # of a training conversation, 12.8 s
LONG = 2 * FRAMES  # of a user's side of one, from which they are cut
ANSWER_AFTER, STOP_AFTER = 3, 3  # frames from the end of the user's words to Moshi's first, or to its silence
COUNT_EVERY = 9  # frames from a number to the next, more where it is long
KINDS = {
    "sum": 0.31,
    "difference": 0.20,
    "count": 0.19,
    "talk": 0.12,
    "digit": 0.15,
    "stop": 0.03,
}  # of turns
# What the codec hears is as mixed as can be; the language model hears more of the voices that ask it most.
USERS = SHARES | {"espeak": 0.5}

# ------------------------------------------------------------------------------------------ the user's side


class Part(NamedTuple):
    """A turn in a user's side, in frames of Moshi's: one later than the user's, as in the program."""

    question: str
    start: int
    end: int
    stop: int  # where the word 'stop' ended that broke Moshi's answer off; -1: none


class User:
    """A user's side of a conversation while it is put together: one microphone, voices of all makes."""

    def __init__(self, speech: Speech, by_kind: dict[str, dict[str, list[int]]], rng: np.random.Generator):
        self.speech, self.by_kind, self.rng = speech, by_kind, rng
        self.way, self.parts = Microphone(rng), []
        self.wave, self.speaks = np.zeros((2, LONG * FRAME), np.float32)

    def say(self, kind: str, at: int) -> tuple[str, int]:
        """Something of this kind from sample `at` on; returns what, and where it ends, in samples."""
        makes = self.by_kind[kind]
        shares = np.array([USERS.get(name, 1.0) for name in makes])
        i = pick(self.rng, makes[str(self.rng.choice(list(makes), p=shares / shares.sum()))])
        x = self.way.voice(self.speech[i]) * 10 ** (self.rng.uniform(-3, 3) / 20)
        x = x[: max(0, len(self.wave) - at)]
        self.wave[at : at + len(x)] += x
        self.speaks[at : at + len(x)] = 1
        return self.speech.texts[i], at + len(x)

    def turn(self, at: int, lengths: dict[str, int]) -> int:
        """A turn from sample `at` on; returns where its answer will be over, in samples."""
        rng, kind = self.rng, str(self.rng.choice(list(KINDS), p=list(KINDS.values())))
        question, finish = self.say(kind, at)
        start, end, stop = at // FRAME + 1, -(-finish // FRAME) + 1, -1
        turn = TURNS[question]
        frames = lengths.get(turn.answer, 0)
        if turn.count_from is not None:
            frames = COUNT_EVERY * (len(NUMBERS) - turn.count_from)
        finish = (end + ANSWER_AFTER + frames) * FRAME
        broken = end + int(rng.integers(2, 110)) if turn.count_from is not None else LONG
        if turn.answer and rng.random() < 0.05:
            broken = end + int(rng.integers(2, 10))
        if broken * FRAME < finish:
            _, finish = self.say("stop", broken * FRAME + int(rng.integers(FRAME)))
            stop = -(-finish // FRAME) + 1
        self.parts.append(Part(question, start, end, stop))
        return finish

    def converse(self, lengths: dict[str, int]) -> tuple[np.ndarray, list[Part]]:
        """A whole side: what the microphone hears [LONG * FRAME], and its turns. Some users say nothing."""
        rng, at = self.rng, int(self.rng.uniform(0.1, 1.5) * RATE)
        if rng.random() < 0.1:
            at = int(rng.uniform(2, 30) * RATE)
        while at < (LONG - 25) * FRAME:
            at = self.turn(at, lengths) + int(rng.uniform(0.3, 2.0) * RATE)
            if rng.random() < 0.08:
                at += int(rng.uniform(2, 10) * RATE)
        return self.way.heard(self.wave, self.speaks)[1], self.parts


TURNS = {turn.question: turn for those in all_turns().values() for turn in those}


def utterances_by_kind(speech: Speech) -> dict[str, dict[str, list[int]]]:
    """Kind -> make -> its utterances of that kind."""
    kind_of = {turn.question: kind for kind, those in all_turns().items() for turn in those}
    found: dict[str, dict[str, list[int]]] = {}
    for make in speech.makes.keys() - {"moshi"}:
        for i in speech.makes[make]:
            found.setdefault(kind_of[speech.texts[i]], {}).setdefault(make, []).append(i)
    return {kind: dict(sorted(makes.items())) for kind, makes in found.items()}


HEARD_FILE = 100  # conversations in a file of work/heard


@torch.no_grad()
def stage_heard(work: Path, files: int = 80, batch: int = 4) -> None:
    """Users' sides of conversations, encoded: work/heard/NUMBER.npz. Each is another microphone."""
    mimi, speech = finished_codec(work), Speech(work)
    by_kind = utterances_by_kind(speech)
    lengths = {speech.texts[i]: -(-len(speech.sounds[i]) // FRAME) for i in speech.makes["moshi"]}
    (work / "heard").mkdir(exist_ok=True)
    for number in range(files):
        path = work / "heard" / f"{number}.npz"
        progress("heard", number, files)
        if path.exists():
            continue
        forget(work, "lm.pt")  # it has not heard these
        encoded, parts = [], []
        for start in range(0, HEARD_FILE, batch):
            users = [User(speech, by_kind, random_numbers(5, number, start + i)) for i in range(batch)]
            sides = [user.converse(lengths) for user in users]
            waves = torch.from_numpy(np.stack([wave for wave, _ in sides])).float()[:, None].to(DEVICE)
            # As a stream: what so short a chunk needs stays in the cache, which takes two thirds of the time.
            state, chunks = init_state(mimi, batch), waves.split(16 * FRAME, dim=-1)
            codes = torch.cat([mimi.encode(chunk, state) for chunk in chunks], dim=-1).cpu().numpy()
            # In the program Moshi makes a frame before it has heard one: the first is heard twice.
            encoded.append(codes[:, :, [0, *range(LONG - 1)]].astype(np.int16))
            parts += [those for _, those in sides]
        with whole_file(path) as file:
            np.savez(file, codes=np.concatenate(encoded), parts=json.dumps(parts))


class Heard:
    """What `stage_heard` saved: codes [N, 8, LONG], and the turns of each."""

    def __init__(self, work: Path):
        files = [np.load(path) for path in sorted((work / "heard").glob("*.npz"))]
        if not files:
            needed(work / "heard" / "0.npz", "heard")
        self.codes = np.concatenate([file["codes"] for file in files])
        self.parts = [
            [Part(*part) for part in those] for file in files for those in json.loads(str(file["parts"]))
        ]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, list[Part]]:
        """The user's codes [8, FRAMES] of a stream that begins, or of one that goes on; the turns in it."""
        i = int(rng.integers(len(self.codes)))
        starts = [part.start for part in self.parts[i][1:]]
        shift = 0
        if rng.random() < 0.6:
            shift = (
                max(0, pick(rng, starts) - int(rng.integers(2, 12))) if starts else int(rng.integers(FRAMES))
            )
            shift = min(shift, LONG - FRAMES)
        turns = [
            part._replace(start=part.start - shift, end=part.end - shift, stop=max(-1, part.stop - shift))
            for part in self.parts[i]
        ]
        return self.codes[i, :, shift : shift + FRAMES], [turn for turn in turns if turn.start >= 0]


# ------------------------------------------------------------------------------------------- Moshi's side


class Own:
    """Moshi's words as codes."""

    def __init__(self, speech: Speech, mimi: Mimi, tokenizer: sentencepiece.SentencePieceProcessor):
        codes, nothing = encode_own(speech, mimi)
        self.silence = nothing[:, -1]  # [8], of silence that has lasted long
        # (the word before, the word, is it the last?) -> [(codes [8, F], frames, tokens), ...]
        self.words: dict[tuple[str, str, bool], list] = {}
        for i, (sentence, length) in zip(speech.makes["moshi"], codes):
            self.cut(speech.texts[i].split(), sentence, length, speech.words[i], tokenizer)

    def cut(self, words: list[str], codes: np.ndarray, length: int, starts: list[float], tokenizer) -> None:
        """Cuts a sentence of Moshi into its words, each from the frame where it starts to the next one's."""
        assert len(words) == len(starts), f"espeak-ng says {' '.join(words)!r} in {len(starts)} words"
        begins = [0, *(int(start * RATE / FRAME) for start in starts[1:])]
        sound_ends = [*begins[1:], length]
        ends = [*begins[1:], codes.shape[1]]  # the last word keeps the silence after it
        for key, begin, sound_end, end in zip(word_keys(words), begins, sound_ends, ends):
            _, word, _ = key
            piece = codes[:, begin:end], sound_end - begin, tokenizer.encode(word)
            self.words.setdefault(key, []).append(piece)


def word_keys(words: list[str]) -> list[tuple[str, str, bool]]:
    """(the word before, the word, is it the last?) for each word of a sentence."""
    return [(before, word, n == len(words)) for n, (before, word) in enumerate(zip(["", *words], words), 1)]


@torch.no_grad()
def encode_own(speech: Speech, mimi: Mimi) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    """[(codes [8, F], frames until the speech ends), ...] of Moshi's sentences, and of silence [8, 100]."""
    result = []
    for i in speech.makes["moshi"]:
        x = speech[i]
        end = -(-len(x) // FRAME)
        x = np.pad(x, (LEAD * FRAME, (end + OWN_TAIL) * FRAME - len(x)))
        codes = mimi.encode(torch.from_numpy(x)[None, None].to(DEVICE))[0].cpu().numpy()
        result.append((codes[:, LEAD:], end))
    silence = mimi.encode(torch.zeros(1, 1, 100 * FRAME, device=DEVICE))[0].cpu().numpy()
    return result, silence


class Streams:
    """Moshi's streams of a conversation while it is put together; at first it is silent."""

    def __init__(self, own: Own, rng: np.random.Generator):
        self.own, self.rng = own, rng
        self.text = np.full(FRAMES, PAD)
        self.moshi = np.tile(own.silence[:, None], FRAMES)

    def speak(self, sentence: str, at: int) -> int:
        """Moshi says it; returns the frame where its sound ends.

        Each word is taken from any of the sentences that have it after the same word, and as the last or not.
        Whole sentences would always be the same codes, and the sound of the first word would give away how
        the sentence ends: the model would follow its own voice instead of listening.
        """
        for key in word_keys(sentence.split()):
            codes, length, tokens = pick(self.rng, self.own.words[key])
            put(self.moshi, codes, at)
            if at <= FRAMES and self.text[at - 1] == PAD:
                self.text[at - 1] = EPAD
            self.text[at : at + len(tokens)] = tokens[: max(0, FRAMES - at)]
            at += length
        return at

    def hush(self, at: int) -> None:
        """From this frame on Moshi is silent."""
        self.text[at:] = PAD
        self.moshi[:, at:] = self.own.silence[:, None]

    def answer(self, turn: Turn, start: int) -> None:
        """Moshi's answer from frame `start` on: a sentence, or it counts."""
        if turn.count_from is None:
            if turn.answer:
                self.speak(turn.answer, start)
            return
        for number in NUMBERS[turn.count_from :]:
            if start > FRAMES:
                return
            start += max(COUNT_EVERY, self.speak(number, start) - start + 2)


def put(stream: np.ndarray, codes: np.ndarray, at: int) -> None:
    """Writes codes [8, F] into a stream [8, FRAMES] from a frame on, as far as it goes."""
    stream[:, at : at + codes.shape[1]] = codes[:, : max(0, FRAMES - at)]


def conversation(own: Own, heard: Heard, rng: np.random.Generator) -> np.ndarray:
    """The aligned codes [17, FRAMES] of a few turns; what Moshi says is put together anew each time."""
    user, turns = heard.draw(rng)
    streams = Streams(own, rng)
    for part in turns:
        if part.end + ANSWER_AFTER <= FRAMES:
            streams.answer(TURNS[part.question], part.end + ANSWER_AFTER)
        if part.stop >= 0:
            streams.hush(part.stop + STOP_AFTER)
    return np.concatenate([streams.text[None], streams.moshi, user])


def hide_some(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Conversations [B, 17, FRAMES] as the model gets them in training: some codes lost, others wrong."""
    batch, given = len(codes), codes.clone()
    # No single code may decide what was heard: of the user's, some are lost (the semantic ones seldom).
    lost = rng.random((batch, 8, FRAMES)) < np.array([0.05] + 7 * [0.15])[:, None]
    # The acoustic ones tell whose voice it is, and the model must not trust in knowing it: in half of the
    # conversations it hears nothing but the semantic ones, in others only the first few besides.
    lost |= (rng.choice([1, 2, 4, 8], batch, p=[0.5, 0.1, 0.1, 0.3])[:, None] <= np.arange(8))[..., None]
    # Nothing is heard in a tenth of the conversations: there only the text tells the voice what to say.
    lost |= (rng.random(batch) < 0.1)[:, None, None]
    given[:, 9:][torch.from_numpy(lost)] = NO_INPUT
    # Its own codes won't always be those of the training either, and one wrong code must not lead it
    # astray. Hence its voice is unknown in a fifth of the conversations, and strewn with codes of other
    # moments in another fifth.
    voice, share = codes[:, 1:9], rng.random(batch)
    strewn = (rng.random(voice.shape) < 0.1) & (share < 0.4)[:, None, None]
    others = voice.roll((1, int(rng.integers(1, FRAMES))), (0, 2))
    given[:, 1:9] = torch.where(torch.from_numpy(strewn), others, voice)
    given[torch.from_numpy(share < 0.2), 1:9] = NO_INPUT
    return given


def make_tokenizer() -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model of all that Moshi says, with the special tokens where the real one has them."""
    sentences = [turn.answer for those in all_turns().values() for turn in those if turn.answer]
    sentences += NUMBERS * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=160,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def conversation_loss(
    moshi: Moshi, given: Tensor, codes: Tensor, silence: Tensor, rng: np.random.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """`Moshi.loss` on codes [B, 17, F], but the depth decoder, dear as it is, skips most of the silence [8].

    What the model reads is `given`, the codes as `hide_some` leaves them. Steps are those of delayed time.
    Weights: text padding 0.3, the first codebook 10 times the others.
    """
    config, own = moshi.config, 1 + moshi.config.dep_q
    hidden, logits = moshi.temporal(delay(given, [1 + shift for shift in config.delays], moshi.initial))
    steps = delay(codes, config.delays, moshi.initial)[:, :own]  # [B, 9, F], what each step makes
    read = delay(given, config.delays, moshi.initial)[:, :own]  # what of it the depth decoder reads
    weights = torch.where((steps[:, 0] == PAD) | (steps[:, 0] == EPAD), 0.3, 1.0)
    losses = F.cross_entropy(logits.float().transpose(1, 2), steps[:, 0], reduction="none")
    text = (losses * weights).sum() / weights.sum()
    quiet = (steps[:, 1:] == silence[:, None]).all(1)  # [B, F]
    taken = ~quiet | torch.from_numpy(rng.random(quiet.shape) < 0.15).to(quiet.device)
    read = read.transpose(1, 2)[taken].T  # [9, N]
    logits = moshi.depth_decoder(hidden[taken], read[:-1]).float()  # [8, N, card]
    targets = steps.transpose(1, 2)[taken].T[1:]
    # Nothing is learnt of what is hidden, nor of the token that starts a stream.
    known = (read[1:] != NO_INPUT) & (targets < config.card)
    weights = known * torch.tensor([10.0] + 7 * [1.0], device=codes.device)[:, None]
    losses = F.cross_entropy(logits.transpose(1, 2), targets.where(known, 0), reduction="none")
    audio = (losses * weights).sum() / weights.sum().clamp(min=1)
    return text + audio, {"text": text, "audio": audio}


LM_LOSSES = ("text", "audio")


def stage_lm(work: Path, steps: int = 9500, batch: int = 8) -> None:
    """Trains Moshi on conversations: work/lm.pt, then writes the whole checkpoint into the folder."""
    tokenizer, heard = make_tokenizer(), Heard(work)
    mimi = finished_codec(work)
    own = Own(Speech(work, ("moshi",)), mimi, tokenizer)
    torch.manual_seed(6)
    moshi = Moshi(dataclasses.replace(MOSHI, text_card=tokenizer.vocab_size())).to(DEVICE)
    optimizer = torch.optim.AdamW(moshi.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    silence = torch.from_numpy(own.silence).to(DEVICE)

    def losses(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = random_numbers(7, 0, step)
        codes = torch.from_numpy(np.stack([conversation(own, heard, rng) for _ in range(batch)]))
        given = hide_some(codes, rng).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            return conversation_loss(moshi, given, codes.to(DEVICE), silence, rng)

    path, modules = work / "lm.pt", {"moshi": moshi}
    history = train(
        path, losses, LM_LOSSES, optimizer, modules, steps, highest=1.2e-3, warmup=100, clip=1.0, every=20
    )
    save_checkpoint(FOLDER, Checkpoint(in_16_bits(moshi), in_16_bits(mimi), tokenizer, SETTINGS))
    write_curve(FOLDER / "lm_loss.tsv", LM_LOSSES, history)
    print(f"lm: finished -> {FOLDER / MOSHI_FILE}")
