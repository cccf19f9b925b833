"""What comes in and goes out, with suspicion: lines for a terminal, JSON, weight files, WAV files, signals.

Files come from anybody: a download that broke off, a recorder with a header of its own, a checkpoint that
someone has tampered with. Whatever is wrong with one is a single line that names it: a `Problem`, another
ValueError, or the system's own OSError. Nothing of the model is here; nobody who reads the model needs it.
"""

import contextlib
import html
import json
import math
import os
import secrets
import shlex
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor


class Problem(ValueError):
    """Something that the user can put right: one line that says what and how."""


# ---------------------------------------------------------------------------------------------- lines of text


def plain(problem: object) -> str:
    """A text, or an error, as one line for a terminal.

    It has no control characters, which files may hold, and at most 500 characters: the middle is left out.
    An OSError is its file and what the system says, without a number.
    """
    if isinstance(problem, OSError) and problem.strerror:
        problem = f"{problem.filename or 'input or output'}: {problem.strerror}"
    text = "".join(character if character.isprintable() else " " for character in str(problem))
    return text if len(text) <= 500 else f"{text[:250]} ... {text[-245:]}"


def show(text: str, stream) -> None:
    """Prints at once. Once `stream` takes no more, its reader gone or its disk full, text goes nowhere."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text: str) -> None:
    """Tells what the user should know, though it goes on."""
    show(f"warning: {plain(text)}\n", sys.stderr)


# ------------------------------------------------------------------------------------------- files in general


def open_regular(path: str | Path, largest: float = math.inf) -> BinaryIO:
    """Opens a file of at most `largest` bytes to read.

    OSError if it can't be, and also for a pipe or a device, which may never end.
    """
    if os.path.exists(path) and not os.path.isdir(path):  # what is wrong with those two, `open` says
        if not os.path.isfile(path) or os.path.getsize(path) > largest:
            raise OSError(0, "a pipe, a device or far too large, not the file that it should be", str(path))
    return open(path, "rb")


def read_json(path: str | Path, make: Callable = dict):
    """What `make` makes of the JSON object in a file. It is UTF-8, with or without a byte order mark.

    The ValueErrors, those of `make` too, name the file.
    """
    with open_regular(path, 2**25) as file:
        text = file.read()
    try:
        content = json.loads(text.decode("utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        json.dumps(content, allow_nan=False)  # ValueError for NaN, Infinity and 1e999
        return make(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that gets the name `path` once the block has ended well, and is gone otherwise.

    A link is written through, permissions stay. If the name can't be given anew (a file that is mounted by
    itself), what has it is written over; if that can't be either, an OSError says where the new file is.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{secrets.token_hex(8)}.part")  # nobody can plant a link of that name
    try:
        with open(temporary, "x+b") as file:
            if path.exists():
                os.chmod(temporary, path.stat().st_mode & 0o777)
            yield file
            file.flush()
            try:
                os.replace(temporary, path)
            except OSError as error:
                kept = copy_instead(file, temporary, path)
                if kept != path:
                    raise OSError(0, f"{error.strerror}; what was made is {kept}", str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def copy_instead(file: BinaryIO, temporary: Path, path: Path) -> Path:
    """Copies what was written over what `path` is, or else into the system's folder for temporary files."""

    def copy_to(target) -> None:
        # Weights are written by name, past `file`. If the folder is gone, only `file` is left.
        with open(temporary, "rb") if temporary.exists() else contextlib.nullcontext(file) as source:
            source.seek(0)
            shutil.copyfileobj(source, target)
        target.truncate()

    with contextlib.suppress(OSError), open(path, "r+b") as there:
        copy_to(there)
        return path
    with tempfile.NamedTemporaryFile(suffix=path.suffix, delete=False) as elsewhere:
        copy_to(elsewhere)
    return Path(elsewhere.name)


