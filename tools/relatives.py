"""Relatives of Moshi in the official format, tensor by tensor into what Moshi has: LoRA, int8, Hibiki, PersonaPlex.

Each function takes {official name: Lazy} and gives the same for a model that moshi_min opens. Names are the newer
ones, with a tensor for each codebook. `plan`, at the end, puts them together.
"""

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
DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# A tensor of which the depth decoder has one for each codebook: before the codebook's number, the number, after it.
EACH = re.compile(r"(depformer_in|linears|depformer_emb|depformer\..*(?:_projs|gating))\.(\d+)\.(.*)")


def newer_names(tensors: Tensors, sets: int) -> Tensors:
    """Older files stack an attention's weights for all codebooks, newer ones name one by one. The depth decoder has
    `sets` of them."""
    result = {}
    for name, tensor in tensors.items():
        newer = re.sub(r"\.(in|out)_proj[_.]((lora_[AB]\.)?weight(_scb)?)$", r".\1_projs.{k}.\2", name)
        if newer == name:
            result[name] = tensor
            continue
        count = sets if name.startswith("depformer.") else 1
        for k in range(count):
            result[newer.format(k=k)] = made(partial(part, k=k, count=count), tensor)
    return result


def part(stacked: Tensor, k: int, count: int) -> Tensor:
    """The k-th of `count` equal parts along the first axis."""
    return stacked.unflatten(0, (count, -1))[k]


# -------------------------------------------------------------------------------------------------------- int8


def is_linear(name: str, tensor: Lazy) -> bool:
    """Whether a tensor is the weight of a linear layer, which the released int8 files round. Tables are not."""
    return len(tensor.shape) == 2 and "emb" not in name


def scaled_rows(rows: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that `to_int8` rounded."""
    return (rows * largest[:, None] / 127).to(dtype)


def quantized(tensors: Tensors) -> Tensors:
    """All linear layers in int8, as in the released files: `weight`, and `weight_scb` beside it."""
    result = {}
    for name, tensor in tensors.items():
        if is_linear(name, tensor):
            result[name] = made(lambda weight: to_int8(weight)[0], tensor)
            result[f"{name}_scb"] = made(lambda weight: to_int8(weight)[1], tensor)
        else:
            result[name] = tensor
    return result


def dequantized(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Each int8 weight with its `weight_scb`, in this dtype again."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            scale = take(tensors, f"{name}_scb", tensor.shape[:1])
            result[name] = made(partial(scaled_rows, dtype=dtype), tensor, scale)
        elif not name.endswith("_scb"):
            result[name] = tensor
    return result


def cast(tensors: Tensors, dtype: str) -> Tensors:
    """All of them in this dtype; int8 are linear layers only."""
    if dtype == "int8":
        return quantized(tensors)
    return {name: made(lambda tensor: tensor.to(DTYPES[dtype]), tensor) for name, tensor in tensors.items()}


# -------------------------------------------------------------------------------------------------------- LoRA


def merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """weight [out, in] + scaling * b [out, r] @ a [r, in], all in the weight's dtype."""
    update = b.to(weight.dtype) @ a.to(weight.dtype)
    return weight + scaling * update.view_as(weight)


def merged(base: Tensors, adapters: Tensors, scaling: float) -> Tensors:
    """The base model with adapters of moshi-finetune in its linear layers, and the tables that were trained whole."""
    result = dict(base)
    for name, tensor in adapters.items():
        target = re.sub(r"\.lora_[AB]\.", ".", name)
        if target not in base:
            raise ValueError(f"{name} changes {target}, which the base does not have")
        if ".lora_A." in name:
            b = name.replace(".lora_A.", ".lora_B.")
            if b not in adapters:
                raise ValueError(f"the tensor {b} is missing")
            result[target] = made(partial(merge, scaling=scaling), base[target], tensor, adapters[b])
        elif ".lora_B." not in name:
            new = take(adapters, name, base[name].shape)
            result[name] = made(lambda table, dtype=base[name].dtype: table.to(dtype), new)
        elif name.replace(".lora_B.", ".lora_A.") not in adapters:
            raise ValueError(f"the tensor {name.replace('.lora_B.', '.lora_A.')} is missing")
    return result


# ------------------------------------------------------------------------------------------------------ Hibiki


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
    """Without the condition, which is added to every input. So is the text token: it goes into that whole table."""
    try:
        (name,) = given["fuser"]["sum"]
        (only,), values = given["conditioners"], given["conditioners"][name]["lut"]["possible_values"]
        if only != name or not isinstance(values, list):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "config.json: only a condition like Hibiki's can be converted, one word out of a list"
        ) from None
    if quality not in values:
        raise ValueError(f"--quality {quality!r}: the model knows {', '.join(map(str, values))}")
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("condition_provider.")}
    prefix, index = f"condition_provider.conditioners.{name}.", values.index(quality)
    names = ("text_emb.weight", f"{prefix}embed.weight", f"{prefix}output_proj.weight")
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"the tensor {missing[0]} is missing")

    def fold(table: Tensor, words: Tensor, projection: Tensor) -> Tensor:
        return table + F.linear(words[index], projection).to(table.dtype)

    result["text_emb.weight"] = made(fold, *(tensors[name] for name in names))
    return result


