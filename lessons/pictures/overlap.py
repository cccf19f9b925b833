"""Draws overlap.svg: how a transposed convolution adds up what overlaps, and what it keeps for later."""

from pathlib import Path

import torch
from matplotlib.patches import Rectangle

from lessons.pictures.style import HERE, MOSHI, QUIET, TEXT, USER, plt, save
from mimi_min import CausalConvTranspose1d, init_state

STRIDE, CHUNK, INPUTS = 4, 3, 5  # the first chunk has three inputs


@torch.no_grad()
def draw(path: Path = HERE / "overlap.svg") -> None:
    """A row for each input with the eight outputs that it makes; below them the sums, without the bias."""
    torch.manual_seed(2)
    up = CausalConvTranspose1d(1, 1, STRIDE, bias=False)
    up.convtr.weight[0, 0] = torch.tensor([0.2, 0.5, 0.8, 1.0, 0.9, 0.6, 0.4, 0.2])
    x = torch.tensor([[[1.0, 0.6, -0.7, 0.9, 0.5]]])
    made = x[0, 0, :, None] * up.convtr.weight[0, 0]  # [inputs, 8]
    state = init_state(up, 1)
    first, second = (up(chunk, state) for chunk in x.split(CHUNK, dim=-1))
    total = torch.cat([first, second], dim=-1)[0, 0]

    figure, axes = plt.subplots(INPUTS + 1, 1, figsize=(9, 5), sharex=True, sharey=True)
    for number, (panel, eight) in enumerate(zip(axes, made)):
        places = torch.arange(2 * STRIDE) + number * STRIDE
        late = number in (CHUNK - 1, INPUTS - 1)  # its second half waits for the next chunk
        panel.bar(places[:STRIDE], eight[:STRIDE], color=USER, width=0.8)
        half = {"color": QUIET, "edgecolor": USER, "hatch": "////"} if late else {"color": USER, "alpha": 0.5}
        panel.bar(places[STRIDE:], eight[STRIDE:], width=0.8, **half)
        panel.set_ylabel(f"input {number}", rotation=0, ha="right", va="center")
    axes[-1].bar(range(len(total)), total, color=MOSHI, width=0.8)
    axes[-1].set_ylabel("outputs", rotation=0, ha="right", va="center")
    for panel in axes:
        panel.axhline(0, color="#999", linewidth=0.5)
        panel.axvline(CHUNK * STRIDE - 0.5, color=TEXT, linestyle="--", linewidth=1)
        panel.set(yticks=[], xticks=[], xlim=(-0.6, (INPUTS + 1) * STRIDE - 0.4), ylim=(-1.3, 1.7))
        panel.spines[["left", "bottom"]].set_visible(False)
        panel.tick_params(length=0)
    axes[0].set_title(
        "each input makes 8 outputs: the first half falls on its own place, the second on the next"
    )
    axes[CHUNK - 1].text((CHUNK + 1) * STRIDE, -1, "tail: kept for the next chunk", color=USER, fontsize=8)
    axes[INPUTS - 1].text((INPUTS + 1) * STRIDE - 0.5, 1, "tail", color=USER, fontsize=8, ha="right")
    place = (INPUTS * STRIDE - 0.5, -1.2)
    axes[-1].add_patch(Rectangle(place, STRIDE, 2.8, fill=False, edgecolor="#999", linestyle=":"))
    axes[-1].text(INPUTS * STRIDE, 0.2, "not finished yet", fontsize=8, color="#666")
    axes[-1].set_xticks(
        [CHUNK * STRIDE / 2 - 0.5, (CHUNK + INPUTS) * STRIDE / 2 - 0.5], ["first chunk", "second chunk"]
    )
    save(figure, path)


if __name__ == "__main__":
    draw()
