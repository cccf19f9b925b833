"""Checks an exercise of LESSONS.md: `python lessons/check.py LESSON`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lessons.lab import strips  # noqa: E402
from mimi_min import CausalConv1d, Mimi, MimiConfig, ResidualQuantizer, official_names  # noqa: E402
from moshi_min import MOSHI_NAMES, DepthDecoder, Moshi, MoshiConfig, delay, gated_width  # noqa: E402

SMALL = {
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "context": 10,
    "card": 40,
    "text_card": 50,
    "depformer_dim": 16,
    "depformer_num_layers": 2,
    "depformer_num_heads": 2,
    "depformer_dim_feedforward": 48,
}


def lesson_0(my):
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁six", "teen", "▁two", "▁", "x"]
    for text, expected, hint in (
        ([3, 3, 0, 4, 3], [(0.24, "six")], "one word, in frame 3"),
        ([4, 5, 3, 0, 6], [(0, "sixteen"), (0.32, "two")], "two tokens may be one word"),
        ([3, 4, 3, 5, 6], [(0.08, "sixteen"), (0.32, "two")], "PAD may stand inside a word"),
        ([4, 4, 6], [(0, "six"), (0.08, "six"), (0.16, "two")], "each '▁' begins a word"),
        ([5, 7, 8, 8], [(0.08, "xx")], "'teen' has no word before it; a word may begin with an empty piece"),
        ([3, 0, 3], [], "PAD and EPAD are no words"),
    ):
        found = my.timed_words(torch.tensor(text), pieces)
        same = [word for _, word in found] == [word for _, word in expected]
        assert same and all(abs(a[0] - b[0]) < 1e-6 for a, b in zip(found, expected)), (
            f"{hint}: {text} says {expected}, not {found}"
        )


def lesson_1(my):
    packed = my.pack(torch.tensor([[1, 0], [2, 7]]), 8)
    assert bytes(packed) == bytes([0b00101000, 0b01110000]), "1, 2, 0, 7 are 001 010 000 111, then zeros"
    rates = (8, 2048, 1100), (32, 2048, 4400), (8, 256, 800), (3, 1000, 375), (2, 2, 25)
    for codebooks, size, bits in rates:
        codes = torch.randint(size, (codebooks, 50))  # 4 s
        codes[0, 0] = size - 1
        packed = my.pack(codes, size)
        assert len(packed) == -(-4 * bits // 8), f"4 s of {codebooks} codebooks of {size} are {4 * bits} bits"
        again = my.unpack(packed, codebooks, 50, size)
        assert again.shape == codes.shape and torch.equal(again, codes), f"other codes come out at {size}"


def lesson_2(my):
    for kernel, c_in, c_out in ((1, 2, 3), (3, 1, 1), (7, 4, 2)):
        conv = CausalConv1d(c_in, c_out, kernel, bias=False)
        x = torch.randn(2, c_in, 19)
        y = my.causal_conv(x, conv.conv.weight)
        assert y.shape == (2, c_out, 19), "one output for each input"
        assert torch.allclose(y, conv(x), atol=1e-5), f"a kernel of {kernel} gives other numbers"


def lesson_3(my):
    assert my.receptive_field([(7, 1)]) == 7, "a kernel of 7 sees 7 samples"
    assert my.receptive_field([(3, 1), (3, 1)]) == 5, "two kernels of 3 see 5 samples"
    mimi = Mimi(
        MimiConfig(
            n_filters=2,
            dimension=16,
            num_layers=1,
            num_heads=2,
            dim_feedforward=16,
            bins=8,
            quantizer_dimension=4,
        )
    )
    convs = [part for part in mimi.encoder.modules() if isinstance(part, CausalConv1d)]
    x = torch.zeros(1, 1, 9600, requires_grad=True)
    for part in mimi.parameters():
        torch.nn.init.uniform_(part, 0.1, 1)  # all positive, so that nothing cancels
    mimi.encoder(x)[0, :, -1].sum().backward()
    measured = int((x.grad != 0).sum())
    assert my.receptive_field([(conv.kernel, conv.stride) for conv in convs]) == measured, (
        f"SEANet's last vector depends on {measured} samples"
    )


def lesson_4(my):
    quantizer = ResidualQuantizer(MimiConfig(bins=16, quantizer_dimension=6, dimension=16), 4)
    z = torch.randn(1, 16, 11)
    x = quantizer.input_proj(z)[0].T
    codes = my.residual_quantize(x.detach(), [codebook.centroids for codebook in quantizer.codebooks])
    assert codes.shape == (4, 11), f"codes are [codebooks, frames], here [4, 11], not {list(codes.shape)}"
    expected = quantizer.encode(z, 4)[0]
    assert torch.equal(codes[0], expected[0]), "the first codebook's are not the nearest entries"
    assert torch.equal(codes, expected), "the first codebook is right; what do the others quantize?"


def lesson_5(my):
    assert my.slot_positions(2, 5).tolist() == [0, 1, 2, -1, -1], "slots 3 and 4 are still empty"
    assert my.slot_positions(6, 5).tolist() == [5, 6, 2, 3, 4], "5 and 6 have overwritten 0 and 1"
    for last in range(20):
        ring = torch.full((7,), -1)
        for position in range(last + 1):
            ring[position % 7] = position
        assert torch.equal(my.slot_positions(last, 7), ring), f"wrong at last = {last}"


def lesson_6(my):
    for dim, repeat in ((32, 1), (64, 2)):
        config = MoshiConfig(**{**SMALL, "dim": dim, "kv_repeat": repeat})
        with torch.device("meta"):
            layers = Moshi(config).transformer
        count = sum(weight.numel() for weight in layers.parameters())
        hidden = gated_width(dim, int(config.hidden_scale * dim))
        assert my.helium_parameters(dim, config.num_layers, hidden, repeat) == count, f"the model has {count}"
    assert my.helium_parameters(4096, 32, 11264, 1) == 6_576_930_816, "the released one has 6,576,930,816"


def lesson_7(my):
    assert my.put_words([(2, [11])], 5).tolist() == [3, 0, 11, 3, 3], "EPAD, the token, PAD elsewhere"
    assert my.put_words([(0, [11, 12]), (2, [13]), (5, [14])], 7).tolist() == [11, 12, 13, 3, 0, 14, 3], (
        "no EPAD where a token stands, none before the first frame"
    )
    assert my.put_words([(3, [11, 12, 13])], 5).tolist() == [3, 3, 0, 11, 12], "what does not fit falls off"


def lesson_8(my):
    config = MoshiConfig(**SMALL)
    decoder = DepthDecoder(config)
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    text, audio = torch.randint(50, (3,)), torch.randint(40, (8, 3))
    expected = torch.stack([text, *audio[:-1]])
    before = my.depth_inputs(text, audio)
    hidden = torch.randn(3, 32)
    assert before.shape == (8, 3), "one token before each of the 8 codebooks"
    assert torch.equal(decoder(hidden, before), decoder(hidden, expected)), (
        "the depth decoder reads other tokens"
    )


def lesson_9(my):
    codes, initial = torch.arange(1, 16).view(3, 5), torch.tensor([90, 91, 92])
    for delays in ([0, 0, 1], [2, 0, 1], [0, 0, 0], [4, 1, 3]):
        expected = delay(codes[None], delays, initial)[0]
        found = my.delayed(codes, delays, initial)
        assert torch.equal(found, expected), (
            f"with delays {delays} and initial tokens {initial.tolist()}\n{codes}\nmust not become\n{found}"
        )


def lesson_10(my):
    for delays, own in (((0, 0, 2, 0, 1), 3), ((1, 0, 3, 3, 0), 3), ((0, 2, 1), 2), ((0, 0, 0), 2)):
        for step, (strip, _, frame) in enumerate(strips(delays, own, steps=12)):
            if step > 2 * max(delays):
                mine, heard, said = my.strip(list(delays), own, step)
                where = f"delays {delays}, {own} of them Moshi's, step {step}"
                assert heard == step - 1, f"{where}: frame 0 goes in twice, so not frame {heard} is heard"
                assert said == frame[0], f"{where}: frame {int(frame[0])} comes out, not {said}"
                assert mine.shape == strip.shape, f"{where}: the strip is {list(strip.shape)} large"
                wrong = [stream for stream, row in enumerate(strip) if not torch.equal(mine[stream], row)]
                assert not wrong, f"{where}: the rows {wrong} are wrong in\n{mine}"


def lesson_11(my):
    torch.manual_seed(0)
    model, codes = Moshi(MoshiConfig(**SMALL)), torch.randint(40, (1, 17, 9))
    codes[0, 0, :6] = torch.tensor([3, 0, 17, 3, -1, 21])
    _, parts = model.loss(codes, text_padding_weight=0.3)
    found = my.text_loss(model(codes).text_logits[0, 0], codes[0, 0], 0.3)
    assert torch.allclose(found, parts["text"], atol=1e-5), f"Moshi.loss says {parts['text']:.4f}"


def lesson_12(my):
    with torch.device("meta"):
        names = official_names(Moshi(MoshiConfig(**SMALL)), MOSHI_NAMES)
    layers = {ours: theirs for ours, theirs in names.items() if ours.startswith("transformer.")}
    for ours, theirs in layers.items():
        assert my.official_name(ours) == theirs, f"{ours} is called {theirs}"


def check(lesson: int, my) -> None:
    """AssertionError with a hint unless the functions in `my` solve the exercise."""
    torch.manual_seed(0)
    globals()[f"lesson_{lesson}"](my)


def verdict(lesson: int, my: dict) -> str:
    """What `check` finds, in words, for functions by their names."""
    try:
        check(lesson, SimpleNamespace(**my))
    except NotImplementedError:
        return "not solved yet: write the function"
    except AssertionError as error:
        return f"not yet: {error}"
    return "right"


if __name__ == "__main__":
    import exercises

    if len(sys.argv) != 2 or sys.argv[1] not in map(str, range(13)):
        sys.exit("which lesson? python lessons/check.py 3")
    found = verdict(int(sys.argv[1]), vars(exercises))
    print(found)
    sys.exit(found != "right")
