"""moshi_min.py against the official package: the model's halves, training, the sampler, its files.

What catches what (each was tried, see mutations.py): forward catches delays, masks and every weight; the
sampler tests catch the order of random draws, the ring, offsets and forcing; the agreement of both catches
what they could share.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from random_checkpoint import make_tokenizer
from reference import (
    LM,
    ForcedLMGen,
    close,
    error,
    finetune_loss,
    is_tie,
    lm_config,
    loaders,
    measured,
    mimi_config,
    official_lm,
    official_mimi,
    official_tensors,
    old_names,
    save,
    watched,
)
from safetensors.torch import load_file, save_file

import moshi_min
from mimi_min import MimiConfig, init_state, load_mimi
from moshi_min import (
    MIMI_FILE,
    MOSHI_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    Moshi,
    MoshiConfig,
    MoshiGen,
    load_checkpoint,
    load_moshi,
    sample,
    save_checkpoint,
    save_moshi,
)

# Of the logits' peak. Rounding to bfloat16 (8 bits) in every layer takes the official model itself up to
# 2.2 % of the peak away from its float32 self, with the models of this file. Two correct models may round in
# opposite directions. (On the CPU both gave the same bits; other kernels round otherwise.)
BF16_BOUND = 0.05


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """pair(name, device, dtype) -> (ours, official): one random official model each, ours from its file."""
    made = {}

    def make(name, device="cpu", dtype=torch.float32):
        if (name, device, dtype) not in made:
            official = official_lm(LM[name], seed=sum(map(ord, name)), device=device, dtype=dtype)
            path = save(
                official,
                tmp_path_factory.mktemp("moshi") / "moshi.safetensors",
                old=name in ("gqa_wide", "two_own"),
            )
            made[name, device, dtype] = (
                load_moshi(path, MoshiConfig.from_dict(LM[name]), device, dtype),
                official,
            )
        return made[name, device, dtype]

    return make


def make_codes(config, batch, frames, device="cpu", holes=True, seed=0):
    """Random codes [B, 1 + n_q, F]: much PAD and EPAD in the text, as in life, some -1 (unknown)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([config["text_card"]] + [config["card"]] * config["n_q"])[:, None]
    codes = (torch.rand(batch, len(sizes), frames, generator=generator) * sizes).long()
    kind = torch.rand(batch, frames, generator=generator)
    codes[:, 0] = torch.where(kind < 0.5, 3, torch.where(kind < 0.6, 0, codes[:, 0]))
    if holes:
        codes[torch.rand(codes.shape, generator=generator) < 0.1] = -1
    return codes.to(device)


def same_logits(ours, theirs, dtype):
    """NaN at the same places, else equal: within 1e-4 in float32, BF16_BOUND of the peak in bfloat16."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    mine, expected = ours.nan_to_num().float(), theirs.nan_to_num().float()
    assert expected.std() > 0.5, "logits too small to show anything"
    if dtype == torch.float32:
        measured("in a logit, float32", (mine - expected).abs().max().item())
        assert (mine - expected).abs().max() <= 1e-4
    else:
        close(mine, expected, BF16_BOUND)


# ---- block by block ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_rmsnorm(pair, place):
    """In float32 inside whatever the model's precision, and exact where the input is tiny (eps is 1e-8)."""
    ours, official = pair("small", *place)
    for size in (1.0, 1e-3, 1e-5, 30.0):
        x = (torch.randn(2, 50, 32) * size).to(*place)
        mine, theirs = ours.out_norm(x), official.out_norm(x)
        assert mine.dtype == place[1] and error(mine, theirs) < (1e-6 if place[1] == torch.float32 else 0.005)
        assert (mine - theirs).abs().sum() <= 1e-3 * theirs.abs().sum()  # bf16: rounded once, at the end


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "gqa_wide"])
def test_gated_feed_forward(pair, place, name):
    """SwiGLU, at the usual width and at 4 * dim, in the temporal transformer."""
    ours, official = pair(name, *place)
    x = torch.randn(2, 9, LM[name]["dim"]).to(*place)
    close(
        ours.transformer.layers[1].feed_forward(x),
        official.transformer.layers[1].gating(x),
        1e-6 if place[1] == torch.float32 else 0.01,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "gqa_wide", "uneven"])
def test_attention(pair, place, name):
    """Attention with as many key heads as query heads, a third and half; more positions than the window."""
    ours, official = pair(name, *place)
    x = torch.randn(2, 40, LM[name]["dim"]).to(*place)
    mine = ours.transformer.layers[1].attention(x, ours.transformer.place(x, None))
    close(
        mine, official.transformer.layers[1].self_attn(x, x, x), 2e-6 if place[1] == torch.float32 else 0.02
    )


@torch.no_grad()
@pytest.mark.parametrize("name", LM)
def test_depth_step(pair, place, name):
    """The depth decoder codebook by codebook, as the sampler runs it, each with its own weights."""
    ours, official = pair(name, *place)
    tokens = make_codes(LM[name], 3, 1, place[0])[..., 0]
    hidden = torch.randn(3, LM[name]["dim"]).to(*place)
    past = [[] for _ in ours.depth_decoder.layers]
    with official.depformer.streaming(3):
        for k in range(LM[name]["dep_q"]):
            expected = official.forward_depformer(k, tokens[:, k, None, None], hidden[:, None])[:, 0, 0]
            same_logits(ours.depth_decoder(hidden, tokens[None, :, k], k, past)[0], expected, place[1])


# ---- the model ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", LM)
def test_forward(pair, place, name):
    """Delays, both halves and masks, on more frames than the context."""
    ours, official = pair(name, *place)
    for frames in (40, 1):
        codes = make_codes(LM[name], 2, frames, place[0])
        output, expected = ours(codes), official(codes)
        assert torch.equal(output.text_mask, expected.text_mask) and torch.equal(
            output.audio_mask, expected.mask
        )
        if frames > 1:
            same_logits(output.text_logits, expected.text_logits, place[1])
            same_logits(output.audio_logits, expected.logits, place[1])


