"""What stands beside LESSONS.md: breaks that mend themselves, things to hear, notebooks, pages, projects."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import project_solutions
import pytest
import torch
from conftest import ROOT

from generate import read_wav
from lessons import check_project, hear, lab, notebooks, projects, refresh, sounds
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


def test_pitch():
    """Of a tone like a voice it is that of its harmonics, of noise and silence none; losses are counted."""
    times = torch.arange(lab.RATE) / lab.RATE
    low, high = (sum(torch.sin(2 * torch.pi * f * k * times) / k for k in range(1, 6)) for f in (100, 130))
    assert (lab.pitch(low) - 100).abs().max() < 1 and (lab.pitch(high) - 130).abs().max() < 1
    torch.manual_seed(0)
    noise = torch.randn(lab.RATE)
    assert not lab.pitch(noise).any() and not lab.pitch(torch.zeros(lab.RATE)).any()
    first_half = torch.where(times < 0.5, low, noise)
    assert lab.pitch_lost(low, low) == 0 and lab.pitch_lost(low, high) == 1
    assert 0.47 < lab.pitch_lost(low, first_half) < 0.53 and lab.pitch_lost(first_half, low) < 0.02


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


# ------------------------------------------------------------------------------------------------- notebooks


def test_notebooks_are_in_step(tmp_path):
    """Made again from LESSONS.md, the notebooks are those in the repository, to the byte."""
    notebooks.make(tmp_path)
    made, committed = (
        {path.name: path.read_bytes() for path in folder.glob("*.ipynb")}
        for folder in (tmp_path, notebooks.HERE)
    )
    assert made.keys() == committed.keys() and len(made) == 13, "python -m lessons.notebooks"
    assert [name for name in made if made[name] != committed[name]] == [], "python -m lessons.notebooks"


def test_notebooks_hold_the_lessons():
    """Every block and its output is a cell, in order; links lead somewhere from where a notebook is."""
    blocks = refresh.read_blocks(TEXT)
    for number, lesson in enumerate(notebooks.lessons(TEXT)):
        made = nbformat.reads(notebooks.notebook(number, lesson), as_version=4)
        cells = [(cell.source, cell.outputs) for cell in made.cells if cell.cell_type == "code"]
        for block in [block for block in blocks if block.lesson == number]:
            code = block.code.strip()
            while block.language == "python" and cells[0][0] != code:
                del cells[0]  # what the notebook has besides: the first cell, players
            if block.language == "python":
                _, outputs = cells.pop(0)
                assert [output.text for output in outputs] == [block.expected] * bool(block.expected)
        for cell in made.cells:
            for link in re.findall(
                r"\]\((?!https?:|#)([^)#]+)", cell.source if cell.cell_type == "markdown" else ""
            ):
                assert (notebooks.HERE / link).resolve().exists(), link
            if cell.cell_type == "code":  # players, too
                compile(re.sub(r"^!", "# ", cell.source, flags=re.M), "cell", "exec")
        ids = [cell.id for cell in made.cells]
        assert len(set(ids)) == len(ids) and made.cells[1].source.startswith("# Run this first")
    for lesson, words, _ in notebooks.PLAYERS:
        assert any(words in block.code for block in blocks if block.lesson == lesson), words


def test_a_notebook_alone_fetches_the_repository(tmp_path):
    """The first cell, run where nothing is: it clones, goes there, and the modules are found."""
    first = notebooks.FIRST.format(address=ROOT).replace('"pip", "install"', '"pip", "--version"')
    code = first + "\nimport mimi_min\nprint(mimi_min.__file__, Path.cwd())"
    for folder in (tmp_path, tmp_path / "moshi_min" / "lessons"):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        root = (tmp_path / "moshi_min").resolve()
        assert done.stdout.splitlines()[-1] == f"{root / 'mimi_min.py'} {root}", done.stderr


# ----------------------------------------------------------------------------------------------------- pages


def source_of(file, name):
    """The text of a class or function of one of the files, by its dotted name."""
    text = (ROOT / file).read_text()
    found = ast.parse(text)
    for part in name.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == part)
    return ast.get_source_segment(text, found)


def test_the_glossary_shows_lines_that_are_there():
    """Each word has a name, and a piece of code that stands under it."""
    rows = re.findall(
        r"^\| \*\*(.+?)\*\* \|.*\|(.*)\|$", (ROOT / "lessons" / "glossary.md").read_text(), re.M
    )
    words = {word for row, _ in rows for word in row.split(", ")}
    needed = {"step", "frame", "position", "code", "codebook", "stream", "delay", "context"}
    assert needed <= words
    for word, place in rows:
        name, file, code = re.fullmatch(r" `(.+?)` in `(.+?)`: `(.+)` ", place).groups()
        assert code in source_of(file, name), f"{word}: {code!r} is not in {name}; change lessons/glossary.md"


def test_the_debugger_shows_what_the_page_says(tmp_path):
    """The commands of lessons/debugger.md, given to pdb, print what stands under them."""
    page = (ROOT / "lessons" / "debugger.md").read_text()
    session = "".join(re.findall(r"^```pdb\n(.*?)^```", page, re.M | re.S))
    said = re.split(r"^\(Pdb\) ", session, flags=re.M)[1:]
    commands, expected = zip(*[part.split("\n", 1) for part in said])
    run = [sys.executable, "-m", "pdb", "generate.py", "--device", "cpu", "-o", str(tmp_path / "a.wav")]
    done = subprocess.run(run, input="\n".join(commands), cwd=ROOT, capture_output=True, text=True)
    found = done.stdout.split("(Pdb) ")[1:]
    places = re.compile(r"^(> |-> |Breakpoint |Deleted breakpoint ).*\n", re.M)  # with numbers of lines
    for command, printed, wanted in zip(commands, found, expected, strict=True):
        assert places.sub("", printed) == wanted, command


def test_the_five_steps_of_the_sampler():
    """The table of the page says what a run of the sampler shows."""
    page, delays = (ROOT / "lessons" / "debugger.md").read_text(), (0, 0, 2, 0, 1)
    rows = re.findall(r"^\| (\d) \| (.+) \| (.+) \| (.+) \| (.+) \|$", page, re.M)
    for (step, hears, reads, makes, gives), (strip, read, frame) in zip(
        rows, lab.strips(delays, 3, 5), strict=True
    ):
        assert reads.split() == [lab.sign(token) for token in read]
        assert makes.split() == [lab.sign(token) for token in strip[:3, max(delays) + 1]]
        assert gives == ("-" if frame is None else str(int(frame[0])))
        assert int(hears) == max(int(step) - 1, 0)


def test_what_the_editor_runs_is_there():
    """VS Code's launch.json is JSON, and starts files that exist."""
    launch = json.loads((ROOT / ".vscode" / "launch.json").read_text())
    for entry in launch["configurations"]:
        assert Path(entry["program"].replace("${workspaceFolder}", str(ROOT))).is_file()
        assert f"*{entry['name']}*" in " ".join((ROOT / "lessons" / "debugger.md").read_text().split())


