"""Draws grid.svg: the 17 streams of a conversation, from `python generate.py --tokens`."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgb

from lessons.lab import EPAD, PAD, ROOT, decibels, tiny
from lessons.pictures.style import HERE, MOSHI, QUIET, TEXT, USER, plt, save


def draw(path: Path = HERE / "grid.svg") -> None:
    """Runs the program on the counting conversation and draws what it saved."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "generate.py", ROOT / "tiny" / "count.wav", "--extra-seconds", "3"]
        files = ["--stereo", "-o", f"{folder}/a.wav", "--tokens", f"{folder}/run.npz"]
        subprocess.run([*command, *files], check=True, capture_output=True)
        codes = np.load(f"{folder}/run.npz")["codes"]
        sound = np.frombuffer((Path(folder) / "a.wav").read_bytes()[44:], "<i2") / np.float32(32768)
    user, voice = torch.from_numpy(sound).view(-1, 2).T
    loud = [(decibels(side) > -45).numpy() for side in (voice, user)]
    tokenizer = tiny().tokenizer
    # The commonest code of a stream is its silence.
    silence = [np.bincount(row[row >= 0]).argmax() for row in codes]
    acoustic = [f"acoustic {k}" for k in range(1, 8)]
    names = ["text", "Moshi: semantic", *acoustic, "user: semantic", *acoustic]
    figure, axes = plt.subplots(figsize=(11, 5.2))
    picture = np.ones((*codes.shape, 3))
    for row, colour in enumerate([TEXT] + 8 * [MOSHI] + 8 * [USER]):
        moves = ~np.isin(codes[row], (PAD, EPAD)) if row == 0 else codes[row] != silence[row]
        sounds = moves if row == 0 else np.resize(loud[row > 8], codes.shape[1])
        pale = 0.65 * np.array(to_rgb(QUIET)) + 0.35 * np.array(to_rgb(colour))
        picture[row] = np.where(
            moves[:, None], np.where(sounds[:, None], to_rgb(colour), pale), to_rgb(QUIET)
        )
    picture[codes < 0] = to_rgb(figure.get_facecolor())
    picture = picture.repeat(12, 0).repeat(8, 1)  # pixels so small that no viewer's smoothing shows
    axes.imshow(picture, aspect="auto", extent=(0, codes.shape[1], 16.5, -0.5), interpolation="none")
    for edge in np.arange(0.5, 16):
        axes.axhline(edge, color=figure.get_facecolor(), linewidth=2)
    for frame, token in enumerate(codes[0]):
        if token == EPAD:
            axes.text(frame + 0.46, 0, "E", ha="center", va="center", fontsize=6, color="#555")
        elif token not in (PAD, -1):
            axes.text(frame, -0.8, tokenizer.id_to_piece(int(token)).replace("▁", ""), fontsize=9, color=TEXT)
    axes.set_yticks(range(17), names, fontsize=8)
    axes.set_xticks(np.arange(0, codes.shape[1] + 1, 12.5), range(int(codes.shape[1] / 12.5) + 1))
    axes.set_xlim(0, codes.shape[1] + 4)
    axes.set_ylim(16.6, -1.8)
    axes.set_xlabel(
        "seconds (a column is a frame of 80 ms). "
        "Grey: PAD, the codes of silence; pale: other codes, but no sound; E: EPAD"
    )
    axes.tick_params(length=0)
    save(figure, path)


if __name__ == "__main__":
    draw()
