"""Talks with Moshi: what the user says goes in, what Moshi says comes out, 80 ms at a time.

    python generate.py question.wav -o answer.wav     # a recording in, an answer out, its words printed
    python generate.py meeting.wav --checkpoint stt-1b-en_fr -o words.srt     # a recogniser writes it down
    arecord -t raw -f S16_LE -r 24000 -c 1 | python generate.py - -o - | aplay -t raw -f S16_LE -r 24000 -c 1

Without arguments it answers the question in `tiny/` with the checkpoint there. The function to read is
`converse`, the loop. Below it stands the program around it, then what it needs of WAV files and terminals.
"""
import os
import signal

if __name__ == "__main__":  # while torch takes its second to load, a signal just ends it; see `run_program`
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        ending = getattr(signal, name, signal.SIGINT)  # Windows lacks one
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, lambda number, _: os._exit(128 + number))

import argparse
import array
import codecs
import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from files import (Problem, plain, read_tokens, read_wav, resample, run_program, show, signals, wav_header,
                   whole_file, write_tokens, write_words)
from mimi_min import Mimi, init_state
from moshi_min import MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE, MoshiGen, captured, load_checkpoint

@torch.no_grad()
def converse(mimi: Mimi, gen: MoshiGen, frames: Iterable[Tensor], change: Callable = lambda codes: codes,
             texts: Iterable[Tensor] = ()) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The duplex loop: listens and speaks, a frame at a time.
    For each of the `frames`, the user's sound [B, 1, frame_size], it yields the user's codes
    [B, n_q - dep_q, 1], Moshi's tokens [B, 1 + dep_q, 1] (text first) and Moshi's sound [B, 1, frame_size],
    the last two None while the delays fill, and always the sound of a recogniser. `change(codes)` is heard in
    place of the user's codes. `texts`: text tokens [B] that Moshi has to say, one for each frame, -2 where it
    is free. After `gen.prefill` the conversation goes on from there."""
    state, texts = init_state(mimi, len(gen.strip)), iter(texts)
    encode = captured(lambda sound: mimi.encode(sound, state), gen.device, gen.cuda_graph)
    decode = captured(lambda codes: mimi.decode(codes, state), gen.device, gen.cuda_graph)
    decode = decode if gen.config.dep_q else (lambda codes: None)
    for frame in frames:
        heard = change(encode(frame.to(gen.device))[:, : gen.config.n_q - gen.config.dep_q])
        if gen.steps == 0:
            # The first step reads the initial tokens, whatever it is given. So the first frame goes in twice,
            # as in the official run_inference, or its 80 ms would be lost. If no stream is delayed, Moshi's
            # first frame is whole by then, before it has heard anything.
            said = gen.step(heard)
            if said is not None:
                yield None, said, decode(said[:, 1:])
        said = gen.step(heard, next(texts, None))
        yield heard, said, None if said is None else decode(said[:, 1:])

# ------------------------------------------------------------------------------------------------ the program
TINY = Path(__file__).resolve().parent / "tiny"
TURN = 2  # the head of a recogniser that says that its speaker has paused for two seconds
WORDS = (".txt", ".srt", ".vtt")  # what a recogniser's words are written to

def fail(message: str) -> NoReturn:
    """Raises a Problem, also in the place of argparse's own error, which would exit."""
    raise Problem(message)

