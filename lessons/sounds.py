"""Makes the sounds that LESSONS.md links, from its own experiments: `python -m lessons.sounds`."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lessons.hear import through
from lessons.lab import EPAD, FRAME, PAD, ROOT, broken, decibels, recording, save_wav, talk, tiny

HERE = ROOT / "lessons" / "sounds"
LONGEST = 50 * FRAME  # 4 s, 192 kB


def trim(sound: Tensor) -> Tensor:
    """From a little before the first loud frame on, at most 4 s; silence stays as it is."""
    loud = (decibels(sound) > -45).nonzero().flatten()
    start = max(0, int(loud[0]) - 2) * FRAME if len(loud) else 0
    end = (int(loud[-1]) + 3) * FRAME if len(loud) else LONGEST
    return sound[start : min(end, start + LONGEST)]


def sounds() -> Iterator[tuple[str, Tensor]]:
    """(the file's name, its sound [T]) of each."""
    checkpoint, question = tiny(), recording("question.wav")
    tokens, voice = talk(checkpoint, question)
    yield "answer", trim(voice)  # lesson 0
    for number, back in through(checkpoint.mimi, recording("question.wav", 0).flatten()):  # lesson 4
        yield f"question-{number}", back
    text = tokens[0].tolist()
    _, silent = talk(checkpoint, question, text=[PAD] * len(text))
    start = next(f for f, token in enumerate(text) if token not in (PAD, EPAD)) * FRAME
    yield "pad-forced", silent[start : start + 20 * FRAME]  # lesson 7: where the answer would be
    _, read = talk(checkpoint, torch.zeros_like(question), text=text[1:])
    yield "text-forced", trim(read)  # lesson 7
    with broken(checkpoint.moshi.config, delays=17 * (0,)):
        yield "delays-broken", trim(talk(checkpoint, question)[1])  # lesson 9


def make(folder: Path = HERE) -> None:
    """Writes all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sound in sounds():
        save_wav(folder / f"{name}.wav", sound)


if __name__ == "__main__":
    make()
