"""What is said, and by whom: all questions and answers, espeak-ng that speaks them, the stage `data`."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import wave
import zlib
from pathlib import Path

import numpy as np

from files import whole_file
from loop import FOLDER, forget, needed, progress, random_numbers

RATE, FRAME = 24000, 1920  # samples a second, samples a frame

# -------------------------------------------------------------------------------------- what is said, by whom

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
VOICES = [
    "gmw/en-US",
    "gmw/en-US+m3",
    "gmw/en-US+f1",
    "gmw/en-US+f4",
    "gmw/en",
    "gmw/en+m7",
    "gmw/en+f5",
    "gmw/en-GB-x-rp",
    "gmw/en-GB-scotland",
    "gmw/en-GB-scotland+f3",
    "gmw/en-029",
    "gmw/en-US-nyc+m1",
]
MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH = "gmw/en-US+f2", 150, 50
SPEEDS, PITCHES = range(125, 196), range(20, 81)  # words a minute; espeak's scale from 0 to 99
HELD_OUT_SPEEDS, HELD_OUT_PITCHES = range(150, 156), range(46, 53)  # for `eval` alone


@dataclasses.dataclass
class Turn:
    """What the user says and what that calls for: an answer, or counting on, or nothing ('stop')."""

    question: str
    answer: str = ""
    count_from: int | None = None

    @property
    def held_out(self) -> bool:
        """One phrasing with its numbers in ten is left to `eval`; all talk without numbers is trained."""
        has_number = any(word in NUMBERS for word in self.question.split())
        return has_number and zlib.crc32(self.question.encode()) % 10 == 0


def all_turns() -> dict[str, list[Turn]]:
    """Everything that can be asked, by kind."""
    turns: dict[str, list[Turn]] = {"sum": [], "difference": [], "count": [], "talk": []}
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


class Espeak:
    """espeak-ng through its C library: sound, the start of each word and of each phone."""

    class Event(ctypes.Structure):
        """espeak_EVENT of speak_lib.h."""

        _fields_ = [
            ("type", ctypes.c_int),
            ("id", ctypes.c_uint),
            ("text_position", ctypes.c_int),
            ("length", ctypes.c_int),
            ("milliseconds", ctypes.c_int),
            ("sample", ctypes.c_int),
            ("user", ctypes.c_void_p),
            ("name", ctypes.c_char * 8),
        ]

    def __init__(self):
        try:
            self.library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError:
            raise SystemExit("espeak-ng is missing; install it: apt-get install espeak-ng") from None
        # Synchronous (2); events for phones too (1), and no exit() of the whole program (0x8000).
        self.rate = self.library.espeak_Initialize(2, 0, None, 0x8001)
        if self.rate <= 0:
            raise SystemExit("espeak-ng does not start; are its voices there? apt-get install espeak-ng")
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(self.Event)
        )
        self.callback = callback(self.collect)  # kept, or it would be freed under the library's feet
        self.library.espeak_SetSynthCallback(self.callback)

    def collect(self, samples, count: int, events) -> int:
        """Called by the library with pieces of sound and what begins in them, up to an event of type 0."""
        try:
            if count > 0:
                self.sound.append(np.ctypeslib.as_array(samples, (count,)).copy())
            i = 0
            while events[i].type:
                if events[i].type == 7 or events[i].type == 1 and events[i].length:  # a phone, a word
                    starts = self.words if events[i].type == 1 else self.phones
                    starts.append((events[i].sample / self.rate, events[i].name.decode("utf-8", "replace")))
                i += 1
        except BaseException as error:  # a Ctrl-C lands here, and ctypes would print it and go on
            self.error = error
        return int(self.error is not None)  # 1: speak no further

    def say(self, text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, list[float], list]:
        """Sound [T] int16 at 24 kHz, its end cut; starts of words [s]; [(start [s], phone), ...]."""
        self.sound, self.words, self.phones, self.error = [], [], [], None
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise SystemExit(f"espeak-ng does not know the voice {voice}")
        for parameter, value in ((1, speed), (3, pitch), (4, 50)):  # rate, pitch, range
            self.library.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)
        self.library.espeak_Synchronize()
        if self.error is not None:
            raise self.error
        x = np.concatenate(self.sound).astype(np.float64)
        up, down = RATE // math.gcd(RATE, self.rate), self.rate // math.gcd(RATE, self.rate)
        x = np.pad(x, (0, down + -len(x) % down))
        x = np.fft.irfft(np.fft.rfft(x), len(x) * up // down) * up / down  # 22.05 -> 24 kHz, all of the band
        loud = np.flatnonzero(np.abs(x) > 0.005 * 32768)
        x = x[: loud[-1] + 1].clip(-32768, 32767).astype(np.int16)
        return x, [start for start, _ in self.words], self.phones


# ------------------------------------------------------------------------------------------------ stage: data


def all_jobs(questions: int) -> tuple[list[tuple[str, str, int, int]], int]:
    """What espeak-ng is to say, [(text, voice, speed, pitch), ...], and how many, the first, are Moshi's."""
    rng = random_numbers(1)
    jobs = [(text, MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH) for text in sorted(all_answers() | set(NUMBERS))]
    own = len(jobs)
    trained = {
        kind: [turn.question for turn in those if not turn.held_out] for kind, those in all_turns().items()
    }
    kinds = list(trained)
    speeds = [speed for speed in SPEEDS if speed not in HELD_OUT_SPEEDS]
    pitches = [pitch for pitch in PITCHES if pitch not in HELD_OUT_PITCHES]
    for i in range(questions):
        kind = rng.choice(kinds, p=[0.38, 0.27, 0.13, 0.14, 0.08])
        text, voice = str(rng.choice(trained[kind])), VOICES[i % len(VOICES)]
        jobs.append((text, voice, int(rng.choice(speeds)), int(rng.choice(pitches))))
    return jobs, own


