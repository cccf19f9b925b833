"""Makes a notebook of each lesson of LESSONS.md: `python -m lessons.notebooks`.

LESSONS.md is the one source: text, blocks, and the outputs under them are copied. A notebook has more only
where it can do more: a first cell that finds the repository or fetches it, players for sound (`PLAYERS`),
and a cell for the exercise. Written again from the same LESSONS.md, it is the same file to the byte.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lessons.refresh import BLOCK, LESSONS, ROOT

HERE = ROOT / "lessons" / "notebooks"
ADDRESS = ""  # for `git clone`, once the repository has an address that everybody can reach

FIRST = """\
# Run this first: it goes to the root of the repository. Opened alone, in Colab say, it fetches that.
import os, subprocess, sys
from pathlib import Path

above = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "mimi_min.py").exists()]
if above:
    root = above[0]
else:
    address = "{address}" or input("git clone what? ")  # an address or a folder
    root = Path.cwd() / "moshi_min"
    subprocess.run(["git", "clone", "--depth", "1", address, root], check=True)
    packages = ["sentencepiece", "safetensors"]  # Colab has torch and numpy
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)
os.chdir(root)
sys.path.insert(0, str(root))
"""

# Where something can be heard: lesson, text of the block that makes it, what the cell under it plays.
PLAYERS = (
    (0, "generate.py tiny/count.wav", 'display(Audio("tiny/count.wav"), Audio("answer.wav"))'),
    (1, "sound.shape[-1] // FRAME", "play(sound)"),
    (1, "tone[::4]", "play(tone[::4], 6000)\nplay(resample(tone, 24000, 6000), 6000)"),
    (2, "def decode(forget)", "play(reference)\nplay(decode(lambda part: isinstance(part, CausalConv1d)))"),
    (
        3,
        "broken(ResidualBlock",
        "play(mimi.decode(codes))\n"
        "with broken(ResidualBlock, forward=lambda self, x, state=None: self.block(x, state)):\n"
        "    play(mimi.decode(codes))",
    ),
    (4, "nearest by hand", "for number in (8, 4, 2, 1):\n    play(mimi.decode(codes[:, :number]))"),
    (7, "PAD forced", "play(voice)\nplay(read)"),
    (10, "told to stop", "play(torch.stack([heard.flatten(), voice]))  # the user left, Moshi right"),
)
PLAY = """\
from IPython.display import Audio, display


def play(sound, rate=24000):
    display(Audio(sound.squeeze().numpy(), rate=rate))


"""


def lessons(text: str) -> list[str]:
    """LESSONS.md cut at the headings of its lessons, without what stands before the first."""
    return re.split(r"^## (?=\d+\. )", text, flags=re.M)[1:]


def links(text: str) -> str:
    """Links to files of the repository, as they are seen from lessons/notebooks."""
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](../../\1)", text)


def shell(code: str) -> str:
    """A block of shell commands as a cell. The program runs in the notebook itself: a command there would
    have a terminal, and fill the cell with progress."""
    called = re.sub(r"^python generate\.py (.*)$", r'main("\1".split());', code.strip(), flags=re.M)
    called = re.sub(r"^python ", "!{sys.executable} ", called, flags=re.M)
    return f"from generate import main\n\n{called}" if "main(" in called else called


def player(number: int, code: str) -> Iterator:
    """A cell that plays what a block has made, if it makes sound."""
    for lesson, words, sounds in PLAYERS:
        if lesson == number and words in code:
            yield new_code_cell(PLAY + sounds)


def exercise(number: int) -> Iterator:
    """The exercise's functions, to be written in the notebook, and their check."""
    source = (ROOT / "lessons" / "exercises.py").read_text()
    functions = [part for part in ast.parse(source).body if isinstance(part, ast.FunctionDef)]
    mine = [part for part in functions if ast.get_docstring(part).startswith(f"Lesson {number}. ")]
    code = "\n\n\n".join(ast.get_source_segment(source, part) for part in mine)
    yield new_code_cell(f"import torch\nfrom torch import Tensor\n\n\n{code}")
    yield new_code_cell(
        f"from lessons.check import verdict\n\nprint(verdict({number}, globals()))",
        outputs=[new_output("stream", name="stdout", text="not solved yet: write the function\n")],
    )


def cells(number: int, lesson: str) -> Iterator:
    """The cells of a lesson, in order."""
    yield new_markdown_cell("# " + lesson.split("\n", 1)[0])
    yield new_code_cell(FIRST.format(address=ADDRESS).strip())
    place, rest = 0, lesson.split("\n", 1)[1]
    for found in [*BLOCK.finditer(rest), None]:
        text = rest[place : found.start() if found else len(rest)].strip()
        before, mark, after = text.partition("**Exercise.**")
        if mark:
            question, _, sources = after.partition("\n\n")
            yield new_markdown_cell(links(f"{before}{mark}{question}".strip()))
            yield from exercise(number)
            text = sources
        if text:
            yield new_markdown_cell(links(text))
        if found:
            language, code, printed = found[1], found[2], found[3]
            outputs = [new_output("stream", name="stdout", text=printed)] if printed else []
            yield new_code_cell(shell(code) if language == "sh" else code.strip(), outputs=outputs)
            yield from player(number, code)
            place = found.end()


def notebook(number: int, lesson: str) -> str:
    """The file of a lesson's notebook."""
    parts = list(cells(number, lesson))
    for place, cell in enumerate(parts):
        cell["id"] = f"lesson-{number}-cell-{place}"  # nbformat would draw it
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    made = new_notebook(cells=parts, metadata=kernel)
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def names(text: str) -> list[str]:
    """The file name of each lesson's notebook, for example 05-attention-that-streams."""
    titles = [re.sub(r"\W+", "-", lesson.split("\n", 1)[0].lower()).strip("-") for lesson in lessons(text)]
    return [f"{title.split('-', 1)[0]:0>2}-{title.split('-', 1)[1]}.ipynb" for title in titles]


def make(folder: Path = HERE) -> None:
    """Writes all of them, and removes what is none of them."""
    text = LESSONS.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ipynb"):
        old.unlink()
    for number, (name, lesson) in enumerate(zip(names(text), lessons(text))):
        (folder / name).write_text(notebook(number, lesson))


if __name__ == "__main__":
    make()
