"""tools/convert.py on Hugging Face's folders: random Hugging Face models of odd sizes, saved, converted and
compared.

What is compared, in order: the codec, the logits of both transformers, generation. The official package also
loads each result, since the format is its own. Hugging Face's `forward` neither delays nor shifts, so the raw
halves `Moshi.temporal` and `Moshi.depth` are its counterparts; its depth decoder is causal under sdpa only.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import convert
import hugging_face
import pytest
import reference
import torch
from conftest import until_it_hears_signals
from reference import LMGen, close, loaders, same_codes
from safetensors.torch import load_file, save_file

from mimi_min import MimiConfig, load_mimi
from moshi_min import (
    MIMI_FILE,
    MOSHI_FILE,
    TOKENIZER_FILE,
    MoshiGen,
    gated_width,
    load_checkpoint,
    load_moshi,
)

transformers = reference.require("transformers")
ROOT = Path(__file__).resolve().parent.parent

# A codec with 10 positions of context (5 frames), so that a second of sound is far past it.
CODEC = dict(
    hidden_size=24,
    num_filters=6,
    upsampling_ratios=[5, 2],
    kernel_size=5,
    last_kernel_size=5,
    residual_kernel_size=3,
    codebook_size=32,
    codebook_dim=10,
    vector_quantization_hidden_dimension=10,
    num_quantizers=5,
    upsample_groups=24,
    num_hidden_layers=2,
    intermediate_size=40,
    num_attention_heads=3,
    num_key_value_heads=3,
    sliding_window=10,
    sampling_rate=480,
    rope_parameters={"rope_type": "default", "rope_theta": 700.0},
)
MODELS = {
    # Grouped queries in both transformers, an odd number of hidden units, a rotary period of its own.
    "grouped": dict(
        vocab_size=45,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        ffn_dim=2 * 53,
        num_codebooks=3,
        sliding_window=70,
        max_position_embeddings=100,
        audio_encoder_config=CODEC,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        depth_decoder_config=dict(
            hidden_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            ffn_dim=2 * 29,
            max_position_embeddings=4,
            sliding_window=3,
        ),
    ),
    # No groups. Hidden units as the official rule gives at 4 * dim; 8 / 3 of the width in the depth decoder.
    "plain": dict(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=2 * 84,
        num_codebooks=4,
        sliding_window=80,
        max_position_embeddings=100,
        audio_encoder_config=CODEC,
        depth_decoder_config=dict(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=3,
            ffn_dim=2 * 64,
            max_position_embeddings=5,
            sliding_window=4,
        ),
    ),
}


@torch.no_grad()
def randomise(model, seed):
    """Every parameter and buffer of a Hugging Face model gets a value that shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        uniform, normal = (
            torch.rand(tensor.shape, generator=generator),
            torch.randn(tensor.shape, generator=generator),
        )
        if "inv_freq" in name or not tensor.is_floating_point():
            continue
        if name.endswith("initialized"):
            tensor.fill_(1)
        elif name.endswith("cluster_usage"):
            tensor.copy_(uniform * 2 + 0.3)
        elif name.endswith("embed_sum"):
            tensor.copy_(normal * 0.4)
        elif "layer_scale" in name or "norm" in name and name.endswith("weight"):
            tensor.copy_(uniform * 0.8 + 0.4)
        elif name.endswith("bias"):
            tensor.copy_(normal * 0.1)
        elif "embed_tokens" in name:
            tensor.copy_(normal * 0.5)
        else:  # the depth decoder's are stacked: [codebook, out, in]
            fan_in = tensor.shape[-1] if tensor.dim() == 2 or "depth" in name else tensor[0].numel()
            tensor.copy_(
                normal * (2.5 if "lm_head" in name else 1.3 if "conv" in name else 1.0) / math.sqrt(fan_in)
            )
    return model.eval().requires_grad_(False)


def hf_moshi(name):
    """A random MoshiForConditionalGeneration; sdpa, since its depth decoder is not causal otherwise."""
    config = transformers.MoshiConfig(**MODELS[name], attn_implementation="sdpa")
    torch.manual_seed(0)
    return randomise(transformers.MoshiForConditionalGeneration(config), seed=len(name))


