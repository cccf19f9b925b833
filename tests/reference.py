"""The official models as references: randomised so that nothing in them is hidden, and written to files.

A default-initialised official model proves nothing: its codebooks are zero, its LayerScales 0.01, its norms
one. So every parameter and buffer gets a random value of a size that matters in the output. Our models always
come out of a file that the official model's state dict was saved to, so that each test also goes through the
loader.
"""

import copy
import importlib
import math
import os
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

os.environ.setdefault("NO_TORCH_COMPILE", "1")
os.environ.setdefault("NO_CUDA_GRAPH", "1")


def require(name):
    """Import a reference package. Where it is missing: an error under CI, elsewhere the file is skipped."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip(
            f"the reference package {name.split('.')[0]} is not installed: NOTHING IN THIS FILE IS COMPARED",
            allow_module_level=True,
        )


loaders = require("moshi.models.loaders")
sampling = require("moshi.utils.sampling")
LMGen = require("moshi.models.lm").LMGen

# ---- configurations ----------------------------------------------------------------------------------------
# The official JSON is written by hand here, not by our configs' to_dict(). Both packages are given the same
# objects: if they came from the code that is tested, a size that to_dict() drops or swaps would be wrong in
# both models alike, and they would agree. What to_dict() writes has tests of its own, against this.


def mimi_config(
    dim=32,
    filters=4,
    ratios=(4, 3, 2),
    heads=4,
    layers=2,
    context=10,
    feedforward=48,
    codebooks=6,
    codebook_size=40,
    codebook_dim=12,
    kernels=(7, 3, 3),
    max_period=10000,
    positions=2,
):
    """An official Mimi configuration; a frame is `positions` positions of the transformers."""
    hop = math.prod(ratios)
    return {
        "sample_rate": 48 * hop,
        "channels": 1,
        "frame_rate": 48 / positions,
        "seanet": {
            "channels": 1,
            "dimension": dim,
            "causal": True,
            "n_filters": filters,
            "n_residual_layers": 1,
            "activation": "ELU",
            "compress": 2,
            "dilation_base": 2,
            "disable_norm_outer_blocks": 0,
            "kernel_size": kernels[0],
            "residual_kernel_size": kernels[1],
            "last_kernel_size": kernels[2],
            "norm": "none",
            "pad_mode": "constant",
            "ratios": list(ratios),
            "true_skip": True,
        },
        "quantizer": {
            "dimension": codebook_dim,
            "n_q": codebooks,
            "bins": codebook_size,
            "input_dimension": dim,
            "output_dimension": dim,
        },
        "transformer": {
            "d_model": dim,
            "num_heads": heads,
            "num_layers": layers,
            "causal": True,
            "layer_scale": 0.01,
            "context": context,
            "conv_layout": True,
            "max_period": max_period,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": feedforward,
            "input_dimension": dim,
            "output_dimensions": [dim],
        },
    }


MIMI = {
    "small": mimi_config(),
    "odd": mimi_config(
        dim=24,
        filters=6,
        ratios=(5, 2),
        heads=2,
        layers=3,
        context=7,
        feedforward=40,
        codebooks=3,
        codebook_size=17,
        codebook_dim=10,
        kernels=(5, 5, 1),
        max_period=500,
        positions=3,
    ),
    "released": copy.deepcopy(loaders._mimi_config),
}


def lm_config(**changes):
    """A small official configuration of the language model, with the options of the released one."""
    config = {
        "dim": 32,
        "text_card": 40,
        "existing_text_padding_id": 3,
        "n_q": 6,
        "dep_q": 3,
        "card": 24,
        "num_heads": 4,
        "num_layers": 3,
        "hidden_scale": 4.125,
        "causal": True,
        "layer_scale": None,
        "context": 12,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 24,
        "depformer_dim_feedforward": int(4.125 * 24),
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_layer_scale": None,
        "depformer_multi_linear": True,
        "depformer_context": 3,
        "depformer_max_period": 10000,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": [0, 0, 1, 1, 0, 1, 1],
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value != "absent"}


LM = {
    "small": lm_config(),
    # Grouped queries in both transformers (the depth decoder inherits the option), 4 * dim feed-forwards.
    "gqa_wide": lm_config(
        dim=48,
        num_heads=6,
        kv_repeat=3,
        hidden_scale=4,
        depformer_num_heads=6,
        depformer_dim_feedforward=4 * 24,
        max_period=200,
    ),
    # Grouped queries in the temporal transformer alone; delays of every kind, the text's among them.
    "uneven": lm_config(kv_repeat=2, depformer_kv_repeat=1, delays=[1, 0, 3, 2, 0, 4, 2]),
    # As many of Moshi's codebooks as there are: no user at all; the depth feed-forward from hidden_scale.
    "all_own": lm_config(
        n_q=4,
        dep_q=4,
        delays=[0, 2, 1, 3, 0],
        depformer_context=4,
        hidden_scale=3.5,
        depformer_dim_feedforward="absent",
    ),
    # dep_q is not half of n_q.
    "more_own": lm_config(n_q=7, dep_q=5, delays=[2, 0, 1, 1, 1, 1, 0, 1], depformer_context=5, context=9),
    # A frame is whole in the step that makes it: the shortest strip, in which the sampler's columns meet.
    "no_delays": lm_config(delays=[0] * 7, kv_repeat=2),
    "two_own": lm_config(n_q=3, dep_q=2, delays=[0, 1, 0, 2], depformer_context=2),
}

# ---- random weights ----------------------------------------------------------------------------------------


def _uniform(tensor, low, high, generator):
    return torch.rand(tensor.shape, generator=generator) * (high - low) + low


def _normal(tensor, scale, generator):
    return torch.randn(tensor.shape, generator=generator) * scale


@torch.no_grad()
def randomise(model, seed):
    """Give every parameter and buffer of an official model a value that shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        if name.endswith("_initialized"):
            value = torch.ones(tensor.shape)
        elif name.endswith("cluster_usage"):  # some below the floor of 1e-5 that the centroids divide by
            value = _uniform(tensor, 0.2, 3.0, generator)
            value[::7] = 1e-7
        elif name.endswith("embedding_sum"):
            continue  # below, once the usage is known
        elif "layer_scale" in name:
            value = _uniform(tensor, 0.3, 1.0, generator)
        elif name.endswith("alpha") or "norm" in name and name.endswith("weight"):
            value = _uniform(tensor, 0.6, 1.4, generator)
        elif name.endswith("bias"):
            value = _normal(tensor, 0.1, generator)
        elif "emb" in name:
            value = _normal(tensor, 0.5, generator)
        elif (
            "convtr" in name
        ):  # [in, out / groups, kernel]: an output sums in * kernel / stride = 2 * in of them
            groups = 1 if tensor.shape[1] > 1 or tensor.shape[0] == 1 else tensor.shape[0]
            value = _normal(tensor, 1.3 / math.sqrt(2 * tensor.shape[0] / groups), generator)
        else:
            gain = (
                2.5 if name.startswith("text_linear") else 1.3 if "linears" in name or "conv" in name else 1.0
            )
            value = _normal(tensor, gain / math.sqrt(tensor[0].numel()), generator)
        tensor.copy_(value)
    for module in model.modules():
        if hasattr(module, "embedding_sum"):
            usage = module.cluster_usage.clamp(min=1e-5).cpu()
            centroids = _normal(module.embedding_sum, 1.0, generator)
            module.embedding_sum.copy_(centroids * usage[:, None])
            module._embedding = None
    return model


