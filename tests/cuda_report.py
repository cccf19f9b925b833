"""What a GPU shows, as one Markdown table: `make cuda`, or `python tests/cuda_report.py --only tests,steps`.

  tests    `pytest -m cuda`
  steps    `bench.py`: a step of the 7B, ours and the official package, and the memory floor
  frames   the program's loop at the 7B shape, codec included: time of a frame, captured and eager, and memory
  kernels  one captured frame of that in the profiler, and its ten dearest kernels
  tiny     `generate.py` on the trained checkpoint: does it say on a GPU what it says on a CPU?
  codec    `bench.py`: 10 s at once, and by the frame
  files    a 7B checkpoint is written if the disk has room and is quick: the time to load it, `generate.py` on
           it, and the tests for the released weights but for the known answers
  memory   `bench.py`: the peak of a process

All weights but tiny's are random, and made on the GPU where that will do. Nothing needs a network. Each part
is a process with a limit of time, the most telling ones first: what fails or takes too long costs only
itself, and is named under the table. The table is printed at the end, and written to `cuda.md`.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from random_checkpoint import make_full_checkpoint, quick_moshi, random_mimi  # noqa: E402

import generate  # noqa: E402
from mimi_min import MimiConfig  # noqa: E402
from moshi_min import MoshiConfig, MoshiGen, load_checkpoint  # noqa: E402

DEVICE = "cuda"
SIZES = MoshiConfig(), MimiConfig()  # the released ones
WARM = 10  # frames before a measurement: an eager one, one that is captured, then the clocks of the GPU
FRAMES = 100
FEW = 50  # kernels: a frame has many more
NEEDED = 20e9  # bytes free on the disk for a 7B checkpoint of 15.7 GB
TWICE = 36e9  # bytes of memory for two such models
PATIENCE = 60  # seconds that writing it may take
LEAST = 15  # seconds that a part must have


def row(what, ours="", official="", ratio=""):
    """A line of the table, as bench.py prints them."""
    print(f"| {what:<44} | {ours:>10} | {official:>10} | {ratio:>5} |", flush=True)


def note(what):
    """A line under the table: what is missing from it, and why."""
    print(f"note: {' '.join(what.split())}", flush=True)


# ---- the parts that are no other program -------------------------------------------------------------------


def models():
    """A random Moshi and Mimi of the released sizes, on the GPU."""
    torch.manual_seed(0)
    moshi_config, mimi_config = SIZES
    mimi = random_mimi(mimi_config).to(DEVICE)
    mimi.num_codebooks = max(moshi_config.dep_q, moshi_config.n_q - moshi_config.dep_q)
    return quick_moshi(moshi_config, device=DEVICE), mimi


def talk(moshi, mimi, cuda_graph=True):
    """The program's loop, with noise for a user and no end: yields the milliseconds of each frame, from its
    sound to Moshi's sound on the host."""
    started = []

    def noise():
        while True:
            frame = torch.randn(1, 1, mimi.frame_size) * 0.1
            started.append(time.perf_counter())
            yield frame

    for heard, said, sound in generate.converse(mimi, MoshiGen(moshi, cuda_graph=cuda_graph), noise()):
        if said is not None:
            int(said[0, 0]), sound.cpu()
        if heard is not None:
            torch.cuda.synchronize()
            yield 1000 * (time.perf_counter() - started[-1])


