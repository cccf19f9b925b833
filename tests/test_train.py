"""The training in tiny/, each stage for a few steps: that it runs from nothing, and what its parts do."""

import ctypes.util
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import codec
import evaluate
import language
import loop
import speech
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
        (codec.stage_codec, "data"),
        (codec.stage_voice, "data"),
        (language.stage_lm, "data"),
        (evaluate.stage_eval, "voice"),
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
    assert "{data,codec,voice,lm,eval,all}" in run.stdout and "Each stage" not in run.stderr


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


def test_held_out():
    """What `eval` asks is never trained: about one phrasing with numbers in ten, no greeting."""
    turns = speech.all_turns()
    asked = [turn for kind in ("sum", "difference", "count") for turn in turns[kind]]
    assert 0.07 < sum(turn.held_out for turn in asked) / len(asked) < 0.13
    assert not any(turn.held_out for turn in turns["talk"] + turns["stop"])
    assert {*speech.HELD_OUT_SPEEDS} < {*speech.SPEEDS} and {*speech.HELD_OUT_PITCHES} < {*speech.PITCHES}
    jobs, own = speech.all_jobs(400)
    asked = {turn.question: turn for those in turns.values() for turn in those}
    assert {(voice, speed) for _, voice, speed, _ in jobs[:own]} == {(speech.MOSHI_VOICE, speech.MOSHI_SPEED)}
    assert len(jobs) == own + 400 and not any(asked[text].held_out for text, *_ in jobs[own:])
    assert not {speed for _, _, speed, _ in jobs[own:]} & {*speech.HELD_OUT_SPEEDS}
    assert not {pitch for _, _, _, pitch in jobs[own:]} & {*speech.HELD_OUT_PITCHES}


class FakeEncoded:
    """Words whose codes say where they come from: the word's number, then 1000 for each later frame."""

    def __init__(self):
        self.silence, self.start = np.full(8, -7), np.full((8, language.TAIL + 1), -9)
        self.users = {
            "three plus four": [(np.full((8, 6), 50), 5)],
            "count from three": [(np.full((8, 6), 51), 5)],
            "stop": [(np.full((8, 4), 52), 3)],
        }
        self.words, self.names = {}, {}
        for sentence in ["three plus four is seven", *speech.NUMBERS]:
            for key in language.word_keys(sentence.split()):
                number = self.names.setdefault(key, 100 + len(self.names))
                tokens = [number, 900, 901] if key[1] == "plus" else [number]
                self.words[key] = [
                    (number + 1000 * np.tile(np.arange(3), (8, 1)), 2 if key[2] else 3, tokens)
                ]


FAKE_TURNS = {
    "sum": [speech.Turn("three plus four", "three plus four is seven")],
    "difference": [speech.Turn("three plus four", "three plus four is seven")],
    "count": [speech.Turn("count from three", count_from=3)],
    "talk": [speech.Turn("stop")],
    "stop": [speech.Turn("stop")],
}


def test_conversation():
    """Conversations of hand-made pieces: an answer 3 frames after its question, EPAD before each word."""
    encoded = FakeEncoded()
    stopped, begun = 0, 0
    for seed in range(60):
        codes = language.conversation(encoded, FAKE_TURNS, np.random.default_rng(seed))
        text, moshi, user = codes[0], codes[1:9], codes[9:]
        assert (
            codes.shape == (17, language.FRAMES) and (moshi == moshi[:1]).all() and (user == user[:1]).all()
        )
        begun += user[0, 0] == -9  # the codes of a stream that begins
        assert not {-7, -9} <= {*user[0, : language.TAIL + 1]} and -9 not in user[0, language.TAIL + 1 :]
        starts = np.flatnonzero((user[0] == 50) & (np.roll(user[0], 1) != 50))
        for start in starts:
            at = start + 5 + 3  # five frames of sound, then ANSWER_AFTER
            if at + 15 > language.FRAMES or 52 in user[0, start : at + 15]:
                continue
            numbers = [encoded.names[key] for key in language.word_keys("three plus four is seven".split())]
            assert [text[at + 3 * n] for n in range(5)] == numbers
            assert [text[at + 3 * n - 1] for n in range(5)] == [0, 0, 901, 0, 0] and text[at - 2] == 3
            assert moshi[0, at : at + 5].tolist() == [
                numbers[0],
                numbers[0] + 1000,
                numbers[0] + 2000,
                numbers[1],
                numbers[1] + 1000,
            ]
        for end in (
            np.flatnonzero((user[0] == 52) & (np.roll(user[0], 1) != 52)) + 3 + 3
        ):  # 'stop' takes 3 frames
            if end + 4 < language.FRAMES:
                assert (moshi[:, end : end + 4] == -7).all() and (text[end : end + 4] == 3).all(), (
                    "speaks after 'stop'"
                )
                stopped += moshi[0, end - 1] != -7
    assert stopped > 5 and 20 < begun < 40


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
    z = torch.randn(2, 128, 5, requires_grad=True)
    before = [codebook.centroids.clone() for codebook in quantizer.codebooks]
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
    espeak = type("Espeak", (), {"say": lambda self, *job: (np.zeros(()), [], [])})()  # 0 / 32768: number 0
    recogniser.hear = lambda x: recogniser.told[int(x)].split()
    tally = evaluate.Tally()
    evaluate.score_words(tally, espeak, recogniser, [(answer, 1), (answer, 2), (answer, 3)])
    assert list(tally.rows.values()) == [[9, 15], [2 + 0 + 3, 9]]


