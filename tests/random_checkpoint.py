"""A small random checkpoint in the official folder format: `python tests/random_checkpoint.py FOLDER`.

It babbles. But everything in it matters: codebooks, usages, LayerScales and norms are random too, so that
sound comes out and no part can be left away unnoticed. The official package opens the same folder.
"""

import argparse
import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mimi_min import MIMI_NAMES, Mimi, MimiConfig, official_names  # noqa: E402
from moshi_min import (  # noqa: E402
    MIMI_CONFIG_FILE,
    MIMI_FILE,
    MOSHI_FILE,
    MOSHI_NAMES,
    Checkpoint,
    Moshi,
    MoshiConfig,
    save_checkpoint,
)

SENTENCES = [
    "Hello, what can I do for you today? I am listening while I speak, and I speak while I am listening.",
    "The codec turns sound into a few small numbers, twelve and a half times a second, and back again.",
    "One transformer runs over time, a smaller one over the codebooks of a frame. "
    "A word comes just before its sound.",
    "Nothing here was ever trained, so please do not expect an answer that makes sense. "
    "It is only a random model.",
]

# Sizes are small; rates, streams and delays are the released ones.
MIMI = MimiConfig(
    n_filters=8,
    dimension=64,
    num_layers=2,
    num_heads=4,
    dim_feedforward=128,
    n_q=10,
    bins=64,
    quantizer_dimension=16,
)
MOSHI = MoshiConfig(
    dim=64,
    num_layers=3,
    num_heads=4,
    context=100,
    card=64,
    text_card=320,
    depformer_dim=32,
    depformer_num_layers=2,
    depformer_num_heads=4,
    depformer_dim_feedforward=132,
)


@torch.no_grad()
def random_mimi(config: MimiConfig) -> Mimi:
    """A Mimi with random codebooks, usages and LayerScales, whose codebooks fit its latent."""
    mimi = Mimi(config).eval()
    for name, weight in mimi.named_parameters():
        if "scale" in name:
            weight.uniform_(0.2, 0.6)
        elif "norm" in name and name.endswith("weight"):
            weight.uniform_(0.7, 1.3)
        elif weight.dim() == 3:  # a convolution
            fan_in = weight[0].numel()
            if name.startswith("decoder") and "convtr" in name:
                fan_in = 2 * weight.shape[0]
            elif name.startswith("upsample"):
                fan_in = 2
            weight.normal_(std=1.3 / math.sqrt(fan_in))
    noise = torch.randn(1, 1, 10 * config.frame_size) * 0.3
    latent = mimi.to_latent(noise)
    for part in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
        size = part.input_proj(latent).std()
        for number, codebook in enumerate(part.codebooks):
            codebook.cluster_usage.uniform_(0.5, 3)
            centroids = torch.randn_like(codebook.embedding_sum) * size * 0.7**number
            codebook.embedding_sum.copy_(centroids * codebook.cluster_usage[:, None])
    loudness = mimi.decode(mimi.encode(noise)).std()
    mimi.decoder[-1].conv.weight *= 0.1 / loudness
    mimi.decoder[-1].conv.bias *= 0.1 / loudness
    return mimi


@torch.no_grad()
def random_moshi(config: MoshiConfig) -> Moshi:
    """A Moshi with random norms, whose logits are far enough apart that greedy and sampled tokens differ."""
    moshi = Moshi(config).eval()
    for name, weight in moshi.named_parameters():
        if name.endswith("alpha"):
            weight.uniform_(0.7, 1.3)
        elif "emb" in name:
            weight.normal_(std=0.5)
    moshi.text_linear.weight *= 3
    # As in a trained one, most text tokens are PAD: give its logit a push along the mean hidden state.
    tokens = torch.randint(min(config.card, config.text_card), (1, 1 + config.n_q, 64))
    hidden = moshi.temporal(tokens)[0].mean((0, 1))
    moshi.text_linear.weight[config.existing_text_padding_id] += 4 * hidden / hidden.pow(2).sum()
    if moshi.depth_decoder is not None:
        moshi.depth_decoder.output_proj.weight *= 2
    return moshi


