"""Hugging Face's Moshi, Mimi and Helium: their names, sizes and order of numbers, tensor by tensor into ours.

What differs:
- the names, see the three tables below;
- queries, keys and values are one tensor in the official files, as are Helium's gate and up projections;
- the depth decoder's weights are one tensor for each codebook there, and all stacked here;
- the rows of Moshi's and Mimi's rotary queries and keys, ordered to rotate halves instead of neighbours.
Every tensor keeps its dtype.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import torch
from lazy import Lazy, Plan, made, open_tensors, take
from torch import Tensor

import mimi_min
import moshi_min
from files import read_json
from mimi_min import Mimi, MimiConfig, build, newer_name, official_names
from moshi_min import MIMI_CONFIG_FILE, MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE, Moshi, MoshiConfig, gated_width

Tensors = dict[str, Lazy]

# ----------------------------------------------------------------------------------------------------- tables

# From an official name to Hugging Face's: each rule (pattern, replacement) in turn. '{k}' is the codebook;
# '[q k v]' stands for three tensors, which are one below the other in the official one.
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
    (r"in_projs\.(0|{k})\.", "[q k v]_proj.linear."),
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
    (r"in_projs\.0", "[q k v]_proj"),
    (r"out_projs\.0", "o_proj"),
    (r"rvq_first", "semantic_residual_vector_quantizer"),
    (r"rvq_rest", "acoustic_residual_vector_quantizer"),
    (r"\.vq\.layers", ".layers"),
    (r"\._codebook\._?", ".codebook."),
    (r"embedding_sum", "embed_sum"),
]
HELIUM_NAMES = [
    (r"^text_emb", "model.embed_tokens"),
    (r"^text_linear", "lm_head"),
    (r"^out_norm\.alpha", "model.norm.weight"),
    (r"^transformer", "model"),
    (r"norm1\.alpha", "input_layernorm.weight"),
    (r"norm2\.alpha", "post_attention_layernorm.weight"),
    (r"gating\.linear_in", "mlp.[gate up]_proj"),
    (r"gating\.linear_out", "mlp.down_proj"),
    (r"in_projs\.0", "[q k v]_proj"),
    (r"out_projs\.0", "o_proj"),
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
HELIUM_KEYS = {
    "hidden_size": ("dim", 2560),
    "num_hidden_layers": ("num_layers", 24),
    "num_attention_heads": ("num_heads", 20),
    "max_position_embeddings": ("context", 4096),
    "vocab_size": ("text_card", 48000),
    "attention_bias": ([False], False),
    "mlp_bias": ([False], False),
    **BOTH_KEYS,
}

# --------------------------------------------------------------------------------------------- configurations


def is_size(value) -> bool:
    """True for a positive int (True itself isn't one) that may be a size."""
    return type(value) is int and 0 < value < 2**20


def read_fields(given: dict, table: dict, what: str) -> dict:
    """Fields of our config. A row of `table` is (field, default) or ([possible values], default)."""
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


def read_config(given: dict, table: dict, what: str, heads_field: str, period=10000.0) -> tuple[dict, float]:
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
    return fields, rope.get("rope_theta", given.get("rope_theta", period))


def kv_repeat(given: dict, heads: int, what: str) -> int:
    """Query heads that share a key and value head."""
    kv_heads = given.get("num_key_value_heads") or heads
    if not is_size(kv_heads) or heads % kv_heads:
        raise ValueError(f"{what}: {kv_heads!r} key and value heads do not fit {heads} heads")
    return heads // kv_heads


def official_width(dim: int, given: dict, key: str, default: int, what: str) -> int:
    """The official feed-forward width, of which two thirds are hidden units. `ffn_dim`, in Moshi, is twice as
    many, `intermediate_size`, in Helium, as many."""
    said = given.get(key, default)
    doubled = 2 * said if key == "intermediate_size" and is_size(said) else said
    if is_size(doubled) and doubled % 2 == 0:
        for width in (-(-3 * doubled // 4), 3 * doubled // 4 + 1, 4 * dim):
            if gated_width(dim, width) == doubled // 2:
                return width
    raise ValueError(f"{what}: no official model of width {dim} has an {key} of {said!r}")


def scale_of(width: int, dim: int) -> float:
    """The `hidden_scale` of which the official model takes int(hidden_scale * dim)."""
    scale = width / dim
    return scale if int(scale * dim) == width else (width + 0.5) / dim


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
    depth_what = f"{what}, depth_decoder_config"
    depth_fields, _ = read_config(depth, DEPTH_KEYS, depth_what, "depformer_num_heads")
    fields.update(depth_fields)
    K, dim = fields["dep_q"], fields["dim"]
    width = official_width(dim, given, "ffn_dim", 22528, what)
    return MoshiConfig(
        **fields,
        n_q=2 * K,
        delays=(0, *2 * (0, *(K - 1) * (1,))),
        max_period=max_period,
        kv_repeat=kv_repeat(given, fields["num_heads"], what),
        hidden_scale=scale_of(width, dim),
        depformer_kv_repeat=kv_repeat(depth, fields["depformer_num_heads"], depth_what),
        depformer_dim_feedforward=official_width(fields["depformer_dim"], depth, "ffn_dim", 5632, depth_what),
    )


def helium_config(given: dict, what: str) -> MoshiConfig:
    """A text model in our words: a Moshi that neither hears nor speaks."""
    fields, max_period = read_config(given, HELIUM_KEYS, what, "num_heads", period=100000.0)
    width = official_width(fields["dim"], given, "intermediate_size", 7040, what)
    return MoshiConfig(
        **fields,
        n_q=0,
        dep_q=0,
        delays=(0,),
        max_period=max_period,
        kv_repeat=kv_repeat(given, fields["num_heads"], what),
        hidden_scale=scale_of(width, fields["dim"]),
    )


# ---------------------------------------------------------------------------------------------------- weights


def parts(
    theirs: str, rows: int, config: MimiConfig | MoshiConfig, depth: bool
) -> list[tuple[str, int, int]]:
    """(name, rows, heads) of the tensors that a name of Hugging Face's stands for, one below the other."""
    several = re.search(r"\[(.+)\]", theirs)
    if several is None:
        return [(theirs, rows, 1)]
    shares = dict.fromkeys(several[1].split(), 1)  # gate and up are as large as each other
    if "q" in shares:
        of = "depformer_" if depth else ""
        heads = getattr(config, f"{of}num_heads")
        kv_heads = heads // getattr(config, f"{of}kv_repeat", 1)  # Mimi has no groups
        shares = {"q": heads, "k": kv_heads, "v": kv_heads}
    size = rows // sum(shares.values())
    return [(theirs.replace(several[0], part), share * size, share) for part, share in shares.items()]


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, in]: the rows of each head, two halves that rotate together, become pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def official(
    tensors: Tensors, model: Mimi | Moshi, rules: list, prefix: str = "", halves: bool = True
) -> tuple[Tensors, set[str]]:
    """The tensors of an official file out of Hugging Face's, and the names of those that it took.

    `model` is one of ours, on the meta device. `rules` make official names Hugging Face's. `halves`: queries
    and keys are ordered to rotate halves."""
    names = official_names(model, mimi_min.MIMI_NAMES if isinstance(model, Mimi) else moshi_min.MOSHI_NAMES)
    result, used = {}, set()
    for ours, empty in model.state_dict().items():
        name, shape = newer_name(names[ours]), list(empty.shape)
        if len(shape) == 2:  # Helium's, where the depth decoder has one for each codebook
            name = name.format(k=0)
        theirs = name
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        each = "{k}" in name
        inner = shape[1:] if each else shape
        # Hugging Face has all codebooks in one tensor, unless it has a module for each.
        stacked = shape[:1] if each and "{k}" not in theirs else []
        for k in range(shape[0]) if each else [0]:
            pieces = []
            for part, rows, heads in parts(theirs, inner[0], model.config, each):
                its = inner[-1:] if name.endswith("alpha") else [rows, *inner[1:]]
                piece = take(tensors, prefix + part.format(k=k), stacked + its)
                used.add(piece.name)
                if stacked:
                    piece = made(lambda whole, k=k: whole[k], piece)
                elif halves and re.search(r"\b[qk]_proj", part):
                    piece = made(partial(neighbours, heads=heads), piece)
                pieces.append(piece)
            result[name.format(k=k)] = made(partial(joined, shape=inner), *pieces)
    return result, used


def joined(*pieces: Tensor, shape: list[int]) -> Tensor:
    """Tensors one below the other, in this shape."""
    return torch.cat(pieces).view(shape)


# ------------------------------------------------------------------------------------------------------ files

CLASSES = {"moshi": "MoshiForConditionalGeneration", "mimi": "MimiModel", "helium": "HeliumForCausalLM"}


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that an index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ValueError(f"neither {whole.name} nor {index.name} is there, and nothing else is read")
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index.name} has no weight_map with the names of the files")
    paths = sorted({folder / name for name in names})
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path.name}, which {index.name} names")
    return paths