def test_links_of_the_pages():
    """What the pages beside the lessons point to is there."""
    for page in [ROOT / "LESSONS.md", *(ROOT / "lessons").glob("*.md")]:
        text = page.read_text()
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`((?:lessons|tests|tools|tiny)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


# -------------------------------------------------------------------------------------------------- projects


@pytest.mark.parametrize("name", ["delays", "sentence"])
def test_project(name):
    """The check passes on the solution, and on what stands in lessons/projects.py unless nothing does."""
    check_project.PROJECTS[name](project_solutions.RIGHT[name])
    try:
        check_project.PROJECTS[name](projects)
    except NotImplementedError:  # not solved yet
        pass


@pytest.mark.parametrize("name, wrong, hint", project_solutions.WRONG)
def test_wrong_project(name, wrong, hint):
    """What is wrong in one thing is refused, with a hint."""
    with pytest.raises(AssertionError, match=hint):
        check_project.PROJECTS[name](SimpleNamespace(**{f"teach_{name}": wrong}))


def min_p_in_a_copy(folder, changes):
    """The check of the second project in a copy of the program with these changes: exit code, words."""
    (folder / "lessons").mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / "lessons").glob("*.py")]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / "tiny").symlink_to(ROOT / "tiny")
    for file, old, new in changes:
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"tests/project_solutions.py: {old!r} is not once in {file}"
        (folder / file).write_text(text.replace(old, new))
    run = [sys.executable, "lessons/check_project.py", "min_p"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# Once somebody has done the project in the program itself, there is nothing left to change.
DONE = "min_p" in (ROOT / "moshi_min.py").read_text()


def test_min_p(tmp_path):
    """The check of the second project accepts its solution."""
    code, says = min_p_in_a_copy(tmp_path, [] if DONE else project_solutions.MIN_P)
    assert (code, says) == (0, "right\n")


@pytest.mark.skipif(DONE, reason="the project is done here")
@pytest.mark.parametrize("wrong", [None, *project_solutions.WRONG_MIN_P])
def test_wrong_min_p(wrong, tmp_path):
    """It refuses a program without the option, and what is wrong in one thing."""
    changes, (old, new) = project_solutions.MIN_P, project_solutions.WRONG_MIN_P.get(wrong, ("", ""))
    changes = (
        [(file, text, new if text == old else change) for file, text, change in changes] if wrong else []
    )
    code, says = min_p_in_a_copy(tmp_path, changes)
    assert code == 1 and says.startswith("not yet: ") and "Traceback" not in says, says
