"""The program: what it reads and writes, its answers beside the official package's, all that can go wrong."""

import dataclasses
import io
import itertools
import json
import math
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from random_checkpoint import MIMI, MOSHI, make_random_checkpoint, random_mimi, random_moshi
from safetensors.torch import load_file, save_file

import generate
import moshi_min
from moshi_min import MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE, MoshiGen, load_checkpoint

RATE, FRAME = 24000, 1920

# ---- files by hand -----------------------------------------------------------------------------------------


def wav(samples, rate=RATE, form=1, width=2, extensible=False, before=b"", after=b"", size=None, bits=None):
    """The bytes of a WAV with samples [T] or [T, channels] in -1..1, stray chunks before and after the data.
    `size`: what a writer says that cannot know, of the data and of the whole."""
    samples = np.asarray(samples, np.float64)
    samples = samples[:, None] if samples.ndim == 1 else samples
    if form == 3:
        data = samples.astype(f"<f{width}").tobytes()
    elif width == 1:
        data = (samples * 127 + 128).round().astype(np.uint8).tobytes()
    else:
        whole = (samples * (2 ** (8 * width - 1) - 1)).round().astype("<i8")
        data = whole.reshape(-1, 1).view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    channels = samples.shape[1]
    block, bits = channels * width, bits or 8 * width
    header = struct.pack("<HHIIHH", 0xFFFE if extensible else form, channels, rate, rate * block, block, bits)
    if extensible:
        name = struct.pack("<H", form) + bytes.fromhex("000000001000800000aa00389b71")
        header += struct.pack("<HHI", 22, bits, 3) + name
    chunks = before + chunk(b"fmt ", header) + chunk(b"data", data, size) + after
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) if size is None else size) + b"WAVE" + chunks


def chunk(name, contents, size=None):
    """A RIFF chunk; `size` is what its header says if that is not the truth."""
    return (
        name
        + struct.pack("<I", len(contents) if size is None else size)
        + contents
        + b"\0" * (len(contents) % 2)
    )


def parse(data):
    """The samples [T, channels] of a 16-bit WAV as our program writes it; any flaw in the header fails."""
    riff, size, wave, form, channels, rate, per_second, block, bits, name, length = struct.unpack(
        "<4sI8s4xHHIIHH4sI", data[:44]
    )
    assert (riff, wave, name, form, rate, bits) == (b"RIFF", b"WAVEfmt ", b"data", 1, RATE, 16)
    assert (size, length, block, per_second) == (
        len(data) - 8,
        len(data) - 44,
        2 * channels,
        2 * channels * rate,
    )
    return np.frombuffer(data[44:], "<i2").reshape(-1, channels)


def voice(seconds, rate=RATE, seed=0):
    """Something like a voice: a few gliding harmonics and noise, [T] in -1..1."""
    time_ = np.arange(int(seconds * rate)) / rate
    pitch = 130 + 30 * np.sin(2 * np.pi * 1.5 * time_)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    sound = sum(np.sin(k * phase) / k for k in range(1, 12)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time_))
    return 0.2 * sound + 0.01 * np.random.default_rng(seed).standard_normal(len(time_))


# ---- the checkpoint and the two ways to run the program ----------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small random checkpoint folder for all tests; nobody may change it."""
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random")


@pytest.fixture
def question(tmp_path):
    """A question of 12.5 frames at 24 kHz, mono, 16 bits."""
    path = tmp_path / "question.wav"
    path.write_bytes(wav(voice(1.0)))
    return path


