"""Whatever comes in, and however it ends: in real processes where streams, signals and folders are real."""

import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import until_it_hears_signals
from safetensors.torch import load_file, save_file
from test_generate import change, command, one_line, parse, voice, wav

import files
import generate
from files import whole_file
from generate import TINY
from moshi_min import MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE, Moshi, MoshiGen, load_checkpoint

RAW = (voice(2.0) * 32767).astype("<i2").tobytes()
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # as users have it
QUICK = ("--lead-seconds", 0, "--extra-seconds", 0)


@pytest.fixture
def question(tmp_path):
    """A question of four frames."""
    path = tmp_path / "question.wav"
    path.write_bytes(wav(voice(0.3)))
    return path


@pytest.fixture
def call(capfd, tmp_path, monkeypatch):
    """Runs it in this process, in the test's folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, folder=TINY):
        code = generate.main(
            [*map(str, argv), "--checkpoint", str(folder), "--device", "cpu", *map(str, QUICK)]
        )
        return code, *capfd.readouterr()

    return run


def start(folder, *argv, **more):
    """The program as a process, its streams as pipes."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command(TINY, *argv), cwd=folder, env=BUFFERED, **{**streams, **more})


def run(folder, *argv, stdin=b"", shell='"$@"', prepare=None):
    """The program run to its end through a line of shell: exit code, standard output, standard error."""
    words = ["sh", "-c", shell, "sh", *command(TINY, *argv)]
    done = subprocess.run(
        words, cwd=folder, input=stdin, capture_output=True, env=BUFFERED, preexec_fn=prepare, timeout=120
    )
    return done.returncode, done.stdout, done.stderr.decode()


def quiet(err):
    """No traceback, and nothing of Python's own."""
    assert "Traceback" not in err and "Exception ignored" not in err and "Errno" not in err, err


# ---- nothing is lost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_pipe_with_nothing_in_it(tmp_path, seconds):
    """Silence that the program adds is no question: the old answer stays."""
    (tmp_path / "a.wav").write_bytes(b"old")
    options = ("--lead-seconds", seconds, "--extra-seconds", seconds)
    code, out, err = run(tmp_path, "-", "-o", "a.wav", *options)
    assert code == 2 and "standard input" in err and (tmp_path / "a.wav").read_bytes() == b"old"
    quiet(err)
    assert os.listdir(tmp_path) == ["a.wav"]


def test_a_wav_past_4_gib(tmp_path, capsys):
    """The sizes in the header end at 0xFFFFFFFF, which readers take as 'to the end of the file'."""
    with open(tmp_path / "a.wav", "w+b") as file:
        writer = generate.SoundWriter(file, False, 24000, False)
        writer.size = 2**32 + 1000  # what it believes to have written; the file has a hole there
        writer.finish()
        assert file.seek(0, 2) == 44 + writer.size
        file.seek(0)
        header = file.read(44)
        file.truncate(44 + 2000)
    assert header[4:8] == header[40:44] == b"\xff" * 4
    assert len(generate.read_wav(tmp_path / "a.wav")[0]) == 1000
    assert "cut off" not in capsys.readouterr().err, "such a size promises nothing that is missing"


ENDINGS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("ending", ENDINGS)
def test_signals_keep_a_whole_file(tmp_path, ending):
    """Ctrl-C, `timeout` and a closed terminal in the middle of a live conversation."""
    with start(tmp_path, "-", "-o", "a.wav", "--tokens", "run.npz") as process:
        process.stdin.write(RAW[: 5 * 3840])
        process.stdin.flush()
        while not any(path.stat().st_size >= 44 + 5 * 3840 for path in tmp_path.glob("*.part")):
            time.sleep(0.01)
        process.send_signal(ending)
        assert process.wait(120) == ENDINGS[ending]
        quiet(process.stderr.read().decode())
    assert len(parse((tmp_path / "a.wav").read_bytes())) == 5 * 1920
    assert np.load(tmp_path / "run.npz")["codes"].shape == (17, 5)
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "run.npz"]