def frames(folder):
    """The program's loop, captured and eager."""
    torch.cuda.reset_peak_memory_stats()
    moshi, mimi = models()
    for name, graph in (("captured", True), ("eager", False)):
        times = list(itertools.islice(talk(moshi, mimi, graph), WARM + FRAMES))
        row(f"a whole frame with the codec, {name}, median", f"{statistics.median(times[WARM:]):.1f} ms")
        row(f"the slowest of {FRAMES}, {name}", f"{max(times[WARM:]):.1f} ms")
        if graph:
            row("its first two frames (eager, then captured)", f"{sum(times[:2]):.0f} ms")
            row("peak memory, allocated", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
            free, whole = torch.cuda.mem_get_info()
            row("memory in use on the device", f"{(whole - free) / 1e9:.2f} GB")


def kernels(folder):
    """One captured frame in the profiler; an eager one if it does not see into graphs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):
        pass  # it must be there before the graphs are
    pair = models()
    for name, graph in (("captured", True), ("eager", False)):
        frame = talk(*pair, graph)
        for _ in range(WARM):
            next(frame)
        with torch.profiler.profile(activities=activities) as profile:
            next(frame)
        on_gpu = torch.autograd.DeviceType.CUDA
        found = [event for event in profile.key_averages() if event.device_type == on_gpu]
        if sum(event.count for event in found) > FEW:
            break
        note(f"kernels: the profiler saw next to none of the {name} frame's")
    if not found:
        return
    busy = sum(event.self_device_time_total for event in found) / 1000
    row(f"kernels of a frame ({name}), by the profiler", f"{sum(event.count for event in found):,}")
    row("the time spent in them", f"{busy:.1f} ms")
    found.sort(key=lambda event: event.self_device_time_total, reverse=True)
    for number, event in enumerate(found[:10], 1):
        milliseconds = event.self_device_time_total / 1000
        print(f"{number}. {milliseconds:.3f} ms in {event.count} calls: `{event.key[:120]}`")


def program(*arguments):
    """Runs `generate.py` here: what it says, and what it tells of its speed."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as told:
        code = generate.main([*map(str, arguments), "--device", DEVICE])
    speed = re.search(r"(\d+) frames, ([\d.]+) ms per frame", told.getvalue())
    if code or not speed:
        raise SystemExit(f"generate.py: {told.getvalue()}")
    return said.getvalue().strip(), speed[1], speed[2]


def tiny(folder):
    """The trained checkpoint, greedy: its words must be those that it says on the CPU."""
    said, count, milliseconds = program("--greedy", "-o", folder / "answer.wav")
    row(f"generate.py, tiny checkpoint, {count} frames, a frame", f"{milliseconds} ms")
    if said != "seven plus eight is fifteen":
        raise SystemExit(f"it says {said!r}")
    row("its answer is that of the CPU", "yes")


def seconds_to_write(folder, size=1 << 29):
    """How long the disk will take for 15.7 GB, going by half a GB."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        block = os.urandom(1 << 22)
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - start) * 15.7e9 / size


def files(folder):
    """A checkpoint of the released sizes: written, loaded, talked with, and put before the tests."""
    free, seconds = shutil.disk_usage(folder).free, seconds_to_write(folder)
    if free < NEEDED or seconds > PATIENCE:
        return note(
            f"files: {free / 1e9:.0f} GB are free, and writing would take {seconds:.0f} s; it wants "
            f"{NEEDED / 1e9:.0f} GB and at most {PATIENCE} s (another disk: set TMPDIR)"
        )
    start = time.perf_counter()
    path = make_full_checkpoint(folder / "random", *SIZES)
    row("a 7B checkpoint written to the disk", f"{time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    checkpoint = load_checkpoint(path, DEVICE)
    torch.cuda.synchronize()
    row("loaded (from the cache, if it holds it)", f"{time.perf_counter() - start:.1f} s")
    del checkpoint
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    _, count, milliseconds = program("--checkpoint", path, "-o", folder / "answer.wav")
    row(f"generate.py on it, {count} frames, in all", f"{time.perf_counter() - start:.1f} s")
    row("a frame, from its first to its last", f"{milliseconds} ms")
    row("peak memory, allocated", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[1] < TWICE:
        return note("files: the tests for the released weights are skipped, two models of 15.4 GB do not fit")
    # Not the known answers, which random weights cannot give.
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "tests/test_moshi.py", "-m", "cuda"]
    environment = {**os.environ, "MOSHI_CHECKPOINT": str(path)}
    done = subprocess.run([*command, "-k", "test_released_mo or test_released_mi"], cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit("the tests for the released weights fail")
    row("the tests for released weights, on random ones", "passed")
    return None


# ---- all parts, each in a process of its own ---------------------------------------------------------------

BENCH = [sys.executable, "tests/bench.py", "--full", "--device", DEVICE, "--only"]
OURS = [sys.executable, "tests/cuda_report.py", "--part"]
PARTS = {  # the most telling ones first: command, and seconds it may take
    "tests": ([sys.executable, "-m", "pytest", "-q", "-rf", "-m", "cuda"], 180),
    "steps": ([*BENCH, "moshi"], 120),
    "frames": ([*OURS, "frames"], 90),
    "kernels": ([*OURS, "kernels"], 60),
    "tiny": ([*OURS, "tiny"], 40),
    "codec": ([*BENCH, "mimi"], 90),
    "files": ([*OURS, "files"], 150),
    "memory": ([*BENCH, "memory"], 120),
}


def stop(process):
    """Ends a part and all that it has started; at the first signal pytest tells what it has so far."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def run(name, command, seconds, environment):
    """Runs a part, printing as it goes. Returns its lines, and what is to be said against it or ''."""
    print(f"\n{name}: {' '.join(command[1:])}", flush=True)
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    process = subprocess.Popen(command, **output, cwd=ROOT, env=environment, start_new_session=True)
    lines, against = [], ""

    def read():
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        against = f"it was stopped after {seconds:.0f} s"
    finally:
        stop(process)
    reader.join(5)  # something that the part has left behind may keep the pipe open
    if process.returncode and not against:
        last = next((line for line in reversed(lines) if line), "")
        against = f"it failed with code {process.returncode}: {last[:200]}"
    return lines, against


def part(name, limit, folder):
    """Lines and notes of a part. One with the official package is tried again without its compiler."""
    command, seconds = PARTS[name]
    seconds = min(seconds, limit)
    if command[: len(OURS)] == OURS:
        command = [*command, "--folder", str(folder)]
    # What the official package compiles is kept from one part to the next.
    folders = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "compiled")}
    environment = {**os.environ, **folders, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    lines, against = run(name, command, seconds, environment)
    notes = [f"{name}: {against}"] * bool(against)
    left = seconds - (time.monotonic() - start)
    if against and left > LEAST and command[: len(BENCH)] == BENCH:
        notes.append(f"{name}: so the official package ran with graphs, but not compiled")
        again, against = run(name, command, left, {**environment, "NO_TORCH_COMPILE": "1"})
        lines = lines + again if against else again
        notes += [f"{name}: {against}"] * bool(against)
    return lines, notes


def sort_out(name, lines):
    """From the lines of a part: rows of the table, notes, kernels."""
    rows = [line for line in lines if re.match(r"\| +[^ |]", line)]
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    notes += [f"{name}: {line}" for line in lines if line.startswith("FAILED ")]
    kernels = [line for line in lines if re.match(r"\d+\. [\d.]+ ms in ", line)]
    for line in lines if name == "tests" else ():
        if summary := re.match(r"=*\s*(\d+ (?:passed|failed|skipped|error|deselected).*?) in [\d.]+s", line):
            rows.append(f"| `pytest -m cuda` | {summary[1]} | | |")
    return rows, notes, kernels


def why_not():
    """What is in the way of running anything here, or ''."""
    if torch.cuda.is_available():
        return ""
    advice = "make clean, then make cuda with PIP_EXTRA_INDEX_URL set to PyTorch's index for that CUDA"
    if torch.version.cuda is None:
        return f"torch is built without CUDA here: make clean && make cuda; for an older CUDA {advice}"
    return f"no GPU, or its driver is too old for CUDA {torch.version.cuda}; for an older one: {advice}"


def main(argv=None):
    """Runs the parts; returns 1 if one of them fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts (default: %(default)s)")
    parser.add_argument("-o", "--output", default="cuda.md", help="(default: %(default)s)")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        torch.backends.cudnn.allow_tf32 = False
        globals()[args.part](args.folder)
        return 0
    chosen = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    if problem := why_not():
        print(f"cuda_report.py: nothing is measured: {problem}")
        return 1
    place = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{place}, {time.strftime('%Y-%m-%d')}; at most {args.minutes:g} minutes")
    rows, notes, dearest, failed = [], [], [], False
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as everything:
        for name in chosen:
            left, folder = end - time.monotonic(), Path(everything) / name
            if left < LEAST:
                notes.append(f"{name}: skipped, the {args.minutes:g} minutes are over")
                continue
            folder.mkdir()
            lines, against = part(name, left, folder)
            shutil.rmtree(folder, ignore_errors=True)
            found = sort_out(name, lines)
            rows, notes, dearest = rows + found[0], notes + against + found[1], dearest + found[2]
            failed |= bool(against)
    report = [f"{place}, {time.strftime('%Y-%m-%d')}; random weights.\n"]
    report += ["| | ours | official | ratio |", "| --- | --- | --- | --- |"]
    report += [re.sub(" +", " ", line) for line in rows]
    report += ["\nThe dearest kernels of a frame:\n", *dearest] if dearest else []
    report += ["\nSkipped or failed:\n", *(f"- {line}" for line in notes)] if notes else []
    text = "\n".join(report) + "\n"
    Path(args.output).write_text(text)
    print(f"\n{'-' * 72}\n{text}{'-' * 72}\nwritten to {args.output}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