def run_tool(folder, out, cwd=None):
    """The tool as its user runs it: (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert.py"), str(folder), str(out)],
        capture_output=True,
        cwd=cwd,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(Hugging Face model, our checkpoint, its folder), one model saved in one file and one in shards."""
    folder = tmp_path_factory.mktemp(request.param)
    model = hf_moshi(request.param)
    model.save_pretrained(folder / "hf", max_shard_size="60KB" if request.param == "grouped" else "5GB")
    assert (folder / "hf" / "model.safetensors").exists() == (request.param == "plain"), (
        "both ways must be tried"
    )
    said = convert.convert(folder / "hf", folder / "out")
    assert said.endswith(TOKENIZER_FILE)
    return model, load_checkpoint(folder / "out", dtype=torch.float32), folder


def tokens(config, frames, batch=2, seed=5):
    """Random tokens [B, 1 + n_q, F] of all streams, the initial ones among them."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.text_card + 1, (batch, 1, frames), generator=generator)
    return torch.cat(
        [text, torch.randint(config.card + 1, (batch, config.n_q, frames), generator=generator)], dim=1
    )


# ------------------------------------------------------------------------------------------------------ codec


def sound(mimi, frames):
    """Loud noise of whole frames: Hugging Face pads layer by layer, so its last partial frame may differ."""
    return torch.randn(2, 1, frames * mimi.frame_size, generator=torch.Generator().manual_seed(3)) * 0.5


def official_mimi(folder):
    """The official package's Mimi on the files that came out, with all codebooks."""
    config = json.loads((folder / "mimi_config.json").read_text())
    return loaders.get_mimi(folder / MIMI_FILE, config, num_codebooks=config["quantizer"]["n_q"])


def compare_codec(theirs, ours, official):
    """Codes equal but for ties, sound equal, over four times the context."""
    pcm = sound(ours, 20)
    in_use, ours.num_codebooks = ours.num_codebooks, ours.config.n_q
    codes = theirs.encode(pcm, num_quantizers=ours.config.n_q).audio_codes
    assert codes.unique().numel() > 16, "the codes show nothing"
    same_codes(ours.encode(pcm), codes, official, official.encode_to_latent(pcm, quantize=False))
    ours.num_codebooks = in_use  # the model's other tests share it
    wave = theirs.decode(codes).audio_values
    close(ours.decode(codes), wave)
    close(official.decode(codes), wave)


def test_codec(pair):
    model, checkpoint, folder = pair
    compare_codec(model.audio_encoder, checkpoint.mimi, official_mimi(folder / "out"))


def test_codec_alone(tmp_path):
    """A MimiModel folder gives the codec's two files and no more."""
    torch.manual_seed(0)
    model = randomise(transformers.MimiModel(transformers.MimiConfig(**CODEC)), seed=9)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "out").mkdir()  # an empty folder is welcome
    code, out, err = run_tool(tmp_path / "hf", tmp_path / "out")
    assert (code, err) == (0, "") and "to be put" not in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [MIMI_FILE, "mimi_config.json"]
    )
    config = MimiConfig.from_dict(json.loads((tmp_path / "out" / "mimi_config.json").read_text()))
    assert (config.ratios, config.context, config.max_period, config.n_q) == (
        (5, 2),
        10,
        700.0,
        5,
    )
    compare_codec(model, load_mimi(tmp_path / "out" / MIMI_FILE, config, 5), official_mimi(tmp_path / "out"))


def test_released_codec_config():
    """Hugging Face's defaults are the released Mimi's; older files name the keys otherwise or lack them."""
    expected = loaders._mimi_config
    for given in (transformers.MimiConfig().to_dict(), {}, {"frame_rate": 12.5, "rope_theta": 10000.0}):
        ours = hugging_face.mimi_config(given, "x")
        assert ours == MimiConfig() == MimiConfig.from_dict(expected)
        assert ours.to_dict() == expected


def test_released_language_model_config():
    """The same for the language model: the defaults are the 7B's."""
    for given, depth in (
        (
            transformers.MoshiConfig(
                audio_encoder_config={"model_type": "mimi"}, depth_decoder_config={}
            ).to_dict(),
            transformers.MoshiDepthConfig().to_dict(),
        ),
        ({}, {}),
    ):
        config = hugging_face.moshi_config(given, depth, "x")
        assert config == hugging_face.MoshiConfig() == hugging_face.MoshiConfig.from_dict(config.to_dict())
        assert (config.hidden_scale, config.depformer_dim_feedforward) == (4.125, 4224)


