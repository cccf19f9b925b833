"""Draws loss.svg: how the tiny checkpoint learnt, from the curves that its training kept."""

from pathlib import Path

import numpy as np

from lessons.lab import ROOT
from lessons.pictures.style import HERE, MOSHI, TEXT, USER, plt, save


def draw(path: Path = HERE / "loss.svg") -> None:
    """The codec's two losses and the language model's two, over their steps."""
    figure, (codec, model) = plt.subplots(1, 2, figsize=(10, 3.6))
    for panel, name, title, curves in (
        (codec, "codec", "the codec", {"spectral": USER, "phone": TEXT}),
        (model, "lm", "the language model", {"text": TEXT, "audio": MOSHI}),
    ):
        table = np.genfromtxt(ROOT / "tiny" / f"{name}_loss.tsv", names=True, delimiter="\t")
        for key, colour in curves.items():
            panel.plot(table["step"], table[key], color=colour, linewidth=1, label=key)
        panel.set(title=title, xlabel="step", yscale="log")
        panel.legend(frameon=False)
    codec.set_ylabel("loss")
    save(figure, path)


if __name__ == "__main__":
    draw()
