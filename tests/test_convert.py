"""tools/convert.py on relatives in the official format: LoRA, int8, Hibiki, PersonaPlex.

Small random models are written as their authors write them, converted, opened and compared with the official package:
weights bit by bit where nothing is computed, else token for token. Hugging Face's: test_convert_hf.py.
"""

import json
import re

import convert
import pytest
import relatives
import torch
from family import (
    HIBIKI,
    LORA,
    PERSONAPLEX,
    PersonaPlexGen,
    adapters,
    conditions,
    hibiki_lm,
    old_adapters,
    old_int8,
    personaplex_lm,
    state_of,
    write_folder,
)
from reference import LM, LMGen, close, lm_config, loaders, official_lm
from safetensors.torch import load_file, save_file
from test_moshi import both_speak, same_tokens, speak, user_codes

from moshi_min import MOSHI_FILE, MoshiConfig, MoshiGen, load_moshi


def opened(out, dtype=torch.float32):
    """Our model from a folder that came out."""
    config = json.loads((out / "config.json").read_text())
    return load_moshi(out / MOSHI_FILE, MoshiConfig.from_dict(config), dtype=dtype)


def same_as_official(out, official, config, steps=80, batch=2, **options):
    """Greedy and sampled, far past the window, our sampler and the official one say the same."""
    for greedy in (True, False):
        user = user_codes(config, batch, steps)
        mine, theirs = both_speak(opened(out), official, user, greedy=greedy, **options)
        tokens = same_tokens(mine, theirs, config["delays"])
        assert all(len(stream.unique()) > 3 for stream in tokens.transpose(0, 1)), "it says hardly anything"


# ---- LoRA --------------------------------------------------------------------------------------------------

TABLES = (
    "emb.0.weight",
    "emb.4.weight",
    "text_emb.weight",
    "depformer_emb.1.weight",
    "depformer_text_emb.weight",
)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "older names"])
def lora(request, tmp_path_factory):
    """(the official model with its adapters merged, the folder that came out, its dtype)."""
    folder, old = tmp_path_factory.mktemp("lora"), request.param == "older names"
    dtype = torch.bfloat16 if request.param == "bfloat16" else torch.float32
    base = official_lm(LORA, seed=3, dtype=dtype)
    write_folder(folder / "base", {**LORA, "lora": False}, state_of(base, old))
    (folder / "base" / "tokenizer_spm_32k_3.model").write_bytes(b"words")
    changes = adapters(base, rank=5, scale=0.2, seed=4, tables=() if old else TABLES)
    said = {"lora": True, "lora_rank": 5, "lora_scaling": 1.7}
    trained = folder / "checkpoints" / "checkpoint_000100" / "consolidated"
    write_folder(trained, {**LORA, **said}, old_adapters(changes) if old else changes, "lora.safetensors")
    official = loaders.get_moshi_lm(
        folder / "base" / "model.safetensors",
        {**LORA, **said},
        dtype=dtype,
        lora_weights=trained / "lora.safetensors",
        fuse_lora=True,
    )
    convert.convert(trained, folder / "out", base=folder / "base")
    return official.eval().requires_grad_(False), folder / "out", dtype


def test_lora_weights(lora):
    """Every tensor is bit by bit that of the official model, its adapters fused."""
    official, out, dtype = lora
    made = load_file(out / MOSHI_FILE)
    theirs = official.state_dict()
    assert made.keys() == theirs.keys()
    assert all(made[name].dtype == dtype and made[name].equal(theirs[name]) for name in made)
    config = json.loads((out / "config.json").read_text())
    assert config["lora"] is False and not {"lora_rank", "lora_scaling"} & config.keys()
    assert (out / config["tokenizer_name"]).read_bytes() == b"words"


def test_lora_tokens(lora):
    official, out, dtype = lora
    if dtype == torch.float32:
        same_as_official(out, official, LORA)


def test_merged_by_moshi_finetune(tmp_path):
    """A whole model that it saved, whose config.json still speaks of adapters."""
    official = official_lm(LORA, seed=5)
    said = {**LORA, "lora": True, "lora_rank": 5, "lora_scaling": 2.0}
    write_folder(tmp_path / "trained", said, state_of(official, False), "consolidated.safetensors")
    assert "to be put there" in convert.convert(tmp_path / "trained", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lora"] is False
    same_as_official(tmp_path / "out", official, LORA, steps=30)


# ---- int8 --------------------------------------------------------------------------------------------------

INT8 = {
    "small": LM["small"],
    "gqa": lm_config(dim=48, num_heads=6, kv_repeat=3, depformer_num_heads=6, depformer_kv_repeat=2),
}


def official_int8(official):
    """The tensors of the official QLinear, by its formula: (those of an int8 file, the weights that they mean)."""
    stored, meant = {}, {}
    linear = {
        f"{name}.weight" for name, part in official.named_modules() if isinstance(part, torch.nn.Linear)
    }
    for name, weight in official.state_dict().items():
        stored[name] = meant[name] = weight
        if name in linear:
            scale = weight.half().abs().max(dim=1).values.float()
            stored[name] = (weight.half().float() * (127 / scale[:, None])).round().to(torch.int8)
            stored[f"{name}_scb"] = scale
            meant[name] = stored[name].float() * scale[:, None] / 127
    return stored, meant


@pytest.mark.parametrize("old", [False, True], ids=["newer names", "older names"])
@pytest.mark.parametrize("name", INT8)
def test_from_int8(tmp_path, name, old):
    """The weights that int8 stands for, rounded to bfloat16 or not at all."""
    config = INT8[name]
    official = official_lm(config, seed=6)
    stored, meant = official_int8(official)
    stored = old_int8(stored) if old else stored
    write_folder(
        tmp_path / "q8",
        {**config, "quantize": True, "moshi_name": "hf://a/b/model.q8.safetensors"},
        stored,
        "model.q8.safetensors",
    )
    convert.convert(tmp_path / "q8", tmp_path / "out")
    made = load_file(tmp_path / "out" / MOSHI_FILE)
    assert made.keys() == meant.keys()
    for key, weight in made.items():
        expected = meant[key].bfloat16() if weight.dtype == torch.bfloat16 else meant[key]
        assert weight.equal(expected)
    convert.convert(tmp_path / "q8", tmp_path / "wide", dtype="float32")
    official.load_state_dict(meant)
    same_as_official(tmp_path / "wide", official, config)
