"""Draws delays.svg: frames of all streams before and after `delay`."""

from pathlib import Path

import torch

from lessons.lab import tiny
from lessons.pictures.style import HERE, MOSHI, QUIET, TEXT, USER, plt, save
from moshi_min import delay


def draw(path: Path = HERE / "delays.svg") -> None:
    """Six frames, 17 streams: the frame's number in each cell, S where the initial token starts a stream,
    x where what is predicted belongs to no frame."""
    config, start = tiny().moshi.config, -9
    codes = torch.arange(6).expand(1, 17, 6)
    inputs = delay(codes, [1 + shift for shift in config.delays], torch.full((17,), start))[0]
    targets = delay(codes, list(config.delays), torch.full((17,), start))[0]
    colours = [TEXT] + 8 * [MOSHI] + 8 * [USER]
    names = ["text", "Moshi: semantic", *7 * [""], "user: semantic", *7 * [""]]
    names[5], names[13] = "acoustic", "acoustic"
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), sharey=True)
    titles = ("codes, aligned", "what each step reads", "what each step predicts")
    for panel, grid, title, outside in zip(axes, (codes[0], inputs, targets), titles, "SSx"):
        for row in range(17 if panel is not axes[2] else 9):
            for column, frame in enumerate(grid[row].tolist()):
                begin = frame == start
                panel.barh(
                    row, 0.94, left=column, height=0.88, color=QUIET if begin else colours[row], alpha=0.85
                )
                panel.text(
                    column + 0.47,
                    row,
                    outside if begin else frame,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#333" if begin else "white",
                )
        panel.set(title=title, xlabel="frame" if panel is axes[0] else "step", xticks=[], ylim=(16.6, -0.6))
        panel.tick_params(length=0)
    axes[0].set_yticks(range(17), names, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    draw()
