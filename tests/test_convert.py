"""tools/convert.py on relatives in the official format: LoRA, int8, Hibiki, PersonaPlex.

Small random models are written as their authors write them, converted, opened and compared with the official
package: weights bit by bit where nothing is computed, else token for token. Older names must give the same
file, byte by byte. Hugging Face's folders are in test_convert_hf.py."""

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
    write_folder,
)
from lazy import Lazy, write
from reference import LM, LMGen, close, lm_config, loaders, official_lm, old_names
from safetensors.torch import load_file
from test_moshi import both_speak, same_tokens, speak, user_codes

from moshi_min import MOSHI_FILE, MoshiConfig, MoshiGen, load_moshi

STEPS = 70  # of a conversation: far past the window of 12


def opened(out, dtype=torch.float32):
    """Our model from a folder that came out."""
    config = json.loads((out / "config.json").read_text())
    return load_moshi(out / MOSHI_FILE, MoshiConfig.from_dict(config), dtype=dtype)


def lively(tokens):
    """Tokens [B, K, F] that show something."""
    assert tokens.shape[-1] >= 60
    assert all(len(stream.unique()) > 3 for stream in tokens.transpose(0, 1)), "it says hardly anything"


def same_as_official(out, official, config):
    """Greedy and sampled, our sampler and the official one say the same."""
    for greedy in (True, False):
        mine, theirs = both_speak(opened(out), official, user_codes(config, 1, STEPS), greedy=greedy)
        lively(same_tokens(mine, theirs, config["delays"]))


def same_file(folder, config, tensors, old, name="model.safetensors", **options):
    """`tensors` under their newer names, and `old`, make the same file; the folder that came out."""
    write_folder(folder / "older", config, old, name)
    write_folder(folder / "given", config, tensors, name)
    for part in ("older", "given"):
        convert.convert(folder / part, folder / f"out {part}", **options)
    older, out = folder / "out older", folder / "out given"
    assert (older / MOSHI_FILE).read_bytes() == (out / MOSHI_FILE).read_bytes()
    return out


# ---- LoRA --------------------------------------------------------------------------------------------------

TABLES = (
    "emb.0.weight",
    "emb.4.weight",
    "text_emb.weight",
    "depformer_emb.1.weight",
    "depformer_text_emb.weight",
)
SAID = {"lora": True, "lora_rank": 5, "lora_scaling": 1.7}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lora(request, tmp_path_factory):
    """(the official model with its adapters fused, the folder that came out, its dtype)."""
    folder, dtype = tmp_path_factory.mktemp("lora"), getattr(torch, request.param)
    base = official_lm(LORA, seed=3, dtype=dtype)
    write_folder(folder / "base", {**LORA, "lora": False}, old_names(base.state_dict()))
    (folder / "base" / "tokenizer_spm_32k_3.model").write_bytes(b"words")
    changes = adapters(base, rank=5, scale=0.2, seed=4, tables=TABLES)
    out = same_file(
        folder / "checkpoints" / "checkpoint_000100" / "consolidated",
        {**LORA, **SAID},
        changes,
        old_adapters(changes),
        "lora.safetensors",
        base=folder / "base",
    )
    official = loaders.get_moshi_lm(
        folder / "base" / "model.safetensors",
        {**LORA, **SAID},
        dtype=dtype,
        lora_weights=out.with_name("given") / "lora.safetensors",
        fuse_lora=True,
    )
    return official.eval().requires_grad_(False), out, dtype


def test_lora_weights(lora):
    """Every tensor is bit by bit that of the official model, its adapters fused."""
    official, out, dtype = lora
    made, theirs = load_file(out / MOSHI_FILE), official.state_dict()
    assert made.keys() == theirs.keys()
    assert all(made[name].dtype == dtype and made[name].equal(theirs[name]) for name in made)
    config = json.loads((out / "config.json").read_text())
    assert config["lora"] is False and not {"lora_rank", "lora_scaling"} & config.keys()
    assert (out / config["tokenizer_name"]).read_bytes() == b"words"


def test_lora_tokens(lora):
    official, out, dtype = lora
    if dtype == torch.float32:
        same_as_official(out, official, LORA)


