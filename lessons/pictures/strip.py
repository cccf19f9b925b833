"""Draws strip.svg: the sampler's strip in its first five steps, from a run of a small random model."""

from pathlib import Path

from matplotlib.patches import Patch, Rectangle

from lessons.lab import START, sign, strips
from lessons.pictures.style import HERE, MOSHI, QUIET, TEXT, USER, plt, save
from moshi_min import UNGENERATED

DELAYS, OWN = (0, 0, 2, 0, 1), 3  # text and two codebooks of each voice, with uneven delays
NAMES = ["text", "Moshi: semantic", "Moshi: acoustic", "user: semantic", "user: acoustic"]
COLOURS = [TEXT, MOSHI, MOSHI, USER, USER]
IN = {"linestyle": ":", "linewidth": 2, "edgecolor": "black", "fill": False}  # around the frame that goes in
OUT = {**IN, "linestyle": "-"}  # around the one that comes out


def draw(path: Path = HERE / "strip.svg") -> None:
    """A panel for each step, a row for each stream, and in each cell the number of the frame that its token
    belongs to."""
    now = max(DELAYS)  # the column that is read
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.9), sharey=True)
    for step, (panel, (strip, read, frame)) in enumerate(zip(axes, strips(DELAYS, OWN, 5))):
        panel.add_patch(Rectangle((now - 0.5, -0.62), 1, 5.24, color="#c9c5b8", linewidth=0))
        for row, (shift, colour) in enumerate(zip(DELAYS, COLOURS)):
            for column, token in enumerate(strip[row].tolist()):
                token = int(read[row]) if column == now else token
                empty = token in (START, UNGENERATED)
                place, ink = (column - 0.42, row - 0.4), "#333" if empty else "white"
                panel.add_patch(Rectangle(place, 0.84, 0.8, color=QUIET if empty else colour, linewidth=0))
                if row >= OWN and column == now + shift:
                    panel.add_patch(Rectangle(place, 0.84, 0.8, **IN))
                if row < OWN and frame is not None and column == 1 + shift:
                    panel.add_patch(Rectangle(place, 0.84, 0.8, **OUT))
                text = str(UNGENERATED) if token == UNGENERATED else sign(token)
                panel.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
        gives = "gives nothing" if frame is None else f"gives frame {int(frame[0])}"
        panel.set(title=f"step {step}: {gives}", xlim=(-0.6, 2 * now + 1.6), ylim=(4.65, -0.65))
        panel.set_xticks([now, now + 1], ["read", "made"], fontsize=8)
        panel.tick_params(length=0)
        panel.spines[["left", "bottom"]].set_visible(False)
    axes[0].set_yticks(range(5), [f"{name}, delay {shift}" for name, shift in zip(NAMES, DELAYS)], fontsize=8)
    figure.legend(
        handles=[
            Patch(label="the user's frame that goes in", **IN),
            Patch(label="Moshi's frame that comes out", **OUT),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    save(figure, path)


if __name__ == "__main__":
    draw()
