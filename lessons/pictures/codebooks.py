"""Draws codebooks.svg: a recorded question, and what 8, 4, 2 and 1 codebooks keep of it."""

from pathlib import Path

from lessons.lab import RATE, distance, recording, tiny
from lessons.pictures.sound import spectrogram
from lessons.pictures.style import HERE, plt, save


def draw(path: Path = HERE / "codebooks.svg") -> None:
    """Original and four reconstructions, one under the other."""
    mimi, sound = tiny().mimi, recording("question.wav", 0)
    codes = mimi.encode(sound)
    figure, axes = plt.subplots(5, 1, figsize=(9, 8), sharex=True)
    spectrogram(axes[0], sound.flatten().numpy(), "original")
    for row, number in zip(axes[1:], (8, 4, 2, 1)):
        decoded = mimi.decode(codes[:, :number])
        bits = int(number * 8 * mimi.frame_rate)
        spectrogram(
            row,
            decoded.flatten().numpy(),
            f"{number} codebook{'s' * (number > 1)}, {bits} bit/s: {distance(sound, decoded):.1f} dB away",
        )
    axes[-1].set(xlim=(0, sound.shape[-1] / RATE), xlabel="seconds")
    save(figure, path)


if __name__ == "__main__":
    draw()
