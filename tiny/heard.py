"""How a voice reaches a microphone: other mouths, rooms, telephones, noise. For training only."""

from __future__ import annotations

import math

import numpy as np

from voices import RATE


def resampled(x: np.ndarray, factor: float) -> np.ndarray:
    """Sound [T] faster by `factor`: pitch and vocal tract move together, as if somebody smaller spoke."""
    return np.interp(np.arange(0, len(x) - 1, factor), np.arange(len(x)), x)


def stretched(x: np.ndarray, factor: float) -> np.ndarray:
    """Sound [T] longer by `factor` at the same pitch: pieces of 40 ms overlap where they fit best (WSOLA)."""
    window, half = 960, 480
    shape = np.hanning(window + 1)[:window]
    padded = np.pad(x, (half, 2 * window))
    y = np.zeros(int(len(x) * factor) + 2 * window)
    before = padded[:window]
    for at in range(0, int(len(x) * factor), half):
        place = int(at / factor)
        low = max(0, place - 240)
        piece = padded[low : place + 240 + window]
        if len(piece) < window:
            break
        score = np.correlate(piece, before, "valid") if at else np.zeros(1)
        best = low + int(score.argmax()) if at else place
        y[at : at + window] += shape * padded[best : best + window]
        before = padded[best + half : best + half + window]
        if len(before) < window:
            break
    return y[half : half + int(len(x) * factor)]


def coloured(rng: np.random.Generator, length: int) -> np.ndarray:
    """Noise [T] of a random colour, from rumble to hiss, RMS 1; now and then it comes and goes."""
    hertz = np.fft.rfftfreq(length, 1 / RATE)
    colour = (hertz + 50) ** -rng.uniform(-0.2, 1.2)
    if rng.random() < 0.3:  # a band of it
        centre = np.exp(rng.uniform(math.log(150), math.log(6000)))
        colour *= np.exp(-((np.log((hertz + 1) / centre) / rng.uniform(0.3, 1)) ** 2))
    parts = rng.standard_normal((2, len(hertz)), np.float32)
    noise = np.fft.irfft(((parts[0] + 1j * parts[1]) * colour).astype(np.complex64), length)
    if rng.random() < 0.3:
        noise *= 1 + rng.uniform(0, 1) * np.sin(np.arange(length) * 2 * math.pi * rng.uniform(0.2, 8) / RATE)
    return noise / (noise.std() + 1e-9)


def hum(rng: np.random.Generator, length: int) -> np.ndarray:
    """The mains or a motor: harmonics of one pitch [T], RMS 1."""
    pitch, times = rng.choice([50, 60, rng.uniform(40, 400)]), np.arange(length) / RATE
    parts = [
        rng.uniform(0.05, 1) / k * np.sin(2 * math.pi * (k * pitch * times + rng.random()))
        for k in range(1, int(rng.integers(2, 9)))
    ]
    return sum(parts) / (np.std(sum(parts)) + 1e-9)


def clicks(rng: np.random.Generator, length: int) -> np.ndarray:
    """Knocks and beeps at a few moments [T], peak 1: what is no speech, and calls for no answer."""
    y = np.zeros(length)
    for _ in range(int(rng.integers(1, 5))):
        size = int(rng.uniform(0.01, 0.4) * RATE)
        at = int(rng.integers(0, max(1, length - size)))
        times = np.arange(size) / RATE
        tone = np.sin(2 * math.pi * np.exp(rng.uniform(4, 8.5)) * times)
        knock = rng.standard_normal(size) if rng.random() < 0.6 else tone
        y[at : at + size] += (knock * np.exp(-times * rng.uniform(5, 200)))[: length - at]
    return y / (np.abs(y).max() + 1e-9)


