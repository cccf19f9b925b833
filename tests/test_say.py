"""tiny/say.py: a question to try, from whichever synthesizer is there."""

import sys

import numpy as np
import pytest
from test_generate import parse

import say
import voices


class Beeps:
    """A synthesizer that beeps as long as the text is."""

    def draw(self, text, rng):
        return voices.Spoken(np.full(100 * len(text), 1000 + rng.integers(1000), np.int16), [0.0], [0])


def missing():
    """A synthesizer that isn't there."""
    raise SystemExit("it is missing; install it")


def run(monkeypatch, *arguments):
    """`python tiny/say.py` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["say.py", *arguments])
    say.main()


def test_says_it(tmp_path, monkeypatch, capsys):
    """The first make that is there speaks, after half a second of silence; another seed is another voice."""
    monkeypatch.setattr(say, "MAKES", {"none": missing, "beeps": Beeps})
    found = []
    for seed in ("1", "1", "2"):
        run(monkeypatch, "what is two plus three", "-o", str(tmp_path / "my.wav"), "--seed", seed)
        found.append((tmp_path / "my.wav").read_bytes())
    assert found[0] == found[1] != found[2]
    sound = parse(found[0])
    assert len(sound) == 12000 + 2200 and (sound[:12000] == 0).all() and (sound[12000:] > 999).all()
    assert capsys.readouterr().out.startswith("beeps: 0.6 s -> ")


def test_says_any_text(tmp_path, monkeypatch, capsys):
    """Several sentences are one; quotes end nothing; a plus is a word; nothing to say is said."""
    monkeypatch.setattr(say, "MAKES", {"beeps": Beeps})
    for text, said in ('  Hi "there". What\'s 2? ', "Hi there What's 2"), ("2 +3", "2 plus 3"):
        run(monkeypatch, text, "-o", str(tmp_path / "my.wav"))
        assert len(parse((tmp_path / "my.wav").read_bytes())) == 12000 + 100 * len(said)
    for nothing in ("", " ?! "):
        with pytest.raises(SystemExit):
            run(monkeypatch, nothing, "-o", str(tmp_path / "other.wav"))
        assert "nothing to say" in capsys.readouterr().err
    assert not (tmp_path / "other.wav").exists()


def test_says_what_is_missing(tmp_path, monkeypatch):
    """Without any, or without the one that is wanted, it says how to install it and writes nothing."""
    monkeypatch.setattr(say, "MAKES", {"none": missing, "beeps": Beeps})
    with pytest.raises(SystemExit, match="it is missing; install it"):
        run(monkeypatch, "hello", "-o", str(tmp_path / "my.wav"), "--make", "none")
    assert not list(tmp_path.iterdir())