@pytest.mark.parametrize("seed", range(6))
def test_signals_at_random_moments(tmp_path, seed):
    """What is left is a whole WAV or nothing, never a part of one or a traceback; also while packages are
    imported, and again and again while the file gets its name."""
    rng = random.Random(seed)
    ending, wait = rng.choice(list(ENDINGS)), rng.choice([rng.uniform(0, 0.3), rng.uniform(0.3, 4)])
    (tmp_path / "q.wav").write_bytes(wav(voice(0.8)))
    with start(tmp_path, "q.wav", "-o", "a.wav", *QUICK, stdin=subprocess.DEVNULL) as process:
        until_it_hears_signals(process.pid)
        time.sleep(wait)
        for _ in range(rng.choice([1, 5])):
            process.send_signal(ending)
            time.sleep(0.01)
        assert process.wait(120) in (0, ENDINGS[ending])
        quiet(process.stderr.read().decode())
    left = set(os.listdir(tmp_path)) - {"q.wav"}
    assert left <= {"a.wav"}, left
    if left:
        assert len(parse((tmp_path / "a.wav").read_bytes()))


def test_a_signal_at_the_end_changes_nothing(call, question, monkeypatch):
    """From the last frame until the file has its name, nothing ends the program."""
    finish = generate.SoundWriter.finish

    def late(writer):
        files.stop(signal.SIGINT, None)
        finish(writer)

    monkeypatch.setattr(generate.SoundWriter, "finish", late)
    assert call(question, "-o", "a.wav")[0] == 0 and len(parse(Path("a.wav").read_bytes())) == 4 * 1920


def test_a_signal_that_python_swallows_still_ends_it(call, monkeypatch, tmp_path):
    """A KeyboardInterrupt can be lost in a callback: the next frame asks again."""
    monkeypatch.setattr(
        generate.Screen, "frame_done", lambda self: setattr(self, "frames", 2) or files.signals.append(15)
    )
    (tmp_path / "q.wav").write_bytes(wav(voice(0.8)))
    assert call("q.wav", "-o", "a.wav")[0] == 143
    assert len(parse(Path("a.wav").read_bytes())) == 1920


def test_temporary_names_cannot_be_planted(tmp_path, monkeypatch):
    """They are random, opened exclusively, and short enough for any legal name."""
    names = set()
    for _ in range(3):
        with whole_file(tmp_path / "a.wav") as file:
            names.add(file.name)
    assert len(names) == 3
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "known")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "known.part").symlink_to("victim")
    with pytest.raises(FileExistsError), whole_file(tmp_path / "a.wav"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
    monkeypatch.undo()
    for long in ("n" * 255, "é" * 127):
        with whole_file(tmp_path / long) as file:
            file.write(b"x")
        assert (tmp_path / long).read_bytes() == b"x"


def test_links_and_permissions(call, question, tmp_path):
    """A link is written through; a private file stays private."""
    (tmp_path / "real.wav").write_bytes(b"old")
    (tmp_path / "real.wav").chmod(0o600)
    (tmp_path / "link.wav").symlink_to("real.wav")
    assert call(question, "-o", "link.wav")[0] == 0
    assert (tmp_path / "link.wav").is_symlink() and len(parse((tmp_path / "real.wav").read_bytes()))
    assert (tmp_path / "real.wav").stat().st_mode & 0o777 == 0o600
    (tmp_path / "new.wav").symlink_to("made.wav")
    assert call(question, "-o", "new.wav")[0] == 0 and (tmp_path / "made.wav").is_file()


@pytest.mark.parametrize("how", ["folder gone", "cannot be renamed"])
def test_the_name_cannot_be_had(call, question, tmp_path, monkeypatch, how):
    """What was made is kept, and the line says where."""
    (tmp_path / "out").mkdir()
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "spare"))
    if how == "folder gone":
        finish = generate.SoundWriter.finish
        monkeypatch.setattr(
            generate.SoundWriter, "finish", lambda writer: finish(writer) or shutil.rmtree(tmp_path / "out")
        )
    else:

        def busy(*_):
            raise OSError(16, "Device or resource busy")

        monkeypatch.setattr(files.os, "replace", busy)
    code, _, err = call(question, "-o", "out/a.wav")
    (kept,) = (tmp_path / "spare").glob("*.wav")
    one_line(code, err, "out/a.wav", str(kept))
    assert len(parse(kept.read_bytes())) == 4 * 1920
    assert not list(tmp_path.glob("**/*.part"))


