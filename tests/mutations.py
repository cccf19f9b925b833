"""Breaks the code on purpose, to see the tests fail: `python tests/mutations.py [WORD ...]`.

A test that cannot fail proves nothing. The breaks are listed in mutations.txt beside this file. Each is made
in a copy of the tree, where the tests of that file then run until the first failure. That takes long and is
no part of the test suite, which only sees that each break still finds its place. Words choose the
breaks whose file or name contains one of them. Exit code 1 if a break goes unnoticed.
"""

import ast
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILES = ("mimi_min.py", "moshi_min.py", "generate.py", "pyproject.toml")
FOLDERS = ("tests", "tiny", "lessons")
PYTEST = "-m pytest -x -q --no-header -p no:cacheprovider".split()


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


def run_tests(tree: Path, test: str) -> str | None:
    """None if all tests pass in this tree, else the first failure's line."""
    command = [sys.executable, *PYTEST, "-m", "not cuda", "-k", "not released", test]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0] if failures else (done.stdout + done.stderr).strip()[-300:]


def try_mutation(mutation: Mutation, tree: Path) -> bool:
    """Makes the break in the tree, prints what came of it, mends it, and says whether it was noticed."""
    path, start, place = tree / mutation.file, time.time(), f"{mutation.file} {mutation.name}"
    source = path.read_text()
    if source.count(mutation.old) != 1:
        print(f"STALE     {place}: its text isn't there exactly once", flush=True)
        return False
    broken = source.replace(mutation.old, mutation.new)
    ast.parse(broken, place)  # any test would notice what is no Python
    path.write_text(broken)
    failure = run_tests(tree, mutation.test)
    path.write_text(source)
    seconds = f"({time.time() - start:.0f} s)"
    print(
        f"caught    {place} {seconds} {failure.split(' - ')[0]}"
        if failure
        else f"UNNOTICED {place} {seconds}"
    )
    return failure is not None


def main() -> int:
    """Tries the mutations that the words choose, all without words."""
    words, unnoticed = sys.argv[1:], []
    chosen = [m for m in read_mutations() if not words or any(word in f"{m.file} {m.name}" for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in FILES:
            shutil.copy(ROOT / name, tree / name)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("work", "__pycache__"))
        for test, group in groupby(chosen, lambda mutation: mutation.test):
            if failure := run_tests(tree, test):
                sys.exit(f"{test} fails without any break: {failure}")
            unnoticed += [f"{m.file} {m.name}" for m in group if not try_mutation(m, tree)]
    print(f"unnoticed: {'; '.join(unnoticed)}" if unnoticed else f"all {len(chosen)} breaks were noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
