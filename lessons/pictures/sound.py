"""Draws sound.svg: the question of tiny/ as a waveform and as a spectrogram, frame by frame."""

from pathlib import Path

import numpy as np
import torch

from lessons.lab import FRAME, RATE, recording
from lessons.pictures.style import HERE, USER, plt, save


def spectrogram(axes, sound: np.ndarray, title: str = "") -> None:
    """Levels of sound [T] over time and frequency, up to 8 kHz, 60 dB from dark to light."""
    bins = torch.stft(
        torch.from_numpy(sound.copy()), 512, 192, window=torch.hann_window(512), return_complex=True
    )
    levels = 20 * np.log10(bins.abs().numpy()[:171] / 128 + 1e-5)
    axes.imshow(
        levels,
        origin="lower",
        aspect="auto",
        extent=(0, len(sound) / RATE, 0, 8),
        vmin=-80,
        vmax=-20,
        cmap="magma_r",
        interpolation="none",
    )
    axes.set(ylabel="kHz", title=title, yticks=[0, 4, 8])


def draw(path: Path = HERE / "sound.svg") -> None:
    """Two views of the same 1.9 s, and 80 ms of it large."""
    sound = recording("question.wav", 0).flatten().numpy()
    time = np.arange(len(sound)) / RATE
    figure, (whole, levels, frame) = plt.subplots(3, 1, figsize=(9, 5.6))
    whole.plot(time, sound, color=USER, linewidth=0.4)
    for edge in range(0, len(sound) + 1, FRAME):
        whole.axvline(edge / RATE, color="#999", linewidth=0.4)
    whole.set(
        xlim=(0, time[-1]),
        title="what is seven plus eight: 24,000 numbers a second, a frame every 80 ms",
        yticks=[],
    )
    spectrogram(levels, sound, "the same as levels of frequencies")
    levels.set(xlim=(0, time[-1]), xlabel="seconds")
    start = 10 * FRAME
    frame.plot(np.arange(FRAME), sound[start : start + FRAME], color=USER, linewidth=0.8)
    frame.set(
        xlim=(0, FRAME),
        title="frame 10: these 1,920 samples become 8 small integers",
        xlabel="sample of the frame",
        yticks=[],
    )
    save(figure, path)


if __name__ == "__main__":
    draw()
