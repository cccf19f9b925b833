"""Mimi, the codec of Moshi: 24 kHz sound <-> 12.5 frames a second of a few small integers.

    sound [B, 1, T] -> SEANet encoder (25 Hz) -> transformer -> downsample (12.5 Hz) -> latent [B, D, F]
    latent -> split residual vector quantizer -> codes [B, K, F], and all the way back

- Everything is causal: a frame of 80 ms goes in, its codes come out, and nothing waits for the future.
- The first codebook is semantic (trained to follow a speech recogniser's features), the others are acoustic.
- One way to stream: `init_state(module, batch)` makes the memory of every module inside, `forward(x, state)`
  reads and updates it in place, and `state=None` is the whole sequence at once. Both give the same numbers.
- Helium's `Attention` and `Transformer` live here too, and what turns configs and weights into the official
  ones, at the end.
From "Moshi: a speech-text foundation model for real-time dialogue" (Défossez et al. 2024, arXiv:2410.00037,
section 3.3); the reference implementation is `moshi.models.compression.MimiModel`.
"""
import dataclasses
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from files import WeightFile, to_int8, whole_file

@dataclasses.dataclass
class MimiConfig:
    """The sizes of a Mimi under their official names; the defaults are the released one's."""
    sample_rate: int = 24000  # samples a second
    frame_rate: float = 12.5  # frames of codes a second
    n_filters: int = 64  # channels of the first convolution, doubled at each stride
    ratios: tuple[int, ...] = (8, 6, 5, 4)  # strides in the decoder's order; their product is 960 samples
    kernel_size: int = 7  # of the first convolution
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    dimension: int = 512  # D, the width of the latent and of both transformers
    num_layers: int = 8  # of each transformer
    num_heads: int = 8
    dim_feedforward: int = 2048
    context: int = 250  # sliding window of attention, in positions of 25 Hz: 10 s
    max_period: float = 10000.0  # of the rotary embedding
    n_q: int = 32  # codebooks, 1 semantic and 31 acoustic
    bins: int = 2048  # entries of a codebook
    quantizer_dimension: int = 256  # of an entry; officially `dimension` as well, in the section `quantizer`

    def __post_init__(self):
        check_sizes(self)
        self.ratios = tuple(self.ratios)
        self.hop_size = math.prod(self.ratios)  # samples that SEANet turns into one vector: 960
        self.frame_size = int(self.sample_rate / self.frame_rate)  # samples in a frame: 1920
        self.stride = self.frame_size // self.hop_size  # positions of the transformers in a frame: 2
        if self.dimension % (2 * self.num_heads) or min(self.n_q, self.n_filters) < 2:
            raise ValueError(f"config: num_heads {self.num_heads} does not fit dimension {self.dimension}, "
                             f"or n_q {self.n_q} or n_filters {self.n_filters} is too small")
        if self.stride < 2 or self.stride * self.hop_size * self.frame_rate != self.sample_rate:
            raise ValueError(f"config: a frame_rate of {self.frame_rate} does not fit ratios {self.ratios}")

    @classmethod
    def from_dict(cls, official: dict) -> "MimiConfig":
        """Reads the official JSON; unknown keys and impossible values raise ValueError."""
        return read_mimi(official)

    def to_dict(self) -> dict:
        """The official JSON."""
        return write_mimi(self)

# -------------------------------------------------------------------------------------------------- streaming
def init_state(module: nn.Module, batch_size: int) -> dict:
    """The empty memory of all modules in `module`, {module: {name: tensor}}. Pass it as `state` to stream,
    inside torch.no_grad(). Calls update the tensors in place, so that a CUDA graph can replay them."""
    return {part: part.new_memory(batch_size) for part in module.modules() if hasattr(part, "new_memory")}

def reset_state(state: dict) -> None:
    """Empties all memories in place. A codebook's stays: it is computed from the weights, not from sound."""
    for memory in (memory for part, memory in state.items() if not isinstance(part, Codebook)):
        for tensor in memory.values():
            tensor.zero_()

