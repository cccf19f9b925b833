"""Mimi, the codec of Moshi: 24 kHz sound <-> 12.5 frames a second of a few small integers, in one file.

    sound [B, 1, T] -> SEANet encoder (25 Hz) -> transformer -> downsample (12.5 Hz) -> latent [B, D, F]
    latent -> split residual vector quantizer -> codes [B, K, F], and all the way back

- Everything is causal: a frame of 80 ms goes in, its codes come out, nothing waits for the future.
- The first codebook is semantic (trained to follow a speech recogniser's features), the others are acoustic.
- One way to stream: `init_state(module, batch)` makes the memory of every module inside, `forward(x, state)`
  reads and updates it in place, and `state=None` is the whole sequence at once. Both give the same numbers.

From "Moshi: a speech-text foundation model for real-time dialogue" (Défossez et al. 2024, arXiv:2410.00037,
section 3.3); the reference implementation is `moshi.models.compression.MimiModel`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------- configuration

def check_numbers(config, may_be_zero: tuple[str, ...] = ()) -> None:
    """ValueError unless every field of a config dataclass holds positive numbers of its kind below 2**20."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_list = isinstance(value, (list, tuple))
        kinds = (int, float) if field.type == "float" else (int,)
        lowest = 0 if field.name in may_be_zero else 1e-9
        numbers = value if is_list else [value]
        good = numbers and all(type(number) in kinds and lowest <= number < 2**20 for number in numbers)
        if not good or is_list != field.type.startswith("tuple"):
            raise ValueError(f"config: {field.name} cannot be {value!r}")

def read_keys(given: dict, table: dict[str, tuple], what: str) -> dict:
    """Our fields from official keys. `table`: official key -> (what it sets, its official default). It sets a
    field of ours, or nothing (None); a list holds the only values that this code can do."""
    if unknown := given.keys() - table.keys():
        raise ValueError(f"{what}: unknown key {min(unknown)!r}")
    fields: dict = {}
    for key, (use, default) in table.items():
        value = given.get(key, default)
        if isinstance(use, list):
            expected = value if value in use else use[0]
        elif use is not None:
            expected = fields.setdefault(use, value)  # keys of one field must agree
        else:
            continue  # not needed here
        if value != expected:
            raise ValueError(f"{what}: {key} is {value!r}, but only {expected!r} is possible here")
    return fields

@dataclasses.dataclass
class MimiConfig:
    """The sizes of a Mimi; the defaults are the released one's. Impossible values raise ValueError."""

    sample_rate: int = 24000  # samples a second
    frame_rate: float = 12.5  # frames of codes a second
    filters: int = 64  # channels of the first convolution, doubled at each stride
    ratios: tuple[int, ...] = (8, 6, 5, 4)  # strides in the decoder's order; all together 960 samples, 25 Hz
    kernel_size: int = 7  # of the first convolution
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    latent_dim: int = 512  # D, also the width of both transformers
    num_layers: int = 8  # of each transformer
    num_heads: int = 8
    feedforward_dim: int = 2048
    context: int = 250  # sliding window of attention: positions of 25 Hz, so 10 s
    max_period: float = 10000.0  # of the rotary embedding
    total_codebooks: int = 32  # 1 semantic + 31 acoustic
    codebook_size: int = 2048
    codebook_dim: int = 256

    def __post_init__(self):
        check_numbers(self)
        self.ratios = tuple(self.ratios)
        self.hop_size = math.prod(self.ratios)  # samples that SEANet turns into one vector: 960
        self.frame_size = int(self.sample_rate / self.frame_rate)  # samples in a frame: 1920
        self.stride = self.frame_size // self.hop_size  # positions of the transformers in a frame: 2
        if self.latent_dim % (2 * self.num_heads):
            raise ValueError(f"config: {self.num_heads} heads cannot share latent_dim {self.latent_dim}")
        if self.total_codebooks < 2:
            raise ValueError("config: it takes 2 codebooks or more")
        if self.stride < 2 or self.stride * self.hop_size * self.frame_rate != self.sample_rate:
            raise ValueError(f"config: a frame_rate of {self.frame_rate} does not fit ratios {self.ratios}")

    @classmethod
    def from_dict(cls, official: dict) -> MimiConfig:
        """Reads the official JSON; unknown keys and impossible values raise ValueError."""
        flat = {}
        for key, value in official.items():
            section = value if isinstance(value, dict) else {}
            flat.update({f"{key}.{name}": inner for name, inner in section.items()} or {key: value})
        widths = flat.get("transformer.output_dimensions")
        if isinstance(widths, (list, tuple)) and len(widths) == 1:
            flat["transformer.output_dimensions"] = widths[0]
        return cls(**read_keys(flat, _MIMI_KEYS, "Mimi config"))