def test_where_a_conversation_is_cut(monkeypatch):
    """Made shorter it is the beginning of the longer one, to the last frame, whatever is being said there."""
    encoded, compared = FakeEncoded(), 0
    for seed in range(20):
        monkeypatch.setattr(language, "FRAMES", 160)
        whole = language.conversation(encoded, FAKE_TURNS, np.random.default_rng(seed))
        begins = np.flatnonzero((whole[9, 1:] >= 50) & (whole[9, 1:] != whole[9, :-1])) + 1
        if begins[0] > 15:  # long silence first, which is drawn by the length of the whole
            continue
        for frames in range(100, 160):
            monkeypatch.setattr(language, "FRAMES", frames)
            if not ((begins > frames - 12) & (begins < frames)).any():  # else it is too late to begin a turn
                shorter = language.conversation(encoded, FAKE_TURNS, np.random.default_rng(seed))
                assert (shorter == whole[:, :frames]).all(), (seed, frames)
                compared += 1
    assert compared > 500


def test_a_stream_that_begins(monkeypatch):
    """Its first frame is heard twice, as in the program; silence that lasts is the last that was encoded."""
    monkeypatch.setattr(language, "encode_all", lambda speech: ([], np.arange(100) + np.zeros((8, 1), int)))
    encoded = language.Encoded(type("Speech", (), {"jobs": []}), None)
    assert encoded.start[3].tolist() == [0, *range(30)] and encoded.silence.tolist() == [99] * 8


def test_cut():
    """A sentence becomes words: codes from where each starts to where the next does, silence at the end."""
    encoded = language.Encoded.__new__(language.Encoded)
    encoded.words = {}
    codes = np.arange(20) + np.zeros((8, 1), int)
    tokenizer = type("Tokenizer", (), {"encode": staticmethod(lambda word: [len(word)])})
    encoded.cut(["one", "plus", "two"], codes, 12, [0.03, 0.24, 0.55], tokenizer)  # frames 0, 3 and 6
    found = {
        key: (piece[0].tolist(), length, tokens) for key, [(piece, length, tokens)] in encoded.words.items()
    }
    assert found == {
        ("", "one", False): ([0, 1, 2], 3, [3]),
        ("one", "plus", False): ([3, 4, 5], 3, [4]),
        ("plus", "two", True): (list(range(6, 20)), 6, [3]),
    }


def speech_of(sounds, phones=()):
    """`Speech` as `stage_data` would have saved it: the first sound is Moshi's, the others are users'."""
    made = speech.Speech.__new__(speech.Speech)
    made.sound, made.ends, made.own = np.concatenate(sounds), np.cumsum([len(x) for x in sounds]), 1
    made.phones = phones
    return made


def test_clips():
    """Labels are the phones that sound a quarter and three quarters into each frame, 0 where nothing does."""
    sounds, phones = [], []
    for first, last in (
        (1, 6),
        (7, 11),
        (12, 22),
    ):  # phones of 0.1 s, number n is heard as a constant n * 1000
        numbers = np.arange(first, last + 1)
        sounds.append((numbers * 1000).repeat(2400).astype(np.int16))
        phones.append((np.arange(len(numbers)) / 10, numbers))
    sound, labels = codec.clips(speech_of(sounds, phones), np.random.default_rng(0), 40)
    assert sound.shape == (40, 1, codec.CLIP) and labels.shape == (40, 16, 2)
    sound, labels = sound[:, 0].cpu().numpy() * 32.768, labels.flatten(1).cpu().numpy()
    heard = sound[:, 480::960]
    assert np.allclose(heard[:20], labels[:20], atol=1e-3) and labels[:20].max() == 6
    changes = np.nonzero(np.diff(sound[:20]))[1] + 1
    assert not (changes % 480).any(), "Moshi does not start on a frame"
    assert ((heard == 0) == (labels == 0)).all() and {*labels[20:].flatten()} == {0, *range(7, 23)}
    gains = [
        {*np.round(heard[row][labels[row] > 0] / labels[row][labels[row] > 0], 4)} for row in range(20, 40)
    ]
    assert all(len(gain) == 1 and 0.39 < max(gain) < 1.42 for gain in gains) and len(set().union(*gains)) > 15


