"""mimi_min.py against the official package: blocks with copied weights, then end to end, then its files.

What catches what (each was tried, see mutations.py): the conv tests catch padding, bias and overlap; the
attention and transformer tests RoPE, window, ring and scales; the quantizer tests the centroids' floor, the
split and the residual.
"""

import copy
import json
import math
import pickle

import pytest
import torch
from reference import (
    MIMI,
    TIE,
    close,
    error,
    loaders,
    official_mimi,
    official_tensors,
    old_names,
    require,
    same_codes,
    save,
)
from safetensors.torch import load_file, save_file

import mimi_min
from mimi_min import Mimi, MimiConfig, init_state, load_mimi, save_mimi

apply_rope = require("moshi.modules.rope").apply_rope
FLOAT8 = torch.float8_e4m3fn
CHUNKS = (1, 3, 1, 2, 7, 1, 4, 2)  # uneven, repeated as often as needed


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """pair(name, device) -> (ours, official): a random official model, ours from its file. Built once."""
    made = {}

    def make(name, device="cpu"):
        if (name, device) not in made:
            official = official_mimi(MIMI[name], seed=sum(map(ord, name)), device=device)
            path = save(official, tmp_path_factory.mktemp("mimi") / "mimi.safetensors", old=name == "odd")
            ours = load_mimi(path, MimiConfig.from_dict(MIMI[name]), official.total_codebooks, device)
            made[name, device] = ours, official
        return made[name, device]

    return make


