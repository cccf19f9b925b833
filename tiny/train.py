"""Makes the checkpoint in this folder, from nothing: `python tiny/train.py [STAGE] [--work FOLDER]`.

A small Moshi in one fixed voice: it adds, subtracts, counts until it is told to stop, and greets.
Stages, each of which can be run alone. Those that train lose at most 200 steps when interrupted:

    data    espeak-ng speaks: thousands of questions in many voices, all of Moshi's sentences in one
    codec   a narrow Mimi learns to code them: spectral loss, straight-through gradient, moving-average
            codebooks, quantizer dropout; its first codebook learns to tell the phones, as the real one
            learns from WavLM
    voice   what turns codes into sound goes on, mostly with Moshi's voice; the codes stay what they are
    lm      a narrow Moshi learns conversations, put together from encoded sentences, with `Moshi.loss`
    eval    talks with the finished folder about what training never drew, and prints a table

It needs espeak-ng (Debian and Ubuntu: `apt-get install espeak-ng`); `eval` also `pip install pocketsphinx`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import difflib
import io
import json
import math
import sys
import time
import wave
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from mimi_min import Mimi, MimiConfig, init_state, load_mimi, save_mimi, whole_file  # noqa: E402
from moshi_min import (
    MIMI_FILE,
    MOSHI_FILE,
    NO_INPUT,
    TOKENIZER_FILE,
    Moshi,
    MoshiConfig,  # noqa: E402
    MoshiGen,
    load_checkpoint,
    save_moshi,
)

RATE, FRAME = 24000, 1920  # samples a second, samples a frame
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAD, EPAD = 3, 0  # of the text stream: no new word; a word comes next

# The official configurations, only narrower. The rates, streams and delays are the released ones.
MIMI = {
    "sample_rate": RATE,
    "channels": 1,
    "frame_rate": 12.5,
    "seanet": {
        "channels": 1,
        "dimension": 128,
        "causal": True,
        "n_filters": 16,
        "n_residual_layers": 1,
        "activation": "ELU",
        "compress": 2,
        "dilation_base": 2,
        "disable_norm_outer_blocks": 0,
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 3,
        "norm": "none",
        "pad_mode": "constant",
        "ratios": [8, 6, 5, 4],
        "true_skip": True,
    },
    "quantizer": {"dimension": 32, "n_q": 8, "bins": 256, "input_dimension": 128, "output_dimension": 128},
    "transformer": {
        "d_model": 128,
        "num_heads": 4,
        "num_layers": 2,
        "causal": True,
        "layer_scale": 0.01,
        "context": 32,
        "conv_layout": True,
        "max_period": 10000,
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "dim_feedforward": 512,
        "input_dimension": 128,
        "output_dimensions": [128],
    },
}
MOSHI = {
    "dim": 256,
    "text_card": 0,
    "existing_text_padding_id": PAD,
    "n_q": 16,
    "dep_q": 8,
    "card": 256,
    "num_heads": 4,
    "num_layers": 5,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 125,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 128,
    "depformer_dim_feedforward": 528,
    "depformer_num_heads": 4,
    "depformer_num_layers": 2,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}


def random_numbers(*seed: int) -> np.random.Generator:
    """A generator for one purpose and step, so that a run that goes on draws what it would have drawn."""
    return np.random.default_rng(seed)


# -------------------------------------------------------------------------------------- what is said, by whom

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
NUMBERS += [f"twenty {ones}" for ones in NUMBERS[1:10]] + ["thirty"]  # counting ends here
PHRASINGS = {
    "sum": [
        "what is {a} plus {b}",
        "how much is {a} plus {b}",
        "tell me {a} plus {b}",
        "{a} plus {b}",
        "please add {a} and {b}",
        "can you add {a} and {b}",
    ],
    "difference": [
        "what is {a} minus {b}",
        "how much is {a} minus {b}",
        "tell me {a} minus {b}",
        "{a} minus {b}",
        "please take {b} from {a}",
        "can you take {b} from {a}",
    ],
    "count": ["count from {a}", "please count from {a}", "can you count from {a}", "start counting at {a}"],
}
SMALL_TALK = {
    "hello how can i help you": ["hello", "hi there", "good morning"],
    "i am a tiny moshi": ["who are you", "what is your name"],
    "i am fine thank you": ["how are you", "how do you do"],
    "i can add and count": ["what can you do", "what do you know"],
    "you are welcome": ["thank you", "thanks a lot"],
    "goodbye and take care": ["goodbye", "see you later"],
}
VOICES = [
    "gmw/en-US",
    "gmw/en-US+m3",
    "gmw/en-US+f1",
    "gmw/en-US+f4",
    "gmw/en",
    "gmw/en+m7",
    "gmw/en+f5",
    "gmw/en-GB-x-rp",
    "gmw/en-GB-scotland",
    "gmw/en-GB-scotland+f3",
    "gmw/en-029",
    "gmw/en-US-nyc+m1",
]
MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH = "gmw/en-US+f2", 150, 50
SPEEDS, PITCHES = range(125, 196), range(20, 81)  # words a minute; espeak's scale from 0 to 99
HELD_OUT_SPEEDS, HELD_OUT_PITCHES = range(150, 156), range(46, 53)  # for `eval` alone


@dataclasses.dataclass
class Turn:
    """What the user says and what that calls for: an answer, or counting on, or nothing ('stop')."""

    question: str
    answer: str = ""
    count_from: int | None = None

    @property
    def held_out(self) -> bool:
        """One phrasing with its numbers in ten is left to `eval`; all talk without numbers is trained."""
        has_number = any(word in NUMBERS for word in self.question.split())
        return has_number and zlib.crc32(self.question.encode()) % 10 == 0


def all_turns() -> dict[str, list[Turn]]:
    """Everything that can be asked, by kind."""
    turns: dict[str, list[Turn]] = {"sum": [], "difference": [], "count": [], "talk": []}
    turns["stop"] = [Turn("stop")]
    for a in range(11):
        for b in range(11):
            words = {"a": NUMBERS[a], "b": NUMBERS[b]}
            for text in PHRASINGS["sum"]:
                answer = f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}"
                turns["sum"].append(Turn(text.format(**words), answer))
            for text in PHRASINGS["difference"] if a >= b else []:
                answer = f"{NUMBERS[a]} minus {NUMBERS[b]} is {NUMBERS[a - b]}"
                turns["difference"].append(Turn(text.format(**words), answer))
    for a in range(21):
        turns["count"] += [Turn(text.format(a=NUMBERS[a]), count_from=a) for text in PHRASINGS["count"]]
    turns["talk"] = [Turn(question, answer) for answer, those in SMALL_TALK.items() for question in those]
    return turns


def all_answers() -> set[str]:
    """All sentences of Moshi."""
    return {turn.answer for those in all_turns().values() for turn in those if turn.answer}


class Espeak:
    """espeak-ng through its C library: sound, the start of each word and of each phone."""

    class Event(ctypes.Structure):
        """espeak_EVENT of speak_lib.h."""

        _fields_ = [
            ("type", ctypes.c_int),
            ("id", ctypes.c_uint),
            ("text_position", ctypes.c_int),
            ("length", ctypes.c_int),
            ("milliseconds", ctypes.c_int),
            ("sample", ctypes.c_int),
            ("user", ctypes.c_void_p),
            ("name", ctypes.c_char * 8),
        ]

    def __init__(self):
        try:
            self.library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError:
            raise SystemExit("espeak-ng is missing; install it: apt-get install espeak-ng") from None
        # Synchronous (2); events for phones too (1), and no exit() of the whole program (0x8000).
        self.rate = self.library.espeak_Initialize(2, 0, None, 0x8001)
        if self.rate <= 0:
            raise SystemExit("espeak-ng does not start; are its voices there? apt-get install espeak-ng")
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(self.Event)
        )
        self.callback = callback(self.collect)  # kept, or it would be freed under the library's feet
        self.library.espeak_SetSynthCallback(self.callback)

    def collect(self, samples, count: int, events) -> int:
        """Called by the library with pieces of sound and what begins in them, up to an event of type 0."""
        try:
            if count > 0:
                self.sound.append(np.ctypeslib.as_array(samples, (count,)).copy())
            i = 0
            while events[i].type:
                if events[i].type == 7 or events[i].type == 1 and events[i].length:  # a phone, a word
                    starts = self.words if events[i].type == 1 else self.phones
                    starts.append((events[i].sample / self.rate, events[i].name.decode("utf-8", "replace")))
                i += 1
        except BaseException as error:  # a Ctrl-C lands here, and ctypes would print it and go on
            self.error = error
        return int(self.error is not None)  # 1: speak no further

    def say(self, text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, list[float], list]:
        """Sound [T] int16 at 24 kHz, its end cut; starts of words [s]; [(start [s], phone), ...]."""
        self.sound, self.words, self.phones, self.error = [], [], [], None
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise SystemExit(f"espeak-ng does not know the voice {voice}")
        for parameter, value in ((1, speed), (3, pitch), (4, 50)):  # rate, pitch, range
            self.library.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)
        self.library.espeak_Synchronize()
        if self.error is not None:
            raise self.error
        x = np.concatenate(self.sound).astype(np.float64)
        up, down = RATE // math.gcd(RATE, self.rate), self.rate // math.gcd(RATE, self.rate)
        x = np.pad(x, (0, down + -len(x) % down))
        x = np.fft.irfft(np.fft.rfft(x), len(x) * up // down) * up / down  # 22.05 -> 24 kHz, all of the band
        loud = np.flatnonzero(np.abs(x) > 0.005 * 32768)
        x = x[: loud[-1] + 1].clip(-32768, 32767).astype(np.int16)
        return x, [start for start, _ in self.words], self.phones


# ------------------------------------------------------------------------------------------------ stage: data


def stage_data(work: Path, questions: int = 24000) -> None:
    """Speaks all sentences and saves them: work/speech.npz."""
    path = work / "speech.npz"
    if path.exists():
        return print(f"data: {path} is there")
    espeak, turns, rng = Espeak(), all_turns(), random_numbers(1)
    forget(work, "codec.pt", "voice.pt", "encoded.pt", "lm.pt")  # made from other data
    make_recordings(espeak)
    trained = {kind: [turn.question for turn in those if not turn.held_out] for kind, those in turns.items()}
    kinds = list(trained)
    jobs = []  # (text, voice, speed, pitch), Moshi's sentences first
    for text in sorted(all_answers() | set(NUMBERS)):
        jobs.append((text, MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH))
    own = len(jobs)
    speeds = [speed for speed in SPEEDS if speed not in HELD_OUT_SPEEDS]
    pitches = [pitch for pitch in PITCHES if pitch not in HELD_OUT_PITCHES]
    for i in range(questions):
        kind = rng.choice(kinds, p=[0.38, 0.27, 0.13, 0.14, 0.08])
        jobs.append(
            (
                str(rng.choice(trained[kind])),
                VOICES[i % len(VOICES)],
                int(rng.choice(speeds)),
                int(rng.choice(pitches)),
            )
        )
    names = ["_"]  # phones; 0 is silence
    sounds, words, phones = [], [], []
    for i, job in enumerate(jobs):
        sound, starts, labels = espeak.say(*job)
        sounds.append(sound)
        words.append(starts)
        for _, name in labels:
            if name not in names and not name.startswith("_"):
                names.append(name)
        phones.append([(start, names.index(name) if name in names else 0) for start, name in labels])
        progress("data", i + 1, len(jobs))
    with whole_file(path) as file:
        np.savez(
            file,
            sound=np.concatenate(sounds),
            ends=np.cumsum(list(map(len, sounds))),
            own=own,
            jobs=json.dumps(jobs),
            words=json.dumps(words),
            phones=json.dumps(phones),
            names=json.dumps(names),
        )
    hours = sum(map(len, sounds)) / RATE / 3600
    print(
        f"data: {own} sentences of Moshi, {questions} of users, {hours:.1f} h, {len(names)} phones -> {path}"
    )


# The recordings that come with the checkpoint: what is asked, and when, in seconds.
RECORDINGS = {
    "question.wav": [(0.4, "what is seven plus eight")],
    "hello.wav": [(0.4, "hello")],
    "count.wav": [(0.4, "count from three"), (6.2, "stop")],
    "conversation.wav": [
        (0.4, "good morning"),
        (4.0, "how much is nine minus four"),
        (9.0, "count from seventeen"),
        (14.6, "stop"),
        (16.4, "who are you"),
        (20.2, "thank you"),
    ],
}


def make_recordings(espeak: Espeak) -> None:
    """Writes them into the folder, as 16-bit WAV at 24 kHz."""
    for i, (name, questions) in enumerate(RECORDINGS.items()):
        sound = np.zeros(0, np.int16)
        for at, text in questions:
            x, _, _ = espeak.say(text, VOICES[3 * i], HELD_OUT_SPEEDS[2], HELD_OUT_PITCHES[3])
            sound = np.concatenate([sound, np.zeros(int(at * RATE) - len(sound), np.int16), x])
        with wave.open(str(FOLDER / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(sound.astype("<i2").tobytes())


class Speech:
    """What `stage_data` saved."""

    def __init__(self, work: Path):
        file = np.load(needed(work / "speech.npz", "data"))
        self.sound, self.ends, self.own = file["sound"], file["ends"], int(file["own"])
        self.jobs, self.words, self.names = (json.loads(str(file[key])) for key in ("jobs", "words", "names"))
        phones = json.loads(str(file["phones"]))
        self.phones = [(np.array([p[0] for p in those]), np.array([p[1] for p in those])) for those in phones]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> np.ndarray:
        """Utterance i, float32 [T] in -1..1."""
        start = self.ends[i - 1] if i else 0
        return self.sound[start : self.ends[i]].astype(np.float32) / 32768

    def phone_at(self, i: int, seconds: np.ndarray) -> np.ndarray:
        """The phone that utterance i speaks at these times, 0 where it is silent."""
        starts, labels = self.phones[i]
        where = np.searchsorted(starts, seconds, side="right") - 1
        inside = (where >= 0) & (seconds * RATE < self.ends[i] - (self.ends[i - 1] if i else 0))
        return np.where(inside, labels[where.clip(min=0)], 0)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the highest learning rate: up in a line, down along a cosine to 2 %."""
    return min((step + 1) / warmup, 0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2)


