"""What all training here shares: random numbers, progress, files of work, and the one training loop."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from files import whole_file

FOLDER = Path(__file__).resolve().parent  # where the checkpoint goes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_numbers(*seed: int) -> np.random.Generator:
    """A generator for one purpose and step, so that a run that goes on draws what it would have drawn."""
    return np.random.default_rng(seed)


def pick(rng: np.random.Generator, those: list):
    """One of them."""
    return those[int(rng.integers(len(those)))]


_started: dict[str, tuple[float, int, float]] = {}


def progress(what: str, done: int, total: int, more: str = "") -> None:
    """A line on standard error every 20 s: how far it is and how long it will take."""
    now = time.monotonic()
    started, first, shown = _started.get(what, (now, done, 0.0))
    if now - shown > 20 or done == total:
        left = (now - started) / 60 * (total - done) / max(1, done - first)
        more += f", {left:.1f} min left" if done > first else ""
        print(f"{what}: {done} of {total}{more}", file=sys.stderr, flush=True)
        shown = now
    _started[what] = (started, first, shown)
    if done == total:
        del _started[what]  # the next of this name starts anew


# ------------------------------------------------------------------------------------------------------ files


def forget(work: Path, *patterns: str) -> None:
    """Removes work files that what is made now will make invalid."""
    for pattern in patterns:
        for path in work.glob(pattern):
            path.unlink()


def needed(path: Path, stage: str) -> Path:
    """The path, if an earlier stage has made it."""
    if not path.exists():
        raise SystemExit(f"{path} is missing; first run: python tiny/train.py {stage}")
    return path


def finished(path: Path, stage: str) -> Path:
    """The path of a training's file, if that has come to its end."""
    saved = torch.load(needed(path, stage), map_location="cpu")
    if saved["step"] < saved["steps"]:
        at = f"{saved['step']} of {saved['steps']} steps"
        raise SystemExit(f"{path} is at {at}; first go on: python tiny/train.py {stage}")
    return path


def goes_on(path: Path, steps: int) -> bool:
    """Whether this training has anything left to do."""
    return not path.exists() or torch.load(path, map_location="cpu")["step"] < steps


def save_progress(path: Path, **what) -> None:
    """Keeps what a stage needs to go on: state dicts of modules and optimizers, the step, the curve."""
    kept = {key: thing.state_dict() if hasattr(thing, "state_dict") else thing for key, thing in what.items()}
    with whole_file(path) as file:
        torch.save(kept, file)


def resume(path: Path, **parts) -> tuple[int, list[list]]:
    """Puts back what `save_progress` kept, if it did: the step to go on with, and the curve so far."""
    if not path.exists():
        return 0, []
    saved = torch.load(path, map_location="cpu")
    for key, part in parts.items():
        part.load_state_dict(saved[key])
    return saved["step"], saved["history"]


def write_curve(path: Path, names: tuple[str, ...], history: list[list]) -> None:
    """A loss curve as text: a step a row."""
    rows = [["step", *names], *history]
    path.write_text("".join("\t".join("" if x is None else str(x) for x in row) + "\n" for row in rows))


def in_16_bits(model: nn.Module) -> nn.Module:
    """A copy to be saved: weights in 16 bits, codebooks in 32, since codes hang on small differences."""
    model = copy.deepcopy(model).cpu()
    for parameter in model.parameters():  # codebooks are buffers
        parameter.data = parameter.data.half()
    return model


# --------------------------------------------------------------------------------------------------- training


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the highest learning rate: up in a line, down along a cosine to 2 %."""
    return min((step + 1) / warmup, 0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2)


def train(
    path: Path,
    losses: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    columns: tuple[str, ...],
    optimizer: torch.optim.Optimizer,
    modules: dict[str, nn.Module],
    steps: int,
    highest: float,
    warmup: int,
    clip: float,
    every: int,
) -> list[list]:
    """The training loop of all stages; goes on where the file at `path` stopped. Returns the loss curve.

    `losses(step)` returns the loss to bring down, and its parts. The learning rate rises to `highest` in
    `warmup` steps; gradients longer than `clip` are cut to it. The parts named in `columns` become a row of
    the curve, one `every` so many steps. The file keeps the modules, the optimizer, the step and the curve.
    """
    first, history = resume(path, **modules, optimizer=optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = highest * schedule(step, steps, warmup)
        loss, parts = losses(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        done = step + 1
        if done % every == 0:
            row = [round(parts[key].item(), 4) if key in parts else None for key in columns]
            history.append([done, *row])
            more = "".join(f", {key} {value}" for key, value in zip(columns, row))
            progress(path.stem, done, steps, more)
        if done % 200 == 0 or done == steps:
            save_progress(path, **modules, optimizer=optimizer, step=done, steps=steps, history=history)
    return history