@torch.no_grad()
@pytest.mark.parametrize("name", LM)
def test_temporal(pair, place, name):
    """The temporal transformer on raw tokens; also on text alone, which makes it a plain text model."""
    ours, official = pair(name, *place)
    tokens = make_codes(LM[name], 2, 40, place[0])
    tokens[:, 1, 3], tokens[:, 0, 5] = LM[name]["card"], LM[name]["text_card"]  # the initial tokens
    alone = tokens.clone()
    alone[:, 1:] = -1
    for sequence in (tokens, alone):
        hidden, logits = ours.temporal(sequence)
        expected_hidden, expected = official.forward_text(sequence)
        same_logits(logits, expected[:, 0], place[1])
        close(hidden, expected_hidden, 1e-5 if place[1] == torch.float32 else BF16_BOUND)
        assert hidden.dtype == place[1]


@torch.no_grad()
@pytest.mark.parametrize("name", LM)
def test_depth(pair, place, name):
    """The depth decoder, all codebooks at once, teacher-forced."""
    ours, official = pair(name, *place)
    tokens = make_codes(LM[name], 2, 9, place[0])
    hidden = torch.randn(2, 9, LM[name]["dim"]).to(*place)
    expected = official.forward_depformer_training(tokens, hidden)
    same_logits(ours.depth(hidden, tokens), expected, place[1])


@torch.no_grad()
@pytest.mark.parametrize("name", LM)
def test_bfloat16_rounds_like_the_official(pair, device, name):
    """In bfloat16 ours lies as far from the float32 truth as the official model does, not further."""
    ours, official = pair(name, device, torch.bfloat16)
    codes = make_codes(LM[name], 4, 40, device)
    truth = copy.deepcopy(official).float()(codes)
    mine, theirs = ours(codes), official(codes)
    for a, b, c in (
        (mine.text_logits, theirs.text_logits, truth.text_logits),
        (mine.audio_logits, theirs.logits, truth.logits),
    ):
        there = ~c.isnan()
        assert (a - c)[there].square().mean().sqrt() <= 1.25 * (b - c)[there].square().mean().sqrt()


@torch.no_grad()
@pytest.mark.parametrize("name", LM)
def test_temporal_streaming_is_the_whole(pair, device, name):
    """Step by step through the ring, many times round, equals the sequence at once; so do chunks."""
    ours, official = pair(name, device)
    tokens = make_codes(LM[name], 2, 8 * LM[name]["context"] + 3, device)
    hidden, logits = ours.temporal(tokens)
    close(logits, official.forward_text(tokens)[1][:, 0])
    for length in (1, 5):
        state = init_state(ours, 2)
        steps = [ours.temporal(chunk, state) for chunk in tokens.split(length, -1)]
        close(torch.cat([step[0] for step in steps], 1), hidden)
        close(torch.cat([step[1] for step in steps], 1), logits)


@torch.no_grad()
def test_rows_of_a_batch_are_independent(pair, device):
    """Each row alone gives what it gives in a batch."""
    ours, _ = pair("uneven", device)
    codes = make_codes(LM["uneven"], 3, 20, device)
    together = ours(codes)
    for row in range(3):
        alone = ours(codes[row : row + 1])
        close(together.audio_logits[row : row + 1].nan_to_num(), alone.audio_logits.nan_to_num())
        assert torch.equal(together.audio_mask[row : row + 1], alone.audio_mask)


@torch.no_grad()
def test_forward_is_causal(pair, device):
    """A changed frame changes no logits before it, and in its own only what follows in the depth chain."""
    ours, _ = pair("small", device)  # delays 0 0 1 1 | 0 1 1
    codes = make_codes(LM["small"], 1, 20, device, holes=False)
    before = ours(codes)
    for stream in range(codes.shape[1]):
        changed = codes.clone()
        changed[:, stream, 10] = (changed[:, stream, 10] + 1) % 20
        after = ours(changed)
        text = (before.text_logits - after.text_logits).abs().sum(-1)[0].nan_to_num() > 0
        audio = (before.audio_logits - after.audio_logits).abs().sum(-1)[0].nan_to_num() > 0
        assert not text[0, :11].any() and text[0, 12]
        delays, delay = LM["small"]["delays"], LM["small"]["delays"][stream]
        for k in range(3):
            first = (
                10 + delay - delays[1 + k] + (0 if stream < 1 + k else 1)
            )  # that depth step, or the next time step
            assert not audio[k, :first].any() and audio[k, first], (stream, k)


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LM)
def test_loss_and_gradients(pair, device, tmp_path, name):
    """The fine-tuning loss and its gradient in every parameter, by the official names."""
    ours, official = (copy.deepcopy(model).requires_grad_() for model in pair(name, device))
    codes = make_codes(LM[name], 2, 25, device)
    total, parts = ours.loss(codes)
    text, audio = finetune_loss(official(codes), codes, official)
    assert total.item() == pytest.approx((text + audio).item(), rel=1e-5)
    total.backward()
    (text + audio).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters()), (
        "a parameter without gradient"
    )
    mine = official_tensors(ours, save_moshi, tmp_path / "gradients.safetensors", lambda p: p.grad)
    for key, parameter in official.named_parameters():
        found = error(mine[key], parameter.grad)
        measured("of a gradient's peak", found)
        assert found < 1e-4, key


def test_loss_weights(pair):
    """The weights are arguments; the parts add up to the total."""
    ours, official = pair("small")
    codes = make_codes(LM["small"], 2, 25)
    for weights in ((0.5, 100.0), (1.0, 1.0), (0.0, 3.0)):
        total, parts = ours.loss(codes, text_padding_weight=weights[0], first_codebook_weight=weights[1])
        text, audio = finetune_loss(official(codes), codes, official, *weights)
        assert parts["text"].item() == pytest.approx(text.item(), rel=1e-5)
        assert parts["audio"].item() == pytest.approx(audio.item(), rel=1e-5)
        assert total.item() == pytest.approx((text + audio).item(), rel=1e-5)