@torch.no_grad()
def fit_codebooks(mimi, seed):
    """Scale the random centroids to what they quantize, so that every codebook uses many of its codes."""
    noise = torch.randn(1, 1, mimi.frame_size * 20, generator=torch.Generator().manual_seed(seed)) * 0.3
    latent = mimi.encode_to_latent(noise.to(next(mimi.parameters()).device), quantize=False)
    for quantizer in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        size = quantizer.input_proj(latent).std() * 0.3
        for layer in quantizer.vq.layers:
            layer._codebook.embedding_sum *= size
            layer._codebook._embedding = None


def official_mimi(config, seed=0, device="cpu", num_codebooks=None):
    """A random official MimiModel in float32, with all codebooks in use unless a number is given."""
    mimi = loaders.get_mimi(None, config, device="cpu", num_codebooks=config["quantizer"]["n_q"])
    randomise(mimi, seed)
    fit_codebooks(mimi, seed)
    mimi.set_num_codebooks(num_codebooks or config["quantizer"]["n_q"])
    return mimi.to(device).eval().requires_grad_(False)


def official_lm(config, seed=0, device="cpu", dtype=torch.float32):
    """A random official LMModel."""
    lm = loaders.get_moshi_lm(None, config, device="cpu", dtype=torch.float32)
    return randomise(lm, seed).to(device=device, dtype=dtype).eval()