def section(given: dict, key: str) -> dict:
    """A part of config.json."""
    if not isinstance(found := given.get(key) or {}, dict):
        raise ValueError(f"config.json: {key} must be a JSON object")
    return found


def plan(folder: Path, given: dict) -> Plan:
    """What becomes of a folder as `save_pretrained` writes it; `given` is its config.json."""
    kind, classes = given.get("model_type"), given.get("architectures")
    if kind not in [*CLASSES] or classes not in (None, [CLASSES[kind]]):  # a list: `kind` may be any JSON
        raise ValueError(
            f"config.json: model_type {kind!r} with architectures {classes!r} cannot be converted, "
            f"only {', '.join(CLASSES.values())}"
        )
    tensors = open_tensors(weight_files(folder))
    plan, used = {"moshi": moshi, "mimi": mimi, "helium": helium}[kind](tensors, given)
    if unknown := tensors.keys() - used:
        raise ValueError(f"the tensor {min(unknown)} is not known")
    if kind != "mimi":
        words = [folder / name for name in (TOKENIZER_FILE, "tokenizer.model") if (folder / name).is_file()]
        if words:
            plan.copies[TOKENIZER_FILE] = words[0]
        else:
            plan.missing.append(TOKENIZER_FILE)
    return plan


def mimi(tensors: Tensors, given: dict, prefix: str = "") -> tuple[Plan, set[str]]:
    """The codec's two files; the names of the tensors that they are made of."""
    config = mimi_config(given, "config.json")
    made_of, used = official(tensors, build(Mimi, config, "config.json"), MIMI_NAMES, prefix)
    return Plan({MIMI_FILE: made_of}, {MIMI_CONFIG_FILE: config.to_dict()}, {}, []), used