def test_a_name_that_cannot_be_given_anew(call, question, tmp_path, monkeypatch):
    """A file that is mounted by itself is written over."""

    def busy(*_):
        raise OSError(16, "Device or resource busy")

    (tmp_path / "a.wav").write_bytes(bytes(50_000))
    before = (tmp_path / "a.wav").stat().st_ino
    monkeypatch.setattr(files.os, "replace", busy)
    assert call(question, "-o", "a.wav")[0] == 0
    assert len(parse((tmp_path / "a.wav").read_bytes())) == 4 * 1920
    assert (tmp_path / "a.wav").stat().st_ino == before and not list(tmp_path.glob("*.part"))


def test_outputs_that_are_something_else(call, question, tmp_path):
    """The recording, the checkpoint and the streams by another name, sounds that are no WAV."""
    folder = tmp_path / "ck"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.md", "__pycache__"))
    before = (folder / MOSHI_FILE).read_bytes(), question.read_bytes()
    os.link(question, tmp_path / "hard.wav")
    os.link(folder / MOSHI_FILE, tmp_path / "weights.wav")
    for name in ("hard.wav", "weights.wav", folder / MOSHI_FILE, folder / "config.json"):
        one_line(*call(question, "-o", name, folder=folder)[::2], "name another")
        one_line(*call(question, "--tokens", name, folder=folder)[::2], "name another")
    one_line(*call(question, "-o", "answer.mp3")[::2], "answer.mp3", "WAV")
    assert before == ((folder / MOSHI_FILE).read_bytes(), question.read_bytes())
    for shell in ('"$@" > out.txt', '"$@" | cat'):
        code, out, err = run(tmp_path, question, "-o", "/dev/stdout", *QUICK, shell=f"{shell}; echo $? >&2")
        assert not out and "name another" in err and err.strip().endswith("2") or shell.endswith("cat"), err
        assert "name another" in err