def memory_of(part: nn.Module, state: dict | None, x: Tensor) -> dict:
    """The memory of one module: its entry in `state`, or without a state an empty one for this call alone."""
    if state is not None and x.requires_grad:
        raise ValueError("stream inside torch.no_grad(): the memory keeps no gradients")
    return part.new_memory(len(x)) if state is None else state[part]

class CausalConv1d(nn.Module):
    """A convolution that sees only the past: it pads with kernel - stride samples, all of them on the left.
    They are the end of the last chunk; at the start zeros or, with `repeat_first`, the first input.
    [B, C_in, T] -> [B, C_out, T / stride], T a multiple of the stride."""
    matmul_up_to = 2048  # outputs: for so few a matrix product is faster than the CPU's convolution kernels
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, bias=True, repeat_first=False):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel, stride, bias=bias)
        self.kernel, self.stride, self.padding = kernel, stride, kernel - stride
        self.repeat_first = repeat_first

    def new_memory(self, batch_size: int) -> dict:
        """The last kernel - stride inputs, and whether there were any."""
        past = self.conv.weight.new_zeros(batch_size, self.conv.in_channels, self.padding)
        return {"past": past, "started": past.new_zeros((), dtype=torch.bool)}

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        if self.padding:
            x = self.with_past(x, memory_of(self, state, x))
        if x.shape[-1] > self.matmul_up_to * self.stride:
            return self.conv(x)
        rows = x.unfold(-1, self.kernel, self.stride).transpose(1, 2).flatten(2)  # [B, T', C_in * kernel]
        y = F.linear(rows.flatten(0, 1), self.conv.weight.flatten(1), self.conv.bias)
        return y.unflatten(0, rows.shape[:2]).transpose(1, 2)

    def with_past(self, x: Tensor, memory: dict) -> Tensor:
        """[B, C_in, T] -> [B, C_in, padding + T], and its end is remembered."""
        past = memory["past"]
        if self.repeat_first:  # `~` makes a new condition, which autograd may keep while `started` changes
            past = torch.where(~memory["started"], x[..., :1], past)
            memory["started"].fill_(True)
        x = torch.cat([past, x], dim=-1)
        memory["past"].copy_(x[..., -self.padding :])
        return x

class CausalConvTranspose1d(nn.Module):
    """Upsampling by `stride`: [B, C_in, T] -> [B, C_out, T * stride]. `depthwise`: each channel by itself.
    The kernel is 2 * stride long. Of an input's 2 * stride outputs the first half is added to the second half
    of the outputs before: a matrix product and an overlap-add, with one second half to remember."""
    def __init__(self, c_in: int, c_out: int, stride: int, bias: bool = True, depthwise: bool = False):
        super().__init__()
        self.c_out, self.stride, self.depthwise = c_out, stride, depthwise
        groups = c_in if depthwise else 1
        self.convtr = nn.ConvTranspose1d(c_in, c_out, 2 * stride, stride, bias=bias, groups=groups)

    def new_memory(self, batch_size: int) -> dict:
        return {"tail": self.convtr.weight.new_zeros(batch_size, 1, self.c_out, self.stride)}

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        memory = memory_of(self, state, x)
        x, weight = x.transpose(1, 2), self.convtr.weight  # [B, T, C_in], [C_in, C_out, 2 * stride]
        made = x[..., None] * weight[:, 0] if self.depthwise else x @ weight.flatten(1)
        halves = made.view(*x.shape[:2], self.c_out, 2, self.stride)
        y, second = halves[:, :, :, 0], halves[:, :, :, 1]  # [B, T, C_out, stride] each
        y[:, 1:].add_(second[:, :-1])
        y[:, :1].add_(memory["tail"])
        memory["tail"].copy_(second[:, -1:])  # without the bias, which is added to each output only once
        y = y.transpose(1, 2).flatten(2)  # [B, C_out, T * stride]
        return y if self.convtr.bias is None else y.add_(self.convtr.bias[:, None])