# ---------------------------------------------------------------------------------------------------- weights

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # what weights may be, and the bytes of a number


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floats [..., D_out, D_in] as the released int8 files hold them: (int8, float32 [..., D_out]).

    A row holds whole numbers from -127 to 127. The second tensor, named `_scb`, says what 127 stands for.
    """
    half = weight.half()  # as those files were made
    largest = half.abs().amax(dim=-1).float()
    factor = 127 / largest.clamp(min=1e-9)  # of a row of zeros, any
    return (half * factor[..., None]).round_().to(torch.int8), largest


class WeightFile:
    """A SafeTensors file whose tensors are taken out one by one. On the CPU they are mapped, not read.

    `dtype` torch.int8 means bfloat16 that its reader will turn `to_int8`. Then, and where the file has int8
    already (`int8` is True in both cases), each tensor is mapped by itself and copied: of the file no more
    than one is in memory, and the copies lie as torch's int8 kernel wants them.
    """

    def __init__(self, path: str | Path, device, dtype: torch.dtype | None):
        open_regular(path).close()  # safe_open calls all that it can't open missing
        self.path, self.device = path, str(device)
        try:
            self.file = self.map()
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a whole SafeTensors file ({error}); no other is read") from None
        self.unused = set(self.file.keys())
        self.scaled = {name.removesuffix("_scb") for name in self.unused if name.endswith("_scb")}
        self.int8 = dtype == torch.int8 or bool(self.scaled)
        self.dtype = torch.bfloat16 if dtype == torch.int8 else dtype

    def map(self):
        """The file, whose pages come into memory as they are read."""
        return safetensors.safe_open(self.path, framework="pt", device=self.device)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name, in the dtype asked for (None: its own); int8 and its scales as they are.

        ValueError unless it is there, has this shape, and holds finite floats, in that dtype too.
        """
        if name not in self.unused:
            raise ValueError(f"{self.path}: the tensor {name} is missing")
        stored = self.file.get_slice(name)
        found, kind = stored.get_shape(), stored.get_dtype()
        kinds = [*FLOATS]
        if name in self.scaled or name.endswith("_scb"):
            kinds = ["I8" if name in self.scaled else "F32"]
        if found != list(shape) or kind not in kinds:
            raise ValueError(
                f"{self.path}: {name} has the shape {found} and the dtype {kind}, "
                f"expected {list(shape)} and {' or '.join(kinds)}"
            )
        self.unused.remove(name)
        tensor = (self.map() if self.int8 else self.file).get_tensor(name)
        tensor = tensor.to(dtype=self.dtype if len(kinds) > 1 else None)
        if not torch.stack(tensor.aminmax()).isfinite().all():  # of all numbers it would be a copy
            raise ValueError(f"{self.path}: {name} holds numbers that are not finite in {tensor.dtype}")
        return tensor.clone() if self.int8 else tensor


# ------------------------------------------------------------------------------------------- tokens and words


def read_tokens(path: str | Path, cards: list[int], own: int, least: int) -> Tensor:
    """The aligned tokens [streams, frames] that `--tokens` has saved, as far as the first `own` streams go.

    Problem unless they are whole numbers from -1 (unknown) to below the `cards` of the streams, and so many.
    """
    with open_regular(path, 2**30) as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                codes = arrays["codes"]
        except Exception as error:  # numpy, zipfile and zlib each have their own, and there are OSErrors, too
            raise Problem(f"{path}: not a file that --tokens has saved ({error})") from None
    if codes.dtype.kind != "i" or codes.ndim != 2 or len(codes) != len(cards):
        raise Problem(
            f"{path}: tokens of the shape {list(codes.shape)} and the dtype {codes.dtype}, "
            f"but this checkpoint has {len(cards)} streams"
        )
    for stream, (row, card) in enumerate(zip(codes, cards)):
        if not ((row >= -1) & (row < card)).all():
            raise Problem(f"{path}: stream {stream} has tokens that are not from -1 to {card - 1}")
    whole = np.flatnonzero((codes[:own] >= 0).all(axis=0))  # the last frames may be incomplete
    codes = codes[:, : whole[-1] + 1 if len(whole) else 0]
    if codes.shape[1] < least:
        raise Problem(f"{path}: {codes.shape[1]} frames are too few, at least {least} are needed")
    return torch.from_numpy(codes.astype(np.int64))


