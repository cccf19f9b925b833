"""Checks a project of projects.md: `python lessons/check_project.py delays`, or min_p, or sentence."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate  # noqa: E402
from lessons.lab import EPAD, FRAME, PAD, ROOT, decibels, recording, talk, tiny, words  # noqa: E402
from moshi_min import MoshiGen, sample  # noqa: E402

DELAYS = (0, 1, *7 * (3,), 0, *7 * (2,))
SENTENCE = "hello i am fine"  # it says something else to a greeting
LOUD = -45  # dB


def delays(my) -> None:
    """Project 1: the loss with the delays that were asked for, then a conversation."""
    checkpoint, sound = tiny(), recording("question.wav", 2.4)
    tokens, _ = talk(checkpoint, sound)
    codes = torch.cat([tokens, checkpoint.mimi.encode(sound)[0]])[None]
    model = my.teach_delays(checkpoint, codes, DELAYS).eval()
    assert tuple(model.config.delays) == DELAYS, f"its delays are {model.config.delays}, not {DELAYS}"
    with torch.no_grad():
        _, parts = model.loss(codes)
    for name, loss in parts.items():
        assert loss < 0.5, f"the {name} loss is {loss:.2f} with these delays, and should be below 0.5"
    said, _ = talk(checkpoint._replace(moshi=model), sound)
    answer, found = words(checkpoint, tokens[0]), words(checkpoint, said[0])
    assert found == answer, f"it says {found!r} instead of {answer!r}"
    frames = said.shape[1]
    same = (said[1:] == tokens[1:, :frames]).float().mean()
    assert same > 0.8, f"only {same:.0%} of the codes of its voice are those that it was taught"


def min_p(_) -> None:
    """Project 2: the draw, the sampler, the command line, the checkpoint's own setting."""
    found = inspect.signature(sample).parameters.get("min_p")
    assert found is not None and found.default == 0, "`sample` has no `min_p` that is 0 unless one says more"
    draws_what_it_should()
    asked = torch.stack(list(recording("hello.wav", 1).split(FRAME, dim=-1)))
    checkpoint = tiny()
    for wrong in (-0.1, 1.1):
        with contextlib.suppress(ValueError):
            MoshiGen(checkpoint.moshi, min_p=wrong)
            raise AssertionError(f"MoshiGen takes min_p={wrong} without a ValueError")
    torch.manual_seed(5)
    runs = [
        torch.cat([said for _, said, _ in generate.converse(checkpoint.mimi, gen, asked)], dim=-1)
        for gen in (
            MoshiGen(checkpoint.moshi, greedy=True),
            MoshiGen(checkpoint.moshi, temp=3.0, temp_text=3.0, min_p=1.0),
        )
    ]
    assert torch.equal(*runs), "MoshiGen with min_p=1.0 should say what it says with greedy=True"
    the_command_line_has_it()


def draws_what_it_should() -> None:
    """Which tokens are left, and how often each is drawn."""
    p = torch.tensor([[0.50, 0.25, 0.15, 0.08, 0.02], [0.1, 0.1, 0.1, 0.1, 0.6]])
    many = p.log().repeat_interleave(5000, dim=0)
    torch.manual_seed(0)
    plain = sample(many, 1.0, 5)
    torch.manual_seed(0)
    assert torch.equal(plain, sample(many, 1.0, 5, min_p=0.0)), "min_p=0.0 changes what a seed draws"
    for temp, top_k, bound in ((1.0, 5, 0.4), (1.0, 5, 0.29), (2.0, 5, 0.6), (0.5, 5, 0.1), (1.0, 2, 0.1)):
        drawn = sample(many, temp, top_k, min_p=bound).view(2, -1)
        for row, tokens in zip(p, drawn):
            q = torch.softmax(row.log() / temp, dim=-1)
            left = torch.where(q >= bound * q.max(), q, 0.0)
            if top_k == 2 and row[0] == 0.5:
                left[2:] = 0
            elif top_k == 2:
                continue  # which of four equal ones is kept is open
            shares = torch.bincount(tokens, minlength=5) / len(tokens)
            assert (shares[left == 0] == 0).all(), (
                f"temp {temp}, min_p {bound}: of {row.tolist()} it draws the tokens "
                f"{shares.nonzero().flatten().tolist()}, not only {left.nonzero().flatten().tolist()}"
            )
            off = (shares - left / left.sum()).abs().max()
            assert off < 0.03, f"temp {temp}, min_p {bound}: {row.tolist()} is drawn as {shares.tolist()}"
    assert sample(many, 0.0, 5, min_p=0.5)[0] == 0, "at temperature 0 the likeliest is taken, as before"


