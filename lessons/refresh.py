"""Runs the blocks of LESSONS.md and rewrites what they print: `python lessons/refresh.py [LESSON]`.

A ```python block is run in its lesson's namespace, as if pasted into one Python session; a ```sh block by the
shell. What it prints stands in the ```text block under it, if there is one. With a lesson's number only that
lesson is run. `--pictures` draws all pictures anew first, `--sounds` makes all sounds. The notebooks follow.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "LESSONS.md"
PICTURES = tuple("grid sound overlap codebooks split window ring delays strip loss".split())
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:\n?```text\n(.*?)^```\n)?", re.M | re.S)


class Block(NamedTuple):
    """A block of code, what stands under it as its output (None: nothing), and where that is in the text."""

    lesson: int
    language: str
    code: str
    expected: str | None
    place: tuple[int, int]


def read_blocks(text: str) -> list[Block]:
    """All blocks in their order. Lesson n begins at its heading '## n. ...'."""
    headings = [(found.start(), int(found[1])) for found in re.finditer(r"^## (\d+)\. ", text, re.M)]
    blocks = []
    for found in BLOCK.finditer(text):
        lesson = max((number for start, number in headings if start < found.start()), default=-1)
        blocks.append(Block(lesson, found[1], found[2], found[3], found.span(3)))
    return blocks


def run_blocks(blocks: list[Block]) -> Iterator[tuple[Block, str]]:
    """Runs them from the repository's root, and gives what each printed."""
    lesson, names = None, {}
    os.chdir(ROOT)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in blocks:
        if block.lesson != lesson:
            lesson, names = block.lesson, {"__name__": "__main__"}
        if block.language == "sh":
            done = subprocess.run(block.code, shell=True, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{block.code}{done.stderr}")
            printed = done.stdout
        else:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block.code, f"LESSONS.md, lesson {lesson}", "exec"), names)
            printed = output.getvalue()
        yield block, "".join(line.rstrip() + "\n" for line in printed.splitlines())


def main() -> None:
    """Rewrites LESSONS.md in place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lesson", type=int, nargs="?")
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--sounds", action="store_true")
    args = parser.parse_args()
    if args.sounds:
        subprocess.run([sys.executable, "-m", "lessons.sounds"], cwd=ROOT, check=True)
    if args.pictures:
        for name in PICTURES:
            subprocess.run([sys.executable, "-m", f"lessons.pictures.{name}"], cwd=ROOT, check=True)
    text, new, end = LESSONS.read_text(), "", 0
    for block, printed in run_blocks([b for b in read_blocks(text) if args.lesson in (None, b.lesson)]):
        print(f"lesson {block.lesson}: {len(printed.splitlines())} lines", file=sys.stderr)
        if block.expected is None:
            if printed:
                raise RuntimeError(f"lesson {block.lesson}: no text block under {block.code!r}, which prints")
            continue
        new, end = new + text[end : block.place[0]] + printed, block.place[1]
    LESSONS.write_text(new + text[end:])
    subprocess.run([sys.executable, "-m", "lessons.notebooks"], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
