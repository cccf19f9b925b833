"""tools/prompt.py: the history that gives PersonaPlex a voice and a role, against NVIDIA's sampler.

The model is small, but has the released vocabularies and streams, since the prompt's silence and tone are
codes of the released Mimi. It is wide enough for sums of embeddings to be taken apart again."""

import json
import pickle

import numpy as np
import prompt
import pytest
import torch
from family import PersonaPlexGen, personaplex_lm, write_folder
from random_checkpoint import make_tokenizer
from reference import lm_config, mimi_config, official_mimi, save
from test_convert import convert, lively, opened

from files import read_tokens, wav_header
from moshi_min import MIMI_FILE, TOKENIZER_FILE, MoshiGen

CONFIG = lm_config(
    dim=512,
    num_layers=1,
    context=100,
    n_q=16,
    dep_q=16,
    card=2048,
    text_card=320,
    depformer_num_layers=1,
    depformer_context=16,
    delays=[0] + 2 * [0, 1, 1, 1, 1, 1, 1, 1],
    model_type="personaplex",
    mimi_config_name="mimi.json",
)
MIMI = mimi_config(codebooks=8, codebook_size=2048, positions=4)
FRAMES, PAUSE = 12, int(0.5 * MIMI["frame_rate"])
ROLE = "Today"


def write_wav(path, sound, rate):
    """16-bit sound [T], mono; returns the path."""
    samples = (sound * 32768).short().numpy().astype("<i2").tobytes()
    path.write_bytes(wav_header(len(samples), 1, rate) + samples)
    return path


@pytest.fixture(scope="module")
def plex(tmp_path_factory):
    """(NVIDIA's model, ours, the folder of ours, the official codec, the words)."""
    folder = tmp_path_factory.mktemp("plex")
    official, mimi = personaplex_lm(CONFIG, seed=2), official_mimi(MIMI, seed=3)
    given, words = write_folder(folder / "given", CONFIG, official.state_dict()), make_tokenizer(320)
    (given / "mimi.json").write_text(json.dumps(MIMI))
    (given / TOKENIZER_FILE).write_bytes(words.serialized_model_proto())
    save(mimi, given / MIMI_FILE)
    assert "to be put there" not in convert.convert(given, folder / "out")
    return official, opened(folder / "out"), folder / "out", mimi, words


def prompted(official, voice, text):
    """NVIDIA's sampler after a voice [8, N], a pause, a text and a pause, a frame in each call."""
    silence, tone = torch.tensor(prompt.SILENCE), torch.tensor(prompt.TONE)
    frames = [(code, 3) for code in voice.T] + [(silence, 3)] * PAUSE
    frames += [(silence, token) for token in text] + [(silence, 3)] * PAUSE
    sampler = PersonaPlexGen(official, len(frames) + 70)
    for moshi, token in frames:
        sampler.step(tone, moshi, token)
    return sampler


@torch.no_grad()
def test_history(plex, tmp_path):
    """Ours goes on from it as NVIDIA's sampler does after its prompts; --history takes the file."""
    official, ours, folder, mimi, words = plex
    sound = torch.sin(torch.arange(FRAMES * mimi.frame_size - 50) ** 1.3 * 0.01) * 0.2
    write_wav(tmp_path / "voice.wav", sound, mimi.sample_rate)
    frames = prompt.make(folder, tmp_path / "out.npz", tmp_path / "voice.wav", f"  {ROLE} ")
    text = words.encode(f"<system> {ROLE} <system>")
    assert frames == FRAMES - 1 + 2 * PAUSE + len(text)
    codes = read_tokens(tmp_path / "out.npz", [320] + 16 * [2048], 9, 1)
    loud = np.frombuffer((tmp_path / "voice.wav").read_bytes()[44:], "<i2") / 2.0**15
    loud = torch.tensor(loud * 10 ** ((-24 - prompt.loudness(torch.tensor(loud), mimi.sample_rate)) / 20))
    voice = mimi.encode(torch.nn.functional.pad(loud.float(), (0, 50))[None, None])[0]
    assert codes[1:9, : FRAMES - 1].equal(voice[:, 1:]) and len(voice.unique()) > 50

    user = torch.randint(2048, (8, 62))
    with official.streaming(1):
        sampler = prompted(official, voice, text)
        # What it was given, from its second frame on, each stream without its delay.
        given = [sampler.said[k, 1 + d : 1 + frames + d] for k, d in enumerate(CONFIG["delays"])]
        assert codes.equal(torch.stack(given))
        theirs = [sampler.step(frame) for frame in user.T]
    gen = MoshiGen(ours, greedy=True)
    mine = [gen.prefill(codes[None])] + [gen.step(frame[None, :, None]) for frame in user.T[:-1]]
    mine = torch.cat(mine, -1)
    assert mine[0].equal(torch.stack(theirs, -1)[:9])
    lively(mine)