def test_sizes(pair):
    """What no logits inside the window would show: each size comes from its own key."""
    model, checkpoint, _ = pair
    theirs, config = model.config, checkpoint.moshi.config
    assert config.context == theirs.sliding_window != theirs.max_position_embeddings
    assert config.max_period == theirs.rope_parameters["rope_theta"]
    assert config.delays == (0, *2 * (0, *[1] * (config.dep_q - 1))) and config.n_q == 2 * config.dep_q
    assert checkpoint.mimi.config.context == theirs.audio_encoder_config.sliding_window


def test_feedforward_width():
    """Every width that comes out gives the hidden units that went in."""
    for dim in range(4, 80, 2):
        for hidden in range(dim, 3 * dim + 3):
            try:
                width = hugging_face.official_width(dim, {"ffn_dim": 2 * hidden}, "ffn_dim", 0, "x")
            except ValueError:
                assert all(gated_width(dim, width) != hidden for width in range(5 * dim + 9))
                continue
            assert gated_width(dim, width) == hidden
    with pytest.raises(ValueError, match="ffn_dim of 170"):
        hugging_face.official_width(32, {"ffn_dim": 170}, "ffn_dim", 0, "x")


# ----------------------------------------------------------------------------------------------------- logits


def test_text_logits(pair):
    """Helium on all streams, with the grouped queries and the rotary order."""
    model, checkpoint, _ = pair
    codes, K = tokens(checkpoint.moshi.config, 40), model.num_codebooks
    theirs = model(
        input_ids=codes[:, 0], moshi_audio_codes=codes[:, 1 : 1 + K], user_audio_codes=codes[:, 1 + K :]
    )
    with torch.no_grad():
        hidden, logits = checkpoint.moshi.temporal(codes)
    close(hidden, theirs.last_hidden_state.view_as(hidden))
    close(logits, theirs.logits)


def test_text_alone(pair):
    """Audio of -1 adds nothing: Helium is a text model."""
    model, checkpoint, _ = pair
    codes = tokens(checkpoint.moshi.config, 40)
    codes[:, 1:] = -1
    with torch.no_grad():
        close(checkpoint.moshi.temporal(codes)[1], model.decoder(input_ids=codes[:, 0]).logits)


def test_depth_logits(pair):
    """The depth decoder, teacher-forced: it reads the text token and all audio tokens but the last."""
    model, checkpoint, _ = pair
    config = checkpoint.moshi.config
    codes = tokens(config, 30)[:, : 1 + config.dep_q]
    hidden = torch.randn(2, 30, config.dim)
    rows = codes[:, : config.dep_q].transpose(1, 2).flatten(0, 1)  # [B * S, K]
    theirs = model.depth_decoder(last_hidden_state=hidden.view(-1, 1, config.dim), input_ids=rows).logits
    with torch.no_grad():
        close(checkpoint.moshi.depth(hidden, codes), theirs.view(2, 30, config.dep_q, -1).transpose(1, 2))


def test_depth_weights(pair):
    """Bit by bit, in their own order: without rotary, another order would give the same logits."""
    model, checkpoint, _ = pair
    for theirs, ours in zip(model.depth_decoder.layers, checkpoint.moshi.depth_decoder.layers, strict=True):
        attention = theirs.self_attn
        stacked = [part.linear.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert ours.in_proj.weight.equal(torch.cat(stacked, dim=1))


# ------------------------------------------------------------------------------------------------- generation


def silent_frame(mimi, batch=1):
    """What the user says when silent: one encoded frame of zeros, repeated in every step [B, K, 1]."""
    return mimi.encode(torch.zeros(1, 1, mimi.frame_size)).expand(batch, -1, -1)


def hf_generate(model, steps, **inputs):
    """Greedy text tokens [B, ...] and audio codes [B, K, ...] of Hugging Face."""
    made = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        depth_decoder_do_sample=False,
        return_audio_waveforms=False,
        return_audio_codes=True,
    )
    return made.sequences, made.audio_codes


