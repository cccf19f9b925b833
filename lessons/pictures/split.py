"""Draws split.svg: one frame on its way through the split quantizer, from the question of tiny/."""

from pathlib import Path

import torch
from matplotlib.patches import ConnectionPatch
from torch import Tensor

from lessons.lab import recording, tiny
from lessons.pictures.style import HERE, MOSHI, QUIET, TEXT, USER, plt, save

NUMBER = 10  # the frame
SHOWN = 4  # acoustic codebooks


def bars(panel, into: Tensor, chosen: Tensor, colour: str, title: str) -> None:
    """Numbers of a vector as grey bars, and what stands for it in colour before them."""
    places = range(len(into))
    panel.bar(places, into.tolist(), width=1.0, color="#bdb8a8")
    panel.bar(places, chosen.tolist(), width=0.45, color=colour)
    panel.set_title(title, fontsize=8)
    panel.set(xticks=[], yticks=[], ylim=1.1 * max(into.abs().max().item(), 1e-9) * torch.tensor([-1, 1]))


def arrow(figure, start, end, colour: str) -> None:
    """From the right edge of a panel to the left edge of another."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 2, "shrinkB": 2}
    places = {"coordsA": "axes fraction", "coordsB": "axes fraction", "axesA": start, "axesB": end}
    figure.add_artist(ConnectionPatch((1, 0.5), (0, 0.5), **places, **style))


@torch.no_grad()
def draw(path: Path = HERE / "split.svg") -> None:
    """The latent, the semantic codebook above, four of the acoustic ones below, and the latent again."""
    mimi = tiny().mimi
    z = mimi.to_latent(recording("question.wav", 0))[:, :, NUMBER : NUMBER + 1]
    codes = mimi.quantizer.encode(z)
    figure, axes = plt.subplots(2, SHOWN + 2, figsize=(11, 3.4), width_ratios=[1.4, *SHOWN * [1], 1.4])
    latent, again, semantic = axes[0, 0], axes[0, -1], axes[0, 1]
    bars(latent, z[0, :, 0], z[0, :, 0], TEXT, f"the latent: {z.shape[1]} numbers")
    bars(again, z[0, :, 0], mimi.quantizer.decode(codes)[0, :, 0], TEXT, "both parts, added")

    into = mimi.quantizer.semantic.input_proj(z)[0, :, 0]
    chosen = mimi.quantizer.semantic.codebooks[0].decode(codes[:, 0])[0, 0]
    bars(semantic, into, chosen, USER, f"semantic: code {int(codes[0, 0])}")
    left = whole = mimi.quantizer.acoustic.input_proj(z)[0, :, 0]
    for k, panel in enumerate(axes[1, 1 : 1 + SHOWN]):
        chosen = mimi.quantizer.acoustic.codebooks[k].decode(codes[:, 1 + k])[0, 0]
        share = ((left - chosen).pow(2).sum() / whole.pow(2).sum()).item()
        bars(panel, left, chosen, MOSHI, f"acoustic {1 + k}: code {int(codes[0, 1 + k])}")
        larger = (whole.abs().max() / left.abs().max()).item()
        drawn = f"(drawn {larger:.0f} times larger)" if k else ""
        panel.set_xlabel(f"{share:.1%} of the energy is left\n{drawn}", fontsize=8)
        left = left - chosen

    for panel in (axes[1, 0], axes[1, -1], *axes[0, 2 : 1 + SHOWN]):
        panel.axis("off")
    for start, end in ((latent, semantic), (latent, axes[1, 1]), (semantic, again)):
        arrow(figure, start, end, "#666")
    for start, end in zip(axes[1, 1:], axes[1, 2 : 1 + SHOWN]):
        arrow(figure, start, end, MOSHI)
    arrow(figure, axes[1, SHOWN], again, "#666")
    for panel, x, y, colour, text in (
        (axes[1, 0], 0, 0.4, "#333", "grey: what comes in\ncolour: the nearest entry,\nwhich stands for it"),
        (axes[0, 2], 0.3, 0.6, "#333", "nothing of it is taken from what the acoustic ones get"),
        (axes[1, -1], 0.1, 0.3, MOSHI, f"... and on to\nacoustic {codes.shape[1] - 1}"),
    ):
        panel.text(x, y, text, fontsize=8, color=colour).set_in_layout(False)
    for panel in axes.flat:
        panel.spines[["left", "bottom"]].set_color(QUIET)
    save(figure, path)


if __name__ == "__main__":
    draw()
