"""Spoils what the program and the converter read, at random, and looks how they end: `python tests/fuzz.py`.

    python tests/fuzz.py --n 2000 --seed 1         # so many cases, each from a seed of its own
    python tests/fuzz.py --only 1234567            # one of them again, its line in full

Each case takes the tiny checkpoint, a question of two frames and a good command line, and spoils some of it:
arguments, the recording, JSON, weights, the tokenizer, file names, kinds of files, a converter's folder. Then
it runs in this process. What must hold: exit code 0 or 2; on 2 a single short line of printable characters
that names the program; no traceback and no warning of a library; what was there before is there still and
nothing new but a whole answer; within seconds. The last line counts; exit code 1 if something did not hold.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / part) for part in ("", "tests", "tools")]

import convert  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from random_checkpoint import make_random_checkpoint  # noqa: E402

import generate  # noqa: E402
from moshi_min import MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE  # noqa: E402

SECONDS = 20  # of the processor, which a case may take; so no odd number is a silence of up to an hour
WAIT = 600  # seconds of the clock, after which a case waits for something that never comes
ODD_NUMBERS = [0, -1, 1, 2, 3, 7, 0.5, -0.0, 4000, 2**20, 2**31, 2**63, 10**30, 10**400, 1e300, 1e-300]
ODD_VALUES = [
    *ODD_NUMBERS,
    math.nan,
    math.inf,
    True,
    None,
    "",
    "x",
    "12",
    "\x1b[31mred\n",
    "é" * 300,
    "x" * 10_000,
    [],
    [1],
    {},
    {"a": 1},
    [[[]]] * 3,
]
ODD_NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/b", "C:\\x", "\0", "x" * 300, "\x1b[2J", "config.json"]
ODD_WORDS = [
    "--temp",
    "--top-k",
    "--seed",
    "--lead-seconds",
    "--extra-seconds",
    "--dtype",
    "--device",
    "-o",
    "--tokens",
    "--stereo",
    "--greedy",
    "--checkpoint",
    "--frob",
    "-",
]
# What a way to spoil may meet where another was before.
UNREADABLE = OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error


class Case:
    """One case: a folder with all that is read, a command line, and a random number generator for both."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.seed = folder, random.Random(seed), seed
        self.checkpoint, self.question = folder / "ck", folder / "q.wav"
        self.argv = [str(self.question), "-o", str(folder / "answer.wav"), "--extra-seconds", "0"]
        self.argv += ["--checkpoint", str(self.checkpoint), "--device", "cpu"]
        self.told: list[str] = []  # what was spoilt

    def pick(self, *those):
        return self.rng.choice(those)

    def odd(self, *more):
        """An odd value, or one of `more`; a copy, since it may be spoilt in turn."""
        return copy.deepcopy(self.pick(*ODD_VALUES, *more))

    # ---- what can be spoilt ------------------------------------------------------------------------------

    def bytes_of(self, path: Path) -> None:
        """Cuts, repeats, changes or adds bytes."""
        data = bytearray(contents(path))
        for _ in range(self.rng.randint(1, 4)):
            place = self.rng.randrange(min(len(data), self.pick(60, 4000, 10**9)) + 1)
            how = self.rng.randrange(5)
            if how == 0:
                del data[place:]
            elif how == 1:
                data[place : place + 4] = struct.pack(
                    "<I", self.pick(0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
                )
            elif how == 2:
                data[place : place + 1] = self.rng.randbytes(1)
            elif how == 3:
                data[place:place] = self.rng.randbytes(self.rng.randrange(50))
            else:
                data += data[place : place + 500]
        path.write_bytes(data)
        self.told.append(f"bytes of {path.name}")

    def wav(self) -> None:
        """A header of odd numbers around some sound, in chunks of odd order."""
        contents(self.question)
        rng, pick = self.rng, self.pick
        bits, channels = pick(8, 16, 24, 32, 64, 0, 12, 20, 65535), pick(1, 1, 2, 6, 0, 65535)
        form, rate = pick(1, 1, 3, 0xFFFE, 2, 6), pick(24000, 44100, 8000, 500, 0, 2**32 - 1, 1_000_000)
        block = pick(channels * bits // 8 % 65536, 1, 4, 0, 65535)
        fmt = struct.pack("<HHIIHH", form, channels, rate, pick(rate, rate * block % 2**32), block, bits)
        fmt += pick(b"", b"\0\0", struct.pack("<HHIH", 22, bits, 3, pick(1, 3, 6)) + bytes(14))
        sound = np.array([rng.gauss(0, pick(0.1, 1e-5, 1e30)) for _ in range(rng.randrange(4000))])
        kind = pick("<f4", "<f8", "<i2", "u1")
        with np.errstate(all="ignore"):
            data = (sound * pick(1, 32767)).astype(kind).tobytes()
        size = pick(len(data), len(data), len(data) + 44, 2 * len(data), 0, 2**31, 2**32 - 1)
        chunks = [b"fmt " + struct.pack("<I", pick(len(fmt), len(fmt), 14, 2**31)) + fmt]
        name = pick(b"RIFF", b"RIFF", b"RF64", b"BW64", b"RIFX")
        if name != b"RIFF":
            chunks.insert(0, b"ds64" + struct.pack("<IQQQI", 28, 0, pick(len(data), 0, 2**63), 0, 0))
        if rng.random() < 0.3:
            chunks.insert(rng.randrange(len(chunks) + 1), b"LIST" + struct.pack("<I", 6) + b"abcdef")
        chunks.append(b"data" + struct.pack("<I", size) + data)
        if rng.random() < 0.1:
            rng.shuffle(chunks)
        body = b"".join(chunks)
        self.question.write_bytes(
            name + struct.pack("<I", pick(len(body) + 4, 0, 2**32 - 1)) + b"WAVE" + body
        )
        self.told.append(f"wav {name} {fmt.hex()} {kind} size {size} of {len(data)}")

    def json_of(self, path: Path) -> None:
        """Odd values for keys, odd keys, or a text that is none."""
        content = json.loads(contents(path))
        for _ in range(self.rng.choice([1, 1, 1, 2, 5])):
            inside = [content, *(value for value in content.values() if isinstance(value, dict))]
            part = self.rng.choice(inside)
            names = (
                "lm_gen_config",
                "stt_config",
                "moshi_name",
                "mimi_name",
                "tokenizer_name",
                "mimi_config_name",
            )
            key = self.rng.choice([*part, *names, "odd", "\x1b[31m", "k" * 9999])
            if self.rng.random() < 0.15:
                part.pop(key, None)
            elif key.endswith("_name"):
                part[key] = self.odd(*ODD_NAMES)
            elif self.rng.random() < 0.2 and isinstance(part.get(key), list):
                more = self.pick([], [self.odd()])
                part[key] = part[key] * self.pick(0, 2, 40) + more
            else:
                part[key] = self.odd()
            self.told.append(f"{path.name}: {key[:30]!r} = {str(part.get(key))[:40]!r}")
        text = json.dumps(content)
        how = self.rng.randrange(20)
        if how == 0:
            text = self.pick(
                "", "[]", "3", "nul", '{"a":' * 10**5, "[" * 990 + "]" * 990, "9" * 5000, text[:-9]
            )
        if how == 1:
            text = '{"odd": ' + self.pick("NaN", "1e999", "[" * 900 + "]" * 900) + ", " + text[1:]
        mark = self.pick(b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe")
        path.write_bytes(
            mark + text.encode(self.pick("utf-8", "utf-8", "utf-8", "utf-16") if how == 2 else "utf-8")
        )

    def weights_of(self, path: Path) -> None:
        """Another dtype, shape or name in the header, odd numbers in the data."""
        data = contents(path)
        length = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
        name = self.rng.choice([name for name in header if name != "__metadata__"])
        entry, how = header[name], self.rng.randrange(6)
        if how == 0:
            kinds = "C64 F4 F6_E2M3 F8_E4M3 F8_E8M0 I8 U16 I64 BOOL F16 BF16 F64 XYZ".split()
            entry["dtype"] = self.rng.choice(kinds)
        elif how == 1:
            entry["shape"] = self.pick(
                [], [0], [1, *entry["shape"]], entry["shape"][::-1], [2**40], ODD_VALUES[:3]
            )
        elif how == 2:
            del header[name]
        elif how == 3:
            header[self.pick("odd", "\x1b[31m" * 9, "x" * 9999)] = header.pop(name)
        elif how == 4:
            entry["data_offsets"] = self.pick([0, 0], [0, 2**60], entry["data_offsets"][::-1], [-1, 5])
        else:
            start, end = entry["data_offsets"]
            size = {"F32": 4, "F64": 8}.get(entry["dtype"], 2)
            place = start + size * self.rng.randrange(max((end - start) // size, 1))
            value = self.pick(math.nan, math.inf, -math.inf, 1e30, 0.0)
            kinds = {"F32": torch.float32, "F16": torch.float16}
            odd = torch.tensor([value]).to(kinds.get(entry["dtype"], torch.bfloat16))
            body[place : place + size] = odd.view(torch.uint8).numpy().tobytes()
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        self.told.append(f"weights {path.name}: {name}, way {how}")

    def kind_of(self, path: Path) -> None:
        """Something else in the place of a file."""
        contents(path)
        path.unlink()
        how = self.rng.randrange(7)
        if how == 0:
            os.mkfifo(path)
        elif how == 1:
            path.mkdir()
        elif how == 2:
            path.symlink_to(self.pick("/dev/zero", "/dev/full", "/dev/null", path.name, "absent"))
        elif how == 3:
            path.write_bytes(b"")
        elif how == 4:
            with open(path, "wb") as file:
                file.truncate(self.pick(1, 8, 2**16, 2**33))
        elif how == 5:
            path.write_bytes(self.rng.randbytes(self.rng.randrange(3000)))
        self.told.append(f"{path.name} is something else, way {how}")

    def arguments(self) -> None:
        """Odd words on the command line."""
        for _ in range(self.rng.randint(1, 3)):
            value = str(self.odd(*ODD_NAMES, "float16", "bfloat16", "cuda")).replace("\0", "")
            word = self.rng.choice(ODD_WORDS)
            self.argv += [word] if word in ("--stereo", "--greedy", "--frob") else [word, value]
            self.told.append(f"{word} {value[:40]!r}")

    def outputs(self) -> None:
        """Odd names for what is written."""
        option = self.pick("-o", "--tokens")
        name = self.pick(
            self.folder,
            self.question,
            self.checkpoint / MOSHI_FILE,
            self.checkpoint / "config.json",
            self.folder / "link.wav",
            self.folder / "private.wav",
            self.folder / ("n" * self.pick(255, 256)),
            self.folder / "absent" / "a.wav",
            self.folder / "a\x1b[31m\n.wav",
            self.folder / "a.mp3",
            "/dev/full",
            "/dev/stdout",
            "/proc/self/mem",
        )
        (self.folder / "private.wav").write_bytes(b"old")
        (self.folder / "private.wav").chmod(0o600)
        (self.folder / "link.wav").symlink_to(self.pick("private.wav", "q.wav", "absent.wav", "link.wav"))
        self.argv += [option, str(name)]
        self.told.append(f"{option} {name}")

    def spoil(self) -> None:
        """One to three of all these."""
        ck = self.checkpoint
        ways = [
            (3, lambda: self.wav()),
            (2, lambda: self.bytes_of(self.question)),
            (4, lambda: self.json_of(ck / self.pick("config.json", "config.json", "mimi_config.json"))),
            (2, lambda: self.weights_of(ck / self.pick(MOSHI_FILE, MIMI_FILE))),
            (
                1,
                lambda: self.bytes_of(
                    ck / self.pick(MOSHI_FILE, MIMI_FILE, "config.json", "mimi_config.json")
                ),
            ),
            (1, lambda: self.bytes_of(ck / TOKENIZER_FILE)),
            (1, lambda: self.kind_of(ck / self.rng.choice(sorted(os.listdir(ck))))),
            (1, lambda: self.kind_of(self.question)),
            (2, lambda: self.arguments()),
            (1, lambda: self.outputs()),
        ]
        chosen = self.rng.choices(
            [way for _, way in ways], [often for often, _ in ways], k=self.pick(1, 1, 1, 2, 3)
        )
        for way in chosen:
            # What is spoilt already may be no JSON or no weights any more.
            with contextlib.suppress(*UNREADABLE):
                way()

    # ---- running and judging -------------------------------------------------------------------------------

    def run(self, main, argv) -> list[str]:
        """Runs a program in this process; returns what did not hold."""
        before, found, out, err = state(self.folder), [], io.StringIO(), io.StringIO()
        began = time.process_time()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with native() as printed, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    signal.alarm(WAIT)
                    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
                    code = main(argv)
                except SystemExit as stop:
                    code = stop.code
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    return ["traceback: " + "".join(traceback.format_exception(error)[-3:])]
                finally:
                    signal.alarm(0)
                    signal.setitimer(signal.ITIMER_PROF, 0)
        lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]
        if printed:
            found.append(f"a library prints: {printed[0][:200]}")
        if warned:
            found.append(f"a library warns: {warned[0].message}")
        if code not in (0, 2):
            found.append(f"exit code {code}")
        if code == 2 and (
            len(lines) != 1 or not lines[0].startswith(("generate.py: error: ", "convert.py: "))
        ):
            found.append("not one line")
        long = [line for line in err.getvalue().split("\n") if len(line) > 600 or not (line.isprintable())]
        if long or "[Errno" in err.getvalue():
            found.append("a line that is long, raw or not printable")
        if time.process_time() - began > SECONDS:
            found.append(f"{time.process_time() - began:.0f} s")
        found += self.compare(before, state(self.folder), code)
        return [f"{what}: {err.getvalue()[:700]!r}" for what in found]

    def compare(self, before: dict, after: dict, code: int) -> list[str]:
        """What was there is still there; a failure adds nothing, a success whole files."""
        given = {
            Path(word).name for option, word in zip(self.argv, self.argv[1:]) if option in ("-o", "--tokens")
        }
        given |= {"out", "a\nb", "private.wav", "absent.wav", "answer.wav"}
        found = []
        for path in before.keys() | after.keys():
            if before.get(path) != after.get(path):
                name = Path(path).name
                if code != 0 or not ({name, *Path(path).parts} & given or "--output" in str(self.argv)):
                    found.append(f"{path} has changed")
                elif name.endswith(".part"):
                    found.append(f"{path} stayed behind")
        private = self.folder / "private.wav"
        if private.exists() and private.stat().st_mode & 0o777 != 0o600:
            found.append("what was private is no more")
        return found


def hang(*_) -> None:
    """What the alarm does: an error that nothing catches."""
    raise AssertionError("it hangs")


@contextlib.contextmanager
def native():
    """A list of what libraries print to standard error past Python."""
    printed: list[bytes] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield printed
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            printed += [content for content in [file.read()] if content]


def contents(path: Path) -> bytes:
    """What is in a file of ordinary kind and size; OSError if it was already made something else."""
    if not path.is_file() or path.stat().st_size > 2**24:
        raise OSError(f"{path} is something else")
    return path.read_bytes()


def state(folder: Path) -> dict:
    """Path -> what is there, for all in a folder."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            status = path.lstat()
            regular = path.is_file() and not path.is_symlink() and status.st_size < 2**22
            found[str(path.relative_to(folder))] = (
                (status.st_mode, status.st_size, hash(path.read_bytes()))
                if regular
                else (status.st_mode, status.st_size)
            )
    return found


def question_bytes() -> bytes:
    """Two frames of a tone."""
    sound = (8000 * np.sin(np.arange(3840) / 9)).astype("<i2").tobytes()
    header = struct.pack(
        "<4sI8sIHHIIHH", b"RIFF", 36 + len(sound), b"WAVEfmt ", 16, 1, 1, 24000, 48000, 2, 16
    )
    header += struct.pack("<4sI", b"data", len(sound))
    return header + sound


def hugging_face(folder: Path) -> Path | None:
    """A random Hugging Face folder for the converter, None without `transformers`."""
    try:
        from test_convert_hf import hf_moshi
    except BaseException:  # pytest's skip, too
        return None
    with contextlib.redirect_stderr(io.StringIO()):
        hf_moshi("plain").save_pretrained(folder)
    return folder


def one_case(seed: int, good: Path, hf: Path | None) -> tuple[str, list[str], list[str]]:
    """The case of a seed: its kind, what was spoilt, what did not hold."""
    with tempfile.TemporaryDirectory() as name:
        case = Case(Path(name), seed)
        here = os.getcwd()
        os.chdir(name)
        try:
            if hf is not None and seed % 5 == 0:
                folder = Path(name, "hf")
                shutil.copytree(hf, folder)
                way = case.pick(
                    case.json_of, case.json_of, case.json_of, case.weights_of, case.kind_of, case.bytes_of
                )
                way(folder / ("model.safetensors" if way == case.weights_of else "config.json"))
                out = case.pick("out", "out", "hf", ".", "hf/config.json", "x" * 300, "a\nb")
                sys.argv = ["convert.py", str(folder), out]
                return "converter", case.told, case.run(lambda _: convert.main(), None)
            shutil.copytree(good, case.checkpoint)
            case.question.write_bytes(question_bytes())
            case.spoil()
            return "program", case.told, case.run(generate.main, case.argv)
        finally:
            os.chdir(here)


def main(argv: list[str] | None = None) -> int:
    """Runs the cases; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=500, help="cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: %(default)s)")
    parser.add_argument("--only", type=int, help="the one case of this number")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    signal.signal(signal.SIGPROF, hang)
    began, findings = time.monotonic(), 0
    counts = {"converter": 0, "program": 0}
    seeds = [args.only] if args.only is not None else [args.seed * 10**7 + number for number in range(args.n)]
    with tempfile.TemporaryDirectory() as name:
        good = make_random_checkpoint(Path(name) / "good")
        hf = hugging_face(Path(name) / "hf")
        for number, seed in enumerate(seeds):
            kind, told, found = one_case(seed, good, hf)
            counts[kind] += 1
            findings += bool(found)
            if found or args.only is not None:
                print(f"case {seed}: {'; '.join(told)}\n    " + "\n    ".join(found), flush=True)
            if number % 500 == 499:
                print(f"{number + 1} of {len(seeds)}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    print(
        f"{sum(counts.values())} cases, {counts['program']} of the program and {counts['converter']} of the "
        f"converter, in {seconds:.0f} s: {findings} findings"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