# ----------------------------------------------------------------------------------------------------- SEANet
class ELU(nn.ELU):
    """The activation. It takes the state as its neighbours do, and remembers nothing."""
    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        return super().forward(x)

class Layers(nn.Sequential):
    """Modules in a row, each given the state."""
    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        for layer in self:
            x = layer(x, state)
        return x

class ResidualBlock(nn.Module):
    """x + convolutions of x, with half the channels inside. [B, C, T] -> [B, C, T]."""
    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.block = Layers(ELU(), CausalConv1d(channels, channels // 2, kernel),
                            ELU(), CausalConv1d(channels // 2, channels, 1))

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        return x + self.block(x, state)

class Encoder(Layers):
    """SEANet (Tagliasacchi et al. 2020, as in EnCodec): sound [B, 1, T] -> [B, D, T / 960].
    Each stride divides the rate by its ratio and doubles the channels."""
    def __init__(self, config: MimiConfig):
        channels = config.n_filters
        layers: list[nn.Module] = [CausalConv1d(1, channels, config.kernel_size)]
        for ratio in reversed(config.ratios):
            layers += [ResidualBlock(channels, config.residual_kernel_size),
                       ELU(), CausalConv1d(channels, 2 * channels, 2 * ratio, ratio)]
            channels *= 2
        super().__init__(*layers, ELU(), CausalConv1d(channels, config.dimension, config.last_kernel_size))

class Decoder(Layers):
    """The encoder mirrored: [B, D, T] -> sound [B, 1, T * 960]."""
    def __init__(self, config: MimiConfig):
        channels = config.n_filters * 2 ** len(config.ratios)
        layers: list[nn.Module] = [CausalConv1d(config.dimension, channels, config.kernel_size)]
        for ratio in config.ratios:
            layers += [ELU(), CausalConvTranspose1d(channels, channels // 2, ratio),
                       ResidualBlock(channels // 2, config.residual_kernel_size)]
            channels //= 2
        super().__init__(*layers, ELU(), CausalConv1d(channels, 1, config.last_kernel_size))

# ------------------------------------------------------------------------------------------------ transformer
def rotation(positions: Tensor, head_dim: int, max_period: float) -> Tensor:
    """The factors for `rope`: cos + i sin of each pair's angle, [T, head_dim / 2] complex. Frequencies are
    float32, as officially. Angles in float32, too, would lose digits: after a day codes would change."""
    pairs = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(pairs * (-math.log(max_period) * 2 / head_dim))
    exact = torch.float32 if positions.device.type == "mps" else torch.float64  # which MPS does not have
    angles = positions.to(exact)[:, None] * frequencies.to(exact)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

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

class Placement(NamedTuple):
    """What the layers of a transformer share in one call: where its inputs stand and what they may see."""
    turns: Tensor  # [T, head_dim / 2] complex, the `rotation` of each input
    mask: Tensor  # [T, S] over S keys: what is added to the scores, 0 or minus infinity
    slots: Tensor | None  # [T], where the ring stores the new keys and values; None: the sequence is whole

class Attention(nn.Module):
    """Causal attention with rotary positions, grouped queries and a sliding window. [B, T, D] -> [B, T, D].
    Query head h uses the key and value head h // (num_heads // num_kv_heads)."""
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.in_proj = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)  # q, k, v
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, placement: Placement, ring: Tensor | None = None) -> Tensor:
        """`ring`: while streaming, keys and values so far [2, B, KV, slots, head_dim], to which these go."""
        H, KV = self.num_heads, self.num_kv_heads
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 KV, T, hd]
        turned = rope(heads[:, : H + KV], placement.turns)
        q, k, v = turned[:, :H], turned[:, H:], heads[:, H + KV :]
        if ring is not None:
            ring[0].index_copy_(2, placement.slots, k)
            ring[1].index_copy_(2, placement.slots, v)
            k, v = ring[:, :, :, : placement.mask.shape[-1]]
        y = F.scaled_dot_product_attention(q, k, v, placement.mask, enable_gqa=KV != H)
        return self.out_proj(y.transpose(1, 2).flatten(2))

def add_scaled(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale * update, or x + update without a scale."""
    return x + update if scale is None else torch.addcmul(x, scale, update)

class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). [B, T, D] -> [B, T, D]. `norm` is a class.
    `scales`: each channel of an update has a scale, small at first (LayerScale, Touvron et al. 2021)."""
    def __init__(self, attention: Attention, feed_forward: nn.Module, norm: Callable, scales: bool):
        super().__init__()
        dim = attention.out_proj.out_features
        self.norm1, self.attention = norm(dim), attention
        self.norm2, self.feed_forward = norm(dim), feed_forward
        self.scale1 = nn.Parameter(torch.full((dim,), 0.01)) if scales else None
        self.scale2 = nn.Parameter(torch.full((dim,), 0.01)) if scales else None

    def forward(self, x: Tensor, placement: Placement, ring: Tensor | None = None) -> Tensor:
        x = add_scaled(x, self.attention(self.norm1(x), placement, ring), self.scale1)
        return add_scaled(x, self.feed_forward(self.norm2(x)), self.scale2)

class Transformer(nn.Module):
    """Both of Mimi's transformers, and Helium: causal layers with a sliding window. [B, T, D] -> [B, T, D].
    While streaming, keys and values lie in a ring, position p in slot p % ring_size. All n keys of a frame
    are written before its first query reads, hence n - 1 slots more than the window has."""
    def __init__(self, layers: list[TransformerLayer], context: int, max_period: float, frame_positions=1):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.context, self.max_period, self.frame_positions = context, max_period, frame_positions
        self.ring_size = context + frame_positions - 1
        self.attend_filled = True  # on the CPU; False: the whole ring, as on a GPU

    def new_memory(self, batch_size: int) -> dict:
        """The rings, and the position of the next input: a tensor, since a replayed graph runs no Python."""
        attention, norm = self.layers[0].attention, next(self.layers[0].norm1.parameters())
        slots = 2, batch_size, attention.num_kv_heads, self.ring_size, attention.head_dim
        rings = norm.new_zeros(len(self.layers), *slots)  # weights that multiply may be int8
        return {"rings": rings, "position": rings.new_zeros(1, dtype=torch.long)}

    def place(self, x: Tensor, state: dict | None) -> Placement:
        """Where the inputs x stand and which keys they may see: each other or, while streaming, the ring."""
        positions = key_positions = torch.arange(x.shape[1], device=x.device)
        slots = None
        if state is not None:
            positions = positions + state[self]["position"]
            slots = positions % self.ring_size
            last, filled = positions[-1], self.ring_size
            if self.attend_filled and x.device.type == "cpu":  # less to read, but a graph needs fixed shapes
                filled = min(filled, int(last) + 1)
            ring = torch.arange(filled, device=x.device)
            key_positions = last - (last - ring) % self.ring_size  # the newest that fell into each slot
        visible = causal_mask(positions, key_positions, self.context)
        mask = visible.to(x.dtype).log()  # of 1 is 0, of 0 minus infinity
        turns = rotation(positions, self.layers[0].attention.head_dim, self.max_period)
        return Placement(turns, mask, slots)

    def forward(self, x: Tensor, state: dict | None = None) -> Tensor:
        length, rings = x.shape[1], [None] * len(self.layers)
        if state is not None:
            memory = memory_of(self, state, x)
            if length > self.frame_positions and int(memory["position"]) + length > self.ring_size:
                # Written at once, it would overwrite what its own first positions still want to see.
                frames = x.split(self.frame_positions, dim=1)
                return torch.cat([self(frame, state) for frame in frames], dim=1)
            rings = memory["rings"]
        placement = self.place(x, state)
        for layer, ring in zip(self.layers, rings):
            x = layer(x, placement, ring)
        if state is not None:
            memory["position"] += length
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
        """What never changes while streaming: the centroids, and what `encode` makes of their lengths."""
        centroids = self.centroids
        return {"centroids": centroids, "bias": -centroids.pow(2).sum(1) / 2}

    def encode(self, x: Tensor, state: dict | None = None) -> Tensor:
        """x [B, F, dim] -> the index of the nearest centroid [B, F].
        |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2): the nearest c has the largest bracket, a linear layer."""
        memory = memory_of(self, state, x)
        return F.linear(x, memory["centroids"], memory["bias"]).argmax(dim=-1)

    def decode(self, codes: Tensor, state: dict | None = None) -> Tensor:
        """codes [B, F] -> centroids [B, F, dim]."""
        return F.embedding(codes, memory_of(self, state, codes)["centroids"])

class ResidualQuantizer(nn.Module):
    """Codebooks in a row, each quantizing what those before it left over, between two projections."""
    def __init__(self, config: MimiConfig, num_codebooks: int):
        super().__init__()
        self.input_proj = nn.Conv1d(config.dimension, config.quantizer_dimension, 1, bias=False)
        self.output_proj = nn.Conv1d(config.quantizer_dimension, config.dimension, 1, bias=False)
        codebooks = (Codebook(config.bins, config.quantizer_dimension) for _ in range(num_codebooks))
        self.codebooks = nn.ModuleList(codebooks)

    def encode(self, z: Tensor, num_codebooks: int, state: dict | None = None) -> Tensor:
        """z [B, D, F] -> codes [B, num_codebooks, F]."""
        residual, codes = self.input_proj(z).transpose(1, 2), []
        for codebook in self.codebooks[:num_codebooks]:
            codes.append(codebook.encode(residual, state))
            residual = residual - codebook.decode(codes[-1], state)
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor, state: dict | None = None) -> Tensor:
        """codes [B, K, F], any K up to all codebooks -> z [B, D, F]."""
        found = [codebook.decode(code, state) for codebook, code in zip(self.codebooks, codes.unbind(1))]
        return self.output_proj(torch.stack(found).sum(0).transpose(1, 2))

class SplitQuantizer(nn.Module):
    """A semantic codebook beside a row of acoustic ones: both quantize the latent itself, the results add."""
    def __init__(self, config: MimiConfig):
        super().__init__()
        self.num_codebooks = config.n_q  # in use, from 1 to all; set through Mimi.num_codebooks
        self.semantic = ResidualQuantizer(config, 1)
        self.acoustic = ResidualQuantizer(config, config.n_q - 1)

    def encode(self, z: Tensor, state: dict | None = None) -> Tensor:
        """z [B, D, F] -> codes [B, K, F], K = num_codebooks."""
        codes = self.semantic.encode(z, 1, state)
        if self.num_codebooks == 1:
            return codes
        return torch.cat([codes, self.acoustic.encode(z, self.num_codebooks - 1, state)], dim=1)

    def decode(self, codes: Tensor, state: dict | None = None) -> Tensor:
        """codes [B, K, F], K from 1 to all -> z [B, D, F]."""
        z = self.semantic.decode(codes[:, :1], state)
        return z if codes.shape[1] == 1 else z + self.acoustic.decode(codes[:, 1:], state)

# ------------------------------------------------------------------------------------------------------- Mimi
def mimi_transformer(config: MimiConfig) -> Transformer:
    """One of Mimi's two transformers: LayerNorm, GELU, LayerScale, two positions in a frame."""
    dim, hidden, heads, layers = config.dimension, config.dim_feedforward, config.num_heads, []
    for _ in range(config.num_layers):
        feed_forward = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))
        layers.append(TransformerLayer(Attention(dim, heads, heads), feed_forward, nn.LayerNorm, scales=True))
    return Transformer(layers, config.context, config.max_period, frame_positions=config.stride)

class Mimi(nn.Module):
    """The codec. Without `state` a call takes a whole recording; with one it takes its next frames."""
    def __init__(self, config: MimiConfig):
        super().__init__()
        self.config = config
        self.sample_rate, self.frame_rate = config.sample_rate, config.frame_rate
        self.frame_size = config.frame_size
        dim, stride = config.dimension, config.stride
        self.encoder = Encoder(config)
        self.encoder_transformer = mimi_transformer(config)
        self.downsample = CausalConv1d(dim, dim, 2 * stride, stride, bias=False, repeat_first=True)
        self.quantizer = SplitQuantizer(config)
        self.upsample = CausalConvTranspose1d(dim, dim, stride, bias=False, depthwise=True)
        self.decoder_transformer = mimi_transformer(config)
        self.decoder = Decoder(config)

    @property
    def num_codebooks(self) -> int:
        """Codebooks in use by `encode`, from 1 to config.n_q."""
        return self.quantizer.num_codebooks

    @num_codebooks.setter
    def num_codebooks(self, number: int):
        if not 1 <= number <= self.config.n_q:
            raise ValueError(f"{number} codebooks: this Mimi has from 1 to {self.config.n_q}")
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
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.config.n_q or not codes.shape[2]:
            raise ValueError(f"Mimi takes codes as [batch, codebooks, frames], not {list(codes.shape)}")
        return self.from_latent(self.quantizer.decode(codes, state), state)

# ------------------------------------------------------------------------------------ config and weight files
LARGEST = {  # what Python counts through, and the window, whose memory no file bounds; else below 2**20
    "num_layers": 2**8, "depformer_num_layers": 2**8, "n_q": 2**8, "dep_q": 2**8, "delays": 2**10,
    "context": 2**16}

def check_sizes(config, may_be_zero: tuple[str, ...] = ()) -> None:
    """ValueError unless all fields hold numbers of their default's kind, above 0 and not too large."""
    for field in dataclasses.fields(config):
        value, is_list = getattr(config, field.name), isinstance(field.default, tuple)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        kinds, lowest = {int, type(field.default)}, 0 if field.name in may_be_zero else 1e-9
        limit = LARGEST.get(field.name, 2**20)
        good = numbers and all(type(number) in kinds and lowest <= number < limit for number in numbers)
        if not good or is_list != isinstance(value, (list, tuple)):
            raise ValueError(f"config: {field.name} cannot be {value!r}")

def check_official(given: dict, possible: dict, what: str) -> None:
    """ValueError for a key or a value of an official JSON object that isn't `possible` with this code."""
    for key, value in given.items():
        if key not in possible:
            raise ValueError(f"{what}: unknown key {key!r}")
        if isinstance(value, dict) and isinstance(possible[key], dict):
            check_official(value, possible[key], f"{what}, {key}")
        elif value != possible[key]:
            raise ValueError(f"{what}: {key} is {value!r}, but only {possible[key]!r} is possible here")

MIMI_DEFAULTS = {  # what the official JSON means where it leaves a key out
    "seanet": {"dimension": 128, "n_filters": 32, "ratios": [8, 5, 4, 2], "kernel_size": 7,
               "last_kernel_size": 7, "residual_kernel_size": 3, "n_residual_layers": 3, "causal": False,
               "pad_mode": "reflect"},
    "quantizer": {"dimension": 128, "n_q": 8, "bins": 1024},
    "transformer": {"dim_feedforward": 2048, "max_period": 10000, "causal": False, "conv_layout": False,
                    "layer_scale": None, "positional_embedding": "sin"}}

def read_mimi(official: dict) -> MimiConfig:
    """A config from the official JSON, in which three sections have keys of their own."""
    if not all(isinstance(official.get(name, {}), dict) for name in MIMI_DEFAULTS):
        raise ValueError(f"Mimi config: {', '.join(MIMI_DEFAULTS)} must be JSON objects")
    sections = {name: {**defaults, **official.get(name, {})} for name, defaults in MIMI_DEFAULTS.items()}
    found = {**official, **sections["quantizer"], **sections["transformer"], **sections["seanet"]}
    found["quantizer_dimension"] = sections["quantizer"]["dimension"]
    config = MimiConfig(**{field.name: found.get(field.name) for field in dataclasses.fields(MimiConfig)})
    possible = config.to_dict()
    possible["seanet"]["activation_params"], possible["quantizer"]["n_q_semantic"] = {"alpha": 1.0}, 1
    check_official({**official, **sections}, possible, "Mimi config")
    return config

def write_mimi(c: MimiConfig) -> dict:
    """The official JSON of a config: its sizes, and all that is the same in every Mimi."""
    return {
        "sample_rate": c.sample_rate, "channels": 1, "frame_rate": c.frame_rate,
        "seanet": {"channels": 1, "dimension": c.dimension, "n_filters": c.n_filters, "causal": True,
                   "kernel_size": c.kernel_size, "residual_kernel_size": c.residual_kernel_size,
                   "last_kernel_size": c.last_kernel_size, "n_residual_layers": 1, "ratios": list(c.ratios),
                   "compress": 2, "norm": "none", "activation": "ELU", "true_skip": True,
                   "pad_mode": "constant", "dilation_base": 2, "disable_norm_outer_blocks": 0},
        "quantizer": {"dimension": c.quantizer_dimension, "n_q": c.n_q, "bins": c.bins,
                      "input_dimension": c.dimension, "output_dimension": c.dimension},
        "transformer": {"d_model": c.dimension, "input_dimension": c.dimension, "causal": True,
                        "output_dimensions": [c.dimension], "num_heads": c.num_heads, "norm": "layer_norm",
                        "num_layers": c.num_layers, "dim_feedforward": c.dim_feedforward, "gating": "none",
                        "context": c.context, "max_period": c.max_period, "conv_layout": True,
                        "layer_scale": 0.01, "positional_embedding": "rope"}}

def build(kind: Callable, config, path: str | Path):
    """A model without values, on the meta device; ValueError for sizes that no file like `path` can hold."""
    try:
        with torch.device("meta"):
            return kind(config)
    except (RuntimeError, TypeError, OverflowError):
        raise ValueError(f"{path}: no file holds tensors as large as the config says; correct it") from None

def official_names(model: nn.Module, rules: list[tuple[str, str]]) -> dict[str, str]:
    """Our name -> its name in the released files of every tensor in `model`. Rules: (pattern, replacement).
    A '{k}' in a name stands for the entries of our first axis, stored one by one."""
    names = {name: name for name in model.state_dict()}
    for pattern, replacement in rules:
        names = {ours: re.sub(pattern, replacement, name) for ours, name in names.items()}
    return names

def newer_name(name: str) -> str:
    """The name in newer files, where an attention has a tensor for each codebook; Helium's is number 0."""
    return re.sub(r"\.(in|out)_proj[_.]weight(_scb)?$", r".\1_projs.{k}.weight\2", name)

def take_ours(file: WeightFile, name: str, shape: torch.Size) -> Tensor:
    """A tensor of ours by its released name: there, or in pieces, or under a newer name."""
    newer, rows = newer_name(name), shape if name.endswith("_scb") else shape[:-1]
    if name in file.unused and name != newer:  # an attention in a released file, all codebooks stacked
        return file.take(name, math.prod(rows), *shape[len(rows) :]).view(shape)
    if "{k}" not in newer or len(rows) < 2:
        return file.take(newer.format(k=0), *shape)
    pieces = [file.take(newer.format(k=k), *shape[1:]) for k in range(shape[0])]
    return torch.stack(pieces) if pieces else torch.empty(shape, dtype=file.dtype)

def load_weights(model: nn.Module, file: WeightFile, rules: list) -> None:
    """Fills `model`, built on the meta device, from a SafeTensors file; ValueError if that isn't its file.
    Where the model has int8 and the file floats, they are turned to int8, one tensor after another."""
    weights, empty = {}, model.state_dict()
    for ours, name in official_names(model, rules).items():
        if ours in weights:  # scales, which were made with their weights
            continue
        weights[ours] = tensor = take_ours(file, name, empty[ours].shape)
        if empty[ours].dtype == torch.int8 != tensor.dtype:
            weights[ours], weights[f"{ours}_scb"] = to_int8(tensor)
    if file.unused:
        raise ValueError(f"{file.path}: the tensor {min(file.unused)} is not known; does the config fit?")
    model.load_state_dict(weights, assign=True)

def save_weights(model: nn.Module, path: str | Path, rules: list) -> None:
    """Writes the file that `load_weights` reads, with the newer names."""
    tensors, weights = {}, model.state_dict()
    for ours, name in official_names(model, rules).items():
        name, tensor = newer_name(name), weights[ours]
        stacked = "{k}" in name and tensor.dim() + name.endswith("_scb") == 3
        pieces = enumerate(tensor) if stacked else [(0, tensor)]
        tensors.update({name.format(k=k): piece.contiguous() for k, piece in pieces})
    with whole_file(path) as file:
        save_file(tensors, file.name)  # replaces the file by one that only its owner may read
        os.chmod(file.name, os.fstat(file.fileno()).st_mode & 0o777)

TRANSFORMER_NAMES = [  # rules for `official_names`, each with what it makes of a name; these are Helium's too
    (r"\.attention\.in_proj\.", ".self_attn.in_proj_"),  # layers.0.self_attn.in_proj_weight
    (r"\.attention\.", ".self_attn."),  # layers.0.self_attn.out_proj.weight
    (r"\.scale(\d)$", r".layer_scale_\1.scale")]  # layers.0.layer_scale_1.scale
MIMI_NAMES = [
    (r"^(encoder|decoder)\.", r"\1.model."),  # encoder.model.1.block.1.conv.weight
    (r"\.(conv|convtr)\.", r".\1.\1."),  # encoder.model.1.block.1.conv.conv.weight
    (r"sample\.(conv|convtr)\.", r"sample.\1.\1."),  # downsample.conv.conv.conv.weight
    (r"_transformer\.", "_transformer.transformer."),  # encoder_transformer.transformer.layers.0.norm1.bias
    *TRANSFORMER_NAMES,
    (r"\.feed_forward\.0", ".linear1"),  # ...layers.0.linear1.weight
    (r"\.feed_forward\.2", ".linear2"),  # ...layers.0.linear2.weight
    (r"\.semantic\.", ".rvq_first."),  # quantizer.rvq_first.input_proj.weight
    (r"\.acoustic\.", ".rvq_rest."),  # quantizer.rvq_rest.input_proj.weight
    (r"\.codebooks\.(\d+)\.", r".vq.layers.\1._codebook."),  # ...rvq_rest.vq.layers.3._codebook.embedding_sum
    (r"\.initialized", "._initialized")]  # ...rvq_rest.vq.layers.3._codebook._initialized

def load_mimi(path: str | Path, config: MimiConfig | None = None, num_codebooks=8, device="cpu") -> Mimi:
    """Mimi from an official SafeTensors file, in float32; `config` None is the released one.
    On CUDA set torch.backends.cudnn.allow_tf32 = False: TF32 is the default there and can change codes."""
    mimi = build(Mimi, config or MimiConfig(), path)
    load_weights(mimi, WeightFile(path, device, torch.float32), MIMI_NAMES)
    mimi.num_codebooks = num_codebooks
    return mimi.eval()

def save_mimi(mimi: Mimi, path: str | Path) -> None:
    """Writes the official file, in the dtype that the model has."""
    save_weights(mimi, path, MIMI_NAMES)
