"""What the experiments of LESSONS.md share: the tiny checkpoint, its recordings, the loop, two measures, and
how to break something and have it back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from wave import open as open_wave

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generate import converse, read_wav
from moshi_min import UNGENERATED, Checkpoint, Moshi, MoshiConfig, MoshiGen, load_checkpoint

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

    Greedy, or drawn with a `seed`. `text` forces text tokens, -2 leaves one free; Moshi makes its first frame
    before it is given any, so number f is that of frame f + 1. `change` gets the user's codes [1, 8, 1] of
    each frame and returns what Moshi hears in their place.
    """
    torch.manual_seed(seed or 0)
    gen = MoshiGen(checkpoint.moshi, greedy=seed is None, **checkpoint.config["lm_gen_config"])
    texts = [torch.tensor([token]) for token in text or []]
    conversation = converse(checkpoint.mimi, gen, sound.split(FRAME, dim=-1), change, texts)
    tokens, waves = zip(*[(said, wave) for _, said, wave in conversation if said is not None])
    return torch.cat(tokens, dim=-1)[0], torch.cat(waves, dim=-1)[0, 0]


OUTSIDE, START = 98, 99  # in `strips`: a token before the first frame; the token that starts a stream


def strips(delays: tuple[int, ...], own: int, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The first steps of the sampler of a small random Moshi, the first `own` of whose streams are its own.

    For each step: its strip [streams, columns] just before it moves, the tokens that the model reads
    [streams], and the frame that comes out [own] or None. Each token is the number of its frame, so that one
    sees where it goes: those of the user are given so, and those that Moshi makes are forced.
    """
    depth = {"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 1}
    sizes = {"n_q": len(delays) - 1, "dep_q": own - 1, "card": START, "text_card": START, "context": 10}
    moshi = Moshi(MoshiConfig(dim=8, num_layers=1, num_heads=1, delays=delays, **sizes, **depth))
    gen, temporal, seen = MoshiGen(moshi), moshi.temporal, []

    def watch(tokens: Tensor, state: dict) -> tuple[Tensor, Tensor]:
        seen[:] = gen.strip[0, :, :1].clone(), tokens[0, :, 0]  # the column that will leave, what is read
        return temporal(tokens, state)

    moshi.temporal = watch
    for step in range(steps):
        heard = torch.full((1, len(delays) - own, 1), max(step - 1, 0))  # frame 0 goes in twice
        made = torch.tensor([step - shift if shift <= step else OUTSIDE for shift in delays[:own]])
        frame = gen.step(heard, text=made[:1], audio=made[None, 1:])
        strip = torch.cat([seen[0], gen.strip[0, :, :-2]], dim=1)  # the last columns are always empty
        yield strip, seen[1], None if frame is None else frame[0, :, 0]


def sign(token: int) -> str:
    """How a token of `strips` is shown: S for a stream's start, x before frame 0, a dot if not made yet."""
    return {START: "S", OUTSIDE: "x", UNGENERATED: "."}.get(int(token), str(int(token)))


def words(checkpoint: Checkpoint, text: Tensor) -> str:
    """What a text stream [F] says."""
    return checkpoint.tokenizer.decode([token for token in text.tolist() if token not in (PAD, EPAD)])


def save_wav(path: str | Path, sound: Tensor, rate: int = RATE) -> None:
    """Writes sound of any shape as a 16-bit WAV, mono."""
    with open_wave(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        samples = (sound.flatten() * 32768).round().clamp(-32768, 32767)
        file.writeframes(samples.short().numpy().astype("<i2").tobytes())


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


def pitch(sound: Tensor) -> Tensor:
    """Pitch of a sound every 10 ms [Hz], 0 where there is none: the lag, of 70 to 400 Hz, after which 40 ms
    of it are most like themselves (autocorrelation), if they are so by more than one half."""
    lags, blocks = torch.arange(RATE // 400, RATE // 70), sound.flatten().unfold(0, 960, 240)
    alike = torch.fft.irfft(torch.fft.rfft(blocks, 2048).abs() ** 2)[:, lags] / (1 - lags / 960)
    best, index = (alike / (blocks.pow(2).sum(1, keepdim=True) + 1e-3)).max(dim=1)
    return torch.where(best > 0.5, RATE / lags[index], 0)


def pitch_lost(x: Tensor, y: Tensor) -> float:
    """The share of the moments where x has a pitch at which that of y is more than a fifth away."""
    one, other = pitch(x), pitch(y)
    return ((one - other).abs() > one / 5)[one > 0].float().mean().item()


@contextmanager
def broken(*things, **changes) -> Iterator[None]:
    """Replaces attributes of things (a module, a class, an object) for a block, and puts them back even if
    the block fails: `with broken(config, delays=17 * (0,)):`."""
    kept = [(thing, name, getattr(thing, name)) for thing in things for name in changes]
    try:
        for thing, name, _ in kept:
            setattr(thing, name, changes[name])
        yield
    finally:
        for thing, name, value in kept:
            setattr(thing, name, value)


@contextmanager
def kept_weights(module: nn.Module) -> Iterator[None]:
    """After the block the module has the weights that it had before, even if the block fails."""
    kept = {name: weight.clone() for name, weight in module.state_dict().items()}
    try:
        yield
    finally:
        module.load_state_dict(kept)
