"""The stage `eval`: talks with the finished folder about what training never drew, and prints a table."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F

from codec import MIMI
from generate import converse, read_wav, resample
from language import ANSWER_AFTER, COUNT_EVERY, EPAD, LEAD, PAD
from lessons.lab import distance
from loop import DEVICE, FOLDER, needed, pick, progress, random_numbers
from mimi_min import Mimi, load_mimi
from moshi_min import MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE, MoshiGen, load_checkpoint
from speech import (
    FRAME,
    MOSHI_PITCH,
    MOSHI_SPEED,
    MOSHI_VOICE,
    NUMBERS,
    SMALL_TALK,
    Turn,
    all_answers,
    all_turns,
)
from voices import HELD_OUT_PITCHES, HELD_OUT_SPEEDS, PHONES, RATE, Espeak, Festival, Flite

# Recordings of people, which are not in the repository: DIGIT_SPEAKER_NUMBER.wav, 25 of each digit by each of
# three speakers, from https://github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0).
PEOPLE = FOLDER.parent.parent / "shared" / "human-digits"
TAIL = 30  # frames of silence after a sentence that only the codec hears

# ------------------------------------------------------------------------------------------ the conversations


@dataclasses.dataclass
class Asked:
    """A turn of an examination, and when it was said, in samples."""

    kind: str  # a key of `all_turns`
    turn: Turn
    start: int
    end: int
    until: int = 0  # where the user's next question begins
    stop: int | None = None  # where the word 'stop' ended that broke off the counting


def examination(
    say: Callable[[str], np.ndarray], answers: dict[str, int], rng: np.random.Generator, turns: int = 3
) -> tuple[np.ndarray, list[Asked]]:
    """What a user says in a conversation that training never drew: sound [T], and what was asked when.

    `say` speaks a text, [T] in -1..1; `answers` knows how long each of Moshi's takes, in samples.
    """
    held_out = {
        kind: [turn for turn in those if turn.held_out or kind in ("talk", "digit", "stop")]
        for kind, those in all_turns().items()
    }
    sound, asked = np.zeros(40 * turns * RATE, np.float32), []
    at = int(rng.uniform(0.3, 2) * RATE)

    def ask(text: str, at: int) -> int:
        x = say(text)
        sound[at : at + len(x)] = x
        return at + len(x)

    for _ in range(turns):
        kind = str(rng.choice(list(EXAM_KINDS), p=list(EXAM_KINDS.values())))
        turn = pick(rng, held_out[kind])
        end = ask(turn.question, at)
        asked.append(Asked(kind, turn, at, end))
        finish = end + ANSWER_AFTER * FRAME
        if turn.count_from is not None:
            most = (len(NUMBERS) - turn.count_from) * COUNT_EVERY * FRAME / RATE
            finish = ask("stop", finish + int(rng.uniform(1, min(8, most)) * RATE))
            asked[-1].stop = finish
        elif turn.answer:
            finish += answers[turn.answer]
        at = finish + int(rng.uniform(0.9, 2.5) * RATE)
        asked[-1].until = at
    return sound[: at + 2 * RATE], asked


EXAM_KINDS = {"sum": 0.27, "difference": 0.23, "count": 0.22, "talk": 0.14, "digit": 0.1, "stop": 0.04}
VOICES = (
    "en-US en-US+m3 en-US+f1 en-US+f4 en en+m7 en+f5 en-GB-x-rp en-GB-scotland en-GB-scotland+f3 en-029 "
    "en-US-nyc+m1"
).split()  # of espeak-ng; a conversation has one of them


def espeak_says(espeak: Espeak, rng: np.random.Generator) -> Callable[[str], np.ndarray]:
    """One of its voices, at speeds and pitches that training never drew."""
    voice = f"gmw/{pick(rng, VOICES)}"

    def say(text: str) -> np.ndarray:
        speed, pitch = int(rng.choice(HELD_OUT_SPEEDS)), int(rng.choice(HELD_OUT_PITCHES))
        return espeak.say(text, voice, speed, pitch).sound / np.float32(32768)

    return say


def strangers(rng: np.random.Generator) -> dict[str, Callable[[str], np.ndarray]]:
    """The voices of other makes that nothing was trained on or chosen by, as far as they are installed."""
    found: dict[str, Callable[[str], np.ndarray]] = {}

    def speaker(make, *voice) -> Callable[[str], np.ndarray]:
        return lambda text: (
            make.say(text, *voice[:1], rng.uniform(0.9, 1.2), *voice[1:]).sound / np.float32(32768)
        )

    for name, make, *voice in STRANGERS:
        try:
            found[name] = speaker(make(), *voice)
            found[name]("yes")  # is this voice there?
        except SystemExit as missing:
            found.pop(name, None)
            print(f"eval: {name} is left out: {missing}", file=sys.stderr)
    return found


STRANGERS = (  # name, make, its voice, mean pitch [Hz] as that voice has it
    ("flite slt", Flite, "slt", 180),
    ("flite awb", Flite, "awb", 130),
    ("festival slt", Festival, "cmu_us_slt_arctic_hts", 180),
)


@torch.no_grad()
def talk(sounds: list[np.ndarray], greedy: bool) -> tuple[np.ndarray, np.ndarray]:
    """The finished folder listens to all at once, by the frame: text [B, F], Moshi's sound [B, F * 1920]."""
    torch.manual_seed(11)
    moshi, mimi, _, config = load_checkpoint(FOLDER, DEVICE)
    gen = MoshiGen(moshi, len(sounds), greedy=greedy, **config["lm_gen_config"])
    frames = max(-(-len(x) // FRAME) for x in sounds)
    user = np.stack([np.pad(x, (0, frames * FRAME - len(x))) for x in sounds])[:, None]
    user, text, wave = torch.from_numpy(user).to(DEVICE), [], []
    for _, said, sound in converse(mimi, gen, user.split(FRAME, dim=-1)):
        text.append(said[:, 0, 0].cpu())
        wave.append(sound[:, 0].cpu())
        progress("talk", len(text), frames)
    return torch.stack(text, 1).numpy(), torch.cat(wave, 1).numpy()


def shipped_codec() -> Mimi:
    """The codec in the folder."""
    return load_mimi(FOLDER / MIMI_FILE, MIMI, 8, DEVICE)


# ---------------------------------------------------------------------------------------------- what is heard


class Recogniser:
    """pocketsphinx with a grammar of what Moshi can say: a listener that nobody here has trained."""

    GRAMMAR = """#JSGF V1.0;
        grammar words;
        <ones> = one | two | three | four | five | six | seven | eight | nine;
        <small> = zero | <ones> | ten;
        <number> = <small> | eleven | twelve | thirteen | fourteen | fifteen | sixteen | seventeen | eighteen
                 | nineteen | twenty | (twenty <ones>) | thirty;
        """
    ANSWERS = "(<small> (plus | minus) <small> is <number>) | <number>+ | "
    DIGITS = "zero | <ones>"

    def __init__(self, work: Path, digits: bool = False):
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise SystemExit("pocketsphinx is missing; install it: pip install pocketsphinx") from None

        grammar = work / f"{'digits' if digits else 'answers'}.jsgf"
        known = [answer.replace("moshi", "mow she") for answer in SMALL_TALK]  # a word that it does not know
        answers = self.ANSWERS + " | ".join(f"({answer})" for answer in known)
        grammar.write_text(f"{self.GRAMMAR}public <heard> = {self.DIGITS if digits else answers};\n")
        self.decoder = Decoder(jsgf=str(grammar), samprate=16000, loglevel="FATAL")

    def hear(self, x: np.ndarray) -> list[str]:
        """Words in the sound [T] at 24 kHz."""
        sound = resample(torch.from_numpy(np.pad(x.astype(np.float32), 6000)), RATE, 16000).clamp(-1, 1)
        self.decoder.start_utt()
        self.decoder.process_raw((sound * 32767).numpy().astype("<i2").tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr.replace("mow she", "moshi").split() if found else []

    def heard(self, x: np.ndarray, words: list[str]) -> np.ndarray:
        """Which of the words are heard in the sound [T], in their order: [len(words)] of bool."""
        found = np.zeros(len(words), bool)
        matcher = difflib.SequenceMatcher(None, words, self.hear(x), autojunk=False)
        for block in matcher.get_matching_blocks():
            found[block.a : block.a + block.size] = True
        return found


def moshi_says(espeak: Espeak, text: str) -> np.ndarray:
    """The text in the voice that Moshi learnt from: sound [T] in -1..1."""
    return espeak.say(text, MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH).sound / np.float32(32768)


def decibels(x: np.ndarray, block: int) -> np.ndarray:
    """RMS of each whole block of x [T], in dB of full scale."""
    blocks = x[: len(x) // block * block].reshape(-1, block)
    return 20 * np.log10(np.sqrt(np.mean(blocks**2, axis=1)) + 1e-9)


def words_said(tokens: np.ndarray, tokenizer) -> list[str]:
    """The words of a piece of the text stream."""
    return tokenizer.decode([int(token) for token in tokens if token not in (PAD, EPAD)]).split()


def is_right(asked: Asked, words: list[str], last: int | None) -> bool:
    """Is this the answer? A count is right if it goes up from its first number until 'stop' (or thirty)."""
    if asked.turn.count_from is None:
        return " ".join(words) == asked.turn.answer
    numbers = " ".join(NUMBERS[asked.turn.count_from :]) + " "
    in_order = bool(words) and numbers.startswith(" ".join(words) + " ")
    if not in_order:
        return False
    early = asked.stop - last * FRAME  # from the last number's start to the end of 'stop', in samples
    return early > -0.7 * RATE and (words[-1] == "thirty" or early < 1.5 * COUNT_EVERY * FRAME)


# -------------------------------------------------------------------------------------------------- the table


class Tally:
    """The table: what was counted, in rows that stand in the order in which they were first counted."""

    def __init__(self):
        self.rows: dict[tuple[str, str], list[int] | str] = {}

    def add(self, row: str, goal: str, hits: int, of: int = 1) -> None:
        """Counts `hits` of `of` cases more."""
        counts = self.rows.setdefault((row, goal), [0, 0])
        counts[0], counts[1] = counts[0] + int(hits), counts[1] + of

    def measure(self, row: str, goal: str, what: str) -> None:
        """Something that isn't counted."""
        self.rows[row, goal] = what

    def __str__(self) -> str:
        rows = []
        for (row, goal), counts in self.rows.items():
            shown = f"{counts} | "
            if not isinstance(counts, str):
                hits, of = counts
                shown = f"{hits} of {of} | {100 * hits / max(of, 1):.1f} %"
            rows.append(f"| {row} | {shown} | {goal} |")
        return "\n".join(["| what | count | share | goal |", "| --- | --- | --- | --- |", *rows])


def score_text(
    tally: Tally, how: str, asked: Asked, tokens: np.ndarray, tokenizer, goal: str = "98 %"
) -> bool:
    """Does the text stream [F] answer what was asked?"""
    first, last = asked.end // FRAME, asked.until // FRAME
    onsets = first + np.flatnonzero(~np.isin(tokens[first:last], (PAD, EPAD)))
    words = words_said(tokens[first:last], tokenizer)
    good = is_right(asked, words, int(onsets[-1]) if len(onsets) else None)
    tally.add(f"text of the answer exactly right, {how}", goal, good)
    tally.add(f"... {asked.kind}, {how}", "", good)
    if not good:
        print(f"{how}: asked {asked.turn.question!r}, said {' '.join(words)!r}", file=sys.stderr)
    return good


def score_timing(tally: Tally, asked: Asked, sound: np.ndarray) -> None:
    """Is Moshi's sound [T] there when it should be, and only then?

    Heard live, an answer is 80 ms later than in the file: a frame is answered when it is over.
    """
    block = RATE // 100  # 10 ms
    during = decibels(sound[asked.start : asked.end], FRAME) > -45
    tally.add("frames of the user's questions in which Moshi speaks", "under 2 %", during.sum(), len(during))
    if asked.turn.answer or asked.turn.count_from is not None:
        loud = np.flatnonzero(decibels(sound[asked.end : asked.until], block) > -45)
        in_time = len(loud) > 0 and 0.1 <= loud[0] / 100 + FRAME / RATE <= 0.8
        tally.add("answers that begin 0.1 to 0.8 s after the question's end", "95 %", in_time)
    if asked.stop is not None:
        was_speaking = (decibels(sound[asked.stop - RATE : asked.stop], block) > -45).any()
        after = decibels(sound[asked.stop : asked.stop + 2 * RATE], block) > -45
        quiet = [t for t in range(len(after) - 49) if not after[t : t + 50].any()]  # for half a second
        in_time = len(quiet) > 0 and quiet[0] / 100 + FRAME / RATE <= 0.7
        tally.add(
            "silent within 0.7 s of the end of 'stop'", "95 %", was_speaking and in_time, of=int(was_speaking)
        )


def score_words(
    tally: Tally, espeak: Espeak, recogniser: Recogniser, right: list[tuple[str, np.ndarray]]
) -> None:
    """Are the words of right answers, [(what the text says, Moshi's sound [T]), ...], to be heard as well?

    The recogniser misses some words even of the voice that Moshi learnt from. So only those count that it
    hears there, and each must be heard from Moshi too: another that happens to be clear makes up for nothing.
    """
    for answer, sound in right:
        words = answer.split()
        plain = moshi_says(espeak, answer)
        clear = recogniser.heard(plain, words)
        row = "words of right answers that the recogniser hears when espeak-ng says them"
        tally.add(row, "", clear.sum(), len(words))
        heard = recogniser.heard(sound, words) & clear
        tally.add(
            "... and that it hears when Moshi says them too, of those", "95 %", heard.sum(), clear.sum()
        )


@torch.no_grad()
def codec_alone(espeak: Espeak, recogniser: Recogniser) -> dict[int, tuple[int, int]]:
    """{codebooks: (words of Moshi's sentences heard when coded with so many, of those heard anyway)}."""
    mimi, found = shipped_codec(), {number: [0, 0] for number in (8, 4, 2, 1)}
    for text in sorted(all_answers()):
        x = moshi_says(espeak, text)
        codes = mimi.encode(torch.from_numpy(np.pad(x, (LEAD * FRAME, TAIL * FRAME)))[None, None].to(DEVICE))
        clear = recogniser.heard(x, text.split())
        for number, counts in found.items():
            sound = mimi.decode(codes[:, :number])[0, 0, LEAD * FRAME : LEAD * FRAME + len(x)].cpu().numpy()
            counts[0] += int((recogniser.heard(sound, text.split()) & clear).sum())
            counts[1] += int(clear.sum())
    return {number: tuple(counts) for number, counts in found.items()}


@torch.no_grad()
def phones_in_codes(
    espeak: Espeak, rng: np.random.Generator, sentences: int = 400
) -> dict[int, tuple[int, int]]:
    """{codebook: (frames whose phone its code tells, frames)}: each code stands for its most frequent phone.

    What is most frequent is counted on every other sentence, and told on those between; silence is left out.
    """
    mimi, frames = shipped_codec(), ([], [])
    for i in range(sentences):
        turn = pick(rng, all_turns()[pick(rng, ["sum", "difference", "count", "talk"])])
        speed, pitch = int(rng.choice(HELD_OUT_SPEEDS)), int(rng.choice(HELD_OUT_PITCHES))
        said = espeak.say(turn.question, f"gmw/{pick(rng, VOICES)}", speed, pitch)
        x = torch.from_numpy(said.sound / np.float32(32768))[None, None].to(DEVICE)
        codes = mimi.encode(x)[0].cpu().numpy()
        for f in range(len(said.sound) // FRAME):
            phone = said.phones[np.searchsorted(said.starts, (f + 0.25) * FRAME / RATE, side="right") - 1]
            if phone:
                frames[i % 2].append((phone, codes[:, f]))
    found = {}
    for k in (0, 1):
        counts = np.zeros((MIMI.bins, len(PHONES)))
        for phone, codes in frames[0]:
            counts[codes[k], phone] += 1
        told = counts.argmax(1)
        found[k] = (sum(int(told[codes[k]] == phone) for phone, codes in frames[1]), len(frames[1]))
    return found


def score_codec(tally: Tally, espeak: Espeak, recogniser: Recogniser) -> None:
    """What the codec keeps: of words, and of phones in its first two codebooks."""
    for number, (heard, clear) in codec_alone(espeak, recogniser).items():
        row = (
            "words of all sentences that it hears from espeak-ng, and through the codec alone too, with "
            f"{number} of 8 codebooks"
        )
        tally.add(row, "97 %" if number == 8 else "", heard, clear)
    for k, (hits, frames) in phones_in_codes(espeak, random_numbers(10)).items():
        which = ("first, semantic", "second, acoustic")[k]
        tally.add(f"phones that the {which} code tells", "", hits, frames)


def score_silence(tally: Tally) -> None:
    """Does it say nothing to 80 s of silence, of noise, of a hum?"""
    rng, length = random_numbers(12), 1000 * FRAME
    times = np.arange(length) / RATE
    tones = sum(np.sin(2 * np.pi * 50 * k * times) / k for k in range(1, 6))
    sounds = {
        "silence": np.zeros(length),
        "noise at -40 dBFS": 0.01 * rng.standard_normal(length),
        "a hum at -40 dBFS": 0.01 * tones / tones.std(),
    }
    tokens, waves = talk([x.astype(np.float32) for x in sounds.values()], greedy=True)
    for what, text, wave in zip(sounds, tokens, waves):
        says = (decibels(wave, FRAME) > -45) | ~np.isin(text, (PAD, EPAD))
        tally.add(f"frames of {what} in which Moshi says something", "none", says.sum(), len(says))


# ------------------------------------------------------------------------------------------- who it never met


def score_strangers(
    tally: Tally, voices: dict[str, Callable[[str], np.ndarray]], answers: dict[str, int], tokenizer
) -> None:
    """200 questions of each voice of another make."""
    rng = random_numbers(13)
    for name, say in voices.items():
        exams = [examination(say, answers, rng, turns=5) for _ in range(40)]
        text, _ = talk([sound for sound, _ in exams], greedy=True)
        for (_, those), tokens in zip(exams, text):
            for asked in those:
                score_text(tally, f"greedy, {name}", asked, tokens, tokenizer, "85 %")


def human_digits(folder: Path) -> list[tuple[str, np.ndarray]]:
    """[(the digit as a word, sound [T] at 24 kHz), ...] of files named DIGIT_SPEAKER_NUMBER.wav."""
    found = []
    for path in sorted(folder.glob("[0-9]_*.wav")):
        sound, rate = read_wav(path)
        found.append((NUMBERS[int(path.name[0])], resample(sound, rate, RATE).numpy()))
    return found


@torch.no_grad()
def score_people(tally: Tally, work: Path, folder: Path, tokenizer) -> None:
    """Single digits of people: does Moshi say them back? Are they still heard after the codec?"""
    digits = human_digits(folder)
    if not digits:
        print(f"eval: no recordings of people in {folder}; their rows are left out", file=sys.stderr)
        return
    for start in range(0, len(digits), 250):
        some = digits[start : start + 250]
        text, _ = talk([np.pad(x, (RATE // 2, 5 * RATE // 2)) for _, x in some], greedy=True)
        for (digit, _), tokens in zip(some, text):
            said = words_said(tokens, tokenizer)
            tally.add("digits of people that Moshi says back, greedy", "75 %", said == [digit])
    recogniser, mimi = Recogniser(work, digits=True), shipped_codec()
    for digit, x in digits:
        if recogniser.hear(x) != [digit]:
            continue
        codes = mimi.encode(torch.from_numpy(np.pad(x, (LEAD * FRAME, TAIL * FRAME)))[None, None].to(DEVICE))
        for number in (8, 4, 2, 1):
            y = mimi.decode(codes[:, :number])[0, 0, LEAD * FRAME :].cpu().numpy()
            row = f"digits of people that the recogniser knows, and after {number} of 8 codebooks too"
            tally.add(row, "85 %" if number == 8 else "", recogniser.hear(y) == [digit])


@torch.no_grad()
def score_distance(tally: Tally, voices: dict[str, Callable[[str], np.ndarray]]) -> None:
    """How far the codec's sound is from the original, with fewer and fewer codebooks."""
    mimi = shipped_codec()
    for name, say in voices.items():
        far = {number: [] for number in (8, 4, 2, 1)}
        for question in ("what is seven plus eight", "please count from three", "how do you do"):
            x = torch.from_numpy(np.pad(say(question), (LEAD * FRAME, TAIL * FRAME)))[None, None].to(DEVICE)
            x = F.pad(x, (0, -x.shape[-1] % FRAME))
            codes = mimi.encode(x)
            for number, those in far.items():
                those.append(distance(x.cpu(), mimi.decode(codes[:, :number]).cpu()))
        shown = ", ".join(f"{np.mean(those):.1f}" for those in far.values())
        tally.measure(
            f"distance from {name} with 8, 4, 2 and 1 codebooks [dB]", "0.7 at each doubling", shown
        )


def stage_eval(work: Path, conversations: int = 200, people: Path = PEOPLE) -> None:
    """Talks with the folder and prints what came of it, as a table in Markdown."""
    for name in (MIMI_FILE, MOSHI_FILE, "config.json"):
        needed(FOLDER / name, "lm")
    espeak, rng, recogniser, tally = Espeak(), random_numbers(8), Recogniser(work), Tally()
    answers = {answer: len(moshi_says(espeak, answer)) for answer in all_answers()}
    voices = strangers(random_numbers(14))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / TOKENIZER_FILE))
    score_strangers(tally, voices, answers, tokenizer)
    score_people(tally, work, people, tokenizer)
    score_distance(tally, voices)
    exams = [examination(espeak_says(espeak, rng), answers, rng) for _ in range(conversations)]
    for how in ("greedy", "sampled"):
        text, waves = talk([sound for sound, _ in exams], greedy=how == "greedy")
        marked = [
            (asked, score_text(tally, how, asked, tokens, tokenizer), sound)
            for (_, those), tokens, sound in zip(exams, text, waves)
            for asked in those
        ]
        if how == "sampled":
            continue
        for asked, _, sound in marked:
            score_timing(tally, asked, sound)
        right = [
            (asked.turn.answer, sound[asked.end : asked.until])
            for asked, good, sound in marked
            if good and asked.turn.answer
        ]
        score_words(tally, espeak, recogniser, right)
    score_codec(tally, espeak, recogniser)
    score_silence(tally)
    print(tally)