def write_tokens(path: str | Path, kept: list, frames: int, delays, frame_rate: float) -> None:
    """Saves the tokens of all streams for so many frames, -1 where there are none, as `read_tokens` wants."""
    codes = np.full((len(kept), frames), -1)
    for row, stream in zip(codes, kept):
        row[: len(stream)] = stream[:frames]
    with whole_file(path) as file:
        np.savez(file, codes=codes, delays=delays, frame_rate=frame_rate)


def write_words(path: str | Path, pieces: Iterable[bytes | None], seconds: float, late: float) -> None:
    """Writes the words of a text stream with their times, as the end of the name says.

    `pieces`: of each frame, which lasts `seconds`, a piece of a word in UTF-8, none (b""), or None between
    words, which come `late`. .srt and .vtt are subtitles, a word each; .txt has lines of begin, end, word.
    """
    kind = Path(path).suffix.lower()
    text = "WEBVTT\n\n" if kind == ".vtt" else ""
    for number, (start, end, word) in enumerate(find_words(pieces), 1):
        start, end = (max(0.0, frame * seconds - late) for frame in (start, end))
        times = f"{clock(start)} --> {clock(end)}"
        if kind == ".srt":
            text += f"{number}\n{times.replace('.', ',')}\n{word}\n\n"
        elif kind == ".vtt":
            text += f"{times}\n{html.escape(word, quote=False)}\n\n"
        else:
            text += f"{start:.2f}\t{end:.2f}\t{word}\n"
    with whole_file(path) as file:
        file.write(text.encode())


def find_words(pieces: Iterable[bytes | None]) -> Iterator[tuple[int, int, str]]:
    """The words that the pieces of `write_words` spell, with the frames where each begins and ends.

    It ends at the next None, or where that was left out, at a piece that begins with a space.
    """
    word, start = b"", 0
    for frame, piece in enumerate([*pieces, None]):
        if word and (piece is None or piece.startswith(b" ")):
            yield start, frame, plain(word.decode(errors="replace").strip())
            word = b""
        start = start if word else frame
        word += piece or b""


def clock(seconds: float) -> str:
    """Seconds as 00:00:00.000."""
    minutes, rest = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


# ------------------------------------------------------------------------------------------------------ sound

INTEGERS, FLOATING, EXTENSIBLE = 1, 3, 0xFFFE  # formats of WAV files
WIDTHS = {INTEGERS: (1, 2, 3, 4), FLOATING: (4, 8)}  # bytes of a sample, of those that are read
UNKNOWN = 0xFFFFFFFF  # the size of what is longer than 4 GiB
PART = 2**18  # samples that are worked on at a time
AGAIN = "; record or copy it again"