def test_new_weights_are_as_large_as_the_official_ones(tmp_path):
    """Each tensor of a new model has the spread that it has in a new official one."""
    config = lm_config(dim=64, kv_repeat=2, depformer_dim=48, card=60)
    official = loaders.get_moshi_lm(None, config, device="cpu", dtype=torch.float32).state_dict()
    save_moshi(Moshi(MoshiConfig.from_dict(config)), tmp_path / "new.safetensors")
    for name, ours in load_file(tmp_path / "new.safetensors").items():
        if name.endswith("alpha"):
            assert torch.equal(ours, official[name]), name
        else:
            assert 0.8 < ours.std() / official[name].std() < 1.25, name
            assert ours.mean().abs() < 0.2 * ours.std(), name


def test_training_learns(device):
    """A new model learns one batch by the loss alone: initialisation and gradients are of use."""
    torch.manual_seed(0)
    moshi = Moshi(MoshiConfig.from_dict(LM["uneven"])).to(device)
    codes = make_codes(LM["uneven"], 2, 20, device)
    optimizer = torch.optim.AdamW(moshi.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss, _ = moshi.loss(codes, first_codebook_weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 6 < losses[0] < 11 and losses[-1] < 1, losses[::10]  # 6.9 is chance: log(40) + log(24)


# ---- the sampler -------------------------------------------------------------------------------------------


def speak(sampler, user, texts=None, audios=None):
    """Run a sampler, ours or the official one, over user codes [B, n_user, S]: what each step gave."""
    outputs = []
    for s in range(user.shape[-1]):
        text, audio = (
            texts[..., s] if texts is not None else None,
            audios[..., s] if audios is not None else None,
        )
        if isinstance(sampler, MoshiGen):
            outputs.append(sampler.step(user[..., s : s + 1], text, audio))
        else:
            sampler.text, sampler.audio = text, audio
            outputs.append(sampler.step(user[..., s : s + 1]))
    return outputs


def both_speak(ours, official, user, texts=None, audios=None, greedy=False, **options):
    """Both samplers from the same seed: (what ours gave, what theirs gave)."""
    torch.manual_seed(99)
    mine = speak(MoshiGen(ours, len(user), greedy=greedy, **options), user, texts, audios)
    torch.manual_seed(99)
    sampler = ForcedLMGen(official, use_sampling=not greedy, check=True, **options)
    with sampler.streaming(len(user)):
        return mine, speak(sampler, user, texts, audios)


def same_tokens(mine, theirs, delays, first=None):
    """The same steps gave nothing (the first max(delays)), others the same tokens, returned as [B, K, F]."""
    silent = max(delays) if first is None else first
    assert (
        [step is None for step in mine]
        == [step is None for step in theirs]
        == [s < silent for s in range(len(mine))]
    )
    mine, theirs = torch.cat(mine[silent:], -1), torch.cat(theirs[silent:], -1)
    wrong = (mine != theirs).any(1).any(0).nonzero()
    assert not len(wrong), f"{len(wrong)} of {mine.shape[-1]} frames differ, the first is {wrong[0].item()}"
    return mine


def user_codes(config, batch, steps, device="cpu"):
    """What a user says at each step [B, n_q - dep_q, S]."""
    codes = torch.randint(config["card"], (batch, config["n_q"] - config["dep_q"], steps))
    return codes.to(device)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "name, batch, steps",
    [
        ("small", 1, 300),
        ("uneven", 3, 300),
        ("gqa_wide", 2, 80),
        ("all_own", 1, 80),
        ("more_own", 2, 80),
        ("two_own", 3, 80),
        ("no_delays", 2, 80),
    ],
)
def test_sampler(pair, device, name, batch, steps, greedy):
    """Token for token the official LMGen, far past the context, from the same seed."""
    ours, official = pair(name, device)
    options = {} if greedy else {"temp": 0.9, "temp_text": 1.2, "top_k": 20, "top_k_text": 250}
    mine, theirs = both_speak(
        ours, official, user_codes(LM[name], batch, steps, device), greedy=greedy, **options
    )
    tokens = same_tokens(mine, theirs, LM[name]["delays"])
    assert tokens.shape == (batch, 1 + LM[name]["dep_q"], steps - max(LM[name]["delays"]))
    assert all(len(stream.unique()) > 3 for stream in tokens.transpose(0, 1)), "it says hardly anything"
    assert (
        (tokens >= 0).all()
        and (tokens[:, 1:] < LM[name]["card"]).all()
        and (tokens[:, 0] < LM[name]["text_card"]).all()
    )


def test_default_options_are_the_official_ones(pair):
    """Temperatures and top-k of both where none is given."""
    ours, official = pair("small")
    same_tokens(*both_speak(ours, official, user_codes(LM["small"], 1, 60)), LM["small"]["delays"])


def test_released_vocabulary(tmp_path_factory, device):
    """At 32000 text tokens and 8 times 2048 x top-k 250, until a draw that is then shown to be a tie."""
    config = lm_config(
        dim=64,
        text_card=32000,
        card=2048,
        n_q=16,
        dep_q=8,
        context=20,
        depformer_dim=32,
        depformer_dim_feedforward=4 * 33,
        delays=loaders._lm_kwargs["delays"],
        depformer_context=8,
    )
    official = official_lm(config, seed=8, device=device)
    path = save(official, tmp_path_factory.mktemp("vocabulary") / "moshi.safetensors")
    ours = load_moshi(path, MoshiConfig.from_dict(config), device, torch.float32)
    compared, ties = 0, 0
    for seed in range(4):
        user = user_codes(config, 1, 60, device)
        torch.manual_seed(seed)
        mine = speak(MoshiGen(ours), user)
        torch.manual_seed(seed)
        sampler = ForcedLMGen(official)
        with sampler.streaming(1), watched() as draws:
            theirs = speak(sampler, user)
        for s, (a, b) in enumerate(zip(mine, theirs)):
            if a is None or torch.equal(a, b):
                compared += a is not None
                continue
            # The frame of step s - 1: text and semantic token were drawn then, the acoustic ones in step s.
            for k, wait in enumerate([1, 1, 0, 0, 0, 0, 0, 0, 0]):
                draw = draws[9 * (s - wait) + k]
                if a[0, k] != b[0, k]:
                    assert is_tie(draw, 0, a[0, k].item(), 1e-4), (
                        f"seed {seed} step {s} stream {k}: not a tie"
                    )
                    ties += 1
                    break
            break
    assert compared >= 100, f"only {compared} frames were the same, with {ties} ties"


def test_forced_tokens(pair, device):
    """Text and audio forced in some streams, rows and steps; -2 samples; random numbers are drawn anyway."""
    for name in ("uneven", "all_own"):
        ours, official = pair(name, device)
        config, steps = LM[name], 80
        texts = torch.randint(config["text_card"], (3, steps)).to(device)
        audios = torch.randint(config["card"], (3, config["dep_q"], steps)).to(device)
        texts[torch.rand(texts.shape) < 0.5] = -2
        audios[torch.rand(audios.shape) < 0.6] = -2
        texts[:, 20:30], audios[:, :, 25:35] = -2, -2
        user = user_codes(config, 3, steps, device)
        mine, theirs = both_speak(ours, official, user, texts, audios)
        tokens = same_tokens(mine, theirs, config["delays"])
        delay = config["delays"][0]
        wanted = texts[:, delay:][:, : tokens.shape[-1]]
        assert torch.equal(tokens[:, 0][wanted != -2], wanted[wanted != -2])
        for only in ({"texts": texts}, {"audios": audios}):
            same_tokens(*both_speak(ours, official, user, **only, greedy=True), config["delays"])


def test_official_hooks(pair):
    """Forced text is the official on_text_hook, forced audio depformer_replace_tokens or on_audio_hook."""
    ours, official = pair("small")
    config, steps = LM["small"], 40
    user, texts = user_codes(config, 1, steps), torch.randint(40, (1, steps))
    audios = torch.randint(24, (1, 3, steps))
    mine = speak(MoshiGen(ours, 1, greedy=True), user, None, audios)
    now = {}
    replaced = ForcedLMGen(official, use_sampling=False)
    with replaced.streaming(1):
        same_tokens(
            mine,
            [
                replaced.step(user[..., s : s + 1], depformer_replace_tokens=audios[..., s : s + 1])
                for s in range(steps)
            ],
            config["delays"],
        )
    hooked = type(replaced).__mro__[1](
        official,
        on_text_hook=lambda token: token.copy_(now["text"]),
        on_audio_hook=lambda tokens: tokens.copy_(now["audio"]),
    )
    torch.manual_seed(1)
    theirs = []
    with hooked.streaming(1):
        for s in range(steps):
            now["text"], now["audio"] = texts[:, s], audios[..., s]
            theirs.append(hooked.step(user[..., s : s + 1]))
    torch.manual_seed(1)
    same_tokens(speak(MoshiGen(ours, 1), user, texts, audios), theirs, config["delays"])


def test_reset(pair, device):
    """After reset() the sampler is as good as new."""
    ours, _ = pair("uneven", device)
    user = user_codes(LM["uneven"], 2, 50, device)
    sampler = MoshiGen(ours, 2)
    torch.manual_seed(5)
    first = speak(sampler, user)
    speak(sampler, user[..., :7])
    for history in (None, make_codes(LM["uneven"], 2, 9, device, holes=False)):
        sampler.reset()
        if history is not None:  # it leaves tokens that the next steps were to say
            sampler.prefill(history)
            sampler.reset()
        torch.manual_seed(5)
        same_tokens(first, speak(sampler, user), LM["uneven"]["delays"])


def test_rows_of_a_sampler_are_independent(pair, device):
    """Greedy rows of a batch say what each says alone."""
    ours, _ = pair("uneven", device)
    user = user_codes(LM["uneven"], 3, 60, device)
    together = speak(MoshiGen(ours, 3, greedy=True), user)
    for row in range(3):
        alone = speak(MoshiGen(ours, 1, greedy=True), user[row : row + 1])
        same_tokens(
            [step if step is None else step[row : row + 1] for step in together],
            alone,
            LM["uneven"]["delays"],
        )


def aligned(config, tokens, user):
    """Codes as `forward` takes them: Moshi's tokens [B, 1 + dep_q, F], the user's of step f + 1 at f."""
    frames = min(tokens.shape[-1], user.shape[-1] - 1)
    return torch.cat([tokens[..., :frames], user[..., 1 : 1 + frames]], dim=1)


def check_agreement(config, moshi, codes, skip=0):
    """`forward` on what the greedy sampler said finds each token the likeliest; returns their number.

    Left out is only what may differ: in step s, what follows in the depth chain on a stream with delay > s,
    since there the sampler feeds its own discarded token and `forward` the initial one.
    """
    output, delays, looked = moshi(codes), config["delays"], 0
    for k in range(1 + config["dep_q"]):
        logits = output.text_logits[:, 0] if k == 0 else output.audio_logits[:, k - 1]
        after = max((delays[j] for j in range(k)), default=0)
        first, last = max(skip, after - delays[k], 0), codes.shape[-1] - delays[k]
        best = logits[:, first:last].argmax(-1)
        assert torch.equal(best, codes[:, k, first:last]), f"stream {k}"
        looked += best.numel()
    return looked


@torch.no_grad()
@pytest.mark.parametrize("name", LM)
def test_sampler_and_forward_agree(pair, device, name):
    """Training and speaking see the same model: delays, initial tokens and positions are the same in both."""
    ours, _ = pair(name, device)
    user = user_codes(LM[name], 2, 50, device)
    tokens = torch.cat([step for step in speak(MoshiGen(ours, 2, greedy=True), user) if step is not None], -1)
    assert check_agreement(LM[name], ours, aligned(LM[name], tokens, user)) > 200


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3, 30])
@pytest.mark.parametrize("name", LM)
def test_prefill(pair, device, name, frames):
    """A history of all streams, then on from there: as if the official sampler had been forced through it."""
    ours, official = pair(name, device)
    config, more = LM[name], 25
    history = make_codes(config, 2, frames, device, holes=False)
    user = user_codes(config, 2, more, device)
    delays, own = config["delays"], 1 + config["dep_q"]
    # In step s stream k is frame s - delays[k], and the user's frame s - 1 is heard.
    steps = frames + 1 + more
    forced = torch.full((2, own, steps), -2, device=device)
    for k in range(own):
        forced[:, k, delays[k] : delays[k] + frames] = history[:, k]
    heard = torch.cat([torch.zeros_like(history[:, own:, :1]), history[:, own:], user], -1)
    for greedy in (True, False):
        sampler = ForcedLMGen(official, use_sampling=not greedy, check=True)
        with sampler.streaming(2):
            before = speak(sampler, heard[..., :frames], forced[:, 0], forced[:, 1:])
            torch.manual_seed(3)
            theirs = speak(sampler, heard[..., frames:], forced[:, 0, frames:], forced[:, 1:, frames:])
        torch.manual_seed(3)
        sampler = MoshiGen(ours, 2, greedy=greedy)
        mine = [sampler.prefill(history), *speak(sampler, user)]
        silent = max(0, max(delays) - frames)
        tokens = same_tokens(mine, theirs, delays, silent)
        if greedy:  # and `forward` on the same history agrees with what was said next
            start = frames + silent - max(delays)  # the frame that came out first
            said = torch.cat([history[:, :own, :start], tokens], -1)
            listened = torch.cat([history[:, own:], user], -1)
            both = min(said.shape[-1], listened.shape[-1])
            codes = torch.cat([said[..., :both], listened[..., :both]], 1)
            check_agreement(config, ours, codes, skip=frames)
    assert len(before) == frames


