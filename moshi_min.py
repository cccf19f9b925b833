"""Moshi, the model: a transformer over time (Helium) and a small one across the codebooks of a frame.

    17 streams of tokens: [text, 8 codebooks of Moshi's voice, 8 of the user's voice], a step each 80 ms
    a step: add up their embeddings -> Helium -> text token -> depth decoder -> 8 audio tokens, one by one

- it listens and speaks at once: the user's stream is only read, Moshi's streams are predicted, none waits;
- inner monologue: the text of what Moshi says is a stream of its own, just ahead of the sound;
- the acoustic codebooks are delayed by a frame, so that they can lean on the semantic one;
- RMSNorm, SwiGLU, interleaved rotary positions, no biases, a sliding window of 3000 frames (4 minutes);
- the depth decoder has its own weights for each codebook, held stacked: [codebook, out, in].
From "Moshi: a speech-text foundation model for real-time dialogue" (Défossez et al. 2024, arXiv:2410.00037,
section 3.4); the reference implementation is `moshi.models.lm`. Helium's attention is in mimi_min.py.
"""
import contextlib
import dataclasses
import json
import math
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from files import WeightFile, open_regular, read_json, to_int8
from mimi_min import (TRANSFORMER_NAMES, Attention, Mimi, MimiConfig, Transformer, TransformerLayer, build,
                      check_official, check_sizes, init_state, load_mimi, load_weights, reset_state,
                      save_mimi, save_weights)

NO_INPUT = -1  # a token that adds nothing: the zero vector
UNGENERATED = -2  # a token that is still to be sampled

@dataclasses.dataclass
class MoshiConfig:
    """The sizes of a Moshi under their official names; the defaults are the released 7B's."""
    dim: int = 4096  # width of Helium
    num_layers: int = 32
    num_heads: int = 32
    kv_repeat: int = 1  # query heads that share one key and value head
    hidden_scale: float = 4.125  # width of a plain feed-forward over dim; SwiGLU has two thirds of it
    context: int = 3000  # sliding window, in frames
    max_period: float = 10000.0  # of the rotary embedding
    n_q: int = 16  # audio streams in all: Moshi's and the user's
    dep_q: int = 8  # those of Moshi, which the depth decoder predicts
    card: int = 2048  # tokens of an audio codebook; the token `card` itself starts a stream
    text_card: int = 32000  # tokens of the text vocabulary; the token `text_card` starts the stream
    existing_text_padding_id: int = 3  # PAD: no new word
    existing_text_end_padding_id: int = 0  # EPAD: a word comes next
    delays: tuple[int, ...] = (0,) + 2 * (0, 1, 1, 1, 1, 1, 1, 1)  # of each stream, in frames, the text first
    depformer_dim: int = 1024  # width of the depth decoder
    depformer_num_layers: int = 6
    depformer_num_heads: int = 16
    depformer_kv_repeat: int = 1
    depformer_dim_feedforward: int = 4224
    extra_heads_num_heads: int = 0  # of a recogniser: each says whether the speaker has paused for so long
    extra_heads_dim: int = 6  # classes of such a head; number 0 is "yes"

    def __post_init__(self):
        check_sizes(self, ("n_q", "dep_q", "delays", "existing_text_padding_id",
                           "existing_text_end_padding_id", "extra_heads_num_heads"))
        self.delays = tuple(self.delays)
        check_moshi_fits(self)

    @classmethod
    def from_dict(cls, official: dict) -> "MoshiConfig":
        """Reads an official `config.json`; unknown keys and impossible values raise ValueError."""
        return read_moshi(official)

    def to_dict(self) -> dict:
        """The official `config.json`."""
        return write_moshi(self)

# ----------------------------------------------------------------------------------------------------- blocks
class RMSNorm(nn.Module):
    """x * alpha / sqrt(mean(x^2) + 1e-8) over the last axis, in float32 inside (Zhang and Sennrich 2019)."""
    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.alpha.view(-1), eps=1e-8)

def gated_width(dim: int, feedforward: int) -> int:
    """2/3 of the plain width: SwiGLU's three matrices cost what two did. 4 * dim is an official exception."""
    return 21 * dim // 8 if feedforward == 4 * dim else 2 * feedforward // 3

class SwiGLU(nn.Module):
    """silu(gate) * up, for x = (gate, up) stacked on the last axis (Shazeer 2020)."""
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

