"""The relatives: recognisers, text models, int8, LoRA flags and names, and going on from a history.

Small random models again, against the official package and, for int8, bitsandbytes, which it runs on.
"""

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from random_checkpoint import MIMI, MOSHI, make_tokenizer, random_mimi, random_moshi
from reference import (
    LM,
    LMGen,
    close,
    error,
    lm_config,
    loaders,
    measured,
    official_lm,
    old_names,
    require,
    save,
)
from safetensors.torch import load_file, save_file
from test_generate import FRAME, RATE, voice, wav

import files
import generate
from files import find_words, write_words
from mimi_min import init_state
from moshi_min import (
    MIMI_CONFIG_FILE,
    MIMI_FILE,
    MOSHI_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    CodebookLinear,
    Int8Linear,
    MoshiConfig,
    MoshiGen,
    load_checkpoint,
    load_moshi,
    quantize,
    save_checkpoint,
    save_moshi,
)

run_inference = require("moshi.run_inference")
official_quantize = require("moshi.utils.quantize")

# ---- speech to text ----------------------------------------------------------------------------------------


def stt_config(**changes):
    """A small config of a recogniser with all keys of the published ones."""
    published = {
        "n_q": 7,
        "dep_q": 0,
        "delays": [0] * 8,
        "existing_text_padding_id": 3,
        "depformer_dim_feedforward": None,
        "conditioners": {},
        "cross_attention": False,
        "model_id": {"sig": "abc", "epoch": 7},
        "lm_gen_config": {"temp": 0.0, "temp_text": 0.0, "top_k": 250, "top_k_text": 50},
        "stt_config": {"audio_delay_seconds": 0.5, "audio_silence_prefix_seconds": 0.3},
        "model_type": "stt",
    }
    return lm_config(**{**published, **changes})


STT = {
    "plain": stt_config(),
    "pauses": stt_config(dim=48, num_heads=3, extra_heads_num_heads=4, extra_heads_dim=6),
    "odd": stt_config(
        kv_repeat=2, n_q=3, delays=[0] * 4, hidden_scale=3.5, extra_heads_num_heads=1, extra_heads_dim=2
    ),
}
SETTINGS = ("model_id", "lm_gen_config", "stt_config", "model_type")  # what is not the model's


def recogniser(config, tmp_path, old, dtype=torch.float32):
    """(ours from its file, official) with the same random weights."""
    sizes = {key: value for key, value in config.items() if key not in SETTINGS}
    official = official_lm(sizes, seed=3, dtype=dtype)
    path = save(official, tmp_path / "stt.safetensors", old)
    return load_moshi(path, MoshiConfig.from_dict(config), dtype=dtype), official


@pytest.mark.parametrize("old", [False, True], ids=["newer", "older"])
@pytest.mark.parametrize("name", STT)
def test_recogniser(tmp_path, name, old):
    """Token for token the official sampler from the first step on, far past the window; its pause heads."""
    config = STT[name]
    ours, official = recogniser(config, tmp_path, old)
    assert ours.depth_decoder is None and len(official.extra_heads) == config.get("extra_heads_num_heads", 0)
    for options in ({"use_sampling": False}, {"temp_text": 0.0}, {"temp_text": 1.1, "top_k_text": 30}):
        user = torch.randint(24, (2, config["n_q"], 70))
        greedy = not options.get("use_sampling", True)
        mine = MoshiGen(
            ours, 2, greedy=greedy, **{k: v for k, v in options.items() if "temp" in k or "top" in k}
        )
        theirs, tokens = LMGen(official, check=True, **options), []
        for sampler in (mine, theirs):
            torch.manual_seed(7)
            said = []
            if sampler is mine:
                for step in user.split(1, dim=-1):
                    said.append((mine.step(step), mine.pauses.clone()))
            else:
                with theirs.streaming(2):
                    for step in user.split(1, dim=-1):
                        token, heads = theirs.step_with_extra_heads(step)
                        said.append((token, [head[:, 0, 0] for head in heads]))
            tokens.append(torch.cat([token for token, _ in said], dim=-1))
            sampler.said = said
        assert torch.equal(*tokens) and tokens[0].shape == (2, 1, 70) and len(tokens[0].unique()) > 10
        for (_, pauses), (_, heads) in zip(mine.said, theirs.said):
            assert pauses.shape == (2, len(heads))
            for k, head in enumerate(heads):
                difference = (pauses[:, k] - head).abs().max().item()
                measured("in a pause's probability", difference)
                assert difference < 1e-6
        if config.get("extra_heads_num_heads"):
            assert torch.stack([pauses for _, pauses in mine.said]).std() > 0.05


@torch.no_grad()
def test_recogniser_bfloat16(tmp_path):
    """In bfloat16, logits of raw tokens against the official ones."""
    ours, official = recogniser(STT["pauses"], tmp_path, True, torch.bfloat16)
    tokens = torch.randint(24, (2, 8, 40))
    close(ours.temporal(tokens)[1], official.forward_text(tokens)[1][:, 0], 0.05)