def run(args: argparse.Namespace) -> None:
    """Loads; goes on with a text, or talks or writes down what it hears; saves."""
    torch.backends.cudnn.allow_tf32 = False  # see load_mimi
    recording = None if args.question == "-" or args.text is not None else read_wav(Path(args.question))
    moshi, mimi, tokenizer, config = open_checkpoint(args)
    settle(args, moshi.config, config)
    torch.manual_seed(args.seed)
    gen = MoshiGen(moshi, 1, args.temp, args.temp_text, args.top_k, args.top_k_text, args.greedy)
    if args.text is not None:
        write_on(gen, tokenizer, args.text)
        return
    frames, total = user_frames(args, recording, mimi.frame_size, mimi.sample_rate)
    raw, voice = args.output == "-", moshi.config.dep_q > 0
    screen = Screen(tokenizer, moshi.config, sys.stderr if raw else sys.stdout, 1 / mimi.frame_rate, total)
    kept = [array.array("i") for _ in moshi.config.delays if args.tokens or not voice]
    past = go_on(gen, args.history, kept) if args.history else 0
    with whole_file(args.output) if voice and not raw else contextlib.nullcontext(sys.stdout.buffer) as file:
        writer = SoundWriter(file, args.stereo, mimi.sample_rate, raw or not voice)
        try:
            talk(mimi, gen, frames, screen, writer, kept)
        finally:
            screen.end()
        if not screen.frames:
            raise KeyboardInterrupt
        writer.finish()
    if args.output and not voice:
        write_words(args.output, map(screen.spell, kept[0][past:]), screen.frame_seconds, args.late)
    ms, place = 1000 * screen.busy / screen.frames, "standard output" if raw else args.output or "not saved"
    show(f"{screen.frames} frames, {ms:.1f} ms per frame, {screen}: {plain(place)}\n", sys.stderr)
    if args.tokens:
        write_tokens(args.tokens, kept, past + screen.frames, moshi.config.delays, mimi.frame_rate)
    if signals[0]:
        raise KeyboardInterrupt

def user_frames(args: argparse.Namespace, recording, size: int, rate: int):
    """What the user says and the silence around it, in frames [size], and how many those are. Without a
    recording it comes from the pipe, and nobody knows (None)."""
    lead, extra = (math.ceil(seconds * rate / size) for seconds in (args.lead_seconds, args.extra_seconds))
    silence = torch.zeros(size)
    if not recording:
        return itertools.chain([silence] * lead, pipe_frames(size), [silence] * extra), None
    sound = F.pad(resample(*recording, rate), (int(args.lead_seconds * rate), 0))  # as officially
    frames = [*F.pad(sound, (0, -len(sound) % size)).split(size), *[silence] * extra]
    return frames, len(frames)

def go_on(gen: MoshiGen, path: str, kept: list[array.array]) -> int:
    """Starts from the tokens of another conversation, and keeps them. Returns how many frames it had."""
    codes, own = read_tokens(path, gen.initial[:, 0].tolist(), gen.own, 1 + gen.max_delay), gen.own
    said, past = gen.prefill(codes[None].to(gen.device)), codes.shape[1]
    # A step gives the frame after the one that came from prefill, which without delays is a new one.
    whole = torch.cat([codes[:own], said[0].cpu()], dim=1)[:, : past + 1 - gen.max_delay]
    for stream, row in zip(kept, [*whole, *codes[own:]]):
        stream.extend(row.tolist())
    return past

def write_on(gen: MoshiGen, tokenizer, text: str) -> None:
    """A text model goes on with a text, until it ends it or its window is full."""
    screen = Screen(tokenizer, gen.config, sys.stdout)
    show(text, sys.stdout)
    tokens = tokenizer.encode(text) if tokenizer else []
    if not tokens:
        fail("--text says nothing, or the checkpoint has no tokenizer; give it one")
    codes = torch.tensor([[tokens]], device=gen.device)  # [1, 1, tokens]
    said, silence = gen.prefill(codes), codes[:, :0, :1]
    while gen.steps <= gen.config.context and said.item() != tokenizer.eos_id():
        screen.say(said.item())
        said = gen.step(silence)
    screen.end()

