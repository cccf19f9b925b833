"""The course: every block prints what stands under it, every exercise has a solution, every picture is there."""

import importlib.util
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "lessons"))

import check  # noqa: E402
import exercises  # noqa: E402
import refresh  # noqa: E402
import solutions  # noqa: E402

TEXT = (ROOT / "LESSONS.md").read_text()
BLOCKS = refresh.read_blocks(TEXT)
# Whole numbers and words must be the same. Numbers with a decimal point come from sums in another order on another
# machine, some of them after a minute of training: 5 % and two units of the last digit are let pass.
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
    for block, printed in refresh.run_blocks(blocks):
        assert same(printed, block.expected or ""), (
            f"{block.code}\nprints\n{printed}\nbut LESSONS.md says\n{block.expected}\n(python lessons/refresh.py)"
        )


@pytest.mark.parametrize("lesson", range(13))
def test_exercise(lesson):
    """A check fails on the stub and passes on the solution."""
    with pytest.raises(NotImplementedError):
        check.check(lesson, exercises)
    check.check(lesson, solutions)


def test_wrong_solutions_fail():
    """A check is no formality: solutions with one thing wrong don't pass."""
    assert set(solutions.WRONG) == set(range(13))
    for lesson, wrong in solutions.WRONG.items():
        with pytest.raises(AssertionError):
            check.check(lesson, wrong)


def test_the_course_is_whole():
    """Thirteen lessons of at most 200 lines, each with its parts; nothing is cited by line number; pictures exist."""
    lessons = re.split(r"^## (?=\d+\. )", TEXT, flags=re.M)[1:]
    assert [int(lesson.split(".")[0]) for lesson in lessons] == list(range(13))
    for lesson in lessons:
        assert len(lesson.splitlines()) <= 200, lesson.splitlines()[0]
        for part in ("**The code.**", "**Without it", "**Exercise.**", "**Sources"):
            assert part in lesson, f"{lesson.splitlines()[0]}: no {part}"
    assert not re.search(r"\.py:\d|line \d", TEXT)
    shown = set(re.findall(r"\(lessons/(\w+)\.svg\)", TEXT))
    assert shown == set(refresh.PICTURES)
    for name in shown:
        picture = (ROOT / "lessons" / f"{name}.svg").read_text()
        assert picture.lstrip().startswith("<?xml") and "</svg>" in picture


def test_pictures_are_drawn(tmp_path, monkeypatch):
    """The scripts still draw, and leave nothing behind elsewhere."""
    for name in refresh.PICTURES:
        spec = importlib.util.spec_from_file_location(f"picture_{name}", ROOT / "lessons" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.draw(tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size > 5000


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
