"""Draws window.svg: what each position of Helium's first layer looks at, inside its window."""

from pathlib import Path

import torch

from lessons.lab import recording, talk, tiny
from lessons.pictures.style import HERE, plt, save
from mimi_min import rope
from moshi_min import delay, embed


@torch.no_grad()
def draw(path: Path = HERE / "window.svg") -> None:
    """The mask, and the attention weights of two heads, over 250 frames of the conversation of tiny/."""
    checkpoint = tiny()
    moshi, sound = checkpoint.moshi, recording("conversation.wav", 1)
    tokens, _ = talk(checkpoint, sound)
    codes = torch.cat([tokens, checkpoint.mimi.encode(sound)[0]])[None, :, :250]
    inputs = delay(codes, [1 + shift for shift in moshi.config.delays], moshi.initial)
    x = sum(embed(table.weight, inputs[:, 1 + k]) for k, table in enumerate(moshi.audio_embs))
    x = x + embed(moshi.text_emb.weight, inputs[:, 0])
    layer, placement = moshi.transformer.layers[0], moshi.transformer.place(x, None)
    attention = layer.attention
    heads = attention.in_proj(layer.norm1(x)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    q, k = (rope(part, placement.turns) for part in heads.chunk(3, dim=1)[:2])
    weights = torch.softmax(q @ k.transpose(2, 3) * attention.head_dim**-0.5 + placement.mask, dim=-1)[0]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9))
    axes[0].imshow((placement.mask == 0).numpy(), cmap="Greys", vmax=2, interpolation="nearest")
    axes[0].set(title="the mask: the last 125 frames, 10 s", ylabel="frame that looks")
    for panel, head in zip(axes[1:], (0, 3)):
        panel.imshow(
            weights[head].clamp(min=1e-4).log10().numpy(),
            cmap="magma_r",
            vmin=-4,
            vmax=0,
            interpolation="nearest",
        )
        panel.set(title=f"head {head} of the first layer")
    for panel in axes:
        panel.set(xlabel="frame that is looked at", xticks=[0, 125, 249], yticks=[0, 125, 249])
    save(figure, path)


if __name__ == "__main__":
    draw()
