#!/usr/bin/env python3
"""Makes the history that gives PersonaPlex a voice and a role: `generate.py --history OUT` goes on from it.

    python tools/prompt.py CHECKPOINT OUT.npz --voice VOICE --text "You enjoy having a good conversation."

CHECKPOINT is a folder of tools/convert.py. VOICE is a WAV, or one of the `.pt` files that come with
PersonaPlex: sums of embeddings, in which the codes are found again. In the history Moshi speaks in that
voice, is silent for half a second, then while it is given the text, a token a frame, and for half a second
more. From the user comes a tone meanwhile. NVIDIA's program does so in `LMGen.step_system_prompts`.
"""

from __future__ import annotations

import argparse
import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lazy import open_tensors, take  # noqa: E402
from relatives import file_name, read_config  # noqa: E402
from sentencepiece import SentencePieceProcessor  # noqa: E402

from files import plain, read_json, read_wav, resample, run_program, show, whole_file  # noqa: E402
from mimi_min import MimiConfig, load_mimi  # noqa: E402
from moshi_min import MoshiConfig  # noqa: E402

# What the released Mimi makes of a frame of silence and of a tone of 440 Hz: PersonaPlex was trained on them.
SILENCE = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
TONE = (430, 1268, 381, 1611, 1095, 1495, 56, 472)
LOUDNESS = -24.0  # of a voice, in LUFS
PAUSE = 0.5  # seconds of silence before and after the text


def history(
    voice: Tensor, text: Sequence[int], config: MoshiConfig, pause: int, silence=SILENCE, tone=TONE
) -> Tensor:
    """The codes [1 + n_q, F] of all streams, aligned: a voice [dep_q, N], a pause, a text, a pause."""
    silent = torch.tensor(silence)[:, None].expand(-1, 2 * pause + len(text))
    moshi = torch.cat([voice, silent], dim=1)
    user = torch.tensor(tone)[:, None].expand(-1, moshi.shape[1])
    said = torch.full_like(moshi[:1], config.existing_text_padding_id)
    start = voice.shape[1] + pause
    said[0, start : start + len(text)] = torch.tensor(text)
    return torch.cat([said, moshi, user])


# ------------------------------------------------------------------------------------------- a voice as sound


