"""Tensors that are read only when they are written: what every conversion is made of.

A conversion takes a dict of them, {name: Lazy}, and gives another one. So conversions are short, they can
follow each other, and memory holds what one tensor of the result is made of, never a whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from files import open_regular

KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}


class Lazy(NamedTuple):
    """A tensor to come: its shape and dtype are known, `read()` gives the numbers."""

    name: str  # what an error calls it
    shape: list[int]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Plan(NamedTuple):
    """What will be in a folder, by the names of its files. Nothing of it has been read yet but the names."""

    tensors: dict[str, dict[str, Lazy]]
    jsons: dict[str, dict]
    copies: dict[str, Path]  # files that go along as they are
    missing: list[str]  # files that belong there and were not found


def made(function: Callable[..., Tensor], *parts: Lazy) -> Lazy:
    """What `function` makes of the parts, once it is read. ValueError if their shapes do not fit together,
    which is tried at once, on tensors without numbers."""
    try:
        empty = function(*(torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts))
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{part.name} {part.shape}" for part in parts)
        raise ValueError(f"shapes that do not fit together: {shapes}") from None
    return Lazy(
        parts[0].name, list(empty.shape), empty.dtype, lambda: function(*(part.read() for part in parts))
    )


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor. The file is mapped for it alone, so that what was read before does not stay in memory."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def open_tensors(paths: Iterable[Path]) -> dict[str, Lazy]:
    """The tensors of SafeTensors files, which make one model. ValueError or OSError for anything else."""
    tensors: dict[str, Lazy] = {}
    for path in paths:
        open_regular(path).close()
        try:
            with safe_open(path, framework="pt") as file:
                stored = {name: file.get_slice(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole SafeTensors file ({error})") from None
        if twice := tensors.keys() & stored.keys():
            raise ValueError(f"{path}: the tensor {min(twice)} is in another shard as well")
        for name, tensor in stored.items():
            kind = tensor.get_dtype()
            if kind not in KINDS:
                raise ValueError(f"{path}: {name} is of the kind {kind}, expected one of {', '.join(KINDS)}")
            tensors[name] = Lazy(name, tensor.get_shape(), KINDS[kind], partial(read_tensor, path, name))
    return tensors


def take(tensors: dict[str, Lazy], name: str, shape: list[int]) -> Lazy:
    """The tensor of this name, floats of this shape, or a ValueError."""
    if name not in tensors:
        raise ValueError(f"the tensor {name} is missing")
    tensor = tensors[name]
    if tensor.shape != shape or not tensor.dtype.is_floating_point:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} has the shape {tensor.shape} and the dtype {kind}, expected floats of the shape {shape}"
        )
    return tensor


def write(path: Path, tensors: dict[str, Lazy]) -> None:
    """A SafeTensors file: 8 bytes for the header's length, the header in JSON, the tensors as they come.
    ValueError for numbers that are not finite; then the file is not whole."""
    # Widest numbers first, as readers map the file and want each at a multiple of its size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    kinds = {dtype: kind for kind, dtype in KINDS.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.dtype.itemsize * math.prod(tensor.shape)
        header[name] = {"dtype": kinds[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            numbers = tensors[name].read()
            if numbers.is_floating_point() and not torch.stack(numbers.aminmax()).isfinite().all():
                raise ValueError(f"{tensors[name].name} holds or gives numbers that are not finite")
            file.write(numbers.contiguous().view(torch.uint8).numpy())