def test_wrong_calls(pair):
    """Shapes and options that cannot be meant are refused in one sentence."""
    ours, _ = pair("small")
    sampler, with_gradients = MoshiGen(ours, 2), Moshi(MoshiConfig.from_dict(LM["small"]))
    begun = MoshiGen(ours, 2)
    begun.step(torch.zeros(2, 3, 1, dtype=torch.long))

    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.long)

    for call, said in (
        (lambda: sampler.step(zeros(1, 3, 1)), r"user codes \[2, 3, 1\], not \[1, 3, 1\]"),
        (lambda: sampler.step(zeros(2, 2, 1)), r"user codes \[2, 3, 1\], not \[2, 2, 1\]"),
        (lambda: sampler.prefill(zeros(2, 6, 4)), "prefill .* all streams"),
        (lambda: sampler.prefill(zeros(1, 7, 4)), "prefill .* all streams"),
        (lambda: begun.prefill(zeros(2, 7, 4)), r"prefill starts a conversation, after reset\(\)"),
        (lambda: ours(zeros(1, 6, 4)), r"\[batch, 7, frames\], not \[1, 6, 4\]"),
        (lambda: ours(zeros(7, 4)), r"\[batch, 7, frames\], not \[7, 4\]"),
        (lambda: with_gradients.temporal(zeros(1, 7, 1), init_state(with_gradients, 1)), "no_grad"),
        (lambda: MoshiGen(ours, top_k=0), "top-k 1 or more"),
        (lambda: MoshiGen(ours, temp_text=-1), "temperature must be 0 or more"),
        (lambda: MoshiGen(ours, temp=-1), "temperature must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert sampler.prefill(zeros(2, 7, 0)) is None and sampler.steps == 0


def test_a_temperature_next_to_nothing_is_greedy():
    logits = torch.randn(50, 20)
    assert torch.equal(sample(logits, 1e-40, 20), logits.argmax(-1))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_graph(pair, dtype):
    """The captured graph says what eager steps say, after a reset and after a prefill too."""
    ours, _ = pair("uneven", "cuda", dtype)
    user = user_codes(LM["uneven"], 2, 60, "cuda")
    history = make_codes(LM["uneven"], 2, 9, "cuda", holes=False)
    texts = torch.full((2, 60), -2, device="cuda")
    texts[:, 10:20] = 7
    results = []
    for graph in (True, False):
        sampler = MoshiGen(ours, 2, cuda_graph=graph)
        torch.manual_seed(2)
        results.append(speak(sampler, user, texts))
        sampler.reset()
        sampler.prefill(history)
        results[-1] += speak(sampler, user)
        fresh = MoshiGen(ours, 2, cuda_graph=graph)
        fresh.prefill(history)  # before any step
        results[-1] += speak(fresh, user)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results))