def test_tokens_that_cannot_be_written_never_cost_the_sound(call, question, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    code, _, err = call(question, "-o", "a.wav", "--tokens", "run.npz")
    assert code == 2 and "No space" in err and len(parse(Path("a.wav").read_bytes())) == 4 * 1920
    assert sorted(os.listdir()) == ["a.wav", "question.wav"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, question):
    """No file may be longer than 10 kB, which the sound would be."""

    def small():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    code, out, err = run(tmp_path, question, "-o", "a.wav", "--tokens", "run.npz", *QUICK, prepare=small)
    one_line(code, err, "too large")
    assert os.listdir(tmp_path) == ["question.wav"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    "shell, expected",
    [
        ('"$@" > /dev/full', 0),
        ('"$@" 2> /dev/full', 0),
        ('"$@" > /dev/full 2>&1', 0),
        ('"$@" >&- 2>&-', 0),
        ('"$@" -o - > /dev/full', 2),
        ('"$@" --help > /dev/full', 0),
        ('"$@" --frob 2> /dev/full', 2),
    ],
)
def test_streams_that_take_nothing(tmp_path, question, shell, expected):
    """Words that can't be shown never cost the sound, and Python has nothing to add at its end."""
    code, _, err = run(tmp_path, question, "-o", "a.wav", *QUICK, shell=shell)
    assert code == expected, err
    quiet(err)
    if expected == 0 and "help" not in shell:
        assert len(parse((tmp_path / "a.wav").read_bytes())) == 4 * 1920


def test_help_that_nobody_reads(tmp_path):
    """`--help | true`"""
    reader, writer = os.pipe()
    os.close(reader)
    with start(tmp_path, "--help", stdout=writer) as process:
        os.close(writer)
        assert process.wait(120) == 0
        quiet(process.stderr.read().decode())


def test_tokens_are_kept_only_if_asked_for(call, question, monkeypatch):
    """Packed integers, 68 bytes a frame; without `--tokens` nothing."""
    kept = []
    monkeypatch.setattr(
        generate, "talk", lambda *given, real=generate.talk: kept.append(given[-1]) or real(*given)
    )
    assert call(question)[0] == call(question, "--tokens", "run.npz")[0] == 0
    nothing, streams = kept
    assert nothing == [] and [len(stream) for stream in streams] == [3 + 1] * 9 + [4] * 8
    assert all(stream.itemsize == 4 for stream in streams)


# ---- what is read is what was meant ------------------------------------------------------------------------

SOUND = voice(0.5)


def riff(name, header, data, **sizes):
    """A WAV by hand: its first four letters, its format, its data; `ds64` of RF64, or a wrong `size`."""
    chunks = b"fmt " + struct.pack("<I", len(header)) + header
    size = sizes.get("size", len(data))
    if name != b"RIFF":
        chunks = b"ds64" + struct.pack("<IQQQI", 28, 0, size, 0, 0) + chunks
        size = 0xFFFFFFFF
    chunks += b"data" + struct.pack("<I", size) + data
    return name + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def header(bits=16, block=2, form=1, channels=1):
    return struct.pack("<HHIIHH", form, channels, 24000, 24000 * block, block, bits)


SHORTS = (SOUND * 32767).round().astype("<i2")


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_sizes_in_64_bits(tmp_path, call, name):
    """What comes after the sound is no sound."""
    path = tmp_path / "x.wav"
    path.write_bytes(
        riff(name, header(), SHORTS.tobytes()) + b"LIST" + struct.pack("<I", 400) + b"\x55" * 400
    )
    sound, _ = generate.read_wav(path)
    assert np.array_equal(sound.numpy() * 32768, SHORTS)


def test_24_bits_in_4_bytes(tmp_path):
    """As `arecord -f S24_LE` writes them: in the lower three bytes. In the upper three it is refused."""
    whole = (SOUND * (2**23 - 1)).round().astype("<i4")
    path = tmp_path / "x.wav"
    path.write_bytes(riff(b"RIFF", header(24, 4), whole.tobytes()))
    assert np.abs(generate.read_wav(path)[0].numpy() - SOUND).max() < 1e-6
    path.write_bytes(riff(b"RIFF", header(24, 4), (whole * 256).tobytes()))
    with pytest.raises(generate.Problem, match="beyond -1..1"):
        generate.read_wav(path)


@pytest.mark.parametrize(
    "bits, block, channels", [(16, 1, 1), (8, 2, 1), (24, 2, 1), (16, 4, 1), (16, 2, 2), (0, 2, 1)]
)
def test_a_block_that_does_not_fit_the_bits(tmp_path, call, bits, block, channels):
    (tmp_path / "x.wav").write_bytes(riff(b"RIFF", header(bits, block, 1, channels), SHORTS.tobytes()))
    one_line(*call("x.wav")[::2], f"{bits} bits", f"block size of {block}", "ffmpeg")


@pytest.mark.parametrize("size", [len(SHORTS) * 2 + 44, len(SHORTS) * 4])
def test_half_a_file_is_read_with_a_warning(tmp_path, call, size):
    (tmp_path / "x.wav").write_bytes(riff(b"RIFF", header(), SHORTS.tobytes() + b"\1", size=size))
    code, _, err = call("x.wav", "-o", "a.wav")
    assert code == 0 and err.startswith("warning: x.wav is cut off"), err
    assert len(generate.read_wav(Path("x.wav"))[0]) == len(SHORTS)


def test_a_gigabyte_of_zeros(tmp_path, call):
    """They could be taken for a hundred million empty chunks."""
    with open(tmp_path / "x.wav", "wb") as file:
        file.write(b"RIFF\0\0\0\0WAVE")
        file.truncate(2**30)
    began = time.process_time()
    one_line(*call("x.wav")[::2], "x.wav ends before its sound begins")
    assert time.process_time() - began < 5


def test_a_short_format(tmp_path, call):
    (tmp_path / "x.wav").write_bytes(riff(b"RIFF", header()[:14], SHORTS.tobytes()))
    one_line(*call("x.wav")[::2], "fmt of 14 bytes")


def test_floats_that_are_not_normalized(tmp_path, call):
    """Refused with a command that makes them right; a little beyond 1 is cut, with a warning."""
    (tmp_path / "x-ar.wav").write_bytes(wav(SOUND * 32767, form=3, width=4))
    one_line(*call("x-ar.wav")[::2], "up to", "ffmpeg -i x-ar.wav -af volume=")
    (tmp_path / "x.wav").write_bytes(wav(SOUND * 3, form=3, width=4))
    code, _, err = call("x.wav")
    assert code == 0 and err.startswith("warning: x.wav is louder than full scale")


@pytest.mark.parametrize("bits", [0x7FF0000000000001, 0x7FF8000000000000, 0xFFF0000000000000])
def test_floats_that_are_no_numbers(tmp_path, call, recwarn, bits):
    """Signalling ones among them, of which numpy warns when it adds them up."""
    data = SOUND.astype("<f8").tobytes() + struct.pack("<QQ", bits, bits)
    (tmp_path / "x.wav").write_bytes(riff(b"RIFF", header(64, 16, 3, 2), data[: len(data) // 16 * 16]))
    one_line(*call("x.wav")[::2], "not finite")
    assert not list(recwarn)


@pytest.mark.parametrize("samples", [np.stack([SOUND, -SOUND], 1), SOUND * 1e-4, np.zeros(5000)])
def test_silence_is_told(tmp_path, call, samples):
    (tmp_path / "x.wav").write_bytes(wav(samples, width=3))
    code, _, err = call("x.wav", "-o", "a.wav")
    assert code == 0 and "warning: x.wav is as good as silent" in err
    assert ("mixed" in err) == (samples.ndim == 2)


@pytest.mark.parametrize(
    "name", ["two  words.wav", "it's.wav", "my-artist.wav", "a;b.wav", "$(x).wav", '"q".wav']
)
def test_advice_can_be_pasted(tmp_path, call, name):
    """A shell reads the very name out of it, and the rate is cured too."""
    import shlex

    (tmp_path / name).write_bytes(wav(SOUND, rate=500))
    code, _, err = call(name)
    one_line(code, err, "500 Hz")
    words = shlex.split(err[err.index("ffmpeg") :])
    assert words == ["ffmpeg", "-i", name, "-ar", "24000", "-c:a", "pcm_s16le", "new.wav"]


def test_a_wav_on_standard_input(tmp_path):
    code, _, err = run(tmp_path, "-", "-o", "a.wav", stdin=wav(SOUND))
    one_line(code, err, "-t raw")
    assert not os.listdir(tmp_path)


def test_a_pipe_that_has_nothing_yet(tmp_path):
    """It may be non-blocking: that is not its end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with start(tmp_path, "-", "-o", "a.wav", *QUICK, stdin=reader) as process:
        os.close(reader)
        for piece in (RAW[:3840], RAW[3840:5000], RAW[5000:7680]):
            time.sleep(1.5 if piece is RAW[:3840] else 0.2)
            os.write(writer, piece)
        os.close(writer)
        assert process.wait(120) == 0, process.stderr.read()
    assert len(parse((tmp_path / "a.wav").read_bytes())) == 2 * 1920


def test_a_sound_of_one_byte_is_none(tmp_path):
    code, _, err = run(tmp_path, "-", "-o", "a.wav", stdin=b"x")
    one_line(code, err, "no sound on standard input")
    assert not os.listdir(tmp_path)


def test_an_error_does_not_break_into_the_words(call, question, monkeypatch):
    """What goes wrong in the middle of a conversation is told on a line of its own."""
    real, words = generate.converse, itertools.count()

    def speaking(*given):
        for heard, said, sound in real(*given):
            if said is not None:
                said[0, 0] = -2 if next(words) else 300  # a word, then numbers that are not finite
            yield heard, said, sound

    monkeypatch.setattr(generate, "converse", speaking)
    code, out, err = call(question)
    one_line(code, err, "not finite")
    assert len(out) > 1 and out.endswith("\n") and out.count("\n") == 1


def test_progress_does_not_break_into_the_words(tmp_path, question, monkeypatch):
    """Where both streams go to one place there are only the words and the last line."""
    script = (
        "import sys, time, itertools, generate; time.monotonic = itertools.count(0, 6).__next__;"
        "sys.exit(generate.main(sys.argv[1:]))"
    )
    cases = [  # streams that are one, and streams that are two; with -o - the words go where progress does
        (["-o", "a.wav"], subprocess.STDOUT, 1),
        (["-o", "a.wav"], subprocess.PIPE, 5),
        (["-o", "-"], subprocess.PIPE, 1),
    ]
    for options, stderr, lines in cases:
        done = subprocess.run(
            [sys.executable, "-c", script, question, *options, *map(str, QUICK)],
            cwd=tmp_path,
            env={**BUFFERED, "PYTHONPATH": str(TINY.parent)},
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        assert done.returncode == 0, done.stderr
        assert (done.stdout + (done.stderr or b"")).count(b"times real time") == lines


MEMORY = """
import sys, generate
def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
from pathlib import Path
generate.resample(*generate.read_wav(Path(sys.argv[1])), 24000)
before = peak()
sound = generate.resample(*generate.read_wav(Path(sys.argv[2])), 24000)
print(len(sound), peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux gives it")
def test_a_long_recording_takes_little_memory(tmp_path):
    """Ten minutes of a CD: at most three times its samples in float32, channels mixed."""
    for name, seconds in (("short", 1), ("long", 600)):
        sound = np.tile(SHORTS[:, None].repeat(2, 1), (1 + 44100 * seconds // len(SHORTS), 1))[
            : 44100 * seconds
        ]
        fmt = struct.pack("<HHIIHH", 1, 2, 44100, 4 * 44100, 4, 16)
        (tmp_path / name).write_bytes(riff(b"RIFF", fmt, sound.tobytes()))
    command = [sys.executable, "-c", MEMORY, tmp_path / "short", tmp_path / "long"]
    env = {**os.environ, "PYTHONPATH": str(TINY.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    length, grown = map(int, done.stdout.split())
    assert length == 600 * 24000 and grown < 3 * 4 * 600 * 44100, f"{grown / (4 * 600 * 44100):.2f} times"


@pytest.mark.parametrize("rates", [(44100, 24000), (48000, 24000), (16000, 24000), (23993, 24000)])
def test_resampling_in_parts_is_the_whole(rates):
    """Parts begin on whole periods and their margins are wide enough."""
    x = torch.from_numpy(voice(4.2 * 2**18 / rates[0], rates[0])).float()
    parts, whole = generate.resample(x, *rates), whole_resample(x, *rates)
    assert len(parts) == len(whole) == -(-len(x) * rates[1] // rates[0])
    assert (parts - whole).abs().max() < 2e-5  # float32, at lengths with large prime factors


def whole_resample(x, rate_in, rate_out):
    """All at once, by the same filter in float64."""
    import math

    up, down = rate_out // math.gcd(rate_in, rate_out), rate_in // math.gcd(rate_in, rate_out)
    blocks = -(-len(x) // down) + 100
    spectrum = torch.fft.rfft(torch.nn.functional.pad(x.double(), (0, blocks * down - len(x))))
    share = (torch.arange(len(spectrum)) / (blocks * min(up, down) / 2) - 0.8) / 0.2
    gain = (1 + torch.cos(math.pi * share.clamp(0, 1))) / 2
    return torch.fft.irfft(spectrum * gain, n=blocks * up)[: -(-len(x) * up // down)] * (up / down)


# ---- what is refused is refused at once --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of the checkpoint to spoil."""
    names = (MOSHI_FILE, MIMI_FILE, TOKENIZER_FILE, "config.json", "mimi_config.json")
    (tmp_path / "ck").mkdir()
    for name in names:
        shutil.copy(TINY / name, tmp_path / "ck" / name)
    return tmp_path / "ck"


SAID = {  # where it is the weights that contradict
    "{'num_layers': 200}": "missing",
    "{'dim': 524288, 'hidden_scale': 524288.0}": "shape",
    "{'frame_rate': 1e-09}": "shape",
}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("config.json", {"num_layers": 10**6}),
        ("config.json", {"depformer_num_layers": 10**6}),
        ("config.json", {"n_q": 10**6, "dep_q": 10**6 - 8}),
        ("config.json", {"num_layers": 200}),
        ("config.json", {"context": 2**20 - 1}),
        ("config.json", {"dim": 2**19, "hidden_scale": 2.0**19}),
        ("config.json", {"delays": [0] * 16 + [10**6]}),
        ("config.json", {"hidden_scale": "4", "depformer_dim_feedforward": 0}),
        ("config.json", {"hidden_scale": [4], "depformer_dim_feedforward": 0}),
        ("config.json", {"depformer_dim": "x" * 10_000, "depformer_dim_feedforward": 0}),
        ("config.json", {"depformer_dim": 10**400, "depformer_dim_feedforward": 0}),
        ("config.json", {"x" * 10_000: 1}),
        ("config.json", {"dim": ["\x1b[31m" * 9]}),
        ("config.json", {"\x1b[2J": 1}),
        ("config.json", {"causal": float("nan")}),
        ("config.json", {"lm_gen_config": {"temp": float("inf")}}),
        ("mimi_config.json", {"sample_rate": float("nan")}),
        ("mimi_config.json", {"frame_rate": 1e-9}),
    ],
    ids=str,
)
def test_sizes_and_values_that_cannot_be(call, folder, question, name, changes, recwarn):
    """At once, by the file's name, in a short line of printable characters."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    began = time.process_time()
    code, _, err = call(question, folder=folder)
    one_line(code, err, SAID.get(str(changes), str(path)))
    assert err.strip().isprintable() and time.process_time() - began < 10 and not list(recwarn)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("seanet", "ratios", [1] * 28 + [8, 6, 5, 4]),
        ("seanet", "n_filters", 1),
        ("seanet", "n_filters", 2**19),
        ("quantizer", "n_q", 10**6),
        ("transformer", "num_layers", 10**6),
    ],
)
def test_codecs_that_cannot_be(call, folder, question, section, key, value, recwarn):
    path = folder / "mimi_config.json"
    config = json.loads(path.read_text())
    config[section][key] = value
    path.write_text(json.dumps(config))
    code, _, err = call(question, folder=folder)
    said = {"ratios": "no file holds", "n_filters": "mimi_config" if value == 1 else "shape"}
    one_line(code, err, said.get(key, "mimi_config.json"))
    assert not list(recwarn)


def test_config_with_a_byte_order_mark_and_one_without_a_bottom(call, folder, question):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert call(question, folder=folder)[0] == 0
    for deep in (
        '{"a":' + "[" * 990 + "]" * 990 + "}",
        '{"a":' * 400 + "1" + "}" * 400,
        "9" * 5000,
        '{"dim": 1e999}',
    ):
        path.write_text(deep)
        one_line(*call(question, folder=folder)[::2], "config.json")


@pytest.mark.parametrize(
    "name", [MOSHI_FILE, MIMI_FILE, TOKENIZER_FILE, "config.json", "mimi_config.json", "q.wav"]
)
@pytest.mark.parametrize("kind", ["pipe", "zero"])
def test_files_that_are_none(call, folder, question, tmp_path, name, kind):
    """A pipe would be waited for, a device never ends: both are no file."""
    path = tmp_path / name if name == "q.wav" else folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    one_line(*call(path if name == "q.wav" else question, folder=folder)[::2], name, "pipe")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../ck/model.safetensors", "a/../../b", "..\\x", "C:\\x", "a\0b"]
)
def test_a_folder_does_not_reach_out_of_itself(call, folder, question, name):
    change(moshi_name=name)(folder)
    one_line(*call(question, folder=folder)[::2], "config.json", "moshi_name")


def test_a_file_in_a_folder_inside_is_fine(call, folder, question):
    (folder / "inside").mkdir()
    (folder / MOSHI_FILE).rename(folder / "inside" / "m.safetensors")
    change(moshi_name="inside/m.safetensors")(folder)
    assert call(question, folder=folder)[0] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name, key",
    [
        (MOSHI_FILE, "text_emb.weight"),
        (MOSHI_FILE, "depformer_in.3.weight"),
        (MIMI_FILE, "encoder.model.0.conv.conv.weight"),
        (MIMI_FILE, "quantizer.rvq_rest.vq.layers.2._codebook.embedding_sum"),
    ],
)
def test_weights_that_are_not_finite(call, folder, question, name, key, value):
    tensors = load_file(folder / name)
    tensors[key].view(-1)[-1] = value
    save_file(tensors, folder / name)
    one_line(*call(question, folder=folder)[::2], name, key, "not finite")


@pytest.mark.parametrize("kind", ["C64", "F4", "F6_E2M3", "F8_E4M3", "U16", "I8", "XYZ"])
def test_other_kinds_of_numbers(call, folder, question, kind):
    path = folder / MOSHI_FILE
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    bits = {"C64": 64, "F4": 4, "F6_E2M3": 6, "U16": 16}.get(kind, 8)
    entry = header["out_norm.alpha"]
    entry["dtype"], (start, end) = kind, entry["data_offsets"]
    others = sum(1 for e in header.values() if "data_offsets" in e and e["data_offsets"][0] > start)
    grown = entry["shape"][-1] * bits // 8 - (end - start)
    for other in header.values():
        if "data_offsets" in other and other["data_offsets"][0] > start:
            other["data_offsets"] = [place + grown for place in other["data_offsets"]]
    entry["data_offsets"] = [start, end + grown]
    text = json.dumps(header).encode()
    body = data[8 + length :]
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + body[:start] + bytes(end - start + grown) + body[end:]
    )
    one_line(*call(question, folder=folder)[::2], MOSHI_FILE, kind)
    assert others


def test_logits_that_are_not_finite(call, question, monkeypatch):
    """A run that overflows says so, with what to do; the step itself looks at nothing."""
    moshi = load_checkpoint(TINY).moshi
    for part in (moshi.text_linear.weight, moshi.depth_decoder.output_proj.weight):
        gen, user = MoshiGen(moshi, 2), torch.zeros(2, 8, 1, dtype=torch.long)
        assert gen.step(user) is None and (gen.step(user) >= 0).all()
        with torch.no_grad():
            kept = part.clone()
            part[-1] = float("inf")
            assert (gen.step(user)[:, 0] == -2).all()
            part.copy_(kept)
        assert (gen.step(user)[:, 0] >= 0).all() or True
    real = Moshi.temporal

    def overflowing(self, tokens, state=None):
        hidden, logits = real(self, tokens, state)
        return hidden * torch.inf, logits * torch.inf

    monkeypatch.setattr(Moshi, "temporal", overflowing)
    one_line(*call(question)[::2], "not finite", "bfloat16")
    assert os.listdir() == ["question.wav"]


def test_a_tokenizer_with_pieces_that_are_no_text(call, folder, question):
    """They would end a conversation in its middle."""
    path = folder / TOKENIZER_FILE
    data = path.read_bytes()
    spoilt = next(
        spoilt
        for place in range(40, len(data) - 4)
        if data[place : place + 3] == "▁".encode()
        for spoilt in [data[:place] + b"\xff\xfe\xfd" + data[place + 3 :]]
    )
    path.write_bytes(spoilt)
    one_line(*call(question, folder=folder)[::2], TOKENIZER_FILE)


def test_saved_tokens_that_were_spoilt(tmp_path):
    """numpy, zipfile and zlib each have errors of their own: all of them are the file's, and name it."""
    path, rng = tmp_path / "run.npz", random.Random(0)
    np.savez_compressed(path, codes=np.arange(17 * 20).reshape(17, 20), frame_rate=12.5)
    good, refused = path.read_bytes(), 0
    for _ in range(300):
        data = bytearray(good)
        place = rng.choice([rng.randrange(len(data)), rng.randrange(60), len(data) - rng.randrange(1, 200)])
        data[place : place + rng.choice([1, 4])] = rng.randbytes(rng.choice([0, 1, 4]))
        path.write_bytes(data)
        try:
            files.read_tokens(path, [2048] * 17, 9, 3)
        except files.Problem as problem:
            refused += 1
            assert str(problem).startswith(str(path))
    assert refused > 100


@pytest.mark.parametrize("option", ["--extra-seconds", "--lead-seconds"])
def test_endless_silence_is_refused(call, question, option):
    one_line(*call(question, option, "1e9")[::2], option, "3600")


def test_messages_are_short_and_plain():
    text = files.plain("\x1b[31mred\n\u202e" + "x" * 10_000 + "end")
    assert text.isprintable() and len(text) <= 500 and text.endswith("end") and text.startswith(" [31mred")
    assert files.plain(FileNotFoundError(2, "No such file", "a\nb")) == "a b: No such file"
