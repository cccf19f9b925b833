"""Times and memory, ours beside the official package: `python tests/bench.py [--full] [--device cuda]`.

Both run in this process on the same weights, by turns and in alternating order, so that a busy machine slows
both. A row gives the medians in milliseconds and ours over theirs. Nothing is asserted: numbers depend on the
machine.

  Mimi   the released size with random weights: encode and decode of 10 s at once, and by the frame of 80 ms
  Moshi  milliseconds a step, with a nearly empty and with a full window; a small shape, or with --full the
         7B's (bfloat16; both models share one set of weights: 15.4 GB, and 1.6 GB of ring for each)
  memory the peak of a process that makes the model and runs a few steps, one process for each

On CUDA both run as they are meant to: ours captured as graphs, the official package compiled and with graphs,
in float32 without TF32, as `generate.py` runs. NO_TORCH_COMPILE=1 keeps the official one from compiling.

`--int8` compares ours with ours: int8 beside bfloat16, at Moshi's shape and at that of the recogniser
stt-1b-en_fr, a frame of its codec included. A model has four layers over and over, which takes less memory
and as long: even one is more than a cache holds. Then the peak memory of a process that turns a file to int8
while it opens it, and takes steps with a full window. The file is made of holes.

`--launches` measures no time. It counts the kernels that a frame would launch on a GPU at the released sizes,
and predicts from them, and from the bytes that are read, how long the frame takes.
"""

import argparse
import copy
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

