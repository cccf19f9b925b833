"""Relatives of Moshi in the official format, tensor by tensor into what Moshi has: LoRA, int8, Hibiki,
PersonaPlex.

Each function takes {official name: Lazy} and gives the same, nearer to a model that moshi_min opens. Names
are the newer ones, with a tensor for each codebook. `plan`, at the end, puts them together."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lazy import Lazy, Plan, made, open_tensors, take
from torch import Tensor

from files import read_json, to_int8
from mimi_min import build, newer_name, official_names
from moshi_min import MIMI_FILE, MOSHI_FILE, MOSHI_NAMES, TOKENIZER_FILE, Moshi, MoshiConfig

Tensors = dict[str, Lazy]
DTYPES = {name: getattr(torch, name) for name in ("int8", "bfloat16", "float16", "float32")}

# A tensor of which the depth decoder has one for each codebook: what is before the number, that, the rest.
EACH = re.compile(r"(depformer_in|linears|depformer_emb|depformer\..*(?:_projs|gating))\.(\d+)\.(.*)")


def newer_names(tensors: Tensors, sets: int) -> Tensors:
    """Older files stack the attention weights of all codebooks, newer ones name one by one. `sets`: how many
    the depth decoder has; Helium has one."""
    result = {}
    for name, tensor in tensors.items():
        newer = re.sub(r"\.(in|out)_proj[_.]((lora_[AB]\.)?weight(_scb)?)$", r".\1_projs.{k}.\2", name)
        count = sets if name.startswith("depformer.") else 1
        if newer == name:
            result[name] = tensor
        else:
            split = {newer.format(k=k): made(partial(part, k=k, count=count), tensor) for k in range(count)}
            result.update(split)
    return result


def part(stacked: Tensor, k: int, count: int) -> Tensor:
    """The k-th of `count` equal parts along the first axis."""
    return stacked.unflatten(0, (count, -1))[k]


# ------------------------------------------------------------------------------------------- int8, and dtypes


def is_linear(name: str, tensor: Lazy) -> bool:
    """Whether this is the weight of a linear layer, which int8 files round. Tables and norms they leave."""
    return len(tensor.shape) == 2 and "emb" not in name


def quantized(tensors: Tensors) -> Tensors:
    """All linear layers in int8, as in the released files: `weight`, and `weight_scb` beside it."""
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor
        if is_linear(name, tensor):
            result[name] = made(lambda weight: to_int8(weight)[0], tensor)
            result[f"{name}_scb"] = made(lambda weight: to_int8(weight)[1], tensor)
    return result


def dequantized(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Each int8 weight with its `weight_scb`, in this dtype again."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            largest = take(tensors, f"{name}_scb", tensor.shape[:1])
            result[name] = made(partial(scaled_rows, dtype=dtype), tensor, largest)
        elif not name.endswith("_scb"):
            result[name] = tensor
    return result


def scaled_rows(rows: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that int8 rows stand for; `largest` [out] is what 127 means in each."""
    return (rows * largest[:, None]).div_(127).to(dtype)