def test_a_recogniser_has_no_voice(tmp_path):
    """What needs the depth decoder says so."""
    ours, _ = recogniser(STT["plain"], tmp_path, False)
    with pytest.raises(ValueError, match="without a voice"):
        ours(torch.zeros(1, 8, 4, dtype=torch.long))


@torch.no_grad()
def make_folder(folder, settings=None, seed=1, **sizes):
    """A checkpoint folder with a random model of these sizes, as save_checkpoint writes it.

    It says no single bytes, of which most make no character, and often PAD and EPAD.
    """
    torch.manual_seed(seed)
    moshi = random_moshi(MoshiConfig(**{**vars(MOSHI), **sizes}))
    mimi, words = random_mimi(MIMI) if moshi.config.n_q else None, make_tokenizer(moshi.config.text_card)
    for token in range(words.vocab_size()):
        if words.is_byte(token):
            moshi.text_linear.weight[token] = 0
    moshi.text_linear.weight[[0, 3]] *= 1.3
    save_checkpoint(folder, Checkpoint(moshi, mimi, words, settings or {}))
    return folder


STT_SIZES = {
    "n_q": 7,
    "dep_q": 0,
    "delays": (0,) * 8,
    "extra_heads_num_heads": 4,
}


@pytest.fixture(scope="session")
def stt_folder(tmp_path_factory):
    """A recogniser with pause heads; nobody may change it."""
    settings = {key: STT["plain"][key] for key in ("lm_gen_config", "stt_config")}
    return make_folder(tmp_path_factory.mktemp("stt") / "stt", settings, **STT_SIZES)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs the program in this process, in the test's folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(folder, *argv):
        try:
            code = generate.main([*map(str, argv), "--checkpoint", str(folder), "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def meeting(tmp_path):
    """A recording of 25.3 frames."""
    path = tmp_path / "meeting.wav"
    path.write_bytes(wav(voice(25.3 * FRAME / RATE)))
    return path


def official_tokens(folder, path):
    """What the official program says of a recording: the text tokens that it prints from, step by step."""
    info = loaders.CheckpointInfo.from_hf_repo(
        "none", folder / MOSHI_FILE, folder / MIMI_FILE, folder / TOKENIZER_FILE,
        folder / "config.json", folder / MIMI_CONFIG_FILE,
    )  # fmt: skip
    mimi, words = info.get_mimi("cpu"), info.get_text_tokenizer()
    with torch.no_grad():
        state = run_inference.InferenceState(
            info, mimi, words, info.get_moshi("cpu", torch.float32), 1, 1.0, "cpu", **info.lm_gen_config
        )
        said, step = [], state.lm_gen.step
        state.lm_gen.step = lambda codes: said.append(step(codes)) or said[-1]
        state.printer = SimpleNamespace(
            **dict.fromkeys(("log", "print_header", "print_token"), lambda *_: None)
        )
        sound, _ = generate.read_wav(path)
        state.run(sound[None, None])
    assert info.model_type == "stt"
    return torch.cat(said, dim=-1)[0, 0].tolist()


def test_the_official_program(call, stt_folder, meeting, tmp_path):
    """The same tokens as `run_inference` from the same folder, silence in front and behind as it adds
    them (in front 0.3 s, 3.75 frames: no whole ones), and as words what its tokenizer makes of them."""
    code, out, err = call(stt_folder, meeting, "--tokens", "run.npz")
    assert code == 0, err
    theirs = official_tokens(stt_folder, meeting)
    run = np.load(tmp_path / "run.npz")
    text = run["codes"][0].tolist()
    # Theirs has whole frames only, and ours the rest of the last second too.
    assert len(theirs) - 1 == int((25.3 * FRAME + 0.3 * RATE + 1.5 * RATE) / FRAME)
    assert text[: len(theirs)] == theirs and len(text) - len(theirs) <= 1
    assert len(set(text)) > 10 and run["codes"].shape[0] == 8
    words = make_tokenizer(320).decode([token for token in text if token not in (0, 3)])
    assert "".join(out.split()).startswith("".join(words.split())[:-4]) and "not saved" in err
    assert not (tmp_path / "answer.wav").exists()


def test_a_word_lies_between_two_epads(tmp_path):
    """Words and times, where EPADs stand and where one was left out, in the three kinds of files."""
    pieces = [
        b"",
        None,
        b" hel",
        b"lo",
        b"",
        None,
        b" a",
        b"<b",
        b" \xc3",
        b"\xa9",
        b"",
        b"",
        None,
        b"",
        None,
    ]
    pieces += [b"", b" end", b""]
    assert list(find_words(pieces)) == [(2, 5, "hello"), (6, 8, "a<b"), (8, 12, "é"), (16, 18, "end")]
    assert list(find_words([])) == list(find_words([None, b"", None])) == []
    expected = {
        "words.txt": "0.00\t0.20\thello\n0.28\t0.44\ta<b\n0.44\t0.76\té\n1.08\t1.24\tend\n",
        "words.srt": "1\n00:00:00,000 --> 00:00:00,200\nhello\n\n2\n00:00:00,280 --> 00:00:00,440\na<b\n\n"
        "3\n00:00:00,440 --> 00:00:00,760\né\n\n4\n00:00:01,080 --> 00:00:01,240\nend\n\n",
        "words.vtt": "WEBVTT\n\n00:00:00.000 --> 00:00:00.200\nhello\n\n00:00:00.280 --> 00:00:00.440\n"
        "a&lt;b\n\n00:00:00.440 --> 00:00:00.760\né\n\n00:00:01.080 --> 00:00:01.240\nend\n\n",
    }
    for name, content in expected.items():
        write_words(tmp_path / name, pieces, 0.08, 0.2)
        assert (tmp_path / name).read_text(encoding="utf-8") == content
    assert files.clock(3725.0604) == "01:02:05.060" and files.clock(0.9996) == "00:00:01.000"


def test_transcript(call, stt_folder, meeting, tmp_path):
    """-o writes what was printed, a time for each word: that of its tokens, less silence and delay."""
    code, out, err = call(
        stt_folder, meeting, "-o", "words.txt", "--tokens", "run.npz", "--lead-seconds", 0.4
    )
    assert code == 0 and "words.txt" in err, err
    lines = [line.split("\t") for line in (tmp_path / "words.txt").read_text().splitlines()]
    printed = "".join(out.split())
    assert "".join(word for _, _, word in lines).replace(" ", "") == printed and len(lines) > 5
    text, tokenizer = np.load(tmp_path / "run.npz")["codes"][0], make_tokenizer(320)
    begins = [
        frame
        for frame, token in enumerate(text)
        if token not in (0, 3)
        and (
            tokenizer.id_to_piece(int(token)).startswith("▁")
            or all(other in (0, 3) for other in text[:frame])
            or text[max(np.flatnonzero(text[:frame] != 3), default=0)] == 0
        )
    ]
    expected = [f"{max(0, 0.08 * frame - 0.4 - 0.5):.2f}" for frame in begins]
    assert [begin for begin, _, _ in lines] == expected


def test_live(stt_folder, meeting, tmp_path):
    """From a pipe: words come while it still sends, and at its end the silence that brings the last ones."""
    command = [
        sys.executable,
        ROOT / "generate.py",
        "-",
        "--checkpoint",
        stt_folder,
        "--device",
        "cpu",
        "--tokens",
        "run.npz",
    ]
    sound = (torch.as_tensor(voice(2)) * 32767).short().numpy().tobytes()
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(sound)
    process.stdin.flush()
    early = process.stdout.read(4)  # before the pipe has ended
    out, err = process.communicate()
    assert process.returncode == 0 and len(early) == 4, err.decode()
    codes = np.load(tmp_path / "run.npz")["codes"]
    assert codes.shape == (8, 25 + 19)  # no silence in front; behind it the delay and a second, 18.75 frames


def test_turns(call, stt_folder, meeting, monkeypatch):
    """When the head for two seconds says that the speaker has paused, the next words get a new line."""
    _, before, _ = call(stt_folder, meeting)
    step, count = MoshiGen.step, [0]

    def paused(self, *given):
        tokens = step(self, *given)
        count[0] += 1
        self.pauses[:] = 0.0
        self.pauses[0, 2] = 0.51 if count[0] in (15, 16, 17, 30) else 0.49
        return tokens

    monkeypatch.setattr(MoshiGen, "step", paused)
    _, after, _ = call(stt_folder, meeting)
    assert after.count("\n") == before.count("\n") + 2 and after.replace("\n", "") == before.replace("\n", "")


# ---- text models -------------------------------------------------------------------------------------------

TEXT = lm_config(n_q=0, dep_q=0, delays=[0], depformer_dim_feedforward=None)
TEXT_SIZES = {"n_q": 0, "dep_q": 0, "delays": (0,), "context": 40}


def test_text_model(tmp_path):
    """Text alone: logits, the sampler past its window, and a prompt, against the official package."""
    ours, official = recogniser(TEXT, tmp_path, True)
    tokens = torch.randint(40, (2, 1, 50))
    with torch.no_grad():
        close(ours.temporal(tokens)[1], official.forward_text(tokens)[1][:, 0])
    nothing = torch.zeros(2, 0, 1, dtype=torch.long)
    for greedy in (True, False):
        torch.manual_seed(1)
        mine = MoshiGen(ours, 2, greedy=greedy)
        said = torch.cat([mine.step(nothing) for _ in range(60)], dim=-1)
        torch.manual_seed(1)
        theirs = LMGen(official, use_sampling=not greedy)
        with theirs.streaming(2):
            assert torch.equal(said, torch.cat([theirs.step(nothing) for _ in range(60)], dim=-1))
        assert len(said.unique()) > 5
    greedily = MoshiGen(ours, 2, greedy=True)
    whole = torch.cat([greedily.step(nothing) for _ in range(40)], dim=-1)
    gone_on = MoshiGen(ours, 2, greedy=True)
    rest = [gone_on.prefill(whole[..., :15])] + [gone_on.step(nothing) for _ in range(24)]
    assert torch.equal(torch.cat(rest, dim=-1), whole[..., 15:])


def test_text_program(call, tmp_path):
    """--text goes on with a text, as the model does, until the end of the text or of the window."""
    folder = make_folder(tmp_path / "text", **TEXT_SIZES)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", MOSHI_FILE, TOKENIZER_FILE]
    code, out, err = call(folder, "--text", "Hello, what can", "--greedy")
    assert code == 0, err
    moshi, mimi, words, _ = load_checkpoint(folder)
    assert mimi is None
    tokens = words.encode("Hello, what can")
    with torch.no_grad():
        while len(tokens) < 40:
            sequence = torch.tensor([[[320] + tokens]])
            if (best := int(moshi.temporal(sequence)[1][0, -1].argmax())) == words.eos_id():
                break
            tokens.append(best)
    expected = words.decode([token for token in tokens if token not in (0, 3)])
    assert out.split() == expected.split() and len(out) > 30


@pytest.mark.parametrize("kind", ["text", "stt", "voice"])
def test_options_that_do_not_fit_the_model(call, stt_folder, meeting, tmp_path, kind):
    """One line that says which do."""
    folder = (
        stt_folder
        if kind == "stt"
        else make_folder(tmp_path / kind, **(TEXT_SIZES if kind == "text" else {}))
    )
    wrong = {
        "text": [(), ("-o", "a.wav", "--text", "Hello"), ("--text", "")],
        "stt": [("-o", "a.wav"), ("-o", "-"), ("--stereo",), ("--text", "Hello"), ("-o", "a.srtt")],
        "voice": [("-o", "a.txt"), ("-o", "a.SRT"), ("--text", "Hello")],
    }
    for options in wrong[kind]:
        code, out, err = call(folder, *([] if kind == "text" else [meeting]), *options)
        assert code == 2 and err.count("\n") == 1 and not out, (options, out, err)
        assert "--text" in err or ".srt" in err, err
    assert not list(tmp_path.glob("a.*"))


# ---- configs and names -------------------------------------------------------------------------------------


def test_exported_configs():
    """What exported configs say beside the sizes: a null width is the default, LoRA and int8 flags say
    nothing of the sizes, and a recogniser's kind is what its streams make it."""
    plain = MoshiConfig.from_dict(lm_config(depformer_dim_feedforward="absent"))
    assert MoshiConfig.from_dict(lm_config(depformer_dim_feedforward=None)) == plain
    flags = {"lora": True, "lora_rank": 128, "lora_scaling": 2.0, "lora_name": None, "quantize": True}
    assert MoshiConfig.from_dict(lm_config(depformer_dim_feedforward=None, **flags)) == plain
    assert MoshiConfig.from_dict(STT["plain"]).to_dict()["model_type"] == "stt"
    assert MoshiConfig.from_dict(TEXT).to_dict()["model_type"] == plain.to_dict()["model_type"] == "moshi"
    for config in (STT["pauses"], STT["odd"], TEXT):
        config = MoshiConfig.from_dict(config)
        assert MoshiConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for kind in ("hibiki", "tts", "stt"):
        with pytest.raises(ValueError, match="model_type"):
            MoshiConfig.from_dict(lm_config(model_type=kind))


def change_config(folder, **changes):
    """Writes other settings into a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_names_and_flags_of_a_folder(call, meeting, tmp_path):
    """hf://owner/repository/file is the file. A merged model may say `lora`; adapters name the converter."""
    folder = make_folder(tmp_path / "voice")
    for key, name in (
        ("mimi_name", MIMI_FILE),
        ("tokenizer_name", TOKENIZER_FILE),
        ("moshi_name", MOSHI_FILE),
    ):
        change_config(folder, **{key: f"hf://kyutai/moshiko-pytorch-bf16/{name}"})
    change_config(folder, lora=True, lora_rank=128, lora_scaling=2.0, lora_name=None)
    assert load_checkpoint(folder).tokenizer.vocab_size() == 320
    again = tmp_path / "again"
    save_checkpoint(again, load_checkpoint(folder))
    saved = json.loads((again / "config.json").read_text())
    assert saved["lora"] is False and "lora_name" not in saved and saved["mimi_name"] == MIMI_FILE
    change_config(folder, mimi_name="hf://kyutai/..")
    assert call(folder, meeting)[0] == 2
    change_config(folder, mimi_name=MIMI_FILE, lora_name="mine.safetensors")
    load_checkpoint(folder)  # the adapters that it names aren't there: they are merged
    for name in ("mine.safetensors", "lora.safetensors"):
        save_file({"text_linear.lora_A.weight": torch.zeros(4, 64)}, folder / name)
        code, out, err = call(folder, meeting)
        assert code == 2 and "tools/convert.py" in err and err.count("\n") == 1, err
        (folder / name).unlink()
    save_file({"text_linear.lora_A.weight": torch.zeros(4, 64)}, folder / MOSHI_FILE)
    code, out, err = call(folder, meeting)
    assert code == 2 and "tools/convert.py" in err and err.count("\n") == 1, err


# ---- int8 --------------------------------------------------------------------------------------------------

INT8 = {name: LM[name] for name in ("small", "gqa_wide", "two_own", "all_own")} | {
    "stt": {key: value for key, value in STT["pauses"].items() if key not in SETTINGS}
}
# Widths that torch's kernel takes (multiples of 16), and in `small` and others one that it does not.
INT8["sixteens"] = lm_config(
    dim=64, depformer_dim=32, depformer_num_heads=4, depformer_dim_feedforward=4 * 24, hidden_scale=3
)


def scaled(official):
    """The official model's int8 tensors {name: (int8, scales)} as its own recipe makes them."""
    made = {}
    for name, tensor in official.state_dict().items():
        module = official.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.Linear):
            half = tensor.to(torch.float16)
            scb = half.abs().amax(dim=1).float()
            made[name] = torch.round(half * (127 / scb)[:, None]).to(torch.int8), scb
    return made


def dequantized(official):
    """A copy of the official model with the weights that its int8 rows stand for."""
    twin = copy.deepcopy(official)
    with torch.no_grad():
        for name, (whole, scb) in scaled(official).items():
            twin.get_parameter(name).copy_(whole.float() * scb[:, None] / 127)
    return twin


def q8_file(official, path, old):
    """The official model as a released int8 file: embeddings and norms as they are, rows with scales."""
    state = {name: tensor.detach() for name, tensor in official.state_dict().items()}
    scales = {}
    for name, (whole, scb) in scaled(official).items():
        state[name], scales[name] = whole, scb
    state, scales = (old_names(state), old_names(scales)) if old else (state, scales)
    save_file(state | {f"{name}_scb": scb for name, scb in scales.items()}, path)
    return path


@pytest.fixture(scope="session")
def eight(tmp_path_factory):
    """eight(name, dtype) -> (ours quantized, the official model, its dequantized twin)."""
    made = {}

    def make(name, dtype=torch.float32):
        if (name, dtype) not in made:
            official = official_lm(INT8[name], seed=sum(map(ord, name)), dtype=dtype)
            path = save(official, tmp_path_factory.mktemp("eight") / "moshi.safetensors")
            ours = quantize(load_moshi(path, MoshiConfig.from_dict(INT8[name]), dtype=dtype))
            made[name, dtype] = ours, official, dequantized(official)
        return made[name, dtype]

    return make


def linears(model):
    """The modules of ours that may be int8."""
    return [
        part for part in model.modules() if isinstance(part, (torch.nn.Linear, CodebookLinear, Int8Linear))
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", INT8)
def test_int8_is_the_dequantized_model(eight, name):
    """All linear maps are int8 and nothing else; logits, whole and by the step, are those of the official
    model with dequantized weights, and rounding has cost something."""
    ours, official, twin = eight(name)
    assert all(isinstance(part, Int8Linear) for part in linears(ours))
    assert sum(part.weight.numel() for part in linears(ours)) == sum(
        w.numel() for w, _ in scaled(official).values()
    )
    tokens = torch.randint(24, (2, 1 + INT8[name]["n_q"], 40))
    logits, expected = ours.temporal(tokens)[1], twin.forward_text(tokens)[1][:, 0]
    close(logits, expected, 2e-6)
    assert 1e-3 < error(logits, official.forward_text(tokens)[1][:, 0]) < 0.1
    state = init_state(ours, 2)
    steps = torch.cat([ours.temporal(tokens[..., s : s + 1], state)[1] for s in range(40)], dim=1)
    close(steps, expected, 2e-6)
    if ours.depth_decoder is not None:
        hidden = torch.randn(2, 40, ours.config.dim)
        close(ours.depth(hidden, tokens), twin.forward_depformer_training(tokens, hidden), 2e-6)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", INT8)
def test_int8_sampler(eight, name, greedy):
    """Token for token the official sampler on dequantized weights, in float32, past the window."""
    ours, _, twin = eight(name)
    user = torch.randint(24, (2, INT8[name]["n_q"] - INT8[name]["dep_q"], 80))
    torch.manual_seed(4)
    sampler = MoshiGen(ours, 2, greedy=greedy)
    mine = [sampler.step(step) for step in user.split(1, dim=-1)]
    torch.manual_seed(4)
    sampler = LMGen(twin, use_sampling=not greedy)
    with sampler.streaming(2):
        theirs = [sampler.step(step) for step in user.split(1, dim=-1)]
    assert [step is None for step in mine] == [step is None for step in theirs]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs) if a is not None)