# ---- files -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("old", [False, True], ids=["newer", "older"])
@pytest.mark.parametrize("name", LM)
def test_names_and_round_trip(pair, tmp_path, name, old):
    """Older and newer names are read; what save_moshi writes the official package loads, tensor by tensor."""
    _, official = pair(name)
    path = save(official, tmp_path / "moshi.safetensors", old)
    assert any("in_proj_weight" in key for key in load_file(path)) == old
    ours = load_moshi(path, MoshiConfig.from_dict(json.loads(json.dumps(LM[name]))), dtype=torch.float32)
    assert not ours.training
    save_moshi(ours, tmp_path / "ours.safetensors")
    assert load_file(tmp_path / "ours.safetensors").keys() == official.state_dict().keys(), "the newer names"
    again = loaders.get_moshi_lm(tmp_path / "ours.safetensors", LM[name], dtype=torch.float32)
    for key, tensor in official.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    codes = make_codes(LM[name], 1, 12)
    assert torch.equal(again(codes).text_logits.nan_to_num(), official(codes).text_logits.nan_to_num())


def test_bfloat16_file(tmp_path):
    """A bf16 file is loaded as it is, or widened when asked; bf16 logits are close to those in float32."""
    official = official_lm(LM["small"], dtype=torch.bfloat16)
    path = save(official, tmp_path / "moshi.safetensors")
    config = MoshiConfig.from_dict(LM["small"])
    assert all(p.dtype == torch.bfloat16 for p in load_moshi(path, config).parameters())
    assert all(p.dtype == torch.bfloat16 for p in load_moshi(path, config, dtype=None).parameters())
    wide = load_moshi(path, config, dtype=torch.float32)
    codes = make_codes(LM["small"], 1, 20)
    with torch.no_grad():
        same_logits(wide(codes).audio_logits, official.float()(codes).logits, torch.float32)


