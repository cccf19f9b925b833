"""A step of Moshi and a frame of the codec can be captured as a CUDA graph: shown without a GPU.

Two kinds of proof (both were broken on purpose, see mutations.py):
- On the meta device tensors have no values, so whatever asks for one raises. There, at the released sizes,
  each step is seen to run the same operators with the same numbers on the same memory as the step before.
- On the CPU a step is written down once, and the record is run again in place of Python, as a GPU replays a
  graph. It must say what eager steps say.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from recorder import PaperGraph, Recorder, listing, record
from reference import LM, MIMI, close, lm_config, official_lm, official_mimi, save

from mimi_min import Mimi, MimiConfig, Transformer, init_state, load_mimi, reset_state
from moshi_min import Moshi, MoshiConfig, MoshiGen, captured, load_moshi

# Delays of every kind, and grouped queries in both transformers.
UNEVEN = lm_config(kv_repeat=2, depformer_kv_repeat=2, delays=[1, 0, 3, 2, 0, 4, 2])


def whole_rings(model):
    """The CPU attends only to the filled slots of a ring, and reads their number for that. From now on this
    model takes all of them, as on a GPU."""
    for part in model.modules():
        if isinstance(part, Transformer):
            part.attend_filled = False
    return model


# ---- the recorder itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda x: x.sum().item(), "the host reads a value"),
        (lambda x: bool((x > 0).any()), "the host reads a value"),
        (lambda x: x[x > 0], "a mask as an index"),
        (lambda x: x.nonzero(), "the host reads a value"),
        (lambda x: x.index_put_((x > 0,), x.new_zeros(())), "a mask as an index"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), "a tensor of Python's numbers"),
        (lambda x: x.to("meta"), "tensors of two devices"),
        (lambda x: torch.equal(x, x), "the host reads a value"),
    ],
)
def test_what_a_capture_refuses(function, said):
    """Values on the host, sizes that depend on values, numbers or tensors from elsewhere."""
    x = torch.randn(3)
    function(x)
    with pytest.raises(RuntimeError, match=said), Recorder():
        function(x)


def test_a_graph_on_paper():
    """Recording changes nothing; a replay is a call, with views, writes, random numbers and two results."""
    total, x = torch.zeros(2, 3), torch.zeros(3)

    def function():
        total[1].add_(x.view(3, 1)[:, 0])
        total[0] += torch.empty_like(x).exponential_(1)
        best, where = total.sort(dim=1)
        return best, where.clamp(max=1)

    def run(step):
        total.zero_()
        torch.manual_seed(3)
        outputs = []
        for n in range(5):
            x.copy_(torch.tensor([n, 5.0 - n, 1.0]))
            outputs += [tensor.clone() for tensor in step()]
        return [*outputs, total.clone(), torch.rand(2)]

    def replay():
        graph.replay()
        return static

    expected, graph = run(function), PaperGraph()
    before, random = total.clone(), torch.get_rng_state()
    with record(graph):
        static = function()
    assert torch.equal(total, before) and torch.equal(torch.get_rng_state(), random)
    assert static[0].isnan().all(), "a capture runs nothing"
    assert all(torch.equal(a, b) for a, b in zip(expected, run(replay)))


def test_a_listing_tells_calls_apart():
    """By a number, by the memory, by a size; and it is the same where nothing changes."""
    x = torch.zeros(4, device="meta")
    kept = {"n": 0, "x": x}

    def counts():
        kept["n"] += 1
        return x + kept["n"]

    def moves():
        kept["x"] = kept["x"] + 1

    def grows():
        kept["n"] += 1
        return x[: kept["n"]] * 2

    for function, same in ((lambda: x.add_(1), True), (counts, False), (moves, False), (grows, False)):
        kept["n"], names = 0, {}
        assert (listing(function, names) == listing(function, names)) == same


# ---- no values: the meta device ----------------------------------------------------------------------------


def same_each_time(function, times=4):
    """Each call does what the first one does. Returns how many operators that are."""
    names = {}
    first = listing(function, names)
    for _ in range(times - 1):
        again = listing(function, names)
        for number, (a, b) in enumerate(zip(first, again)):
            assert a == b, f"operator {number} is not the same in each call:\n{a}\n{b}"
        assert len(first) == len(again)
    return len(first)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("config", [None, UNEVEN, LM["all_own"]], ids=["7B", "uneven", "all_own"])
def test_every_step_is_the_same(config, greedy):
    """Steps of Moshi at the released size and of small ones, after the first max(delays) that say nothing."""
    with torch.device("meta"):
        moshi = Moshi(MoshiConfig.from_dict(config) if config else MoshiConfig()).to(torch.bfloat16)
    batch = 1 if config is None else 2
    sampler = MoshiGen(moshi, batch, greedy=greedy)
    user = sampler.strip.new_empty(batch, 1 + sampler.config.n_q - sampler.own, 1)
    text, audio = user.new_empty(batch), user.new_empty(batch, sampler.own - 1)
    for _ in range(sampler.max_delay):
        assert sampler.step(user, text, audio) is None
    count = same_each_time(lambda: sampler.step(user, text, audio))
    assert count > 500


@pytest.mark.parametrize("codebooks", [8, 32])
def test_every_frame_is_the_same(codebooks):
    """Frames of the codec at its released size, there and back."""
    with torch.device("meta"):
        mimi = Mimi(MimiConfig()).requires_grad_(False)
    mimi.num_codebooks = codebooks
    state = init_state(mimi, 2)
    pcm = torch.empty(2, 1, mimi.frame_size, device="meta")
    codes = torch.empty(2, codebooks, 1, dtype=torch.long, device="meta")
    assert same_each_time(lambda: mimi.encode(pcm, state)) > 200
    assert same_each_time(lambda: mimi.decode(codes, state)) > 200


# ---- no Python: a graph on paper ---------------------------------------------------------------------------


GPU = SimpleNamespace(type="cuda")  # what `captured` believes the device to be


@pytest.fixture
def graphs(monkeypatch):
    """Graphs are on paper. A list of those that `captured` makes."""
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(PaperGraph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


class PaperGen(MoshiGen):
    """A sampler on the CPU that captures its second step, on paper, and replays it."""

    def __init__(self, moshi, batch_size):
        super().__init__(moshi, batch_size)
        self._run = captured(self._step, GPU)


def talk(sampler, user, texts=None, audios=None):
    """What each step gives. User codes [B, n_user, S], forced texts [B, S] and audios [B, dep_q, S]."""
    given = [None if forced is None else forced.unbind(-1) for forced in (texts, audios)]
    steps = user.split(1, dim=-1)
    return [sampler.step(step, *(f and f[s] for f in given)) for s, step in enumerate(steps)]


def test_replayed_steps_say_what_eager_ones_say(graphs, tmp_path):
    """300 sampled steps, many times round the ring, some tokens forced; then the same sampler after reset(),
    after a prefill, and one that is prefilled before its first step. The eager ones attend to the filled
    slots alone. Outputs are compared at the end, so each must be a tensor of its own."""
    path = save(official_lm(UNEVEN, seed=4), tmp_path / "moshi.safetensors")
    moshi = load_moshi(path, MoshiConfig.from_dict(UNEVEN), dtype=torch.float32)
    batch, steps, own = 2, 300, 1 + UNEVEN["dep_q"]
    sizes = torch.tensor([UNEVEN["text_card"]] + [UNEVEN["card"]] * UNEVEN["n_q"])[:, None]
    codes = (torch.rand(batch, len(sizes), steps) * sizes).long()
    user, history = codes[:, own:], codes[..., :9]
    forced = torch.where(torch.rand(batch, own, steps) < 0.2, codes[:, :own], -2)
    forced[..., 100:200] = -2

    def conversations(make):
        torch.manual_seed(7)
        sampler, fresh = make(moshi, batch), make(moshi, batch)
        said = talk(sampler, user, forced[:, 0], forced[:, 1:])
        sampler.reset()
        said += talk(sampler, user[..., :30])
        sampler.reset()
        for prefilled in (sampler, fresh):
            said += [prefilled.prefill(history), *talk(prefilled, user[..., :40])]
        return said

    eager = conversations(MoshiGen)
    whole_rings(moshi)
    replayed = conversations(PaperGen)
    assert len(graphs) == 2 and all(len(graph.calls) > 300 for graph in graphs)
    assert [step is None for step in eager] == [step is None for step in replayed]
    wrong = [s for s, (a, b) in enumerate(zip(eager, replayed)) if a is not None and not torch.equal(a, b)]
    assert not wrong, f"{len(wrong)} of {len(eager)} steps differ, the first is {wrong[0]}"
    tokens = torch.cat([step for step in replayed if step is not None], -1)
    assert all(len(stream.unique()) > 10 for stream in tokens.transpose(0, 1)), "it says hardly anything"


@pytest.mark.parametrize("name", ["small", "odd"])
def test_replayed_frames_are_eager_ones(graphs, tmp_path, name):
    """Encoder and decoder by turns, a batch of two, many times past the window: 2 or 3 positions of the
    transformers in a frame, windows of 5 frames and of 2 and a third. Then from the start again."""
    path = save(official_mimi(MIMI[name], seed=5), tmp_path / "mimi.safetensors")
    mimi = load_mimi(path, MimiConfig.from_dict(MIMI[name]), MIMI[name]["quantizer"]["n_q"])
    pcm = torch.randn(2, 1, 40 * mimi.frame_size) * 0.3
    frames = pcm.split(mimi.frame_size, dim=-1)
    state = init_state(mimi, 2)
    eager_codes = [mimi.encode(frame, state) for frame in frames]
    eager_sound = [mimi.decode(codes, state) for codes in eager_codes]
    state = init_state(whole_rings(mimi), 2)
    encode = captured(lambda frame: mimi.encode(frame, state), GPU)
    decode = captured(lambda codes: mimi.decode(codes, state), GPU)
    for _ in range(2):
        pairs = [(encode(frame), decode(codes)) for frame, codes in zip(frames, eager_codes)]
        codes, sound = (torch.cat(parts, -1) for parts in zip(*pairs))
        close(sound, torch.cat(eager_sound, -1))
        # Attending to all slots rounds otherwise than to some: a code may be a tie.
        assert (codes == torch.cat(eager_codes, -1)).float().mean() > 0.99
        reset_state(state)
    assert len(graphs) == 2 and all(len(graph.calls) > 50 for graph in graphs)


def test_graphs_where_there_is_a_gpu(device, tmp_path):
    """What `pytest -m cuda` adds to the paper: captured is eager, bit for bit, for the codec at its released
    size and for a sampler with the released vocabularies. (On the CPU both are the same function.)"""
    path = save(official_mimi(MIMI["released"], seed=6, num_codebooks=8), tmp_path / "mimi.safetensors")
    mimi = load_mimi(path, device=device)
    frames = (torch.randn(2, 1, 12 * mimi.frame_size, device=device) * 0.3).split(mimi.frame_size, dim=-1)
    said = []
    for graph in (True, False):
        state = init_state(mimi, 2)
        encode = captured(lambda frame, state=state: mimi.encode(frame, state), frames[0].device, graph)
        decode = captured(lambda codes, state=state: mimi.decode(codes, state), frames[0].device, graph)
        said.append([])
        for _ in range(2):
            codes = [encode(frame) for frame in frames]
            said[-1] += codes + [decode(code) for code in codes]
            reset_state(state)
    assert all(torch.equal(a, b) for a, b in zip(*said))

    sizes = {
        "text_card": 32000,
        "card": 2048,
        "dim": 64,
        "depformer_dim": 64,
        "depformer_dim_feedforward": 264,
    }
    moshi = Moshi(MoshiConfig.from_dict(lm_config(**sizes))).eval().to(device)
    user = torch.randint(2048, (1, 3, 30), device=device)
    said = []
    for graph in (True, False):
        torch.manual_seed(8)
        said.append(talk(MoshiGen(moshi, cuda_graph=graph), user))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*said))


def test_what_captured_refuses(graphs, monkeypatch):
    """Another shape is an error that names both; a capture that fails says how to do without; off, it is the
    function itself."""

    def double(x):
        return 2 * x

    replay = captured(double, GPU)
    for x in (torch.ones(2), torch.zeros(2), torch.full((2,), 3.0)):
        assert torch.equal(replay(x), 2 * x)
    with pytest.raises(ValueError, match=r"\[2\].*\[1\]"):
        replay(torch.ones(1))
    assert captured(double, GPU, cuda_graph=False) is double
    assert captured(double, torch.device("cpu")) is double

    def full(graph):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.cuda, "graph", full)
    replay = captured(double, GPU)
    assert torch.equal(replay(torch.ones(1)), torch.full((1,), 2.0)), "the first call captures nothing"
    with pytest.raises(RuntimeError, match="no memory.*cuda_graph=False"):
        replay(torch.ones(1))
