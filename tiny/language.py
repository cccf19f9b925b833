"""The stage `lm`: a narrow Moshi learns conversations that are put together from encoded sentences."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from codec import finished_codec
from files import whole_file
from loop import DEVICE, FOLDER, in_16_bits, pick, progress, random_numbers, train, write_curve
from moshi_min import MOSHI_FILE, NO_INPUT, Checkpoint, Moshi, MoshiConfig, save_checkpoint
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
    depformer_dim_feedforward=528,
)
# What config.json says besides the sizes: how to sample, and the silence to put around a recording.
SETTINGS = {
    "lm_gen_config": {"temp": 0.5, "temp_text": 0.4, "top_k": 20, "top_k_text": 5},
    "stt_config": {"audio_silence_prefix_seconds": 0.0, "audio_delay_seconds": 3.0},
}

# Frames of silence around an utterance when it is encoded. After a question the codes take up to 29 frames to
# become those of lasting silence again, as the window of both layers runs empty. Whoever cuts them off before
# trains a model that stops talking a second after each question, at codes that it has never heard. What came
# before it shows in its codes too, so the silence there is LEAD frames or more.
LEAD, TAIL = 4, 30
OWN_TAIL = 8  # Moshi's voice comes from its own codes, and returns to silence when it says so
FRAMES = 160  # of a training conversation, 12.8 s
ANSWER_AFTER, STOP_AFTER = 3, 3  # frames from the end of the user's words to Moshi's first, or to its silence
COUNT_EVERY = 9  # frames from a number to the next, more where it is long


class Encoded:
    """All utterances as codes, and what a conversation is put together from."""

    def __init__(self, speech: Speech, tokenizer: sentencepiece.SentencePieceProcessor):
        codes, nothing = encode_all(speech)
        self.silence = nothing[:, -1]  # [8], of silence that has lasted long
        self.start = nothing[:, [0, *range(TAIL)]]  # [8, 31], of a new stream; its first frame goes in twice
        self.users: dict[str, list] = {}  # question -> [(codes [8, F], frames of it with speech), ...]
        # Moshi's words: (the word before, the word, is it the last?) -> [(codes [8, F], frames, tokens), ...]
        self.words: dict[tuple[str, str, bool], list] = {}
        for i, (text, *_) in enumerate(speech.jobs):
            if i >= speech.own:
                self.users.setdefault(text, []).append(codes[i])
            else:
                self.cut(text.split(), *codes[i], speech.words[i], tokenizer)

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
def encode_all(speech: Speech, batch: int = 32) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    """[(codes [8, F], frames until the speech ends), ...] of all utterances, and of silence [8, 100]."""
    mimi, rng, result = finished_codec(), random_numbers(5), [None] * len(speech)
    order = sorted(range(len(speech)), key=lambda i: len(speech[i]))
    for start in range(0, len(order), batch):
        rows, sounds, ends = order[start : start + batch], [], []
        for i in rows:
            own = i < speech.own  # starts on a frame; a user starts anywhere, loud or soft
            offset, gain = (0, 1.0) if own else (int(rng.integers(FRAME)), 10 ** rng.uniform(-0.4, 0.15))
            sounds.append(np.pad(speech[i] * gain, (offset, 0)))
            ends.append(-(-len(sounds[-1]) // FRAME))
        lead = int(rng.integers(LEAD, TAIL))  # the first turn comes soon, the others after long silence
        wave = np.zeros((len(rows), 1, (lead + max(ends) + TAIL) * FRAME), np.float32)
        for row, x in enumerate(sounds):
            wave[row, 0, lead * FRAME : lead * FRAME + len(x)] = x.clip(-1, 1)
        codes = mimi.encode(torch.from_numpy(wave).to(DEVICE)).cpu().numpy()
        for row, i in enumerate(rows):
            tail = OWN_TAIL if i < speech.own else TAIL
            result[i] = codes[row, :, lead : lead + ends[row] + tail], ends[row]
        progress("encode", start + len(rows), len(order))
    silence = mimi.encode(torch.zeros(1, 1, 100 * FRAME, device=DEVICE))[0].cpu().numpy()
    return result, silence


class Streams:
    """The streams of a conversation while it is put together; at first both speakers are silent."""

    def __init__(self, encoded: Encoded, rng: np.random.Generator):
        self.encoded, self.rng = encoded, rng
        self.text = np.full(FRAMES, PAD)
        self.moshi, self.user = (np.tile(encoded.silence[:, None], FRAMES) for _ in range(2))

    def speak(self, sentence: str, at: int) -> int:
        """Moshi says it; returns the frame where its sound ends.

        Each word is taken from any of the sentences that have it after the same word, and as the last or not.
        Whole sentences would always be the same codes, and the sound of the first word would give away how
        the sentence ends: the model would follow its own voice instead of listening.
        """
        for key in word_keys(sentence.split()):
            codes, length, tokens = pick(self.rng, self.encoded.words[key])
            put(self.moshi, codes, at)
            if at <= FRAMES and self.text[at - 1] == PAD:
                self.text[at - 1] = EPAD
            self.text[at : at + len(tokens)] = tokens[: max(0, FRAMES - at)]
            at += length
        return at

    def ask(self, question: str, at: int) -> int:
        """The user says it; returns the frame where its sound ends."""
        codes, length = pick(self.rng, self.encoded.users[question])
        put(self.user, codes, at)
        return at + length

    def hush(self, at: int) -> None:
        """From this frame on Moshi is silent."""
        self.text[at:] = PAD
        self.moshi[:, at:] = self.encoded.silence[:, None]

    def count(self, number: int, start: int) -> tuple[int, int | None]:
        """Moshi counts; returns the frame where that ends, and the one where 'stop' breaks it off, if any."""
        stop_at, finish = start + int(self.rng.integers(2, 70)), start
        while number < len(NUMBERS) and start <= min(FRAMES, stop_at + 20):
            finish = self.speak(NUMBERS[number], start)
            start += max(COUNT_EVERY, finish - start + 2)
            number += 1
        return finish, stop_at if stop_at < finish else None

    def answer(self, turn: Turn, end: int) -> tuple[int, int | None]:
        """Moshi answers a question that ended at frame `end`; returns the same two as `count`."""
        start, stop = end + ANSWER_AFTER, None
        if turn.count_from is not None:
            return self.count(turn.count_from, start)
        if not turn.answer:
            return end, None
        finish = self.speak(turn.answer, start)
        if self.rng.random() < 0.05:
            stop = start + int(self.rng.integers(1, 8))
        return finish, stop


def put(stream: np.ndarray, codes: np.ndarray, at: int) -> None:
    """Writes codes [8, F] into a stream [8, FRAMES] from a frame on, as far as it goes."""
    stream[:, at : at + codes.shape[1]] = codes[:, : max(0, FRAMES - at)]


def conversation(encoded: Encoded, turns: dict[str, list[Turn]], rng: np.random.Generator) -> np.ndarray:
    """The aligned codes [17, FRAMES] of a few turns in random order, silence between them."""
    streams = Streams(encoded, rng)
    if rng.random() < 0.5:  # a stream that begins; in the others they have been talking for a while
        put(streams.user, encoded.start, 0)
    at = int(rng.integers(1, 15))
    if rng.random() < 0.06:
        at = int(rng.integers(25, 2 * FRAMES))  # also silence for silence
    while at < FRAMES - 10:
        turn = pick(rng, turns[rng.choice(list(turns), p=[0.37, 0.27, 0.19, 0.13, 0.04])])
        end = streams.ask(turn.question, at)
        finish, stop = streams.answer(turn, end)
        if stop is not None:
            end = streams.ask("stop", stop)
            streams.hush(end + STOP_AFTER)
            finish = end + STOP_AFTER
        at = finish + int(rng.integers(4, 20))
    return np.concatenate([streams.text[None], streams.moshi, streams.user])


def hide_some(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Conversations [B, 17, FRAMES] as the model gets them in training: some codes lost, others wrong."""
    batch = len(codes)
    # No single code may decide what was heard: of the user's, some are lost (the semantic ones seldom).
    lost = rng.random((batch, 8, FRAMES)) < np.array([0.05] + 7 * [0.15])[:, None]
    codes[:, 9:][torch.from_numpy(lost)] = NO_INPUT
    # Nothing is heard in a tenth of the conversations: there only the text tells the voice what to say.
    codes[torch.from_numpy(rng.random(batch) < 0.1), 9:] = NO_INPUT
    # Its own codes won't always be those of the training either, and one wrong code must not lead it
    # astray. Hence its voice is unknown in a fifth of the conversations, and strewn with codes of other
    # moments in another fifth.
    voice, share = codes[:, 1:9], rng.random(batch)
    strewn = (rng.random(voice.shape) < 0.1) & (share < 0.4)[:, None, None]
    others = voice.roll((1, int(rng.integers(1, FRAMES))), (0, 2))
    codes[:, 1:9] = torch.where(torch.from_numpy(strewn), others, voice)
    codes[torch.from_numpy(share < 0.2), 1:9] = NO_INPUT
    return codes


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


