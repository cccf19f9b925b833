"""Every line of `cuda_report.py`, and what `bench.py` does on a GPU alone, run on a CPU that plays one.

The functions of torch.cuda answer as if there were a GPU, graphs are on paper, models small. What this shows
is that the report has no mistake of its own, so that the first hour on a GPU isn't spent on it.
"""

import sys
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import bench
import cuda_report as report
import pytest
import random_checkpoint
import torch
from recorder import PaperGraph, record
from reference import mimi_config
from test_graph import GPU, whole_rings

import generate
import moshi_min


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU of paper, and small models."""
    answers = {
        "is_available": True,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 18_500_000_000,
        "mem_get_info": (60_000_000_000, 80_000_000_000),
        "get_device_name": "Paper H100",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(report, "DEVICE", "cpu")
    monkeypatch.setattr(report, "SIZES", (random_checkpoint.MOSHI, random_checkpoint.MIMI))
    monkeypatch.setattr(report, "WARM", 3)
    monkeypatch.setattr(report, "FRAMES", 4)


@pytest.fixture
def graphs(monkeypatch):
    """Whatever the program captures becomes a graph on paper. A list of them."""
    made, models, captured = [], report.models, moshi_min.captured
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(PaperGraph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for module in (generate, moshi_min):
        monkeypatch.setattr(
            module,
            "captured",
            lambda function, device, on=True: captured(function, GPU, on),
        )
    monkeypatch.setattr(report, "models", lambda: [whole_rings(model) for model in models()])
    return made


def table(text):
    """The rows that a part has printed: {name: ours}."""
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    return {name.strip(): ours.strip() for name, ours in rows}


def test_frames(graphs, capsys, tmp_path):
    """Three graphs, for the encoder, a step and the decoder; then the same without."""
    report.main(["--part", "frames", "--folder", str(tmp_path)])
    rows = table(capsys.readouterr().out)
    assert len(graphs) == 3 and all(graph.calls for graph in graphs)
    assert len(rows) == 7 and rows["peak memory, allocated"] == "18.50 GB"
    assert rows["memory in use on the device"] == "20.00 GB"
    assert all(value.endswith("ms") for name, value in rows.items() if "median" in name)


def test_kernels(graphs, capsys, monkeypatch, tmp_path):
    """The ten dearest of what the profiler saw on the device, or a word that it saw nothing much."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(key, count, time, device):
        return SimpleNamespace(key=key, count=count, self_device_time_total=time, device_type=device)

    seen = [event(f"kernel_{n}<T>" * 20, n, 100.0 * n, cuda) for n in range(1, 13)]
    seen.append(event("aten::mm", 9, 1e9, cpu))

    @contextmanager
    def profile(activities):
        yield SimpleNamespace(key_averages=lambda: seen)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    report.kernels(tmp_path)
    told = capsys.readouterr().out
    rows, _, dearest = report.sort_out("kernels", told.splitlines())
    assert table(told) == {
        "kernels of a frame (captured), by the profiler": "78",
        "the time spent in them": "7.8 ms",
    }
    assert (
        len(rows) == 2 and len(dearest) == 10 and dearest[0].startswith("1. 1.200 ms in 12 calls: `kernel_12")
    )
    seen.clear()
    report.kernels(tmp_path)
    _, notes, dearest = report.sort_out("kernels", capsys.readouterr().out.splitlines())
    assert len(notes) == 2 and "captured" in notes[0] and "eager" in notes[1] and not dearest


def test_tiny(capsys, monkeypatch, tmp_path):
    """Its words are looked at; a program that ends badly is told with its reason."""
    monkeypatch.setattr(report, "DEVICE", "cpu")
    report.tiny(tmp_path)
    assert table(capsys.readouterr().out)["its answer is that of the CPU"] == "yes"
    with pytest.raises(SystemExit, match="no_such.*make it first"):
        report.program("-o", tmp_path / "no_such" / "answer.wav")
    monkeypatch.setattr(report, "program", lambda *_: ("seven", 3, 5.0))
    with pytest.raises(SystemExit, match="'seven'"):
        report.tiny(tmp_path)