def run_main(*arguments: str) -> tuple[int, str]:
    """The exit code of the program, and what it writes to standard error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            return generate.main([*arguments]), error.getvalue()
        except Exception as problem:  # a traceback in a terminal
            return 1, repr(problem)


def program(folder: Path, *arguments: str) -> np.ndarray:
    """The tokens of a run of the program on a greeting."""
    options = ["-o", f"{folder}/a.wav", "--tokens", f"{folder}/a.npz", "--extra-seconds", "1"]
    code, error = run_main(str(ROOT / "tiny" / "hello.wav"), *options, *arguments)
    assert code == 0, f"generate.py {' '.join(arguments)} ends with code {code}: {error}"
    return np.load(folder / "a.npz")["codes"]


def the_command_line_has_it() -> None:
    """`--min-p`, in one line what it cannot be, and `min_p` in config.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        likeliest = program(folder, "--greedy")
        wild = ("--temp", "3", "--temp-text", "3")
        assert (program(folder, *wild, "--min-p", "1") == likeliest).all(), (
            "--min-p 1 should do what --greedy does"
        )
        assert (program(folder, *wild, "--min-p", "0") != likeliest).any(), "--min-p 0 should do nothing"
        for wrong in ("-1", "1.5", "much", "nan"):
            code, error = run_main(f"--min-p={wrong}", "-o", f"{name}/b.wav")
            assert code == 2 and error.count("\n") == 1, (
                f"--min-p {wrong} should be refused in one line, with exit code 2"
            )
        for file in (ROOT / "tiny").glob("*"):
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
        config = json.loads((ROOT / "tiny" / "config.json").read_text())
        config["lm_gen_config"] |= {"min_p": 1.0}
        (folder / "config.json").write_text(json.dumps(config))
        assert (program(folder, *wild, "--checkpoint", name) == likeliest).all(), (
            "min_p in config.json, lm_gen_config, has no effect"
        )


def heard(text: Tensor, voice: Tensor) -> list[bool]:
    """For each word of a text stream, whether the voice is loud within 0.4 s of its beginning."""
    levels = decibels(voice)
    starts = [f for f, token in enumerate(text.tolist()) if token not in (PAD, EPAD)]
    return [bool((levels[start : start + 5] > LOUD).any()) for start in starts]


def sentence(my) -> None:
    """Project 3: the new answer in text and sound, and the old answers."""
    checkpoint, sound = tiny(), recording("hello.wav", 4)
    assert words(checkpoint, talk(checkpoint, sound)[0][0]) != SENTENCE, "the checkpoint knows it already"
    new = checkpoint._replace(moshi=my.teach_sentence(checkpoint, sound, SENTENCE).eval())
    tokens, voice = talk(new, sound)
    found = words(checkpoint, tokens[0])
    assert found == SENTENCE, f"it says {found!r}, not {SENTENCE!r}"
    asked = int((decibels(sound) > LOUD).nonzero()[-1])
    first = next(f for f, token in enumerate(tokens[0].tolist()) if token not in (PAD, EPAD))
    assert first > asked, f"it begins in frame {first}, while the user speaks until frame {asked}"
    aloud = heard(tokens[0], voice)
    assert all(aloud), f"of the {len(aloud)} tokens of its text only {sum(aloud)} have a sound"
    assert (decibels(voice)[-10:] < LOUD).all(), "it doesn't fall silent after the sentence"
    for name in ("question.wav", "count.wav"):
        before, after = (words(checkpoint, talk(which, recording(name))[0][0]) for which in (checkpoint, new))
        assert before == after, f"to {name} it said {before!r}, and now says {after!r}"


PROJECTS = {"delays": delays, "min_p": min_p, "sentence": sentence}

if __name__ == "__main__":
    import projects

    if len(sys.argv) != 2 or sys.argv[1] not in PROJECTS:
        sys.exit(f"which project? python lessons/check_project.py {' or '.join(PROJECTS)}")
    try:
        PROJECTS[sys.argv[1]](projects)
    except NotImplementedError:
        sys.exit("not solved yet: write the function in lessons/projects.py")
    except AssertionError as problem:
        sys.exit(f"not yet: {problem}")
    print("right")