def test_a_model_merged_by_moshi_finetune(tmp_path):
    """It saves a whole one as well, whose config.json still speaks of adapters."""
    tensors = official_lm(LORA, seed=5).state_dict()
    write_folder(tmp_path / "trained", {**LORA, **SAID}, tensors, "consolidated.safetensors")
    assert "to be put there" in convert.convert(tmp_path / "trained", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lora"] is False
    made = load_file(tmp_path / "out" / MOSHI_FILE)
    assert made.keys() == tensors.keys() and all(made[name].equal(tensors[name]) for name in made)


# ---- int8 --------------------------------------------------------------------------------------------------


def official_int8(official):
    """By the official QLinear's formula: (the tensors of an int8 file, the weights that they mean)."""
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


def test_from_int8(tmp_path):
    """The weights that int8 stands for, rounded to bfloat16, or not at all with --dtype float32."""
    config = lm_config(dim=48, num_heads=6, kv_repeat=3, depformer_num_heads=6, depformer_kv_repeat=2)
    official = official_lm(config, seed=6)
    stored, meant = official_int8(official)
    said = {**config, "quantize": True, "moshi_name": "hf://a/b/model.q8.safetensors"}
    out = same_file(tmp_path, said, stored, old_int8(stored), "model.q8.safetensors")
    made = load_file(out / MOSHI_FILE)
    assert made.keys() == meant.keys() and "quantize" not in json.loads((out / "config.json").read_text())
    for name, weight in made.items():
        rounded = f"{name}_scb" in stored
        assert weight.equal(meant[name].bfloat16() if rounded else meant[name])
        assert (weight.dtype == torch.bfloat16) == rounded
    convert.convert(tmp_path / "given", tmp_path / "wide", dtype="float32")
    official.load_state_dict(meant)
    same_as_official(tmp_path / "wide", official, config)


def test_to_int8(tmp_path):
    """Bit by bit what the official formula gives, and what our own model in int8 is made of."""
    official = official_lm(LM["uneven"], seed=7)
    official.text_linear.weight.data[3] = 0  # a row of zeros has no scale
    stored, _ = official_int8(official)
    stored["text_linear.weight"][3] = 0
    tensors = official.state_dict()
    out = same_file(tmp_path, LM["uneven"], tensors, old_names(tensors), dtype="int8")
    made = load_file(out / MOSHI_FILE)
    assert made.keys() == stored.keys() and all(made[name].equal(stored[name]) for name in made)
    assert json.loads((out / "config.json").read_text())["quantize"] is True
    assert opened(out, None).text_linear.weight.equal(stored["text_linear.weight"])


def test_numbers_lie_at_multiples_of_their_size(tmp_path):
    """Readers map the file. Three bytes of int8 in front would put all that follows between two addresses."""
    numbers = {"a": torch.tensor([1, 2, 3], dtype=torch.int8), "b": torch.tensor([1.5, 2.5])}
    lazies = {name: Lazy(name, list(t.shape), t.dtype, lambda t=t: t) for name, t in numbers.items()}
    write(tmp_path / "file", lazies)
    made = load_file(tmp_path / "file")
    assert all(made[name].equal(tensor) for name, tensor in numbers.items())
    assert made["b"].data_ptr() % 4 == 0 and len((tmp_path / "file").read_bytes()) % 8 == 3


# ---- Hibiki ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, quality", [("1B", "very_good"), ("2B", "bad")])
def test_hibiki(tmp_path, name, quality):
    """What the official sampler says when it is given the condition, greedy and sampled."""
    config, official = HIBIKI[name], hibiki_lm(HIBIKI[name], seed=8)
    tensors = official.state_dict()
    out = same_file(tmp_path, config, tensors, old_names(tensors), quality=quality)
    with torch.no_grad():
        official.text_emb.weight[2] = official.text_emb.weight[3]  # as its loader does
    user = user_codes(config, 2, STEPS)
    for greedy in (True, False):
        torch.manual_seed(5)
        mine = speak(MoshiGen(opened(out), 2, greedy=greedy), user)
        torch.manual_seed(5)
        asked = conditions(official, quality, 2)
        sampler = LMGen(official, use_sampling=not greedy, check=True, condition_tensors=asked)
        with torch.no_grad(), sampler.streaming(2):
            theirs = [sampler.step(user[..., s : s + 1]) for s in range(STEPS)]
        lively(same_tokens(mine, theirs, config["delays"]))


def test_hibiki_reads_an_early_end_as_a_pause(tmp_path):
    """No run may have come by a token 2, so the table itself; and the condition in each of its rows."""
    official = hibiki_lm(HIBIKI["1B"], seed=8)
    write_folder(tmp_path / "hibiki", HIBIKI["1B"], official.state_dict())
    convert.convert(tmp_path / "hibiki", tmp_path / "out")
    table, before = load_file(tmp_path / "out" / MOSHI_FILE)["text_emb.weight"], official.text_emb.weight
    assert table[2].equal(table[3]) and not table[2].equal(table[1])
    asked = conditions(official, "very_good", 1)["description"].condition[0, 0]
    added = torch.cat([table[:2], table[3:]]) - torch.cat([before[:2], before[3:]])
    close(added, asked.expand_as(added))


# ---- PersonaPlex -------------------------------------------------------------------------------------------


def test_personaplex(tmp_path):
    """NVIDIA's sampler, first prompted, says the same one call later. Its very first frame is lost."""
    config, official = PERSONAPLEX, personaplex_lm(PERSONAPLEX, seed=9)
    tensors = official.state_dict()
    out = same_file(tmp_path, config, tensors, old_names(tensors))
    ours, own, prompt = opened(out), config["n_q"] // 2, 9
    assert ours.config.dep_q == own
    codes = torch.randint(config["card"], (1 + config["n_q"], prompt + STEPS))
    sampler, theirs = PersonaPlexGen(official, prompt + STEPS), []
    with torch.no_grad(), official.streaming(1):
        for s in range(prompt + STEPS):
            moshi, text = (codes[1 : 1 + own, s], codes[0, s]) if s < prompt else (None, None)
            theirs.append(sampler.step(codes[1 + own :, s], moshi, text))
    gen = MoshiGen(ours, greedy=True)
    mine = [gen.prefill(codes[None, :, 1:prompt])]
    mine += [gen.step(codes[None, 1 + own :, s : s + 1]) for s in range(prompt, prompt + STEPS - 1)]
    mine = torch.cat(mine, -1)
    assert mine[0].equal(torch.stack(theirs[prompt:], -1)[: 1 + own])
    lively(mine)


def test_personaplex_config():
    """Its config.json says nothing, so the sizes are the released ones."""
    given = relatives.personaplex({"model_type": "personaplex", "version": "7b-v1"})
    sizes = {key: value for key, value in given.items() if key not in relatives.SPENT}
    assert sizes["dep_q"] == 16 and MoshiConfig.from_dict({**sizes, "dep_q": 8}) == MoshiConfig()


# ---- bad folders -------------------------------------------------------------------------------------------


def change(tensors, name, what):
    """The tensors with one of them changed, or without it."""
    new = what(tensors[name])
    return {key: new if key == name else t for key, t in tensors.items() if key != name or new is not None}


A, B = "transformer.layers.1.self_attn.in_projs.0.lora_A.weight", "linears.2.lora_B.weight"
BAD_LORA = {  # what is done to the adapters, or said in config.json -> what the line says
    "a half is missing": (lambda t: change(t, B, lambda _: None), {}, f"{B} is missing"),
    "the other is missing": (lambda t: change(t, A, lambda _: None), {}, f"{A} is missing"),
    "not for this model": (
        lambda t: {**t, "linears.9.lora_A.weight": t[A].clone()},
        {},
        "linears.9.weight, which the base does not have",
    ),
    "another rank": (lambda t: change(t, A, lambda a: a[1:]), {}, "shapes that do not fit together"),
    "too short": (lambda t: change(t, B, lambda b: b[1:]), {}, "shapes that do not fit together"),
    "a table of another size": (
        lambda t: change(t, "emb.0.weight", lambda e: e[1:]),
        {},
        "emb.0.weight has the shape",
    ),
    "not finite": (lambda t: change(t, B, lambda b: b / 0), {}, "linears.2.weight holds or gives numbers"),
    "a scaling in words": (dict, {"lora_scaling": "2"}, "lora_scaling cannot be '2'"),
    "another model's": (dict, {"num_layers": 4}, "its sizes are not those of"),
    "a name that is taken": (dict, {}, "config.json is not the name of the codec"),
    "a name that is none": (dict, {"lora_name": ["a"]}, "lora_name ['a'] is no name of a file"),
}


@pytest.mark.parametrize("what", BAD_LORA)
def test_bad_adapters(tmp_path, what):
    spoil, said, says = BAD_LORA[what]
    base = official_lm(LORA, seed=3)
    name = {"tokenizer_name": "hf://a/b/config.json"} if what == "a name that is taken" else {}
    write_folder(tmp_path / "base", {**LORA, **name}, base.state_dict())
    changes = spoil(adapters(base, rank=5, scale=0.2, seed=4, tables=TABLES))
    write_folder(tmp_path / "lora", {**LORA, **SAID, **said}, changes, "lora.safetensors")
    refused(tmp_path, "lora", says, base=tmp_path / "base")


def refused(folder, name, says, **options):
    """A single line, which names the folder, and nothing is written."""
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        convert.convert(folder / name, folder / "out", **options)
    assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not [path for path in folder.iterdir() if "out" in path.name]


BAD = {  # a config, what is done to its tensors, options -> what the line says
    "nothing to do": (LM["small"], dict, {}, "in the official format already"),
    "unknown key": ({**LM["small"], "tts": 1}, dict, {"dtype": "int8"}, "unknown key 'tts'"),
    "a scale is missing": (
        LM["small"],
        lambda t: change(official_int8_of(t), "text_linear.weight_scb", lambda _: None),
        {},
        "text_linear.weight_scb is missing",
    ),
    "a scale of another size": (
        LM["small"],
        lambda t: change(official_int8_of(t), "text_linear.weight_scb", lambda s: s[1:]),
        {},
        "text_linear.weight_scb has the shape [39]",
    ),
    "a scale of integers": (
        LM["small"],
        lambda t: change(official_int8_of(t), "text_linear.weight_scb", lambda s: s.to(torch.int8)),
        {},
        "text_linear.weight_scb has the shape [40] and the dtype int8",
    ),
    "another quality": (HIBIKI["1B"], dict, {"quality": "best"}, "very_bad, bad, neutral, good, very_good"),
    "another condition": (
        {**HIBIKI["1B"], "fuser": {"sum": []}},
        dict,
        {},
        "only Hibiki's kind of condition",
    ),
    "a condition of numbers": (
        {**HIBIKI["1B"], "conditioners": {"description": 3}},
        dict,
        {},
        "only Hibiki's kind of condition",
    ),
    "no condition": (
        HIBIKI["1B"],
        lambda t: {name: tensor for name, tensor in t.items() if "embed.weight" not in name},
        {},
        "condition_provider.conditioners.description.embed.weight is missing",
    ),
    "a schedule of words": (
        {**HIBIKI["2B"], "depformer_weights_per_step_schedule": [0, 1, 2, 2, "2"]},
        dict,
        {},
        "depformer_weights_per_step_schedule cannot be",
    ),
    "a schedule too long": (
        {**HIBIKI["2B"], "depformer_weights_per_step_schedule": [0, 1, 2, 2, 2, 2]},
        dict,
        {},
        "depformer_weights_per_step_schedule cannot be",
    ),
    "a schedule of more weights": (
        {**HIBIKI["2B"], "depformer_weights_per_step_schedule": [0, 1, 2, 3, 3]},
        dict,
        {},
        "depformer_in.3.weight is missing",
    ),
    "half a table": (
        HIBIKI["2B"],
        lambda t: change(t, "depformer_emb.0.low_rank.weight", lambda w: w[:, 1:]),
        {},
        "shapes that do not fit together",
    ),
    "no text": (HIBIKI["1B"], lambda t: change(t, "text_emb.weight", lambda _: None), {}, "text_emb.weight"),
    "of another size": (
        PERSONAPLEX,
        lambda t: change(t, "emb.3.weight", lambda e: e[1:]),
        {},
        "emb.3.weight has",
    ),
    "more than one": (
        PERSONAPLEX,
        lambda t: {**t, "more": t["emb.0.weight"].clone()},
        {},
        "tensor more is not",
    ),
    "sizes in words": ({**PERSONAPLEX, "n_q": "6"}, dict, {}, "n_q cannot be '6'"),
    "no integers": (
        LM["small"],
        lambda t: change(t, "emb.0.weight", lambda e: e.long()),
        {},
        "of the kind I64",
    ),
}


def official_int8_of(tensors):
    """int8 of what is in a random small model."""
    official = official_lm(LM["small"], seed=1)
    official.load_state_dict(tensors)
    return official_int8(official)[0]


@pytest.mark.parametrize("what", BAD)
def test_bad_folders(tmp_path, what):
    config, spoil, options, says = BAD[what]
    if config.get("model_type") == "hibiki":
        official = hibiki_lm(HIBIKI["2B" if config["n_q"] == 10 else "1B"])
    elif config.get("model_type") == "personaplex":
        official = personaplex_lm(PERSONAPLEX)
    else:
        official = official_lm(LM["small"], seed=1)
    write_folder(tmp_path / "given", config, spoil(official.state_dict()))
    refused(tmp_path, "given", says, **options)


def test_a_base_is_needed(tmp_path):
    base = official_lm(LORA, seed=3)
    write_folder(tmp_path / "lora", {**LORA, **SAID}, adapters(base, 5, 0.2, 4), "lora.safetensors")
    refused(tmp_path, "lora", "name its folder with --base")
    write_folder(tmp_path / "base", LORA, base.state_dict())
    refused(tmp_path, "base", "there is no lora.safetensors to change", base=tmp_path / "base")