@torch.no_grad()
@pytest.mark.parametrize("name", INT8)
def test_int8_in_bfloat16(eight, name):
    """In bfloat16, where torch's kernel runs, a step is as near to the float32 truth as the official model
    with dequantized weights in bfloat16 is, to within 2.5 times: the scales are rounded as well."""
    ours, _, twin = eight(name, torch.bfloat16)
    tokens = torch.randint(24, (1, 1 + INT8[name]["n_q"], 40))
    state = init_state(ours, 1)
    steps = torch.cat([ours.temporal(tokens[..., s : s + 1], state)[1] for s in range(40)], dim=1)
    truth = copy.deepcopy(twin).float().forward_text(tokens)[1][:, 0]
    mine, theirs = (
        (logits.float() - truth).square().mean().sqrt()
        for logits in (steps, twin.forward_text(tokens)[1][:, 0])
    )
    close(steps.float(), truth, 0.05)
    assert mine <= 2.5 * theirs


@pytest.mark.parametrize("rows", [1, 3, 4, 16, 17, 50])
@pytest.mark.parametrize("width", [16, 40, 48, 64])
def test_the_int8_product(rows, width):
    """Any number of rows and any width, also where torch's kernel would return garbage or crash: widths that
    are no multiple of 16, weights that lie anywhere in memory, rows that are no neighbours."""
    torch.manual_seed(rows * width)
    weight, x = torch.randn(40, width).bfloat16(), torch.randn(width, rows).bfloat16().T
    linear = Int8Linear(weight)
    expected = x.double() @ (linear.weight.double() * linear.weight_scb.double()[:, None] / 127).T
    for place in (0, 1, 8):
        memory = torch.zeros(40 * width + 64, dtype=torch.int8)
        start = place + -memory.data_ptr() % 16
        linear.weight = memory[start : start + 40 * width].view(40, width).copy_(linear.weight)
        for dtype, bound in ((torch.bfloat16, 0.01), (torch.float32, 1e-6), (torch.float16, 2e-3)):
            product = linear(x.to(dtype))
            assert product.dtype == dtype and product.shape == (rows, 40)
            assert error(product, expected) < bound, (place, dtype)
        assert linear(x.T.T[None]).shape == (1, rows, 40)