# For `read_keys`: all that the official JSON may say.
_MIMI_KEYS: dict[str, tuple] = {
    "sample_rate": ("sample_rate", None), "frame_rate": ("frame_rate", None), "channels": ([1], 1),
    "seanet.channels": ([1], 1), "seanet.n_residual_layers": ([1], 3), "seanet.activation": (["ELU"], "ELU"),
    "seanet.dimension": ("latent_dim", 128), "seanet.kernel_size": ("kernel_size", 7),
    "seanet.n_filters": ("filters", 32), "seanet.norm": (["none"], "none"), "seanet.compress": ([2], 2),
    "seanet.ratios": ("ratios", [8, 5, 4, 2]), "seanet.activation_params": ([{"alpha": 1.0}], {"alpha": 1.0}),
    "seanet.dilation_base": ([2], 2), "seanet.true_skip": ([True], True), "seanet.causal": ([True], False),
    "seanet.residual_kernel_size": ("residual_kernel_size", 3), "seanet.disable_norm_outer_blocks": ([0], 0),
    "seanet.last_kernel_size": ("last_kernel_size", 7), "seanet.pad_mode": (["constant"], "reflect"),
    "quantizer.dimension": ("codebook_dim", 128), "quantizer.bins": ("codebook_size", 1024),
    "quantizer.input_dimension": ("latent_dim", None), "quantizer.output_dimension": ("latent_dim", None),
    "quantizer.n_q": ("total_codebooks", 8), "quantizer.n_q_semantic": ([1], 1),
    "transformer.d_model": ("latent_dim", None), "transformer.input_dimension": ("latent_dim", None),
    "transformer.output_dimensions": ("latent_dim", None), "transformer.conv_layout": ([True], False),
    "transformer.num_heads": ("num_heads", None), "transformer.num_layers": ("num_layers", None),
    "transformer.dim_feedforward": ("feedforward_dim", 2048), "transformer.max_period": ("max_period", 10000),
    "transformer.causal": ([True], False), "transformer.gating": (["none"], "none"),
    "transformer.context": ("context", None), "transformer.layer_scale": ([0.01], None),
    "transformer.positional_embedding": (["rope"], "sin"), "transformer.norm": (["layer_norm"], "layer_norm"),
}

# -------------------------------------------------------------------------------------------------- streaming

def init_state(module: nn.Module, batch_size: int) -> dict:
    """The empty memory of all modules in `module`, {module: {name: tensor}}. Pass it as `state` to stream,
    inside torch.no_grad(). A call updates the tensors in place, so that a CUDA graph can replay it."""
    return {part: part.new_memory(batch_size) for part in module.modules() if hasattr(part, "new_memory")}

