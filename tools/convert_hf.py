#!/usr/bin/env python3
"""Turns a Hugging Face folder into one in the official format, which moshi_min and the official package read.

    python tools/convert_hf.py FOLDER OUT

FOLDER holds config.json and model.safetensors, or shards with model.safetensors.index.json, as Hugging Face's
`save_pretrained` writes them for MoshiForConditionalGeneration (its Mimi is inside) or for MimiModel. OUT is
a new or an empty folder.

What differs:
- the names, see the two tables below;
- queries, keys and values are one tensor in the official files;
- the depth decoder's weights are one tensor for each codebook there, and all stacked here;
- the rows of rotary queries and keys, which Hugging Face orders to rotate halves instead of neighbours.
Every tensor keeps its dtype. They go through one by one, so that memory holds the largest of them only.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # while torch takes its second to load, there is nothing to lose or to clean up
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        ending = getattr(signal, name, signal.SIGINT)
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, lambda number, _: os._exit(128 + number))

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mimi_min  # noqa: E402
import moshi_min  # noqa: E402
from files import FLOATS, open_regular, plain, read_json, run_program, show, signals  # noqa: E402
from mimi_min import Mimi, MimiConfig, build, newer_name, official_names  # noqa: E402
from moshi_min import MIMI_CONFIG_FILE, MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE, Moshi, MoshiConfig, gated_width  # noqa: E402

# ----------------------------------------------------------------------------------------------------- tables

# From an official name to Hugging Face's: each rule (pattern, replacement) in turn. '{k}' is the codebook.
MOSHI_NAMES = [
    (r"^text_emb", "decoder.model.embed_tokens"),
    (r"^emb", "embed_tokens"),
    (r"^text_linear", "decoder.lm_head"),
    (r"^out_norm\.alpha", "decoder.model.norm.weight"),
    (r"^transformer", "decoder.model"),
    (r"^depformer_text_emb", "depth_decoder.text_embed_tokens"),
    (r"^depformer_emb", "depth_decoder.embed_tokens"),
    (r"^depformer_in\.{k}", "depth_decoder.input_projections"),
    (r"^linears\.{k}", "depth_decoder.lm_heads"),
    (r"^depformer\.", "depth_decoder."),
    (r"norm1\.alpha", "input_layernorm.weight"),
    (r"norm2\.alpha", "post_attention_layernorm.weight"),
    (r"gating\.({k}\.)?linear_in", "mlp.fc1"),
    (r"gating\.({k}\.)?linear_out", "mlp.fc2"),
    (r"in_projs\.(0|{k})\.", "[qkv]_proj.linear."),
    (r"out_projs\.(0|{k})\.", "o_proj.linear."),
]
MIMI_NAMES = [
    (r"^(encoder|decoder)\.model", r"\1.layers"),
    (r"\b(conv|convtr)(\.\1)+\.", "conv."),
    (r"_transformer\.transformer", "_transformer"),
    (r"norm1", "input_layernorm"),
    (r"norm2", "post_attention_layernorm"),
    (r"linear(\d)", r"mlp.fc\1"),
    (r"layer_scale_1", "self_attn_layer_scale"),
    (r"layer_scale_2", "mlp_layer_scale"),
    (r"in_projs\.0", "[qkv]_proj"),
    (r"out_projs\.0", "o_proj"),
    (r"rvq_first", "semantic_residual_vector_quantizer"),
    (r"rvq_rest", "acoustic_residual_vector_quantizer"),
    (r"\.vq\.layers", ".layers"),
    (r"\._codebook\._?", ".codebook."),
    (r"embedding_sum", "embed_sum"),
]

# Hugging Face's config keys -> (field of our config, or a list of the values that can be converted; default).
MIMI_KEYS = {
    "sampling_rate": ("sample_rate", 24000),
    "num_filters": ("n_filters", 64),
    "upsampling_ratios": ("ratios", [8, 6, 5, 4]),
    "kernel_size": ("kernel_size", 7),
    "residual_kernel_size": ("residual_kernel_size", 3),
    "last_kernel_size": ("last_kernel_size", 3),
    "hidden_size": ("dimension", 512),
    "upsample_groups": ("dimension", 512),
    "num_hidden_layers": ("num_layers", 8),
    "num_attention_heads": ("num_heads", 8),
    "num_key_value_heads": ("num_heads", 8),
    "intermediate_size": ("dim_feedforward", 2048),
    "sliding_window": ("context", 250),
    "num_quantizers": ("n_q", 32),
    "codebook_size": ("bins", 2048),
    "codebook_dim": ("quantizer_dimension", 256),
    "vector_quantization_hidden_dimension": ("quantizer_dimension", 256),
    "num_semantic_quantizers": ([1], 1),
    "audio_channels": ([1], 1),
    "num_residual_layers": ([1], 1),
    "compress": ([2], 2),
    "trim_right_ratio": ([1.0], 1.0),
    "use_causal_conv": ([True], True),
    "use_conv_shortcut": ([False], False),
    "pad_mode": (["constant"], "constant"),
    "hidden_act": (["gelu"], "gelu"),
    "norm_eps": ([1e-5], 1e-5),
    "attention_bias": ([False], False),
}
BOTH_KEYS = {
    "hidden_act": (["silu"], "silu"),
    "rms_norm_eps": ([1e-8], 1e-8),
    "tie_word_embeddings": ([False], False),
}
MOSHI_KEYS = {
    "hidden_size": ("dim", 4096),
    "num_hidden_layers": ("num_layers", 32),
    "num_attention_heads": ("num_heads", 32),
    "sliding_window": ("context", 3000),
    "vocab_size": ("text_card", 32000),
    "num_codebooks": ("dep_q", 8),
    "audio_vocab_size": ("card", 2048),
    **BOTH_KEYS,
}
DEPTH_KEYS = {
    "hidden_size": ("depformer_dim", 1024),
    "num_hidden_layers": ("depformer_num_layers", 6),
    "num_attention_heads": ("depformer_num_heads", 16),
    **BOTH_KEYS,
}

# --------------------------------------------------------------------------------------------- configurations


def is_size(value) -> bool:
    """True for a positive int (True itself isn't one) that may be a size."""
    return type(value) is int and 0 < value < 2**20


def read_fields(given: dict, table: dict, what: str) -> dict:
    """Our fields. A row of `table` is (field, default) or ([values that can be converted], default)."""
    fields: dict = {}
    for key, (use, default) in table.items():
        value = default if given.get(key) is None else given[key]
        if isinstance(use, list):
            expected = value if value in use else use[0]
        else:
            expected = fields.setdefault(use, value)  # keys of one field must agree
        if value != expected:
            raise ValueError(f"{what}: {key} is {value!r}, but only {expected!r} is possible here")
    return fields


def read_config(given: dict, table: dict, what: str, heads_field: str) -> tuple[dict, float]:
    """Our config's fields, and the rotary period, from a Hugging Face config; ValueError if that can't be."""
    fields = read_fields(given, table, what)
    if bad := [name for name, value in fields.items() if name != "ratios" and not is_size(value)]:
        raise ValueError(f"{what}: {bad[0]} cannot be {fields[bad[0]]!r}, it must be a positive whole number")
    width = next(fields[field] for key, (field, _) in table.items() if key == "hidden_size")
    if given.get("head_dim") not in (None, width / fields[heads_field]):
        raise ValueError(f"{what}: head_dim {given['head_dim']!r} is not the width over the heads")
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{what}: only plain rotary embedding can be converted, not {rope!r}")
    return fields, rope.get("rope_theta", given.get("rope_theta", 10000.0))


def read_transformer(given: dict, heads: int, dim: int, default: int, what: str) -> tuple[int, int]:
    """kv_repeat, and the official feed-forward width, of which two thirds are hidden units (ffn_dim / 2)."""
    kv_heads, ffn = given.get("num_key_value_heads") or heads, given.get("ffn_dim", default)
    if not is_size(kv_heads) or heads % kv_heads:
        raise ValueError(f"{what}: {kv_heads!r} key and value heads do not fit {heads} heads")
    if is_size(ffn) and ffn % 2 == 0:
        for width in (-(-3 * ffn // 4), 3 * ffn // 4 + 1, 4 * dim):
            if gated_width(dim, width) == ffn // 2:
                return heads // kv_heads, width
    raise ValueError(f"{what}: no official model of width {dim} has an ffn_dim of {ffn!r}")


def mimi_config(given: dict, what: str) -> MimiConfig:
    """The same Mimi in our words."""
    fields, max_period = read_config(given, MIMI_KEYS, what, "num_heads")
    ratios = fields["ratios"]
    if not isinstance(ratios, list) or not all(map(is_size, ratios)):
        raise ValueError(f"{what}: upsampling_ratios must be a list of strides, not {ratios!r}")
    frame_rate = (
        given.get("frame_rate") or given.get("_frame_rate") or fields["sample_rate"] / (2 * math.prod(ratios))
    )
    return MimiConfig(**fields, frame_rate=frame_rate, max_period=max_period)


def moshi_config(given: dict, depth: dict, what: str) -> MoshiConfig:
    """The same language model in our words; `depth` is the depth decoder's part."""
    fields, max_period = read_config(given, MOSHI_KEYS, what, "num_heads")
    depth_fields, _ = read_config(depth, DEPTH_KEYS, f"{what}, depth_decoder_config", "depformer_num_heads")
    fields.update(depth_fields)
    K, dim, width = fields["dep_q"], fields["dim"], fields["depformer_dim"]
    repeat, feedforward = read_transformer(given, fields["num_heads"], dim, 22528, what)
    depth_repeat, depth_feedforward = read_transformer(
        depth, fields["depformer_num_heads"], width, 5632, f"{what}, depth_decoder_config"
    )
    scale = feedforward / dim  # the official model takes int(scale * dim)
    return MoshiConfig(
        **fields,
        n_q=2 * K,
        delays=(0, *2 * (0, *(K - 1) * (1,))),
        max_period=max_period,
        kv_repeat=repeat,
        hidden_scale=scale if int(scale * dim) == feedforward else (feedforward + 0.5) / dim,
        depformer_kv_repeat=depth_repeat,
        depformer_dim_feedforward=depth_feedforward,
    )


# ---------------------------------------------------------------------------------------------------- weights


class Piece(NamedTuple):
    """A Hugging Face tensor, or its part `row` along the first axis, that goes into an official one."""

    name: str
    shape: list[int]  # of the whole tensor in the file
    row: int | None
    rotary_heads: int  # 0, or the rows of each head go from two halves into neighbouring pairs


class Entry(NamedTuple):
    """An official tensor: its pieces one below the other, then in `shape`."""

    name: str
    shape: list[int]
    pieces: list[Piece]


def table(model: Mimi | Moshi, official_rules: list, rules: list, prefix: str) -> list[Entry]:
    """Where each tensor of the official file comes from.

    `model` is one of ours, on the meta device, and says how many heads of which kind an attention has;
    `official_rules` make its names official, `rules` make those Hugging Face's.
    """
    entries, official = [], official_names(model, official_rules)
    for ours, empty in model.state_dict().items():
        name = newer_name(official[ours])
        if empty.dim() == 2:
            name = name.format(k=0)
        theirs = name
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        each, shape = "{k}" in name, list(empty.shape)
        for k in range(shape[0]) if each else [0]:
            inner = shape[1:] if each else shape
            # Hugging Face has all codebooks in one tensor, unless it has a module for each.
            stacked = shape[:1] if each and "{k}" not in theirs else []
            rows = {"": inner}
            if "[qkv]" in theirs:
                c, depth = model.config, each
                heads = c.depformer_num_heads if depth else c.num_heads
                kv_heads = heads // (c.depformer_kv_repeat if depth else getattr(c, "kv_repeat", 1))
                size = inner[0] // (heads + 2 * kv_heads)
                rows = {
                    "q": [heads * size, inner[1]],
                    "k": [kv_heads * size, inner[1]],
                    "v": [kv_heads * size, inner[1]],
                }
            pieces = [
                Piece(
                    prefix + theirs.replace("[qkv]", part).format(k=k),
                    stacked + (its[-1:] if name.endswith("alpha") else its),
                    k if stacked else None,
                    its[0] // size if part in ("q", "k") and not each else 0,
                )
                for part, its in rows.items()
            ]
            entries.append(Entry(name.format(k=k), inner, pieces))
    return entries


def plan(entries: list[Entry], where: dict, folder: Path) -> list[str]:
    """Checks that every piece is there and has the right shape; returns the dtype of each entry."""
    dtypes: list[str] = []
    for entry in entries:
        kinds = set()
        for piece in entry.pieces:
            if piece.name not in where:
                raise ValueError(f"{folder}: the tensor {piece.name} is missing")
            stored = where[piece.name].get_slice(piece.name)
            if stored.get_shape() != piece.shape:
                raise ValueError(
                    f"{folder}: {piece.name} has the shape {stored.get_shape()}, expected {piece.shape}"
                )
            kinds.add(stored.get_dtype())
        if len(kinds) > 1 or not kinds <= FLOATS.keys():
            raise ValueError(
                f"{folder}: {entry.pieces[0].name} and what joins it are {' and '.join(sorted(kinds))}, "
                f"expected one of {', '.join(FLOATS)}"
            )
        dtypes += kinds
    return dtypes


def write(path: Path, entries: list[Entry], dtypes: list[str], where: dict) -> None:
    """A SafeTensors file: 8 bytes for the header's length, the header in JSON, the tensors as they come."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry, dtype in zip(entries, dtypes):
        start, end = end, end + FLOATS[dtype] * math.prod(entry.shape)
        header[entry.name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in (piece for entry in entries for piece in entry.pieces):
            stored = where[piece.name].get_slice(piece.name)
            tensor = stored[:] if piece.row is None else stored[piece.row]
            if piece.rotary_heads:  # [heads, halves, pairs, in] -> [heads, pairs, halves, in]
                tensor = tensor.unflatten(0, (piece.rotary_heads, 2, -1)).transpose(1, 2)
            file.write(tensor.contiguous().view(torch.uint8).numpy())


# ------------------------------------------------------------------------------------------------------ files


def open_files(folder: Path) -> dict:
    """Each tensor's name -> the open file that has it; no tensor is read yet."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file():
        if not index.is_file():
            raise ValueError(
                f"{folder}: neither {names[0]} nor {index.name} is there, and nothing else is read"
            )
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError(f"{index}: it has no weight_map with the names of the files")
    where = {}
    for path in sorted({folder / name for name in names}):
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        open_regular(path).close()
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole SafeTensors file ({error})") from None
        if twice := where.keys() & file.keys():
            raise ValueError(f"{path}: the tensor {min(twice)} is in another shard as well")
        where.update(dict.fromkeys(file.keys(), file))
    return where


def convert(folder: Path, out: Path) -> str:
    """Does it, and returns what to say. ValueError and OSError say what is wrong; then there is no `out`."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir()) and not out.samefile(Path.cwd())
    if os.path.lexists(out) and not empty:
        raise ValueError(f"{out}: it is there already and not an empty folder elsewhere, name another one")
    path = folder / "config.json"
    given = read_json(path)
    kind, names = given.get("model_type"), given.get("architectures")
    if (kind, names) not in [
        ("moshi", ["MoshiForConditionalGeneration"]),
        ("mimi", ["MimiModel"]),
        ("moshi", None),
        ("mimi", None),
    ]:
        raise ValueError(
            f"{path}: model_type {kind!r} with architectures {names!r} cannot be converted, "
            "only MoshiForConditionalGeneration and MimiModel"
        )
    codec, depth = (given.get(key) or {} for key in ("audio_encoder_config", "depth_decoder_config"))
    if not isinstance(codec, dict) or not isinstance(depth, dict):
        raise ValueError(f"{path}: audio_encoder_config and depth_decoder_config must be JSON objects")
    ours = mimi_config(given if kind == "mimi" else codec, str(path))
    mimi = build(Mimi, ours, path)
    files = {
        MIMI_FILE: table(mimi, mimi_min.MIMI_NAMES, MIMI_NAMES, "audio_encoder." if kind == "moshi" else "")
    }
    jsons = {MIMI_CONFIG_FILE: ours.to_dict()}
    if kind == "moshi":
        card = given.get("audio_vocab_size") or ours.bins
        if card != ours.bins:
            raise ValueError(f"{path}: audio_vocab_size {card!r} is not Mimi's codebook_size {ours.bins}")
        config = moshi_config({**given, "audio_vocab_size": card}, depth, str(path))
        jsons["config.json"] = {
            **config.to_dict(),
            "moshi_name": MOSHI_FILE,
            "mimi_name": MIMI_FILE,
            "mimi_config_name": MIMI_CONFIG_FILE,
        }
        moshi = build(Moshi, config, path)
        files[MOSHI_FILE] = table(moshi, moshi_min.MOSHI_NAMES, MOSHI_NAMES, "")
    where = open_files(folder)
    dtypes = {name: plan(entries, where, folder) for name, entries in files.items()}
    used = {piece.name for entries in files.values() for entry in entries for piece in entry.pieces}
    if where.keys() - used:
        raise ValueError(f"{folder}: the tensor {min(where.keys() - used)} is not known")
    tokenizer = next(
        (folder / name for name in (TOKENIZER_FILE, "tokenizer.model") if (folder / name).is_file()), None
    )

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        for name, entries in files.items():
            write(temporary / name, entries, dtypes[name], where)
        for name, content in jsons.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer:
            shutil.copyfile(tokenizer, temporary / TOKENIZER_FILE)
        temporary.chmod(0o755)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    said = f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}"
    if kind == "moshi" and not tokenizer:
        said += f"\n{folder} has no SentencePiece file: put the model's {TOKENIZER_FILE} there, or text "
        said += "is token ids"
    return said


def main() -> int:
    """Exit codes: 0, 2 after what can be put right, 128 + a signal."""
    parser = argparse.ArgumentParser(
        description="A Hugging Face folder of Moshi or Mimi, into the official format."
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="config.json, model.safetensors or its shards"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    arguments = parser.parse_args()
    try:
        said = convert(arguments.folder, arguments.out)
    except KeyboardInterrupt:
        return 128 + [*signals, signal.SIGINT][0]
    except (ValueError, OverflowError, RecursionError, OSError, SafetensorError) as error:
        show(f"convert_hf.py: {plain(error)}\n", sys.stderr)
        return 2
    show(f"{said}\n", sys.stdout)
    return 0


if __name__ == "__main__":
    run_program(main)