@pytest.fixture
def call(checkpoint, capsys, tmp_path, monkeypatch):
    """Runs it in this process, in the test's folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, folder=checkpoint):
        try:
            code = generate.main([*map(str, argv), "--checkpoint", str(folder), "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def command(checkpoint, *argv):
    """The program as a command line."""
    return [
        sys.executable,
        str(ROOT / "generate.py"),
        *map(str, argv),
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
    ]


QUICK = ("--extra-seconds", 0.3)

# ---- resampling --------------------------------------------------------------------------------------------


def sine(frequency, rate, seconds):
    """cos(2 pi f t + 0.3) at t = n / rate."""
    n = torch.arange(math.ceil(seconds * rate), dtype=torch.float64)
    return torch.cos(2 * math.pi * frequency * n / rate + 0.3)


@pytest.mark.parametrize(
    "rate_in, rate_out",
    [
        (44100, 24000),
        (48000, 24000),
        (16000, 24000),
        (8000, 24000),
        (11025, 24000),
        (22050, 24000),
        (96000, 24000),
        (32000, 24000),
        (23993, 24000),
        (24001, 24000),
        (192000, 24000),
        (24000, 44100),
        (1000, 24000),
    ],
)
def test_resample(rate_in, rate_out):
    seconds, lower = 0.3, min(rate_in, rate_out)
    edge = max(40 * rate_out // lower, 10)  # where the filter sees the recording's ends
    for part in (0.0, 0.11, 0.5, 0.799):
        frequency = part * lower / 2
        x = sine(frequency, rate_in, seconds).float()
        y = generate.resample(x, rate_in, rate_out)
        assert y.dtype == torch.float32 and len(y) == math.ceil(len(x) * rate_out / rate_in)
        ideal = sine(frequency, rate_out, 2 * seconds)[: len(y)]
        difference = (y - ideal)[edge:-edge].abs().max()
        assert difference < 1e-3, f"{frequency} Hz: {20 * math.log10(difference):.1f} dB from the ideal"
    for part in (1.001, 1.1, 1.7):
        frequency = part * rate_out / 2
        if frequency < rate_in / 2:
            y = generate.resample(sine(frequency, rate_in, seconds).float(), rate_in, rate_out)
            loud = y[edge:-edge].abs().max()
            assert loud < 1e-3, f"{frequency} Hz comes through at {20 * math.log10(loud):.1f} dB"


def test_resample_of_a_click_is_in_time_and_short_inputs_work():
    click = torch.zeros(1000)
    click[441] = 1
    assert generate.resample(click, 44100, 24000).argmax() == 240
    for length in (1, 2, 5, 79, 81):
        assert len(generate.resample(torch.ones(length), 44100, 24000)) == math.ceil(length * 24000 / 44100)
    x = torch.randn(5)
    assert torch.equal(generate.resample(x, 24000, 24000), x)


@pytest.mark.parametrize("rate_in, rate_out", [(44100, 24000), (8000, 24000), (24000, 44100)])
def test_resample_of_a_click_rings_little_and_not_at_the_other_end(rate_in, rate_out):
    """40 samples of the lower rate away from a click it is silent (sharp filters ring on for hundreds), and a
    click at the end is not heard at the start: what is a spectrum to us repeats itself."""
    click = torch.zeros(4000)
    click[2000] = 1
    y = generate.resample(click, rate_in, rate_out)
    place, far = round(2000 * rate_out / rate_in), 40 * rate_out // min(rate_in, rate_out)
    assert torch.cat([y[: place - far], y[place + far :]]).abs().max() < 1e-3 * y.max()
    click = torch.zeros(4000)
    click[-1] = 1
    y = generate.resample(click, rate_in, rate_out)
    assert y[: len(y) // 2].abs().max() < 1e-3 * y.max()


# ---- WAV files ---------------------------------------------------------------------------------------------

STRAY = chunk(b"LIST", b"INFOISFT\x05\0\0\0abcde") + chunk(b"odd ", b"xyz")
SHAPES = {
    "8 bits": dict(width=1),
    "16 bits": {},
    "24 bits": dict(width=3),
    "32 bits": dict(width=4),
    "float 32": dict(form=3, width=4),
    "float 64": dict(form=3, width=8),
    "extensible 16": dict(extensible=True),
    "extensible 24": dict(extensible=True, width=3),
    "extensible float": dict(extensible=True, form=3, width=4),
    "20 bits in 3 bytes": dict(width=3, bits=20),
    "stray chunks": dict(before=STRAY, after=STRAY),
    "stray chunks, odd data": dict(width=1, before=STRAY, after=STRAY),
    "size 0": dict(size=0),
    "size -1": dict(size=0xFFFFFFFF),
    "size of sox": dict(size=0x7FFFFFFF - 36),
    "size of arecord": dict(size=0x80000000),
    "44.1 kHz": dict(rate=44100),
    "8 kHz": dict(rate=8000),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_wav_shapes(name, channels, tmp_path):
    shape = SHAPES[name]
    samples = np.random.default_rng(0).uniform(-1, 1, (777, channels))
    samples[0], samples[1] = 1, -1
    path = tmp_path / "x.wav"
    path.write_bytes(wav(samples, **shape))
    sound, rate = generate.read_wav(path)
    assert rate == shape.get("rate", RATE) and sound.dtype == torch.float32 and sound.shape == (777,)
    step = {1: 2**-7, 2: 2**-15, 3: 2**-23, 4: 2**-24, 8: 2**-24}[shape.get("width", 2)]
    assert np.abs(sound.numpy() - samples.mean(axis=1)).max() <= 2 * step
    assert sound.numpy().std() > 0.1


def test_wav_may_lose_part_of_its_last_sample_and_shout(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(wav([0.5] * 10, size=0)[:-1])
    assert len(generate.read_wav(path)[0]) == 9
    path.write_bytes(wav([3.0, -4.0, 0.25], form=3, width=4))
    assert generate.read_wav(path)[0].tolist() == [1, -1, 0.25]


def test_sound_writer():
    """Samples are rounded and stay in 16 bits; the header says how many there are; raw sound has none."""
    quiet = torch.tensor([0.6, -0.6, 0.4, 1.0, -7.0]) / 32768
    loud = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5])
    expected = [1, -1, 0, 1, -7, 32767, -32768, 32767, -32768, 16384]
    for raw in (False, True):
        file = io.BytesIO()
        writer = generate.SoundWriter(file, False, RATE, raw)
        for frame in (quiet, loud):
            writer.add(torch.zeros(5), frame)
        writer.add(torch.zeros(5), None)
        writer.finish()
        data = file.getvalue()
        found = np.frombuffer(data, "<i2") if raw else parse(data)[:, 0]
        assert found.tolist() == expected
    file = io.BytesIO()
    writer = generate.SoundWriter(file, True, RATE, False)
    for moshi in (None, quiet, loud):
        writer.add(torch.full((5,), 0.25), moshi)
    writer.finish()
    user, moshi = parse(file.getvalue()).T
    assert user.tolist() == 15 * [8192] + 5 * [0] and moshi.tolist() == 10 * [0] + expected


BAD_WAVS = {
    "empty": (b"", "empty"),
    "text": (b"hello there, this is no sound at all" * 4, "not a WAV"),
    "mp3": (b"\xff\xfb\x90\x64" + bytes(400), "ffmpeg"),
    "only RIFF": (b"RIFF\0\0\0\0WAVE", "ends before"),
    "header cut": (wav(voice(0.1))[:30], "ends before"),
    "no samples": (wav([]), "no sound"),
    "no samples, then a chunk": (wav([], after=STRAY), "no sound"),
    "no whole sample": (wav(voice(0.1))[:45], "no sound"),
    "no format": (b"RIFF\0\0\0\0WAVE" + chunk(b"data", bytes(100)), "not read here"),
    "short format": (
        b"RIFF\0\0\0\0WAVE" + chunk(b"fmt ", b"\1\0") + chunk(b"data", bytes(100)),
        "not read here",
    ),
    "A-law": (wav(voice(0.1), form=6, width=1), "ffmpeg"),
    "ADPCM": (wav(voice(0.1), form=2), "not read here"),
    "half floats": (wav(voice(0.1), form=3, width=2), "not read here"),
    "rate 0": (wav(voice(0.1), rate=0), "0 Hz"),
    "rate too high": (wav(voice(0.1), rate=2_000_000_000), "2000000000 Hz"),
    "nan": (wav([0.0, math.nan, 0.0], form=3, width=4), "not finite"),
    "inf": (wav([0.0, math.inf, 0.0], form=3, width=8), "not finite"),
    "big-endian": (b"RIFX" + wav(voice(0.1))[4:], "not a WAV"),
}


def one_line(code, err, *said):
    """What every problem looks like: exit code 2 and one plain line."""
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("generate.py: "), err
    assert "Traceback" not in err and "[Errno" not in err and len(err) < 600
    for word in said:
        assert word in err, err


@pytest.mark.parametrize("name", BAD_WAVS)
def test_bad_wavs(name, call, tmp_path):
    data, said = BAD_WAVS[name]
    path, answer = tmp_path / "bad.wav", tmp_path / "answer.wav"
    path.write_bytes(data)
    answer.write_bytes(b"precious")
    code, out, err = call(path)
    one_line(code, err, said, "bad.wav")
    assert (
        not out
        and answer.read_bytes() == b"precious"
        and sorted(os.listdir(tmp_path)) == ["answer.wav", "bad.wav"]
    )


# ---- the loop ----------------------------------------------------------------------------------------------

# The streams of Moshi and of the user differ in number; the text is delayed, too.
DELAYS = {"uneven": (1, 0, 2, 3, 1, 4), "one": (0, 0, 1, 1, 0, 1), "none": (0, 0, 0, 0, 0, 0)}


@pytest.fixture(scope="module", params=[(3, 2), (2, 3)], ids=["3 own 2 heard", "2 own 3 heard"])
def two(request):
    """two(delays) -> a codec with as many codebooks as are needed, and a model."""
    own, heard = request.param
    mimi = random_mimi(MIMI)
    mimi.num_codebooks = 3

    def make(delays):
        sizes = {"n_q": own + heard, "dep_q": own, "delays": DELAYS[delays]}
        return mimi, random_moshi(dataclasses.replace(MOSHI, card=mimi.config.bins, **sizes))

    return make


def by_hand(mimi, gen, heard, texts=()):
    """What `converse` is to say to user codes [B, n_user, F]: the first twice, then each once."""
    texts = [None, *texts]
    steps = torch.cat([heard[..., :1], heard], -1).split(1, -1)
    said = [gen.step(codes, texts[s] if s < len(texts) else None) for s, codes in enumerate(steps)]
    tokens = torch.cat([step for step in said if step is not None], -1)
    return tokens, mimi.decode(tokens[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("delays", DELAYS)
@pytest.mark.parametrize("how", ["plain", "changed", "forced"])
def test_converse(two, delays, how):
    """A batch of two, whole and then by the frame: what is heard, what is said and how it sounds. With other
    codes in the user's place; with words that are to be said, fewer than there are frames."""
    mimi, moshi = two(delays)
    config, batch, frames = moshi.config, 2, 12
    pcm = torch.stack([torch.from_numpy(voice(frames * FRAME / RATE, seed=n)).float() for n in range(batch)])
    pcm = pcm[:, None, : frames * FRAME] * torch.tensor([1.0, 0.3])[:, None, None]
    users = config.n_q - config.dep_q
    heard, texts, change = mimi.encode(pcm)[:, :users], [], {}
    if how == "changed":
        other = torch.randint(config.card, heard.shape)
        asked, given = [], iter(other.split(1, -1))
        change["change"] = lambda codes: asked.append(codes) or next(given)
    elif how == "forced":
        texts = list(torch.randint(4, config.text_card, (frames - 4, batch)))
        texts[3][0] = texts[5][1] = -2
        change["texts"] = texts
    torch.manual_seed(3)
    gen = MoshiGen(moshi, batch)
    found = list(generate.converse(mimi, gen, pcm.split(FRAME, -1), **change))

    early, late = int(max(DELAYS[delays]) == 0), max(0, max(DELAYS[delays]) - 1)
    assert [h is None for h, _, _ in found] == early * [True] + frames * [False]
    silent = late * [True] + (early + frames - late) * [False]
    assert [said is None for _, said, _ in found] == [sound is None for _, _, sound in found] == silent
    listened = torch.cat([h for h, _, _ in found[early:]], -1)
    if how == "changed":
        assert torch.equal(listened, other)
        listened = torch.cat(asked, -1)
    assert listened.shape == heard.shape and (listened == heard).float().mean() > 0.98  # but for ties
    torch.manual_seed(3)
    used = other if how == "changed" else listened
    tokens, sound = by_hand(mimi, MoshiGen(moshi, batch), used, texts)
    assert torch.equal(torch.cat([said for _, said, _ in found[late:]], -1), tokens)
    assert (torch.cat([s for _, _, s in found[late:]], -1) - sound).abs().max() < 1e-5 * sound.abs().max()
    if how == "forced":  # the text of step s belongs to frame s - delay, and texts begin with step 1
        wanted = torch.stack(texts, 1)[:, max(0, DELAYS[delays][0] - 1) :]
        first = 1 - min(1, DELAYS[delays][0])
        words = tokens[:, 0, first : first + wanted.shape[1]]
        wanted = wanted[:, : words.shape[1]]
        assert torch.equal(words[wanted != -2], wanted[wanted != -2])