def test_broken_files(tmp_path):
    """A missing, an extra, a misshapen tensor: an error that names it. A pickle, half a file: an error."""
    config = MoshiConfig.from_dict(LM["small"])
    state = {name: tensor.clone() for name, tensor in official_lm(LM["small"]).state_dict().items()}
    path = tmp_path / "broken.safetensors"

    def refused(tensors, *words, error=ValueError):
        if tensors is not None:
            save_file(tensors, path)
        with pytest.raises(error) as caught:
            load_moshi(path, config)
        for word in words:
            assert word in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)

    for source in (state, old_names(state)):
        for name in (
            "emb.3.weight",
            "depformer_emb.1.weight",
            "depformer.layers.1.gating.2.linear_in.weight",
            "linears.2.weight",
            "out_norm.alpha",
            next(n for n in source if n.startswith("depformer.layers.0.self")),
            next(n for n in source if n.startswith("transformer.layers.2.self")),
        ):
            refused(
                {key: t for key, t in source.items() if key != name},
                name.split(".in_proj")[0].split(".out_proj")[0],
            )
            refused({**source, name: source[name][..., :-1].clone()}, name)
            for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn):
                refused({**source, name: source[name].to(dtype)}, name, "dtype")
        refused({**source, "extra_heads.0.weight": torch.zeros(3)}, "extra_heads.0.weight")
    path.write_bytes(pickle.dumps({"model": [1.0]}))
    refused(None, "broken.safetensors", "SafeTensors")
    torch.save({"fsdp_best_state": {"model": state}}, path)
    refused(None, "broken.safetensors", "SafeTensors")
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(None, "broken.safetensors", "SafeTensors")
    path.unlink()
    refused(None, "broken.safetensors", error=FileNotFoundError)


def test_default_config_is_the_released_7b():
    """MoshiConfig() is what the official package builds when it is given no config."""
    assert MoshiConfig() == MoshiConfig.from_dict(loaders._lm_kwargs)
    with torch.device("meta"):
        ours = Moshi(MoshiConfig())
    official = loaders.get_moshi_lm(None, None, device="meta")
    numbers = [sum(p.numel() for p in model.parameters()) for model in (ours, official)]
    assert numbers[0] == numbers[1] == pytest.approx(7.69e9, rel=1e-3)


@torch.no_grad()
def test_missing_keys_have_the_official_defaults(tmp_path):
    """A key that is not there means LMModel's default; the depth decoder inherits what it has no key for."""
    for gone in (
        ["kv_repeat", "depformer_kv_repeat", "max_period", "hidden_scale", "existing_text_padding_id"],
        ["depformer_num_layers", "depformer_gating", "depformer_dim_feedforward", "layer_scale"],
        ["depformer_kv_repeat", "depformer_dim", "num_heads", "depformer_layer_scale", "causal"],
    ):
        config = lm_config(kv_repeat=2, depformer_kv_repeat=1, dim=64, depformer_num_heads=4)
        config = {key: value for key, value in config.items() if key not in gone}
        official = official_lm(config, seed=1)
        path = save(official, tmp_path / "moshi.safetensors")
        ours = load_moshi(path, MoshiConfig.from_dict(config), dtype=torch.float32)
        codes = make_codes(config, 1, 20)
        same_logits(ours(codes).audio_logits, official(codes).logits, torch.float32)
        assert ours.loss(codes)[0].item() == pytest.approx(
            sum(finetune_loss(official(codes), codes, official)).item(), rel=1e-5
        )


@pytest.mark.parametrize(
    "key, value",
    [
        ("surprise", 1),
        ("hidden_scale", 0.03),
        ("hidden_scale", 2**20),
        ("depformer_dim_feedforward", 1),
        ("context", 2**20),
        ("max_period", 1e300),
        ("dim", 33),
        ("dim", 0),
        ("dim", "32"),
        ("num_heads", 5),
        ("kv_repeat", 3),
        ("n_q", 5),
        ("dep_q", 7),
        ("delays", [0, 0, 1]),
        ("delays", [0, 0, 1, -1, 0, 1, 1]),
        ("delays", None),
        ("delays", [0, 0, 1, 0.5, 0, 1, 1]),
        ("context", None),
        ("context", 0),
        ("gating", "gelu"),
        ("norm", "layer_norm"),
        ("positional_embedding", "sin"),
        ("causal", False),
        ("layer_scale", 0.1),
        ("depformer_pos_emb", "rope"),
        ("depformer_multi_linear", False),
        ("depformer_weights_per_step", False),
        ("depformer_gating", "none"),
        ("depformer_norm", "rms_norm_f32"),
        ("depformer_num_heads", 5),
        ("depformer_weights_per_step_schedule", [0, 1, 1]),
        ("cross_attention", True),
        ("conditioners", {"description": {}}),
        ("extra_heads_num_heads", -1),
        ("extra_heads_dim", 0),
        ("model_type", "hibiki"),
        ("demux_second_text_stream", True),
        ("text_card_out", 7),
        ("depformer_low_rank_embeddings", 8),
        ("bias_proj", True),
        ("norm_emb", True),
        ("existing_text_padding_id", 400),
        ("num_layers", True),
        ("card", -1),
    ],
)
def test_wrong_configs(key, value):
    """An unknown key or an impossible value is an error that names it."""
    with pytest.raises(ValueError) as caught:
        MoshiConfig.from_dict(lm_config(**{key: value}))
    message = str(caught.value)
    ours = {"num_heads": "heads", "depformer_num_heads": "heads", "existing_text_padding_id": "padding"}
    assert key in message or ours.get(key, key) in message, message