SMALL = {
    "dim": 512,
    "num_heads": 8,
    "num_layers": 8,
    "context": 750,
    "depformer_dim": 256,
    "depformer_num_heads": 4,
    "depformer_dim_feedforward": int(4.125 * 256),
}


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="Moshi at the 7B shape, in bfloat16")
    parser.add_argument("--int8", action="store_true", help="ours in int8 beside ours in bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--launches", action="store_true", help="count launches instead, on the CPU")
    parser.add_argument(
        "--bandwidth", type=float, default=3350, help="GB/s, for --launches (default: H100 SXM)"
    )
    parser.add_argument("--only", choices=["mimi", "moshi", "memory"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, help="measurements of each, after a first one that is dropped")
    # for the child processes: "ours moshi", "official mimi", ...
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


args = arguments(None if __name__ == "__main__" else [])
on_gpu = args.device == "cuda"
if on_gpu:  # the official package runs as it is meant to: compiled, and with CUDA graphs
    for name in ("NO_TORCH_COMPILE", "NO_CUDA_GRAPH"):
        os.environ.setdefault(name, "")
else:
    os.environ.update(NO_TORCH_COMPILE="1", NO_CUDA_GRAPH="1")

import torch  # noqa: E402
from random_checkpoint import make_full_checkpoint, quick_moshi, random_mimi  # noqa: E402
from recorder import Fused, Recorder  # noqa: E402
from reference import LMGen, loaders, official_mimi, save  # noqa: E402

import moshi_min  # noqa: E402
from mimi_min import Mimi, MimiConfig, init_state, load_mimi, official_names  # noqa: E402
from moshi_min import MOSHI_FILE, Moshi, MoshiConfig, MoshiGen, captured, load_moshi, quantize  # noqa: E402

torch.backends.cudnn.allow_tf32 = False  # as in generate.py
COPIED = 1 << 30  # bytes, to measure the bandwidth of a GPU


def sync():
    """Wait for the device, so that the clock sees all of the work."""
    if on_gpu:
        torch.cuda.synchronize()


def race(name, ours, official, rounds):
    """Time two functions by turns, in alternating order, and print their medians."""
    times = {"ours": [], "official": []}
    for i in range(rounds + 1):
        pair = [("ours", ours), ("official", official)]
        for who, function in pair if i % 2 else reversed(pair):
            sync()
            start = time.perf_counter()
            function()
            sync()
            if i:  # the first round warms up
                times[who].append(1000 * (time.perf_counter() - start))
    mine, theirs = (statistics.median(times[who]) for who in ("ours", "official"))
    row(name, f"{mine:.1f} ms", f"{theirs:.1f} ms", f"{mine / theirs:.2f}")
    return mine / 1000


def row(name, ours, official="", ratio=""):
    """A line of the table."""
    print(f"| {name:<44} | {ours:>10} | {official:>10} | {ratio:>5} |", flush=True)


# ---- Mimi --------------------------------------------------------------------------------------------------


def make_mimi():
    """(ours, official) of the released size on random weights, 8 codebooks."""
    official = official_mimi(loaders._mimi_config, device=args.device, num_codebooks=8)
    with tempfile.TemporaryDirectory() as folder:
        path = save(official, Path(folder) / "mimi.safetensors")
        return load_mimi(path, MimiConfig.from_dict(loaders._mimi_config), 8, args.device), official


@torch.no_grad()
def bench_mimi():
    """Whole recordings of 10 s, then a stream by the frame."""
    ours, official = make_mimi()
    pcm = torch.randn(1, 1, 125 * ours.frame_size, device=args.device) * 0.1
    codes = official.encode(pcm)
    rounds = args.rounds or 5
    race("Mimi encode, 10 s at once", lambda: ours.encode(pcm), lambda: official.encode(pcm), rounds)
    race("Mimi decode, 10 s at once", lambda: ours.decode(codes), lambda: official.decode(codes), rounds)
    rounds = args.rounds or 60
    state, frame, code = init_state(ours, 1), pcm[..., : ours.frame_size], codes[..., :1]
    encode = captured(lambda frame: ours.encode(frame, state), pcm.device)
    decode = captured(lambda code: ours.decode(code, state), pcm.device)
    with official.streaming(1):
        race(
            "Mimi encode, a frame of a stream",
            lambda: encode(frame),
            lambda: official.encode(frame),
            rounds,
        )
        race(
            "Mimi decode, a frame of a stream",
            lambda: decode(code),
            lambda: official.decode(code),
            rounds,
        )


# ---- Moshi -------------------------------------------------------------------------------------------------


def moshi_config():
    """The official configuration that is measured, and its dtype."""
    small = loaders._lm_kwargs | SMALL
    return (loaders._lm_kwargs, torch.bfloat16) if args.full else (small, torch.float32)


def make_moshi():
    """Ours, with random weights of a sensible size made where they stay."""
    config, dtype = moshi_config()
    return quick_moshi(MoshiConfig.from_dict(config), dtype, args.device)


def share_weights(moshi):
    """The official model on the very same memory: its weights are ours, or slices of our stacked ones."""
    config, dtype = moshi_config()
    official = loaders.get_moshi_lm(None, config, device="meta", dtype=dtype)
    names, shared = official_names(moshi, moshi_min.MOSHI_NAMES), {}
    for ours, tensor in moshi.state_dict().items():
        if "_proj" in names[ours]:  # all codebooks in one, which the package takes apart
            tensor = tensor.view(-1, tensor.shape[-1])
        pieces = enumerate(tensor) if "{k}" in names[ours] else [(0, tensor)]
        shared.update({names[ours].format(k=k): piece for k, piece in pieces})
    official.load_state_dict(shared, assign=True)
    return official.eval().requires_grad_(False)


def set_position(module, position):
    """Make a streaming official model believe that it has run for `position` steps."""
    for part in module.modules():
        state = getattr(part, "_streaming_state", None)
        for counter in (
            getattr(state, "offset", None),
            getattr(state, "offsets", None),
            getattr(getattr(state, "kv_cache", None), "end_offset", None),
        ):
            if counter is not None and not getattr(part, "_streaming_detached", False):
                counter.fill_(position)


@torch.no_grad()
def bench_moshi():
    """A step with a nearly empty window, then with a full one."""
    moshi = make_moshi()
    official = share_weights(moshi)
    config = moshi.config
    shape = "7B bf16" if args.full else "small f32"
    user = torch.randint(config.card, (1, config.n_q - config.dep_q, 1), device=args.device)
    rounds = args.rounds or (5 if args.full and not on_gpu else 30)
    ours, theirs = MoshiGen(moshi), LMGen(official)
    with theirs.streaming(1):
        for _ in range(2):  # CUDA: eager once, then captured
            ours.step(user), theirs.step(user)
        race(
            f"Moshi {shape}, a step, window nearly empty",
            lambda: ours.step(user),
            lambda: theirs.step(user),
            rounds,
        )
        ours.state[moshi.transformer]["position"].fill_(config.context + 7)
        set_position(official.transformer, config.context + 7)
        seconds = race(
            f"Moshi {shape}, a step, window full", lambda: ours.step(user), lambda: theirs.step(user), rounds
        )
    if on_gpu:
        floor(moshi, ours.state[moshi.transformer]["rings"], seconds)


def floor(moshi, rings, seconds):
    """On a GPU a step can't be faster than reading the weights and the rings of keys and values once: their
    bytes over the bandwidth of a copy."""
    embeddings = sum(p.nbytes for n, p in moshi.named_parameters() if "emb" in n)
    size = sum(p.nbytes for p in moshi.parameters()) - embeddings + rings.nbytes
    source = torch.empty(COPIED, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        sync()
        start = time.perf_counter()
        target.copy_(source)
        sync()
        times.append(time.perf_counter() - start)
    bandwidth = 2 * source.nbytes / statistics.median(times)  # read and written
    least = size / bandwidth
    row(
        f"memory floor of a step, {size / 1e9:.2f} GB at {bandwidth / 1e9:.0f} GB/s", f"{1000 * least:.1f} ms"
    )
    row("that step over its floor", f"{seconds / least:.2f}")


# ---- memory ------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(who, what):
    """In a process of its own: make one model, run 20 steps (5 at the 7B shape), print the peak in bytes."""
    if what == "mimi":
        ours, official = make_mimi()
        pcm = torch.randn(1, 1, 125 * ours.frame_size, device=args.device) * 0.1
        codec = ours if who == "ours" else official
        del ours, official
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()  # both were there until now
        codec.decode(codec.encode(pcm))
    else:
        moshi = make_moshi()
        config = moshi.config
        user = torch.zeros(1, config.n_q - config.dep_q, 1, dtype=torch.long, device=args.device)
        if who == "ours":
            sampler = MoshiGen(moshi)
            steps = [sampler.step(user) for _ in range(5 if args.full else 20)]
        else:
            sampler = LMGen(share_weights(moshi))
            with sampler.streaming(1):
                steps = [sampler.step(user) for _ in range(5 if args.full else 20)]
        assert steps[-1] is not None
    print_peak()


def print_peak():
    """The peak so far in bytes, of the allocator on CUDA, of this process on the CPU."""
    if on_gpu:
        print(torch.cuda.max_memory_allocated())
    else:  # of this program alone: ru_maxrss would count the parent's memory at the fork too
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(1024 * int(status["VmHWM"].split()[0]))


def bench_memory():
    """Peak memory, of the process on the CPU (torch and the packages included), of the allocator on CUDA."""
    for what in ("mimi", "moshi"):
        peaks = []
        for who in ("ours", "official"):
            command = [sys.executable, __file__, "--measure", f"{who} {what}", "--device", args.device]
            done = subprocess.run(command + ["--full"] * args.full, capture_output=True, text=True)
            if done.returncode:
                print(f"{who} {what}: failed ({done.stderr.strip()[-200:]})")
                return
            peaks.append(int(done.stdout.splitlines()[-1]))
        size = [f"{peak / 1e9:.2f} GB" for peak in peaks]
        row(
            f"{'Mimi, 10 s' if what == 'mimi' else 'Moshi'}, peak memory of a process",
            *size,
            f"{peaks[0] / peaks[1]:.2f}",
        )


# ---- int8 --------------------------------------------------------------------------------------------------

STT_1B = MoshiConfig(  # stt-1b-en_fr
    dim=2048,
    num_layers=16,
    num_heads=16,
    context=750,
    max_period=100000.0,
    n_q=32,
    dep_q=0,
    text_card=8000,
    delays=(0,) * 33,
)
REPEATED = 4  # layers of a large model that are different


def repeating(config):
    """A model in bfloat16 of which few layers are made, and used over and over."""
    few = min(REPEATED, config.num_layers)
    moshi = quick_moshi(dataclasses.replace(config, num_layers=few), torch.bfloat16, args.device)
    moshi.transformer.layers = torch.nn.ModuleList([*moshi.transformer.layers] * (config.num_layers // few))
    return moshi


@torch.no_grad()
def bench_int8():
    """A step of Moshi, and a frame of a recogniser with its codec, in int8 and in bfloat16 by turns."""
    print(f"| {'':<44} | {'int8':>10} | {'bfloat16':>10} | {'ratio':>5} |")
    print(f"|{'-' * 46}|{'-' * 12}|{'-' * 12}|{'-' * 7}|")
    moshi_shape = MoshiConfig.from_dict(loaders._lm_kwargs | ({} if args.full else SMALL))
    for name, config in (("Moshi 7B" if args.full else "Moshi small", moshi_shape), ("STT-1B", STT_1B)):
        plain = repeating(config)
        samplers = [MoshiGen(model) for model in (quantize(copy.deepcopy(plain)), plain)]
        user = torch.randint(config.card, (1, config.n_q - config.dep_q, 1), device=args.device)
        rounds = args.rounds or (8 if config.dep_q and args.full and not on_gpu else 30)
        for window in ("nearly empty", "full"):
            if window == "full":
                for memory in [sampler.state[sampler.moshi.transformer] for sampler in samplers]:
                    memory["rings"].fill_(0.1)  # what was never written takes no memory
                    memory["position"].fill_(config.context + 7)
            steps = [lambda sampler=sampler, user=user: sampler.step(user) for sampler in samplers]
            race(f"{name}, a step, window {window}", *steps, rounds)
    mimi = random_mimi(MimiConfig()).to(args.device)
    state, frame = init_state(mimi, 1), torch.randn(1, 1, mimi.frame_size, device=args.device) * 0.1
    encode = captured(lambda frame: mimi.encode(frame, state), frame.device)
    frames = [lambda sampler=sampler: sampler.step(encode(frame)) for sampler in samplers]
    race(f"{name}, a frame with its codec, window full", *frames, rounds)
    bench_int8_memory()


@torch.no_grad()
def measure_int8():
    """In a process of its own: open a file in int8, take steps with a full window, print the peak."""
    config = MoshiConfig.from_dict(loaders._lm_kwargs | ({} if args.full else SMALL))
    with tempfile.TemporaryDirectory() as folder:
        make_full_checkpoint(folder, config, holes=True)
        moshi = load_moshi(Path(folder) / MOSHI_FILE, config, args.device, torch.int8)
    sampler = MoshiGen(moshi)
    memory = sampler.state[moshi.transformer]
    memory["rings"].fill_(0.1)
    memory["position"].fill_(config.context + 7)
    user = torch.zeros(1, config.n_q - config.dep_q, 1, dtype=torch.long, device=args.device)
    for _ in range(3):
        sampler.step(user)
    print_peak()


def bench_int8_memory():
    """Peak memory of a process with a model in int8."""
    command = [sys.executable, __file__, "--measure", "int8", "--device", args.device]
    done = subprocess.run(command + ["--full"] * args.full, capture_output=True, text=True)
    if done.returncode:
        print(f"memory: failed ({done.stderr.strip()[-200:]})")
    else:
        row("peak memory, a full window", f"{int(done.stdout.splitlines()[-1]) / 1e9:.2f} GB")


# ---- launches ----------------------------------------------------------------------------------------------

NARROW = {  # as many operators as the released size has, in little memory
    "dim": 64,
    "num_heads": 4,
    "context": 16,
    "depformer_dim": 32,
    "depformer_num_heads": 4,
    "depformer_dim_feedforward": int(4.125 * 32),
}
LAUNCH = 2e-6  # seconds a kernel of a captured graph costs when it has next to nothing to do


@torch.no_grad()
def watch(function):
    """A recorder that has seen one call of `function`, after the calls that fill the delays."""
    for _ in range(3):
        function()
    with Fused(), Recorder(strict=False) as recorder:
        function()
    return recorder


def count_launches():
    """Operators that would launch a kernel: all but views and reserved memory, attention being one. Ours run
    on the meta device, the official ones in eager mode on the CPU, Moshi in narrow layers."""
    with torch.device("meta"):
        moshi, mimi = Moshi(MoshiConfig()).to(torch.bfloat16), Mimi(MimiConfig())
        pcm, codes = torch.empty(1, 1, mimi.frame_size), torch.zeros(1, 8, 1, dtype=torch.long)
    mimi.num_codebooks = 8
    sampler, state = MoshiGen(moshi), init_state(mimi, 1)
    ours = [
        watch(lambda: sampler.step(codes)),
        watch(lambda: mimi.encode(pcm, state)),
        watch(lambda: mimi.decode(codes, state)),
    ]
    lm = loaders.get_moshi_lm(None, loaders._lm_kwargs | NARROW, device="cpu", dtype=torch.bfloat16)
    codec, generator = official_mimi(loaders._mimi_config, num_codebooks=8), LMGen(lm.eval())
    pcm, codes = torch.zeros(pcm.shape), torch.zeros(codes.shape, dtype=torch.long)
    with generator.streaming(1), codec.streaming(1):
        official = [
            watch(lambda: generator.step(codes)),
            watch(lambda: codec.encode(pcm)),
            watch(lambda: codec.decode(codes)),
        ]
    names = (
        "launches of a step of Moshi 7B, bf16",
        "launches to encode a frame",
        "launches to decode a frame",
    )
    for name, a, b in zip(names, ours, official):
        row(name, f"{a.launches:,}", f"{b.launches:,}", f"{a.launches / b.launches:.2f}")
    size = sum(recorder.bytes_read for recorder in ours)
    reading = size / (args.bandwidth * 1e9)
    frames = [reading + LAUNCH * sum(recorder.launches for recorder in who) for who in (ours, official)]
    row("predicted frame", *(f"{1000 * frame:.1f} ms" for frame in frames), f"{frames[0] / frames[1]:.2f}")
    parts = " + ".join(f"{recorder.bytes_read / 1e9:.2f}" for recorder in ours)
    print(f"\nA frame reads {parts} GB of weights, keys and values (the rings are read whole),")
    print(f"in {1000 * reading:.1f} ms at {args.bandwidth:.0f} GB/s. A launch takes {1e6 * LAUNCH:.0f} us.")


def main():
    """Print the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure:
        measure_int8() if args.measure == "int8" else measure(*args.measure.split())
        return
    place = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {place}\n")
    if args.int8:
        bench_int8()
        return
    print(f"| {'':<44} | {'ours':>10} | {'official':>10} | {'ratio':>5} |")
    print(f"|{'-' * 46}|{'-' * 12}|{'-' * 12}|{'-' * 7}|")
    if args.launches:
        count_launches()
        return
    for name, function in (("mimi", bench_mimi), ("moshi", bench_moshi), ("memory", bench_memory)):
        if args.only in (None, name):
            function()


if __name__ == "__main__":
    main()