class Format(NamedTuple):
    """What the `fmt ` chunk of a WAV file says."""

    kind: int
    channels: int
    rate: int  # Hz
    block: int  # bytes of a sample of all channels
    bits: int  # of a sample, in as many bytes as it takes or more


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """The mean of all channels [T] in -1..1, and the sample rate. PCM of 8 to 32 bits, or float.

    It is read in parts, so that an hour takes little more memory than itself. Problem if it can't be read;
    what is wrong with it and can be lived with is a warning.
    """
    with open_regular(path) as file:
        form, size = find_sound(file, path)
        place = file.tell()
        rest = file.seek(0, os.SEEK_END) - place
        whole = min(size, rest) // form.block * form.block
        if not whole:
            raise Problem(f"{path} holds no sound{AGAIN}")
        file.seek(place)
        sound, peak = np.empty(whole // form.block, np.float32), np.float64(0)
        with np.errstate(all="ignore"):  # numpy would warn of what is checked below
            for start in range(0, len(sound), PART):
                part = sound[start : start + PART]
                samples = decode_pcm(file.read(len(part) * form.block), form)
                part[:] = samples.clip(-1, 1).mean(axis=1, dtype=np.float32)
                peak = np.maximum(peak, np.abs(samples).max())  # not a number, if one of them is none
    if not np.isfinite(peak):
        raise Problem(f"{path} holds samples that are not finite{AGAIN}")
    if peak > (10 if form.kind == FLOATING else 1):
        cure = converting(path, f"-af volume={0.9 / peak:.1g} ")
        raise Problem(f"{path} holds samples far beyond -1..1, up to {peak:.6g}{cure}")
    if size > rest:
        warn(f"{path} is cut off: {rest} of {size} bytes of sound are there, and read")
    if peak > 1.01:
        warn(f"{path} is louder than full scale, up to {peak:.3g}, and is cut to -1..1")
    if max(sound.max(), -sound.min()) < 1e-3:
        warn(f"{path} is as good as silent{' once its channels are mixed' if peak > 0.01 else ''}")
    return torch.from_numpy(sound), form.rate


def converting(path: str | Path, volume: str = "") -> str:
    """Advice that can be pasted into a shell."""
    return f"; convert it: ffmpeg -i {shlex.quote(str(path))} {volume}-ar 24000 -c:a pcm_s16le new.wav"


def find_sound(file: BinaryIO, path: str | Path) -> tuple[Format, int]:
    """Reads a WAV up to the first byte of its sound: its format, and how many bytes its header promises."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    riff = file.read(12)
    if not riff:
        raise Problem(f"{path} is an empty file{AGAIN}")
    if riff[:4] not in (b"RIFF", b"RF64", b"BW64") or riff[8:] != b"WAVE":  # the last two: beyond 4 GiB
        raise Problem(f"{path} is not a WAV file{converting(path)}")
    chunks: dict[bytes, bytes] = {}  # each has a name, a size, and contents padded to an even length
    name = b""
    for _ in range(10_000):  # zeros, too, would be chunks, and there can be gigabytes of them
        head = file.read(8)
        if len(head) < 8:
            break
        name, size = struct.unpack("<4sI", head)
        if name == b"data":
            break
        place = file.tell()
        chunks[name] = file.read(min(size, 40))
        file.seek(place + size + size % 2)
    if name != b"data":
        raise Problem(f"{path} ends before its sound begins{AGAIN}")
    form = read_format(chunks.get(b"fmt ", b""), path)
    whole = struct.unpack_from("<I", riff, 4)[0] == end - 8
    long = chunks.get(b"ds64", b"")  # sizes in 64 bits
    if size == UNKNOWN and len(long) >= 16:
        size = struct.unpack_from("<Q", long, 8)[0]
    elif size == 0 and not whole or size >= 0x7FFF0000:  # its writer wrote into a pipe and could not know
        size = end - file.tell()
    return form, size


def read_format(fmt: bytes, path: str | Path) -> Format:
    """The contents of a `fmt ` chunk; a Problem if such samples aren't read here."""
    kind, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", fmt.ljust(16, b"\0"))
    if kind == EXTENSIBLE and len(fmt) >= 26:
        kind = struct.unpack_from("<H", fmt, 24)[0]  # the true format opens a longer name
    width = block // max(channels, 1)  # bytes of a sample
    known = width in WIDTHS.get(kind, ())
    fits = width * channels == block and (width == math.ceil(bits / 8) or (width, bits) == (4, 24))
    if not known or not fits or len(fmt) < 16 or not 1000 <= rate <= 1_000_000:
        raise Problem(
            f"{path}: a fmt of {len(fmt)} bytes, format {kind}, {bits} bits, a block size of {block}, "
            f"{channels} channels at {rate} Hz is not read here{converting(path)}"
        )
    return Format(kind, channels, rate, block, bits)


def decode_pcm(data: bytes, form: Format) -> np.ndarray:
    """Whole blocks of bytes -> samples [T, channels], full scale at 1."""
    width = form.block // form.channels
    raw = np.frombuffer(data, np.uint8, len(data) // form.block * form.block).reshape(-1, width)
    if form.kind == FLOATING:
        return raw.view(f"<f{width}").reshape(-1, form.channels)
    wide = np.zeros((len(raw), 4), np.uint8)  # a sample goes into the upper bytes of 32 bits
    wide[:, 4 - width :] = raw ^ 128 if width == 1 else raw  # 8 bits have their zero at 128
    low = width == 4 and form.bits == 24  # arecord's S24_LE has it in the lower three of four
    samples = wide.view("<i4").reshape(-1, form.channels)
    return samples / np.float32(2**23 if low else 2**31)


def wav_header(size: int, channels: int, rate: int) -> bytes:
    """The 44 bytes before `size` bytes of 16-bit sound. 4 GiB and more are written as 4 GiB: "to the end"."""
    riff, data = min(36 + size, UNKNOWN), min(size, UNKNOWN)
    form = struct.pack("<HHIIHH", INTEGERS, channels, rate, 2 * channels * rate, 2 * channels, 16)
    return struct.pack("<4sI8sI16s4sI", b"RIFF", riff, b"WAVEfmt ", len(form), form, b"data", data)


def resample(x: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """x [T] at `rate_in` Hz -> [ceil(T * rate_out / rate_in)] at `rate_out` Hz, by its spectrum.

    It passes up to 0.8 of the lower Nyquist frequency and stops at that; the slope between keeps clicks from
    ringing. What is long goes through in parts, with margins for the ringing of their ends.
    """
    if rate_in == rate_out:
        return x
    up, down = (rate // math.gcd(rate_in, rate_out) for rate in (rate_out, rate_in))
    step = math.ceil(PART / down) * down  # whole periods, of `down` samples here and `up` samples there
    margin = math.ceil(4000 / min(up, down)) * down
    if len(x) <= step + 2 * margin:
        return resample_whole(x, up, down)
    y = x.new_empty(math.ceil(len(x) * up / down))
    for start in range(0, len(x), step):
        before = min(start, margin)
        around = resample_whole(x[start - before : start + step + margin], up, down)
        part = y[start // down * up :][: step // down * up]
        part.copy_(around[before // down * up :][: len(part)])
    return y


def resample_whole(x: Tensor, up: int, down: int) -> Tensor:
    """x [T] -> [ceil(T * up / down)], all at once."""
    blocks = math.ceil(len(x) / down) + math.ceil(100 / up)  # silence at the end: a spectrum goes round
    spectrum = torch.fft.rfft(F.pad(x, (0, blocks * down - len(x))))
    limit = blocks * min(up, down) / 2  # the lower Nyquist frequency, as an index into the spectrum
    share = (torch.arange(len(spectrum)) / limit - 0.8) / 0.2
    gain = (1 + torch.cos(math.pi * share.clamp(0, 1))) / 2
    y = torch.fft.irfft(spectrum * gain, n=blocks * up) * (up / down)
    return y[: math.ceil(len(x) * up / down)]


# ----------------------------------------------------------------------------------------- how a program ends

ENDINGS = [getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
signals: list[int] = []  # that have come; 0 if the work was over before any


def stop(number: int, _) -> None:
    """The first signal ends the work. Those after it, or after the end, must not cost the file."""
    signals.append(number)
    if len(signals) == 1:
        raise KeyboardInterrupt


def run_program(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process with its exit code, or with 128 + the signal that ended it.

    Streams may be closed, full or non-blocking. Python itself has nothing to say at the end.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "r+"))
        with contextlib.suppress(OSError, AttributeError):
            os.set_blocking(getattr(sys, name).fileno(), True)  # nothing to read yet is not the end
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a word's letters
    endings = [ending for ending in ENDINGS if signal.getsignal(ending) != signal.SIG_IGN]  # as under nohup
    for ending in endings:
        signal.signal(ending, stop)
    try:
        code = main()
        signals.append(0)  # it is over
        sys.exit(code)
    except KeyboardInterrupt:  # while `main` told of something else
        sys.exit(128 + signals[0])
    finally:
        for ending in endings:
            signal.signal(ending, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):  # Python would end in an error if it can't write the rest
            show("", stream)
