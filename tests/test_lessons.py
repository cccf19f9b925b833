"""The course and README: blocks print what stands under them, exercises have solutions, pictures exist."""

import base64
import importlib
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import solutions
import torch
from conftest import ROOT
from matplotlib.image import imread

from lessons import check, exercises, lab, refresh
from moshi_min import MoshiGen

TEXT = (ROOT / "LESSONS.md").read_text()
BLOCKS = refresh.read_blocks(TEXT)
# Whole numbers and words must be the same. Numbers with a decimal point come from sums in another order on
# another machine, some of them after a minute of training: 5 % and two units of the last digit are let pass.
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")


def same(printed, expected):
    """Is it the same text, but for the last digits of its decimal numbers?"""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", expected):
        return False
    for got, wanted in zip(NUMBER.findall(printed), NUMBER.findall(expected)):
        unit = 10.0 ** -len(wanted.split("e")[0].split(".")[1]) * 10.0 ** int((wanted + "e0").split("e")[1])
        if abs(float(got) - float(wanted)) > 0.05 * abs(float(wanted)) + 2 * unit:
            return False
    return True


def test_what_counts_as_the_same():
    """The comparison lets rounding pass, and nothing else."""
    assert same("a 1.00 b 3", "a 1.02 b 3") and same("2.1e-06", "2.2e-06") and same("", "")
    for printed, expected in (
        ("a 3", "a 4"),
        ("1.0", "1.3"),
        ("1.0 yes", "1.0 no"),
        ("2.1e-06", "2.1e-05"),
        ("1.5", "15"),
    ):
        assert not same(printed, expected)


@pytest.mark.parametrize("lesson", range(13))
def test_lesson(lesson):
    """All blocks of a lesson, in order, from the repository's root."""
    blocks = [block for block in BLOCKS if block.lesson == lesson]
    assert blocks, f"lesson {lesson} runs nothing"
    with torch.enable_grad():  # a lesson that turns it off and fails must not spoil the next one
        for block, printed in refresh.run_blocks(blocks):
            assert same(printed, block.expected or ""), (
                f"{block.code}\nprints\n{printed}\nbut LESSONS.md says\n{block.expected}\n"
                "(python lessons/refresh.py)"
            )


def test_readme(monkeypatch):
    """README's block prints what stands under it, and loses none of the user's frames, not even the first."""
    given, step = [], MoshiGen.step

    def watched(self, user_codes, *forced):
        given.append(user_codes)
        return step(self, user_codes, *forced)

    monkeypatch.setattr(MoshiGen, "step", watched)
    ((block, printed),) = refresh.run_blocks(refresh.read_blocks((ROOT / "README.md").read_text()))
    assert printed == block.expected
    heard = lab.tiny().mimi.encode(lab.recording("question.wav"))
    assert torch.equal(torch.cat(given, dim=-1), torch.cat([heard[..., :1], heard], dim=-1))


@pytest.mark.parametrize("lesson", range(13))
def test_exercise(lesson):
    """The check passes on the solution, and on what stands in lessons/exercises.py unless nothing does."""
    check.check(lesson, solutions)
    try:
        check.check(lesson, exercises)
    except NotImplementedError:  # not solved yet
        pass


def test_unsolved_exercises_are_told_from_wrong_ones():
    """A function that is still to be written ends a check with an error of its own."""

    def stub(*_):
        raise NotImplementedError

    for lesson, wrong in solutions.WRONG.items():
        with pytest.raises(NotImplementedError):
            check.check(lesson, SimpleNamespace(**dict.fromkeys(vars(wrong), stub)))


def test_wrong_solutions_fail():
    """A check is no formality: solutions with one thing wrong don't pass."""
    assert set(solutions.WRONG) == set(range(13))
    for lesson, wrong in solutions.WRONG.items():
        with pytest.raises(AssertionError, match="."):  # with a hint
            check.check(lesson, wrong)


