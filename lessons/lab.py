"""What the experiments of LESSONS.md share: the tiny checkpoint, its recordings, the loop, two measures."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import converse, read_wav
from moshi_min import Checkpoint, MoshiGen, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FRAME, RATE = 1920, 24000  # samples in a frame, samples a second
PAD, EPAD = 3, 0  # of the text stream


def tiny() -> Checkpoint:
    """The trained checkpoint of this repository: (moshi, mimi, tokenizer, config)."""
    return load_checkpoint(ROOT / "tiny")


def recording(name: str, extra_seconds: float = 4) -> Tensor:
    """A recording of tiny/ with silence after it, in whole frames: [1, 1, T]."""
    sound, _ = read_wav(ROOT / "tiny" / name)
    extra = -len(sound) % FRAME + int(extra_seconds * 12.5) * FRAME
    return F.pad(sound, (0, extra))[None, None]


def talk(
    checkpoint: Checkpoint,
    sound: Tensor,
    seed: int | None = None,
    text: list[int] | None = None,
    change=lambda codes: codes,
) -> tuple[Tensor, Tensor]:
    """The duplex loop of lesson 10: sound [1, 1, T] -> tokens [9, F] and Moshi's sound [F * 1920].

    Greedy, or drawn with a `seed`. `text` forces a text token at each step, -2 leaves it free. `change` gets
    the user's codes [1, 8, 1] of each frame and returns what Moshi hears in their place.
    """
    torch.manual_seed(seed or 0)
    gen = MoshiGen(checkpoint.moshi, greedy=seed is None, **checkpoint.config["lm_gen_config"])
    texts = [torch.tensor([token]) for token in text or []]
    conversation = converse(checkpoint.mimi, gen, sound.split(FRAME, dim=-1), change, texts)
    _, tokens, waves = zip(*conversation)
    return torch.cat(tokens, dim=-1)[0], torch.cat(waves, dim=-1)[0, 0]


def words(checkpoint: Checkpoint, text: Tensor) -> str:
    """What a text stream [F] says."""
    return checkpoint.tokenizer.decode([token for token in text.tolist() if token not in (PAD, EPAD)])


def decibels(sound: Tensor, block: int = FRAME) -> Tensor:
    """Loudness of each frame (or block) of sound [T]: its RMS in dB of full scale, -180 for silence."""
    return 20 * torch.log10(sound.flatten().unfold(0, block, block).pow(2).mean(1).sqrt() + 1e-9)


def distance(x: Tensor, y: Tensor) -> float:
    """How different two sounds are: the mean difference of their levels in dB, where one is over -70 dB."""
    levels = []
    for sound in (x, y):
        bins = torch.stft(sound.flatten(), 1024, 256, window=torch.hann_window(1024), return_complex=True)
        levels.append(20 * torch.log10(bins.abs() / 256 + 10 ** (-70 / 20)))
    loud = torch.maximum(*levels) > -64  # 6 dB over the floor that was added
    return (levels[0] - levels[1])[loud].abs().mean().item()
