"""What is said: all questions and answers; the stage `data`, in which synthesizers of all makes say them."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np

from files import whole_file
from loop import FOLDER, needed, pick, progress, random_numbers
from voices import HELD_OUT_PITCHES, HELD_OUT_SPEEDS, MAKES, RATE, Espeak, Flite, Spoken, write_wave

FRAME = 1920  # samples

# ----------------------------------------------------------------------------------------------- what is said

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
NUMBERS += [f"twenty {ones}" for ones in NUMBERS[1:10]] + ["thirty"]  # counting ends here
PHRASINGS = {
    "sum": [
        "what is {a} plus {b}",
        "how much is {a} plus {b}",
        "tell me {a} plus {b}",
        "{a} plus {b}",
        "please add {a} and {b}",
        "can you add {a} and {b}",
    ],
    "difference": [
        "what is {a} minus {b}",
        "how much is {a} minus {b}",
        "tell me {a} minus {b}",
        "{a} minus {b}",
        "please take {b} from {a}",
        "can you take {b} from {a}",
    ],
    "count": ["count from {a}", "please count from {a}", "can you count from {a}", "start counting at {a}"],
}
SMALL_TALK = {
    "hello how can i help you": ["hello", "hi there", "good morning"],
    "i am a tiny moshi": ["who are you", "what is your name"],
    "i am fine thank you": ["how are you", "how do you do"],
    "i can add and count": ["what can you do", "what do you know"],
    "you are welcome": ["thank you", "thanks a lot"],
    "goodbye and take care": ["goodbye", "see you later"],
}
MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH = "gmw/en-US+f2", 150, 50
KINDS = {
    "sum": 0.24,
    "difference": 0.17,
    "count": 0.12,
    "talk": 0.12,
    "digit": 0.29,
    "stop": 0.06,
}  # of questions


@dataclasses.dataclass
class Turn:
    """What the user says and what that calls for: an answer, or counting on, or nothing ('stop')."""

    question: str
    answer: str = ""
    count_from: int | None = None

    @property
    def held_out(self) -> bool:
        """One phrasing with its numbers in ten is left to `eval`; single digits and talk are all trained."""
        has_number = any(word in NUMBERS for word in self.question.split()[1:])
        return has_number and zlib.crc32(self.question.encode()) % 10 == 0


def all_turns() -> dict[str, list[Turn]]:
    """Everything that can be asked, by kind."""
    turns: dict[str, list[Turn]] = {"sum": [], "difference": [], "count": [], "talk": []}
    turns["digit"] = [Turn(number, number) for number in NUMBERS[:10]]
    turns["stop"] = [Turn("stop")]
    for a in range(11):
        for b in range(11):
            words = {"a": NUMBERS[a], "b": NUMBERS[b]}
            for text in PHRASINGS["sum"]:
                answer = f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}"
                turns["sum"].append(Turn(text.format(**words), answer))
            for text in PHRASINGS["difference"] if a >= b else []:
                answer = f"{NUMBERS[a]} minus {NUMBERS[b]} is {NUMBERS[a - b]}"
                turns["difference"].append(Turn(text.format(**words), answer))
    for a in range(21):
        turns["count"] += [Turn(text.format(a=NUMBERS[a]), count_from=a) for text in PHRASINGS["count"]]
    turns["talk"] = [Turn(question, answer) for answer, those in SMALL_TALK.items() for question in those]
    return turns


def all_answers() -> set[str]:
    """All sentences of Moshi."""
    return {turn.answer for those in all_turns().values() for turn in those if turn.answer}


# ------------------------------------------------------------------------------------------------ stage: data

CHUNK = 200  # utterances in a file of work/speech
COUNTS = {
    "moshi": 1,
    "rms": 1,
    "espeak": 40,
    "flite": 10,
    "festival": 12,
    "joe": 10,
    "kokoro": 3,
}  # files of each


def trained_questions() -> dict[str, list[str]]:
    """All questions that may be trained, by kind."""
    return {
        kind: [turn.question for turn in those if not turn.held_out] for kind, those in all_turns().items()
    }


def draw_questions(number: int, rng: np.random.Generator) -> list[str]:
    """Questions that may be trained."""
    questions = trained_questions()
    kinds = rng.choice(list(KINDS), number, p=list(KINDS.values()))
    return [pick(rng, questions[kind]) for kind in kinds]


def spoken_texts() -> list[str]:
    """What is said in Moshi's voice."""
    return sorted(all_answers() | set(NUMBERS))


def speak_chunk(make, name: str, number: int) -> tuple[list[str], list[Spoken]]:
    """Texts and utterances of one file."""
    if name == "moshi":
        texts = spoken_texts()
        return texts, [make.say(text, MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH) for text in texts]
    rng = random_numbers(1, sorted(COUNTS).index(name), number)
    texts = draw_questions(CHUNK, rng)
    if name == "rms":
        return texts, [make.say(text, "rms", rng.uniform(0.8, 1.3), 100) for text in texts]
    return texts, [make.draw(text, rng) for text in texts]