def cast(tensors: Tensors, dtype: str) -> Tensors:
    """All of them in this dtype, or the linear layers in int8."""
    if dtype == "int8":
        return quantized(tensors)
    return {name: made(lambda numbers: numbers.to(DTYPES[dtype]), tensor) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------------- LoRA


def merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """weight [out, in] + scaling * b [out, r] @ a [r, in], all in the weight's dtype."""
    update = b.to(weight.dtype) @ a.to(weight.dtype)
    return weight + scaling * update.view_as(weight)


def merged(base: Tensors, adapters: Tensors, scaling: float) -> Tensors:
    """The base with the adapters in its linear layers, and the tables that moshi-finetune trained whole."""
    result = dict(base)
    for name, tensor in adapters.items():
        target = re.sub(r"\.lora_[AB]\.", ".", name)
        other = (
            name.replace(".lora_A.", ".lora_B.")
            if ".lora_A." in name
            else name.replace(".lora_B.", ".lora_A.")
        )
        if target not in base:
            raise ValueError(f"{name} changes {target}, which the base does not have")
        if other not in adapters:
            raise ValueError(f"the tensor {other} is missing")
        if ".lora_A." in name:
            result[target] = made(partial(merge, scaling=scaling), base[target], tensor, adapters[other])
        elif target == name:
            new = take(adapters, name, base[name].shape)
            result[name] = made(lambda table, dtype=base[name].dtype: table.to(dtype), new)
    return result


# ----------------------------------------------------------------------------------------------------- Hibiki


def spelled_out(tensors: Tensors, schedule: list[int]) -> Tensors:
    """Codebook k gets the weights number schedule[k], and tables of low rank are multiplied out."""
    result = {}
    for name, tensor in tensors.items():
        each, wider = EACH.fullmatch(name), f"{name.removesuffix('weight')}low_rank.weight"
        if wider in tensors:
            result[name] = made(F.linear, tensor, tensors[wider])
        elif each and each[1] not in ("linears", "depformer_emb"):
            users = [k for k, number in enumerate(schedule) if number == int(each[2])]
            result.update({f"{each[1]}.{k}.{each[3]}": tensor for k in users})
        elif not name.endswith(".low_rank.weight"):
            result[name] = tensor
    return result


def conditioned(tensors: Tensors, given: dict, quality: str) -> Tensors:
    """The condition for good: it is added to every input, as a text token is, so it goes into that table."""
    try:
        (condition,) = given["conditioners"]
        values = given["conditioners"][condition]["lut"]["possible_values"]
        if given["fuser"]["sum"] != [condition] or not isinstance(values, list):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError("config.json: only Hibiki's kind of condition can be converted") from None
    if quality not in values:
        raise ValueError(f"--quality {quality!r}: the model knows {', '.join(map(str, values))}")
    prefix, index = f"condition_provider.conditioners.{condition}.", values.index(quality)
    names = ["text_emb.weight", f"{prefix}embed.weight", f"{prefix}output_proj.weight"]
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"the tensor {missing[0]} is missing")
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("condition_provider.")}
    result[names[0]] = made(partial(folded, index=index), *(tensors[name] for name in names))
    return result


def folded(table: Tensor, words: Tensor, projection: Tensor, index: int) -> Tensor:
    """table [tokens, D] with a condition added to each row: projection [D, d] times row `index` of words."""
    return table + F.linear(words[index], projection).to(table.dtype)


def with_late_end(tensors: Tensors) -> Tensors:
    """The end of the text (2) reads as PAD (3): it may come too early. The official loader does the same."""
    name = "text_emb.weight"
    if name not in tensors:
        raise ValueError(f"the tensor {name} is missing")
    return {**tensors, name: made(lambda table: torch.cat([table[:2], table[3:4], table[3:]]), tensors[name])}


# ------------------------------------------------------------------------------------------------ PersonaPlex


def first_half(tensors: Tensors, own: int) -> Tensors:
    """A depth decoder of the first `own` codebooks. PersonaPlex also predicts the user's, and what the user
    says replaces them: without them the others are the same."""
    result = {}
    for name, tensor in tensors.items():
        each = EACH.fullmatch(name)
        count = own - 1 if name.startswith("depformer_emb.") else own  # the last codebook is read by none
        if not each or int(each[2]) < count:
            result[name] = tensor
    return result


def personaplex(given: dict) -> dict:
    """Its config.json only says its name: it has Moshi 7B's sizes, and predicts the user's codebooks, too."""
    return {**MoshiConfig().to_dict(), "dep_q": 16, **given, "model_type": "moshi"}


# ---------------------------------------------------------------------------------------------------- folders

# What config.json may say of the model before, and no longer says of what comes out.
SPENT = ("lora_name", "lora_rank", "lora_scaling", "quantize", "version", "conditioners", "fuser")
SPENT += ("depformer_low_rank_embeddings", "depformer_weights_per_step_schedule")
FILES = {  # what config.json calls them -> their names where it doesn't
    "moshi_name": MOSHI_FILE,
    "mimi_name": MIMI_FILE,
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": TOKENIZER_FILE,
    "lora_name": "lora.safetensors",
}