class CausalConv1d(nn.Module):
    """A convolution that sees only the past: it pads with kernel - stride samples, all of them on the left.
    They are zeros or, with `repeat_first`, the first input; while streaming, the end of the last chunk.
    [B, C_in, T] -> [B, C_out, T / stride], T a multiple of the stride."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, bias=True, repeat_first=False):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel, stride, bias=bias)
        self.kernel, self.stride, self.padding = kernel, stride, kernel - stride
        self.repeat_first = repeat_first

    def new_memory(self, batch_size: int) -> dict:
        """What the next chunk needs of this one: its last `kernel - stride` inputs."""
        past = self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.padding)
        return {"past": past, "started": past.new_zeros((), dtype=torch.bool)}

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        if self.padding:
            past = x.new_zeros(()) if state is None else state[self]["past"]
            if self.repeat_first:
                past = x[..., :1] if state is None else torch.where(state[self]["started"], past, x[..., :1])
            x = torch.cat([past.expand(*x.shape[:2], self.padding), x], dim=-1)
            if state is not None:
                state[self]["past"].copy_(x[..., -self.padding:])
                state[self]["started"].fill_(True)
        if state is None or x.shape[-1] > 2048 * self.stride:
            return self.conv(x)
        # For the few positions of a frame one matrix product is faster than the convolution kernels.
        rows = x.unfold(-1, self.kernel, self.stride).transpose(1, 2).flatten(2)  # [B, T', C_in * kernel]
        return F.linear(rows, self.conv.weight.flatten(1), self.conv.bias).transpose(1, 2)

class CausalConvTranspose1d(nn.Module):
    """Upsampling by `stride` with a kernel of 2 * stride, the last `stride` outputs left to the next input.
    Each input makes 2 * stride outputs: the first half lands beside the second half of the input before it.
    So it is a matrix product and an overlap-add, and all there is to remember is one second half.
    [B, C_in, T] -> [B, C_out, T * stride]. `depthwise`: each channel by itself."""

    def __init__(self, c_in: int, c_out: int, stride: int, bias: bool = True, depthwise: bool = False):
        super().__init__()
        self.stride, self.c_out, self.depthwise = stride, c_out, depthwise
        groups = c_in if depthwise else 1
        self.convtr = nn.ConvTranspose1d(c_in, c_out, 2 * stride, stride, bias=bias, groups=groups)

    def new_memory(self, batch_size: int) -> dict:
        """The second half that the last input left over, without the bias."""
        return {"tail": self.convtr.weight.new_zeros(batch_size, 1, self.c_out, self.stride)}

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        if state is None:
            return self.convtr(x)[..., :-self.stride]
        x, weight, bias = x.transpose(1, 2), self.convtr.weight, self.convtr.bias
        # What each input makes: [B, T, C_out * 2 * stride], then both halves, each [B, T, C_out, stride]
        parts = x[..., None] * weight[:, 0] if self.depthwise else x @ weight.flatten(1)
        now, later = parts.view(*x.shape[:2], self.c_out, 2, self.stride).unbind(3)
        y = now + torch.cat([state[self]["tail"], later[:, :-1]], dim=1)
        state[self]["tail"].copy_(later[:, -1:])
        y = y.transpose(1, 2).flatten(2)  # [B, C_out, T * stride]
        return y if bias is None else y + bias[:, None]

# ----------------------------------------------------------------------------------------------------- SEANet

class SEANet(nn.Sequential):
    """Layers in a row (Tagliasacchi et al. 2020, as in EnCodec). All but the activations take the state."""

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, nn.ELU) else layer(x, state)
        return x

class ResidualBlock(SEANet):
    """x + convolutions of x, with half the channels inside. [B, C, T] -> [B, C, T]."""

    def __init__(self, channels: int, kernel: int):
        super().__init__(nn.ELU(), CausalConv1d(channels, channels // 2, kernel),
                         nn.ELU(), CausalConv1d(channels // 2, channels, 1))

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        return x + super().forward(x, state)

class Encoder(SEANet):
    """Sound [B, 1, T] -> [B, D, T / 960]: a stride divides the rate by its ratio and doubles the channels."""

    def __init__(self, config: MimiConfig):
        width = config.filters
        layers = [CausalConv1d(1, width, config.kernel_size)]
        for ratio in config.ratios[::-1]:
            layers += [ResidualBlock(width, config.residual_kernel_size),
                       nn.ELU(), CausalConv1d(width, 2 * width, 2 * ratio, ratio)]
            width *= 2
        super().__init__(*layers, nn.ELU(), CausalConv1d(width, config.latent_dim, config.last_kernel_size))

class Decoder(SEANet):
    """The encoder in the mirror: [B, D, T] -> sound [B, 1, T * 960]."""

    def __init__(self, config: MimiConfig):
        width = config.filters * 2 ** len(config.ratios)
        layers = [CausalConv1d(config.latent_dim, width, config.kernel_size)]
        for ratio in config.ratios:
            layers += [nn.ELU(), CausalConvTranspose1d(width, width // 2, ratio),
                       ResidualBlock(width // 2, config.residual_kernel_size)]
            width //= 2
        super().__init__(*layers, nn.ELU(), CausalConv1d(width, 1, config.last_kernel_size))

# ------------------------------------------------------------------------------------------------ transformer

def rotation(positions: Tensor, head_dim: int, max_period: float) -> Tensor:
    """What `rope` multiplies pairs with: cos + i sin of their angles, [T, head_dim / 2] complex."""
    pairs = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(pairs * (-math.log(max_period) * 2 / head_dim))
    angles = positions.float()[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)

def rope(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of queries or keys x [B, H, T, head_dim], in float32.
    Neighbours (x0, x1), (x2, x3), ... are the pairs, as in the released weights; others pair two halves.
    A pair is a complex number x0 + i x1, and multiplying it with a `rotation` turns it."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)

def causal_mask(query_positions: Tensor, key_positions: Tensor, context: int) -> Tensor:
    """[T, S], True where a query may see a key: itself and context - 1 before it. Keys below 0 are empty."""
    age = query_positions[:, None] - key_positions
    return (age >= 0) & (age < context) & (key_positions >= 0)


class Window(NamedTuple):
    """What the layers of a transformer share in one call: where the inputs stand and what they may see."""

    turns: Tensor  # [T, head_dim / 2] complex
    mask: Tensor  # [T, S], S keys: what is added to the scores, 0 or minus infinity
    slots: Tensor | None  # [T], where the ring stores these keys and values; None: the sequence is whole

class Attention(nn.Module):
    """Causal attention with rotary positions, grouped queries and a sliding window. [B, T, D] -> [B, T, D].
    Query head h uses the key and value head h // (num_heads // num_kv_heads)."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.in_proj = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)  # q, k, v
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, window: Window, ring: Tensor | None = None) -> Tensor:
        """`ring`: while streaming, the keys and values so far [2, B, KV, slots, hd], these to be added."""
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 KV, T, hd]
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rope(qk, window.turns).split([self.num_heads, self.num_kv_heads], dim=1)
        if ring is not None:
            if k.requires_grad:
                raise ValueError("stream inside torch.no_grad(): the memory keeps no gradients")
            ring.index_copy_(3, window.slots, torch.stack([k, v]))
            k, v = ring[:, :, :, : window.mask.shape[-1]]
        grouped = self.num_kv_heads != self.num_heads
        y = F.scaled_dot_product_attention(q, k, v, window.mask, enable_gqa=grouped)
        return self.out_proj(y.transpose(1, 2).flatten(2))

