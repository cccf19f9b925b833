"""What stands beside LESSONS.md: breaks that mend themselves, and things to hear."""

import re

import pytest
import torch
from conftest import ROOT

from generate import read_wav
from lessons import hear, lab, sounds
from mimi_min import Mimi, MimiConfig

TEXT = (ROOT / "LESSONS.md").read_text()
SMALL = {"n_filters": 2, "dimension": 16, "num_layers": 1, "num_heads": 2, "dim_feedforward": 16, "bins": 16}


def test_what_is_broken_is_mended_even_after_a_failure():
    """`broken` and `kept_weights` put back what was there, whatever happens in their block."""

    class Thing:
        size = 3

    one, two = Thing(), Thing()
    with pytest.raises(ZeroDivisionError), lab.broken(one, two, size=4):
        assert one.size == two.size == 4
        1 / 0  # noqa: B018
    assert one.size == two.size == 3
    with pytest.raises(AttributeError), lab.broken(one, colour="red"):
        pass
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), lab.kept_weights(layer):
        torch.nn.init.zeros_(layer.weight)
        1 / 0  # noqa: B018
    assert torch.equal(layer.weight, weight)


def test_hear(tmp_path, capsys):
    """A WAV for each number of codebooks, as the codec decodes them, and all in a row behind the original."""
    question = lab.ROOT / "tiny" / "question.wav"
    assert hear.main([str(question), "-o", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    original, (mimi, _) = lab.recording("question.wav", 0).flatten(), lab.tiny()[1::-1]
    codes, pause = mimi.encode(original[None, None]), torch.zeros(lab.RATE // 2)
    row = [original]
    for number in (8, 4, 2, 1):
        back = mimi.decode(codes[:, :number])[0, 0]
        row += [pause, back]
        found, rate = read_wav(tmp_path / f"question-{number}.wav")
        assert rate == 24000 and torch.allclose(found, back, atol=1e-4)
        assert f"{number} {100 * number:8,.0f} {lab.distance(original, back):6.1f} dB" in table
    assert torch.allclose(read_wav(tmp_path / "question-all.wav")[0], torch.cat(row), atol=1e-4)


def test_hear_counts_the_codebooks_of_the_codec():
    """With 32 codebooks all 32 are heard first, with 5 none that isn't there."""
    for codebooks, numbers in ((32, [32, 8, 4, 2, 1]), (5, [4, 2, 1])):
        mimi = Mimi(MimiConfig(**SMALL, quantizer_dimension=4, n_q=codebooks)).eval()
        mimi.num_codebooks = codebooks
        sound = torch.randn(3 * mimi.frame_size)
        for number, back in hear.through(mimi, sound):
            whole = mimi.decode(mimi.encode(sound[None, None])[:, :number])
            assert number == numbers.pop(0) and torch.allclose(back, whole[0, 0], atol=1e-5)
        assert not numbers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nosuch.wav"], "nosuch.wav: No such file"),
        (["tiny/config.json"], "not a WAV file"),
        (["tiny/question.wav", "--mimi", "tiny/model.safetensors"], "is missing"),
        (["tiny/question.wav", "--checkpoint", "lessons"], "No such file"),
    ],
)
def test_hear_says_what_is_wrong(arguments, says, tmp_path, capsys, monkeypatch):
    """In one line, with exit code 2, and nothing is written."""
    monkeypatch.chdir(ROOT)
    assert hear.main([*arguments, "-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hear.py: error: ") and says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_sounds():
    """Made again, the sounds that LESSONS.md links are those in the repository, and each is short."""
    names = set()
    for name, sound in sounds.sounds():
        path = sounds.HERE / f"{name}.wav"
        assert path.stat().st_size < 200_000, path
        found, rate = read_wav(path)
        assert rate == 24000 and len(found) == len(sound), f"{name}: python -m lessons.sounds"
        assert (found - sound).abs().max() < 0.02, f"{name}: python -m lessons.sounds"
        names.add(name)
    assert set(re.findall(r"\(lessons/sounds/([\w-]+)\.wav\)", TEXT)) == names
    assert {path.stem for path in sounds.HERE.glob("*.wav")} == names