_started: dict[str, tuple[float, int]] = {}


def progress(what: str, done: int, total: int, more: str = "", every: float = 20) -> None:
    """A line on standard error now and then: how far it is and how long it will take."""
    now = time.monotonic()
    started, first, shown = _started.get(what, (now, done, 0.0))
    if now - shown > every or done == total:
        left = (now - started) / 60 * (total - done) / max(1, done - first)
        more += f", {left:.1f} min left" if done > first else ""
        print(f"{what}: {done} of {total}{more}", file=sys.stderr, flush=True)
        shown = now
    _started[what] = (started, first, shown)


# ----------------------------------------------------------------------------------------------- stage: codec

FLOOR = 3e-4  # of spectra, -70 dB: what is softer counts as silence
CLIP = 16 * FRAME  # 1.28 s: the transformers' window of 32 positions is full at its end


def clips(
    speech: Speech, rng: np.random.Generator, batch: int, own_share: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Sound [batch, 1, CLIP] and the phones at a quarter and three quarters of each frame [batch, frames, 2].

    `own_share` of the clips are Moshi's, which starts on a frame; users start anywhere, and are loud or soft.
    """
    sound, labels = np.zeros((batch, CLIP), np.float32), np.zeros((batch, CLIP // FRAME, 2), np.int64)
    times = (np.arange(CLIP // FRAME)[:, None] + [0.25, 0.75]) * FRAME
    for row in range(batch):
        own = row < own_share * batch
        i = rng.integers(speech.own) if own else rng.integers(speech.own, len(speech))
        x = speech[i]
        start = rng.integers(-CLIP // 2, max(1, len(x) - CLIP // 3))  # below 0: silence first
        if own:
            start = start // FRAME * FRAME
        source = x[max(start, 0) : start + CLIP]
        place = max(-start, 0)
        sound[row, place : place + len(source)] = source * (1 if own else 10 ** rng.uniform(-0.4, 0.15))
        labels[row] = speech.phone_at(i, (times + start) / RATE)
    return torch.from_numpy(sound.clip(-1, 1))[:, None].to(DEVICE), torch.from_numpy(labels).to(DEVICE)


class SpectralLoss(nn.Module):
    """Mean distances of mel spectra and of their logarithms, at four resolutions (DAC, Kumar et al. 2023)."""

    def __init__(self, sizes=(256, 512, 1024, 2048), mels=(20, 40, 64, 80)):
        super().__init__()
        self.sizes = sizes
        for size, count in zip(sizes, mels):
            hertz = torch.linspace(0, RATE / 2, size // 2 + 1)
            highest = 2595 * math.log10(1 + RATE / 1400)
            edges = 700 * (10 ** (torch.linspace(0, highest, count + 2) / 2595) - 1)
            rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
            falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
            triangles = torch.minimum(rising, falling).clamp(min=0)
            self.register_buffer(f"mel{size}", triangles / triangles.sum(1, keepdim=True).clamp(min=1))
            self.register_buffer(f"window{size}", torch.hann_window(size))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [B, 1, T] -> a number: about ln(ratio) of what differs."""
        total = x.new_zeros(())
        for size in self.sizes:
            window, mel = getattr(self, f"window{size}"), getattr(self, f"mel{size}")
            spectra = []
            for sound in (x, y):
                bins = torch.stft(sound[:, 0], size, size // 4, window=window, return_complex=True)
                power = torch.view_as_real(bins).pow(2).sum(-1) + 1e-5
                spectra.append(mel @ (power.sqrt() * 2 / window.sum()))
            a, b = spectra
            total = total + ((a + FLOOR) / (b + FLOOR)).log().abs().mean() + 20 * (a - b).abs().mean()
        return total / len(self.sizes)


@torch.no_grad()
def start_weights(mimi: Mimi) -> None:
    """Sound as loud after each convolution as before it. PyTorch's own start loses it, and much time."""
    for module in mimi.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            inputs = module.weight[0].numel()  # that an output adds up
            if isinstance(module, nn.ConvTranspose1d):
                inputs = module.in_channels // module.groups * module.kernel_size[0] // module.stride[0]
            nn.init.normal_(module.weight, std=inputs**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.01)
    for name, parameter in mimi.named_parameters():
        if ".scale" in name:  # of a transformer's updates; two layers need no caution
            parameter.fill_(0.2)


@torch.no_grad()
def k_means(x: Tensor, size: int, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """Centroids [size, dim] of x [N, dim] and how many of x each has."""
    centroids = x[torch.randperm(len(x))[:size]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(x, centroids).argmin(1)
        counts = torch.bincount(nearest, minlength=size)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    return centroids, counts.float()


@torch.no_grad()
def start_codebooks(quantizer, z: Tensor) -> None:
    """Each codebook of a ResidualQuantizer starts at the k-means of what it will quantize."""
    residual = quantizer.input_proj(z).transpose(1, 2).flatten(0, 1)
    for codebook in quantizer.codebooks:
        centroids, counts = k_means(residual, len(codebook.embedding_sum))
        usage = (counts / counts.sum() * len(counts)).clamp(min=0.1)
        codebook.cluster_usage.copy_(usage)
        codebook.embedding_sum.copy_(centroids * usage[:, None])
        residual = residual - codebook.decode(codebook.encode(residual[None]))[0]


@torch.no_grad()
def move_codebook(codebook, x: Tensor, codes: Tensor, decay: float = 0.99, dead: float = 0.02) -> None:
    """Moving average of the count and the sum of the vectors x [N, dim] that chose each centroid (VQ-VAE).

    Usage is in shares of the even one, so 1 is what each had if all had the same. A centroid that hardly any
    vector chooses is dead: nothing would ever move it again. It is put where some vector of this batch is.
    """
    size = len(codebook.cluster_usage)
    share = size / len(x)
    counts = torch.bincount(codes, minlength=size).to(x.dtype)
    sums = torch.zeros_like(codebook.embedding_sum).index_add_(0, codes, x)
    codebook.cluster_usage.lerp_(counts * share, 1 - decay)
    codebook.embedding_sum.lerp_(sums * share, 1 - decay)
    gone = codebook.cluster_usage < dead
    fresh = x[torch.randint(len(x), (int(gone.sum()),), device=x.device)]
    codebook.cluster_usage[gone] = 0.2
    codebook.embedding_sum[gone] = 0.2 * fresh


def quantize(quantizer, z: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A ResidualQuantizer in training. z [B, D, F]; row b uses its first number[b] codebooks.

    Returns the quantized latent [B, D, F], the commitment loss, and what the codebooks gave before the output
    projection [B, F, dim]. The gradient goes straight through: as if quantizing had changed nothing.
    """
    x = quantizer.input_proj(z).transpose(1, 2)
    residual, total, commitment = x, torch.zeros_like(x), x.new_zeros(())
    for k, codebook in enumerate(quantizer.codebooks):
        used = (k < number)[:, None, None].to(x.dtype)
        codes = codebook.encode(residual.detach())
        nearest = codebook.decode(codes)
        move_codebook(codebook, residual.detach().flatten(0, 1), codes.flatten())
        commitment = commitment + ((residual - nearest).pow(2) * used).mean()
        residual, total = residual - nearest, total + used * nearest
    straight = x + (total - x).detach()
    out = quantizer.output_proj(straight.transpose(1, 2))
    return out * (number > 0)[:, None, None], commitment, straight


def codec_step(
    mimi: Mimi, phone_heads: nn.Module, spectral: SpectralLoss, batch: tuple, number: Tensor | None
) -> dict[str, Tensor]:
    """All losses of a batch of clips; `number` [B] of codebooks for each row, None: not quantized."""
    sound, labels = batch
    z = mimi.to_latent(sound)
    losses = {}
    if number is not None:
        semantic, commitment, codes = quantize(mimi.quantizer.semantic, z, number.clamp(max=1))
        acoustic, more, _ = quantize(mimi.quantizer.acoustic, z, number - 1)
        z = semantic + acoustic
        logits = phone_heads(codes).unflatten(-1, (2, -1))  # [B, F, 2, phones]
        losses["phone"] = F.cross_entropy(logits.flatten(0, 2), labels.flatten())
        losses["right"] = (logits.argmax(-1) == labels).float().mean()  # told to the reader, no loss
        losses["commitment"] = commitment + more
    wave = mimi.from_latent(z)
    losses["spectral"] = spectral(sound, wave)
    losses["wave"] = (sound - wave).abs().mean()
    return losses


CODEC_LOSSES = ("spectral", "wave", "commitment", "phone", "right")


def stage_codec(work: Path, steps: int = 3600, batch: int = 8, unquantized: int = 200) -> None:
    """Trains Mimi: work/codec.pt, then its file there. It begins with `unquantized` steps, no codebooks."""
    speech = Speech(work)
    torch.manual_seed(2)
    mimi = Mimi(MimiConfig.from_dict(MIMI)).to(DEVICE)
    start_weights(mimi)
    phone_heads = nn.Linear(MIMI["quantizer"]["dimension"], 2 * len(speech.names)).to(DEVICE)
    spectral = SpectralLoss().to(DEVICE)
    parameters = [*mimi.parameters(), *phone_heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3)
    path = work / "codec.pt"
    first, history = resume(path, mimi=mimi, heads=phone_heads, optimizer=optimizer)
    if not first:
        forget(work, "voice.pt", "encoded.pt", "lm.pt")  # made with another codec
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.2e-3 * schedule(step, steps, warmup=40)
        rng = random_numbers(3, step)
        torch.manual_seed(step)
        if step == unquantized:
            with torch.no_grad():
                z = mimi.to_latent(clips(speech, random_numbers(4), 96)[0])
            for quantizer in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
                start_codebooks(quantizer, z)
        number = None
        if step >= unquantized:  # quantizer dropout: half of the rows with all codebooks, half with 1, 2 or 4
            few = rng.choice([1, 2, 4], batch)
            number = torch.from_numpy(np.where(rng.random(batch) < 0.5, 8, few)).to(DEVICE)
        losses = codec_step(mimi, phone_heads, spectral, clips(speech, rng, batch), number)
        total = losses["spectral"] + 0.3 * losses["wave"]
        if number is not None:
            total = total + 0.25 * losses["commitment"] + 0.3 * losses["phone"]
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            told = {key: round(losses[key].item(), 4) if key in losses else None for key in CODEC_LOSSES}
            history.append([step + 1, *told.values()])
            progress("codec", step + 1, steps, "".join(f", {key} {value}" for key, value in told.items()))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_progress(
                path, mimi=mimi, heads=phone_heads, optimizer=optimizer, step=step + 1, history=history
            )
    for codebook in [*mimi.quantizer.semantic.codebooks, *mimi.quantizer.acoustic.codebooks]:
        codebook.embedding_sum.copy_(codebook.centroids)  # the sums and counts have served
        codebook.cluster_usage.fill_(1)
    write_mimi(mimi, work / MIMI_FILE)  # the folder's comes from the stage `voice`
    (FOLDER / "mimi_config.json").write_text(json.dumps(MIMI, indent=1) + "\n")
    write_curve(FOLDER / "codec_loss.tsv", CODEC_LOSSES, history)
    print(f"codec: {path} is at step {steps} -> {work / MIMI_FILE}")


def stage_voice(work: Path, steps: int = 1000, batch: int = 8) -> None:
    """The decoder goes on, mostly with Moshi's voice, while all that makes the codes stays: work/voice.pt."""
    speech, spectral, path = Speech(work), SpectralLoss().to(DEVICE), work / "voice.pt"
    mimi = load_mimi(needed(work / MIMI_FILE, "codec"), MimiConfig.from_dict(MIMI), 8, DEVICE)
    decoding = (
        mimi.upsample,
        mimi.decoder_transformer,
        mimi.decoder,
        mimi.quantizer.semantic.output_proj,
        mimi.quantizer.acoustic.output_proj,
    )
    parameters = [parameter for part in decoding for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3)
    first, history = resume(path, mimi=mimi, optimizer=optimizer)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * schedule(step, steps, warmup=40)
        rng = random_numbers(9, step)
        sound, _ = clips(speech, rng, batch, own_share=0.75)
        codes = mimi.encode(sound)[:, : rng.choice([1, 2, 4, 8], p=[0.1, 0.1, 0.1, 0.7])]
        loss = spectral(sound, mimi.from_latent(mimi.quantizer.decode(codes)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            history.append([step + 1, round(loss.item(), 4)])
            progress("voice", step + 1, steps, f", spectral {loss.item():.4f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_progress(path, mimi=mimi, optimizer=optimizer, step=step + 1, history=history)
    write_mimi(mimi, FOLDER / MIMI_FILE)
    write_curve(FOLDER / "voice_loss.tsv", ("spectral",), history)
    print(f"voice: {path} is at step {steps} -> {FOLDER / MIMI_FILE}")


def write_mimi(mimi: Mimi, path: Path) -> None:
    """A Mimi file: weights in 16 bits, codebooks in 32, since codes hang on small differences."""
    mimi = copy.deepcopy(mimi).cpu()
    for parameter in mimi.parameters():
        parameter.data = parameter.data.half()
    save_mimi(mimi, path)


def save_progress(path: Path, **what) -> None:
    """Keeps what a stage needs to go on: state dicts of modules and optimizers, the step, the curve."""
    with whole_file(path) as file:
        torch.save(
            {
                key: thing.state_dict() if hasattr(thing, "state_dict") else thing
                for key, thing in what.items()
            },
            file,
        )


def forget(work: Path, *names: str) -> None:
    """Removes work files that what is made now will make invalid."""
    for name in names:
        (work / name).unlink(missing_ok=True)


def needed(path: Path, stage: str) -> Path:
    """The path, if an earlier stage has made it."""
    if not path.exists():
        raise SystemExit(f"{path} is missing; first run: python tiny/train.py {stage}")
    return path


def resume(path: Path, **parts) -> tuple[int, list[list]]:
    """Puts back what `save_progress` kept, if it did: the step to go on with, and the curve so far."""
    if not path.exists():
        return 0, []
    saved = torch.load(path, map_location="cpu")
    for key, part in parts.items():
        part.load_state_dict(saved[key])
    return saved["step"], saved["history"]


def write_curve(path: Path, names: tuple[str, ...], history: list[list]) -> None:
    """A loss curve as text: a step a row."""
    rows = [["step", *names], *history]
    path.write_text("".join("\t".join("" if x is None else str(x) for x in row) + "\n" for row in rows))


# -------------------------------------------------------------------------------------------------- stage: lm

# Frames of silence around an utterance when it is encoded. After a question the codes take up to 29 frames to
# become those of lasting silence again, as the window of both layers runs empty. Whoever cuts them off before
# trains a model that stops talking a second after each question, at codes that it has never heard. What came
# before it shows in its codes too, so the silence there is LEAD frames or more.
LEAD, TAIL = 4, 30
OWN_TAIL = 8  # Moshi's voice comes from its own codes, and returns to silence when it says so
FRAMES = 160  # of a training conversation, 12.8 s
ANSWER_AFTER, STOP_AFTER = 3, 3  # frames from the end of the user's words to Moshi's first, or to its silence
COUNT_EVERY = 9  # frames from a number to the next, more where it is long


class Encoded:
    """All utterances as codes, and what a conversation is put together from."""

    def __init__(self, speech: Speech, tokenizer: sentencepiece.SentencePieceProcessor):
        codes, nothing = encode_all(speech)
        self.silence = nothing[:, -1]  # [8], of silence that has lasted long
        self.start = nothing[:, [0, *range(TAIL)]]  # [8, 31], of a new stream; its first frame goes in twice
        self.users: dict[str, list] = {}  # question -> [(codes [8, F], frames of it with speech), ...]
        # Moshi's words: (the word before, the word, is it the last?) -> [(codes [8, F], frames, tokens), ...]
        self.words: dict[tuple[str, str, bool], list] = {}
        for i, (text, *_) in enumerate(speech.jobs):
            if i >= speech.own:
                self.users.setdefault(text, []).append(codes[i])
            else:
                self.cut(text.split(), *codes[i], speech.words[i], tokenizer)

    def cut(self, words: list[str], codes: np.ndarray, length: int, starts: list[float], tokenizer) -> None:
        """Cuts a sentence of Moshi into its words, each from the frame where it starts to the next one's."""
        assert len(words) == len(starts), f"espeak-ng says {' '.join(words)!r} in {len(starts)} words"
        begins = [0, *(int(start * RATE / FRAME) for start in starts[1:])]
        sound_ends = [*begins[1:], length]
        ends = [*begins[1:], codes.shape[1]]  # the last word keeps the silence after it
        for key, begin, sound_end, end in zip(word_keys(words), begins, sound_ends, ends):
            _, word, _ = key
            piece = codes[:, begin:end], sound_end - begin, tokenizer.encode(word)
            self.words.setdefault(key, []).append(piece)


def word_keys(words: list[str]) -> list[tuple[str, str, bool]]:
    """(the word before, the word, is it the last?) for each word of a sentence."""
    return [(before, word, n == len(words)) for n, (before, word) in enumerate(zip(["", *words], words), 1)]


@torch.no_grad()
def encode_all(speech: Speech, batch: int = 32) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    """[(codes [8, F], frames until the speech ends), ...] of all utterances, and of silence [8, 100]."""
    mimi = load_mimi(needed(FOLDER / MIMI_FILE, "voice"), MimiConfig.from_dict(MIMI), 8, DEVICE)
    rng, result = random_numbers(5), [None] * len(speech)
    order = sorted(range(len(speech)), key=lambda i: len(speech[i]))
    for start in range(0, len(order), batch):
        rows, sounds, ends = order[start : start + batch], [], []
        for i in rows:
            own = i < speech.own  # starts on a frame; a user starts anywhere, loud or soft
            offset, gain = (0, 1.0) if own else (int(rng.integers(FRAME)), 10 ** rng.uniform(-0.4, 0.15))
            sounds.append(np.pad(speech[i] * gain, (offset, 0)))
            ends.append(-(-len(sounds[-1]) // FRAME))
        lead = int(rng.integers(LEAD, TAIL))  # the first turn comes soon, the others after long silence
        wave = np.zeros((len(rows), 1, (lead + max(ends) + TAIL) * FRAME), np.float32)
        for row, x in enumerate(sounds):
            wave[row, 0, lead * FRAME : lead * FRAME + len(x)] = x.clip(-1, 1)
        codes = mimi.encode(torch.from_numpy(wave).to(DEVICE)).cpu().numpy()
        for row, i in enumerate(rows):
            tail = OWN_TAIL if i < speech.own else TAIL
            result[i] = codes[row, :, lead : lead + ends[row] + tail], ends[row]
        progress("encode", start + len(rows), len(order))
    silence = mimi.encode(torch.zeros(1, 1, 100 * FRAME, device=DEVICE))[0].cpu().numpy()
    return result, silence


def conversation(encoded: Encoded, turns: dict[str, list[Turn]], rng: np.random.Generator) -> np.ndarray:
    """The aligned codes [17, FRAMES] of a few turns in random order, silence between them."""
    text = np.full(FRAMES, PAD)
    moshi, user = (np.tile(encoded.silence[:, None], FRAMES) for _ in range(2))

    def put(stream: np.ndarray, codes: np.ndarray, at: int) -> None:
        stream[:, at : at + codes.shape[1]] = codes[:, : max(0, FRAMES - at)]

    def speak(sentence: str, at: int) -> int:
        """Moshi says it; returns the frame where its sound ends.

        Each word is taken from any of the sentences that have it after the same word, and as the last or not.
        Whole sentences would always be the same codes, and the sound of the first word would give away how
        the sentence ends: the model would follow its own voice instead of listening.
        """
        for key in word_keys(sentence.split()):
            codes, length, tokens = pick(rng, encoded.words[key])
            put(moshi, codes, at)
            if at <= FRAMES and text[at - 1] == PAD:
                text[at - 1] = EPAD
            text[at : at + len(tokens)] = tokens[: max(0, FRAMES - at)]
            at += length
        return at

    def ask(question: str, at: int) -> int:
        codes, length = pick(rng, encoded.users[question])
        put(user, codes, at)
        return at + length

    def hush(at: int) -> None:
        """From this frame on Moshi is silent."""
        text[at:] = PAD
        moshi[:, at:] = encoded.silence[:, None]

    if rng.random() < 0.5:  # a stream that begins; in the others they have been talking for a while
        put(user, encoded.start, 0)
    at = int(rng.integers(1, 15))
    if rng.random() < 0.06:
        at = int(rng.integers(25, 2 * FRAMES))  # also silence for silence
    while at < FRAMES - 10:
        turn = pick(rng, turns[rng.choice(list(turns), p=[0.37, 0.27, 0.19, 0.13, 0.04])])
        end = ask(turn.question, at)
        start, stop = end + ANSWER_AFTER, None
        if turn.count_from is not None:
            stop_at = start + int(rng.integers(2, 70))
            number, finish = turn.count_from, start
            while number < len(NUMBERS) and start <= min(FRAMES, stop_at + 20):
                finish = speak(NUMBERS[number], start)
                start += max(COUNT_EVERY, finish - start + 2)
                number += 1
            if stop_at < finish:
                stop = stop_at
        elif turn.answer:
            finish = speak(turn.answer, start)
            if rng.random() < 0.05:
                stop = start + int(rng.integers(1, 8))
        else:
            finish = end
        if stop is not None:
            end = ask("stop", stop)
            hush(end + STOP_AFTER)
            finish = end + STOP_AFTER
        at = finish + int(rng.integers(4, 20))
    return np.concatenate([text[None], moshi, user])


def pick(rng: np.random.Generator, those: list):
    """One of them."""
    return those[int(rng.integers(len(those)))]


def make_tokenizer() -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model of all that Moshi says, with the special tokens where the real one has them."""
    sentences = [turn.answer for those in all_turns().values() for turn in those if turn.answer]
    sentences += NUMBERS * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=160,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (FOLDER / TOKENIZER_FILE).write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


LM_LOSSES = ("text", "audio")


def stage_lm(work: Path, steps: int = 3200, batch: int = 16) -> None:
    """Trains Moshi on conversations: work/lm.pt, then the rest of the folder."""
    if (work / "encoded.pt").exists():
        encoded, tokenizer = torch.load(work / "encoded.pt", weights_only=False), make_tokenizer()
    else:
        speech, tokenizer = Speech(work), make_tokenizer()
        encoded = Encoded(speech, tokenizer)
        with whole_file(work / "encoded.pt") as file:
            torch.save(encoded, file)
    turns = {
        kind: [turn for turn in those if turn.question in encoded.users]
        for kind, those in all_turns().items()
    }
    torch.manual_seed(6)
    config = {**MOSHI, "text_card": tokenizer.vocab_size()}
    moshi = Moshi(MoshiConfig.from_dict(config)).to(DEVICE)
    optimizer = torch.optim.AdamW(moshi.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    path = work / "lm.pt"
    first, history = resume(path, moshi=moshi, optimizer=optimizer)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.2e-3 * schedule(step, steps, warmup=100)
        rng = random_numbers(7, step)
        codes = torch.from_numpy(np.stack([conversation(encoded, turns, rng) for _ in range(batch)]))
        # No single code may decide what was heard: of the user's, some are lost (the semantic ones seldom).
        lost = rng.random((batch, 8, FRAMES)) < np.array([0.05] + 7 * [0.15])[:, None]
        codes[:, 9:][torch.from_numpy(lost)] = NO_INPUT
        # Nothing is heard in a tenth of the conversations: there only the text tells the voice what to say.
        codes[torch.from_numpy(rng.random(batch) < 0.1), 9:] = NO_INPUT
        # Its own codes won't always be those of the training either, and one wrong code must not lead it
        # astray. Hence its voice is unknown in a fifth of the conversations, and strewn with codes of other
        # moments in another fifth.
        voice, share = codes[:, 1:9], rng.random(batch)
        strewn = (rng.random(voice.shape) < 0.1) & (share < 0.4)[:, None, None]
        others = voice.roll((1, int(rng.integers(1, FRAMES))), (0, 2))
        codes[:, 1:9] = torch.where(torch.from_numpy(strewn), others, voice)
        codes[torch.from_numpy(share < 0.2), 1:9] = NO_INPUT
        loss, parts = moshi.loss(codes.to(DEVICE), text_padding_weight=0.3, first_codebook_weight=10.0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(moshi.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            history.append([step + 1, *(round(parts[key].item(), 4) for key in LM_LOSSES)])
            progress("lm", step + 1, steps, "".join(f", {k} {v}" for k, v in zip(LM_LOSSES, history[-1][1:])))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_progress(path, moshi=moshi, optimizer=optimizer, step=step + 1, history=history)
    save_moshi(copy.deepcopy(moshi).half().cpu(), FOLDER / MOSHI_FILE)
    config.update(
        {
            "model_type": "moshi",
            "moshi_name": MOSHI_FILE,
            "mimi_name": MIMI_FILE,
            "mimi_config_name": "mimi_config.json",
            "tokenizer_name": TOKENIZER_FILE,
            "lm_gen_config": {"temp": 0.5, "temp_text": 0.4, "top_k": 20, "top_k_text": 5},
            "stt_config": {"audio_silence_prefix_seconds": 0.0, "audio_delay_seconds": 3.0},
        }
    )
    (FOLDER / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_curve(FOLDER / "lm_loss.tsv", LM_LOSSES, history)
    print(f"lm: {path} is at step {steps} -> {FOLDER / MOSHI_FILE}")


# ------------------------------------------------------------------------------------------------ stage: eval


@dataclasses.dataclass
class Asked:
    """A turn of an examination, and when it was said, in samples."""

    kind: str  # a key of `all_turns`
    turn: Turn
    start: int
    end: int
    until: int = 0  # where the user's next question begins
    stop: int | None = None  # where the word 'stop' ended that broke off the counting


def examination(espeak: Espeak, rng: np.random.Generator, turns: int = 3) -> tuple[np.ndarray, list[Asked]]:
    """What a user says in a conversation that training never drew: sound [T], and what was asked when."""
    held_out = {
        kind: [turn for turn in those if turn.held_out or kind in ("talk", "stop")]
        for kind, those in all_turns().items()
    }
    voice, sound, asked = pick(rng, VOICES), np.zeros(90 * RATE, np.float32), []
    at = int(rng.uniform(0.3, 2) * RATE)

    def ask(text: str, at: int) -> int:
        x, _, _ = espeak.say(text, voice, int(rng.choice(HELD_OUT_SPEEDS)), int(rng.choice(HELD_OUT_PITCHES)))
        sound[at : at + len(x)] = x / 32768
        return at + len(x)

    for _ in range(turns):
        kind = str(rng.choice(list(held_out), p=[0.3, 0.25, 0.25, 0.16, 0.04]))
        turn = pick(rng, held_out[kind])
        end = ask(turn.question, at)
        asked.append(Asked(kind, turn, at, end))
        finish = end + ANSWER_AFTER * FRAME
        if turn.count_from is not None:
            most = (len(NUMBERS) - turn.count_from) * COUNT_EVERY * FRAME / RATE
            finish = ask("stop", finish + int(rng.uniform(1, min(8, most)) * RATE))
            asked[-1].stop = finish
        elif turn.answer:
            finish += len(espeak.say(turn.answer, MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH)[0])
        at = finish + int(rng.uniform(0.9, 2.5) * RATE)
        asked[-1].until = at
    return sound[: at + 2 * RATE], asked


@torch.no_grad()
def talk(sounds: list[np.ndarray], greedy: bool) -> tuple[np.ndarray, np.ndarray]:
    """The finished folder listens to all at once, by the frame: text [B, F], Moshi's sound [B, F * 1920]."""
    torch.manual_seed(11)
    moshi, mimi, _, config = load_checkpoint(FOLDER, DEVICE)
    settings = config["lm_gen_config"]
    gen = MoshiGen(
        moshi,
        len(sounds),
        settings["temp"],
        settings["temp_text"],
        settings["top_k"],
        settings["top_k_text"],
        greedy,
    )
    frames = max(-(-len(x) // FRAME) for x in sounds)
    user = np.stack([np.pad(x, (0, frames * FRAME - len(x))) for x in sounds])[:, None]
    user = torch.from_numpy(user).to(DEVICE)
    state, text, wave = init_state(mimi, len(sounds)), [], []
    for f, frame in enumerate(user.split(FRAME, dim=-1)):
        codes = mimi.encode(frame, state)
        if f == 0:
            gen.step(codes)
        tokens = gen.step(codes)
        text.append(tokens[:, 0, 0].cpu())
        wave.append(mimi.decode(tokens[:, 1:], state)[:, 0].cpu())
        progress("talk", f + 1, frames)
    _started.clear()
    return torch.stack(text, 1).numpy(), torch.cat(wave, 1).numpy()


class Recogniser:
    """pocketsphinx with a grammar of what Moshi can say: a listener that nobody here has trained."""

    GRAMMAR = """#JSGF V1.0;
        grammar answers;
        <ones> = one | two | three | four | five | six | seven | eight | nine;
        <small> = zero | <ones> | ten;
        <number> = <small> | eleven | twelve | thirteen | fourteen | fifteen | sixteen | seventeen | eighteen
                 | nineteen | twenty | (twenty <ones>) | thirty;
        public <answer> = (<small> (plus | minus) <small> is <number>) | <number>+ | """

    def __init__(self, work: Path):
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise SystemExit("pocketsphinx is missing; install it: pip install pocketsphinx") from None
        from generate import resample

        grammar = work / "answers.jsgf"
        talk = [answer.replace("moshi", "mow she") for answer in SMALL_TALK]  # a word that it does not know
        grammar.write_text(self.GRAMMAR + " | ".join(f"({answer})" for answer in talk) + ";\n")
        self.resample, self.decoder = resample, Decoder(jsgf=str(grammar), samprate=16000, loglevel="FATAL")

    def hear(self, x: np.ndarray) -> list[str]:
        """Words in the sound [T] at 24 kHz."""
        sound = self.resample(torch.from_numpy(np.pad(x.astype(np.float32), 6000)), RATE, 16000).clamp(-1, 1)
        self.decoder.start_utt()
        self.decoder.process_raw((sound * 32767).numpy().astype("<i2").tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr.replace("mow she", "moshi").split() if found else []

    def score(self, x: np.ndarray, words: list[str]) -> int:
        """How many of the words are heard, in their order."""
        blocks = difflib.SequenceMatcher(None, words, self.hear(x), autojunk=False).get_matching_blocks()
        return sum(block.size for block in blocks)


def decibels(x: np.ndarray, block: int) -> np.ndarray:
    """RMS of each whole block of x [T], in dB of full scale."""
    blocks = x[: len(x) // block * block].reshape(-1, block)
    return 20 * np.log10(np.sqrt(np.mean(blocks**2, axis=1)) + 1e-9)


def words_said(tokens: np.ndarray, tokenizer) -> list[str]:
    """The words of a piece of the text stream."""
    return tokenizer.decode([int(token) for token in tokens if token not in (PAD, EPAD)]).split()


def is_right(asked: Asked, words: list[str], last: int | None) -> bool:
    """Is this the answer? A count is right if it goes up from its first number until 'stop' (or thirty)."""
    if asked.turn.count_from is None:
        return " ".join(words) == asked.turn.answer
    numbers = " ".join(NUMBERS[asked.turn.count_from :]) + " "
    in_order = bool(words) and numbers.startswith(" ".join(words) + " ")
    if not in_order:
        return False
    early = asked.stop - last * FRAME  # from the last number's start to the end of 'stop', in samples
    return early > -0.7 * RATE and (words[-1] == "thirty" or early < 1.5 * COUNT_EVERY * FRAME)


class Tally:
    """The table: what was counted, in rows that stand in the order in which they were first counted."""

    def __init__(self):
        self.rows: dict[tuple[str, str], list[int]] = {}

    def add(self, row: str, goal: str, hits: int, of: int = 1) -> None:
        """Counts `hits` of `of` cases more."""
        counts = self.rows.setdefault((row, goal), [0, 0])
        counts[0], counts[1] = counts[0] + int(hits), counts[1] + of

    def __str__(self) -> str:
        rows = [
            f"| {row} | {hits} of {of} | {100 * hits / max(of, 1):.1f} % | {goal} |"
            for (row, goal), (hits, of) in self.rows.items()
        ]
        return "\n".join(["| what | count | share | goal |", "| --- | --- | --- | --- |", *rows])


def score_text(tally: Tally, how: str, asked: Asked, tokens: np.ndarray, tokenizer) -> bool:
    """Does the text stream [F] answer what was asked?"""
    first, last = asked.end // FRAME, asked.until // FRAME
    onsets = first + np.flatnonzero(~np.isin(tokens[first:last], (PAD, EPAD)))
    words = words_said(tokens[first:last], tokenizer)
    good = is_right(asked, words, int(onsets[-1]) if len(onsets) else None)
    tally.add(f"text of the answer exactly right, {how}", "98 %", good)
    tally.add(f"... {asked.kind}, {how}", "", good)
    if not good:
        print(f"{how}: asked {asked.turn.question!r}, said {' '.join(words)!r}", file=sys.stderr)
    return good


def score_timing(tally: Tally, asked: Asked, sound: np.ndarray) -> None:
    """Is Moshi's sound [T] there when it should be, and only then?

    Heard live, an answer is 80 ms later than in the file: a frame is answered when it is over.
    """
    block = RATE // 100  # 10 ms
    during = decibels(sound[asked.start : asked.end], FRAME) > -45
    tally.add("frames of the user's questions in which Moshi speaks", "under 2 %", during.sum(), len(during))
    if asked.turn.answer or asked.turn.count_from is not None:
        loud = np.flatnonzero(decibels(sound[asked.end : asked.until], block) > -45)
        in_time = len(loud) > 0 and 0.1 <= loud[0] / 100 + FRAME / RATE <= 0.8
        tally.add("answers that begin 0.1 to 0.8 s after the question's end", "95 %", in_time)
    if asked.stop is not None:
        was_speaking = (decibels(sound[asked.stop - RATE : asked.stop], block) > -45).any()
        after = decibels(sound[asked.stop : asked.stop + 2 * RATE], block) > -45
        quiet = [t for t in range(len(after) - 49) if not after[t : t + 50].any()]  # for half a second
        in_time = len(quiet) > 0 and quiet[0] / 100 + FRAME / RATE <= 0.7
        tally.add(
            "silent within 0.7 s of the end of 'stop'", "95 %", was_speaking and in_time, of=int(was_speaking)
        )


def stage_eval(work: Path, conversations: int = 200) -> None:
    """Talks with the folder and prints what came of it, as a table in Markdown."""
    for name, stage in ((MIMI_FILE, "voice"), (MOSHI_FILE, "lm"), ("config.json", "lm")):
        needed(FOLDER / name, stage)
    espeak, rng, recogniser = Espeak(), random_numbers(8), Recogniser(work)
    exams = [examination(espeak, rng) for _ in range(conversations)]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / TOKENIZER_FILE))
    tally = Tally()
    for how in ("greedy", "sampled"):
        text, waves = talk([sound for sound, _ in exams], greedy=how == "greedy")
        marked = [
            (asked, score_text(tally, how, asked, tokens, tokenizer), sound)
            for (_, those), tokens, sound in zip(exams, text, waves)
            for asked in those
        ]
        if how == "sampled":
            continue
        for asked, _, sound in marked:
            score_timing(tally, asked, sound)
        for asked, good, sound in marked:
            if good and asked.turn.answer:
                words = asked.turn.answer.split()
                plain = espeak.say(asked.turn.answer, MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH)[0] / 32768
                original = recogniser.score(plain, words)
                heard = recogniser.score(sound[asked.end : asked.until], words)
                tally.add(
                    "words of right answers that the recogniser hears when espeak-ng says them",
                    "",
                    original,
                    len(words),
                )
                tally.add("... when Moshi says them, of those", "95 %", heard, original)
    for number, (heard, original) in codec_alone(espeak, recogniser).items():
        tally.add(
            "words of all sentences that it hears through the codec alone, with "
            f"{number} of 8 codebooks, of those from espeak-ng",
            "97 %" if number == 8 else "",
            heard,
            original,
        )
    for k, (hits, frames) in phones_in_codes(espeak, random_numbers(10)).items():
        which = ("first, semantic", "second, acoustic")[k]
        tally.add(f"phones that the {which} code tells", "", hits, frames)
    tokens, sound = talk([np.zeros(1000 * FRAME, np.float32)], greedy=True)
    says = (decibels(sound[0], FRAME) > -45) | ~np.isin(tokens[0], (PAD, EPAD))
    tally.add("frames of silence in which Moshi says something", "none", says.sum(), len(says))
    print(tally)


@torch.no_grad()
def codec_alone(espeak: Espeak, recogniser: Recogniser) -> dict[int, tuple[int, int]]:
    """{codebooks: (words heard in Moshi's sentences when coded with so many, and in the original)}."""
    mimi = load_mimi(FOLDER / MIMI_FILE, MimiConfig.from_dict(MIMI), 8, DEVICE)
    found = {number: [0, 0] for number in (8, 4, 2, 1)}
    for text in sorted(all_answers()):
        x = espeak.say(text, MOSHI_VOICE, MOSHI_SPEED, MOSHI_PITCH)[0] / np.float32(32768)
        codes = mimi.encode(torch.from_numpy(np.pad(x, (LEAD * FRAME, TAIL * FRAME)))[None, None].to(DEVICE))
        before = recogniser.score(x, text.split())
        for number, counts in found.items():
            sound = mimi.decode(codes[:, :number])[0, 0, LEAD * FRAME : LEAD * FRAME + len(x)].cpu().numpy()
            counts[0], counts[1] = counts[0] + recogniser.score(sound, text.split()), counts[1] + before
    return {number: tuple(counts) for number, counts in found.items()}


@torch.no_grad()
def phones_in_codes(
    espeak: Espeak, rng: np.random.Generator, sentences: int = 400
) -> dict[int, tuple[int, int]]:
    """{codebook: (frames whose phone its code tells, frames)}: each code stands for its most frequent phone.

    What is most frequent is counted on every other sentence, and told on those between; silence is left out.
    """
    mimi = load_mimi(FOLDER / MIMI_FILE, MimiConfig.from_dict(MIMI), 8, DEVICE)
    names, frames = ["_"], ([], [])
    for i in range(sentences):
        turn = pick(rng, all_turns()[pick(rng, ["sum", "difference", "count", "talk"])])
        x, _, phones = espeak.say(
            turn.question,
            pick(rng, VOICES),
            int(pick(rng, HELD_OUT_SPEEDS)),
            int(pick(rng, HELD_OUT_PITCHES)),
        )
        codes = mimi.encode(torch.from_numpy(x / np.float32(32768))[None, None].to(DEVICE))[0].cpu().numpy()
        names += sorted({name for _, name in phones} - {*names})
        starts = np.array([start for start, _ in phones])
        for f in range(len(x) // FRAME):
            at = np.searchsorted(starts, (f + 0.25) * FRAME / RATE, side="right") - 1
            if at >= 0 and not phones[at][1].startswith("_"):
                frames[i % 2].append((names.index(phones[at][1]), codes[:, f]))
    found = {}
    for k in (0, 1):
        counts = np.zeros((MIMI["quantizer"]["bins"], len(names)))
        for phone, codes in frames[0]:
            counts[codes[k], phone] += 1
        told = counts.argmax(1)
        found[k] = (sum(int(told[codes[k]] == phone) for phone, codes in frames[1]), len(frames[1]))
    return found


# ------------------------------------------------------------------------------------------- the command line

STAGES = {"data": stage_data, "codec": stage_codec, "voice": stage_voice, "lm": stage_lm, "eval": stage_eval}


def main() -> None:
    """Runs a stage, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", default="all", choices=[*STAGES, "all"])
    parser.add_argument(
        "--work", type=Path, default=FOLDER / "work", help="what is made on the way (default: %(default)s)"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # gradients of silence are tiny numbers, which CPUs are slow at
    torch.backends.cudnn.allow_tf32 = False  # it can change codes, see load_mimi
    try:
        for name in STAGES if args.stage == "all" else [args.stage]:
            STAGES[name](args.work)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None


if __name__ == "__main__":
    main()
