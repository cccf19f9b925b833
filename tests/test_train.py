"""The training in tiny/, each stage for a few steps: that it runs from nothing, and what its parts do."""

import ctypes.util
import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import codec
import evaluate
import heard
import language
import loop
import speech
import voices
from lessons.lab import save_wav
from mimi_min import Codebook, Mimi
from moshi_min import MIMI_FILE, MOSHI_FILE, TOKENIZER_FILE

needs_espeak = pytest.mark.skipif(
    not ctypes.util.find_library("espeak-ng"), reason="espeak-ng is not installed"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint folder to fill."""
    for module in (speech, codec, language, evaluate):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "tiny")
    (tmp_path / "tiny").mkdir()
    return tmp_path / "tiny"


def test_stages_say_what_they_need(folder, tmp_path):
    """A stage without the one before it ends with a line, not a traceback, and writes nothing."""
    for stage, word in (
        (codec.stage_ear, "data"),
        (codec.stage_codec, "data"),
        (codec.stage_voice, "data"),
        (language.stage_heard, "voice"),
        (language.stage_lm, "heard"),
        (evaluate.stage_eval, "lm"),
    ):
        with pytest.raises(SystemExit, match=f"first run: python tiny/train.py {word}"):
            stage(tmp_path)
    assert not list(folder.iterdir())


def test_the_command(tmp_path):
    """`python tiny/train.py` runs from any folder, and tells the stages."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "tiny" / "train.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "{data,ear,codec,voice,heard,lm,eval,all}" in run.stdout and "Each stage" not in run.stderr


def test_what_a_new_codec_makes_invalid(tmp_path):
    """Another ear or codec takes all with it that hangs on its codes; another decoder does not."""
    (tmp_path / "heard").mkdir()
    made = [tmp_path / name.replace("*", "7") for name in ("ear.pt", *codec.AFTER_CODEC)]
    for path in made:
        path.touch()
    loop.forget(tmp_path, *codec.AFTER_CODEC)
    assert [path.name for path in made if path.exists()] == ["ear.pt"]


def test_a_training_that_is_not_over_is_no_start(tmp_path):
    """A later stage takes a training's file only if that came to its end."""
    with pytest.raises(SystemExit, match="first run: python tiny/train.py ear"):
        loop.finished(tmp_path / "ear.pt", "ear")
    with pytest.raises(Interrupted):
        train_a_line(tmp_path / "ear.pt", stop=300)
    with pytest.raises(SystemExit, match="is at 200 of 450 steps; first go on: python tiny/train.py ear"):
        loop.finished(tmp_path / "ear.pt", "ear")
    assert loop.goes_on(tmp_path / "ear.pt", 450) and loop.goes_on(tmp_path / "no.pt", 1)
    train_a_line(tmp_path / "ear.pt")
    assert loop.finished(tmp_path / "ear.pt", "ear") == tmp_path / "ear.pt"
    assert not loop.goes_on(tmp_path / "ear.pt", 450) and loop.goes_on(tmp_path / "ear.pt", 451)


def test_other_sentences_want_other_recordings(tmp_path, monkeypatch):
    """Recordings of sentences that are no more said are not taken for those that are."""
    (tmp_path / "speech").mkdir()
    said = voices.Spoken(np.ones(10, np.int16), [0.0], [0])
    speech.save_chunk(tmp_path / "speech" / "moshi-0.npz", ["one"], [said])
    with pytest.raises(SystemExit, match="the sentences are no more those of .*; remove"):
        speech.stage_data(tmp_path)


@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed")
def test_flite_without_that_voice():
    """It is told; flite would speak in another voice, and say nothing of it."""
    flite = voices.Flite()
    assert "kal" in flite.there and len(flite.say("hello", "kal", 1.0, 100).sound)
    with pytest.raises(SystemExit, match="flite has no voice nobody, only .*kal"):
        flite.say("hello", "nobody", 1.0, 100)


def test_a_make_without_its_voices(tmp_path, monkeypatch, capsys):
    """Data goes on without festival if it has none of the voices that are trained on, and says so."""

    class Silent:
        def say(self, *job):
            return voices.Spoken(np.ones(10, np.int16), [0.0], [0])

    festival = voices.Festival.__new__(voices.Festival)
    festival.voices = []
    (tmp_path / "speech").mkdir()
    monkeypatch.setattr(speech, "Espeak", Silent)
    monkeypatch.setattr(speech, "make_recordings", lambda espeak: None)
    monkeypatch.setattr(speech, "MAKES", {"festival": lambda: festival})
    speech.stage_data(tmp_path, makes=("festival",))
    assert "data: without festival, it will understand fewer people" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("festival"), reason="festival is not installed")
def test_festival_without_that_voice():
    """It is told, and not waited for."""
    try:
        festival = voices.Festival()
    except SystemExit as missing:
        pytest.skip(str(missing))
    with pytest.raises(SystemExit, match="festival has no voice nobody"):
        festival.say("hello", "nobody", 1.0, 100)


class Interrupted(Exception):
    """As by Ctrl-C, but only the test that raises it waits for it."""