@torch.no_grad()
def test_embeddings(plex, tmp_path):
    """A `.pt` as NVIDIA's sampler saves it after a voice, in bfloat16: the codes come out again."""
    official, _, folder, _, _ = plex
    voice = torch.randint(2048, (8, FRAMES))
    sampler = PersonaPlexGen(official, FRAMES)
    with official.streaming(1):
        for frame in voice.T:
            sampler.step(torch.tensor(prompt.TONE), frame, 3)
    cache = torch.stack(
        [sampler.said[:, s] for s in sorted(range(FRAMES - 3, FRAMES + 1), key=lambda s: s % 4)], 1
    )
    sums = torch.stack(sampler.sums).bfloat16()
    assert sums.shape == (FRAMES - 1, 1, 1, 512)
    torch.save({"embeddings": sums, "cache": cache[None]}, tmp_path / "voice.pt")
    prompt.make(folder, tmp_path / "out.npz", tmp_path / "voice.pt", "")
    codes = np.load(tmp_path / "out.npz")["codes"]
    assert (codes[1:9, : FRAMES - 1] == voice[:, 1:].numpy()).all()
    assert codes.shape[1] == FRAMES - 1 + 2 * PAUSE and (codes[0] == 3).all()


def test_loudness():
    """The values of pyloudnorm 0.2.0, for sounds with pauses, deep and high, at two rates."""
    t = np.arange(60000) / 24000
    deep = 0.4 * np.sin(2 * np.pi * 997 * t) * (t < 1.1) + 0.2 * np.sin(2 * np.pi * 60 * t)
    sound = (deep + 0.02 * np.sin(2 * np.pi * 3000 * t) * (t > 1.8)) * ((t < 0.3) | (t > 0.5))
    assert prompt.loudness(torch.from_numpy(sound), 24000) == pytest.approx(-14.569017825, abs=1e-6)
    t = np.arange(30000) / 16000
    sound = 0.1 * np.sin(2 * np.pi * 200 * t**2) * (t < 1.2) + 1e-5 * np.sin(2 * np.pi * 500 * t)
    assert prompt.loudness(torch.from_numpy(sound), 16000) == pytest.approx(-24.741528847, abs=1e-6)
    t = np.arange(16000 * 8) / 16000  # loud, then quiet, then as good as silent
    sound = np.sin(2 * np.pi * 700 * t) * (0.1 * (t < 0.8) + 0.018 * ((t >= 0.8) & (t < 1.8)) + 1e-6)
    assert prompt.loudness(torch.from_numpy(sound), 16000) == pytest.approx(-24.424844102, abs=1e-6)


def test_rows_that_add_up():
    """In so narrow tables the first guesses are wrong for every second sum."""
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(300, 96, generator=generator) for _ in range(8)]
    rows = torch.randint(300, (8, 20), generator=generator)
    sums = sum(table[row] for table, row in zip(tables, rows))
    assert prompt.rows_that_add_up(sums, tables).equal(rows)


def test_tagged():
    assert (
        prompt.tagged(" Be kind. ")
        == prompt.tagged("<system> Be kind. <system>")
        == "<system> Be kind. <system>"
    )


def spoiled_voice(kind, path):
    """A voice that is none; its path and what the line says."""
    wav, pt = path.with_suffix(".wav"), path.with_suffix(".pt")
    sums, cache = torch.randn(5, 1, 1, 512), torch.zeros(1, 17, 4, dtype=torch.long)
    if kind == "silent":
        return write_wav(wav, torch.zeros(5000), 1000), "silent"
    if kind == "short":
        return write_wav(wav, torch.ones(300) * 0.1, 1000), "0.4 s"
    if kind == "a program":
        pt.write_bytes(pickle.dumps(print, protocol=2))
        return pt, "not a voice"
    content = {
        "text": "words",
        "other keys": {"a": sums},
        "other sizes": {"embeddings": sums[..., :100], "cache": cache},
        "another checkpoint": {"embeddings": sums, "cache": cache},
        "one frame": {"embeddings": sums[:1], "cache": cache},
    }[kind]
    torch.save(content, pt)
    return pt, "not a voice" if kind in ("text", "other keys") else "its"


KINDS = [
    "silent",
    "short",
    "a program",
    "text",
    "other keys",
    "other sizes",
    "another checkpoint",
    "one frame",
]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_voices(plex, tmp_path, kind):
    """One plain line, and nothing written."""
    voice, says = spoiled_voice(kind, tmp_path / "voice")
    with pytest.raises(ValueError, match=f"voice.*{says}"):
        prompt.make(plex[2], tmp_path / "out.npz", voice, "")
    assert not (tmp_path / "out.npz").exists()


def test_other_checkpoints(tmp_path):
    """The prompt's codes mean nothing to a Moshi of other sizes."""
    write_folder(tmp_path / "other", lm_config(), {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="only PersonaPlex"):
        prompt.make(tmp_path / "other", tmp_path / "out.npz", tmp_path / "voice.wav", "")
