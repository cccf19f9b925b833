"""Draws ring.svg: the slots of the ring over five frames, with as many as it needs and with one too few."""

from pathlib import Path

import torch
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from lessons.pictures.style import HERE, MOSHI, QUIET, USER, plt, save
from mimi_min import Attention, Transformer, TransformerLayer, init_state

CONTEXT, FRAMES = 4, 5  # a window of 4 positions, of which a frame has two


def slots(ring_size: int) -> list[tuple[Tensor, Tensor]]:
    """For each frame: the position in each slot [slots], and which of them the two queries see [2, slots].
    Transformer.place says so, the way that it does on a GPU, where all slots are read."""
    layer = TransformerLayer(Attention(4, 1, 1), torch.nn.Identity(), torch.nn.LayerNorm, scales=False)
    transformer = Transformer([layer], CONTEXT, 10000.0, frame_positions=2)
    transformer.ring_size, transformer.attend_filled = ring_size, False
    state, held, frames = init_state(transformer, 1), torch.full((ring_size,), -1), []
    for frame in range(FRAMES):
        placement = transformer.place(torch.zeros(1, 2, 4), state)
        held[placement.slots] = torch.tensor([2 * frame, 2 * frame + 1])
        frames.append((held.clone(), placement.mask == 0))
        state[transformer]["position"] += 2
    return frames


def draw(path: Path = HERE / "ring.svg") -> None:
    """A panel for each frame: slots in a row, under each dots where the first and second query see it."""
    figure, axes = plt.subplots(2, FRAMES, figsize=(11, 3.6), sharex=True)
    for row, ring_size in zip(axes, (CONTEXT + 1, CONTEXT)):
        for frame, (panel, (held, sees)) in enumerate(zip(row, slots(ring_size))):
            for slot, position in enumerate(held.tolist()):
                new = position >= 2 * frame
                colour = QUIET if position < 0 else USER if new else MOSHI
                panel.add_patch(Rectangle((slot - 0.45, 0), 0.9, 0.9, color=colour, linewidth=0))
                text, ink = ("" if position < 0 else position), "white"
                panel.text(slot, 0.45, text, ha="center", va="center", color=ink, fontsize=9)
                for query in range(2):
                    if sees[query, slot]:
                        panel.plot(slot, -0.35 - 0.45 * query, "o", color="#444", markersize=4)
            for query in range(2):
                wanted = set(range(max(0, 2 * frame + query - CONTEXT + 1), 2 * frame + query + 1))
                lost = wanted - set(held[sees[query]].tolist())
                text = f"query {2 * frame + query}" + (f" lacks {lost.pop()}" if lost else "")
                colour = "#b00020" if "lacks" in text else "#444"
                panel.text(CONTEXT + 0.8, -0.35 - 0.45 * query, text, fontsize=7, va="center", color=colour)
            panel.set(xlim=(-0.6, CONTEXT + 2.9), ylim=(-1.1, 1), yticks=[])
            panel.set_xticks([])
            panel.spines[["left", "bottom"]].set_visible(False)
            panel.set_title(f"frame {frame}", fontsize=9)
        row[0].set_ylabel(f"{ring_size} slots", rotation=0, ha="right", va="center")
    figure.legend(
        handles=[Patch(color=USER, label="written by this frame"), Patch(color=MOSHI, label="older")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    save(figure, path)


if __name__ == "__main__":
    draw()