def train_a_line(path, stop=None):
    """Trains a linear layer for 450 steps, interrupted at the step `stop`: the layer, the loss curve."""
    torch.manual_seed(1)
    line = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(line.parameters())

    def losses(step):
        if step == stop:
            raise Interrupted
        x = torch.from_numpy(loop.random_numbers(1, step).random((8, 3), np.float32))
        loss = 1000 * (line(x) - x.sum(1, keepdim=True)).pow(2).mean()
        return loss, {"loss": loss} if step > 100 else {}

    settings = {"steps": 450, "highest": 0.1, "warmup": 10, "clip": 1.0, "every": 30}
    return line, loop.train(path, losses, ("loss",), optimizer, {"line": line}, **settings)


def test_training_goes_on(tmp_path):
    """The one loop: it learns, and interrupted after 399 steps it ends where it would have ended anyway."""
    line, history = train_a_line(tmp_path / "whole.pt")
    assert [step for step, _ in history] == list(range(30, 451, 30))
    assert [loss is None for _, loss in history] == [step < 101 for step, _ in history]
    assert history[-1][1] < 0.01 * history[4][1]
    with pytest.raises(Interrupted):
        train_a_line(tmp_path / "halved.pt", stop=399)
    assert torch.load(tmp_path / "halved.pt")["step"] == 200
    again, same = train_a_line(tmp_path / "halved.pt")
    assert same == history and torch.equal(again.weight, line.weight)
    assert train_a_line(tmp_path / "halved.pt", stop=0)[1] == history, "what is done is trained no more"


def test_learning_rate_and_gradients(tmp_path):
    """Up in a line, down along a cosine to 2 %; a gradient too long is cut to its length."""
    rates, layer = [], torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=9)

    def losses(step):
        rates.append(optimizer.param_groups[0]["lr"])
        before.append(torch.cat([parameter.detach().flatten() for parameter in layer.parameters()]).clone())
        return 1e6 * sum(parameter.sum() for parameter in layer.parameters()), {}

    before = []
    loop.train(
        tmp_path / "x.pt", losses, (), optimizer, {}, steps=100, highest=0.5, warmup=5, clip=3.0, every=1000
    )
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], rel=1e-2)
    assert rates[50] == pytest.approx(0.5 * 0.51) and rates[99] == pytest.approx(0.01, rel=0.02)
    moved = (before[1] - before[0]).norm() / rates[0]
    assert moved.item() == pytest.approx(3.0, rel=1e-3)


def test_held_out(monkeypatch):
    """What `eval` asks is never trained: about one phrasing with numbers in ten, but all digits and talk."""
    turns = speech.all_turns()
    asked = [turn for kind in ("sum", "difference", "count") for turn in turns[kind]]
    assert 0.07 < sum(turn.held_out for turn in asked) / len(asked) < 0.13
    assert not any(turn.held_out for turn in turns["talk"] + turns["digit"] + turns["stop"])
    every = {turn.question: turn for those in turns.values() for turn in those}
    drawn = speech.draw_questions(600, np.random.default_rng(1))
    assert not any(every[text].held_out for text in drawn)
    shares = [sum(text in those for text in drawn) / 600 for those in speech.trained_questions().values()]
    assert np.allclose(shares, [speech.KINDS[kind] for kind in turns], atol=0.06)
    said, espeak = [], voices.Espeak.__new__(voices.Espeak)
    monkeypatch.setattr(voices.Espeak, "say", lambda self, *job: said.append(job))
    for seed in range(300):
        espeak.draw("zero", np.random.default_rng(seed))
    assert len({voice for _, voice, _, _ in said}) > 200
    assert not {speed for _, _, speed, _ in said} & {*voices.HELD_OUT_SPEEDS}
    assert not {pitch for _, _, _, pitch in said} & {*voices.HELD_OUT_PITCHES}


