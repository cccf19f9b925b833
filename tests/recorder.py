"""Watches PyTorch's operators one by one: what a CUDA graph would see of a function, shown without a GPU.

A capture writes down the kernels that a function launches and the very addresses that they read and write.
A replay runs those kernels again, and no Python. So a function may be captured if it does the same in every
call, on the same memory, and never looks at a value. What tells whether it does:

  Recorder        lists the operators that run inside it, and refuses what a capture on a GPU would refuse
  listing         the operators of a function as lines of text, to compare one call with the next
  PaperGraph      a graph on paper: `with record(graph): ...` writes operators down, `graph.replay()` runs
                  them again, used as torch.cuda.CUDAGraph and torch.cuda.graph are
  Fused           lets the meta device run attention and RMSNorm as one operator each, as a GPU does
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


def tensors(tree):
    """The tensors in arguments or results, however nested."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory(tensor):
    """A number for the memory that a tensor lies in, its own while that lives. Views of it have the same one.
    An address would do but on the meta device, where all are 0."""
    return tensor.untyped_storage()._cdata


class Call:
    """An operator that ran: with which arguments, and what it returned."""

    def __init__(self, operator, args, kwargs):
        self.operator, self.args, self.kwargs, self.results = operator, args, kwargs, []
        self.given = tensors((args, kwargs))
        self.written = []  # those of them that it writes into
        for place, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written += tensors(args[place] if place < len(args) else kwargs.get(argument.name))

    def run(self):
        """Runs it, or runs it again."""
        return self.operator(*self.args, **self.kwargs)

    @property
    def made(self):
        """The results in new memory; the others are views of what was given, or what was written into."""
        old = {memory(tensor) for tensor in self.given}
        return [tensor for tensor in self.results if memory(tensor) not in old]

    @property
    def launches(self):
        """Whether a GPU would run a kernel: not for a view, nor for memory that is only reserved."""
        return bool(self.written or self.made) and "empty" not in self.operator.name()

    def refused(self):
        """Why a capture would refuse it, or None."""
        tags = set(self.operator.tags)
        if self.operator.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            if any(index.dtype in (torch.bool, torch.uint8) for index in tensors(self.args[1])):
                return "a mask as an index: the host must know how many it picks"
        elif tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}:
            return "the host reads a value"
        if self.operator.overloadpacket is aten.lift_fresh:
            return "a tensor of Python's numbers is copied to the device"
        if len({tensor.device for tensor in self.given + self.results}) > 1:
            return "tensors of two devices"
        return None


class Recorder(TorchDispatchMode):
    """Lists the operators that run inside it as `calls`. Raises RuntimeError for one that a capture would
    refuse, or with `strict=False` for none."""

    def __init__(self, strict=True):
        super().__init__()
        self.strict, self.calls = strict, []
        self.new = set()  # memory made inside
        self.before = {}  # other memory that was written into: (all of it as one flat tensor, what it held)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        call = Call(operator, args, kwargs or {})
        for tensor in call.written:
            if memory(tensor) not in self.new | self.before.keys():
                everything = tensor.new_empty(0).set_(tensor.untyped_storage())
                self.before[memory(tensor)] = everything, everything.clone()
        returned = call.run()
        call.results = tensors(returned)
        if self.strict and call.refused():
            raise RuntimeError(f"{operator}: {call.refused()}")
        self.new.update(memory(tensor) for tensor in call.made)
        self.calls.append(call)
        return returned

    @property
    def launches(self):
        """How many kernels a GPU would run, taking an operator for one."""
        return sum(call.launches for call in self.calls)

    @property
    def bytes_read(self):
        """Bytes of older memory that are read, each once: weights, and rings of keys and values. Tables that
        rows are picked from are left out."""
        pieces = {}
        for call in self.calls:
            if call.launches and call.operator.overloadpacket is not aten.embedding:
                written = {id(tensor) for tensor in call.written}
                for tensor in call.given:
                    if memory(tensor) not in self.new and id(tensor) not in written:
                        pieces[memory(tensor), tensor.storage_offset(), tensor.numel()] = tensor.nbytes
        return sum(pieces.values())


class Fused(TorchFunctionMode):
    """Lets attention and RMSNorm be one operator each on the meta device, as they are on a GPU, attention's
    result laid out as there. By themselves they fall into their parts."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            return self.attention(*args, **(kwargs or {}))
        if function is F.rms_norm and args[0].is_meta:
            return self.rms_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def attention(query, key, value, attn_mask=None, **options):
        return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False)[0]

    @staticmethod
    def rms_norm(x, shape, weight=None, eps=None):
        """LayerNorm stands in for it, one operator that reads and writes the same."""
        return aten.native_layer_norm(x, shape, weight, None, eps)[0]


def listing(function, names):
    """What `function()` does, a line for each operator: the numbers it gets, and of each tensor the type,
    shape, strides, offset and the memory that it lies in. That is an earlier line's result, or memory from
    before; `names` (a dict, empty at first, passed on to the next call) keeps the names of the latter.
    Two calls with the same lines do the same, on the same memory."""
    with torch.no_grad(), Fused(), Recorder() as recorder:
        function()
    made, lines = {}, []

    def describe(value):
        if not isinstance(value, Tensor):
            return value
        where = made.get(memory(value))
        if where is None:  # `names` holds on to the tensor, or a later one might get its number
            where, _ = names.setdefault(memory(value), (f"memory {len(names)}", value))
        size = f"{value.dtype}, {tuple(value.shape)}, {value.stride()} from {value.storage_offset()}"
        return f"<{where}: {size}>"

    for number, call in enumerate(recorder.calls):
        lines.append(f"{call.operator} {tree_map(describe, (call.args, call.kwargs))}")
        made.update((memory(tensor), f"line {number}") for tensor in call.made)
    return lines


class PaperGraph:
    """The operators of a function, written down by `record` with the very tensors that they use."""

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        """Runs them again. What they return goes into the tensors that they returned when recorded."""
        for call in self.calls:
            for old, new in zip(call.results, tensors(call.run())):
                if memory(old) != memory(new):
                    old.copy_(new)


@contextmanager
def record(graph):
    """Writes down in `graph` what runs inside. A capture on a GPU runs nothing. So afterwards memory and
    random numbers are as they were before, and what was made inside holds no result until it is replayed."""
    random = torch.get_rng_state()
    with Recorder() as recorder:
        yield
    torch.set_rng_state(random)
    for everything, held in recorder.before.values():
        everything.copy_(held)
    for tensor in (tensor for call in recorder.calls for tensor in call.made):
        tensor.fill_(math.nan if tensor.is_floating_point() or tensor.is_complex() else 0)
    graph.calls = [call for call in recorder.calls if call.launches]