def test_greedy_generation(pair):
    """No prompt, the user silent from step 0. N text tokens give N - 1 frames, as the acoustic codes wait."""
    model, checkpoint, folder = pair
    steps = 40
    text, audio = hf_generate(model, steps)
    blank = silent_frame(checkpoint.mimi)
    ours = MoshiGen(checkpoint.moshi, greedy=True)
    frames = [ours.step(blank) for _ in range(steps)]
    assert frames[0] is None
    ours = torch.cat(frames[1:], dim=-1)
    text = text[:, -steps:]
    assert text.unique().numel() > 5 and audio.unique().numel() > 10, "the model says always the same"
    assert ours[:, 0].equal(text[:, :-1]) and ours[:, 1:].equal(audio)

    config = json.loads((folder / "out" / "config.json").read_text())
    config = {key: value for key, value in config.items() if not re.search("_name|model_type", key)}
    official = loaders.get_moshi_lm(folder / "out" / MOSHI_FILE, config, dtype=torch.float32)
    generator = LMGen(official, use_sampling=False)
    with torch.no_grad(), generator.streaming(1):
        frames = [generator.step(blank) for _ in range(steps)]
    assert torch.cat(frames[1:], dim=-1).equal(ours)


def test_prefill(pair):
    """A history in Hugging Face's three inputs is our `prefill` of the same frames, aligned, none delayed.

    With F frames of history its positions are, p = 0 being the initial tokens it puts in front:
      text  t[p-1]    semantic codes  s[p-1]    acoustic codes  a[p-2] (at p = 1 the initial token)
    for Moshi and the user alike. Its first new text token is made at p = F, so it is the text of frame F.
    Then, at p = F + 1, acoustic codes are still those of frame F - 1: given, so it overwrites what it
    sampled, where we force them inside the loop; the semantic code came before them, so nothing differs. The
    user's semantic code at F + 1 is already the silent frame's. So: prefill(frames 0 .. F-1) returns frame
    F - 1, and a silent step follows each.
    """
    model, checkpoint, _ = pair
    config, K, F, steps = checkpoint.moshi.config, model.num_codebooks, 9, 25
    generator = torch.Generator().manual_seed(11)
    history = torch.cat(
        [
            torch.randint(config.text_card, (2, 1, F), generator=generator),
            torch.randint(config.card, (2, 2 * K, F), generator=generator),
        ],
        dim=1,
    )
    text, audio = hf_generate(
        model,
        steps,
        input_ids=history[:, 0],
        moshi_audio_codes=history[:, 1 : 1 + K],
        user_audio_codes=history[:, 1 + K :],
    )
    ours = MoshiGen(checkpoint.moshi, batch_size=2, greedy=True)
    first = ours.prefill(history)
    assert first.equal(history[:, : 1 + K, -1:]), "the last frame of the history comes back"
    blank = silent_frame(checkpoint.mimi, batch=2)
    frames = torch.cat([ours.step(blank) for _ in range(steps - 1)], dim=-1)
    # Its codes are the history's frames and steps - 1 new ones; its text has no place for the initial frame.
    assert audio.shape == (2, K, F + steps - 1) and audio[..., :F].equal(history[:, 1 : 1 + K])
    assert frames[:, 1:].equal(audio[..., F:])
    assert frames[:, 0].equal(text[:, -steps:-1])
    assert not frames[0].equal(frames[1]), "the history makes no difference"


# ------------------------------------------------------------------------------------------------------ files


def test_dtype_and_tokenizer(tmp_path):
    """bfloat16 stays bfloat16, bit by bit, float32 beside it too; a SentencePiece file goes along."""
    model = hf_moshi("plain")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"as it is")
    said = convert.convert(tmp_path / "hf", tmp_path / "a" / "b")
    assert "to be put" not in said
    out = tmp_path / "a" / "b"
    assert (out / TOKENIZER_FILE).read_bytes() == b"as it is"
    for name in (MOSHI_FILE, MIMI_FILE):
        assert {tensor.dtype for tensor in load_file(out / name).values()} == {torch.bfloat16}
    config = hugging_face.moshi_config(
        model.config.to_dict(), model.config.depth_decoder_config.to_dict(), "x"
    )
    moshi = load_moshi(out / MOSHI_FILE, config, dtype=None)
    assert moshi.text_emb.weight.equal(model.decoder.model.embed_tokens.weight)
    assert moshi.depth_decoder.output_proj.weight.equal(model.depth_decoder.lm_heads.weight)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"], "something temporary was left"