def talk(mimi: Mimi, gen: MoshiGen, frames, screen, writer, kept: list[array.array]) -> None:
    """Tells and writes what `converse` yields, while `frames` [frame_size] come or until a signal does. Then
    `signals` holds it, or 0, and no other does anything. `kept`: lists for the streams' codes."""
    try:
        for heard, said, sound in converse(mimi, gen, screen.watch(frames)):
            for streams, codes in ((kept[: gen.own], said), (kept[gen.own :], heard)):
                if streams and codes is not None:
                    for stream, code in zip(streams, codes[0, :, 0].tolist()):
                        stream.append(code)
            if said is not None:
                paused = gen.pauses.shape[1] > TURN and bool(gen.pauses[0, TURN] > 0.5)
                screen.say(int(said[0, 0]), paused)
            if sound is not None and not sound.isfinite().all():
                fail("the checkpoint's codec makes samples that are not finite; get it again")
            if heard is not None:  # else there is no frame of the user to stand beside
                writer.add(screen.frame, None if sound is None else sound[0, 0].cpu())
                screen.frame_done()
        signals.append(0)
    except KeyboardInterrupt:
        signals.append(signal.SIGINT)  # Python's own; `stop` has put the true one before it

def open_checkpoint(args: argparse.Namespace):
    """The checkpoint that was named, or a Problem that says what to do."""
    try:
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        return load_checkpoint(args.checkpoint, args.device, dtype)
    except (FileNotFoundError, NotADirectoryError) as error:
        files = ", ".join((MOSHI_FILE, MIMI_FILE, TOKENIZER_FILE))
        fail(f"{error.filename}: {error.strerror}. It takes {files}; get the released ones with: hf download "
             "kyutai/moshiko-pytorch-bf16 --local-dir moshiko, then say --checkpoint moshiko")
    except ValueError as error:
        fail(f"{error}; get it again or, if it has another format: python tools/convert.py FOLDER OUT")

# ------------------------------------------------------------------------------------------- the command line
def number(kind: type, low: int, high: float = 10**9) -> Callable[[str], float]:
    """A reader of numbers from `low` to `high`, for argparse."""
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"it must be {what} from {low} to {high:g}, not {text!r}")
    return read

seconds = number(float, 0, 3600)
SETTINGS = (  # option, what it is, its reader, its place in config.json, and its value when that says nothing
    ("temp", "temperature of the audio", number(float, 0), "lm_gen_config", "temp", 0.8),
    ("temp_text", "temperature of the text", number(float, 0), "lm_gen_config", "temp_text", 0.7),
    ("top_k", "audio tokens to choose from", number(int, 1), "lm_gen_config", "top_k", 250),
    ("top_k_text", "text tokens to choose from", number(int, 1), "lm_gen_config", "top_k_text", 25),
    ("lead_seconds", "of silence first", seconds, "stt_config", "audio_silence_prefix_seconds", 0),
    ("extra_seconds", "of silence last, to answer", seconds, "stt_config", "audio_delay_seconds", 5))