def late_end(table: Tensor) -> Tensor:
    """Hibiki's text table. The end of the text (2) may come too early, and then it has to go on: it reads as PAD (3)."""
    return torch.cat([table[:2], table[3:4], table[3:]])


# -------------------------------------------------------------------------------------------------- PersonaPlex


def first_half(tensors: Tensors, own: int) -> Tensors:
    """A depth decoder of the first `own` codebooks. PersonaPlex also predicts the user's, and they are replaced by
    what the user says: without them the others are the same."""
    result = {}
    for name, tensor in tensors.items():
        each = EACH.fullmatch(name)
        count = own - 1 if name.startswith("depformer_emb.") else own  # the last codebook is not read
        if not each or int(each[2]) < count:
            result[name] = tensor
    return result


def personaplex(given: dict) -> dict:
    """Its config.json only says that it is one: the sizes are Moshi 7B's, with the user's codebooks predicted, too."""
    return {**MoshiConfig().to_dict(), "dep_q": 16, **given, "model_type": "moshi"}


# ------------------------------------------------------------------------------------------------------- folders

# What config.json may say of a model, and no longer says of what comes out.
SPENT = (
    "lora lora_name lora_rank lora_scaling quantize version conditioners fuser depformer_low_rank_embeddings "
    "depformer_weights_per_step_schedule"
).split()


FILES = (("mimi_name", MIMI_FILE), ("mimi_config_name", ""), ("tokenizer_name", TOKENIZER_FILE))


def read_config(folder: Path) -> dict:
    """The folder's config.json. Without it, this is Moshi 7B."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else MoshiConfig().to_dict()


def file_name(given: dict, key: str, default: str) -> str:
    """The name of a file of this folder. config.json may say where it was published, hf://somewhere/name."""
    name = given.get(key) or default
    if not isinstance(name, str) or Path(name).name in ("", ".."):
        raise ValueError(f"config.json: {key} {name!r} is no name of a file")
    return Path(name).name