def test_files(capsys, monkeypatch, tmp_path):
    """A checkpoint is written, loaded and talked with, unless the disk is too full or too slow."""
    commands = []

    def tested(code):
        return lambda command, cwd, env: commands.append((command, env)) or SimpleNamespace(returncode=code)

    monkeypatch.setattr(report, "NEEDED", 1e6)
    monkeypatch.setattr(report.subprocess, "run", tested(0))
    assert 0 < report.seconds_to_write(tmp_path, 1 << 22) < 1e4
    monkeypatch.setattr(report, "seconds_to_write", lambda folder: 7.0)
    report.files(tmp_path)
    rows = table(capsys.readouterr().out)
    assert len(rows) == 6 and rows["the tests for released weights, on random ones"] == "passed"
    assert commands[0][1]["MOSHI_CHECKPOINT"] == str(tmp_path / "random")
    monkeypatch.setattr(report, "TWICE", 1e12)
    report.files(tmp_path)
    assert "do not fit" in report.sort_out("files", capsys.readouterr().out.splitlines())[1][0]
    monkeypatch.setattr(report, "TWICE", 36e9)
    monkeypatch.setattr(report.subprocess, "run", tested(1))
    with pytest.raises(SystemExit, match="released"):
        report.files(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(report, "seconds_to_write", lambda folder: 1000.0)
    report.files(tmp_path)
    assert "1000 s" in report.sort_out("files", capsys.readouterr().out.splitlines())[1][0]


def python(code):
    """A command that runs Python code."""
    return [sys.executable, "-c", code]


def test_all_parts(capsys, monkeypatch, tmp_path):
    """Whatever becomes of a part, its rows come into the table, and what is against it under the table."""
    row = "import os; print('| a step | 9 ms | 8 ms | 1.1 |')"
    bench_fails = python(f"{row}; os.environ['NO_TORCH_COMPILE']")
    pytest_says = "print('FAILED tests/test_mimi.py::test_x[cuda]'); print('1 failed, 71 passed in 3.2s')"
    monkeypatch.delenv("NO_TORCH_COMPILE", raising=False)
    monkeypatch.setattr(report, "BENCH", bench_fails)
    monkeypatch.setattr(report, "OURS", [sys.executable, "-c"])
    monkeypatch.setattr(report, "LEAST", 0.5)
    parts = {
        "tests": (python(pytest_says + "; exit(1)"), 60),
        "steps": (bench_fails, 60),
        "kernels": (python("import sys; print('1. 2.5 ms in 7 calls: `gemv`'); print(sys.argv[1:])"), 60),
        "frames": (python("import time; print('| a frame | 8 ms | | |', flush=True); time.sleep(60)"), 3),
        "files": (python("print('note: the disk is full')"), 60),
        "tiny": (python("raise SystemExit('it says nothing')"), 60),
    }
    monkeypatch.setattr(report, "PARTS", parts)
    start, output = time.monotonic(), tmp_path / "cuda.md"
    assert report.main(["-o", str(output)]) == 1
    assert time.monotonic() - start < 30
    told, text = capsys.readouterr().out, output.read_text()
    assert text in told and "--folder" in told
    table_and_kernels, notes = text.split("Skipped or failed:")
    assert table_and_kernels.splitlines()[2:] == [
        "| | ours | official | ratio |",
        "| --- | --- | --- | --- |",
        "| `pytest -m cuda` | 1 failed, 71 passed | | |",
        "| a step | 9 ms | 8 ms | 1.1 |",
        "| a frame | 8 ms | | |",
        "",
        "The dearest kernels of a frame:",
        "",
        "1. 2.5 ms in 7 calls: `gemv`",
        "",
    ]
    assert [line for line in notes.splitlines() if line] == [
        "- tests: it failed with code 1: 1 failed, 71 passed in 3.2s",
        "- tests: FAILED tests/test_mimi.py::test_x[cuda]",
        "- steps: it failed with code 1: KeyError: 'NO_TORCH_COMPILE'",
        "- steps: so the official package ran with graphs, but not compiled",
        "- frames: it was stopped after 3 s",
        "- the disk is full",
        "- tiny: it failed with code 1: it says nothing",
    ]


def test_limits_and_refusals(capsys, monkeypatch, tmp_path):
    """No time left, no such part, no GPU, a driver that is too old, torch without CUDA."""
    assert report.main(["--minutes", "0", "--only", "tiny,files", "-o", str(tmp_path / "cuda.md")]) == 0
    assert "- files: skipped, the 0 minutes are over" in (tmp_path / "cuda.md").read_text()
    with pytest.raises(SystemExit):
        report.main(["--only", "frames,steppes"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, word in (("13.0", "driver is too old for CUDA 13.0"), (None, "built without CUDA")):
        monkeypatch.setattr(torch.version, "cuda", version)
        capsys.readouterr()
        assert report.main([]) == 1
        assert word in capsys.readouterr().out


def test_commands_exist():
    """The parts that are run are there, and bench.py takes what it is given."""
    for name, (command, seconds) in report.PARTS.items():
        assert 0 < seconds <= 180
        if command[1:2] == ["tests/bench.py"]:
            assert bench.arguments(command[2:]).full
        elif command[1:2] == ["tests/cuda_report.py"]:
            assert callable(getattr(report, name)) and command[-1] == name


def test_bench_on_a_gpu(capsys, monkeypatch):
    """What bench.py does on a GPU alone: it waits, and tells the memory floor and the peak of its memory."""
    monkeypatch.setattr(bench, "on_gpu", True)
    monkeypatch.setattr(bench, "COPIED", 1 << 16)
    monkeypatch.setattr(bench.loaders, "_mimi_config", mimi_config(codebooks=8))
    monkeypatch.setattr(bench.loaders, "_lm_kwargs", bench.loaders._lm_kwargs | bench.NARROW)
    monkeypatch.setattr(bench, "SMALL", bench.NARROW | {"num_layers": 2, "text_card": 100})
    monkeypatch.setattr(bench.args, "rounds", 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for part in ("mimi", "moshi"):
        monkeypatch.setattr(bench.args, "only", part)
        bench.main()
        for who in ("ours", "official"):
            bench.measure(who, part)
    told = capsys.readouterr().out
    assert told.count("Paper H100") == 2 and told.count("18500000000") == 4
    rows = table(told)
    assert sum("memory floor of a step" in name for name in rows) == 1 and "that step over its floor" in rows