def plan(folder: Path, given: dict, base: Path | None, quality: str, dtype: str | None) -> Plan:
    """What becomes of a folder in the official format; `given` is its config.json.

    `base` is the folder of the model that adapters were trained on. With `dtype` None weights stay as they
    are, and int8 ones become bfloat16."""
    kind = given.get("model_type")
    if kind == "personaplex":
        given = personaplex(given)
    config, sizes = without_spent(given)
    home, told = folder, given  # where the model is, the codec and the words
    if base is not None:
        home, told = base, read_config(base)
        if without_spent(told)[1] != sizes:
            raise ValueError(f"config.json: its sizes are not those of {base}")
    schedule = read_schedule(given, sizes.dep_q)
    sets = max(schedule, default=0) + 1

    whole, adapters = folder / "consolidated.safetensors", folder / file_name(given, "lora_name")
    changes = adapters.is_file() and not whole.is_file()
    if changes and base is None:
        raise ValueError(f"{adapters.name} changes another model: name its folder with --base")
    if base is not None and not changes and not whole.is_file():
        raise ValueError(f"there is no {adapters.name} to change {base} with")
    weights = whole if whole.is_file() else home / file_name(told, "moshi_name")
    stored = newer_names(open_tensors([weights]), sets)
    tensors = dequantized(stored, torch.float32 if dtype == "float32" else torch.bfloat16)
    if changes:
        tensors = merged(tensors, newer_names(open_tensors([adapters]), sets), read_scaling(given))
    tensors = spelled_out(tensors, schedule)
    if given.get("conditioners"):
        tensors = conditioned(tensors, given, quality)
    if kind == "hibiki":
        tensors = with_late_end(tensors)
    if kind == "personaplex":
        config["dep_q"] = sizes.n_q // 2
        tensors = first_half(tensors, config["dep_q"])
    expect(tensors, config)
    if tensors == stored and dtype is None and weights != whole and not given.get("lora"):
        raise ValueError("it is in the official format already; only --dtype could change it")
    copies, missing = companions(home, told, config, sizes.n_q > 0)
    return Plan({MOSHI_FILE: tensors}, {"config.json": config}, copies, missing)


def read_config(folder: Path) -> dict:
    """The folder's config.json. Without it, this is Moshi 7B."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else MoshiConfig().to_dict()


def without_spent(given: dict) -> tuple[dict, MoshiConfig]:
    """What stays of config.json, and the sizes in it; ValueError if moshi_min doesn't know what is left."""
    config = {key: value for key, value in given.items() if key not in SPENT} | {"lora": False}
    if given.get("model_type") == "hibiki":
        config["model_type"] = "moshi"
    return config, MoshiConfig.from_dict(config)


def file_name(given: dict, key: str) -> str:
    """The name of a file in the folder. config.json may say where it was published: hf://somewhere/name."""
    name = given.get(key) or FILES[key]
    if not isinstance(name, str) or Path(name).name in ("", ".."):
        raise ValueError(f"config.json: {key} {name!r} is no name of a file")
    return Path(name).name


def read_schedule(given: dict, codebooks: int) -> list[int]:
    """The number of the weights that each codebook uses: its own, unless config.json says something else."""
    schedule = given.get("depformer_weights_per_step_schedule")
    if schedule is None:
        return list(range(codebooks))
    good = isinstance(schedule, list) and len(schedule) == codebooks
    if not good or not all(type(number) is int and 0 <= number < codebooks for number in schedule):
        raise ValueError(f"config.json: depformer_weights_per_step_schedule cannot be {schedule!r}")
    return schedule


def read_scaling(given: dict) -> float:
    """What adapters are multiplied by."""
    scaling = given.get("lora_scaling", 2.0)  # as the official package
    if type(scaling) not in (int, float):
        raise ValueError(f"config.json: lora_scaling cannot be {scaling!r}")
    return scaling


def companions(home: Path, told: dict, config: dict, hears: bool) -> tuple[dict[str, Path], list[str]]:
    """The words, and for a model that hears the codec, in `home`, as its config.json names them; the names of
    what is not there. `config` gets all the names."""
    keys = ["tokenizer_name", *(["mimi_name"] if hears else [])]
    if hears and told.get("mimi_config_name"):
        keys.append("mimi_config_name")
    names = {key: file_name(told, key) for key in keys}
    if taken := {MOSHI_FILE, "config.json"} & set(names.values()):
        raise ValueError(f"config.json: {min(taken)} is not the name of the codec or of the words")
    config.update(names, moshi_name=MOSHI_FILE)
    copies = {name: home / name for name in names.values() if (home / name).is_file()}
    return copies, [name for name in names.values() if name not in copies]


def expect(tensors: Tensors, config: dict) -> None:
    """ValueError unless these are the tensors of the model that config.json describes."""
    model = build(Moshi, MoshiConfig.from_dict(config), "config.json")
    wanted, empty = set(), model.state_dict()
    for ours, name in official_names(model, MOSHI_NAMES).items():
        name, shape = newer_name(name), list(empty[ours].shape)
        each = "{k}" in name and len(shape) == 3
        for k in range(shape[0]) if each else [0]:
            wanted.add(name.format(k=k))
            take(tensors, name.format(k=k), shape[1:] if each else shape)
    if unknown := tensors.keys() - wanted:
        raise ValueError(f"the tensor {min(unknown)} is not known, does config.json fit the file?")
