"""The house rules of the three files, and of files.py: length, lines, imports, docstrings."""

import ast
import re
import sys

import pytest
from conftest import ROOT

THREE = ("mimi_min.py", "moshi_min.py", "generate.py")
FILES = (*THREE, "files.py")
MAY_IMPORT = {
    "files.py": set(),
    "mimi_min.py": {"files"},
    "moshi_min.py": {"files", "mimi_min"},
    "generate.py": {"files", "mimi_min", "moshi_min"},
}
PACKAGES = {"torch", "numpy", "sentencepiece", "safetensors"}


def lines(name):
    """The lines of one of the files."""
    return (ROOT / name).read_text().splitlines()


def test_three_files_hold_at_most_1600_lines():
    counts = {name: len(lines(name)) for name in THREE}
    assert sum(counts.values()) <= 1600, counts
    assert len(lines("files.py")) <= 500


@pytest.mark.parametrize("name", FILES)
def test_lines_are_short(name):
    long = [f"{name}:{i}" for i, line in enumerate(lines(name), 1) if len(line) > 110]
    assert not long, f"over 110 characters: {long}"
    assert not any("\t" in line or line != line.rstrip() for line in lines(name)), (
        "tabs or blanks at a line's end"
    )


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    """A function fits on a screen: at most 45 lines, its docstring among them."""
    tree = ast.parse("\n".join(lines(name)))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno - node.lineno >= 45]
    assert not long, f"{name}: more than 45 lines in {long}"


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    """Each file imports only the ones before it in reading order, the four packages, the standard library."""
    found = set()
    for node in ast.walk(ast.parse("\n".join(lines(name)))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module.split(".")[0])
    unknown = found - PACKAGES - MAY_IMPORT[name] - sys.stdlib_module_names
    assert not unknown, f"{name} imports {unknown}"


@pytest.mark.parametrize("name", FILES)
def test_docstrings(name):
    """The file and every public class and function in it say what they are."""
    tree = ast.parse("\n".join(lines(name)))
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        and not node.name.startswith("_")
        and node.name != "main"
    ]
    methods = [
        m
        for c in public
        if isinstance(c, ast.ClassDef)
        for m in c.body
        if isinstance(m, ast.FunctionDef)
        and c.name in ("Mimi", "Moshi", "MoshiGen")
        and not m.name.startswith("_")
        and m.name != "forward"
        and not m.decorator_list
    ]
    bare = [node.name for node in [*public, *methods] if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), f"{name} has no docstring"
    assert not bare, f"{name}: no docstring in {bare}"


@pytest.mark.parametrize("name", FILES)
def test_classes_stand_under_what_they_use(name):
    """Reading order is dependency order: no class uses one that stands below it."""
    tree = ast.parse("\n".join(lines(name)))
    where = {
        node.name: node.lineno for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }
    early = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name):
                if where.get(inner.func.id, 0) > node.lineno and inner.func.id[0].isupper():
                    early.append(f"{node.name} uses {inner.func.id}")
    assert not early, f"{name}: {early}"


def test_version():
    """The newest version in CHANGELOG.md is the one in pyproject.toml, where alone the code has it."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version