class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). [B, T, D] -> [B, T, D].
    `norm` is a class. `scales`: each update is scaled by channel (LayerScale, Touvron et al. 2021)."""

    def __init__(self, attention: Attention, feed_forward: nn.Module, norm: Callable, scales: bool):
        super().__init__()
        dim = attention.out_proj.out_features
        self.norm1, self.attention = norm(dim), attention
        self.norm2, self.feed_forward = norm(dim), feed_forward
        self.scale1 = nn.Parameter(torch.full((dim,), 0.01)) if scales else 1.0
        self.scale2 = nn.Parameter(torch.full((dim,), 0.01)) if scales else 1.0

    def forward(self, x: Tensor, window: Window, ring: Tensor | None = None) -> Tensor:
        x = x + self.scale1 * self.attention(self.norm1(x), window, ring)
        return x + self.scale2 * self.feed_forward(self.norm2(x))

class Transformer(nn.Module):
    """Both of Mimi's transformers, and Helium: causal layers with a sliding window. [B, T, D] -> [B, T, D].
    While streaming, keys and values of a layer lie in a ring: position p in slot p % ring_size, the oldest
    overwritten. The ring has `step - 1` slots more than the window, so that the oldest query of a step still
    finds all of it. A longer chunk is written at once while that overwrites nothing, else step by step."""

    def __init__(self, layers: list[TransformerLayer], context: int, max_period: float, step: int = 1):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.context, self.max_period, self.step = context, max_period, step
        self.ring_size = context + step - 1

    def new_memory(self, batch_size: int) -> dict:
        """The rings, and the position of the next input: a tensor, as a captured graph has no Python."""
        attention = self.layers[0].attention
        shape = 2, batch_size, attention.num_kv_heads, self.ring_size, attention.head_dim
        rings = attention.in_proj.weight.new_zeros(len(self.layers), *shape)
        return {"rings": rings, "position": rings.new_zeros(1, dtype=torch.long)}

    def window(self, x: Tensor, state: dict | None) -> Window:
        """Where x stands and what it may see; while streaming, moves the position on."""
        length, slots = x.shape[1], None
        positions = key_positions = torch.arange(length, device=x.device)
        if state is not None:
            position = state[self]["position"]
            positions = positions + position
            slots = positions % self.ring_size
            last = position + length - 1
            # The CPU reads only filled slots. A graph needs fixed shapes, and asking for a length is a sync.
            filled = min(int(last) + 1, self.ring_size) if x.device.type == "cpu" else self.ring_size
            ring = torch.arange(filled, device=x.device)
            key_positions = last - (last - ring) % self.ring_size  # the newest that fell into each slot
            position += length
        visible = causal_mask(positions, key_positions, self.context)
        mask = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill_(~visible, -math.inf)
        turns = rotation(positions, self.layers[0].attention.head_dim, self.max_period)
        return Window(turns, mask, slots)

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        if state is not None and x.shape[1] > self.step:
            # A chunk longer than a step must not overwrite what its own first positions still want to see.
            if int(state[self]["position"]) + x.shape[1] > self.ring_size:
                return torch.cat([self(chunk, state) for chunk in x.split(self.step, dim=1)], dim=1)
        window = self.window(x, state)
        rings = [None] * len(self.layers) if state is None else state[self]["rings"]
        for layer, ring in zip(self.layers, rings):
            x = layer(x, window, ring)
        return x

# ------------------------------------------------------------------------------------------------- quantizers

class Codebook(nn.Module):
    """`size` vectors (centroids), stored as training keeps them: a moving sum and a moving count of each."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("embedding_sum", torch.randn(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("initialized", torch.ones(1))  # in the file format: k-means has run

    @property
    def centroids(self) -> Tensor:
        """[size, dim]: sum / count."""
        return self.embedding_sum / self.cluster_usage.clamp(min=1e-5)[:, None]

    def new_memory(self, batch_size: int) -> dict:
        """Nothing changes while streaming: the centroids and half their squared lengths are computed once."""
        centroids = self.centroids
        return {"centroids": centroids, "half_squares": centroids.pow(2).sum(1) / 2}

    def encode(self, x: Tensor, state: dict | None = None) -> Tensor:
        """x [B, F, dim] -> the index of the nearest centroid [B, F].
        |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2): the nearest c has the largest bracket, a matrix product."""
        memory = self.new_memory(len(x)) if state is None else state[self]
        return (x @ memory["centroids"].T - memory["half_squares"]).argmax(dim=-1)

    def decode(self, codes: Tensor, state: dict | None = None) -> Tensor:
        """codes [B, F] -> centroids [B, F, dim]."""
        return F.embedding(codes, self.centroids if state is None else state[self]["centroids"])