def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as that goes before anything is loaded."""
    parser = argparse.ArgumentParser(prog="generate.py", usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", nargs="?", default=str(TINY / "question.wav"), help="WAV; '-': raw 16-bit mono 24 kHz")
    add("-o", "--output", help="WAV (default: answer.wav); '-': raw as above; words: .txt, .srt, .vtt")
    add("--checkpoint", type=Path, default=TINY, help="a folder in the official format (default: tiny/)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16", "int8"), default="auto", help="Moshi's")
    add("--seed", type=number(int, 0), default=4242, help="the same one repeats a run (default: %(default)s)")
    add("--greedy", action="store_true", help="take the likeliest token everywhere")
    for name, what, reader, _, _, default in SETTINGS:
        option = f"--{name.replace('_', '-')}"
        add(option, type=reader, help=f"{what} (default: the checkpoint's or {default})")
    add("--stereo", action="store_true", help="the user left, Moshi right")
    add("--tokens", metavar="RUN.npz", help="also save the aligned tokens of all streams")
    add("--history", metavar="RUN.npz", help="go on from saved tokens")
    add("--text", help="a text model goes on with this text")
    parser.error = fail  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    check_files(args)
    devices = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    if args.device == "auto":
        args.device = "cuda" if devices["cuda"] else "cpu"
    if not devices[args.device]:
        fail(f"--device {args.device}: there is no such device here; try --device cpu")
    return args

def check_files(args: argparse.Namespace) -> None:
    """A Problem for a file that cannot be read or written as it is named."""
    if args.output == "-" and args.stereo or args.tokens == "-":
        fail("--stereo and --tokens need a file, not '-'; name one")
    if args.question == "-" and sys.stdin.isatty():
        fail("'-' reads raw sound from a pipe; see --help")
    files = (path for path in args.checkpoint.glob("*") if path.suffix not in (".wav", ".npz"))
    taken = [identity(file) for file in (args.question, 0, 1, 2, *files)]  # a stream may be a file, too
    for path in [Path(name) for name in (args.output, args.tokens) if name not in ("-", None)]:
        folder = Path(os.path.realpath(path)).parent  # a link is written through
        if not folder.is_dir():
            fail(f"{path}: the folder {folder} does not exist; make it first")
        writable = not path.exists() or path.is_file() and os.access(path, os.W_OK)
        if not writable or not os.access(folder, os.W_OK):
            fail(f"{path} is not a file that can be written; name another one")
        if path.suffix.lower() in (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".mp4", ".webm"):
            fail(f"{path}: what is written is a WAV; name it .wav, and convert it afterwards")
        if identity(path) in taken:
            fail(f"{path} is in use or named twice; name another one")
        taken.append(identity(path))

def identity(file: str | Path | int) -> object:
    """What all names of a file have in common, even the number of a stream; None if that is closed."""
    try:
        return os.stat(file)[1:3]  # its number and its device's
    except OSError:
        return None if isinstance(file, int) else os.path.realpath(file)

def settle(args: argparse.Namespace, sizes, config: dict) -> None:
    """Fills in from config.json, which is checked, what the command line leaves open; that must fit it."""
    voice, words = sizes.dep_q > 0, Path(args.output or "").suffix.lower() in WORDS
    if bool(args.text) != (sizes.n_q == 0):
        fail("a text model takes --text and a text, and no other model does; name another checkpoint")
    if args.output and words == voice or args.stereo and not voice:
        fail(f"a voice is written to a .wav, the words of a recogniser to one of {', '.join(WORDS)}")
    if args.output is None and voice:
        args.output = "answer.wav"
        check_files(args)
    if args.question == "-" and args.lead_seconds is None:
        args.lead_seconds = 0  # live, silence first would stay as lag
    for name, _, reader, section, key, default in SETTINGS:
        try:
            value = reader(str(config.get(section, {}).get(key, default)))
        except (AttributeError, argparse.ArgumentTypeError):
            fail(f"config.json: {key} in {section} {config[section]!r} must be a number; correct it")
        if getattr(args, name) is None:
            more = not voice and name == "extra_seconds"  # than the delay: a second, as officially
            setattr(args, name, value + more)
    args.greedy |= not config.get("lm_gen_config", {}).get("use_sampling", True)
    args.late = args.lead_seconds + config.get("stt_config", {}).get("audio_delay_seconds", 0)

# ------------------------------------------------------------------------------------------------------ sound
def pipe_frames(frame_size: int) -> Iterator[Tensor]:
    """Frames [frame_size] of raw 16-bit mono as they come from standard input, the last one zero-padded."""
    data = sys.stdin.buffer.read(2 * frame_size)
    if len(data) < 2:
        fail("no sound on standard input; check the pipe")
    if data[8:12] == b"WAVE":
        fail("a WAV on standard input, where raw sound is read: record with arecord -t raw, or name the file")
    while data:
        samples = torch.from_numpy(np.frombuffer(data, "<i2", len(data) // 2) / np.float32(32768))
        yield F.pad(samples, (0, frame_size - len(samples)))
        data = sys.stdin.buffer.read(2 * frame_size)

class SoundWriter:
    """Writes 16-bit sound by the frame: Moshi alone, or the user left and Moshi right; raw or as a WAV."""
    def __init__(self, file, stereo: bool, rate: int, raw: bool):
        self.file, self.channels, self.rate, self.raw, self.size = file, 2 if stereo else 1, rate, raw, 0
        self.late: Tensor | None = None  # stereo: Moshi's last frame
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
            self.file.truncate(44 + self.size)  # Ctrl-C may have come in the middle of a write
            self.file.seek(0)
            self.file.write(wav_header(self.size, self.channels, self.rate))

# -------------------------------------------------------------------------------------- terminal and signals
class Screen:
    """What one sees meanwhile: the inner monologue on `stream`, a progress line on standard error."""
    def __init__(self, tokenizer, config, stream, frame_seconds: float = 0, total: int | None = None):
        self.tokenizer, self.stream, self.frame_seconds = tokenizer, stream, frame_seconds
        self.silent = (config.existing_text_padding_id, config.existing_text_end_padding_id)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come byte by byte
        self.of = f" of {total * frame_seconds:.1f}" if total else ""
        self.frames, self.busy, self.shown, self.paused = 0, 0.0, time.monotonic(), False
        # Where words and progress go to one place, a progress line would break into the words.
        self.apart = stream is not sys.stderr and identity(1) != identity(2)
        self.in_line = False  # words were said since the line began

    def watch(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """The user's frames [T] -> [1, 1, T]. Waiting for one is no work: it counts from when it came."""
        for frame in frames:
            if signals:  # its KeyboardInterrupt was raised where Python swallows it
                raise KeyboardInterrupt
            self.frame, self.came = frame, time.monotonic()
            yield frame[None, None]

    def spell(self, token: int) -> bytes | None:
        """A token in UTF-8: a piece of a word, a single byte (<0xE2>), or without a tokenizer its number.
        PAD is no byte at all, and EPAD, which stands between words, None."""
        if token in self.silent:
            return b"" if token == self.silent[0] else None
        known = self.tokenizer is not None and token < self.tokenizer.vocab_size()
        piece = self.tokenizer.id_to_piece(token) if known else f"▁{token}"
        is_byte = known and self.tokenizer.is_byte(token)
        return bytes.fromhex(piece[3:5]) if is_byte else piece.replace("▁", " ").encode()

    def say(self, token: int, paused: bool = False) -> None:
        """Prints a token. Once the speaker has paused, the turn is over, and its line."""
        if token < 0:
            fail("the model makes numbers that are not finite; try --dtype bfloat16 or float32")
        if paused and not self.paused:
            self.end()
        if text := self.spell(token):
            show(self.utf8.decode(text), self.stream)
            self.in_line = True
        self.paused = paused

    def end(self) -> None:
        """Wipes the progress, and ends the line of words, after a last character that is not whole."""
        if sys.stderr.isatty():
            show("\x1b[K", sys.stderr)
        if self.in_line:
            show(self.utf8.decode(b"", True) + "\n", self.stream)
        self.in_line = False

    def frame_done(self) -> None:
        """Counts a frame and its time. A terminal shows each, a file one every five seconds."""
        now = time.monotonic()
        self.frames, self.busy = self.frames + 1, self.busy + now - self.came
        if sys.stderr.isatty():  # right of the words; the cursor goes back to where it was, and nothing wraps
            show(f"\x1b7\x1b[K\x1b[?7l  [{self}]\x1b[?7h\x1b8", sys.stderr)
        elif now - self.shown > 5 and self.apart:
            show(f"{self}\n", sys.stderr)
            self.shown = now

    def __str__(self) -> str:
        done = self.frames * self.frame_seconds
        return f"{done:.1f}{self.of} s, {done / max(self.busy, 1e-9):.2f} times real time"

def main(argv: list[str] | None = None) -> int:
    """Runs the program. Exit codes: 0, 2 after a problem that the user can put right, 128 + a signal."""
    signals.clear()
    try:
        run(read_arguments(argv))
        return 0
    except KeyboardInterrupt:
        return 128 + [*signals, signal.SIGINT][0]
    except BrokenPipeError:
        return 0  # nobody listens any more
    except (Problem, OSError) as error:
        problem = plain(error) + ("; put that right" if isinstance(error, OSError) else "")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        problem = "out of memory; try a shorter recording, --dtype bfloat16, or another --device"
    show(f"generate.py: error: {problem}\n", sys.stderr)
    return 2

if __name__ == "__main__":
    run_program(main)