@torch.no_grad()
def test_converse_in_rows(two):
    """Greedy rows of a batch say what each says alone."""
    mimi, moshi = two("uneven")
    pcm = torch.stack([torch.from_numpy(voice(1.2, seed=n)).float()[None] * (0.3 + n) for n in range(3)])

    def said(pcm):
        gen = MoshiGen(moshi, len(pcm), greedy=True)
        return [said for _, said, _ in generate.converse(mimi, gen, pcm.split(FRAME, -1)) if said is not None]

    together = torch.cat(said(pcm), -1)
    for row in range(3):
        assert (together[row : row + 1] == torch.cat(said(pcm[row : row + 1]), -1)).float().mean() > 0.9


# ---- the conversation --------------------------------------------------------------------------------------


def official_answer(folder, pcm, use_sampling, seed):
    """What the official package says to pcm [F, 1920], with run_inference's loop: tokens [9, F], sound."""
    reference = (
        pytest.importorskip("moshi.models.loaders")
        if not os.environ.get("CI")
        else __import__("moshi.models.loaders", fromlist=["loaders"])
    )
    from moshi.models import LMGen

    info = reference.CheckpointInfo.from_hf_repo(
        "none",
        folder / MOSHI_FILE,
        folder / MIMI_FILE,
        folder / TOKENIZER_FILE,
        folder / "config.json",
        folder / "mimi_config.json",
    )
    mimi, lm = info.get_mimi("cpu"), info.get_moshi("cpu", torch.float32)
    torch.manual_seed(seed)
    gen = LMGen(lm, use_sampling=use_sampling, **info.lm_gen_config)
    tokens, sound = [], []
    with torch.no_grad(), mimi.streaming(1), gen.streaming(1):
        for number, frame in enumerate(pcm):
            codes = mimi.encode(frame[None, None])
            if number == 0:
                assert gen.step(codes) is None
            tokens.append(gen.step(codes).clone())
            sound.append(mimi.decode(tokens[-1][:, 1:]).clone())
    return torch.cat(tokens, dim=2)[0], torch.cat(sound, dim=2)[0, 0], info.get_text_tokenizer()