@torch.no_grad()
@pytest.mark.parametrize("name", LM)
def test_json_of_a_config(pair, tmp_path, name):
    """to_dict() is read by from_dict, and the official package opens a file with it: logits are as with the
    JSON that was written by hand."""
    config = MoshiConfig.from_dict(LM[name])
    written = json.loads(json.dumps(config.to_dict()))
    assert MoshiConfig.from_dict(written) == config
    _, official = pair(name)
    path = save(official, tmp_path / "moshi.safetensors")
    assert written.pop("model_type") == "moshi"  # the official package takes it out first
    again = loaders.get_moshi_lm(path, written, dtype=torch.float32)
    assert again.text_padding_token_id == official.text_padding_token_id
    codes = make_codes(LM[name], 1, 2 * config.context)
    mine, expected = again(codes), official(codes)
    assert torch.equal(mine.text_logits.nan_to_num(), expected.text_logits.nan_to_num())
    assert torch.equal(mine.logits.nan_to_num(), expected.logits.nan_to_num())


@pytest.mark.parametrize(
    "config, dtype, codebooks",
    [
        (None, torch.bfloat16, 8),  # no config.json: the 7B
        (LM["small"], torch.float32, 3),
        (lm_config(dim=1024, n_q=8, dep_q=3, delays=[0] * 9), torch.float32, 5),
        (lm_config(dim=1536, n_q=7, dep_q=5, delays=[0] * 8), torch.bfloat16, 5),
    ],
    ids=["no config", "small", "1024", "1536"],
)
def test_what_a_folder_leaves_open(monkeypatch, tmp_path, config, dtype, codebooks):
    """A narrow model is float32, a wide one bfloat16; Mimi has codebooks for Moshi's streams and the user's,
    whichever are more. Nothing is loaded to see that."""
    if config is not None:
        mimi = mimi_config(codebook_size=24)
        (tmp_path / "codec.json").write_text(json.dumps(mimi))
        (tmp_path / "config.json").write_text(json.dumps({**config, "mimi_config_name": "codec.json"}))
    monkeypatch.setattr(moshi_min, "load_mimi", lambda *arguments: arguments)
    monkeypatch.setattr(moshi_min, "load_moshi", lambda *arguments: arguments)
    moshi, codec, tokenizer, _ = load_checkpoint(tmp_path, "cpu")
    sizes = (MoshiConfig(), MimiConfig())
    if config is not None:
        sizes = (MoshiConfig.from_dict(config), MimiConfig.from_dict(mimi))
    assert moshi == (tmp_path / "model.safetensors", sizes[0], "cpu", dtype)
    assert codec == (tmp_path / loaders.MIMI_NAME, sizes[1], codebooks, "cpu")
    assert tokenizer is None
    assert load_checkpoint(tmp_path, "cpu", torch.float16).moshi[-1] == torch.float16
    if config is not None:
        (tmp_path / "codec.json").write_text(json.dumps(mimi_config(codebook_size=25)))
        with pytest.raises(ValueError, match="card 24, but Mimi has 25"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("with_words", [True, False], ids=["words", "no words"])
def test_a_saved_folder(tmp_path, with_words):
    """What save_checkpoint writes, the official package and load_checkpoint open, tensor for tensor: sizes of
    the models, whatever the settings say of them, and all else as the settings say."""
    sizes = mimi_config(codebooks=7, codebook_size=24, positions=3, ratios=(5, 2), kernels=(5, 3, 1))
    official = official_mimi(sizes), official_lm(LM["uneven"], seed=2)
    mimi = load_mimi(save(official[0], tmp_path / "mimi"), MimiConfig.from_dict(sizes), 4)
    moshi = load_moshi(save(official[1], tmp_path / "moshi"), MoshiConfig.from_dict(LM["uneven"]), dtype=None)
    settings = {"lm_gen_config": {"temp": 0.3, "top_k": 9}, "dim": 999, "tokenizer_name": "other.model"}
    words = make_tokenizer(320) if with_words else None
    folder = tmp_path / "made" / "here"
    save_checkpoint(folder, Checkpoint(moshi, mimi, words, settings))

    names = [MOSHI_FILE, MIMI_FILE, "mimi_config.json", "config.json"] + with_words * [TOKENIZER_FILE]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    info = loaders.CheckpointInfo.from_hf_repo(
        "none", folder / MOSHI_FILE, folder / MIMI_FILE, folder / TOKENIZER_FILE,
        folder / "config.json", folder / "mimi_config.json",
    )  # fmt: skip
    assert info.lm_gen_config == settings["lm_gen_config"]
    for theirs, mine in zip(official, (info.get_mimi("cpu"), info.get_moshi("cpu", torch.float32))):
        found = mine.state_dict()
        assert found.keys() == theirs.state_dict().keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in theirs.state_dict().items())
    codes = make_codes(LM["uneven"], 1, 20)
    with torch.no_grad():
        same = info.get_moshi("cpu", torch.float32)(codes).text_logits, official[1](codes).text_logits
    assert torch.equal(*map(torch.nan_to_num, same))
    assert info.get_mimi("cpu").frame_size == official[0].frame_size

    again = load_checkpoint(folder)
    assert again.moshi.config == moshi.config and again.mimi.config == mimi.config
    for model, loaded in ((moshi, again.moshi), (mimi, again.mimi)):
        assert all(
            torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items()
        )
    assert again.config["lm_gen_config"] == settings["lm_gen_config"] and again.config["dim"] == 32
    assert (again.tokenizer is None) == (words is None)
    if words is not None:
        text = "the codec is a model"
        assert again.tokenizer.encode(text) == words.encode(text) == info.get_text_tokenizer().encode(text)