# ---- files -------------------------------------------------------------------------------------------------


def old_names(state):
    """The same tensors under the older names of the released files: attention projections in one tensor."""
    out, stacks = {}, {}
    for name, tensor in state.items():
        for new, old in (
            (".self_attn.in_projs.", ".self_attn.in_proj_weight"),
            (".self_attn.out_projs.", ".self_attn.out_proj.weight"),
        ):
            if new in name:
                prefix, rest = name.split(new)
                stacks.setdefault(prefix + old, {})[int(rest.split(".")[0])] = tensor
                break
        else:
            out[name] = tensor
    out.update({name: torch.cat([parts[i] for i in sorted(parts)]) for name, parts in stacks.items()})
    return out


def save(model, path, old=False):
    """Write an official model's state dict to a SafeTensors file, under its newer or its older names."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(old_names(state) if old else state, path)
    return path


def official_tensors(model, save_function, path, what=lambda parameter: parameter):
    """Something of each parameter of one of our models (its gradient, say) under the official names."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters()):
            ours.copy_(what(theirs))
    save_function(twin, path)
    return load_file(path)


# ---- comparing ---------------------------------------------------------------------------------------------

MEASURED = {}  # (test, what): the largest of all its comparisons, told at the end of the run


def measured(what, value):
    """Keep the worst that the running test has seen."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0].split("[")[0].rsplit("/", 1)[-1]
    MEASURED[test, what] = max(value, MEASURED.get((test, what), 0.0))


def error(ours, theirs):
    """The largest difference, relative to the reference's peak."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    assert ours.shape == theirs.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert theirs.numel() and theirs.abs().max() > 0 and torch.isfinite(theirs).all(), (
        "the reference shows nothing"
    )
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def close(ours, theirs, bound=1e-5):
    """Ours is the reference's to within `bound` of its peak, and the reference is not just a constant."""
    assert theirs.double().std() > 1e-3 * theirs.double().abs().max(), "the reference is constant"
    found = error(ours, theirs)
    measured("of the peak", found)
    assert found <= bound, f"differs by {found:.2e} of the peak, bound {bound:.0e}"


TIE = 1e-5  # two centroids are a tie when their distances differ by less than this, relative


@torch.no_grad()
def same_codes(ours, theirs, official, latent, most=0.01):
    """Codes [B, K, F] agree but for ties: `latent` [B, D, F] is what the official package quantized.

    Where they first differ in a frame (codebooks after that one differ rightly), both candidates' distances
    to the official residual are computed in float64 and must be as good as equal. Returns the number of ties.
    """
    assert ours.shape == theirs.shape
    quantizer, ties = official.quantizer, 0
    for part, first in ((quantizer.rvq_first, 0), (quantizer.rvq_rest, 1)):
        residual = part.input_proj(latent).transpose(1, 2).double()  # [B, F, d]
        differed = torch.zeros_like(ours[:, 0], dtype=torch.bool)  # [B, F]
        for k, layer in enumerate(part.vq.layers[: part.n_q]):
            centroids = layer.embedding.double()
            a, b = centroids[ours[:, first + k]], centroids[theirs[:, first + k]]
            new = (ours[:, first + k] != theirs[:, first + k]) & ~differed
            far, near = (residual - a).norm(dim=-1), (residual - b).norm(dim=-1)
            gap = ((far - near).abs() / near)[new]
            assert (gap < TIE).all(), (
                f"codebook {first + k}: {int((gap >= TIE).sum())} codes differ and are no ties, "
                f"first at (batch, frame) {new.nonzero()[gap >= TIE][0].tolist()}, "
                f"distances apart by {gap.max():.1e} of the smaller"
            )
            ties, differed, residual = ties + int(new.sum()), differed | new, residual - b
    measured("ties, share of the codes", ties / ours.numel())
    assert ties <= max(1, most * ours.numel()), f"{ties} ties in {ours.numel()} codes are too many to be ties"
    return ties


# ---- the official sampler, watched and led -----------------------------------------------------------------