def sound(batch, frames, mimi, seed=0):
    """[B, 1, T]: noise and a tone, loud and soft by turns, with a silent stretch."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(int(frames * mimi.frame_size))
    loud = (torch.sin(t / mimi.frame_size / 1.7) + 1) * (t // (3 * mimi.frame_size) % 4 != 2)
    noise = torch.randn(batch, 1, len(t), generator=generator)
    return ((noise * 0.2 + torch.sin(t * 0.05) * 0.2) * loud).to(next(mimi.parameters()).device)


def noise(*shape, device="cpu"):
    """Normal random numbers, the same on every device."""
    return torch.randn(*shape).to(device)


def streamed(function, x, state, unit=1):
    """function(chunk, state) over uneven chunks of `unit` positions of the last axis, joined again."""
    outputs, start, i = [], 0, 0
    while start < x.shape[-1]:
        length = CHUNKS[i % len(CHUNKS)] * unit
        outputs.append(function(x[..., start : start + length], state))
        start, i = start + length, i + 1
    return torch.cat(outputs, dim=-1)


def convs(ours, official):
    """All convolutions of a Mimi, also strided, repeating, depthwise, transposed: (name, ours, official)."""
    pairs = [
        ("downsample", ours.downsample, official.downsample.conv),
        ("upsample", ours.upsample, official.upsample.convtr),
    ]
    for side in ("encoder", "decoder"):
        for i, (mine, theirs) in enumerate(
            zip(getattr(ours, side), getattr(official, side).model, strict=True)
        ):
            if isinstance(mine, mimi_min.ResidualBlock):
                pairs += [(f"{side}.{i}.{j}", mine.block[j], theirs.block[j]) for j in (1, 3)]
            elif not isinstance(mine, torch.nn.ELU):
                pairs.append((f"{side}.{i}", mine, theirs))
    assert len(pairs) == 2 + 2 * (2 + 3 * len(ours.config.ratios))
    return pairs


# ---- block by block ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", MIMI)
def test_every_convolution(pair, device, name):
    """Each with its kernel, stride, padding and bias: whole, and in uneven chunks.

    The official one in float64 gives the exact result. Ours in float64 has it to the last bits; in float32
    its own rounding alone is between them. Two in float32 add up to 3,072 products in two orders.
    """
    for label, ours, theirs in convs(*pair(name, device)):
        transposed = isinstance(ours, mimi_min.CausalConvTranspose1d)
        unit = 1 if transposed else ours.stride
        inner = ours.convtr if transposed else ours.conv
        x = noise(2, inner.in_channels, 23 * unit, device=device) + 1
        exact = copy.deepcopy(theirs).double()(x.double())
        assert exact.shape[-1] == (x.shape[-1] * ours.stride if transposed else x.shape[-1] // ours.stride)
        for conv, sound, bound in ((ours, x, 2e-6), (copy.deepcopy(ours).double(), x.double(), 1e-13)):
            assert error(conv(sound), exact) <= bound, label
            chunks = streamed(conv, sound, init_state(conv, 2), unit)
            assert error(chunks, exact) <= bound, f"{label} streamed"


@torch.no_grad()
@pytest.mark.parametrize("name", MIMI)
def test_seanet(pair, device, name):
    """A residual block, then the whole encoder and decoder, whole and in chunks."""
    ours, official = pair(name, device)
    x = noise(2, ours.encoder[4].block[1].conv.in_channels, 40, device=device)
    close(ours.encoder[4](x), official.encoder.model[4](x), 2e-6)
    hop = ours.config.hop_size
    x = noise(2, 1, 12 * hop, device=device)
    close(ours.encoder(x), official.encoder(x))
    close(streamed(ours.encoder, x, init_state(ours.encoder, 2), hop), official.encoder(x))
    z = noise(2, ours.config.dimension, 12, device=device)
    close(ours.decoder(z), official.decoder(z))
    close(streamed(ours.decoder, z, init_state(ours.decoder, 2)), official.decoder(z))


@pytest.mark.parametrize("start", [0, 5, 100])
def test_rope(device, start):
    """The angles and the pairs are the official ones. At position p the official angle, a float32, is up to
    p * 2**-24 off, which is 6e-6 at 100: ours is exact there, so the bound grows with the position."""
    q, k = noise(2, 3, 9, 16, device=device), noise(2, 3, 9, 16, device=device)
    turns = mimi_min.rotation(torch.arange(start, start + 9, device=device), 16, 500.0)
    expected = apply_rope(q, k, torch.tensor([start, start], device=device), 500.0)
    for mine, theirs in zip((q, k), expected):
        close(mimi_min.rope(mine, turns), theirs, 1e-5 if start > 5 else 1e-6)


@pytest.mark.parametrize("days", [0.01, 1, 30, 3000])
def test_angles_do_not_drift(days):
    """At any position they are the exact product of position and frequency, so that two positions a window
    apart always stand at the same angle to each other. The official float32 product has an error that grows:
    here it is measured, and ours is not above a float32's rounding. The first positions are the same."""
    start, dim, period = int(days * 86400 * 25), 64, 10000.0
    positions = torch.arange(start, start + 250)
    turns = mimi_min.rotation(positions, dim, period)
    frequencies = torch.exp(torch.arange(dim // 2) * (-math.log(period) * 2 / dim))  # float32, as officially
    exact = [[position * frequency for frequency in frequencies.tolist()] for position in positions.tolist()]
    exact = torch.polar(
        torch.ones(250, dim // 2, dtype=torch.float64), torch.tensor(exact, dtype=torch.float64)
    )
    assert (turns - exact).abs().max() < 1e-7 and turns.dtype == torch.complex64
    relative = turns * turns[:1].conj()
    assert (relative - mimi_min.rotation(positions - start, dim, period)).abs().max() < 1e-6
    rounded = positions.float()[:, None] * frequencies
    drift = (torch.polar(torch.ones_like(rounded), rounded) - exact).abs().max()
    assert (drift < 1e-3) if days < 1 else (drift > 0.03), "this is no test of the drift"


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "odd"])
def test_attention_and_layer(pair, device, name):
    """Attention alone and one layer, at once, with more positions than the window."""
    ours, official = pair(name, device)
    ours, official = ours.decoder_transformer, official.decoder_transformer.transformer
    x = noise(2, 3 * ours.context + 1, ours.layers[0].attention.in_proj.in_features, device=device)
    placement = ours.place(x, None)
    theirs = official.layers[1]
    close(ours.layers[1].attention(x, placement), theirs.self_attn(x, x, x), 2e-6)
    close(ours.layers[1](x, placement), theirs(x), 2e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", MIMI)
@pytest.mark.parametrize("side", ["encoder_transformer", "decoder_transformer"])
def test_transformer(pair, device, name, side):
    """Whole and streamed, far past the window; the official streaming as far as it loses no keys."""
    ours, official = pair(name, device)
    ours, official = getattr(ours, side), getattr(official, side).transformer
    length = 600 if name == "released" else 5 * ours.context + 3
    x = noise(1, length, official.layers[0].linear1.in_features, device=device)
    expected = official(x)
    close(ours(x), expected)
    state = init_state(ours, 1)
    close(streamed(lambda z, state: ours(z.mT, state).mT, x.mT, state).mT, expected)
    with official.streaming(1):
        close(ours(x)[:, : ours.context], official(x[:, : ours.context]))


@torch.no_grad()
@pytest.mark.parametrize("name", MIMI)
def test_window_is_exact(pair, device, name):
    """A query sees the context - 1 positions before it and no more: what lies before them changes nothing."""
    ours, _ = pair(name, device)
    layer, transformer = ours.encoder_transformer.layers[0], ours.encoder_transformer
    context = transformer.context
    x = noise(1, context + 1, layer.attention.in_proj.in_features, device=device)
    changed = x.clone()
    changed[:, 0] += 1
    placement = transformer.place(x, None)
    difference = (layer.attention(x, placement) - layer.attention(changed, placement)).abs().amax((0, 2))
    assert difference[context] == 0 and difference[context - 1] > 0


@torch.no_grad()
def test_ring_of_fixed_size(pair, device):
    """On CUDA a step reads the whole ring, the empty slots too. The same here, by taking the choice away."""
    ours, official = pair("small", device)
    ours, official = copy.deepcopy(ours.encoder_transformer), official.encoder_transformer.transformer
    ours.attend_filled = False
    x = noise(2, 3 * ours.context, official.layers[0].linear1.in_features, device=device)
    state = init_state(ours, 2)
    close(streamed(lambda z, state: ours(z.mT, state).mT, x.mT, state).mT, official(x))
    for memory in state.values():
        for tensor in memory.values():
            tensor.zero_()
    assert ours.place(x[:, :1], state).mask.tolist() == [[0.0] + [-math.inf] * (ours.ring_size - 1)]


@torch.no_grad()
@pytest.mark.parametrize("name", MIMI)
def test_one_codebook(pair, device, name):
    """Centroids (with the floor under their usage), nearest and look-up."""
    ours, official = pair(name, device)
    for mine, theirs in (
        (ours.quantizer.semantic.codebooks[0], official.quantizer.rvq_first.vq.layers[0]._codebook),
        (ours.quantizer.acoustic.codebooks[1], official.quantizer.rvq_rest.vq.layers[1]._codebook),
    ):
        close(mine.centroids, theirs.embedding, 1e-7)
        x = noise(2, 50, mine.centroids.shape[1], device=device) * theirs.embedding.std()
        codes, expected = mine.encode(x), theirs.encode(x)
        a, b = ((x - theirs.decode(c)).double().norm(dim=-1) for c in (codes, expected))
        assert ((a - b).abs() / b < TIE).all() and (codes == expected).float().mean() > 0.98
        assert torch.equal(mine.encode(x, init_state(mine, 2)), codes)
        close(mine.decode(expected), theirs.decode(expected), 1e-7)
        close(mine.decode(expected, init_state(mine, 2)), theirs.decode(expected), 1e-7)


@torch.no_grad()
@pytest.mark.parametrize("name", MIMI)
def test_split_quantizer_for_every_number_of_codebooks(pair, device, name):
    """Encoding and decoding with 1 codebook up to all of them."""
    ours, official = pair(name, device)
    z = official.encode_to_latent(sound(2, 24, ours), quantize=False)
    total = official.total_codebooks
    assert ours.config.n_q == total == ours.num_codebooks
    try:
        for number in range(1, total + 1):
            ours.num_codebooks = number
            official.set_num_codebooks(number)
            expected = official.quantizer.encode(z)
            assert expected.shape == (2, number, 24)
            same_codes(ours.quantizer.encode(z), expected, official, z)
            same_codes(ours.quantizer.encode(z, init_state(ours.quantizer, 2)), expected, official, z)
            close(ours.quantizer.decode(expected), official.quantizer.decode(expected), 2e-6)
    finally:
        ours.num_codebooks = total
        official.set_num_codebooks(total)
    assert all(len(codes.unique()) > 5 for codes in expected.unbind(1)), (
        "the codes hardly vary, this proves nothing"
    )
    for wrong in (0, total + 1):
        with pytest.raises(ValueError, match=str(wrong)):
            ours.num_codebooks = wrong


# ---- end to end --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", MIMI)
@pytest.mark.parametrize("frames", [1, 7.3, 40])
def test_offline(pair, device, name, frames):
    """Codes and wave of a batch, with a partial last frame and past the context of the small ones."""
    ours, official = pair(name, device)
    pcm = sound(2, frames, ours)
    z = official.encode_to_latent(pcm, quantize=False)
    if frames > 1:
        close(ours.to_latent(pcm), z)
    expected = official.encode(pcm)
    codes = ours.encode(pcm)
    same_codes(codes, expected, official, z)
    assert codes.shape[-1] == -(-pcm.shape[-1] // ours.frame_size)
    wave, reference = ours.decode(expected), official.decode(expected)
    assert wave.shape == (2, 1, expected.shape[-1] * ours.frame_size)
    close(wave, reference)
    close(ours.from_latent(ours.quantizer.decode(expected)), reference)


@torch.no_grad()
@pytest.mark.parametrize("name, frames", [("small", 60), ("odd", 60), ("released", 30)])
def test_streaming_is_the_whole(pair, device, name, frames):
    """In uneven chunks, far past the context of the small ones: the same codes and the same wave."""
    ours, official = pair(name, device)
    pcm = sound(2, frames, ours)
    z, expected = official.encode_to_latent(pcm, quantize=False), official.encode(pcm)
    state = init_state(ours, 2)
    same_codes(streamed(ours.encode, pcm, state, ours.frame_size), expected, official, z)
    reference = official.decode(expected)
    close(streamed(ours.decode, expected, state), reference)  # one state serves both directions
    state = init_state(ours, 2)
    close(streamed(lambda x, s: ours.to_latent(x, s), pcm, state, ours.frame_size), z)


@torch.no_grad()
def test_released_size_past_its_context(pair, device):
    """14 s by the frame, where the released window holds 10."""
    ours, official = pair("released", device)
    pcm = sound(1, 175, ours)
    z, expected = official.encode_to_latent(pcm, quantize=False), official.encode(pcm)
    state = init_state(ours, 1)
    codes = torch.cat([ours.encode(frame, state) for frame in pcm.split(ours.frame_size, -1)], -1)
    same_codes(codes, expected, official, z)
    wave = torch.cat([ours.decode(frame, state) for frame in expected.split(1, -1)], -1)
    close(wave, official.decode(expected))


@torch.no_grad()
@pytest.mark.parametrize("name", MIMI)
def test_official_streaming_in_its_first_window(pair, device, name):
    """Frame by frame beside the official streaming, until its ring loses a key at frame context / 2."""
    ours, official = pair(name, device)
    frames = min(ours.config.context // ours.config.stride, 12)
    pcm = sound(2, frames, ours)
    z = official.encode_to_latent(pcm, quantize=False)
    state = init_state(ours, 2)
    with official.streaming(2):
        expected = torch.cat([official.encode(frame) for frame in pcm.split(ours.frame_size, -1)], -1)
        reference = torch.cat([official.decode(frame) for frame in expected.split(1, -1)], -1)
    codes = torch.cat([ours.encode(frame, state) for frame in pcm.split(ours.frame_size, -1)], -1)
    same_codes(codes, expected, official, z)
    close(torch.cat([ours.decode(frame, state) for frame in expected.split(1, -1)], -1), reference)


@torch.no_grad()
def test_rows_of_a_batch_are_independent(pair, device):
    """Each recording alone gives what it gives in a batch, whole and streamed."""
    ours, official = pair("small", device)
    pcm = torch.cat([sound(1, 20, ours, seed) * (seed + 1) for seed in range(3)])
    together = ours.encode(pcm)
    by_chunk = streamed(ours.encode, pcm, init_state(ours, 3), ours.frame_size)
    waves = streamed(ours.decode, together, init_state(ours, 3))
    for row in range(3):
        alone = pcm[row : row + 1]
        z = official.encode_to_latent(alone, quantize=False)
        codes = ours.encode(alone)
        same_codes(together[row : row + 1], codes, official, z)
        same_codes(by_chunk[row : row + 1], codes, official, z)
        close(waves[row : row + 1], ours.decode(together[row : row + 1]))


@torch.no_grad()
def test_memory_is_updated_in_place(pair, device):
    """A captured graph replays on the same tensors, so no step may put new ones into the state."""
    ours, _ = pair("small", device)
    state = init_state(ours, 2)
    before = {
        (id(m), name): tensor.data_ptr() for m, memory in state.items() for name, tensor in memory.items()
    }
    codes = ours.encode(sound(2, 3, ours), state)
    ours.decode(codes, state)
    after = {
        (id(m), name): tensor.data_ptr() for m, memory in state.items() for name, tensor in memory.items()
    }
    assert before == after and len(before) > 20


def test_encode_and_decode_keep_no_graph(pair, device):
    """encode and decode run without gradients; to_latent and from_latent with them."""
    ours, _ = pair("small", device)
    pcm = sound(1, 3, ours).requires_grad_()
    assert not ours.decode(ours.encode(pcm)).requires_grad
    assert ours.to_latent(pcm).requires_grad and ours.from_latent(ours.to_latent(pcm)).requires_grad


def test_streaming_with_gradients_is_refused():
    ours = Mimi(MimiConfig.from_dict(MIMI["small"]))
    for call, x in (
        (ours.to_latent, torch.zeros(1, 1, ours.frame_size)),
        (ours.from_latent, torch.zeros(1, ours.config.dimension, 1)),
    ):
        with pytest.raises(ValueError, match="no_grad"):
            call(x, init_state(ours, 1))


def test_gradients(pair, device, tmp_path):
    """The gradients of a loss on latent and wave, of the sound and of every parameter that takes part."""
    ours, official = (copy.deepcopy(model).requires_grad_() for model in pair("small", device))
    pcm = [sound(2, 12, ours).requires_grad_() for _ in range(2)]
    direction = noise(2, ours.config.dimension, 12, device=device)
    z = ours.to_latent(pcm[0])
    ((z * direction).sum() + ours.from_latent(z).pow(2).sum()).backward()
    z = official.encode_to_latent(pcm[1], quantize=False)
    wave = official.decoder(official.decoder_transformer(official.upsample(z))[0])
    ((z * direction).sum() + wave.pow(2).sum()).backward()
    close(pcm[0].grad, pcm[1].grad, 1e-4)
    mine = official_tensors(
        ours,
        save_mimi,
        tmp_path / "gradients.safetensors",
        lambda p: torch.zeros_like(p) if p.grad is None else p.grad,
    )
    for name, parameter in official.named_parameters():
        if parameter.grad is None:
            assert "quantizer" in name and not mine[name].any()
        else:
            assert error(mine[name], parameter.grad) < 1e-4, name


def test_default_config_is_the_released_one():
    """MimiConfig() is what the official package builds when it is given no config."""
    assert MimiConfig() == MimiConfig.from_dict(loaders._mimi_config)
    mimi = Mimi(MimiConfig(num_layers=1, n_q=2))
    assert (mimi.sample_rate, mimi.frame_rate, mimi.frame_size) == (24000, 12.5, 1920)


def test_wrong_inputs(pair):
    """Shapes that cannot be meant are refused in one sentence."""
    ours, _ = pair("small")
    frame = ours.frame_size
    for call, said in (
        (lambda: ours.encode(torch.zeros(2, 480)), r"sound as .*not \[2, 480\]"),
        (lambda: ours.encode(torch.zeros(1, 2, 480)), r"sound as .*not \[1, 2, 480\]"),
        (lambda: ours.encode(torch.zeros(1, 1, 0)), r"sound as .*not \[1, 1, 0\]"),
        (lambda: ours.decode(torch.zeros(6, 5, dtype=torch.long)), r"codes as .*not \[6, 5\]"),
        (lambda: ours.decode(torch.zeros(1, 7, 5, dtype=torch.long)), r"codes as .*not \[1, 7, 5\]"),
        (
            lambda: ours.encode(torch.zeros(1, 1, frame + 1), init_state(ours, 1)),
            f"frames of {frame} samples, not {frame + 1}",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call()


# ---- files -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("old", [False, True])
def test_older_and_newer_names(tmp_path, old):
    """A file with the released names, or with those the package writes now."""
    official = official_mimi(MIMI["small"], seed=5)
    path = save(official, tmp_path / "mimi.safetensors", old)
    assert any("in_proj_weight" in name for name in load_file(path)) == old
    ours = load_mimi(path, MimiConfig.from_dict(MIMI["small"]), 4)
    official.set_num_codebooks(4)
    pcm = sound(1, 6, ours)
    same_codes(
        ours.encode(pcm), official.encode(pcm), official, official.encode_to_latent(pcm, quantize=False)
    )
    assert not ours.training and all(p.dtype == torch.float32 for p in ours.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "odd"])
def test_round_trip_through_the_official_package(pair, tmp_path, name):
    """What save_mimi writes the official package loads, key for key, and gives the same sound and codes."""
    ours, official = pair(name)
    save_mimi(ours, tmp_path / "ours.safetensors")
    assert load_file(tmp_path / "ours.safetensors").keys() == official.state_dict().keys(), "the newer names"
    again = loaders.get_mimi(
        tmp_path / "ours.safetensors", MIMI[name], num_codebooks=official.total_codebooks
    )
    for key, tensor in official.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    pcm = sound(1, 9, ours)
    assert torch.equal(again.encode(pcm), official.encode(pcm))
    assert torch.equal(again.decode(again.encode(pcm)), official.decode(official.encode(pcm)))


def test_new_mimi_is_saved_whole(tmp_path):
    """A model that never came from a file, and whose codebooks are new, works in the official package."""
    torch.manual_seed(3)
    ours = Mimi(MimiConfig.from_dict(MIMI["small"])).eval()
    save_mimi(ours, tmp_path / "new.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode, (
        "who may read it"
    )
    official = loaders.get_mimi(tmp_path / "new.safetensors", MIMI["small"], num_codebooks=6)
    pcm = sound(1, 9, ours)
    with torch.no_grad():
        z = official.encode_to_latent(pcm, quantize=False)
        close(ours.to_latent(pcm), z)
        same_codes(ours.encode(pcm), official.encode(pcm), official, z)
        close(ours.decode(official.encode(pcm)), official.decode(official.encode(pcm)))


def test_new_updates_are_small():
    """LayerScale starts where the official one does."""
    official = dict(loaders.get_mimi(None, MIMI["odd"], num_codebooks=3).named_parameters())
    ours = Mimi(MimiConfig.from_dict(MIMI["odd"])).decoder_transformer.layers[1]
    for number, scale in enumerate((ours.scale1, ours.scale2), 1):
        name = f"decoder_transformer.transformer.layers.1.layer_scale_{number}.scale"
        assert torch.equal(scale, official[name])


def test_broken_files(tmp_path):
    """A missing, an extra, a misshapen tensor: an error that names it. A pickle, half a file: an error."""
    config = MimiConfig.from_dict(MIMI["small"])
    state = {name: t.clone() for name, t in official_mimi(MIMI["small"]).state_dict().items()}
    path = tmp_path / "broken.safetensors"

    def refused(tensors, *words, error=ValueError):
        if tensors is not None:
            save_file(tensors, path)
        with pytest.raises(error) as caught:
            load_mimi(path, config)
        for word in words:
            assert word in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)

    for source in (state, old_names(state)):
        for name in (
            "downsample.conv.conv.conv.weight",
            "decoder.model.2.convtr.convtr.bias",
            next(n for n in source if "self_attn" in n),
            "quantizer.rvq_rest.vq.layers.3._codebook.cluster_usage",
        ):
            refused(
                {key: t for key, t in source.items() if key != name},
                name.split(".in_proj")[0].split(".out_proj")[0],
            )
            refused({**source, name: source[name][:-1].clone()}, name)
            for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, FLOAT8):
                refused({**source, name: source[name].to(dtype)}, name, "dtype")
        refused({**source, "encoder.model.99.weight": torch.zeros(3)}, "encoder.model.99.weight")
    path.write_bytes(pickle.dumps({"model": [1.0]}))
    refused(None, "broken.safetensors", "SafeTensors")
    torch.save({"model": state}, path)
    refused(None, "broken.safetensors", "SafeTensors")
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(None, "broken.safetensors", "SafeTensors")
    path.unlink()
    refused(None, "broken.safetensors", error=FileNotFoundError)
    path.mkdir()
    refused(None, "broken.safetensors", error=IsADirectoryError)


@torch.no_grad()
def test_missing_keys_have_the_official_defaults(tmp_path):
    """A config without a key means the official constructor's default for it."""
    config = copy.deepcopy(MIMI["small"])
    for section, key in (
        ("seanet", "kernel_size"),
        ("seanet", "last_kernel_size"),
        ("seanet", "norm"),
        ("quantizer", "bins"),
        ("quantizer", "n_q"),
        ("quantizer", "dimension"),
        ("transformer", "max_period"),
        ("transformer", "dim_feedforward"),
        ("transformer", "norm"),
    ):
        del config[section][key]
    config["seanet"]["n_filters"] = 2
    official = loaders.get_mimi(None, config)
    config["quantizer"]["n_q"] = 8
    official = official_mimi(config)
    del config["quantizer"]["n_q"]
    ours = load_mimi(
        save(official, tmp_path / "m.safetensors"), MimiConfig.from_dict(json.loads(json.dumps(config)))
    )
    pcm = sound(1, 7, ours)
    close(ours.to_latent(pcm), official.encode_to_latent(pcm, quantize=False))
    close(ours.decode(official.encode(pcm)), official.decode(official.encode(pcm)))


@pytest.mark.parametrize(
    "section, key, value",
    [
        (None, "sample_rate", 0),
        (None, "frame_rate", 13.0),
        (None, "channels", 2),
        (None, "surprise", 1),
        (None, "sample_rate", "24k"),
        ("seanet", "ratios", [5, 3]),
        ("seanet", "ratios", [4, 0, 2]),
        ("seanet", "ratios", 24),
        ("seanet", "ratios", []),
        ("seanet", "n_filters", 2**20),
        ("transformer", "max_period", 1e300),
        ("quantizer", "n_q", 10**30),
        ("seanet", "norm", "weight_norm"),
        ("seanet", "pad_mode", "reflect"),
        ("seanet", "causal", False),
        ("seanet", "surprise", 1),
        ("seanet", "dimension", 31),
        ("seanet", "n_residual_layers", 3),
        ("seanet", "kernel_size", -1),
        ("quantizer", "n_q", 1),
        ("quantizer", "bins", 0),
        ("quantizer", "n_q_semantic", 2),
        ("quantizer", "surprise", 1),
        ("quantizer", "input_dimension", 64),
        ("transformer", "num_heads", 5),
        ("transformer", "context", None),
        ("transformer", "context", 2.5),
        ("transformer", "gating", "silu"),
        ("transformer", "norm", "rms_norm"),
        ("transformer", "positional_embedding", "sin"),
        ("transformer", "surprise", 1),
        ("transformer", "num_layers", True),
        ("surprise", "key", 1),
    ],
)
def test_wrong_configs(section, key, value):
    """An unknown key or an impossible value is an error that names it."""
    config = copy.deepcopy(MIMI["small"])
    (config if section is None else config.setdefault(section, {}))[key] = value
    with pytest.raises(ValueError) as caught:
        MimiConfig.from_dict(config)
    message = str(caught.value)
    ours = {
        "n_q": "codebook",
        "num_heads": "heads",
        "dimension": "dim",
        "sample_rate": "frame_rate",
        "ratios": "ratio",
        "bins": "bins",
        "key": "surprise",
        "n_filters": "filters",
        "input_dimension": "dim",
    }
    assert key in message or ours.get(key, key) in message, message


@pytest.mark.parametrize(
    "config, said",
    [({"seanet": 3}, "JSON objects"), ({"transformer": None}, "JSON objects"), ({}, "sample_rate")],
)
def test_configs_that_are_none(config, said):
    """What is not a config at all."""
    with pytest.raises(ValueError, match=said):
        MimiConfig.from_dict(config)


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "odd", "released"])
def test_json_of_a_config(pair, tmp_path, name):
    """to_dict() is read by from_dict, and the official package opens a file with it: codes and sound are as
    with the JSON that was written by hand."""
    config = MimiConfig.from_dict(MIMI[name])
    written = json.loads(json.dumps(config.to_dict()))
    assert MimiConfig.from_dict(written) == config
    ours, official = pair(name)
    path = save(official, tmp_path / "mimi.safetensors")
    again = loaders.get_mimi(path, written, num_codebooks=official.total_codebooks)
    assert again.frame_size == official.frame_size and again.sample_rate == official.sample_rate
    pcm = sound(1, min(30, 3 * config.context // config.stride), ours)
    codes = official.encode(pcm)
    assert torch.equal(again.encode(pcm), codes)
    assert torch.equal(again.decode(codes), official.decode(codes))


def test_keys_that_may_be_said():
    """Other JSON of the official package has two keys more, which can have only one value here."""
    config = copy.deepcopy(MIMI["odd"])
    config["seanet"]["activation_params"] = {"alpha": 1.0}
    config["quantizer"]["n_q_semantic"] = 1
    assert MimiConfig.from_dict(config) == MimiConfig.from_dict(MIMI["odd"])