class ResidualQuantizer(nn.Module):
    """Codebooks in a row, each quantizing what those before it left over, between two projections."""

    def __init__(self, config: MimiConfig, num_codebooks: int):
        super().__init__()
        self.input_proj = nn.Conv1d(config.latent_dim, config.codebook_dim, 1, bias=False)
        self.output_proj = nn.Conv1d(config.codebook_dim, config.latent_dim, 1, bias=False)
        codebooks = [Codebook(config.codebook_size, config.codebook_dim) for _ in range(num_codebooks)]
        self.codebooks = nn.ModuleList(codebooks)

    def encode(self, z: Tensor, num_codebooks: int, state: dict | None = None) -> Tensor:
        """z [B, D, F] -> codes [B, num_codebooks, F]."""
        residual = self.input_proj(z).transpose(1, 2)
        codes = []
        for codebook in self.codebooks[:num_codebooks]:
            codes.append(codebook.encode(residual, state))
            residual = residual - codebook.decode(codes[-1], state)
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor, state: dict | None = None) -> Tensor:
        """codes [B, K, F], any K up to all codebooks -> z [B, D, F]."""
        total = sum(codebook.decode(code, state) for codebook, code in zip(self.codebooks, codes.unbind(1)))
        return self.output_proj(total.transpose(1, 2))