def test_int8_uses_the_kernel(eight, monkeypatch):
    """On the CPU in bfloat16 a step never turns the weights into floats, where their width allows it."""
    ours, _, _ = eight("sixteens", torch.bfloat16)
    called, kernel = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *given: called.append(1) or kernel(*given))
    sampler = MoshiGen(ours)
    sampler.step(torch.zeros(1, 3, 1, dtype=torch.long))
    config = ours.config
    helium, depth = 4 * config.num_layers + 1, 2 + 4 * config.depformer_num_layers
    assert len(called) == helium + config.dep_q * depth


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "gqa_wide", "stt"])
def test_bitsandbytes(eight, name):
    """What the official package would say if it could run its own int8 files: bitsandbytes rounds the inputs
    to int8 as well, and stays within 1 % of the peak."""
    pytest.importorskip("bitsandbytes")
    ours, official, _ = eight(name)
    theirs = copy.deepcopy(official)
    official_quantize.replace_linear_with_qlinear(theirs)
    tensors = theirs.state_dict()
    for key, (whole, scb) in scaled(official).items():
        assert torch.equal(tensors[key], whole) and torch.equal(tensors[f"{key}_scb"], scb), key
    tokens = torch.randint(24, (2, 1 + INT8[name]["n_q"], 40))
    close(ours.temporal(tokens)[1], theirs.forward_text(tokens)[1][:, 0].float(), 0.01)