def embed(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of `table` [tokens, D] for `tokens` [...], the zero vector where the token is NO_INPUT."""
    return F.embedding(tokens.clamp(min=0), table).masked_fill((tokens == NO_INPUT)[..., None], 0)

def random_weight(*shape: int, variance: float = 1.0) -> nn.Parameter:
    """A new weight or table, random with the official spread: `variance` over its last size."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=(variance / shape[-1]) ** 0.5))

# ---------------------------------------------------------------------------------------------- depth decoder
class CodebookLinear(nn.Module):
    """A linear map of its own for each codebook: x [K, N, D_in] of these codebooks -> [K, N, D_out]."""
    def __init__(self, codebooks: int, dim_in: int, dim_out: int, variance: float = 1 / 3):
        super().__init__()
        self.weight = random_weight(codebooks, dim_out, dim_in, variance=variance)

    def forward(self, x: Tensor, codebooks: slice) -> Tensor:
        weight = self.weight[codebooks]
        if len(weight) == 1:  # a step of the sampler: a plain product is faster than a batch of one
            return F.linear(x[0], weight[0])[None]
        return x @ weight.transpose(1, 2)

class DepthLayer(nn.Module):
    """A transformer layer across codebooks. Their own weights tell them apart: no positional embedding."""
    def __init__(self, config: MoshiConfig):
        super().__init__()
        dim, K = config.depformer_dim, config.dep_q
        self.num_heads, self.head_dim = config.depformer_num_heads, dim // config.depformer_num_heads
        self.num_kv_heads = self.num_heads // config.depformer_kv_repeat
        hidden = gated_width(dim, config.depformer_dim_feedforward)
        self.norm1, self.norm2, self.swiglu = RMSNorm(dim), RMSNorm(dim), SwiGLU()
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.in_proj, self.out_proj = CodebookLinear(K, dim, qkv), CodebookLinear(K, dim, dim)
        self.linear_in, self.linear_out = CodebookLinear(K, dim, 2 * hidden), CodebookLinear(K, hidden, dim)

    def forward(self, x: Tensor, codebooks: slice, past: list[Tensor] | None) -> Tensor:
        """x [K', N, D] of these codebooks -> the same. `past` collects keys and values; None: all at once."""
        H, KV = self.num_heads, self.num_kv_heads
        heads = self.in_proj(self.norm1(x), codebooks).unflatten(-1, (-1, self.head_dim))
        heads = heads.permute(1, 2, 0, 3)  # [N, H + 2 KV, K', head_dim]: queries, keys, values
        keys_values = heads[:, H:]
        if past is not None:
            past.append(keys_values)
            keys_values = torch.cat(past, dim=2)  # [N, 2 KV, codebooks so far, head_dim]
        q, k, v = heads[:, :H], keys_values[:, :KV], keys_values[:, KV:]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=KV != H)
        x = x + self.out_proj(y.permute(2, 0, 1, 3).flatten(2), codebooks)
        hidden = self.swiglu(self.linear_in(self.norm2(x), codebooks))
        return x + self.linear_out(hidden, codebooks)

class DepthDecoder(nn.Module):
    """Predicts the audio tokens of one step, codebook after codebook (the official Depformer).
    Codebook k reads Helium's output and the token before: the text for k = 0, else audio token k - 1."""
    def __init__(self, config: MoshiConfig):
        super().__init__()
        dim, K = config.depformer_dim, config.dep_q
        self.input_proj = CodebookLinear(K, config.dim, dim)
        self.text_emb = random_weight(config.text_card + 1, dim)
        self.audio_emb = random_weight(K - 1, config.card + 1, dim)
        self.layers = nn.ModuleList(DepthLayer(config) for _ in range(config.depformer_num_layers))
        self.output_proj = CodebookLinear(K, dim, config.card, variance=1.0)

    def forward(self, hidden: Tensor, tokens: Tensor, first: int = 0, past: list | None = None) -> Tensor:
        """K' codebooks from `first` on: hidden [N, D], the token before each [K', N] -> logits [K', N, card].
        All at once (teacher forcing), or one by one with `past`: a list for each layer, empty at first."""
        codebooks = slice(first, first + len(tokens))
        tables = [self.text_emb, *self.audio_emb][codebooks]
        previous = torch.stack([embed(table, row) for table, row in zip(tables, tokens)])
        x = self.input_proj(hidden.expand(len(tokens), -1, -1), codebooks) + previous
        for layer, cache in zip(self.layers, past or [None] * len(self.layers)):
            x = layer(x, codebooks, cache)
        return self.output_proj(x, codebooks)

def delay(codes: Tensor, delays: list[int] | tuple[int, ...], initial: Tensor) -> Tensor:
    """Shifts stream k of codes [B, K, F] right by delays[k]. The gap gets initial[k], the end falls off."""
    length, longest = codes.shape[-1], max(delays)
    padded = torch.cat([initial[:, None].expand(*codes.shape[:2], longest), codes], dim=-1)
    starts = [longest - shift for shift in delays]
    return torch.stack([padded[:, k, start : start + length] for k, start in enumerate(starts)], dim=1)