@pytest.mark.skipif(not (ROOT / "tiny" / MIMI_FILE).exists(), reason="tiny/ holds no checkpoint yet")
def test_codes_stand_where_the_sound_is():
    """Utterances as codes: as long as they and the silence after them, and as loud in each frame."""
    sounds = []
    for name in ("question.wav", "hello.wav"):
        sound = np.frombuffer((ROOT / "tiny" / name).read_bytes()[44:], np.int16)
        loud = np.flatnonzero(np.abs(sound) > 300)
        sounds.append(sound[loud[0] : loud[-1] + 1])
    codes, silence = language.encode_all(speech_of(sounds))
    mimi = codec.finished_codec()
    levels = [
        evaluate.decibels(mimi.decode(torch.from_numpy(piece)[None])[0, 0].detach().numpy(), 1920)
        for piece, _ in codes
    ]
    (own, own_length), (user, user_length) = codes
    assert own_length == -(-len(sounds[0]) // 1920) and own.shape == (8, own_length + language.OWN_TAIL)
    assert user_length - -(-len(sounds[1]) // 1920) in (0, 1) and user.shape == (
        8,
        user_length + language.TAIL,
    )
    original = evaluate.decibels(np.pad(sounds[0] / 32768, (0, 3840)), 1920)[1 : own_length - 1].clip(-50)
    fits = [
        np.abs(levels[0][1 + late : own_length - 1 + late].clip(-50) - original).mean() for late in (-1, 0, 1)
    ]
    assert np.argmin(fits) == 1 and fits[1] < 4, fits
    assert levels[1][:user_length].max() > -30 and levels[1][user_length + 3 :].max() < -45
    assert silence.shape == (8, 100)
    quiet = mimi.decode(torch.from_numpy(silence)[None])[0, 0].detach().numpy()
    assert evaluate.decibels(quiet, 1920).max() < -45


@needs_espeak
def test_from_nothing(folder, tmp_path, capsys, monkeypatch):
    """All stages one after the other leave a folder that can be talked to; done again, they find all done."""
    work = tmp_path / "work"
    work.mkdir()
    speech.stage_data(work, questions=150)
    codec.stage_codec(work, steps=4, batch=2, unquantized=2)
    codec.stage_voice(work, steps=2, batch=2)
    language.stage_lm(work, steps=2, batch=2)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in files} >= {
        "config.json",
        "mimi_config.json",
        MIMI_FILE,
        MOSHI_FILE,
        TOKENIZER_FILE,
        "codec_loss.tsv",
        "lm_loss.tsv",
        *speech.RECORDINGS,
    }
    assert json.loads((folder / "config.json").read_text())["lm_gen_config"]["temp"] == 0.5
    text, sound = evaluate.talk([np.zeros(5 * 1920, np.float32)] * 2, greedy=True)
    assert text.shape == (2, 5) and sound.shape == (2, 5 * 1920) and np.isfinite(sound).all()
    for stage, steps in ((codec.stage_codec, 4), (codec.stage_voice, 2), (language.stage_lm, 2)):
        stage(work, steps=steps)
    assert files == {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(evaluate, "all_answers", lambda: {"ten minus nine is one"})
    monkeypatch.setattr(evaluate, "phones_in_codes", lambda espeak, rng: {0: (1, 2), 1: (0, 2)})
    monkeypatch.setattr(
        evaluate,
        "talk",
        lambda sounds, greedy: (
            np.full((len(sounds), 400), 3),
            np.zeros((len(sounds), 400 * 1920), np.float32),
        ),
    )
    capsys.readouterr()
    evaluate.stage_eval(work, conversations=3)
    table = capsys.readouterr().out
    assert "| text of the answer exactly right, greedy | 0 of 9 | 0.0 % | 98 % |" in table, (
        "silence is no answer"
    )
    assert "| silent within 0.7 s of the end of 'stop' | 0 of 0 |" in table, "who never spoke has not stopped"