class SplitQuantizer(nn.Module):
    """A semantic codebook beside a row of acoustic ones: both quantize the latent itself, the results add."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.num_codebooks = config.total_codebooks  # in use, from 1 to all; set through Mimi.num_codebooks
        self.semantic = ResidualQuantizer(config, 1)
        self.acoustic = ResidualQuantizer(config, config.total_codebooks - 1)

    def encode(self, z: Tensor, state: dict | None = None) -> Tensor:
        """z [B, D, F] -> codes [B, K, F], K = num_codebooks."""
        codes = self.semantic.encode(z, 1, state)
        if self.num_codebooks == 1:
            return codes
        return torch.cat([codes, self.acoustic.encode(z, self.num_codebooks - 1, state)], dim=1)

    def decode(self, codes: Tensor, state: dict | None = None) -> Tensor:
        """codes [B, K, F], K from 1 to all -> z [B, D, F]."""
        z = self.semantic.decode(codes[:, :1], state)
        return z + self.acoustic.decode(codes[:, 1:], state) if codes.shape[1] > 1 else z

# ------------------------------------------------------------------------------------------------------- Mimi

class Mimi(nn.Module):
    """The codec. Without `state` a call takes a whole recording; with one it takes its next frames."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.config = config
        self.sample_rate, self.frame_rate = config.sample_rate, config.frame_rate
        self.frame_size = config.frame_size
        dim, hidden, stride = config.latent_dim, config.feedforward_dim, config.stride

        def transformer() -> Transformer:
            layers = []
            for _ in range(config.num_layers):
                attention = Attention(dim, config.num_heads, config.num_heads)
                feed_forward = nn.Sequential(
                    nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))
                layers.append(TransformerLayer(attention, feed_forward, nn.LayerNorm, scales=True))
            return Transformer(layers, config.context, config.max_period, step=stride)

        self.encoder = Encoder(config)
        self.encoder_transformer = transformer()
        self.downsample = CausalConv1d(dim, dim, 2 * stride, stride, bias=False, repeat_first=True)
        self.quantizer = SplitQuantizer(config)
        self.upsample = CausalConvTranspose1d(dim, dim, stride, bias=False, depthwise=True)
        self.decoder_transformer = transformer()
        self.decoder = Decoder(config)

    @property
    def num_codebooks(self) -> int:
        """Codebooks in use by `encode`, from 1 to config.total_codebooks."""
        return self.quantizer.num_codebooks

    @num_codebooks.setter
    def num_codebooks(self, number: int):
        if not 1 <= number <= self.config.total_codebooks:
            raise ValueError(f"{number} codebooks: this Mimi has from 1 to {self.config.total_codebooks}")
        self.quantizer.num_codebooks = number

    def to_latent(self, pcm: Tensor, state: dict | None = None) -> Tensor:
        """pcm [B, 1, T], in -1..1 -> latent [B, D, F]. Offline, T is padded with zeros to frames of 1920."""
        if pcm.dim() != 3 or pcm.shape[1] != 1 or not pcm.shape[2]:
            raise ValueError(f"Mimi takes sound as [batch, 1, samples], not {list(pcm.shape)}")
        missing = -pcm.shape[-1] % self.frame_size
        if missing and state is not None:
            raise ValueError(f"streaming takes frames of {self.frame_size} samples, not {pcm.shape[-1]}")
        x = self.encoder(F.pad(pcm, (0, missing)), state)
        x = self.encoder_transformer(x.transpose(1, 2), state).transpose(1, 2)
        return self.downsample(x, state)

    def from_latent(self, z: Tensor, state: dict | None = None) -> Tensor:
        """latent [B, D, F] -> pcm [B, 1, F * 1920]."""
        x = self.upsample(z, state)
        x = self.decoder_transformer(x.transpose(1, 2), state).transpose(1, 2)
        return self.decoder(x, state)

    @torch.no_grad()
    def encode(self, pcm: Tensor, state: dict | None = None) -> Tensor:
        """pcm [B, 1, T], in -1..1 -> codes [B, K, F], K = num_codebooks, a frame for each 1920 samples."""
        return self.quantizer.encode(self.to_latent(pcm, state), state)

    @torch.no_grad()
    def decode(self, codes: Tensor, state: dict | None = None) -> Tensor:
        """codes [B, K, F], any K from 1 to all -> pcm [B, 1, F * 1920]."""
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.config.total_codebooks or not codes.shape[2]:
            raise ValueError(f"Mimi takes codes as [batch, codebooks, frames], not {list(codes.shape)}")
        return self.from_latent(self.quantizer.decode(codes, state), state)

# ----------------------------------------------------------------------------------------------- weight files

@contextlib.contextmanager
def whole_file(path: str | Path):
    """A file to write that gets the name `path` once the block has ended well, and is gone otherwise."""
    temporary = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def official_names(model: nn.Module, rules: list[tuple[str, str]]) -> dict[str, str]:
    """Our name -> the official name of every tensor in `model`: each rule (pattern, replacement) in its turn.
    A '{k}' in an official name stands for the entries of our first axis, stored one by one."""
    names = {name: name for name in model.state_dict()}
    for pattern, replacement in rules:
        names = {ours: re.sub(pattern, replacement, name) for ours, name in names.items()}
    return names