def test_the_course_is_whole():
    """Thirteen lessons of at most 200 lines, each with its parts; no line numbers; pictures exist."""
    lessons = re.split(r"^## (?=\d+\. )", TEXT, flags=re.M)[1:]
    assert [int(lesson.split(".")[0]) for lesson in lessons] == list(range(13))
    for lesson in lessons:
        assert len(lesson.splitlines()) <= 200, lesson.splitlines()[0]
        for part in ("**The code.**", "**Without it", "**Exercise.**", "**Sources"):
            assert part in lesson, f"{lesson.splitlines()[0]}: no {part}"
    assert not re.search(r"\.py:\d|line \d", TEXT)
    shown = set(re.findall(r"\(lessons/pictures/(\w+)\.svg\)", TEXT))
    assert shown == set(refresh.PICTURES)


# A number in an SVG or in the words drawn there; not the digits of a colour or of an identifier.
SVG_NUMBER = re.compile(r"(?<![\w#.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")


def parts(svg):
    """What an SVG of Matplotlib shows: its text without numbers, the numbers [N], images [H, W, 4].

    Words are drawn glyph by glyph, under a comment that says them: the glyphs are left out. So are the names
    of clips, markers and images, which are hashes of their contents.
    """
    images = re.findall(r'data:image/png;base64,([^"]*)"', svg)
    svg = re.sub(r'data:image/png;base64,[^"]*"', '"', svg)
    svg = re.sub(r'<path id="DejaVu[^>]*>|<use xlink:href="#DejaVu[^>]*>', "", svg)
    svg = re.sub(r"</?defs>|\s+", " ", re.sub(r"\b[a-z]+[0-9a-f]{10}\b", "", svg))
    numbers = np.array(SVG_NUMBER.findall(svg), dtype=float)
    words = SVG_NUMBER.sub("#", svg).split()
    return words, numbers, [imread(io.BytesIO(base64.b64decode(image))) for image in images]


def difference(drawn, committed):
    """How two pictures differ; None if only by rounding: 0.3 points, 0.5 % in the mean of an image."""
    (words, numbers, images), (old_words, old_numbers, old_images) = parts(drawn), parts(committed)
    if words != old_words or len(numbers) != len(old_numbers):
        return "other words or lines"
    if (far := np.abs(numbers - old_numbers)).max() > 0.3:
        return f"{(far > 0.3).sum()} numbers, {old_numbers[far.argmax()]} is now {numbers[far.argmax()]}"
    for image, old in zip(images, old_images, strict=True):
        if image.shape != old.shape or np.abs(image - old).mean() > 0.005:
            return "other images"
    return None


def test_what_counts_as_the_same_picture():
    """The comparison lets rounding pass, and nothing else."""
    drawn = (ROOT / "lessons" / "pictures" / "window.svg").read_text()
    x, y = re.search(r"L ([\d.]+) ([\d.]+)", drawn).groups()
    assert difference(drawn, drawn) is None
    assert difference(drawn, drawn.replace(f"L {x} {y}", f"L {float(x) + 0.1} {y}", 1)) is None
    assert "numbers" in difference(drawn, drawn.replace(f"L {x} {y}", f"L {float(x) + 1} {y}", 1))
    assert "words" in difference(
        drawn, drawn.replace("<!-- frame that looks -->", "<!-- frame that sees -->")
    )
    assert "numbers" in difference(drawn, drawn.replace("<!-- head 3 of", "<!-- head 4 of"))
    first, second = re.findall(r'data:image/png;base64,[^"]*', drawn)[1:3]
    assert "images" in difference(drawn, drawn.replace(first, second))


@pytest.mark.parametrize("name", refresh.PICTURES)
def test_picture(name, tmp_path):
    """Drawn again, a picture is the one that is shown."""
    importlib.import_module(f"lessons.pictures.{name}").draw(tmp_path / "new.svg")
    committed = (ROOT / "lessons" / "pictures" / f"{name}.svg").read_text()
    found = difference((tmp_path / "new.svg").read_text(), committed)
    assert found is None, f"{found}: python -m lessons.pictures.{name}"


def test_threads_are_cited():
    """Every thread whose question the course answers is named."""
    for thread in (
        "kyutai-labs/moshi#123",
        "#143",
        "#189",
        "#180",
        "#149",
        "#51",
        "#54",
        "#70",
        "yangdongchao/RSTnet#2",
        "gpt-omni/mini-omni#117",
        "huggingface/transformers#36160",
        "#36171",
        "kyutai-labs/moshi#110",
        "#87",
        "#244",
    ):
        assert re.search(re.escape(thread) + r"(?!\d)", TEXT), thread