def moshi(tensors: Tensors, given: dict) -> tuple[Plan, set[str]]:
    """The model with its codec."""
    depth, codec = section(given, "depth_decoder_config"), section(given, "audio_encoder_config")
    plan, used = mimi(tensors, codec, "audio_encoder.")
    bins = plan.jsons[MIMI_CONFIG_FILE]["quantizer"]["bins"]
    card = given.get("audio_vocab_size") or bins
    if card != bins:
        raise ValueError(f"config.json: audio_vocab_size {card!r} is not Mimi's codebook_size {bins}")
    config = moshi_config({**given, "audio_vocab_size": card}, depth, "config.json")
    made_of, more = official(tensors, build(Moshi, config, "config.json"), MOSHI_NAMES)
    plan.tensors[MOSHI_FILE] = made_of
    names = {"moshi_name": MOSHI_FILE, "mimi_name": MIMI_FILE, "mimi_config_name": MIMI_CONFIG_FILE}
    plan.jsons["config.json"] = {**config.to_dict(), **names}
    return plan, used | more


def helium(tensors: Tensors, given: dict) -> tuple[Plan, set[str]]:
    """A text model: a Moshi that neither hears nor speaks.

    Moshi's table of text has one more row, for the token that starts the stream. It becomes a copy of the row
    of Helium's own first token, so that both start in the same way.
    """
    config = helium_config(given, "config.json")
    start, name = given.get("bos_token_id", 1), "model.embed_tokens.weight"
    if type(start) is not int or not 0 <= start < config.text_card:
        raise ValueError(f"config.json: bos_token_id {start!r} is no token of the vocabulary")
    table = take(tensors, name, [config.text_card, config.dim])
    longer = made(lambda rows: torch.cat([rows, rows[start : start + 1]]), table)
    model = build(Moshi, config, "config.json")
    made_of, used = official({**tensors, name: longer}, model, HELIUM_NAMES, halves=False)
    json = {**config.to_dict(), "moshi_name": MOSHI_FILE}
    return Plan({MOSHI_FILE: made_of}, {"config.json": json}, {}, []), used
