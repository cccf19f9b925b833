"""What all tests share: where they run, the cuda marker, and a loud word when a reference is missing."""

import importlib.util
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# The official package compiles and captures on CUDA by itself; as the reference it stays eager and plain.
os.environ.setdefault("NO_TORCH_COMPILE", "1")
os.environ.setdefault("NO_CUDA_GRAPH", "1")
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
warnings.filterwarnings("ignore", category=FutureWarning)

# In the background, or under nohup, a process ignores some signals, and so would the programs that tests
# start. A handler that does nothing is no different here, and isn't handed on to them.
for name in ("SIGINT", "SIGHUP"):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), lambda *_: None)

REFERENCES = ("moshi", "transformers")
MEASURED_ELSEWHERE = {}  # by other processes of this run
NO_GPU = "no CUDA device on this machine"
# One case for each place and precision where a test of the language model runs.
PLACES = {
    "cpu": ("cpu", torch.float32),
    "cpu-bf16": ("cpu", torch.bfloat16),
    "cuda": ("cuda", torch.float32),
    "cuda-bf16": ("cuda", torch.bfloat16),
}


def missing_references():
    """The reference packages that are not installed."""
    return [name for name in REFERENCES if importlib.util.find_spec(name) is None]


def pytest_report_header(config):
    """Say at the top what this run compares with, and where."""
    files = [ROOT / name for name in ("mimi_min.py", "moshi_min.py", "generate.py")]
    lines = [len(path.read_text().splitlines()) if path.exists() else 0 for path in files]
    missing = ", ".join(missing_references())
    return [
        f"references: {'MISSING: ' + missing if missing else ', '.join(REFERENCES)}; "
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}; "
        f"lines: {' + '.join(map(str, lines))} = {sum(lines)} of 1,600"
    ]


def measured_here():
    """What `reference.py` has measured in this process: {(test, what): value}."""
    return sys.modules["reference"].MEASURED if "reference" in sys.modules else {}


def pytest_sessionfinish(session):
    """Where tests run in several processes (pytest-xdist), each of them hands on what it has measured."""
    if hasattr(session.config, "workeroutput"):
        rows = [[test, what, float(value)] for (test, what), value in measured_here().items()]
        session.config.workeroutput["measured"] = rows


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """One of those processes has ended; this one will tell."""
    for test, what, value in getattr(node, "workeroutput", {}).get("measured", []):
        MEASURED_ELSEWHERE[test, what] = value


def pytest_terminal_summary(terminalreporter):
    """Nobody should read a green line as proof when nothing was compared."""
    if missing_references():
        terminalreporter.section("NOT COMPARED", red=True, bold=True)
        terminalreporter.line(
            f"not installed: {', '.join(missing_references())}. The tests that compare with them "
            "were skipped; `make test` installs them."
        )
    elif found := sorted({**MEASURED_ELSEWHERE, **measured_here()}.items()):
        terminalreporter.section("largest differences from the references")
        for (test, what), value in found:
            terminalreporter.line(f"{value:8.1e} {what:<26} {test}")
    if not torch.cuda.is_available():
        terminalreporter.line(f"tests marked cuda were skipped: {NO_GPU}")


def case(name):
    """A parameter of a test: the name of a place, marked if it needs a GPU."""
    return pytest.param(name, marks=pytest.mark.cuda) if name.startswith("cuda") else name


@pytest.fixture(params=[case("cpu"), case("cuda")])
def device(request):
    """Where a float32 test runs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return request.param


@pytest.fixture(params=[case(name) for name in PLACES])
def place(request):
    """Where and in what precision a test of the language model runs: (device, dtype)."""
    if request.param.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return PLACES[request.param]


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test starts from the same random numbers."""
    torch.manual_seed(1234)


def until_it_hears_signals(pid):
    """Waits until a process has its own handlers: Python's start, before that, ends in words of Python's."""
    status, deadline = Path(f"/proc/{pid}/status"), time.monotonic() + 60
    if not status.exists():  # not Linux
        time.sleep(0.5)
    while status.exists() and time.monotonic() < deadline:
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)