def undelay(x: Tensor, delays: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The inverse of `delay` for x [B, K, F, C], NaN where a stream has run out, and its mask [B, K, F]."""
    length = x.shape[2]
    padded = F.pad(x, (0, 0, 0, max(delays)), value=math.nan)
    shifted = torch.stack([padded[:, k, shift : shift + length] for k, shift in enumerate(delays)], dim=1)
    present = torch.arange(length, device=x.device) < length - torch.tensor(delays, device=x.device)[:, None]
    return shifted, present.expand(len(x), -1, -1)

# ------------------------------------------------------------------------------------------------------ Moshi
class MoshiOutput(NamedTuple):
    """Logits aligned with the codes they predict; NaN where a stream has run out. Masks say what counts."""
    text_logits: Tensor  # [B, 1, F, text_card]
    text_mask: Tensor  # [B, 1, F]
    audio_logits: Tensor  # [B, dep_q, F, card]
    audio_mask: Tensor  # [B, dep_q, F]

class Moshi(nn.Module):
    """The 17-stream language model. `forward` and `loss` train it, `MoshiGen` talks with it.
    A recogniser (dep_q 0) has the user's streams and its own text, a text model (n_q 0) text alone: Helium is
    the same in all of them, and without a voice of its own there is no depth decoder."""
    def __init__(self, config: MoshiConfig):
        super().__init__()
        self.config = config
        dim, hidden = config.dim, gated_width(config.dim, int(config.hidden_scale * config.dim))
        self.text_emb = nn.Embedding(config.text_card + 1, dim)
        self.audio_embs = nn.ModuleList(nn.Embedding(config.card + 1, dim) for _ in range(config.n_q))
        layers = []
        for _ in range(config.num_layers):
            attention = Attention(dim, config.num_heads, config.num_heads // config.kv_repeat)
            feed_forward = nn.Sequential(
                nn.Linear(dim, 2 * hidden, bias=False), SwiGLU(), nn.Linear(hidden, dim, bias=False))
            layers.append(TransformerLayer(attention, feed_forward, RMSNorm, scales=False))
        self.transformer = Transformer(layers, config.context, config.max_period)
        self.out_norm, self.text_linear = RMSNorm(dim), nn.Linear(dim, config.text_card, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight = random_weight(*module.weight.shape)
        self.depth_decoder = DepthDecoder(config) if config.dep_q else None
        heads = range(config.extra_heads_num_heads)
        self.extra_heads = nn.ModuleList(nn.Linear(dim, config.extra_heads_dim, bias=False) for _ in heads)

    @property
    def initial(self) -> Tensor:
        """[1 + n_q], the tokens that start the streams."""
        tokens = [self.config.text_card] + [self.config.card] * self.config.n_q
        return torch.tensor(tokens, device=self.text_emb.weight.device)

    def temporal(self, tokens: Tensor, state: dict | None = None) -> tuple[Tensor, Tensor]:
        """Helium on raw tokens [B, 1 + n_q, S] -> hidden [B, S, D], text logits [B, S, text_card].
        Nothing is delayed here. A token of -1 adds nothing: with audio of -1 Helium is a plain text model."""
        x = sum(embed(table.weight, tokens[:, 1 + k]) for k, table in enumerate(self.audio_embs))
        hidden = self.out_norm(self.transformer(x + embed(self.text_emb.weight, tokens[:, 0]), state))
        return hidden, self.text_linear(hidden)

    def depth(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The depth decoder, teacher-forced: hidden [B, S, D], tokens [B, dep_q or more, S] of the same steps
        (text, audio 0..dep_q-2, what follows isn't read) -> logits [B, dep_q, S, card]."""
        if self.depth_decoder is None:
            raise ValueError("a model without a voice has no depth decoder; `temporal` gives its text")
        before = tokens[:, : self.config.dep_q].transpose(0, 1).flatten(1)  # [dep_q, B * S]
        logits = self.depth_decoder(hidden.flatten(0, 1), before)
        return logits.unflatten(1, hidden.shape[:2]).transpose(0, 1)

    def forward(self, codes: Tensor) -> MoshiOutput:
        """codes [B, 1 + n_q, F] of all streams, aligned (-1: unknown) -> logits of text and Moshi's audio."""
        delays, own = self.config.delays, 1 + self.config.dep_q
        if codes.dim() != 3 or codes.shape[1] != len(delays):
            raise ValueError(f"Moshi takes codes as [batch, {len(delays)}, frames], not {list(codes.shape)}")
        # A step reads what the step before has made, so the inputs are one step later than the targets.
        hidden, text_logits = self.temporal(delay(codes, [1 + shift for shift in delays], self.initial))
        text, text_mask = undelay(text_logits[:, None], delays[:1])
        audio, audio_mask = undelay(self.depth(hidden, delay(codes, delays, self.initial)), delays[1:own])
        known = codes[:, :own] != NO_INPUT
        return MoshiOutput(text, text_mask & known[:, :1], audio, audio_mask & known[:, 1:])

    def loss(self, codes: Tensor, text_padding_weight: float = 0.5,
             first_codebook_weight: float = 100.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on codes [B, 1 + n_q, F]: total, {"text": ..., "audio": ...}, weighted means as in
        moshi-finetune. PAD and EPAD, most of the text, weigh less than words, the semantic codebook more."""
        config, output = self.config, self(codes)
        def weighted_mean(logits: Tensor, mask: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            losses = F.cross_entropy(logits[mask].float(), targets[mask], reduction="none")
            return (losses * weights[mask]).sum() / weights[mask].sum().clamp(min=1e-9)
        text, audio = codes[:, :1], codes[:, 1 : 1 + config.dep_q]
        is_padding = (text == config.existing_text_padding_id) | (text == config.existing_text_end_padding_id)
        text_weights = torch.where(is_padding, text_padding_weight, 1.0)
        audio_weights = torch.ones(audio.shape, device=codes.device)
        audio_weights[:, 0] = first_codebook_weight
        parts = {"text": weighted_mean(output.text_logits, output.text_mask, text, text_weights),
                 "audio": weighted_mean(output.audio_logits, output.audio_mask, audio, audio_weights)}
        return parts["text"] + parts["audio"], parts

# ------------------------------------------------------------------------------------------------------- int8
class Int8Linear(nn.Module):
    """A linear map, or one for each codebook, in half the memory of bfloat16: weights are whole numbers from
    -127 to 127, and each row of them has a scale (LLM.int8, Dettmers et al. 2022; the official QLinear).
    bitsandbytes, which the official package uses, rounds the inputs as well; here they stay as they are."""
    packed_up_to = 16  # rows of x: for more it is faster to turn the weights into floats first
    def __init__(self, weight: Tensor):
        super().__init__()
        whole, largest = to_int8(weight)
        self.register_buffer("weight", whole)
        self.register_buffer("weight_scb", largest)  # [D_out], what 127 stands for; [K, D_out] for codebooks

    def forward(self, x: Tensor, codebooks: slice = slice(None)) -> Tensor:
        """x [..., D_in] -> [..., D_out], or as CodebookLinear does."""
        if self.weight.dim() == 2:
            return self.product(x.flatten(0, -2), self.weight, self.weight_scb).unflatten(0, x.shape[:-1])
        rows = zip(x, self.weight[codebooks], self.weight_scb[codebooks])
        return torch.stack([self.product(*row) for row in rows])

    def product(self, x: Tensor, weight: Tensor, largest: Tensor) -> Tensor:
        """x [N, D_in] @ weight^T, times the scales: [N, D_out]. torch has a kernel for it that reads int8
        alone. It is slow in float32, and where its conditions don't hold it returns garbage or crashes."""
        scale = (largest / 127).to(x.dtype)
        fits = x.is_cpu and x.dtype == torch.bfloat16 and len(x) <= self.packed_up_to
        if fits and x.shape[1] % 16 == 0 and weight.data_ptr() % 16 == 0:
            return torch._weight_int8pack_mm(x.contiguous(), weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale

def quantize(module: nn.Module) -> nn.Module:
    """Turns every linear map inside, in place, to int8, and returns the module. Embeddings and norms stay as
    they are, and activations have their dtype: bfloat16 on a CPU, where int8 is to be fast."""
    for name, part in module.named_children():
        if isinstance(part, (nn.Linear, CodebookLinear)):
            setattr(module, name, Int8Linear(part.weight.detach()))
        else:
            quantize(part)
    return module

# ------------------------------------------------------------------------------------------------- generation
def sample(logits: Tensor, temp: float, top_k: int) -> Tensor:
    """One token [B] of logits [B, C]: the likeliest at temp 0 (below 1e-6), else drawn among the top_k.
    p / Exponential(1) noise is largest at i with probability p_i. Unlike multinomial this never waits for the
    GPU, and numbers are drawn in the official order: the same seed gives the same tokens."""
    if temp < 1e-6:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temp, dim=-1)
    top, tokens = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
    choice = (top / torch.empty_like(top).exponential_(1)).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, choice)[:, 0]

def captured(function, device: torch.device, cuda_graph: bool = True):
    """`function` of tensors as a CUDA graph, all its kernels launched at once; itself on other devices.
    The first call is eager (a mere warm-up would move memory and random numbers on), the second captures, all
    later ones replay. Values may change between calls; shapes (ValueError), the place of memory and the
    branches that Python takes may not. Results are copies."""
    if not cuda_graph or device.type != "cuda":
        return function
    graph, inputs, results = torch.cuda.CUDAGraph(), [], []
    def replay(*given: Tensor) -> Tensor:
        if not inputs:
            result = function(*given)
            inputs.extend(tensor.clone() for tensor in given)
            return result
        for mine, new in zip(inputs, given):
            if mine.shape != new.shape:
                raise ValueError(f"captured for the shape {list(mine.shape)}, called with {list(new.shape)}")
            mine.copy_(new)
        if not results:
            try:
                with torch.cuda.device(device), torch.cuda.graph(graph):
                    results.append(function(*inputs))
            except RuntimeError as error:
                cause = error.__context__ or error
                raise RuntimeError(f"no CUDA graph captured ({cause}); try cuda_graph=False") from error
        graph.replay()
        return results[0].clone()
    return replay

class MoshiGen:
    """Talks: a frame of the user's codes in, a frame of text and Moshi's codes out (or None), for ever.
    Tokens lie in a strip, a row for each stream, a column for each moment of delayed time:

        0 .. max_delay - 1   max_delay   max_delay + 1   ..  2 * max_delay   last
        said, not all out    read now    made now        the user's, early   always UNGENERATED
    A step ends with moving it one column to the left. Stream k lies delays[k] columns late: the user's codes
    go into column max_delay + delays[k], and the frame that is whole now is in column 1 + delays[k]. `greedy`
    takes the likeliest token. On CUDA a step is a captured graph, or eager with `cuda_graph=False`."""
    def __init__(self, moshi: Moshi, batch_size: int = 1, temp: float = 0.8, temp_text: float = 0.7,
                 top_k: int = 250, top_k_text: int = 25, greedy: bool = False, cuda_graph: bool = True):
        if min(temp, temp_text) < 0 or min(top_k, top_k_text) < 1:
            raise ValueError("a temperature must be 0 or more, and a top-k 1 or more")
        self.moshi, self.config = moshi, moshi.config
        self.temp, self.temp_text = (0.0, 0.0) if greedy else (temp, temp_text)
        self.top_k, self.top_k_text = top_k, top_k_text
        self.own, self.max_delay = 1 + self.config.dep_q, max(self.config.delays)  # own: text, Moshi's voice
        self.initial = moshi.initial[:, None]  # [1 + n_q, 1], as are the delays and the streams' numbers
        self.device = self.initial.device
        self.delays = torch.tensor(self.config.delays, device=self.device)[:, None]
        self.streams = torch.arange(len(self.delays), device=self.device)[:, None]
        # All that a step keeps lies in tensors that stay where they are, so that a graph can replay it.
        self.state = init_state(moshi, batch_size)
        self.offset = torch.zeros(1, dtype=torch.long, device=self.device)  # steps so far
        self.strip = self.initial.new_empty(batch_size, len(self.delays), 2 * self.max_delay + 3)
        self.pauses = torch.zeros(batch_size, self.config.extra_heads_num_heads, device=self.device)
        self.cuda_graph = cuda_graph
        self._run = captured(self._step, self.device, cuda_graph)
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        reset_state(self.state)
        self.strip.fill_(UNGENERATED)
        self.offset.zero_()
        self.steps = 0

    @torch.no_grad()
    def step(self, user_codes: Tensor, text: Tensor | None = None,
             audio: Tensor | None = None) -> Tensor | None:
        """The user's codes [B, n_q - dep_q, 1] -> tokens [B, 1 + dep_q, 1], text first, or None at the start.
        Step s hears the user's frame s - 1 (step 0 nothing) and completes Moshi's frame s - max(delays).
        `text` [B] and `audio` [B, dep_q] force the tokens that are made now, in delayed time; -2 samples one.
        Random numbers are drawn all the same. ValueError for codes of another shape. Where the logits are
        not finite, the text that comes back is -2. A recogniser's `extra_heads` leave in `pauses` [B, heads]
        how probable it is that the speaker has paused for so long."""
        expected = [len(self.strip), self.config.n_q - self.config.dep_q, 1]
        if list(user_codes.shape) != expected:
            raise ValueError(f"a step takes user codes {expected}, not {list(user_codes.shape)}")
        forced = self.strip.new_empty(len(self.strip), self.own)
        forced[:, 0] = UNGENERATED if text is None else text
        forced[:, 1:] = UNGENERATED if audio is None else audio
        tokens = self._run(user_codes.to(self.device), forced)
        self.steps += 1
        return tokens if self.steps > self.max_delay else None

    def _step(self, user_codes: Tensor, forced: Tensor) -> Tensor:
        """One step on static tensors: no value on the host is read or made, so a graph can replay it."""
        now, own, strip = self.max_delay, self.own, self.strip
        strip[:, self.streams[own:], now + self.delays[own:]] = user_codes
        # Before its delay is over a stream has only its initial token.
        tokens = torch.where(self.offset <= self.delays, self.initial, strip[:, :, now, None])
        hidden, text_logits = self.moshi.temporal(tokens, self.state)
        for number, head in enumerate(self.moshi.extra_heads):
            self.pauses[:, number] = head(hidden[:, 0]).softmax(dim=-1)[:, 0]
        # A token is forced by the caller, or by a prefill that reaches beyond this step.
        forced = torch.where(forced == UNGENERATED, strip[:, :own, now + 1], forced)
        made: list[Tensor] = []
        total = text_logits[:, 0].sum(-1, dtype=torch.float32)  # of all logits: finite if each of them is
        past: list[list[Tensor]] = [[] for _ in range(self.config.depformer_num_layers)]
        for k in range(own):  # the text, then the codebooks, each seeing the one before
            if k == 0:
                token = sample(text_logits[:, 0], self.temp_text, self.top_k_text)
            else:
                logits = self.moshi.depth_decoder(hidden[:, 0], made[-1][None], k - 1, past)[0]
                total = total + logits.sum(-1, dtype=torch.float32)
                token = sample(logits, self.temp, self.top_k)
            made.append(torch.where(forced[:, k] == UNGENERATED, token, forced[:, k]))
        strip[:, :own, now + 1] = torch.stack(made, dim=1)

        frame = strip[:, self.streams[:own], 1 + self.delays[:own]]
        frame[:, 0].masked_fill_(~total.isfinite()[:, None], UNGENERATED)  # the host sees the text anyway
        strip[:, :, :-1] = strip[:, :, 1:].clone()
        self.offset += 1
        return frame

    @torch.no_grad()
    def prefill(self, codes: Tensor) -> Tensor | None:
        """Starts from a history: codes [B, 1 + n_q, F] of all streams, aligned as in `Moshi.forward`. Returns
        what the step gives that hears the user's frame F - 1. Next comes `step` with the user's frame F."""
        frames, shifts, initial = codes.shape[-1], [1 + d for d in self.config.delays], self.moshi.initial
        if self.steps or codes.shape[:2] != self.strip.shape[:2]:
            raise ValueError("prefill starts a conversation, after reset(), with the codes of all streams")
        if not frames:
            return None
        self.moshi.temporal(delay(codes, shifts, initial), self.state)
        self.offset.fill_(frames)
        self.steps = frames
        # The strip around step F: the delayed streams reach beyond it, and nothing is known before frame 0.
        around = F.pad(codes, (self.max_delay, 3 + self.max_delay), value=UNGENERATED)
        tokens = delay(around, shifts, torch.full_like(initial, UNGENERATED))
        self.strip.copy_(tokens[:, :, frames:])
        return self.step(codes[:, self.own :, -1:])

# ------------------------------------------------------------------------------------------------ checkpoints
MOSHI_FILE, MIMI_FILE = "model.safetensors", "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_FILE, MIMI_CONFIG_FILE = "tokenizer_spm_32k_3.model", "mimi_config.json"

class Checkpoint(NamedTuple):
    """A whole checkpoint folder."""
    moshi: Moshi
    mimi: Mimi | None  # None where there is no sound, in a text model
    tokenizer: SentencePieceProcessor | None  # None where the folder has none
    config: dict  # what config.json says, `lm_gen_config` (sampling) and `stt_config` (silences) among it

def load_checkpoint(folder: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Checkpoint:
    """Opens a folder in the official format, without `config.json` a Moshi 7B. `dtype` None is bfloat16, or
    float32 for a narrow model. What is missing raises FileNotFoundError, what is wrong ValueError: also a
    name in `config.json` that leads out of the folder, which may come from anybody."""
    folder, config, moshi_config, mimi_config = Path(folder), {}, MoshiConfig(), MimiConfig()
    if (folder / "config.json").exists():
        config = read_json(folder / "config.json", check_settings)
        moshi_config = read_json(folder / "config.json", MoshiConfig.from_dict)
    if config.get("mimi_config_name"):
        mimi_config = read_json(folder / config["mimi_config_name"], MimiConfig.from_dict)
    adapters = [folder / str(name) for name in (config.get("lora_name"), "lora.safetensors")]
    if config.get("lora") and any(path.is_file() for path in adapters):
        raise ValueError(f"{folder} holds LoRA adapters; tools/convert.py adds them to their base")
    dtype = dtype or (torch.float32 if moshi_config.dim <= 1024 else torch.bfloat16)
    mimi, codebooks = None, max(moshi_config.dep_q, moshi_config.n_q - moshi_config.dep_q)
    if codebooks:
        if moshi_config.card != mimi_config.bins:
            raise ValueError(f"config: card {moshi_config.card}, but Mimi has {mimi_config.bins} tokens")
        mimi = load_mimi(folder / config.get("mimi_name", MIMI_FILE), mimi_config, codebooks, device)
    moshi = load_moshi(folder / config.get("moshi_name", MOSHI_FILE), moshi_config, device, dtype)
    tokenizer, path = None, folder / config.get("tokenizer_name", TOKENIZER_FILE)
    if "tokenizer_name" in config or path.exists():
        with open_regular(path, 2**27) as file:
            proto = file.read()
        try:
            tokenizer = SentencePieceProcessor()
            tokenizer.LoadFromSerializedProto(proto)
            tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))  # an error where one isn't UTF-8
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: not a SentencePiece model ({error})") from None
    return Checkpoint(moshi, mimi, tokenizer, config)

