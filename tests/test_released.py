"""The tests for the released weights, run on random ones in files of the released names, shapes and dtypes.

Nobody should find a mistake in those tests after a download of 15 GB. They are run on a small Moshi, beside a
Mimi of the released size. Of the 7B there is a file with the real header, and holes for the weights.
"""

import dataclasses

import pytest
import test_moshi
import torch
from random_checkpoint import MOSHI, make_full_checkpoint
from reference import loaders, old_names
from safetensors import safe_open

from moshi_min import MIMI_FILE, MOSHI_FILE, MoshiConfig, MoshiGen, load_checkpoint


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder as the released one, but for the weights: Mimi's are random, Moshi's are zeros."""
    torch.manual_seed(5)
    return make_full_checkpoint(tmp_path_factory.mktemp("full"), holes=True)


def test_released_files(full):
    """The files hold the names, shapes and dtypes of the released ones, which are the older names of the
    official package; `load_checkpoint` opens them, with no config.json, in little memory and time."""
    assert sorted(path.name for path in full.iterdir()) == sorted([MOSHI_FILE, MIMI_FILE])
    assert (full / MOSHI_FILE).stat().st_blocks * 512 < 1e6 < 15.3e9 < (full / MOSHI_FILE).stat().st_size
    with torch.device("meta"):
        official = {
            MOSHI_FILE: (loaders.get_moshi_lm(None, device="meta", dtype=torch.bfloat16), "BF16"),
            MIMI_FILE: (loaders.get_mimi(None, device="meta", num_codebooks=32), "F32"),
        }
    for name, (model, dtype) in official.items():
        with safe_open(full / name, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
        expected = {key: list(tensor.shape) for key, tensor in old_names(model.state_dict()).items()}
        assert {key: part.get_shape() for key, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {dtype}
    moshi, mimi, tokenizer, config = load_checkpoint(full)
    assert moshi.config == MoshiConfig() and tokenizer is None and config == {}
    assert sum(parameter.numel() for parameter in moshi.parameters()) == pytest.approx(7.69e9, rel=1e-3)
    assert {parameter.dtype for parameter in moshi.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in mimi.parameters()} == {torch.float32}


def test_the_tests_for_released_weights(full, tmp_path, monkeypatch):
    """They pass on random weights, but for the known answers; those too where they are this model's."""
    config = dataclasses.replace(MOSHI, card=2048, text_card=2500)
    make_full_checkpoint(tmp_path, config)
    (tmp_path / MIMI_FILE).unlink()
    (tmp_path / MIMI_FILE).symlink_to(full / MIMI_FILE)
    monkeypatch.setattr(test_moshi, "CHECKPOINT", str(tmp_path))
    monkeypatch.setattr(test_moshi.os, "sysconf", lambda name: 1 << 20)  # memory enough for any model
    test_moshi.test_released_mimi("cpu")
    test_moshi.test_released_moshi("cpu")
    with pytest.raises(pytest.fail.Exception, match="neither"):
        test_moshi.test_known_answers()
    checkpoint = load_checkpoint(tmp_path, dtype=torch.float32)
    sampler, silence = (
        MoshiGen(checkpoint.moshi, greedy=True),
        checkpoint.mimi.encode(torch.zeros(1, 1, 1920)),
    )
    tokens = torch.cat([sampler.step(silence) for _ in range(11)][1:], -1)[0]
    audio = tokens[1:]
    answer = tokens[0].tolist(), int(audio[:, :9].sum()), audio[:, :2].tolist()
    monkeypatch.setattr(test_moshi, "KNOWN", {"random": answer})
    test_moshi.test_known_answers()