def change_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        place = content
        *parents, last = key.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


HEAD = "decoder.lm_head.weight"
BAD = {  # what is done to a good folder -> what the line says
    "no folder": (lambda f: f.rename(f.with_name("away")), "there is no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "model of no name": (lambda f: change_json(f / "config.json", model_type=[1]), "model_type [1]"),
    "other model": (lambda f: change_json(f / "config.json", model_type="llama"), "model_type 'llama'"),
    "other class": (
        lambda f: change_json(f / "config.json", architectures=["MoshiForCausalLM"]),
        "MoshiForCausalLM",
    ),
    "odd heads": (lambda f: change_json(f / "config.json", num_key_value_heads=5), "key and value heads"),
    "text size": (
        lambda f: change_json(f / "config.json", num_hidden_layers="two"),
        "num_layers cannot be 'two'",
    ),
    "activation": (lambda f: change_json(f / "config.json", hidden_act="relu"), "hidden_act is 'relu'"),
    "norm": (lambda f: change_json(f / "config.json", rms_norm_eps=1e-5), "rms_norm_eps is 1e-05"),
    "codec norm": (
        lambda f: change_json(f / "config.json", audio_encoder_config__norm_eps=1e-6),
        "norm_eps is 1e-06",
    ),
    "codec of two semantic codebooks": (
        lambda f: change_json(f / "config.json", audio_encoder_config__num_semantic_quantizers=2),
        "is 2, but only 1",
    ),
    "codec with groups": (
        lambda f: change_json(f / "config.json", audio_encoder_config__num_key_value_heads=1),
        "num_key_value_heads is 1, but only 3 is possible",
    ),
    "head_dim": (lambda f: change_json(f / "config.json", head_dim=99), "head_dim 99"),
    "scaled rope": (lambda f: change_json(f / "config.json", rope_parameters={"rope_type": "yarn"}), "yarn"),
    "codec option": (
        lambda f: change_json(f / "config.json", audio_encoder_config__pad_mode="reflect"),
        "pad_mode",
    ),
    "codec ratios": (
        lambda f: change_json(f / "config.json", audio_encoder_config__upsampling_ratios=[0]),
        "ratios",
    ),
    "codec rate": (
        lambda f: change_json(f / "config.json", audio_encoder_config__frame_rate=7),
        "frame_rate of 7",
    ),
    "depth feed-forward": (
        lambda f: change_json(f / "config.json", depth_decoder_config__ffn_dim=7),
        "ffn_dim of 7",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "not a whole SafeTensors file"),
    "tensor missing": (
        lambda f: change_tensors(f / "model.safetensors", lambda t: t.pop(HEAD)),
        f"{HEAD} is missing",
    ),
    "tensor unknown": (
        lambda f: change_tensors(f / "model.safetensors", lambda t: t.update(more=t[HEAD].clone())),
        "the tensor more is not known",
    ),
    "tensor misshapen": (
        lambda f: change_tensors(f / "model.safetensors", lambda t: t.update({HEAD: t[HEAD][1:]})),
        f"{HEAD} has the shape [39, 32] and the dtype float32, expected floats of the shape [40, 32]",
    ),
    "tensor of integers": (
        lambda f: change_tensors(f / "model.safetensors", lambda t: t.update({HEAD: t[HEAD].int()})),
        f"{HEAD} is of the kind I32, expected",
    ),
    "nan": (lambda f: change_json(f / "config.json", rope_theta=math.nan), "config.json"),
    "beyond floats": (lambda f: (f / "config.json").write_text('{"rope_theta": 1e999}'), "config.json"),
    "without a bottom": (lambda f: (f / "config.json").write_text('{"a":' * 10**5), "config.json"),
    "huge": (lambda f: change_json(f / "config.json", hidden_size=10**400), "dim cannot be"),
    "huge rate": (
        lambda f: change_json(f / "config.json", audio_encoder_config__sampling_rate=10**400),
        "sample_rate cannot be",
    ),
    "a million layers": (
        lambda f: change_json(f / "config.json", num_hidden_layers=10**6 // 2),
        "num_layers cannot be 500000",
    ),
    "far too many strides": (
        lambda f: change_json(f / "config.json", audio_encoder_config__upsampling_ratios=[1] * 70 + [5, 2]),
        "config.json",
    ),
    "weights are a pipe": (
        lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
        "neither model.safetensors",
    ),
    "config is a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "a pipe",
    ),
    "more layers": (lambda f: change_json(f / "config.json", num_hidden_layers=3), "decoder.model.layers.2."),
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "hf"
    hf_moshi("plain").save_pretrained(folder)
    return folder


def copy(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("what", BAD)
def test_bad_input(good_folder, tmp_path, what):
    """One plain sentence that names what is wrong, and nothing written."""
    folder = copy(good_folder, tmp_path / "hf")
    spoil, says = BAD[what]
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=re.escape(says)):
        convert.convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] in (["hf"], ["away"])


def test_bad_input_as_a_program(good_folder, tmp_path):
    """One line on stderr and exit code 2; a folder that holds something is left alone."""
    folder = copy(good_folder, tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    code, out, err = run_tool(folder, tmp_path / "out")
    assert code == 2 and out == "" and err.count("\n") == 1 and "not an empty folder" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (folder / "config.json").write_text("{")
    code, out, err = run_tool(folder, tmp_path / "new")
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_bad_shards(tmp_path):
    """A missing shard, an index without names, an index that points elsewhere."""
    folder = tmp_path / "hf"
    hf_moshi("plain").save_pretrained(folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    last = folder / sorted(shards.values())[-1]
    kept = last.read_bytes()
    last.unlink()
    with pytest.raises(ValueError, match=f"there is no file {last.name}"):
        convert.convert(folder, tmp_path / "out")
    last.write_bytes(kept)
    for wrong in (
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {HEAD: "../elsewhere.safetensors"}},
        {"weight_map": {HEAD: 3}},
    ):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="no weight_map"):
            convert.convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tensor_in_two_shards(good_folder, tmp_path):
    """Which of the two is meant, nobody can know."""
    folder = copy(good_folder, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({HEAD: tensors[HEAD]} if name[0] == "a" else tensors, folder / name)
    weight_map = dict.fromkeys(tensors, "b.safetensors") | {HEAD: "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"b.safetensors: the tensor {HEAD} is in another shard"):
        convert.convert(folder, tmp_path / "out")


def test_outputs_that_are_something_else(good_folder, tmp_path, monkeypatch):
    """A file, a link, the current folder: a plain line, and they stay as they are."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "nowhere").symlink_to("absent")
    monkeypatch.chdir(tmp_path / "empty")
    for out in ("../file", "../link", "../nowhere", ".", "../empty", "../file/out"):
        code, said, err = run_tool(good_folder, out, cwd=tmp_path / "empty")
        assert code == 2 and not said and err.count("\n") == 1 and "Errno" not in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link", "nowhere"]
    assert not list((tmp_path / "empty").iterdir())


def test_a_mark_and_a_long_key(good_folder, tmp_path):
    """A byte order mark is no harm; what a file says is cut short and shown without control characters."""
    folder = copy(good_folder, tmp_path / "hf")
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run_tool(folder, tmp_path / "out")[0] == 0
    path.write_text(
        json.dumps({**json.loads(path.read_text("utf-8-sig")), "model_type": "\x1b[31m" + "x" * 9999})
    )
    code, _, err = run_tool(folder, tmp_path / "more")
    assert code == 2 and err.strip().isprintable() and len(err) < 600


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", [0, 0.5, 2.5])
def test_signals(good_folder, tmp_path, ending, wait):
    """While it imports or writes: nothing is left but what is whole, and no traceback."""
    command = [sys.executable, ROOT / "tools" / "convert.py", good_folder, tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        until_it_hears_signals(process.pid)
        time.sleep(wait)
        process.send_signal(ending)
        assert process.wait(120) in (0, 128 + ending) and process.stderr.read() == b""
    left = [path.name for path in tmp_path.iterdir()]
    assert left in ([], ["out"]) and (not left or len(list((tmp_path / "out").iterdir())) == 4)


def test_a_signal_that_becomes_another_error(monkeypatch, capsys):
    """Code in C may raise an error of its own when it is interrupted: it is the signal's, no problem."""

    def interrupted(**_):
        convert.signals.append(signal.SIGTERM)
        raise ValueError("could not import")

    monkeypatch.setattr(convert, "signals", [])
    monkeypatch.setattr(convert, "convert", interrupted)
    monkeypatch.setattr(sys, "argv", ["convert.py", "a", "b"])
    assert convert.main() == 128 + signal.SIGTERM and capsys.readouterr() == ("", "")


def test_disk_full(good_folder, tmp_path, monkeypatch):
    """When writing fails midway, or someone presses Ctrl-C, nothing is left behind."""

    def write(error, path, *_):
        path.write_bytes(b"half")
        raise error

    for error in (OSError("no space left"), KeyboardInterrupt()):
        monkeypatch.setattr(convert, "write", partial(write, error))
        with pytest.raises(type(error)):
            convert.convert(good_folder, tmp_path / "out")
        assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- Helium alone

HELIUM = dict(
    vocab_size=45,
    hidden_size=48,
    intermediate_size=53,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=90,
    rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    bos_token_id=7,
    eos_token_id=2,
    pad_token_id=3,
)


@pytest.fixture(scope="module")
def helium(tmp_path_factory):
    """(a random HeliumForCausalLM, what came out of its shards)."""
    folder = tmp_path_factory.mktemp("helium")
    model = randomise(transformers.HeliumForCausalLM(transformers.HeliumConfig(**HELIUM)), seed=4)
    model.save_pretrained(folder / "hf", max_shard_size="60KB")
    assert not (folder / "hf" / "model.safetensors").exists()
    assert convert.convert(folder / "hf", folder / "out").endswith(TOKENIZER_FILE)
    return model, load_checkpoint(folder / "out", dtype=torch.float32)


def test_helium_logits(helium):
    """A text model: no codec, no depth decoder, and neighbours rotate already in Hugging Face's file."""
    model, checkpoint = helium
    assert checkpoint.mimi is None and checkpoint.moshi.depth_decoder is None
    config = checkpoint.moshi.config
    assert (config.context, config.max_period, config.n_q, config.kv_repeat) == (90, 300.0, 0, 3)
    text = torch.randint(45, (2, 60))
    with torch.no_grad():
        theirs = model(input_ids=text, output_hidden_states=True)
        hidden, logits = checkpoint.moshi.temporal(text[:, None])
    close(hidden, theirs.hidden_states[-1])
    close(logits, theirs.logits)


def test_helium_goes_on(helium):
    """Our stream starts with Helium's first token: both go on from a prompt with the same tokens."""
    model, checkpoint = helium
    said = torch.randint(8, 45, (2, 9))
    first = torch.full((2, 1), HELIUM["bos_token_id"])
    theirs = model.generate(
        input_ids=torch.cat([first, said], 1), max_new_tokens=70, do_sample=False, eos_token_id=None
    )
    gen = MoshiGen(checkpoint.moshi, batch_size=2, greedy=True)
    nothing = torch.empty(2, 0, 1, dtype=torch.long)
    mine = torch.cat([gen.prefill(said[:, None]), *(gen.step(nothing) for _ in range(69))], -1)[:, 0]
    assert mine.equal(theirs[:, -70:]) and len(mine.unique()) > 5


def test_released_helium_config():
    """Hugging Face's defaults are those of Helium 2B; older files name the period otherwise."""
    for given in (transformers.HeliumConfig().to_dict(), {}, {"rope_theta": 100000.0}):
        config = hugging_face.helium_config(given, "x")
        assert (config.dim, config.num_layers, config.text_card, config.context) == (2560, 24, 48000, 4096)
        assert (config.hidden_scale, config.max_period, config.delays) == (4.125, 100000.0, (0,))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"bos_token_id": 45}, "bos_token_id 45"),
        ({"bos_token_id": None}, "bos_token_id None"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"intermediate_size": 0}, "intermediate_size of 0"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        ({"vocab_size": 44}, "expected floats of the shape [44, 48]"),
        ({"head_dim": 4}, "head_dim 4"),
    ],
)
def test_bad_helium(tmp_path, change, says):
    model = transformers.HeliumForCausalLM(transformers.HeliumConfig(**HELIUM))
    model.save_pretrained(tmp_path / "hf")
    change_json(tmp_path / "hf" / "config.json", **change)
    with pytest.raises(ValueError, match=re.escape(says)):
        convert.convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