def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a folder that `load_checkpoint` and the official package read. Sizes come from the models, and
    `lm_gen_config` and what else `config.json` may say from `checkpoint.config`."""
    folder, (moshi, mimi, tokenizer, config) = Path(folder), checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    int8 = any(isinstance(part, Int8Linear) for part in moshi.modules())
    config = {**config, **moshi.config.to_dict(), "moshi_name": MOSHI_FILE, "quantize": int8, "lora": False}
    for name in ("tokenizer_name", "lora_name"):  # the tokenizer has the usual one, if it is there
        config.pop(name, None)
    save_moshi(moshi, folder / MOSHI_FILE)
    if mimi is not None:
        save_mimi(mimi, folder / MIMI_FILE)
        (folder / MIMI_CONFIG_FILE).write_text(json.dumps(mimi.config.to_dict(), indent=1) + "\n")
        config |= {"mimi_name": MIMI_FILE, "mimi_config_name": MIMI_CONFIG_FILE}
    if tokenizer is not None:
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.serialized_model_proto())
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

def load_moshi(path: str | Path, config: MoshiConfig | None = None, device="cpu",
               dtype: torch.dtype | None = torch.bfloat16) -> Moshi:
    """Moshi from an official SafeTensors file; `config` None is the released 7B, `dtype` None the file's.
    A file of int8 opens as such. torch.int8 quantizes one of floats, and what stays floats is bfloat16."""
    moshi = build(Moshi, config or MoshiConfig(), path)
    file = WeightFile(path, device, dtype)
    load_weights(quantize(moshi) if file.int8 else moshi, file, MOSHI_NAMES)
    return moshi.eval()

def save_moshi(moshi: Moshi, path: str | Path) -> None:
    """Writes the official file, in the dtype that the model has."""
    save_weights(moshi, path, MOSHI_NAMES)

MOSHI_NAMES = [  # as MIMI_NAMES; a codebook {k} has a tensor of its own in the file
    (r"^audio_embs", "emb"),  # emb.3.weight
    (r"^depth_decoder\.input_proj", "depformer_in.{k}"),
    (r"^depth_decoder\.text_emb", "depformer_text_emb.weight"),
    (r"^depth_decoder\.audio_emb", "depformer_emb.{k}.weight"),
    (r"^depth_decoder\.output_proj", "linears.{k}"),
    (r"^depth_decoder", "depformer"),  # depformer.layers.0.norm1.alpha
    (r"^(depformer.*)\.(in|out)_proj", r"\1.attention.\2_proj"),  # of all codebooks, stacked
    (r"^(depformer.*)\.linear_", r"\1.gating.{k}.linear_"),
    *TRANSFORMER_NAMES,
    (r"\.feed_forward\.0", ".gating.linear_in"),  # transformer.layers.0.gating.linear_in.weight
    (r"\.feed_forward\.2", ".gating.linear_out")]

MOSHI_DEFAULTS = {  # what config.json means where it leaves a key out (some of it is refused then)
    "dim": 128, "num_heads": 8, "kv_repeat": 1, "hidden_scale": 4, "max_period": 10000, "n_q": 8, "dep_q": 8,
    "card": 1024, "text_card": 32000, "delays": [0], "existing_text_padding_id": 3,
    "existing_text_end_padding_id": 0, "depformer_dim": 256, "depformer_dim_feedforward": None,
    "norm": "layer_norm", "gating": "none", "positional_embedding": "sin", "depformer_pos_emb": "sin",
    "depformer_multi_linear": False, "depformer_weights_per_step": False, "layer_scale": None,
    "extra_heads_num_heads": 0, "extra_heads_dim": 6}
MOSHI_FIXED = {  # what is the same in every Moshi, and cannot be anything else here
    "causal": True, "norm": "rms_norm_f32", "gating": "silu", "layer_scale": None, "norm_emb": False,
    "positional_embedding": "rope", "depformer_gating": "silu", "depformer_norm": None, "bias_proj": False,
    "depformer_layer_scale": None, "depformer_pos_emb": "none", "depformer_multi_linear": True,
    "depformer_weights_per_step": True, "depformer_weights_per_step_schedule": None, "text_card_out": None,
    "depformer_low_rank_embeddings": None, "cross_attention": False, "demux_second_text_stream": False,
    "demux_second_stream": False, "conditioners": {}}
MOSHI_IGNORED = (  # keys without an effect here
    "fuser", "quantize", "lora", "lora_name", "lora_rank", "lora_scaling", "gradient_checkpointing",
    "depformer_causal", "depformer_context", "depformer_max_period", "moshi_name", "mimi_name", "model_id",
    "mimi_config_name", "tokenizer_name", "lm_gen_config", "stt_config", "tts_config")

def read_moshi(official: dict) -> MoshiConfig:
    """A config from the official JSON. The depth decoder inherits what it has no key of its own for."""
    given = {**MOSHI_DEFAULTS, **official}
    for key in ("num_layers", "kv_repeat", "gating", "layer_scale"):
        given.setdefault(f"depformer_{key}", given.get(key))
    if given["depformer_dim_feedforward"] in (0, None):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # one is no number: said below
            given["depformer_dim_feedforward"] = int(given["hidden_scale"] * given["depformer_dim"])
    sizes = {field.name: given.get(field.name) for field in dataclasses.fields(MoshiConfig)}
    config, ignored = MoshiConfig(**sizes), {key: given.get(key) for key in MOSHI_IGNORED}
    check_official(given, {**MOSHI_FIXED, **ignored, **config.to_dict()}, "config")
    return config

def write_moshi(config: MoshiConfig) -> dict:
    """The official JSON of a config: its sizes, and what a missing key would say otherwise."""
    said = {key: MOSHI_FIXED[key] for key in MOSHI_DEFAULTS if key in MOSHI_FIXED}
    kind = "stt" if config.n_q > config.dep_q == 0 else "moshi"  # speech to text
    return {**dataclasses.asdict(config), "delays": list(config.delays), "model_type": kind, **said}

def check_moshi_fits(config: MoshiConfig) -> None:
    """ValueError where sizes of a Moshi contradict each other."""
    if len(config.delays) != config.n_q + 1 or config.dep_q > config.n_q:
        raise ValueError(f"config: n_q {config.n_q}, dep_q {config.dep_q}, delays {config.delays} do not fit")
    for part, pair in (("", 2), ("depformer_", 1)):  # rotary embedding turns pairs
        dim, heads, repeat = (getattr(config, part + name) for name in ("dim", "num_heads", "kv_repeat"))
        if dim % (pair * heads) or heads % repeat:
            raise ValueError(f"config: {part}dim {dim} does not fit {heads} heads, kv_repeat {repeat}")
    if min(int(config.hidden_scale * config.dim), config.depformer_dim_feedforward) < 2:
        raise ValueError("config: hidden_scale or depformer_dim_feedforward leaves no hidden unit")
    if max(config.existing_text_padding_id, config.existing_text_end_padding_id) >= config.text_card:
        raise ValueError("config: the padding tokens must be below text_card")

def check_settings(config: dict) -> dict:
    """ValueError unless the names of files stay in the folder and `lm_gen_config` has only known keys."""
    for key in ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name"):
        name = config.get(key, "")
        if isinstance(name, str) and name.startswith("hf://"):  # hf://owner/repository/file
            config[key] = name = name.rpartition("/")[2]
        path = PureWindowsPath(name if isinstance(name, str) else "/")  # knows / and \, drives too
        if path.anchor or ".." in path.parts or "\0" in name:
            raise ValueError(f"config: {key} must be the name of a file in the folder, not {name!r}")
    sampling = config.get("lm_gen_config", {})
    if not isinstance(sampling, dict) or type(sampling.get("use_sampling", True)) is not bool:
        raise ValueError(f"config: lm_gen_config cannot be {sampling!r}")
    if unknown := sampling.keys() - {"temp", "temp_text", "top_k", "top_k_text", "use_sampling"}:
        raise ValueError(f"config: lm_gen_config has the unknown key {min(unknown)!r}")
    return config