@pytest.mark.parametrize("old", [False, True], ids=["newer", "older"])
@pytest.mark.parametrize("name", INT8)
def test_int8_files(eight, tmp_path, name, old):
    """A released int8 file opens as it is, whatever the config says; what save_moshi writes has the same
    tensors. Floats become the same int8, while they are loaded or afterwards."""
    for dtype in (torch.float32, torch.bfloat16):
        quantized, official, _ = eight(name, dtype)
        path = q8_file(official, tmp_path / "q8.safetensors", old)
        config = MoshiConfig.from_dict({**INT8[name], "quantize": True})
        models = [load_moshi(path, config, dtype=dtype), load_moshi(path, config, dtype=None)]
        floats = save(official, tmp_path / "floats.safetensors", old)
        if dtype == torch.bfloat16:
            models += [
                load_moshi(floats, config, dtype=torch.int8),
                load_moshi(path, config, dtype=torch.int8),
            ]
        for model in models:
            for key, tensor in model.state_dict().items():
                expected = quantized.state_dict()[key]
                assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), key
                assert tensor.dtype != torch.int8 or tensor.data_ptr() % 16 == 0, "torch's kernel would crash"
        save_moshi(models[0], tmp_path / "again.safetensors")
        again, whole = load_file(tmp_path / "again.safetensors"), scaled(official)
        names = {**official.state_dict(), **{f"{key}_scb": scb for key, (_, scb) in whole.items()}}
        assert again.keys() == names.keys()
        for key, tensor in again.items():
            assert torch.equal(tensor, whole[key][0] if key in whole else names[key]), key


