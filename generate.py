"""Talks with Moshi: what the user says goes in, what Moshi says comes out, 80 ms at a time.

    python generate.py question.wav -o answer.wav     # a recording in, an answer out, its words printed
    arecord -t raw -f S16_LE -r 24000 -c 1 | python generate.py - -o - | aplay -t raw -f S16_LE -r 24000 -c 1

Without arguments it answers the question in `tiny/` with the checkpoint there. The function to read is
`converse`; before it stands what reads and writes sound, after it what reads the command line.
"""
import argparse
import codecs
import contextlib
import itertools
import math
import os
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mimi_min import init_state, whole_file
from moshi_min import MIMI_FILE, MOSHI_FILE, NO_INPUT, TOKENIZER_FILE, MoshiGen, load_checkpoint

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

class Problem(Exception):
    """Something that the user can put right: one line that says what and how."""

# ------------------------------------------------------------------------------------------------------ sound

def read_wav(path: Path) -> tuple[Tensor, int]:
    """The mean of all channels [T] in -1..1, and the sample rate. PCM of 8 to 32 bits, or float."""
    again, convert = "; record or copy it again", f"; convert it: ffmpeg -i {path} -c:a pcm_s16le new.wav"
    data = path.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise Problem(f"{path} is {'not a WAV file' + convert if data else 'an empty file' + again}")
    place, size, name, header = 12, 0, b"", b""
    while name != b"data":  # chunks of any kind: a name, a size, contents padded to an even length
        place += size + size % 2
        if place + 8 > len(data):
            raise Problem(f"{path} ends before its sound begins" + again)
        name, size = struct.unpack_from("<4sI", data, place)
        place += 8
        header = data[place : place + size] if name == b"fmt " else header
    form, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", header.ljust(16, b"\0"))
    if form == 0xFFFE and len(header) >= 26:  # an extensible header: the true format opens a longer name
        form = struct.unpack_from("<H", header, 24)[0]
    width = block // max(channels, 1)  # bytes of a sample
    known = (form, width) in ((1, 1), (1, 2), (1, 3), (1, 4), (3, 4), (3, 8)) and width * channels == block
    if not known or not 1000 <= rate <= 1_000_000:
        raise Problem(f"{path}: format {form} of {bits} bits at {rate} Hz is not read here" + convert)
    there, whole = len(data) - place, struct.unpack_from("<I", data, 4)[0] == len(data) - 8
    if size == 0 and not whole or size >= 0x7FFF0000:  # its writer wrote into a pipe and could not know
        size = there
    if size > there:
        raise Problem(f"{path} is cut off: {there} of {size} bytes of sound are there" + again)
    raw = np.frombuffer(data, np.uint8, size // block * block, place)
    if form == 3:
        samples = raw.view(f"<f{width}")
    else:  # whole numbers, put into the upper bytes of 32 bits; 8 bits have their zero at 128
        wide = np.zeros((len(raw) // width, 4), np.uint8)
        wide[:, 4 - width :] = (raw ^ 128 if width == 1 else raw).reshape(-1, width)
        samples = wide.view("<i4")[:, 0] / np.float32(2**31)
    if not len(samples) or not np.isfinite(samples).all():
        what = "samples that are not finite numbers" if len(samples) else "no sound"
        raise Problem(f"{path} holds {what}" + again)
    return torch.from_numpy(samples.clip(-1, 1).reshape(-1, channels).mean(axis=1, dtype=np.float32)), rate

def resample(x: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """x [T] at `rate_in` Hz -> [ceil(T * rate_out / rate_in)] at `rate_out` Hz, by a windowed sinc.
    The low-pass (32 zero crossings on each side, Kaiser window) lies midway between 0.8 of the lower Nyquist
    frequency, which passes, and that frequency, which does not. An output is the product of the inputs around
    it with the filter, shifted to where it falls between two of them; these shifts (phases) repeat."""
    if rate_in == rate_out:
        return x
    up, down = rate_out // math.gcd(rate_in, rate_out), rate_in // math.gcd(rate_in, rate_out)
    cutoff = 0.9 * min(1, up / down)  # in parts of the input's Nyquist frequency
    half = math.ceil(32 / min(1, up / down))  # reach of the filter, in input samples
    windows = F.pad(x, (half - 1, half)).unfold(0, 2 * half, 1)  # [T, 2 * half], a view: what is around t
    offsets = torch.arange(1 - half, half + 1, dtype=torch.float64)
    blocks = []
    for numbers in torch.arange(-(-len(x) * up // down)).split(1024):  # blocks, to bound the memory
        phases, which = (numbers * down % up).unique(return_inverse=True)
        distance = phases[:, None] / up - offsets
        kaiser = torch.i0(9 * (1 - (distance / half) ** 2).clamp(min=0).sqrt()) / torch.i0(torch.tensor(9.0))
        filters = (cutoff * torch.sinc(cutoff * distance) * kaiser).float()  # [phases, 2 * half]
        blocks.append((windows[numbers * down // up] * filters[which]).sum(1))
    return torch.cat(blocks)

def pipe_frames(frame_size: int):
    """Frames [frame_size] of raw 16-bit mono as they come from standard input, the last one zero-padded."""
    while data := sys.stdin.buffer.read(2 * frame_size):
        samples = torch.from_numpy(np.frombuffer(data, "<i2", len(data) // 2) / np.float32(32768))
        yield F.pad(samples, (0, frame_size - len(samples)))

class SoundWriter:
    """Writes 16-bit sound by the frame: Moshi alone, or the user left and Moshi right; raw or as a WAV."""

    def __init__(self, file, stereo: bool, rate: int, raw: bool):
        self.file, self.channels, self.rate, self.raw, self.size = file, 1 + stereo, rate, raw, 0
        self.late = None  # stereo: Moshi's last frame
        file.write(b"" if raw else bytes(44))  # the header's place

    def add(self, user: Tensor, moshi: Tensor | None) -> None:
        """A frame of each, [T]; Moshi may have none yet."""
        if self.channels == 2:
            # As heard live: Moshi's answer to a frame begins when that frame is over, beside the next one.
            before = torch.zeros_like(user) if self.late is None else self.late
            moshi, self.late = torch.stack([user, before]), moshi
        if moshi is not None:
            samples = (moshi * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy().T
            self.size += self.file.write(samples.astype("<i2").tobytes())
            self.file.flush()

    def finish(self) -> None:
        """Writes what is late, and the header."""
        if self.late is not None:
            self.add(torch.zeros_like(self.late), None)
        if not self.raw:
            block = 2 * self.channels
            self.file.truncate(44 + self.size)  # Ctrl-C may have come in the middle of a write
            self.file.seek(0)
            self.file.write(struct.pack(
                "<4sI8sIHHIIHH4sI", b"RIFF", 36 + self.size, b"WAVEfmt ", 16, 1, self.channels, self.rate,
                self.rate * block, block, 16, b"data", self.size))

def show(text: str, stream) -> None:
    """Prints at once. When the reader of `stream` has gone, what is written to it goes nowhere."""
    try:
        print(text, end="", file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

class Screen:
    """What one sees meanwhile: the inner monologue on `stream`, a progress line on standard error."""

    def __init__(self, tokenizer, config, stream, frame_seconds: float, total: int | None):
        self.tokenizer, self.stream, self.frame_seconds = tokenizer, stream, frame_seconds
        self.silent = (config.existing_text_padding_id, config.existing_text_end_padding_id)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come byte by byte
        self.of = f" of {total * frame_seconds:.1f}" if total else ""
        self.frames, self.busy, self.shown = 0, 0.0, time.monotonic()

    def say(self, token: int) -> None:
        """Prints a token: a piece of a word, a single byte (<0xE2>), or without a tokenizer its number."""
        if token not in self.silent:
            known = self.tokenizer is not None and token < self.tokenizer.vocab_size()
            piece = self.tokenizer.id_to_piece(token) if known else f"▁{token}"
            is_byte = known and self.tokenizer.is_byte(token)
            text = bytes.fromhex(piece[3:5]) if is_byte else piece.replace("▁", " ").encode()
            show(self.utf8.decode(text), self.stream)

    def end(self) -> None:
        """Ends the line, after what came of a last character, if it is cut off."""
        show(self.utf8.decode(b"", True) + "\n", self.stream)

    def frame_done(self, seconds: float) -> None:
        """Counts a frame and the work it took. A terminal shows each, a file one every five seconds."""
        self.frames, self.busy = self.frames + 1, self.busy + seconds
        if sys.stderr.isatty():  # right of the words; the cursor goes back to where it was, and nothing wraps
            show(f"\x1b7\x1b[K\x1b[?7l  [{self}]\x1b[?7h\x1b8", sys.stderr)
        elif time.monotonic() - self.shown > 5:
            show(f"{self}\n", sys.stderr)
            self.shown = time.monotonic()

    def __str__(self) -> str:
        done = self.frames * self.frame_seconds
        return f"{done:.1f}{self.of} s, {done / max(self.busy, 1e-9):.2f} times real time"

# ------------------------------------------------------------------------------------------- the conversation

@torch.no_grad()
def converse(mimi, gen: MoshiGen, frames, screen: Screen, writer: SoundWriter) -> tuple[Tensor, bool]:
    """Talks while `frames` come (the user's sound, [frame_size] each), or until Ctrl-C.
    Returns the aligned codes of all streams [1 + n_q, F], NO_INPUT where there is none; True after Ctrl-C."""
    state, heard, said, interrupted = init_state(mimi, 1), [], [], False
    try:
        for frame in frames:
            start = time.monotonic()
            codes = mimi.encode(frame[None, None].to(gen.user.device), state)[:, : gen.user.shape[1]]
            if not heard:  # The first frame goes in twice, as in the official run_inference: the first step
                said.append(gen.step(codes))  # reads the initial tokens instead. Nothing of it is played.
            heard.append(codes)
            said.append(gen.step(codes))
            answer = None
            if said[-1] is not None:
                screen.say(int(said[-1][0, 0]))
                answer = mimi.decode(said[-1][:, 1:], state)[0, 0].cpu()
                if not answer.isfinite().all():
                    raise Problem("the checkpoint's codec makes samples that are not finite; get it again")
            writer.add(frame, answer)
            screen.frame_done(time.monotonic() - start)
    except KeyboardInterrupt:
        interrupted = True
    codes = torch.full((1 + gen.config.n_q, len(heard)), NO_INPUT)
    for rows, stream in ((codes[: gen.own], said), (codes[gen.own :], heard)):
        for f, tokens in zip(range(len(heard)), (tokens for tokens in stream if tokens is not None)):
            rows[:, f] = tokens[0, :, 0]
    return codes, interrupted

# ------------------------------------------------------------------------------------------- the command line

def number(kind: type, low: int):
    """A reader of numbers from `low` on, for argparse."""
    def read(text: str):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= 10**9:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number from {low} to 1e9")
    return read

SETTINGS = (  # option, what it is, its reader, its place in config.json, and its value when that says nothing
    ("temp", "temperature of the audio", number(float, 0), "lm_gen_config", "temp", 0.8),
    ("temp_text", "temperature of the text", number(float, 0), "lm_gen_config", "temp_text", 0.7),
    ("top_k", "audio tokens to choose from", number(int, 1), "lm_gen_config", "top_k", 250),
    ("top_k_text", "text tokens to choose from", number(int, 1), "lm_gen_config", "top_k_text", 25),
    ("lead_seconds", "of silence first", number(float, 0), "stt_config", "audio_silence_prefix_seconds", 0),
    ("extra_seconds", "of silence last, to answer", number(float, 0), "stt_config", "audio_delay_seconds", 5),
)

def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as that goes before anything is loaded."""
    parser = argparse.ArgumentParser(prog="generate.py", usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", nargs="?", default=str(TINY / "question.wav"), help="WAV; '-': raw 16-bit mono 24 kHz")
    add("-o", "--output", default="answer.wav", help="WAV (default: %(default)s); '-': raw as above")
    add("--checkpoint", type=Path, default=TINY, help="a folder in the official format (default: tiny/)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=DTYPES, default="auto", help="of Moshi's weights; Mimi's are float32")
    add("--seed", type=number(int, 0), default=4242, help="the same one repeats a run (default: %(default)s)")
    add("--greedy", action="store_true", help="take the likeliest token everywhere")
    for name, what, kind, _, _, default in SETTINGS:
        add(f"--{name.replace('_', '-')}", type=kind, help=f"{what} (default: the checkpoint's or {default})")
    add("--stereo", action="store_true", help="the user left, Moshi right")
    add("--tokens", metavar="RUN.npz", help="also save the aligned tokens of all streams")
    def fail(message: str):
        raise Problem(message)
    parser.error = fail
    args = parser.parse_args(argv)
    if args.output == "-" and args.stereo or args.tokens == "-":
        fail("--stereo and --tokens need a file, not '-'; name one")
    if args.question == "-" and sys.stdin.isatty():
        fail("'-' reads raw sound from a pipe; see --help")
    taken = [os.path.realpath(args.question)] * (args.question != "-")
    for path in (Path(name) for name in (args.output, args.tokens) if name not in ("-", None)):
        if not path.parent.is_dir():
            fail(f"{path}: the folder {path.parent} does not exist; make it first")
        if not os.access(path.parent, os.W_OK) or path.exists() and not path.is_file():
            fail(f"{path} is no file that can be written; name another one")
        if os.path.realpath(path) in taken:
            fail(f"{path} is named twice; name another one")
        taken.append(os.path.realpath(path))
    there = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    args.device = next(name for name in there if there[name]) if args.device == "auto" else args.device
    if not there[args.device]:
        fail(f"--device {args.device}: there is no such device here; try --device cpu")
    return args

def run(args: argparse.Namespace) -> int:
    """Loads, talks, saves; returns the exit code."""
    torch.backends.cudnn.allow_tf32 = False  # see load_mimi
    sound = None if args.question == "-" else read_wav(Path(args.question))
    try:
        moshi, mimi, tokenizer, config = load_checkpoint(args.checkpoint, args.device, DTYPES[args.dtype])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Problem(f"{error.filename}: {error.strerror}. It takes {MOSHI_FILE}, {MIMI_FILE}, "
                      f"{TOKENIZER_FILE}; get the released ones with: hf download "
                      "kyutai/moshiko-pytorch-bf16 --local-dir moshiko, then say --checkpoint moshiko")
    except ValueError as error:
        raise Problem(f"{error}; get the checkpoint again, or name another one")
    if not sound and args.lead_seconds is None:
        args.lead_seconds = 0  # live, silence first would stay as lag
    for name, _, kind, section, key, default in SETTINGS:
        try:
            value = kind(str(config.get(section, {}).get(key, default)))
        except (AttributeError, argparse.ArgumentTypeError):
            raise Problem(f"config.json: {key} in {section} {config[section]!r} must be a number; correct it")
        if getattr(args, name) is None:
            setattr(args, name, value)
    greedy = args.greedy or not config.get("lm_gen_config", {}).get("use_sampling", True)
    size, rate = mimi.frame_size, mimi.sample_rate
    lead, extra = (math.ceil(seconds * rate / size) for seconds in (args.lead_seconds, args.extra_seconds))
    frames, total = pipe_frames(size), None
    if sound:
        sound = resample(*sound, rate)
        frames = F.pad(sound, (0, -len(sound) % size)).split(size)
        total = lead + len(frames) + extra
    silence = torch.zeros(size)
    frames = itertools.chain(itertools.repeat(silence, lead), frames, itertools.repeat(silence, extra))
    torch.manual_seed(args.seed)
    gen = MoshiGen(moshi, 1, args.temp, args.temp_text, args.top_k, args.top_k_text, greedy)
    raw = args.output == "-"
    screen = Screen(tokenizer, moshi.config, sys.stderr if raw else sys.stdout, size / rate, total)
    with contextlib.nullcontext(sys.stdout.buffer) if raw else whole_file(args.output) as file:
        writer = SoundWriter(file, args.stereo, rate, raw)
        codes, interrupted = converse(mimi, gen, frames, screen, writer)
        screen.end()
        if not screen.frames:
            raise KeyboardInterrupt if interrupted else Problem("no sound on standard input; check the pipe")
        writer.finish()
        if args.tokens:
            with whole_file(args.tokens) as table:
                np.savez(table, codes=codes.numpy(), delays=moshi.config.delays, frame_rate=mimi.frame_rate)
    show(f"{screen.frames} frames, {1000 * screen.busy / screen.frames:.1f} ms per frame, {screen}: "
         f"{'standard output' if raw else args.output}\n", sys.stderr)
    return 130 if interrupted else 0

def main(argv: list[str] | None = None) -> int:
    """Runs the program. Exit codes: 0, 2 after a problem that the user can put right, 130 after Ctrl-C."""
    try:
        return run(read_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        show("", sys.stdout)  # nobody listens any more
        return 0
    except Problem as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'input or output'}: {error.strerror or error}; put that right"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        problem = "out of memory; try --dtype bfloat16, another --device, or a smaller checkpoint"
    show(f"generate.py: error: {' '.join(problem.split())}\n", sys.stderr)
    return 2

def interrupt_once(*_) -> None:
    """The first Ctrl-C ends the conversation; a second one must not cost the file."""
    signal.signal(signal.SIGINT, lambda *_: None)
    raise KeyboardInterrupt

if __name__ == "__main__":
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))  # None: the caller has closed it
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a word's letters
    signal.signal(signal.SIGINT, interrupt_once)
    sys.exit(main())