def save_chunk(path: Path, texts: list[str], said: list[Spoken]) -> None:
    """Writes them into one file."""
    lists = {"texts": texts, "starts": [one.starts for one in said], "phones": [one.phones for one in said]}
    lists["words"] = [one.words for one in said]
    with whole_file(path) as file:
        np.savez(
            file,
            sound=np.concatenate([one.sound for one in said]),
            ends=np.cumsum([len(one.sound) for one in said]),
            **{key: json.dumps(those) for key, those in lists.items()},
        )


def speak(work: Path, make, name: str) -> None:
    """What this make says, as far as it hasn't been spoken yet."""
    for number in range(COUNTS[name]):
        path = work / "speech" / f"{name}-{number}.npz"
        if not path.exists():
            save_chunk(path, *speak_chunk(make, name, number))
        progress(f"data, {name}", number + 1, COUNTS[name])


def stage_data(work: Path, makes: tuple[str, ...] = tuple(COUNTS)) -> None:
    """Speaks all sentences and saves them: work/speech/MAKE-NUMBER.npz. Missing makes are left out.

    The recordings that come with the checkpoint are made anew, in its folder.
    """
    (work / "speech").mkdir(exist_ok=True)
    old = work / "speech" / "moshi-0.npz"
    if old.exists() and json.loads(str(np.load(old)["texts"])) != spoken_texts():
        raise SystemExit(f"the sentences are no more those of {work / 'speech'}; remove {work} to begin anew")
    make_recordings(Espeak())
    for name in makes:
        try:
            speak(work, {"moshi": Espeak, "rms": Flite, **MAKES}[name](), name)
        except SystemExit as missing:
            if name in ("moshi", "espeak"):
                raise
            cost = "the curves have no `new`" if name == "rms" else "it will understand fewer people"
            print(f"data: without {name}, {cost}: {missing}")


# The recordings that come with the checkpoint: the voice, and what it asks when, in seconds.
RECORDINGS = {
    "question.wav": ("gmw/en-US", [(0.4, "what is seven plus eight")]),
    "hello.wav": ("gmw/en-US+f1", [(0.4, "hello")]),
    "count.wav": ("gmw/en+f5", [(0.4, "count from three"), (6.2, "stop")]),
    "conversation.wav": (
        "gmw/en-US-nyc+m1",
        [
            (0.4, "good morning"),
            (4.0, "how much is nine minus four"),
            (9.0, "count from seventeen"),
            (14.6, "stop"),
            (16.4, "who are you"),
            (20.2, "thank you"),
        ],
    ),
}


def make_recordings(espeak: Espeak) -> None:
    """Writes them into the folder, as 16-bit WAV at 24 kHz."""
    for name, (voice, questions) in RECORDINGS.items():
        sound = np.zeros(0, np.int16)
        for at, text in questions:
            x = espeak.say(text, voice, HELD_OUT_SPEEDS[2], HELD_OUT_PITCHES[3]).sound
            sound = np.concatenate([sound, np.zeros(int(at * RATE) - len(sound), np.int16), x])
        write_wave(FOLDER / name, sound)


class Speech:
    """What `stage_data` saved: all utterances, by make."""

    def __init__(self, work: Path, makes: tuple[str, ...] = ("moshi", *MAKES)):
        self.texts, self.sounds, self.starts, self.phones, self.words = [], [], [], [], []
        self.makes: dict[str, list[int]] = {}  # make -> numbers of its utterances
        for name in makes:
            for path in sorted((work / "speech").glob(f"{name}-*.npz")):
                self.add(name, np.load(path))
        for name in ("moshi", "espeak"):  # without the others it goes on
            if name in makes and name not in self.makes:
                needed(work / "speech" / f"{name}-0.npz", "data")

    def add(self, name: str, file) -> None:
        """The utterances of one file."""
        texts = json.loads(str(file["texts"]))
        self.makes.setdefault(name, []).extend(range(len(self.texts), len(self.texts) + len(texts)))
        self.texts += texts
        self.sounds += np.split(file["sound"], file["ends"][:-1])
        self.words += json.loads(str(file["words"]))
        for key, those in (("starts", self.starts), ("phones", self.phones)):
            those += [np.array(one) for one in json.loads(str(file[key]))]

    def __getitem__(self, i: int) -> np.ndarray:
        """Utterance i, float32 [T] in -1..1."""
        return self.sounds[i].astype(np.float32) / 32768

    def phone_at(self, i: int, seconds: np.ndarray) -> np.ndarray:
        """The phone that utterance i speaks at these times, 0 where it is silent."""
        where = np.searchsorted(self.starts[i], seconds, side="right") - 1
        inside = (where >= 0) & (seconds * RATE < len(self.sounds[i]))
        return np.where(inside, self.phones[i][where.clip(min=0)], 0)
