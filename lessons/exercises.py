"""The exercises of LESSONS.md. Fill one in, then say `python lessons/check.py 3` for that of lesson 3."""

import torch  # noqa: F401  you will want it
from torch import Tensor


def timed_words(text: Tensor, pieces: list[str]) -> list[tuple[float, str]]:
    """Lesson 0. The words of a text stream [F], each with the second at which its frame begins; a frame is
    0.08 s. PAD (3) and EPAD (0) are no words. Token t is the piece `pieces[t]`: one that begins with '▁'
    begins a word, any other goes on with the word before it, if there is one."""
    raise NotImplementedError


def pack(codes: Tensor, size: int) -> bytes:
    """Lesson 1. codes [K, F] below `size` -> bytes: frame after frame, in each frame codebook after codebook,
    each code in as few bits as hold size - 1, its highest bit first; zeros fill up the last byte."""
    raise NotImplementedError


def unpack(data: bytes, codebooks: int, frames: int, size: int) -> Tensor:
    """Lesson 1. What `pack` has packed -> codes [codebooks, frames]."""
    raise NotImplementedError


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Lesson 2. x [B, C_in, T], weight [C_out, C_in, K] -> [B, C_out, T]: output t sees inputs t-K+1 .. t."""
    raise NotImplementedError


def receptive_field(layers: list[tuple[int, int]]) -> int:
    """Lesson 3. How many samples one output of convolutions (kernel, stride) in a row depends on."""
    raise NotImplementedError


def residual_quantize(x: Tensor, codebooks: list[Tensor]) -> Tensor:
    """Lesson 4. x [F, dim], codebooks [size, dim] each -> codes [K, F]: each quantizes what is left to it."""
    raise NotImplementedError


def slot_positions(last: int, ring_size: int) -> Tensor:
    """Lesson 5. The position in each slot of a ring once positions 0 .. last are written, -1 if empty."""
    raise NotImplementedError


def helium_parameters(dim: int, layers: int, hidden: int, kv_repeat: int) -> int:
    """Lesson 6. Weights in Helium's layers: attention, SwiGLU of width `hidden`, two norms; no biases."""
    raise NotImplementedError


def put_words(words: list[tuple[int, list[int]]], frames: int) -> Tensor:
    """Lesson 7. [(frame where it starts, its tokens), ...] -> the text stream [frames]: a token a frame,
    EPAD (0) in the frame before a word unless a token is there, PAD (3) elsewhere."""
    raise NotImplementedError


def depth_inputs(text: Tensor, audio: Tensor) -> Tensor:
    """Lesson 8. text [N], audio [K, N] -> [K, N]: the token that the depth decoder reads before each code."""
    raise NotImplementedError


def delayed(codes: Tensor, delays: list[int], initial: Tensor) -> Tensor:
    """Lesson 9. codes [K, F] -> as large: stream k shifted right by delays[k], initial[k] in the gap."""
    raise NotImplementedError


def strip(delays: list[int], own: int, step: int) -> tuple[Tensor, int, int]:
    """Lesson 10. The sampler's strip in a step, counted from 0, just before it moves. The first `own` streams
    are Moshi's, the others the user's. Three things: the number of the frame whose token stands in each
    column [streams, 2 * max(delays) + 2], -2 where none is made yet; the number of the user's frame that this
    step is given; that of Moshi's frame that comes out. The step is so late (2 * max(delays) + 1 or more)
    that nothing before frame 0 is left on the strip."""
    raise NotImplementedError


def text_loss(logits: Tensor, targets: Tensor, padding_weight: float) -> Tensor:
    """Lesson 11. logits [F, V], targets [F], -1 where unknown -> the weighted mean of the cross-entropies:
    PAD (3) and EPAD (0) weigh `padding_weight`, words 1, unknown frames nothing."""
    raise NotImplementedError


def official_name(ours: str) -> str:
    """Lesson 12. The name in a released file of one of our tensors of Helium's layers, for example of
    'transformer.layers.3.attention.in_proj.weight' or 'transformer.layers.3.feed_forward.2.weight'."""
    raise NotImplementedError