def test_phones():
    """Names of phones in all makes' letters become the same numbers; two letters may be one phone."""
    names = [voices.PHONES[number or 0] for number in map(voices.phone_number, ("eɪ", "ˈaɪ", "uː", "ɹ", "ˈ"))]
    assert names == ["EY", "AY", "UW", "R", "_"] and voices.phone_number("ˈ") is None
    assert [voices.PHONES[voices.radio_number(name)] for name in ("ax", "ey", "pau")] == ["AH", "EY", "_"]
    starts, phones = voices.joined(["^", "ˈ", "e", "ɪ", "t", "$"], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    spoken = [(start, voices.PHONES[phone]) for start, phone in zip(starts, phones)]
    assert spoken == [(0.0, "_"), (0.0, "_"), (0.2, "EY"), (0.4, "T"), (0.5, "_")]


def test_trimmed():
    """An utterance without the silence around it, at one level; its phones keep their moments."""
    x = np.zeros(24000)
    x[6000:12000] = 0.001 * np.sin(np.arange(6000))
    said = voices.trimmed(x, [0.0, 0.25, 0.4], [0, 5, 6])
    assert len(said.sound) == pytest.approx(6000 + 240, abs=9) and np.abs(said.sound).max() in (16382, 16383)
    assert said.starts == pytest.approx([0, 0.01, 0.16], abs=1e-3) and said.phones == [0, 5, 6]


@pytest.mark.parametrize("name", voices.MAKES)
def test_labels_fit_the_sound(name):
    """Where a make says that its S is, the sound hisses: more than 0.1 s before or after."""
    try:
        make = voices.MAKES[name]()
    except SystemExit as missing:
        pytest.skip(str(missing))
    hiss = {shift: [] for shift in (-0.1, 0.0, 0.1)}
    for seed in range(5):
        said = make.draw("please say six", np.random.default_rng(seed))
        x = said.sound / 32768
        pieces = x[: len(x) // 240 * 240].reshape(-1, 240)  # of 10 ms
        share = np.diff(pieces).std(1) / (pieces.std(1) + 1e-3)
        for shift, found in hiss.items():
            times = np.arange(len(pieces)) / 100 + shift
            places = np.searchsorted(said.starts, times, side="right") - 1
            phones = np.array(said.phones)[places.clip(min=0)]
            found += share[phones == voices.PHONES.index("S")].tolist()
    before, here, after = (np.mean(found) for found in hiss.values())
    assert here > 1.1 * max(before, after), (before, here, after)


def pitch_of(x):
    """The loudest frequency [Hz] of sound [T]."""
    return np.abs(np.fft.rfft(x)).argmax() * 24000 / len(x)


def test_mouths():
    """Resampled, a voice is higher and shorter; stretched, it is longer and as high."""
    x = np.sin(2 * np.pi * 300 * np.arange(24000) / 24000)
    for factor in (0.8, 1.25):
        faster, longer = heard.resampled(x, factor), heard.stretched(x, factor)
        assert len(faster) == pytest.approx(24000 / factor, abs=2)
        assert pitch_of(faster) == pytest.approx(300 * factor, abs=2)
        assert len(longer) == pytest.approx(24000 * factor, abs=2)
        assert pitch_of(longer) == pytest.approx(300, abs=4)
        assert longer[2000:-4000].std() == pytest.approx(x.std(), rel=0.1)


def test_microphones():
    """Sound in -1..1, as long as before; noise over all or only under the speech; or nothing but a gain."""
    x, speaks = np.zeros((2, 30720), np.float32)
    x[9600:19200] = 0.3 * np.sin(np.arange(9600) / 20)
    speaks[9600:19200] = 1
    before, trimmed, plain = [], 0, 0
    for seed in range(60):
        way = heard.Microphone(np.random.default_rng(seed), hard=0.8)
        clean, noisy = way.heard(x, speaks)
        assert clean.shape == noisy.shape == x.shape and np.abs(noisy).max() <= 1
        assert clean[9600:19200].std() > 3 * clean[:9000].std(), "the speech has gone elsewhere"
        if way.plain:
            assert np.allclose(clean, (way.gain * x).clip(-1, 1), atol=1e-5) and (noisy == clean).all()
            plain += 1
        elif way.noise and not way.clip:
            noise = noisy - clean
            before.append(noise[:9000].std())
            trimmed += before[-1] == 0
            assert way.trimmed == (before[-1] == 0) and noise[9600:19200].std() > 1e-4
    assert 5 < plain < 20 and 5 < trimmed < 25 and max(before) > 0.01 and len({*before}) > 10


class FakeOwn:
    """Moshi's words. Codes say where they come from: the word's number, 1000 more for each later frame."""

    def __init__(self):
        self.silence, self.words, self.names = np.full(8, -7), {}, {}
        for sentence in ["three plus four is seven", *speech.NUMBERS]:
            for key in language.word_keys(sentence.split()):
                number = self.names.setdefault(key, 100 + len(self.names))
                tokens = [number, 900, 901] if key[1] == "plus" else [number]
                self.words[key] = [
                    (number + 1000 * np.tile(np.arange(3), (8, 1)), 2 if key[2] else 3, tokens)
                ]


def fake_heard(*parts):
    """One user's side, whose codes are the numbers of their frames."""
    made = language.Heard.__new__(language.Heard)
    made.codes = np.arange(language.LONG) + np.zeros((1, 8, 1), int)
    made.parts = [[language.Part(*part) for part in parts]]
    return made


def test_conversation():
    """An answer begins 3 frames after its question, EPAD before each word; 3 after 'stop' it is quiet."""
    own = FakeOwn()
    heard_ = fake_heard(
        ("three plus four", 10, 15, -1), ("count from three", 50, 60, 89), ("stop", 100, 103, -1)
    )
    codes = language.conversation(own, heard_, np.random.default_rng(0))
    assert codes.shape == (17, language.FRAMES) and codes[9, 0] == 0, "this seed begins at the beginning"
    text, moshi = codes[0], codes[1:9]
    assert (moshi == moshi[:1]).all() and (codes[9:] == np.arange(language.FRAMES)).all()
    numbers = [own.names[key] for key in language.word_keys("three plus four is seven".split())]
    assert [text[18 + 3 * n] for n in range(5)] == numbers
    assert [text[17 + 3 * n] for n in range(5)] == [0, 0, 901, 0, 0] and text[16] == 3
    first = [numbers[0], numbers[0] + 1000, numbers[0] + 2000, numbers[1], numbers[1] + 1000]
    assert moshi[0, 18:23].tolist() == first and (moshi[0, :18] == -7).all()
    counted = [own.names["", number, True] for number in ("three", "four", "five", "six")]
    every = language.COUNT_EVERY
    assert [text[63 + every * n] for n in range(4)] == counted, "a number each COUNT_EVERY frames"
    assert moshi[0, 91] != -7, "it goes on to the last frame before its silence"
    assert (moshi[0, 92:] == -7).all() and (text[92:] == 3).all(), "speaks after 'stop'"


def test_a_conversation_from_its_middle():
    """It begins shortly before a question, with all that belongs to it moved; what was before is gone."""
    own, shifts = FakeOwn(), set()
    heard_ = fake_heard(("three plus four", 135, 142, -1), ("count from three", 150, 160, 190))
    for seed in range(40):
        codes = language.conversation(own, heard_, np.random.default_rng(seed))
        shift = codes[9, 0]
        shifts.add(shift)
        assert (codes[9] == np.arange(shift, shift + language.FRAMES)).all()
        assert codes[0, 163 - shift] == own.names["", "three", True] if shift else codes[0, 145] > 99
        if shift:
            assert 2 <= 150 - shift < 12 and (codes[1, : 163 - shift] == -7).all()
            assert (codes[0, 193 - shift :] == 3).all()
    assert 0 in shifts and len(shifts) > 6


def test_where_a_conversation_is_cut(monkeypatch):
    """Made shorter it is the beginning of the longer one, to the last frame, whatever is being said there."""
    own, seed = FakeOwn(), 0
    heard_ = fake_heard(("three plus four", 10, 15, -1), ("count from three", 50, 60, 140))
    whole = language.conversation(own, heard_, np.random.default_rng(seed))
    for frames in range(5, language.FRAMES):
        monkeypatch.setattr(language, "FRAMES", frames)
        shorter = language.conversation(own, heard_, np.random.default_rng(seed))
        assert (shorter == whole[:, :frames]).all(), frames


class FakeMicrophone:
    """Changes nothing, but says everything at half the speed if told so."""

    slow = 1

    def __init__(self, rng, hard=1.0):
        pass

    def voice(self, x):
        return x.repeat(self.slow)

    def heard(self, x, speaks):
        return x, x


def test_users_side(monkeypatch):
    """Where each question is, to the frame, one later than it is heard; 'stop' where an answer lasts."""
    monkeypatch.setattr(language, "Microphone", FakeMicrophone)
    texts = ["three plus four", "count from three", "stop", "hello", "seven"]
    speech_ = speech_of([np.full(4800 + 480 * n, 3000, np.int16) for n in range(5)], texts=texts)
    by_kind = language.utterances_by_kind(speech_)
    assert by_kind == {
        kind: {"espeak": [n]} for n, kind in enumerate(("sum", "count", "stop", "talk", "digit"))
    }
    by_kind["difference"] = by_kind["sum"]
    lengths, stops, turns = (
        {"three plus four is seven": 30, "hello how can i help you": 20, "seven": 5},
        [],
        0,
    )
    for seed in range(30):
        wave, parts = language.User(speech_, by_kind, np.random.default_rng(seed)).converse(lengths)
        assert wave.shape == (language.LONG * 1920,)
        edges = np.diff(np.concatenate([[0], wave > 0, [0]]).astype(int))
        spans = dict(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()))
        starts = {begin // 1920 + 1: -(-end // 1920) + 1 for begin, end in spans.items()}
        for part, later in zip(parts, [*parts[1:], None]):
            assert starts[part.start] == part.end
            answer = language.TURNS[part.question].answer
            late = part.stop > language.LONG - 10  # 'stop' itself is cut off
            assert part.stop == -1 or part.question != "stop" and (late or part.stop in starts.values())
            if later and part.stop == -1 and answer:
                assert later.start >= part.end + 3 + lengths[answer] + 3, "answer and question overlap"
            stops.append((part.question, part.stop - part.end))
        turns += len(parts)
    broken = [length for question, length in stops if question == "count from three"]
    assert turns > 100 and min(broken) >= 3 and max(broken) > 50, "every count is broken off"
    assert 0 < sum(length > 0 for question, length in stops if question != "count from three") < 0.2 * turns


def test_loss_of_conversations():
    """Where nothing is silent, the loss is that of `Moshi.loss`; silence costs the depth decoder nothing."""
    torch.manual_seed(0)
    config = dataclasses.replace(language.MOSHI, dim=32, num_layers=1, text_card=20, depformer_dim=32, card=9)
    moshi = language.Moshi(config)
    codes = torch.randint(0, 9, (2, 17, 12))
    codes[0, 3, 4] = codes[1, 12, 5] = language.NO_INPUT
    silence, rng = torch.full((8,), 8), np.random.default_rng(0)
    codes[:, 1][codes[:, 1] == 8] = 0
    total, parts = language.conversation_loss(moshi, codes, codes, silence, rng)
    expected, those = moshi.loss(codes, text_padding_weight=0.3, first_codebook_weight=10.0)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["audio"].item() == pytest.approx(those["audio"].item(), rel=1e-5)
    codes[:, 1:9, 4:] = 8
    seen = []
    moshi.depth_decoder.forward = lambda hidden, tokens: (
        seen.append(len(hidden)) or torch.zeros(8, len(hidden), 9)
    )
    language.conversation_loss(moshi, codes, codes, silence, rng)
    assert 8 <= seen[0] < 16, "four frames of speech and a few of silence, of twelve"


def test_what_is_read_wrong_is_learnt_right():
    """Codes that are hidden or strewn with others in what the model reads stay what they are as targets."""
    rng = np.random.default_rng(0)
    codes = torch.randint(0, 200, (12, 17, language.FRAMES))
    before = codes.clone()
    given = language.hide_some(codes, rng)
    assert torch.equal(codes, before) and not torch.equal(given[:, 1:9], codes[:, 1:9])
    config = dataclasses.replace(language.MOSHI, dim=32, num_layers=1, text_card=200, depformer_dim=32)
    moshi, silence = language.Moshi(config), torch.full((8,), 8)
    codes[:, 1:9] = 1
    given = codes.clone()
    given[:, 1:9, 3::4] = 5
    given[:6, 1:9, ::5] = language.NO_INPUT
    moshi.depth_decoder.forward = lambda hidden, tokens: (
        50.0 * F.one_hot(torch.ones(8, len(hidden), dtype=torch.long), config.card)
    )
    _, parts = language.conversation_loss(moshi, given, codes, silence, rng)
    assert parts["audio"] < 1e-6


def test_moving_average_moves_and_revives():
    """Centroids go where their vectors are; one that nothing chooses is put onto a vector."""
    torch.manual_seed(0)
    book = Codebook(3, 2)
    book.embedding_sum.copy_(torch.tensor([[1.0, 0], [0, 1.0], [-50, -50]]))
    x = torch.tensor([[1.2, 0.0], [0.0, 0.8]]).repeat(50, 1)
    for _ in range(800):
        codec.move_codebook(book, x, book.encode(x[None])[0])
    found = book.centroids
    assert torch.cdist(x[:2], found).min(1).values.max() < 1e-2
    assert found.abs().max() < 2, "the dead one is still far away"


def test_quantize_trains_what_is_used():
    """Straight-through: the latent gets the output's gradient. Rows use their own number of codebooks."""
    torch.manual_seed(0)
    quantizer = Mimi(dataclasses.replace(codec.MIMI, n_q=4)).quantizer.acoustic
    z = torch.randn(2, codec.MIMI.dimension, 5, requires_grad=True)
    before = [codebook.centroids.clone() for codebook in quantizer.codebooks]
    out, _, _ = codec.quantize(quantizer, z, torch.tensor([0, -1]))
    whole = quantizer.output_proj(quantizer.input_proj(z))
    assert (out[0] == 0).all() and torch.allclose(out[1], whole[1], atol=1e-5), "-1: not quantized"
    for codebook, centroids in zip(quantizer.codebooks, before):
        codebook.embedding_sum, codebook.cluster_usage = centroids.clone(), torch.ones(len(centroids))
    out, commitment, _ = codec.quantize(quantizer, z, torch.tensor([1, 3]))
    for codebook, centroids in zip(quantizer.codebooks, before):
        codebook.embedding_sum, codebook.cluster_usage = centroids.clone(), torch.ones(len(centroids))
    for row, number in ((0, 1), (1, 3)):
        expected = quantizer.decode(quantizer.encode(z[row : row + 1], number))
        assert torch.allclose(out[row : row + 1], expected, atol=1e-4)
    out.sum().backward(retain_graph=True)
    expected = quantizer.input_proj.weight[..., 0].T @ quantizer.output_proj.weight[..., 0].sum(0)
    assert torch.allclose(z.grad, expected[None, :, None].expand_as(z), atol=1e-5)
    x = quantizer.input_proj(z).transpose(1, 2)
    residual = [x - quantizer.codebooks[0].decode(quantizer.codebooks[0].encode(x))]
    for codebook in quantizer.codebooks[1:3]:
        residual.append(residual[-1] - codebook.decode(codebook.encode(residual[-1])))
    of_rows = [residual[0][0], residual[0][1], residual[1][1], residual[2][1]]
    assert commitment.item() == pytest.approx(
        sum(part.pow(2).mean().item() / 2 for part in of_rows), rel=1e-4
    )
    assert commitment.requires_grad


@pytest.mark.parametrize(
    "words, last, expected",
    [
        ("three four five", 3.0, True),
        ("three four five", 4.4, True),
        ("three four five", 2.8, True),
        ("three four five", 4.6, False),  # the last number began over 0.7 s after 'stop'
        ("three four five", 2.6, False),  # it gave up counting, the next number was due before 'stop'
        ("three five", 3.0, False),
        ("three four fi", 3.0, False),
        ("four five", 3.0, False),
        ("", None, False),
        (" ".join(speech.NUMBERS[3:]), 0.5, True),
        (" ".join(speech.NUMBERS[3:] + ["thirty"]), 0.5, False),
    ],
)
def test_a_right_count(words, last, expected):
    """A count goes up from its first number until 'stop', which ends at 3.8 s here, or to thirty."""
    asked = evaluate.Asked(
        "count", speech.Turn("count from three", count_from=3), 0, 24000, 6 * 24000, stop=int(3.8 * 24000)
    )
    assert evaluate.is_right(asked, words.split(), None if last is None else int(last * 12.5)) is expected


def test_a_right_answer():
    """The whole sentence, nothing else; silence to a 'stop' that had nothing to stop."""
    asked = evaluate.Asked("talk", speech.Turn("hello", "hello how can i help you"), 0, 24000)
    for words, expected in (
        ("hello how can i help you", True),
        ("hello how can i help", False),
        ("", False),
        ("hello hello how can i help you", False),
    ):
        assert evaluate.is_right(asked, words.split(), 20) is expected
    assert evaluate.is_right(evaluate.Asked("stop", speech.Turn("stop"), 0, 9), [], None) is True


def timing(*spans, stop=None):
    """What `score_timing` counts when Moshi sounds in these spans [s]; the question lasts from 1 to 2 s."""
    sound = np.zeros(10 * 24000, np.float32)
    for begins, ends in spans:
        sound[int(begins * 24000) : int(ends * 24000)] = 0.1
    tally = evaluate.Tally()
    turn = speech.Turn("count from three", count_from=3)
    evaluate.score_timing(
        tally, evaluate.Asked("count", turn, 24000, 2 * 24000, 8 * 24000, stop and int(stop * 24000)), sound
    )
    return [tuple(counts) for counts in tally.rows.values()]


def test_timing():
    """Speech in the question, an answer's begin, the silence after 'stop', each at both of its bounds."""
    assert timing((2.3, 4)) == [(0, 12), (1, 1)]
    assert timing((1.5, 4))[0] == (6, 12), "six frames of the question, from 1.48 s on"
    assert timing((0.2, 0.9))[0] == (0, 12), "before the question"
    for begins, expected in ((2.0, 0), (2.03, 1), (2.71, 1), (2.73, 0), (8.5, 0)):  # heard 0.08 s later
        assert timing((begins, 9))[1] == (expected, 1), begins
    for ends, expected in ((4.5, (1, 1)), (5.6, (1, 1)), (5.64, (0, 1)), (9, (0, 1)), (3.9, (0, 0))):
        assert timing((2.3, ends), stop=5)[2] == expected, ends
    assert timing((2.3, 5.2), (5.6, 7), stop=5)[2] == (0, 1), "a pause between two words is no silence"


class FakeRecogniser(evaluate.Recogniser):
    """Hears what it is told for each sound, which is its number."""

    def __init__(self, *heard):
        self.told = heard

    def hear(self, x):
        return self.told[x].split()


def test_words_heard():
    """Which words are heard, in their order; another word than the clear ones makes up for none of them."""
    answer = "two plus one is three"
    recogniser = FakeRecogniser("two plus three is", "plus one is three", "", answer + " ten")
    for sound, expected in enumerate(([1, 1, 0, 1, 0], [0, 1, 1, 1, 1], 5 * [0], 5 * [1])):
        assert recogniser.heard(sound, answer.split()).tolist() == [bool(one) for one in expected]
    espeak = type(
        "Espeak", (), {"say": lambda self, *job: voices.Spoken(np.zeros(()), [], [])}
    )()  # 0 / 32768: number 0
    recogniser.hear = lambda x: recogniser.told[int(x)].split()
    tally = evaluate.Tally()
    evaluate.score_words(tally, espeak, recogniser, [(answer, 1), (answer, 2), (answer, 3)])
    assert list(tally.rows.values()) == [[9, 15], [2 + 0 + 3, 9]]


def test_quantizers_start_spread():
    """Each direction starts with the energy that it shall have, however loud one is; each codebook counts."""
    torch.manual_seed(0)
    quantizer = Mimi(codec.MIMI).quantizer.acoustic
    z = torch.randn(16, codec.MIMI.dimension, 40) * torch.linspace(0.1, 1, codec.MIMI.dimension)[:, None]
    z[:, 0] *= 300
    before = codec.spread_loss(quantizer.input_proj(z).transpose(1, 2))
    codec.start_quantizer(quantizer, z, spread=True)
    x = quantizer.input_proj(z).transpose(1, 2)
    assert torch.allclose(x.flatten(0, 1).var(0), codec.wanted_variances().cpu(), rtol=1e-2)
    assert codec.spread_loss(x) < 1e-3 and codec.spread_loss(0.7 * x) > 0.2 and before > 100
    correlated = x + x.roll(1, -1)
    assert codec.spread_loss(correlated / correlated.std((0, 1)) * x.std((0, 1))) > 0.1
    back = quantizer.output_proj(quantizer.input_proj(z))
    assert (back[:, 0] - z[:, 0]).std() < 0.02 * z[:, 0].std()
    left = []
    for codebook in quantizer.codebooks:
        x = x - codebook.decode(codebook.encode(x))
        left.append(x.pow(2).mean().item())
    assert all(later < 0.93 * before for before, later in zip(left, left[1:])), left


def test_numbers_of_codebooks():
    """A third or so of the rows use all codebooks, the others any number, some none: not quantized."""
    numbers = codec.draw_numbers(np.random.default_rng(0), 2000).tolist()
    shares = {number: numbers.count(number) / 2000 for number in {*numbers}}
    assert {*shares} == {-1, *range(1, 9)} and shares[8] == pytest.approx(0.35 * 0.875, abs=0.04)
    assert shares[-1] == pytest.approx(0.125, abs=0.03) and min(shares.values()) > 0.05


def test_bands():
    """The levels of the bands are those of each 10 ms: the right guess is good, the same a frame late bad."""
    torch.manual_seed(0)
    bands, sound = codec.Bands(), torch.zeros(1, 1, 4 * 1920)
    sound[..., 1920:3840] = 0.1 * torch.randn(1920)
    assert bands.mel.shape == (40, 257) and bands.head.out_features == 320
    bands.head.weight.data.zero_()
    guess = torch.full((1, 4, 8, 40), np.log(codec.FLOOR))
    bands.head.forward = lambda latent: guess.flatten(2)
    silence = bands(torch.zeros(1, codec.MIMI.dimension, 4), 0 * sound)
    assert silence.item() == pytest.approx(0, abs=1e-4)
    floor = bands(torch.zeros(1, codec.MIMI.dimension, 4), sound).item()
    guess[:, 1] = -6
    right = bands(torch.zeros(1, codec.MIMI.dimension, 4), sound).item()
    assert right < 0.5 * floor
    guess[:] = guess.roll(1, 1)
    assert bands(torch.zeros(1, codec.MIMI.dimension, 4), sound).item() > 1.2 * floor


def test_cut():
    """A sentence becomes words: codes from where each starts to where the next does, silence at the end."""
    own = language.Own.__new__(language.Own)
    own.words = {}
    codes = np.arange(20) + np.zeros((8, 1), int)
    tokenizer = type("Tokenizer", (), {"encode": staticmethod(lambda word: [len(word)])})
    own.cut(["one", "plus", "two"], codes, 12, [0.03, 0.24, 0.55], tokenizer)  # frames 0, 3 and 6
    found = {key: (piece[0].tolist(), length, tokens) for key, [(piece, length, tokens)] in own.words.items()}
    assert found == {
        ("", "one", False): ([0, 1, 2], 3, [3]),
        ("one", "plus", False): ([3, 4, 5], 3, [4]),
        ("plus", "two", True): (list(range(6, 20)), 6, [3]),
    }


def speech_of(sounds, phones=(), texts=()):
    """`Speech` as `stage_data` would have saved it: all users' sounds are of one make."""
    made = speech.Speech.__new__(speech.Speech)
    made.sounds, made.texts, made.makes = sounds, list(texts), {"espeak": [*range(len(sounds))]}
    made.starts, made.phones = [start for start, _ in phones], [numbers for _, numbers in phones]
    return made


def test_clips(monkeypatch):
    """Labels are the phones of four moments about each frame, 0 where nothing sounds, however slow it is."""
    sounds, phones = [], []
    for first, last in ((1, 6), (7, 11), (12, 22)):  # of 0.1 s, number n is heard as a constant n * 1000
        numbers = np.arange(first, last + 1)
        sounds.append((numbers * 1000).repeat(2400).astype(np.int16))
        phones.append((np.arange(len(numbers)) / 10, numbers))
    made = speech_of(sounds, phones)
    made.makes = {"moshi": [0], "espeak": [1, 2]}
    monkeypatch.setattr(codec, "Microphone", FakeMicrophone)
    moments = np.array([-0.01, 0.0, 0.1, 0.55, 0.59, 0.6])  # from its start to the end of the sound
    assert made.phone_at(0, moments).tolist() == [0, 1, 2, 6, 6, 0]
    for slow in (1, 2):
        monkeypatch.setattr(FakeMicrophone, "slow", slow)
        sound, clean, labels = codec.clips(made, np.random.default_rng(0), 40, own_share=0.5)
        assert sound.shape == (40, 1, codec.CLIP) and labels.shape == (40, 16, 4) and (sound == clean).all()
        x = np.pad(sound[:, 0].numpy() * 32.768, ((0, 0), (240, 0)))  # the first moment is before the clip
        heard_ = x[:, ::480][:, :64]
        labels = labels.flatten(1).numpy()
        same = np.abs(heard_ - labels) < 1e-3
        assert same[:, 1:].all() and {*labels[:20].flatten()} == {*range(7)}
        assert {*labels[20:].flatten()} == {0, *range(7, 23)}
        changes = np.nonzero(np.diff(sound[:20, 0].numpy()))[1] + 1
        assert not (changes % 480).any(), "Moshi does not start on a frame"


def test_shares_of_makes():
    """Users are of all makes that are there, whatever the number of their utterances; Moshi isn't one."""
    made = speech_of([])
    made.makes = {"moshi": [0], "espeak": [*range(1, 100)], "flite": [100]}
    drawn = [codec.draw_user(made, np.random.default_rng(seed)) for seed in range(300)]
    expected = codec.SHARES["flite"] / (codec.SHARES["flite"] + codec.SHARES["espeak"])
    assert 0 not in drawn and drawn.count(100) / 300 == pytest.approx(expected, abs=0.1)
    # In conversations espeak-ng speaks more.
    spoken = speech_of([np.full(480, 3000, np.int16)] * 2, texts=["hello", "who are you"])
    user = language.User(spoken, {"talk": {"espeak": [0], "joe": [1]}}, np.random.default_rng(0))
    said = [user.say("talk", 0)[0] for _ in range(300)]
    assert said.count("who are you") / 300 == pytest.approx(0.27 / (0.27 + 0.5), abs=0.1)


@pytest.mark.skipif(not (ROOT / "tiny" / MIMI_FILE).exists(), reason="tiny/ holds no checkpoint yet")
def test_codes_stand_where_the_sound_is():
    """Sentences of Moshi as codes: as long as they and a little silence, and as loud in each frame."""
    data = np.frombuffer((ROOT / "tiny" / "question.wav").read_bytes()[44:], np.int16)
    loud = np.flatnonzero(np.abs(data) > 300)
    made = speech_of([data[loud[0] : loud[-1] + 1]])
    made.makes = {"moshi": [0]}
    mimi = evaluate.shipped_codec()
    ((codes, length),), silence = language.encode_own(made, mimi)
    assert length == -(-len(made.sounds[0]) // 1920) and codes.shape == (8, length + language.OWN_TAIL)
    level = evaluate.decibels(mimi.decode(torch.from_numpy(codes)[None])[0, 0].detach().numpy(), 1920)
    original = evaluate.decibels(np.pad(made.sounds[0] / 32768, (0, 3840)), 1920)[1 : length - 1].clip(-50)
    fits = [np.abs(level[1 + late : length - 1 + late].clip(-50) - original).mean() for late in (-1, 0, 1)]
    assert np.argmin(fits) == 1 and fits[1] < 4, fits
    quiet = mimi.decode(torch.from_numpy(silence)[None])[0, 0].detach().numpy()
    assert silence.shape == (8, 100) and evaluate.decibels(quiet, 1920).max() < -45


def test_people(tmp_path, capsys, monkeypatch):
    """Digits of people, from a folder, at 24 kHz; without it their rows are left out, and that is said."""
    tally = evaluate.Tally()
    evaluate.score_people(tally, tmp_path, tmp_path / "nobody", None)
    assert not tally.rows and "no recordings of people in" in capsys.readouterr().err
    voices.write_wave(tmp_path / "7_a_00.wav", (1000 * np.sin(np.arange(12000))).astype(np.int16))
    save_wav(tmp_path / "0_b_01.wav", torch.zeros(8000), 8000)
    (tmp_path / "README.wav").write_text("no digit")
    zero, seven = evaluate.human_digits(tmp_path)
    assert (zero[0], len(zero[1]), seven[0], len(seven[1])) == ("zero", 24000, "seven", 12000)


def test_a_measured_row():
    """The table takes counts and measures."""
    tally = evaluate.Tally()
    tally.add("a", "9 %", 1, 4)
    tally.measure("b", "", "5.1, 6.2")
    assert str(tally).split("\n")[2:] == ["| a | 1 of 4 | 25.0 % | 9 % |", "| b | 5.1, 6.2 |  |  |"]


@needs_espeak
def test_from_nothing(folder, tmp_path, capsys, monkeypatch):
    """All stages one after the other leave a folder that can be talked to; done again, they find all done."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(speech, "CHUNK", 60)
    monkeypatch.setattr(speech, "COUNTS", {"moshi": 1, "espeak": 2})
    monkeypatch.setattr(language, "HEARD_FILE", 2)
    speech.stage_data(work, makes=("moshi", "espeak"))
    codec.stage_ear(work, steps=2, batch=2)
    codec.stage_codec(work, steps=4, batch=2, unquantized=2)
    codec.stage_voice(work, steps=2, batch=2)
    language.stage_heard(work, files=1, batch=2)
    language.stage_lm(work, steps=2, batch=2)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in files} >= {
        "config.json",
        "mimi_config.json",
        MIMI_FILE,
        MOSHI_FILE,
        TOKENIZER_FILE,
        "ear_loss.tsv",
        "codec_loss.tsv",
        "lm_loss.tsv",
        *speech.RECORDINGS,
    }
    assert json.loads((folder / "config.json").read_text())["lm_gen_config"]["temp"] == 0.5
    text, sound = evaluate.talk([np.zeros(5 * 1920, np.float32)] * 2, greedy=True)
    assert text.shape == (2, 5) and sound.shape == (2, 5 * 1920) and np.isfinite(sound).all()
    language.stage_heard(work, files=1)
    for stage, steps in (
        (codec.stage_ear, 2),
        (codec.stage_codec, 4),
        (codec.stage_voice, 2),
        (language.stage_lm, 2),
    ):
        stage(work, steps=steps)
    assert files == {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(evaluate, "STRANGERS", ())
    monkeypatch.setattr(evaluate, "phones_in_codes", lambda espeak, rng: {0: (1, 2), 1: (0, 2)})
    monkeypatch.setattr(evaluate, "codec_alone", lambda espeak, recogniser: {8: (1, 2)})
    monkeypatch.setattr(
        evaluate,
        "talk",
        lambda sounds, greedy: (
            np.full((len(sounds), 400), 3),
            np.zeros((len(sounds), 400 * 1920), np.float32),
        ),
    )
    capsys.readouterr()
    evaluate.stage_eval(work, conversations=3, people=tmp_path)
    table = capsys.readouterr().out
    assert "| text of the answer exactly right, greedy | 0 of 9 | 0.0 % | 98 % |" in table, (
        "silence is no answer"
    )
    assert "| silent within 0.7 s of the end of 'stop' | 0 of 0 |" in table, "who never spoke has not stopped"
    for stage, steps, gone in ((codec.stage_codec, 5, "voice.pt"), (codec.stage_ear, 3, "codec.pt")):
        stage(work, steps=steps, batch=2)  # for longer: what hangs on its codes is no more valid
        assert not (work / gone).exists() and not (work / "lm.pt").exists()
