"""The trained checkpoint in tiny/: it says what it should, stops when told, the official package agrees."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from reference import LMGen, close, loaders, same_codes
from test_generate import parse

from lessons.lab import FRAME, PAD, RATE, decibels, recording, talk, tiny, words
from moshi_min import MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE

TINY = ROOT / "tiny"
ANSWERS = {  # recording -> what Moshi says to it
    "question.wav": "seven plus eight is fifteen",
    "hello.wav": "hello how can i help you",
    "count.wav": "three four five six seven eight nine",
}
CONVERSATION = (
    "hello how can i help you nine minus four is five seventeen eighteen nineteen twenty twenty one "
    "twenty i am a tiny moshi you are welcome"
)  # told to stop in the middle of twenty two
pytestmark = pytest.mark.skipif(not (TINY / MOSHI_FILE).exists(), reason="tiny/ holds no checkpoint yet")


def answer(sound, seed=None):
    """What the checkpoint says to sound [1, 1, T]: words, tokens [9, F], sound [T]. Greedy without a seed."""
    checkpoint = tiny()
    tokens, voice = talk(checkpoint, sound, seed)
    return words(checkpoint, tokens[0]), tokens, voice


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name):
    """Every recording in tiny/ gets its exact answer: greedy, and drawn with the checkpoint's settings."""
    for seed in (None, 4242):
        said, _, sound = answer(recording(name), seed)
        assert said == ANSWERS[name], f"seed {seed}"
        assert decibels(sound).max() > -30, "the words come without sound"


def test_conversation():
    """Six turns in a row, drawn with the settings of the checkpoint and the program's seed."""
    assert answer(recording("conversation.wav"), 4242)[0] == CONVERSATION


def test_program(tmp_path):
    """`python generate.py` in the user's folder answers the question of tiny/, in print and in answer.wav."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ANSWERS["question.wav"].split()
    assert parse((tmp_path / "answer.wav").read_bytes()).std() > 300


@torch.no_grad()
@pytest.mark.parametrize("name", [*ANSWERS, "conversation.wav"])
def test_same_as_the_official_package(name):
    """The official package opens the same folder: the same codes of the user, greedy tokens, and sound.

    Its codec runs offline: streaming, it loses a key of this narrow window after 1.3 s (of the real one after
    10 s).
    """
    asked = recording(name)
    _, tokens, sound = answer(asked)
    info = loaders.CheckpointInfo.from_hf_repo(
        "none",
        TINY / MOSHI_FILE,
        TINY / MIMI_FILE,
        TINY / TOKENIZER_FILE,
        TINY / "config.json",
        TINY / "mimi_config.json",
    )
    mimi, lm = info.get_mimi("cpu"), info.get_moshi("cpu", torch.float32)
    codes = mimi.encode(asked)
    same_codes(tiny().mimi.encode(asked), codes, mimi, mimi.encode_to_latent(asked, quantize=False))
    gen = LMGen(lm, use_sampling=False, **info.lm_gen_config)
    with gen.streaming(1):
        gen.step(codes[..., :1])
        expected = torch.cat([gen.step(codes[..., f : f + 1]) for f in range(codes.shape[-1])], -1)
    assert torch.equal(tokens, expected[0])
    close(sound, mimi.decode(expected[:, 1:])[0, 0], 2e-5)


def test_stops_when_told():
    """Counting ends within 0.7 s of the end of 'stop', and would have gone on without it."""
    asked = recording("count.wav")
    end = int((asked[0, 0].abs() > 0.01).nonzero()[-1])
    _, _, sound = answer(asked)
    after = sound[end + int(0.62 * RATE) :]  # what is heard live comes 0.08 s later than in the file
    assert decibels(after, RATE // 100).max() < -45
    assert decibels(sound[end - RATE : end]).max() > -35, "it was not speaking when told to stop"
    asked[..., end - RATE // 2 :] = 0
    said, _, _ = answer(asked)
    assert len(said.split()) > len(ANSWERS["count.wav"].split()) + 1


def test_says_nothing_to_silence():
    """24 s of silence, far past both windows: PAD and silence."""
    _, tokens, sound = answer(torch.zeros(1, 1, 300 * FRAME))
    assert (tokens[0] == PAD).all() and decibels(sound).max() < -45


def test_small_enough():
    """All weights together take at most 24 MB, and the documents that belong to them are there."""
    assert sum(os.path.getsize(TINY / name) for name in (MIMI_FILE, MOSHI_FILE)) <= 24e6
    assert (TINY / "TRAINING.md").exists() and (TINY / "train.py").exists()