@pytest.mark.parametrize("how", ["greedy", "sampled", "sampled, settings of the checkpoint"])
def test_same_as_the_official_package(how, call, checkpoint, tmp_path, question):
    folder, options, seed = checkpoint, [], 4242
    if how == "greedy":
        options = ["--greedy"]
    elif how != "sampled":
        folder, seed = tmp_path / "other", 7
        shutil.copytree(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text())
        config["lm_gen_config"] = {"temp": 1.1, "temp_text": 0.9, "top_k": 20, "top_k_text": 9}
        (folder / "config.json").write_text(json.dumps(config))
        options = ["--seed", 7]
    code, out, err = call(question, "--tokens", "run.npz", "--extra-seconds", 3, *options, folder=folder)
    assert code == 0, err
    pcm = torch.from_numpy(parse(question.read_bytes())[:, 0] / np.float32(32768))
    pcm = torch.nn.functional.pad(pcm, (0, -len(pcm) % FRAME + 38 * FRAME)).view(-1, FRAME)
    tokens, sound, tokenizer = official_answer(folder, pcm, how != "greedy", seed)

    run = np.load(tmp_path / "run.npz")
    assert (
        run["codes"].dtype == np.int64 and run["codes"].shape == (17, len(pcm)) and run["frame_rate"] == 12.5
    )
    assert run["delays"].tolist() == [0, 0] + [1] * 7 + [0] + [1] * 7
    assert np.array_equal(run["codes"][:9], tokens), "the tokens differ"
    assert len(np.unique(run["codes"][1:9])) > 10, "the reference shows nothing"
    answer = parse((tmp_path / "answer.wav").read_bytes())[:, 0]
    assert np.abs(answer - (sound * 32768).round().clamp(-32768, 32767).numpy()).max() <= 1
    assert answer.std() > 300, "the answer is silent"
    said = [t for t in tokens[0].tolist() if t not in (0, 3)]
    assert said, "nothing was said"
    assert out.endswith("\n")
    pieces = [tokenizer.id_to_piece(t) for t in said]
    plain = b"".join(
        bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces
    )
    assert out.rstrip("\n") == io.TextIOWrapper(
        io.BytesIO(plain), "utf-8", "replace", newline=""
    ).read().rstrip("\n")


def test_tokens_are_aligned_as_in_forward(call, checkpoint, tmp_path, question):
    """Greedy tokens are the likeliest under `Moshi.forward` on saved codes; the user's are the codec's."""
    assert call(question, "--greedy", "--tokens", "run.npz", "--extra-seconds", 3)[0] == 0
    loaded = load_checkpoint(checkpoint)
    codes = torch.from_numpy(np.load(tmp_path / "run.npz")["codes"])[None]
    with torch.no_grad():
        output = loaded.moshi(codes)
    assert torch.equal(output.text_logits.argmax(-1), codes[:, :1])
    # In its first step the sampler's depth chain holds tokens that `forward` replaces by initial ones.
    mask = output.audio_mask.clone()
    mask[..., 0] = False
    same = (output.audio_logits.argmax(-1) == codes[:, 1:9])[mask]
    assert same.float().mean() > 0.995
    pcm = torch.from_numpy(parse(question.read_bytes())[:, 0] / np.float32(32768))
    expected = loaded.mimi.encode(torch.nn.functional.pad(pcm, (0, 3 * 24000))[None, None])
    frames = min(expected.shape[-1], codes.shape[-1])
    assert torch.equal(codes[:, 9:, :frames], expected[..., :frames])


@pytest.mark.parametrize("delays", [[0] * 17, [2, 0] + [3] * 7 + [0] + [1] * 7])
def test_other_delays(delays, call, tmp_path, question):
    folder = make_random_checkpoint(tmp_path / "ck", delays=delays)
    code, _, err = call(question, "--tokens", "run.npz", "--greedy", *QUICK, folder=folder)
    assert code == 0, err
    codes = np.load("run.npz")["codes"]
    frames, unknown = codes.shape[1], max(max(delays) - 1, 0)
    assert (codes[9:] >= 0).all() and (codes[:9, : frames - unknown] >= 0).all()
    assert (codes[:9, frames - unknown :] == -1).all()
    assert all(len(np.unique(row)) > 3 for row in codes[1:9]), "it says the same again and again"
    assert len(parse((tmp_path / "answer.wav").read_bytes())) == FRAME * (frames - unknown)