def test_an_int8_folder(call, meeting, tmp_path):
    """A saved int8 model is a folder that opens as one, in the program too; and --dtype int8 makes one."""
    folder = make_folder(tmp_path / "voice", dim=64)
    checkpoint = load_checkpoint(folder, dtype=torch.bfloat16)
    eight = tmp_path / "eight"
    save_checkpoint(eight, Checkpoint(quantize(checkpoint.moshi), *checkpoint[1:]))
    assert json.loads((eight / "config.json").read_text())["quantize"] is True
    moshi = load_checkpoint(eight, dtype=torch.bfloat16).moshi
    assert moshi.text_linear.weight.dtype == torch.int8 and moshi.text_emb.weight.dtype == torch.bfloat16
    sounds = []
    for place, dtype in ((folder, "int8"), (eight, "bfloat16"), (eight, "int8")):
        code, out, err = call(place, meeting, "--dtype", dtype, "-o", "a.wav", "--extra-seconds", 1)
        assert code == 0, err
        sounds.append((tmp_path / "a.wav").read_bytes())
    assert sounds[0] == sounds[1] == sounds[2]
    save_checkpoint(tmp_path / "back", load_checkpoint(folder))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantize"] is False


def test_broken_int8_files(eight, tmp_path):
    """Rows without scales, scales without rows, scales that lost their precision: it says which."""
    _, official, _ = eight("small")
    config = MoshiConfig.from_dict(INT8["small"])
    good, path = load_file(q8_file(official, tmp_path / "q8.safetensors", True)), tmp_path / "bad.safetensors"
    name = "transformer.layers.1.self_attn.in_proj_weight"
    linear = "depformer.layers.0.gating.1.linear_in.weight"
    wrong = [
        {k: v for k, v in good.items() if k != f"{name}_scb"},
        {k: v for k, v in good.items() if k != f"{linear}_scb"},
        {k: v for k, v in good.items() if k != linear},
        {**good, f"{name}_scb": good[f"{name}_scb"].bfloat16()},
        {**good, f"{name}_scb": good[f"{name}_scb"][:-1].clone()},
        {**good, f"{linear}_scb": good[f"{linear}_scb"] * float("nan")},
        {**good, linear: good[linear].float()},
        {**good, "text_emb.weight_scb": torch.ones(41)},
        {**good, "out_norm.alpha": good["out_norm.alpha"].to(torch.int8)},
    ]
    for tensors in wrong:
        save_file(tensors, path)
        with pytest.raises(ValueError, match="bad.safetensors.*(weight|alpha)") as caught:
            load_moshi(path, config)
        assert "\n" not in str(caught.value)