def make_tokenizer(size: int) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece with `size` pieces, single bytes among them: unk 0, bos 1, eos 2, pad 3 as released."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def make_random_checkpoint(
    folder, released_mimi: bool = False, seed: int = 0, settings: dict | None = None, tokenizer=True, **sizes
) -> Path:
    """Writes the folder. `sizes` are fields of MoshiConfig, `settings` other entries of config.json."""
    mimi_config = MimiConfig() if released_mimi else MIMI
    config = dataclasses.replace(MOSHI, card=mimi_config.bins, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mimi, moshi = random_mimi(mimi_config), random_moshi(config)
    words = make_tokenizer(config.text_card) if tokenizer else None
    save_checkpoint(folder, Checkpoint(moshi, mimi, words, settings or {}))
    return Path(folder)


@torch.no_grad()
def fill(tensor, scale):
    """Random numbers, quickly: one block of them again and again."""
    block = (torch.randn(1 << 20) * scale).to(tensor)
    flat = tensor.view(-1)
    for start in range(0, len(flat), len(block)):
        flat[start : start + len(block)] = block[: len(flat) - start]


def quick_moshi(config: MoshiConfig, dtype=torch.bfloat16, device="cpu") -> Moshi:
    """A Moshi with random weights of a sensible size, made where they stay: the 7B in seconds on a GPU."""
    with torch.device("meta"):
        moshi = Moshi(config).to(dtype)
    moshi = moshi.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in moshi.named_parameters():
        if name.endswith("alpha"):
            parameter.fill_(1.0)
        else:
            fill(parameter, parameter.shape[-1] ** -0.5)
    return moshi


def make_full_checkpoint(folder, config=None, mimi_config=None, holes=False) -> Path:
    """Writes a folder with the released names and layout: by default all 7.69 B parameters in bfloat16, and
    no config.json. With `holes` Moshi's weights are holes in the file: zeros that take no room on a disk."""
    folder, config, mimi_config = Path(folder), config or MoshiConfig(), mimi_config or MimiConfig()
    folder.mkdir(parents=True, exist_ok=True)
    mimi = random_mimi(mimi_config)
    names, weights = official_names(mimi, MIMI_NAMES), mimi.state_dict()
    save_file({names[ours]: weights[ours] for ours in names}, folder / MIMI_FILE)
    if (config, mimi_config) != (MoshiConfig(), MimiConfig()):
        settings = {**config.to_dict(), "mimi_config_name": MIMI_CONFIG_FILE}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / MIMI_CONFIG_FILE).write_text(json.dumps(mimi_config.to_dict()))
    with torch.device("meta"):
        moshi = Moshi(config)
    shapes = {}  # of every tensor in the file: names and layout of the released one
    for ours, name in official_names(moshi, MOSHI_NAMES).items():
        shape = list(moshi.state_dict()[ours].shape)
        if "{k}" in name:
            shapes |= {name.format(k=k): shape[1:] for k in range(shape[0])}
        elif len(shape) == 3 and "_proj" in name:
            shapes[name] = [shape[0] * shape[1], shape[2]]  # all codebooks of the depth decoder
        else:
            shapes[name] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    block = torch.randn(1 << 20)  # the same numbers again and again: making new ones would take minutes
    with open(folder / MOSHI_FILE, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if holes:
            file.truncate(file.tell() + end)
            return folder
        for name, shape in shapes.items():
            values = torch.ones(1 << 20) if name.endswith("alpha") else block * shape[-1] ** -0.5
            data = values.bfloat16().view(torch.uint8).numpy()
            size = 2 * math.prod(shape)
            for start in range(0, size, len(data)):
                file.write(data[: size - start])
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--released-mimi", action="store_true", help="Mimi in its released size (320 MB)")
    parser.add_argument("--full", action="store_true", help="everything in its released size (15.7 GB)")
    parser.add_argument(
        "--holes", action="store_true", help="the same with zeros for Moshi's weights (0.3 GB on the disk)"
    )
    args = parser.parse_args()
    print(
        "wrote",
        make_full_checkpoint(args.folder, holes=args.holes)
        if args.full or args.holes
        else make_random_checkpoint(args.folder, args.released_mimi),
    )