def load_weights(model: nn.Module, path: str | Path, rules: list, device, dtype: torch.dtype | None) -> None:
    """Puts the tensors of a SafeTensors file into `model`, which was built on the meta device.
    On the CPU weights are mapped from the file, not read, where they have the dtype asked for (None: any).
    A missing, extra or misshapen tensor raises ValueError, and so does a file that isn't SafeTensors."""
    open(path, "rb").close()  # its OSError says why not; safe_open takes any such file for a missing one
    try:
        file = safetensors.safe_open(path, framework="pt", device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole SafeTensors file ({error}); no other format is read") from None
    unused = set(file.keys())

    def take(name: str, *shape: int) -> Tensor:
        if name not in unused:
            raise ValueError(f"{path}: the tensor {name} is missing")
        stored = file.get_slice(name).get_shape()
        if stored != list(shape):
            raise ValueError(f"{path}: {name} has the shape {stored}, expected {list(shape)}")
        unused.remove(name)
        if file.get_slice(name).get_dtype().startswith(("I", "U", "BOOL")):
            raise ValueError(f"{path}: {name} holds whole numbers; int8 files are not read")
        return file.get_tensor(name).to(dtype=dtype)

    weights, names = {}, official_names(model, rules)
    for ours, empty in model.state_dict().items():
        name, shape = names[ours], empty.shape
        # The released files name the attention projections otherwise, and stack the depth decoder's.
        older = re.sub(r"in_projs\.(0|{k})\.weight", "in_proj_weight", name)
        older = re.sub(r"out_projs\.(0|{k})\.weight", "out_proj.weight", older)
        if "{k}" not in name:
            weights[ours] = take(older if older in unused else name, *shape)
        elif older in unused:
            weights[ours] = take(older, shape[0] * shape[1], *shape[2:]).view(shape)
        else:
            pieces = [take(name.format(k=k), *shape[1:]) for k in range(shape[0])]
            weights[ours] = torch.stack(pieces) if pieces else torch.empty(shape, device=device, dtype=dtype)
    if unused:
        raise ValueError(f"{path}: the tensor {min(unused)} is not known, does the config fit the file?")
    model.load_state_dict(weights, assign=True)

def save_weights(model: nn.Module, path: str | Path, rules: list) -> None:
    """Writes the file that `load_weights` reads, with the newer official names."""
    tensors, weights = {}, model.state_dict()
    for ours, name in official_names(model, rules).items():
        tensor = weights[ours]
        pieces = enumerate(tensor) if "{k}" in name else [(0, tensor)]
        tensors.update({name.format(k=k): piece.contiguous() for k, piece in pieces})
    with whole_file(path) as file:
        save_file(tensors, file.name)  # puts a file of its own there, which only its owner may read
        os.chmod(file.name, os.fstat(file.fileno()).st_mode & 0o777)

TRANSFORMER_NAMES = [  # shared with Helium
    (r"\.attention\.(in|out)_proj\.", r".self_attn.\1_projs.0."), (r"\.scale(\d)$", r".layer_scale_\1.scale"),
]
MIMI_NAMES = [
    (r"^(encoder|decoder)\.", r"\1.model."), (r"(model\.\d+)\.(\d)", r"\1.block.\2"),
    (r"\.(conv|convtr)\.", r".\1.\1."), (r"sample\.(conv|convtr)\.", r"sample.\1.\1."),
    (r"_transformer\.", "_transformer.transformer."), *TRANSFORMER_NAMES,
    (r"\.feed_forward\.0", ".linear1"), (r"\.feed_forward\.2", ".linear2"),
    (r"\.semantic\.", ".rvq_first."), (r"\.acoustic\.", ".rvq_rest."),
    (r"\.codebooks\.(\d+)\.", r".vq.layers.\1._codebook."), (r"\.initialized", "._initialized"),
]

def load_mimi(path: str | Path, config: MimiConfig | None = None, num_codebooks=8, device="cpu") -> Mimi:
    """Mimi from an official SafeTensors file, in float32; `config` None is the released one.
    On CUDA set torch.backends.cudnn.allow_tf32 = False: TF32 is the default there and can change codes."""
    with torch.device("meta"):
        mimi = Mimi(config or MimiConfig())
    load_weights(mimi, path, MIMI_NAMES, device, torch.float32)
    mimi.num_codebooks = num_codebooks
    return mimi.eval()

def save_mimi(mimi: Mimi, path: str | Path) -> None:
    """Writes the official file, in the dtype that the model has."""
    save_weights(mimi, path, MIMI_NAMES)