def plan(folder: Path, given: dict, base: Path | None, quality: str, dtype: str | None) -> Plan:
    """What becomes of a folder in the official format; `given` is its config.json. `base`: the folder of the model
    that adapters were trained on. `dtype` None leaves weights as they are, and int8 ones become bfloat16."""
    if twice := given.get("model_type") == "personaplex":
        given = personaplex(given)
    config = {key: value for key, value in given.items() if key not in SPENT} | {"lora": False}
    sizes = MoshiConfig.from_dict(config)
    schedule = read_schedule(given, sizes.dep_q)
    sets = max(schedule, default=-1) + 1
    home, told = folder, given
    if base is not None:
        home, told = base, read_config(base)
        if MoshiConfig.from_dict({key: value for key, value in told.items() if key not in SPENT}) != sizes:
            raise ValueError(f"config.json: its sizes are not those of {base}")

    weights, adapters = (
        folder / "consolidated.safetensors",
        folder / file_name(given, "lora_name", "lora.safetensors"),
    )
    if not weights.is_file():
        if adapters.is_file() and base is None:
            raise ValueError(f"{adapters.name} changes another model: name its folder with --base")
        weights = home / file_name(told, "moshi_name", MOSHI_FILE)
    stored = newer_names(open_tensors([weights]), sets)
    tensors = dequantized(stored, torch.float32 if dtype == "float32" else torch.bfloat16)
    if adapters.is_file():
        changes = newer_names(open_tensors([adapters]), sets)
        tensors = merged(tensors, changes, read_scaling(given))
    tensors = spelled_out(tensors, schedule)
    if given.get("conditioners"):
        tensors = conditioned(tensors, given, quality)
    if given.get("model_type") == "hibiki" and "text_emb.weight" in tensors:
        tensors["text_emb.weight"] = made(late_end, tensors["text_emb.weight"])
    if twice:
        config["dep_q"] = sizes.n_q // 2
        tensors = first_half(tensors, config["dep_q"])
    expect(tensors, config)
    if tensors == stored and dtype is None and not given.get("lora"):
        raise ValueError("it is in the official format already; only --dtype could change it")
    copies, missing = companions(home, told, config)
    return Plan({MOSHI_FILE: tensors}, {"config.json": config}, copies, missing)


def read_schedule(given: dict, codebooks: int) -> list[int]:
    """The number of the weights that each codebook uses: its own, unless config.json says something else."""
    schedule = given.get("depformer_weights_per_step_schedule")
    if schedule is None:
        return list(range(codebooks))
    if not isinstance(schedule, list) or len(schedule) != codebooks:
        raise ValueError(f"config.json: depformer_weights_per_step_schedule needs {codebooks} numbers")
    if not all(type(number) is int and 0 <= number < codebooks for number in schedule):
        raise ValueError(f"config.json: depformer_weights_per_step_schedule cannot be {schedule}")
    return schedule


def read_scaling(given: dict) -> float:
    """What adapters are multiplied by."""
    scaling = given.get("lora_scaling", 2.0)  # as the official package
    if type(scaling) not in (int, float):
        raise ValueError(f"config.json: lora_scaling cannot be {scaling!r}")
    return scaling


def companions(home: Path, told: dict, config: dict) -> tuple[dict[str, Path], list[str]]:
    """The codec and the text vocabulary in `home`, as its config.json names them; those that are not there. `config`
    gets their names."""
    names = {key: file_name(told, key, default) for key, default in FILES if default or told.get(key)}
    config.update(names, moshi_name=MOSHI_FILE)
    copies = {name: home / name for name in names.values() if (home / name).is_file()}
    return copies, [name for name in names.values() if name not in copies]


def expect(tensors: Tensors, config: dict) -> None:
    """ValueError unless these are the tensors of the model that config.json describes."""
    model = build(Moshi, MoshiConfig.from_dict(config), "config.json")
    empty, wanted = model.state_dict(), set()
    for ours, name in official_names(model, MOSHI_NAMES).items():
        name, shape = newer_name(name), list(empty[ours].shape)
        each = "{k}" in name and len(shape) == 3
        for k in range(shape[0]) if each else [0]:
            wanted.add(name.format(k=k))
            take(tensors, name.format(k=k), shape[1:] if each else shape)
    if unknown := tensors.keys() - wanted:
        raise ValueError(f"the tensor {min(unknown)} is not known, does config.json fit the file?")