def weighting(size: int, rate: int) -> Tensor:
    """The response of the K-weighting of ITU-R BS.1770 at the frequencies of a spectrum of `size` samples: a
    shelf that lifts what the head lifts, and a high pass; their formulas are those of any audio equaliser."""
    z = torch.exp(-2j * math.pi / size * torch.arange(size // 2 + 1, dtype=torch.float64))

    def response(numerator: list[float], denominator: list[float]) -> Tensor:
        return sum(c * z**n for n, c in enumerate(numerator)) / sum(
            c * z**n for n, c in enumerate(denominator)
        )

    angle, gain = 2 * math.pi * 1500 / rate, 10 ** (4 / 40)
    cos, slope = math.cos(angle), math.sqrt(2 * gain) * math.sin(angle)
    up, down = (gain + 1) + (gain - 1) * cos, (gain + 1) - (gain - 1) * cos
    shelf = response(
        [gain * (up + slope), -2 * gain * ((gain - 1) + (gain + 1) * cos), gain * (up - slope)],
        [down + slope, 2 * ((gain - 1) - (gain + 1) * cos), down - slope],
    )
    angle = 2 * math.pi * 38 / rate
    cos, sin = math.cos(angle), math.sin(angle)
    high_pass = response([(1 + cos) / 2, -(1 + cos), (1 + cos) / 2], [1 + sin, -2 * cos, 1 - sin])
    return shelf * high_pass


def loudness(sound: Tensor, rate: int) -> float:
    """Of sound [T], in LUFS (ITU-R BS.1770-4): blocks of 0.4 s that overlap by three quarters, without the
    silent ones, and then without those 10 LU below the rest."""
    size = len(sound) + rate  # a spectrum goes round: silence for the filters to ring out in
    heard = torch.fft.irfft(torch.fft.rfft(F.pad(sound.double(), (0, rate))) * weighting(size, rate), n=size)
    block, seconds = int(0.4 * rate), len(sound) / rate
    starts = [int(0.1 * number * rate) for number in range(round((seconds - 0.4) / 0.1) + 1)]
    power = torch.stack(
        [heard[start : min(start + block, len(sound))].square().sum() / block for start in starts]
    )

    def level(mean: Tensor) -> Tensor:
        return -0.691 + 10 * torch.log10(mean)

    power = power[level(power) >= -70]
    power = power[level(power) > level(power.mean()) - 10]
    return level(power.mean()).item()


def voice_of_sound(path: Path, weights: Path, sizes: MimiConfig, codebooks: int) -> Tensor:
    """The codes [codebooks, N] of a WAV, made as loud as PersonaPlex wants it. `weights`, `sizes`: Mimi's."""
    sound, rate = read_wav(path)
    sound = resample(sound, rate, sizes.sample_rate)
    if len(sound) < 0.4 * sizes.sample_rate:
        raise ValueError(f"{path}: a voice needs 0.4 s at least, some seconds are better")
    level = loudness(sound, sizes.sample_rate)
    if not math.isfinite(level):
        raise ValueError(f"{path}: it is silent")
    mimi = load_mimi(weights, sizes, codebooks)
    return mimi.encode(sound[None, None] * 10 ** ((LOUDNESS - level) / 20))[0]


# -------------------------------------------------------------------------------------- a voice as embeddings


def rows_that_add_up(totals: Tensor, tables: list[Tensor]) -> Tensor:
    """totals [N, D], each the sum of a row of every table [rows, D] -> the rows' numbers [tables, N]. One
    table after the other takes the row that leaves the least, until none changes."""
    found = torch.full((len(tables), len(totals)), -1)
    rest = totals.clone()
    for _ in range(50):
        before = found.clone()
        for k, table in enumerate(tables):
            rest += table[found[k]] if found[k, 0] >= 0 else 0
            found[k] = (table.square().sum(1) - 2 * rest @ table.T).argmin(1)
            rest -= table[found[k]]
        if found.equal(before):
            break
    return found


def voice_of_embeddings(path: Path, weights: Path, config: MoshiConfig) -> Tensor:
    """The codes [dep_q, N - 1] of a `.pt`: a voice of N frames, without the first, which is never heard.

    Steps 0 to N - 2 are sums of embeddings, those from N - 1 on tokens. Stream k of frame f is read in step
    f + delays[k].
    """
    sums, cache = read_voice(path, config)
    own, frames, tensors = config.dep_q, len(sums) + 1, open_tensors([weights])
    text = take(tensors, "text_emb.weight", [config.text_card + 1, config.dim]).read()
    names = [f"emb.{k}.weight" for k in range(config.n_q)]
    tables = [take(tensors, name, [config.card + 1, config.dim]).read().float() for name in names]

    steps = torch.arange(1, frames - 1)  # step 0 reads the initial tokens
    known = text[config.existing_text_padding_id].float()
    for table, code, delay in zip(tables[own:], TONE, config.delays[1 + own :]):
        known = known + table[torch.where(steps <= delay, config.card, code)]
    unknown = sums[1:] - known
    rows = rows_that_add_up(unknown, tables[:own])
    rest = unknown - sum(table[row] for table, row in zip(tables, rows))
    if (rest.norm(dim=1) > 0.05 * sums[1:].norm(dim=1)).any():  # rounding to bfloat16 leaves 0.01
        raise ValueError(f"{path}: its embeddings are not of this checkpoint's tables")
    read = torch.full((own, frames + max(config.delays)), -1)  # Moshi's tokens in all steps
    read[:, 1 : frames - 1] = rows
    for step in range(frames - 1, read.shape[1]):
        read[:, step] = cache[1 : 1 + own, step % cache.shape[1]]
    voice = torch.stack([read[k, 1 + d : frames + d] for k, d in enumerate(config.delays[1 : 1 + own])])
    if voice.min() < 0 or voice.max() >= config.card:
        raise ValueError(f"{path}: its cache holds {voice.min()} to {voice.max()}, which are no codes")
    return voice


def read_voice(path: Path, config: MoshiConfig) -> tuple[Tensor, Tensor]:
    """What a `.pt` holds: `embeddings` [N - 1, 1, 1, D] as [N - 1, D], and `cache` [1, 1 + n_q, columns] as
    [1 + n_q, columns], the last tokens, those of step s in column s % columns."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)  # a pickle, of tensors only
        sums, cache = stored["embeddings"].float().flatten(1), stored["cache"][0].long()
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a voice of PersonaPlex, which holds embeddings and a cache") from None
    fits = sums.shape[1:] == (config.dim,) and len(cache) == 1 + config.n_q
    if not fits or len(sums) < 2 or cache.shape[1:].numel() < max(config.delays) + 2:
        raise ValueError(f"{path}: its sizes are not those of the checkpoint")
    return sums, cache


# ------------------------------------------------------------------------------------------------ the command


def make(checkpoint: Path, out: Path, voice: Path, text: str) -> int:
    """Writes the history to `out`, and returns its frames. ValueError and OSError say what is wrong."""
    given = read_config(checkpoint)
    config, sizes = MoshiConfig.from_dict(given), MimiConfig()
    if config.n_q != 2 * len(SILENCE) or config.dep_q != len(SILENCE) or config.card <= max(SILENCE + TONE):
        raise ValueError(f"{checkpoint}: only PersonaPlex, converted, is given a prompt like this")
    if given.get("mimi_config_name"):
        sizes = read_json(checkpoint / file_name(given, "mimi_config_name"), MimiConfig.from_dict)
    if voice.suffix == ".pt":
        codes = voice_of_embeddings(voice, checkpoint / file_name(given, "moshi_name"), config)
    else:
        codes = voice_of_sound(voice, checkpoint / file_name(given, "mimi_name"), sizes, config.dep_q)
        codes = codes[:, 1:]  # PersonaPlex never heard the first frame
    tokenizer = SentencePieceProcessor()
    tokenizer.LoadFromSerializedProto((checkpoint / file_name(given, "tokenizer_name")).read_bytes())
    codes = history(codes, tokenizer.encode(tagged(text)), config, int(PAUSE * sizes.frame_rate))
    with whole_file(out) as file:
        np.savez(file, codes=codes.numpy(), delays=config.delays, frame_rate=sizes.frame_rate)
    return codes.shape[1]


def tagged(text: str) -> str:
    """As PersonaPlex was trained: <system> around the text."""
    text = text.strip()
    whole = text.startswith("<system>") and text.endswith("<system>")
    return text if whole or not text else f"<system> {text} <system>"


def main() -> int:
    """Exit codes: 0, or 2 after what can be put right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="PersonaPlex, converted")
    add("out", type=Path, metavar="OUT.npz", help="the history")
    add("--voice", type=Path, required=True, help="a WAV, or a .pt of PersonaPlex")
    add("--text", default="", help="who Moshi is and what it knows")
    arguments = parser.parse_args()
    try:
        frames = make(**vars(arguments))
    except (ValueError, RuntimeError, OSError) as error:
        show(f"prompt.py: {plain(error)}\n", sys.stderr)
        return 2
    show(f"{arguments.out}: {frames} frames\n", sys.stdout)
    return 0


if __name__ == "__main__":
    run_program(main)