class ForcedLMGen(LMGen):
    """The official sampler, with tokens forced inside the depth loop; random numbers are drawn all the same.

    The official hooks act after the loop, too late for the codebooks that follow. Set `.text` [B] and
    `.audio` [B, dep_q] before a step; -2 samples.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, on_text_hook=self._force_text)
        self.text = self.audio = None

    def _force_text(self, token):
        if self.text is not None:
            token.copy_(torch.where(self.text == -2, token, self.text))

    def depformer_step(self, text_token, transformer_out):
        """The official loop in short, each token replaced where it is forced."""
        previous, tokens = text_token, []
        with self.lm_model.depformer.streaming(len(text_token)):
            for k in range(self.lm_model.dep_q):
                logits = self.lm_model.forward_depformer(k, previous[:, None, None], transformer_out)
                token = sampling.sample_token(logits.float(), self.use_sampling, self.temp, self.top_k)[
                    :, 0, 0
                ]
                if self.audio is not None:
                    token = torch.where(self.audio[:, k] == -2, token, self.audio[:, k])
                tokens.append(token)
                previous = token
        return torch.stack(tokens, dim=1)


@contextmanager
def watched():
    """List what the official sampler draws from: (probabilities or logits [B, n], k or None, RNG state)."""
    draws, top_k, token = [], sampling.sample_top_k, sampling.sample_token

    def watched_top_k(probs, k):
        state = torch.cuda.get_rng_state() if probs.is_cuda else torch.get_rng_state()
        draws.append((probs.detach().reshape(-1, probs.shape[-1]).clone(), k, state))
        return top_k(probs, k)

    def watched_token(logits, use_sampling=False, *args, **kwargs):
        if not use_sampling:
            draws.append((logits.detach().reshape(-1, logits.shape[-1]).clone(), None, None))
        return token(logits, use_sampling, *args, **kwargs)

    lm = importlib.import_module("moshi.models.lm")
    sampling.sample_top_k = watched_top_k
    sampling.sample_token = lm.sample_token = watched_token
    try:
        yield draws
    finally:
        sampling.sample_top_k = top_k
        sampling.sample_token = lm.sample_token = token


def is_tie(draw, row, token, epsilon):
    """Could rounding of relative size `epsilon` have made this draw (of `watched`) give `token`?

    Greedy: its logit is the best one's. Sampled: it wins when near-equal neighbours in the ranking swap their
    places (the noise goes by rank), or its quotient p / noise is the best one's.
    """
    values, k, rng = draw
    if k is None:
        return (values[row].max() - values[row, token]).item() <= epsilon * values[row].abs().max().item()
    k = min(k, values.shape[-1])
    ranked, indices = torch.topk(values, min(k + 1, values.shape[-1]), dim=-1)
    generator = torch.Generator(values.device)
    generator.set_state(rng)
    noise = torch.empty(values.shape[0], k, device=values.device).exponential_(1, generator=generator)[row]
    p, order = ranked[row], indices[row]
    quotient = p[:k] / noise
    near = [order[i].item() for i in range(k) if quotient[i] >= quotient.max() * (1 - epsilon)]
    for i in range(len(p) - 1):  # neighbours in the ranking, the last one beyond top-k
        if p[i] - p[i + 1] <= epsilon * p[i]:
            swapped = order.clone()
            swapped[i], swapped[i + 1] = order[i + 1], order[i]
            near.append(swapped[quotient.argmax()].item())
    return token in near


# ---- the training loss -------------------------------------------------------------------------------------


def masked_mean(logits, target, mask, weights):
    """The mean of the cross-entropies of all logits [B, K, F, C], those of masked targets times 0."""
    weights = torch.where(mask, weights, 0.0).flatten()
    target = torch.where(mask, target, 0).flatten()
    losses = F.cross_entropy(logits.float().flatten(0, -2), target, reduction="none")
    losses = torch.where(weights > 0, losses, 0.0)  # NaN where a stream has run out
    return (losses * weights).sum() / weights.sum()


def finetune_loss(output, codes, lm, text_padding_weight=0.5, first_codebook_weight=100.0):
    """The loss of moshi-finetune on an official LMOutput: returns (text, audio), to be added.

    Written after its `compute_loss_with_mask`, not after `Moshi.loss`: nothing is picked out. Every logit has
    a loss, every target a weight, which begins as its mask and is then multiplied.
    """
    text, audio = codes[:, :1], codes[:, 1 : 1 + lm.dep_q]
    text_weights = output.text_mask.float()
    for padding in {lm.text_padding_token_id, lm.end_of_text_padding_id}:
        text_weights[text == padding] *= text_padding_weight
    audio_weights = output.mask.float()
    audio_weights[:, 0] *= first_codebook_weight
    return (
        masked_mean(output.text_logits, text, output.text_mask, text_weights),
        masked_mean(output.logits, audio, output.mask, audio_weights),
    )
