"""Breaks the code on purpose, to see the tests fail: `python tests/mutations.py [-j N] [WORD ...]`.

A test that cannot fail proves nothing. The breaks are listed in mutations.txt beside this file. Each is made
in a copy of the tree, where the tests of that file then run until the first failure. That takes long and is
no part of the test suite, which only sees that each break still finds its place. Words choose the breaks
whose file, tests or name contain one of them. -j makes so many copies of the tree and breaks one in each at
the same time; -k runs only some of the tests, as pytest's. Exit code 1 if a break goes unnoticed.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
FILES = ("mimi_min.py", "moshi_min.py", "generate.py", "files.py", "pyproject.toml")
FOLDERS = ("tests", "tiny", "lessons", "tools")
PYTEST = "-m pytest -x -q --no-header -p no:cacheprovider".split()
PATIENCE = 1800  # seconds, after which tests that still run have noticed an endless loop

T = TypeVar("T")


class Mutation(NamedTuple):
    """A break: in `file`, `old` becomes `new`, and `test` should fail."""

    file: str
    test: str
    name: str
    old: str
    new: str


def read_mutations() -> list[Mutation]:
    """All of mutations.txt, in its order."""
    mutations, file, test = [], "", ""
    for paragraph in (ROOT / "tests" / "mutations.txt").read_text().split("\n\n"):
        first, *rest = paragraph.strip("\n").split("\n")
        if first.startswith("== "):
            file, test = first[3:].split(": ")
        elif not first.startswith("#"):
            old, new = ("\n".join(line[2:] for line in rest if line[0] == sign) for sign in "-+")
            mutations.append(Mutation(file, test, first, old, new))
    return mutations


def copy_tree(tree: Path) -> Path:
    """A copy of what the tests need, in the folder `tree`."""
    tree.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("work", "__pycache__"))
    return tree


def run_tests(tree: Path, test: str, only: str) -> str | None:
    """None if all tests pass in this tree, else the first failure's line."""
    expression = "not released" + (f" and ({only})" if only else "")
    command = [sys.executable, *PYTEST, "-m", "not cuda", "-k", expression, test]
    # Nothing compiled is kept: a file that is changed twice in a second may look as it was before.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode == 0:
        return None
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0] if failures else (done.stdout + done.stderr).strip()[-300:]


def try_mutation(mutation: Mutation, tree: Path, only: str) -> bool:
    """Makes the break in the tree, prints what came of it, mends it, and says whether it was noticed."""
    path, start, place = tree / mutation.file, time.time(), f"{mutation.file} {mutation.name}"
    source = path.read_text()
    if source.count(mutation.old) != 1:
        print(f"STALE     {place}: its text isn't there exactly once", flush=True)
        return False
    broken = source.replace(mutation.old, mutation.new)
    ast.parse(broken, place)  # any test would notice what is no Python
    path.write_text(broken)
    failure = run_tests(tree, mutation.test, only)
    path.write_text(source)
    seconds = f"({time.time() - start:.0f} s)"
    print(
        f"caught    {place} {seconds} {failure.split(' - ')[0]}"
        if failure
        else f"UNNOTICED {place} {seconds}",
        flush=True,
    )
    return failure is not None


def main() -> int:
    """Tries the mutations that the words choose, all without words."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="a part of a file's, its tests' or a break's name"
    )
    parser.add_argument("-j", type=int, default=1, metavar="N", help="so many at a time, a thread each")
    parser.add_argument("-k", default="", metavar="TESTS", help="only these tests, as for pytest")
    args = parser.parse_args()
    words = args.words
    trees: Queue[Path] = Queue()
    chosen = [m for m in read_mutations() if not words or any(word in " ".join(m[:3]) for word in words)]

    def in_a_tree(function: Callable[[Path], T]) -> T:
        """What the function makes of a tree that no other one uses meanwhile."""
        tree = trees.get()
        try:
            return function(tree)
        finally:
            trees.put(tree)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.j) as pool:
        for number in range(args.j):
            trees.put(copy_tree(Path(folder) / str(number)))
        tests = list(dict.fromkeys(m.test for m in chosen))
        failures = pool.map(lambda test: in_a_tree(lambda tree: run_tests(tree, test, args.k)), tests)
        for test, failure in zip(tests, failures):
            if failure:
                sys.exit(f"{test} fails without any break: {failure}")
        noticed = pool.map(lambda m: in_a_tree(lambda tree: try_mutation(m, tree, args.k)), chosen)
        unnoticed = [f"{m.file} {m.name}" for m, good in zip(chosen, noticed) if not good]
    print(f"unnoticed: {'; '.join(unnoticed)}" if unnoticed else f"all {len(chosen)} breaks were noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