MEMORY = """
import json, sys, torch
from moshi_min import MoshiConfig, load_moshi
def peak():  # of this program: ru_maxrss would count the parent's memory at the fork too
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def read_all(moshi):  # mapped pages are only counted once they are read
    with torch.no_grad():
        return sum(float(p.view(-1)[::64].float().sum()) for p in moshi.parameters())
small, config = (MoshiConfig.from_dict(json.loads(text)) for text in sys.argv[3:])
read_all(load_moshi(sys.argv[1], small))  # what torch takes for itself is not the model's
before = peak()
moshi = load_moshi(sys.argv[2], config)
loaded = peak() - before
read_all(moshi)
print(loaded, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux gives it")
@pytest.mark.parametrize("old", [False, True], ids=["newer", "older"])
def test_loading_takes_little_memory(tmp_path, old):
    """Opening a bf16 file and reading all of it takes at most 1.15 times its size: nothing is copied but what
    the depth decoder stacks, whose share is as large here as in the 7B."""
    config = lm_config(
        dim=1024,
        num_heads=8,
        num_layers=10,
        n_q=16,
        dep_q=8,
        card=2048,
        text_card=8000,
        context=100,
        depformer_dim=256,
        depformer_num_heads=4,
        depformer_num_layers=1,
        depformer_dim_feedforward=4 * 264,
        delays=loaders._lm_kwargs["delays"],
    )
    sizes = {}
    for name, lm in (("small", LM["small"]), ("large", config)):
        shapes = loaders.get_moshi_lm(None, lm, device="meta").state_dict()
        state = {key: torch.full(tensor.shape, 0.01, dtype=torch.bfloat16) for key, tensor in shapes.items()}
        save_file(old_names(state) if old else state, tmp_path / name)
        sizes[name] = os.path.getsize(tmp_path / name)
        del state
    assert sizes["large"] > 300e6
    command = [
        sys.executable,
        "-c",
        MEMORY,
        tmp_path / "small",
        tmp_path / "large",
        json.dumps(LM["small"]),
        json.dumps(config),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    loaded, read = (int(peak) / sizes["large"] for peak in done.stdout.split())
    print(
        f"{sizes['large'] / 1e6:.0f} MB, peak after opening {loaded:.3f} of it, after reading all {read:.3f}"
    )
    assert 0.9 < read <= 1.15 and loaded <= 1.15


# ---- the released weights ----------------------------------------------------------------------------------

CHECKPOINT = os.environ.get("MOSHI_CHECKPOINT")
needs_checkpoint = pytest.mark.skipif(
    not CHECKPOINT, reason="MOSHI_CHECKPOINT names no folder with released weights"
)
KNOWN = {  # from the test suite of transformers: greedy, the user's one encoded frame of silence repeated
    "moshiko": (
        [3, 3, 3, 0, 11725, 261, 3, 3, 3, 3],
        72065,
        [
            [1049, 127],
            [1700, 243],
            [1626, 457],
            [546, 290],
            [306, 306],
            [1443, 1443],
            [1871, 428],
            [2008, 1744],
        ],
    ),
    "moshika": (
        [3, 3, 3, 0, 667, 263, 3, 3, 0, 705],
        72932,
        [
            [1049, 127],
            [1700, 243],
            [1626, 457],
            [546, 290],
            [306, 306],
            [1443, 347],
            [1871, 428],
            [2008, 2008],
        ],
    ),
}


def released_files():
    """The paths in the folder: config (or None), model, Mimi."""
    folder = Path(CHECKPOINT)
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    return (
        config,
        folder / config.get("moshi_name", loaders.MOSHI_NAME),
        folder / config.get("mimi_name", loaders.MIMI_NAME),
    )


@needs_checkpoint
@torch.no_grad()
def test_released_mimi(device):
    """The released codec on a tone in noise: the official codes and wave."""
    checkpoint = load_checkpoint(CHECKPOINT, device)
    official = loaders.get_mimi(released_files()[2], device=device)
    wave = (torch.sin(torch.arange(1920 * 50) * 0.05) * 0.3 + torch.randn(1920 * 50) * 0.02)[None, None].to(
        device
    )
    expected = official.encode(wave)
    assert (checkpoint.mimi.encode(wave) == expected).float().mean() > 0.99
    close(checkpoint.mimi.decode(expected), official.decode(expected))


@needs_checkpoint
@torch.no_grad()
def test_released_moshi(device):
    """The released model in bfloat16 (the file is mapped, so both fit): logits; greedy tokens until a tie."""
    _, path, _ = released_files()
    checkpoint = load_checkpoint(CHECKPOINT, device, torch.bfloat16)
    config = checkpoint.moshi.config
    kwargs = {
        k: v
        for k, v in checkpoint.config.items()
        if k
        not in (
            "moshi_name",
            "mimi_name",
            "mimi_config_name",
            "tokenizer_name",
            "lora_name",
            "model_type",
            "lm_gen_config",
            "tts_config",
            "stt_config",
            "model_id",
        )
    }
    official = loaders.get_moshi_lm(path, kwargs or None, device=device)
    codes = torch.randint(config.card, (1, 1 + config.n_q, 6), device=device)
    same_logits(checkpoint.moshi(codes).text_logits, official(codes).text_logits, torch.bfloat16)
    same_logits(checkpoint.moshi(codes).audio_logits, official(codes).logits, torch.bfloat16)


@needs_checkpoint
@torch.no_grad()
def test_known_answers():
    """Ten greedy steps beside a silent user, in float16 on CUDA or float32 on a CPU with memory for it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 40e9:
        pytest.skip("the 7B in float32 takes 31 GB, this machine has less than 40")
    checkpoint = load_checkpoint(CHECKPOINT, device, torch.float16 if device == "cuda" else torch.float32)
    silence = checkpoint.mimi.encode(torch.zeros(1, 1, 1920, device=device))
    sampler = MoshiGen(checkpoint.moshi, greedy=True)
    steps = [sampler.step(silence) for _ in range(11)]
    tokens = torch.cat(steps[1:], -1)[0].cpu()
    for text, total, audio in KNOWN.values():
        if tokens[0].tolist() == text:
            assert tokens[1:, :2].tolist() == audio
            assert tokens[1:, :9].sum().item() == pytest.approx(total, abs=2048)
            return
    pytest.fail(f"text {tokens[0].tolist()} is neither moshiko's nor moshika's")