def encoded_speech(work: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> Encoded:
    """All utterances as codes, from work/encoded.pt if they are there."""
    path = work / "encoded.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    encoded = Encoded(Speech(work), tokenizer)
    with whole_file(path) as file:
        torch.save(encoded, file)
    return encoded


LM_LOSSES = ("text", "audio")


def stage_lm(work: Path, steps: int = 3200, batch: int = 16) -> None:
    """Trains Moshi on conversations: work/lm.pt, then writes the whole checkpoint into the folder."""
    tokenizer = make_tokenizer()
    encoded, mimi = encoded_speech(work, tokenizer), finished_codec()
    turns = {
        kind: [turn for turn in those if turn.question in encoded.users]
        for kind, those in all_turns().items()
    }
    torch.manual_seed(6)
    moshi = Moshi(dataclasses.replace(MOSHI, text_card=tokenizer.vocab_size())).to(DEVICE)
    optimizer = torch.optim.AdamW(moshi.parameters(), betas=(0.9, 0.98), weight_decay=0.05)

    def losses(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = random_numbers(7, step)
        codes = torch.from_numpy(np.stack([conversation(encoded, turns, rng) for _ in range(batch)]))
        codes = hide_some(codes, rng).to(DEVICE)
        return moshi.loss(codes, text_padding_weight=0.3, first_codebook_weight=10.0)

    path, modules = work / "lm.pt", {"moshi": moshi}
    history = train(
        path, losses, LM_LOSSES, optimizer, modules, steps, highest=1.2e-3, warmup=100, clip=1.0, every=20
    )
    save_checkpoint(FOLDER, Checkpoint(in_16_bits(moshi), in_16_bits(mimi), tokenizer, SETTINGS))
    write_curve(FOLDER / "lm_loss.tsv", LM_LOSSES, history)
    print(f"lm: {path} is at step {steps} -> {FOLDER / MOSHI_FILE}")