def stage_data(work: Path, questions: int = 24000) -> None:
    """Speaks all sentences and saves them: work/speech.npz."""
    path = work / "speech.npz"
    if path.exists():
        print(f"data: {path} is there")
        return
    espeak = Espeak()
    forget(work, "codec.pt", "voice.pt", "encoded.pt", "lm.pt")  # made from other data
    make_recordings(espeak)
    jobs, own = all_jobs(questions)
    names = ["_"]  # phones; 0 is silence
    sounds, words, phones = [], [], []
    for i, job in enumerate(jobs):
        sound, starts, labels = espeak.say(*job)
        sounds.append(sound)
        words.append(starts)
        for _, name in labels:
            if name not in names and not name.startswith("_"):
                names.append(name)
        phones.append([(start, names.index(name) if name in names else 0) for start, name in labels])
        progress("data", i + 1, len(jobs))
    with whole_file(path) as file:
        np.savez(
            file,
            sound=np.concatenate(sounds),
            ends=np.cumsum(list(map(len, sounds))),
            own=own,
            jobs=json.dumps(jobs),
            words=json.dumps(words),
            phones=json.dumps(phones),
            names=json.dumps(names),
        )
    hours = sum(map(len, sounds)) / RATE / 3600
    print(
        f"data: {own} sentences of Moshi, {questions} of users, {hours:.1f} h, {len(names)} phones -> {path}"
    )


# The recordings that come with the checkpoint: what is asked, and when, in seconds.
RECORDINGS = {
    "question.wav": [(0.4, "what is seven plus eight")],
    "hello.wav": [(0.4, "hello")],
    "count.wav": [(0.4, "count from three"), (6.2, "stop")],
    "conversation.wav": [
        (0.4, "good morning"),
        (4.0, "how much is nine minus four"),
        (9.0, "count from seventeen"),
        (14.6, "stop"),
        (16.4, "who are you"),
        (20.2, "thank you"),
    ],
}


def make_recordings(espeak: Espeak) -> None:
    """Writes them into the folder, as 16-bit WAV at 24 kHz."""
    for i, (name, questions) in enumerate(RECORDINGS.items()):
        sound = np.zeros(0, np.int16)
        for at, text in questions:
            x, _, _ = espeak.say(text, VOICES[3 * i], HELD_OUT_SPEEDS[2], HELD_OUT_PITCHES[3])
            sound = np.concatenate([sound, np.zeros(int(at * RATE) - len(sound), np.int16), x])
        with wave.open(str(FOLDER / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(sound.astype("<i2").tobytes())


class Speech:
    """What `stage_data` saved."""

    def __init__(self, work: Path):
        file = np.load(needed(work / "speech.npz", "data"))
        self.sound, self.ends, self.own = file["sound"], file["ends"], int(file["own"])
        self.jobs, self.words, self.names = (json.loads(str(file[key])) for key in ("jobs", "words", "names"))
        phones = json.loads(str(file["phones"]))
        self.phones = [(np.array([p[0] for p in those]), np.array([p[1] for p in those])) for those in phones]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> np.ndarray:
        """Utterance i, float32 [T] in -1..1."""
        start = self.ends[i - 1] if i else 0
        return self.sound[start : self.ends[i]].astype(np.float32) / 32768

    def phone_at(self, i: int, seconds: np.ndarray) -> np.ndarray:
        """The phone that utterance i speaks at these times, 0 where it is silent."""
        starts, labels = self.phones[i]
        where = np.searchsorted(starts, seconds, side="right") - 1
        inside = (where >= 0) & (seconds * RATE < self.ends[i] - (self.ends[i - 1] if i else 0))
        return np.where(inside, labels[where.clip(min=0)], 0)