def test_a_row_of_zeros():
    """Has no largest weight to divide by."""
    linear = Int8Linear(torch.stack([torch.zeros(16), torch.ones(16)]))
    assert linear(torch.ones(1, 16)).tolist() == [[0.0, pytest.approx(16)]]


PEAK = """
import json, sys, torch
from moshi_min import MoshiConfig, load_moshi
def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
small, config = (MoshiConfig.from_dict(json.loads(text)) for text in sys.argv[3:5])
dtype = getattr(torch, sys.argv[5])
load_moshi(sys.argv[1], small, dtype=dtype)
before = peak()
moshi = load_moshi(sys.argv[2], config, dtype=dtype)
print(peak() - before, sum(tensor.nbytes for tensor in moshi.state_dict().values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux gives it")
@pytest.mark.parametrize("kind, copies", [("floats", 12), ("int8", 2)])
def test_int8_takes_little_memory_to_load(tmp_path, kind, copies):
    """Quantized while it loads, or read from an int8 file: at most the model and a few copies of its largest
    tensor are in memory at a time, of a file of twice its size."""
    config = lm_config(
        dim=1024,
        num_heads=8,
        num_layers=12,
        n_q=4,
        dep_q=2,
        delays=[0] * 5,
        card=512,
        text_card=2000,
        depformer_dim=256,
    )
    for name, lm in (("small", LM["small"]), ("large", config)):
        state = loaders.get_moshi_lm(None, lm, device="meta").state_dict()
        state = {key: torch.full(tensor.shape, 0.01, dtype=torch.bfloat16) for key, tensor in state.items()}
        if kind == "int8":
            for key in [key for key, tensor in state.items() if tensor.dim() == 2 and "emb" not in key]:
                state |= {key: state[key].to(torch.int8), f"{key}_scb": torch.ones(len(state[key]))}
        save_file(state, tmp_path / name)
    command = [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"]
    command += [json.dumps(LM["small"]), json.dumps(config), "int8" if kind == "floats" else "bfloat16"]
    give_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # else glibc keeps 40 to 270 MB of holes
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=give_back)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    largest = 2 * int(4.125 * 1024) * 2 // 3 * 1024  # numbers of the feed-forward's first matrix
    print(
        f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of int8, its largest matrix {largest / 1e6:.0f} million"
    )
    assert size > 1.5e8 and peak < size + copies * largest  # with the whole file it is twice that


# ---- histories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delays", [(0,) + 2 * (0, 1, 1), (0,) * 7, (1, 0, 3, 2, 0, 4, 2)])
def test_a_conversation_goes_on(delays):
    """The loop after a prefill gives what one long conversation would, and the first frame goes in once."""
    torch.manual_seed(0)
    mimi = random_mimi(MIMI)
    moshi = random_moshi(MoshiConfig(**{**vars(MOSHI), "n_q": 6, "dep_q": 3, "delays": delays}))
    mimi.num_codebooks = 3
    frames, past, wait = torch.randn(40, 1, 1, mimi.frame_size) * 0.3, 25, max(delays)
    heard, said, _ = zip(*generate.converse(mimi, MoshiGen(moshi, greedy=True), frames))
    user = torch.cat([codes for codes in heard if codes is not None], dim=-1)
    text = torch.cat([codes for codes in said if codes is not None], dim=-1)
    gen, given = MoshiGen(moshi, greedy=True), iter(user[..., past:].split(1, dim=-1))
    first = gen.prefill(torch.cat([text[..., :past], user[..., :past]], dim=1))
    rest = list(generate.converse(mimi, gen, frames[past:], change=lambda _: next(given)))
    again = torch.cat([first] + [said for _, said, _ in rest], dim=-1)
    assert torch.equal(again, text[..., past - wait :][..., : again.shape[-1]])
    assert len(rest) == 40 - past and all(codes is not None for codes, _, _ in rest)


@pytest.mark.parametrize("kind", ["voice", "stt", "delayed"])
def test_history(call, meeting, stt_folder, tmp_path, kind):
    """--history takes what --tokens has saved; all of it is saved again, and what follows comes from it: the
    loop is given the model after `prefill`."""
    folder = stt_folder
    if kind != "stt":
        sizes = {} if kind == "voice" else {"delays": (0, *range(8), *range(8))}
        folder = make_folder(tmp_path / "folder", **sizes)
    output = () if kind == "stt" else ("-o", "a.wav")
    options = (*output, "--greedy", "--extra-seconds", 0.5)
    assert call(folder, meeting, *options, "--tokens", "one.npz")[0] == 0
    code, _, err = call(folder, meeting, *options, "--tokens", "two.npz", "--history", "one.npz")
    assert code == 0, err
    one, two = (np.load(tmp_path / name)["codes"] for name in ("one.npz", "two.npz"))
    own = 1 if kind == "stt" else 9
    past = np.flatnonzero((one[:own] >= 0).all(0))[-1] + 1
    assert two.shape[1] == past + one.shape[1] and past == one.shape[1] - (6 if kind == "delayed" else 0)
    assert (two[:, :past] == one[:, :past]).all()
    assert call(folder, meeting, *options, "--tokens", "three.npz", "--history", "two.npz")[0] == 0
    # Greedy, and with the same codes heard, the model itself says what follows.
    gen = MoshiGen(load_checkpoint(folder).moshi, greedy=True)
    said = [gen.prefill(torch.as_tensor(two[None, :, :past]).long())]
    said += [gen.step(torch.as_tensor(two[None, own:, [f]]).long()) for f in range(past, two.shape[1])]
    said = torch.cat(said, dim=-1)[0].numpy()[:, gen.max_delay :]  # from frame `past` on
    there = two[:own, past:]
    assert (said[:, : there.shape[1]][there[:, : said.shape[1]] >= 0] == there[there >= 0]).all()
    assert (there >= 0).sum() > 100 if own > 1 else len(set(there[0])) > 5


def test_wrong_histories(call, meeting, stt_folder, tmp_path):
    """One line that names the file."""
    folder = make_folder(tmp_path / "voice")
    good = np.zeros((17, 20), np.int64)
    wrong = {
        "missing.npz": None,
        "empty.npz": b"",
        "sound.npz": meeting.read_bytes(),
        "half.npz": "half",
        "other.npz": {"tokens": good},
        "streams.npz": {"codes": good[:8]},
        "flat.npz": {"codes": good[0]},
        "floats.npz": {"codes": good.astype(float)},
        "objects.npz": {"codes": np.array([[{}]])},
        "none.npz": {"codes": good - 1},
        "nothing.npz": {"codes": good[:, :0]},
        "large.npz": {"codes": good + 64},
        "small.npz": {"codes": np.concatenate([good[:16], good[16:] - 2])},
        "text.npz": {"codes": np.concatenate([good[:1] + 320, good[1:]])},
        "brief.npz": {"codes": good[:, :1]},
    }
    for name, content in wrong.items():
        if isinstance(content, dict):
            np.savez(tmp_path / name, **content)
        elif content == "half":
            np.savez(tmp_path / name, codes=good)
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
        elif content is not None:
            (tmp_path / name).write_bytes(content)
        code, out, err = call(folder, meeting, "-o", "a.wav", "--history", name)
        assert code == 2 and name in err and err.count("\n") == 1, (name, code, err)
        assert not (tmp_path / "a.wav").exists()
    np.savez(tmp_path / "good.npz", codes=good)
    assert call(folder, meeting, "-o", "a.wav", "--history", "good.npz", "--extra-seconds", 0)[0] == 0