class Microphone:
    """One way from a mouth to numbers, drawn once: the same for all that somebody says in a conversation.

    `hard` is the share of ways on which anything happens to the sound once it has left the mouth. On others
    it is only louder or softer.
    """

    def __init__(self, rng: np.random.Generator, hard: float = 1.0):
        self.rng, self.plain = rng, rng.random() >= hard
        self.mouth = math.exp(rng.uniform(math.log(0.8), math.log(1.25))) if rng.random() < 0.75 else 1.0
        self.stretch = math.exp(rng.uniform(math.log(0.75), math.log(1.35))) if rng.random() < 0.2 else 1.0
        self.gain = 10 ** (rng.uniform(-20, 4) / 20)
        self.clip = rng.uniform(0.3, 0.9) if rng.random() < 0.1 else None
        self.noise = 10 ** (rng.uniform(-60, -25) / 20) if rng.random() < 0.65 else 0.0
        self.hums, self.clicks = rng.random() < 0.12, rng.random() < 0.08
        # Recordings that are put into silence bring their noise along, and it ends with them.
        self.trimmed = rng.random() < 0.35
        if self.plain:
            self.stretch, self.clip, self.noise, self.hums, self.clicks = 1.0, None, 0.0, False, False

    def voice(self, x: np.ndarray) -> np.ndarray:
        """What becomes of an utterance [T] by who speaks, and how fast."""
        if self.mouth != 1:
            x = resampled(x, self.mouth)
        return stretched(x, self.stretch) if self.stretch != 1 else x

    def response(self, length: int) -> np.ndarray:
        """Room and microphone: what they make of each frequency of `length` samples, complex."""
        rng, hertz = self.rng, np.fft.rfftfreq(length, 1 / RATE)
        if self.plain:
            return np.full(len(hertz), self.gain, np.complex64)
        decibels = np.zeros(len(hertz))
        if rng.random() < 0.7:  # an equaliser of eight bands
            bands = np.log(np.geomspace(100, 8000, 8))
            decibels += np.interp(np.log(hertz + 1), bands, rng.normal(0, 4, 8))
        kind = rng.random()
        if kind < 0.6:  # a third of all heard by telephone, others through something dull
            highest = 3800 if kind < 0.35 else rng.uniform(3000, 9000)
            decibels -= 80 * ((hertz - highest) / 300).clip(0, 1)
        if rng.random() < 0.3:  # a small microphone: no lows
            decibels -= 12 * np.log2(rng.uniform(80, 350) / (hertz + 20)).clip(0, 4)
        response = 10 ** (decibels / 20) + 0j
        if rng.random() < 0.4:  # what guards against echoes turns the phases of the lows, and may cut them
            corner, order = rng.uniform(50, 120), rng.integers(1, 5)
            zero = corner if rng.random() < 0.5 else 0  # an all-pass, or a high-pass
            response *= ((1j * hertz - zero) / (1j * hertz + corner)) ** order
        if rng.random() < 0.4:
            size = int(rng.uniform(0.05, 0.35) * RATE)
            echo = rng.standard_normal(size) * np.exp(-np.arange(size) / size * rng.uniform(3, 9))
            echo *= 10 ** (rng.uniform(-35, -18) / 20)
            echo[: int(rng.uniform(0.0005, 0.01) * RATE)] = 0
            echo[0] = 1
            response *= np.fft.rfft(echo, length)
        return (self.gain * response).astype(np.complex64)

    def heard(self, x: np.ndarray, speaks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Speech [T] in -1..1 -> what the microphone makes of it, without and with noise, hum and knocks.

        `speaks` [T] is 1 where an utterance is.
        """
        rng, length = self.rng, -(-(len(x) + RATE // 3) // 4096) * 4096  # quick to transform, room for echoes
        spectrum = np.fft.rfft(x.astype(np.float32), length) * self.response(length)
        clean, noise = np.fft.irfft(spectrum, length)[: len(x)], np.zeros(len(x))
        if self.noise:
            noise += self.noise * coloured(rng, length)[: len(x)]
        if self.hums:
            noise += 10 ** (rng.uniform(-60, -30) / 20) * hum(rng, len(x))
        if self.clicks:
            noise += 10 ** (rng.uniform(-40, -8) / 20) * clicks(rng, len(x))
        noisy = clean + (noise * speaks if self.trimmed else noise)
        if self.clip:
            most = self.clip * (np.abs(noisy).max() + 1e-9)
            noisy = noisy.clip(-most, most)
        return clean.clip(-1, 1), noisy.clip(-1, 1)