def test_stereo_is_as_heard_live(call, tmp_path, question):
    assert call(question, "-o", "mono.wav", *QUICK)[0] == 0
    assert call(question, "-o", "stereo.wav", "--stereo", *QUICK)[0] == 0
    mono, stereo = (parse((tmp_path / name).read_bytes()) for name in ("mono.wav", "stereo.wav"))
    user = parse(question.read_bytes())[:, 0]
    assert stereo.shape == (len(mono) + FRAME, 2)
    assert np.array_equal(stereo[: len(user), 0], user) and not stereo[len(user) :, 0].any()
    assert not stereo[:FRAME, 1].any() and np.array_equal(stereo[FRAME:, 1], mono[:, 0])


def test_seeds_silences_and_rates(call, checkpoint, tmp_path, question):
    def answer(*options, folder=checkpoint, file=question):
        code, _, err = call(file, "-o", "a.wav", *options, folder=folder)
        assert code == 0, err
        return (tmp_path / "a.wav").read_bytes()

    first = answer(*QUICK)
    assert answer(*QUICK) == first and answer(*QUICK, "--seed", 4242) == first
    assert answer(*QUICK, "--seed", 1) != first
    assert answer(*QUICK, "--temp", 0.1) != first and answer(*QUICK, "--temp-text", 3) != first
    assert answer(*QUICK, "--top-k", 1) != first
    greedy = answer(*QUICK, "--greedy")
    assert answer(*QUICK, "--temp", 0, "--temp-text", 0) == greedy != first
    assert answer(*QUICK, "--top-k", 1, "--top-k-text", 1) == greedy
    assert len(parse(first)) == (13 + 4) * FRAME
    assert len(parse(answer())) == (13 + 63) * FRAME  # 5 s of silence last
    assert len(parse(answer("--lead-seconds", 0.5, "--extra-seconds", 0))) == 19 * FRAME  # 6.25 + 12.5
    folder = tmp_path / "ck"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["stt_config"] = {"audio_silence_prefix_seconds": 0.16, "audio_delay_seconds": 0.8}
    config["lm_gen_config"] = {"use_sampling": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert len(parse(answer(folder=folder))) == (2 + 13 + 10) * FRAME
    assert answer("--lead-seconds", 0, *QUICK, folder=folder) == greedy
    other = tmp_path / "other.wav"
    other.write_bytes(wav(np.stack([voice(1.0, 44100), voice(1.0, 44100)], 1), 44100, form=3, width=4))
    assert len(parse(answer(*QUICK, file=other))) == (13 + 4) * FRAME
    code, out, _ = call(question, *QUICK, "--dtype", "bfloat16")
    assert code == 0


def test_words(checkpoint, capfd):
    """Pieces become words, bytes characters; padding is silent; without a tokenizer there are numbers."""
    loaded = load_checkpoint(checkpoint)
    tokenizer, config = loaded.tokenizer, loaded.moshi.config
    stream = io.StringIO()
    words = generate.Screen(tokenizer, config, stream, 0.08, None)
    euro = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert all(map(tokenizer.is_byte, euro))
    for token in [
        3,
        *tokenizer.encode("the codec"),
        0,
        3,
        *euro,
        *tokenizer.encode("word"),
        euro[0],
        3,
        *tokenizer.encode("is"),
        10**6,
        euro[0],
    ]:
        words.say(token)
    assert stream.getvalue() == " the codec€ word\ufffd is 1000000", "a character waits for its other bytes"
    words.end()
    assert stream.getvalue() == " the codec€ word\ufffd is 1000000\ufffd\n"
    stream = io.StringIO()
    words = generate.Screen(None, config, stream, 0.08, None)
    for token in (3, 17, 0, 4):
        words.say(token)
    assert stream.getvalue() == " 17 4"


def test_without_a_tokenizer_numbers_are_printed(call, checkpoint, tmp_path, question):
    folder = tmp_path / "ck"
    shutil.copytree(checkpoint, folder)
    (folder / TOKENIZER_FILE).unlink()
    code, out, err = call(question, "--tokens", "run.npz", "--extra-seconds", 2, folder=folder)
    assert code == 0, err
    text = np.load("run.npz")["codes"][0]
    assert [int(word) for word in out.split()] == [t for t in text if t not in (0, 3)]


@pytest.fixture
def live(call, monkeypatch):
    """Runs it as `call` does, on raw sound in a pipe."""

    def run(samples, *argv, folder):
        raw = (np.asarray(samples) * 32767).astype("<i2").tobytes()
        pipe = SimpleNamespace(buffer=io.BytesIO(raw), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", pipe)
        return call("-", *argv, folder=folder)

    return run


def test_live_there_is_no_silence_first(live, call, checkpoint, tmp_path, question):
    """It would stay as lag. A checkpoint that asks for it gets it in front of a recording; or who says so."""
    folder = tmp_path / "ck"
    shutil.copytree(checkpoint, folder)
    change(stt_config={"audio_silence_prefix_seconds": 0.16, "audio_delay_seconds": 0.24})(folder)

    def seconds():
        return len(parse((tmp_path / "a.wav").read_bytes())) / FRAME

    for options, frames in (((), 13), (("--lead-seconds", 0.4), 18)):
        assert live(voice(1.0), "-o", "a.wav", "--extra-seconds", 0, *options, folder=folder)[0] == 0
        assert seconds() == frames
    assert live(voice(1.0), "-o", "a.wav", folder=folder)[0] == 0 and seconds() == 13 + 3
    assert call(question, "-o", "a.wav", folder=folder)[0] == 0 and seconds() == 2 + 13 + 3


def test_the_command_line_goes_first(checkpoint):
    """A setting is what the command line says, else what the checkpoint says, else the default."""

    def settled(*argv, config):
        args = generate.read_arguments([str(generate.TINY / "question.wav"), "-o", "a.wav", *argv])
        generate.settle(args, MOSHI, config)
        return args.temp, args.temp_text, args.top_k, args.top_k_text, args.lead_seconds, args.extra_seconds

    said = ["--temp", "0", "--top-k", "3", "--extra-seconds", "0"]
    sampling = {"temp": 0.5, "temp_text": 0.6, "top_k": 7, "top_k_text": 8}
    config = {
        "lm_gen_config": sampling,
        "stt_config": {"audio_silence_prefix_seconds": 1.5, "audio_delay_seconds": 2},
    }
    assert settled(config={}) == (0.8, 0.7, 250, 25, 0, 5)
    assert settled(config=config) == (0.5, 0.6, 7, 8, 1.5, 2)
    assert settled(*said, config=config) == (0, 0.6, 3, 8, 1.5, 0)
    assert settled(*said, config={}) == (0, 0.7, 3, 25, 0, 0)


def test_progress_in_a_file(call, tmp_path, question, monkeypatch):
    """Not on a terminal: a line every five seconds, here after each frame that has taken three."""
    clock = itertools.count(0, 3)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    code, _, err = call(question, *QUICK)
    assert code == 0
    lines = [line for line in err.splitlines() if "of 1.4 s" in line and "frames" not in line]
    assert len(lines) == 17 and lines[0].startswith("0.1 of 1.4 s") and lines[-1].startswith("1.4 of 1.4 s")
    clock = itertools.count(0, 2)  # four seconds a frame: every other one
    assert call(question, *QUICK)[2].count("of 1.4 s") == 8 + 1


# ---- as a command ------------------------------------------------------------------------------------------


def test_command_pipes_and_broken_pipes(checkpoint, tmp_path, question):
    """File in, file out; raw in, raw out is the same sound; a reader that goes away ends it quietly."""
    file = subprocess.run(
        command(checkpoint, question, "-o", "a.wav", *QUICK), cwd=tmp_path, capture_output=True
    )
    assert file.returncode == 0, file.stderr
    (summary,) = file.stderr.decode().strip().splitlines()
    assert file.stdout.strip()
    assert (
        summary.startswith("17 frames, ")
        and "ms per frame" in summary
        and summary.endswith("real time: a.wav")
    )
    assert "1.4 of 1.4 s" in summary
    answer = (tmp_path / "a.wav").read_bytes()

    raw = question.read_bytes()[44:]
    pipe = subprocess.run(
        command(checkpoint, "-", "-o", "-", *QUICK), cwd=tmp_path, input=raw, capture_output=True
    )
    assert pipe.returncode == 0 and pipe.stdout == answer[44:]
    assert file.stdout.strip() in pipe.stderr, "the words go to standard error"
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "question.wav"]

    with subprocess.Popen(
        command(checkpoint, question, "-o", "-", "--extra-seconds", 60),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        assert run.stdout.read(100) == answer[44:144]
        run.stdout.close()
        err = run.stderr.read().decode()
    assert run.returncode == 0 and "rror" not in err and "Traceback" not in err

    with subprocess.Popen(
        command(checkpoint, question, "-o", "b.wav", *QUICK),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        run.stdout.close()  # nobody reads the words
        err = run.stderr.read().decode()
    assert run.returncode == 0 and "rror" not in err and (tmp_path / "b.wav").read_bytes() == answer


def test_nobody_reads_standard_error(call, tmp_path, question, monkeypatch):
    """The answer is saved all the same (`2>&1 | head -1`), and a problem ends with 2."""
    monkeypatch.setattr(
        time, "monotonic", itertools.count(0, 6).__next__
    )  # progress is printed after each frame
    for file, exit_code in ((question, 0), ("absent.wav", 2)):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            assert call(file, *QUICK)[0] == exit_code
    assert len(parse((tmp_path / "answer.wav").read_bytes())) == (13 + 4) * FRAME


def test_closed_streams_and_a_terminal_of_few_letters(checkpoint, tmp_path, question):
    closed = [
        "sh",
        "-c",
        'exec "$@" <&- >&- 2>&-',
        "sh",
        *command(checkpoint, question, "-o", "a.wav", *QUICK),
    ]
    assert subprocess.run(closed, cwd=tmp_path).returncode == 0
    run = subprocess.run(
        command(checkpoint, question, "-o", "b.wav", *QUICK),
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert run.returncode == 0, run.stderr
    assert b"?" in run.stdout and run.stdout.isascii(), "no letter beyond ASCII was to be printed"
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_live_frames_come_at_once_and_ctrl_c_keeps_a_whole_file(checkpoint, tmp_path):
    """Each frame in gives a frame out before the next is there; Ctrl-C ends with 130."""
    raw = (voice(2.0) * 32767).astype("<i2").tobytes()
    with subprocess.Popen(
        command(checkpoint, "-", "-o", "-"),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        for number in range(4):
            run.stdin.write(raw[number * 3840 : (number + 1) * 3840])
            run.stdin.flush()
            assert len(run.stdout.read(3840)) == 3840
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 130
        assert "Traceback" not in run.stderr.read().decode()

    (tmp_path / "a.wav").write_bytes(b"old")
    with subprocess.Popen(
        command(checkpoint, "-", "-o", "a.wav", "--stereo", "--tokens", "run.npz"),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        run.stdin.write(raw[: 10 * 3840])
        run.stdin.flush()
        deadline, sizes = time.monotonic() + 60, [0]
        while time.monotonic() < deadline and max(sizes) < 44 + 10 * 7680:
            time.sleep(0.02)
            sizes = [path.stat().st_size for path in tmp_path.glob("*.part")] or [0]
        assert (tmp_path / "a.wav").read_bytes() == b"old"
        for _ in range(20):  # impatient: those after the first must not cost the file
            run.send_signal(signal.SIGINT)
            time.sleep(0.0003)
        assert run.wait(120) == 130
        assert "Traceback" not in run.stderr.read().decode()
    assert parse((tmp_path / "a.wav").read_bytes()).shape == (11 * FRAME, 2)
    assert np.load(tmp_path / "run.npz")["codes"].shape == (17, 10)
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "run.npz"]


def test_ctrl_c_before_the_first_sound_writes_nothing(checkpoint, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"old")
    with subprocess.Popen(
        command(checkpoint, "-", "-o", "a.wav"),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        while run.poll() is None and not list(tmp_path.glob("*.part")):
            time.sleep(0.02)
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 130
        assert "Traceback" not in run.stderr.read().decode()
    assert (tmp_path / "a.wav").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_progress_on_a_terminal(checkpoint, tmp_path, question):
    """On a terminal the progress stands right of the words and is redrawn in its place."""
    leader, follower = os.openpty()
    run = subprocess.Popen(
        command(checkpoint, question, *QUICK),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(leader)
    assert run.wait(120) == 0
    assert shown.count(b"of 1.4 s") == 18  # 17 frames and the summary
    assert shown.count(b"\x1b7") == shown.count(b"\x1b8") == 17


# ---- what can go wrong -------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "--temp -1": "--temp",
    "--temp nan": "--temp",
    "--temp inf": "--temp",
    "--temp warm": "'warm'",
    "--temp-text -0.1": "--temp-text",
    "--top-k 0": "--top-k",
    "--top-k 2.5": "whole",
    "--top-k-text 0": "--top-k-text",
    "--extra-seconds -1": "--extra-seconds",
    "--extra-seconds nan": "--extra-seconds",
    "--lead-seconds inf": "--lead-seconds",
    "--seed -1": "--seed",
    "--seed x": "--seed",
    "--dtype int4": "--dtype",
    "--device tpu": "--device",
    "--frobnicate": "--frobnicate",
    "two more": "unrecognized",
    "-o nowhere/a.wav": "nowhere",
    "-o .": "written; name another",
    "-o question.wav": "twice; name another",
    "-o ./sub/../question.wav": "twice; name another",
    "-o link.wav": "twice; name another",
    "-o /dev/null": "written; name another",
    "--tokens -": "--tokens",
    "--tokens nowhere/r.npz": "nowhere",
    "-o answer.wav --tokens answer.wav": "name another",
    "--tokens question.wav": "name another",
    "-o - --stereo": "--stereo",
}


@pytest.mark.parametrize("line", BAD_ARGUMENTS)
def test_bad_arguments(line, call, tmp_path, question, monkeypatch):
    """Each is told before anything is loaded, and nothing is touched."""
    monkeypatch.setattr(generate, "load_checkpoint", lambda *_: pytest.fail("loaded before the check"))
    (tmp_path / "answer.wav").write_bytes(b"precious")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.wav").symlink_to("question.wav")
    before = sorted(os.listdir(tmp_path)), question.read_bytes()
    code, out, err = call(question, *line.split())
    one_line(code, err, BAD_ARGUMENTS[line])
    assert not out and (tmp_path / "answer.wav").read_bytes() == b"precious"
    assert before == (sorted(os.listdir(tmp_path)), question.read_bytes())


def test_tokens_in_the_place_of_the_answer(call, tmp_path, question):
    """The default of -o depends on what the checkpoint makes, a voice or words: seen once it is open."""
    (tmp_path / "answer.wav").write_bytes(b"precious")
    one_line(*call(question, "--tokens", "answer.wav")[::2], "answer.wav", "name another")
    assert (tmp_path / "answer.wav").read_bytes() == b"precious"


def test_missing_question_and_device(call, tmp_path, question):
    one_line(*call("absent.wav")[::2], "absent.wav")
    one_line(*call(tmp_path)[::2], f"{tmp_path}: Is a directory")
    one_line(*call("two\nlines.wav")[::2], "two lines.wav")
    one_line(*call(question, "--two\nlines")[::2], "unrecognized")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    one_line(*call("loop.wav")[::2], "loop.wav")
    one_line(*call("absent.wav", "-o", "loop.wav")[::2], "absent.wav")
    for device, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(generate.Problem, match=f"--device {device}: there is no such device"):
                generate.read_arguments([str(question), "--device", device])


def test_choice_of_device_and_precision(call, checkpoint, question, monkeypatch):
    """CUDA where there is one, else the CPU: nobody has run MPS. A narrow model is float32, without TF32."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert generate.read_arguments([str(question)]).device == ("cuda" if there else "cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    one_line(*call("absent.wav")[::2], "absent.wav")
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(moshi_min, "load_mimi", lambda *_: None)
    monkeypatch.setattr(moshi_min, "load_moshi", lambda *arguments: arguments[-1])
    assert load_checkpoint(checkpoint, "cuda").moshi == torch.float32


def change(**keys):
    """An edit of config.json."""

    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return edit


def truncate(name):
    """An edit that loses the second half of a file."""

    def edit(folder):
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    return edit


def tensor(name, key, value):
    """An edit of a tensor in a file of weights: `value` of what was there."""

    def edit(folder):
        tensors = load_file(folder / name)
        tensors[key] = value(tensors[key])
        save_file(tensors, folder / name)

    return edit


def both(*edits):
    """One edit after the other."""
    return lambda folder: [edit(folder) for edit in edits]


def put_folder(name):
    """An edit that puts a folder in the place of a file."""
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


NO_WEIGHTS = put_folder(MOSHI_FILE)  # what is told in spite of it is told before weights are read
BAD_CHECKPOINTS = {
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), ["hf download"]),
    "weights are a folder": (NO_WEIGHTS, [MOSHI_FILE, "Is a directory"]),
    "weights in 8 bits": (
        tensor(MOSHI_FILE, "text_linear.weight", lambda t: t.to(torch.int8)),
        ["text_linear.weight", "I8"],
    ),
    "codec says nan": (
        tensor(MIMI_FILE, "decoder.model.14.conv.conv.bias", lambda t: t * math.nan),
        ["not finite"],
    ),
    "file name is a number": (both(NO_WEIGHTS, change(moshi_name=3)), ["moshi_name"]),
    "file name is a list": (both(NO_WEIGHTS, change(mimi_name=["a"])), ["mimi_name"]),
    "file name is null": (both(NO_WEIGHTS, change(tokenizer_name=None)), ["tokenizer_name"]),
    "file name is false": (both(NO_WEIGHTS, change(mimi_config_name=False)), ["mimi_config_name"]),
    "no tokenizer of that name": (change(tokenizer_name="absent.model"), ["absent.model", "No such file"]),
    "unknown sampling": (both(NO_WEIGHTS, change(lm_gen_config={"topk": 3})), ["topk"]),
    "bad use_sampling": (both(NO_WEIGHTS, change(lm_gen_config={"use_sampling": "no"})), ["use_sampling"]),
    "config without a bottom": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 200_000),
        ["config.json"],
    ),
    "no folder": (shutil.rmtree, [MOSHI_FILE, MIMI_FILE, "hf download kyutai/moshiko-pytorch-bf16"]),
    "no weights": (lambda folder: (folder / MOSHI_FILE).unlink(), [MOSHI_FILE, "hf download"]),
    "no codec": (lambda folder: (folder / MIMI_FILE).unlink(), [MIMI_FILE, "hf download"]),
    "weights cut": (truncate(MOSHI_FILE), [MOSHI_FILE]),
    "codec cut": (truncate(MIMI_FILE), [MIMI_FILE]),
    "tokenizer cut": (truncate(TOKENIZER_FILE), [TOKENIZER_FILE]),
    "pickle": (lambda folder: torch.save({}, folder / MOSHI_FILE), [MOSHI_FILE, "SafeTensors"]),
    "misshapen": (change(dim=128), ["shape"]),
    "missing tensors": (change(num_layers=4), ["missing"]),
    "extra tensors": (change(num_layers=2), ["not known"]),
    "config is no JSON": (truncate("config.json"), ["config.json"]),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json"]),
    "unknown key": (change(frobnicate=1), ["frobnicate"]),
    "bad value": (change(num_heads=0), ["num_heads"]),
    "another kind": (change(model_type="hibiki"), ["hibiki"]),
    "no codec config": (change(mimi_config_name="absent.json"), ["absent.json"]),
    "bad temp": (change(lm_gen_config={"temp": -1}), ["temp"]),
    "bad top_k": (change(lm_gen_config={"top_k": "many"}), ["top_k"]),
    "bad lm_gen_config": (change(lm_gen_config=7), ["lm_gen_config"]),
    "bad stt_config": (change(stt_config={"audio_delay_seconds": None}), ["audio_delay_seconds"]),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints(name, call, checkpoint, tmp_path, question):
    edit, said = BAD_CHECKPOINTS[name]
    folder = tmp_path / "ck"
    shutil.copytree(checkpoint, folder)
    edit(folder)
    (tmp_path / "answer.wav").write_bytes(b"precious")
    code, out, err = call(question, folder=folder)
    one_line(code, err, *said)
    assert not out or name == "codec says nan"  # after a word
    assert (tmp_path / "answer.wav").read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.part"))


def test_failures_on_the_way_leave_nothing_behind(call, tmp_path, question, monkeypatch):
    """A full disk and a lack of memory are told in a line, a bug keeps its traceback; no half file stays."""
    (tmp_path / "answer.wav").write_bytes(b"precious")
    for error, said in (
        (OSError(28, "No space left on device"), "output: No space"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(generate.SoundWriter, "finish", fail)
        code, _, err = call(question, *QUICK)
        one_line(code, err, said)
        assert (tmp_path / "answer.wav").read_bytes() == b"precious" and not list(tmp_path.glob("*.part"))
    for error in (ZeroDivisionError, RuntimeError):

        def fail(*_, error=error):
            raise error("a bug")

        monkeypatch.setattr(generate.SoundWriter, "finish", fail)
        with pytest.raises(error, match="a bug"):
            call(question, *QUICK)
    assert (tmp_path / "answer.wav").read_bytes() == b"precious" and not list(tmp_path.glob("*.part"))


def test_nothing_on_standard_input(checkpoint, tmp_path):
    run = subprocess.run(
        command(checkpoint, "-", "-o", "a.wav", "--extra-seconds", 0),
        cwd=tmp_path,
        input=b"",
        capture_output=True,
    )
    one_line(run.returncode, run.stderr.decode(), "standard input")
    assert not os.listdir(tmp_path)


def test_help_names_every_option(call):
    code, out, _ = call("--help")
    assert code == 0
    for option in (
        "--checkpoint",
        "--device",
        "--dtype",
        "--seed",
        "--greedy",
        "--temp",
        "--temp-text",
        "--top-k",
        "--top-k-text",
        "--lead-seconds",
        "--extra-seconds",
        "--stereo",
        "--tokens",
        "--output",
    ):
        assert option in out


@pytest.mark.skipif(not (generate.TINY / MOSHI_FILE).exists(), reason="tiny/ holds no checkpoint yet")
def test_without_arguments(tmp_path):
    """`python generate.py`: the question in tiny/, its checkpoint, answer.wav in the current folder."""
    run = subprocess.run([sys.executable, str(ROOT / "generate.py")], cwd=tmp_path, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert parse((tmp_path / "answer.wav").read_bytes()).std() > 10 and run.stdout.strip()
    assert os.listdir(tmp_path) == ["answer.wav"] and Path(generate.TINY / "question.wav").exists()
