"""The stages `ear`, `codec`, `voice`: a narrow Mimi learns to tell phones, to code, to sound like Moshi."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heard import Microphone
from loop import (
    DEVICE,
    FOLDER,
    finished,
    forget,
    goes_on,
    in_16_bits,
    needed,
    pick,
    random_numbers,
    resume,
    train,
    write_curve,
)
from mimi_min import CausalConv1d, Mimi, MimiConfig, load_mimi, save_mimi
from moshi_min import MIMI_FILE
from speech import FRAME, RATE, Speech
from voices import PHONES

# The released Mimi, only narrower: the rates, strides and kernels are the same.
MIMI = MimiConfig(
    n_filters=16,
    dimension=160,
    num_layers=3,
    num_heads=4,
    dim_feedforward=640,
    context=32,
    n_q=8,
    bins=256,
    quantizer_dimension=32,
)
FLOOR = 3e-4  # of spectra, -70 dB: what is softer counts as silence
CLIP = 16 * FRAME  # 1.28 s: the transformers' window of 32 positions is full at its end


PLACES = (-0.125, 0.125, 0.375, 0.625)  # of the phones that a frame's first code shall tell, in frames
SHARES = {"espeak": 0.25, "flite": 0.08, "festival": 0.12, "joe": 0.27, "kokoro": 0.28}  # of users, by make


# In training a convolution is the faster way from 512 outputs on already, not from 2,048.
CausalConv1d.matmul_up_to = 512


def draw_user(speech: Speech, rng: np.random.Generator) -> int:
    """An utterance of any of the makes that are there."""
    shares = {name: SHARES.get(name, 1.0) for name in speech.makes if name != "moshi"}
    make = rng.choice(list(shares), p=np.array([*shares.values()]) / sum(shares.values()))
    return pick(rng, speech.makes[str(make)])


class Clips(NamedTuple):
    """A batch for the codec."""

    sound: Tensor  # [B, 1, CLIP], to be coded
    clean: Tensor  # [B, 1, CLIP], to come back: without the noise
    phones: Tensor  # [B, frames, places], to be told


def clips(
    speech: Speech, rng: np.random.Generator, batch: int, own_share: float = 0.0, hard: float = 1.0
) -> Clips:
    """Clips of users, each heard in its own way; `own_share` of them are Moshi's, as they are, on a frame."""
    frames, size = CLIP // FRAME, len(PLACES)
    sound, clean = np.zeros((2, batch, CLIP), np.float32)
    phones = np.zeros((batch, frames, size), np.int64)
    times = (np.arange(frames)[:, None] + PLACES) * FRAME
    for row in range(batch):
        own = row < own_share * batch
        i = pick(rng, speech.makes["moshi"]) if own else draw_user(speech, rng)
        way = Microphone(rng, hard)
        x = speech[i] if own else way.voice(speech[i])
        start = int(rng.integers(-CLIP // 2, max(1, len(x) - CLIP // 3)))  # below 0: silence first
        if own:
            start = start // FRAME * FRAME
        if rng.random() < 0.04:
            x = x[:0]  # nobody speaks
        source, place = x[max(start, 0) : start + CLIP], max(-start, 0)
        clean[row, place : place + len(source)] = source
        if own:
            sound[row] = clean[row]
        else:
            speaks = np.zeros(CLIP, np.float32)
            speaks[place : place + len(source)] = 1
            clean[row], sound[row] = way.heard(clean[row], speaks)
        if len(x):
            phones[row] = speech.phone_at(i, (times + start) / RATE * (len(speech.sounds[i]) / len(x)))
    return Clips(*(torch.from_numpy(x)[:, None] for x in (sound, clean)), torch.from_numpy(phones))


def mel_bands(size: int, count: int) -> Tensor:
    """Weights [count, size // 2 + 1] that add up the bins of a spectrum to bands of the mel scale."""
    hertz = torch.linspace(0, RATE / 2, size // 2 + 1)
    highest = 2595 * math.log10(1 + RATE / 1400)
    edges = 700 * (10 ** (torch.linspace(0, highest, count + 2) / 2595) - 1)
    rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles / triangles.sum(1, keepdim=True).clamp(min=1)


class SpectralLoss(nn.Module):
    """Mean distances of mel spectra and of their logarithms, at four resolutions (DAC, Kumar et al. 2023).

    At one of them the single bins count as well: bands are too wide to tell the harmonics of a pitch.
    """

    SINGLE = 1024

    def __init__(self, sizes=(256, 512, 1024, 2048), mels=(20, 40, 64, 80)):
        super().__init__()
        self.sizes = sizes
        for size, count in zip(sizes, mels):
            self.register_buffer(f"mel{size}", mel_bands(size, count))
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
                spectra.append(power.sqrt() * 2 / window.sum())
            a, b = (mel @ bins for bins in spectra)
            total = total + ((a + FLOOR) / (b + FLOOR)).log().abs().mean() + 20 * (a - b).abs().mean()
            if size == self.SINGLE:
                a, b = spectra
                total = total + ((a + FLOOR) / (b + FLOOR)).log().abs().mean()
        return total / len(self.sizes)


@torch.no_grad()
def start_weights(mimi: Mimi) -> None:
    """Sound as loud after each convolution as before it. PyTorch's own start loses it, and much time.

    Speech is about 0.05, but the ELUs bend at 1: the first convolution makes it louder, the last softer. Else
    all would be nearly linear for long, and the energy of a band isn't.
    """
    for module in mimi.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            inputs = module.weight[0].numel()  # that an output adds up
            if isinstance(module, nn.ConvTranspose1d):
                inputs = module.in_channels // module.groups * module.kernel_size[0] // module.stride[0]
            nn.init.normal_(module.weight, std=inputs**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    mimi.encoder[0].conv.weight.mul_(12)
    mimi.decoder[-1].conv.weight.mul_(1 / 12)
    mimi.decoder[-1].conv.bias.zero_()
    for name, parameter in mimi.named_parameters():
        if ".scale" in name:  # of a transformer's updates; so few layers need no caution
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


def wanted_variances() -> Tensor:
    """What each direction of the acoustic vectors shall have [dim]: the first 7 times as much as the last.

    Left alone, one direction, the loudness, gets nearly all of the energy, and all codebooks but the first
    code what nobody hears. Where all have the same, the first codebooks don't know where to begin.
    """
    return torch.exp(-torch.arange(MIMI.quantizer_dimension, device=DEVICE) / 16)


def spread_loss(x: Tensor) -> Tensor:
    """x [B, F, dim] -> how far its covariance is from these variances and from no correlation at all."""
    wanted = wanted_variances()
    x = x.flatten(0, 1) / wanted.sqrt()
    return (x.T.cov() - torch.eye(len(wanted), device=x.device)).pow(2).mean() * len(wanted)


@torch.no_grad()
def start_quantizer(quantizer, z: Tensor, spread: bool) -> None:
    """Each codebook of a ResidualQuantizer starts at the k-means of what it will quantize, z [B, D, F].

    `spread`: its projections start at the directions in which z differs most, with the wanted variances.
    """
    if spread:
        vectors = z.transpose(1, 2).flatten(0, 1)
        values, directions = torch.linalg.eigh((vectors - vectors.mean(0)).T.cov())
        wanted = wanted_variances()
        scales = (values.flip(0)[: len(wanted)].clamp(min=1e-6) / wanted).sqrt()
        directions = directions.flip(1)[:, : len(wanted)]
        quantizer.input_proj.weight.copy_((directions / scales).T[..., None])
        quantizer.output_proj.weight.copy_((directions * scales)[..., None])
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
    """A ResidualQuantizer in training. z [B, D, F]; row b uses its first number[b] codebooks, below 0 none:
    it isn't quantized, as half of the rows in the training of the real Mimi.

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
    straight = torch.where((number < 0)[:, None, None], x, x + (total - x).detach())
    out = quantizer.output_proj(straight.transpose(1, 2))
    return out * (number != 0)[:, None, None], commitment, straight


def phone_heads() -> nn.Module:
    """What tells the phones from the semantic vector [.., dim] of a frame: logits [.., places * phones]."""
    dim, hidden = MIMI.quantizer_dimension, 192
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, len(PLACES) * len(PHONES)))


def phone_loss(heads: nn.Module, vectors: Tensor, phones: Tensor) -> dict[str, Tensor]:
    """vectors [B, F, dim], phones [B, F, places] -> the loss, and what share is told of all but silence."""
    logits = heads(vectors).unflatten(-1, (len(PLACES), -1))
    right, spoken = logits.argmax(-1) == phones, phones > 0
    loss = F.cross_entropy(logits.flatten(0, 2), phones.flatten())
    return {"phone": loss, "right": right[spoken].float().mean()}


def semantic_vectors(mimi: Mimi, sound: Tensor) -> Tensor:
    """Sound [B, 1, T] -> what the first codebook will quantize [B, F, dim]."""
    return mimi.quantizer.semantic.input_proj(mimi.to_latent(sound)).transpose(1, 2)


class Bands(nn.Module):
    """The levels of 40 bands every 10 ms, eight times a frame: what the ear shall hear besides phones.

    They give every frame 320 numbers to learn from, where the phones give four: the convolutions become an
    ear's filters much sooner. In the codec they are told from what the codebooks gave: each of these finds
    work from the start, before the decoder can make anything of small differences.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mel", mel_bands(512, 40))
        self.register_buffer("window", torch.hann_window(512))
        self.head = nn.Linear(MIMI.dimension, 8 * 40)

    def forward(self, latent: Tensor, sound: Tensor) -> Tensor:
        """latent [B, D, F] of sound [B, 1, F * 1920] -> how far its levels are from the truth, in ln."""
        bins = torch.stft(
            F.pad(sound[:, 0], (136, 136)), 512, 240, window=self.window, center=False, return_complex=True
        )
        levels = (self.mel @ (bins.abs() * 2 / self.window.sum()) + FLOOR).log()  # [B, 40, 8 * F]
        guess = self.head(latent.transpose(1, 2)).unflatten(-1, (8, 40)).flatten(1, 2).transpose(1, 2)
        return (levels - guess).abs().mean()


VOICE_FILE = "voice.safetensors"  # in the work folder: the finished codec
AFTER_CODEC = (MIMI_FILE, "voice.pt", VOICE_FILE, "heard/*.npz", "lm.pt")  # what hangs on its weights
EAR_LOSSES = ("bands", "phone", "right", "new")


def stage_ear(work: Path, steps: int = 3000, batch: int = 10) -> None:
    """The encoder learns to hear phones and bands, whoever speaks: work/ear.pt.

    In the curve `right` are the phones told, and `new` those of flite's rms, which is never trained.
    """
    speech, watched = Speech(work), Speech(work, ("rms",))
    torch.manual_seed(2)
    mimi, heads, bands = Mimi(MIMI).to(DEVICE), phone_heads().to(DEVICE), Bands().to(DEVICE)
    start_weights(mimi)
    parts = (
        mimi.encoder,
        mimi.encoder_transformer,
        mimi.downsample,
        mimi.quantizer.semantic.input_proj,
        heads,
        bands,
    )
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=1e-2)

    def losses(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        hard = min(1.0, (step + 1) / 600)  # first as if nothing were between mouth and microphone
        sound, clean, phones = (
            x.to(DEVICE) for x in clips(speech, random_numbers(3, 0, step), batch, hard=hard)
        )
        latent = mimi.to_latent(sound)
        vectors = mimi.quantizer.semantic.input_proj(latent).transpose(1, 2)
        found = phone_loss(heads, vectors, phones)
        found["bands"] = bands(latent, clean)
        if step % 100 == 99 and "rms" in watched.makes:
            found["new"] = watch(mimi, heads, watched)
        return found["phone"] + 0.5 * found["bands"], found

    path, modules = work / "ear.pt", {"mimi": mimi, "heads": heads, "bands": bands}
    if goes_on(path, steps):
        forget(work, "codec.pt", *AFTER_CODEC)  # made with another codec
    history = train(
        path, losses, EAR_LOSSES, optimizer, modules, steps, highest=1.5e-3, warmup=100, clip=1.0, every=50
    )
    write_curve(FOLDER / "ear_loss.tsv", EAR_LOSSES, history)
    print(f"ear: finished -> {path}")


@torch.no_grad()
def watch(mimi: Mimi, heads: nn.Module, watched: Speech, quantized: bool = False) -> Tensor:
    """The share of phones told in clips of a voice that isn't trained."""
    rng, total = random_numbers(4), []
    for _ in range(2):
        sound, _, phones = clips(watched, rng, 32)
        vectors = semantic_vectors(mimi, sound.to(DEVICE))
        if quantized:
            (codebook,) = mimi.quantizer.semantic.codebooks
            vectors = codebook.decode(codebook.encode(vectors))
        total.append(phone_loss(heads, vectors, phones.to(DEVICE))["right"])
    return torch.stack(total).mean()


def codec_step(
    mimi: Mimi, heads: nn.Module, bands: Bands, spectral: SpectralLoss, batch: Clips, number: Tensor
) -> dict[str, Tensor]:
    """All losses of a batch of clips; `number` [B] of codebooks for each row, below 0: not quantized."""
    sound, clean, phones = (x.to(DEVICE) for x in batch)
    z = mimi.to_latent(sound)
    semantic, commitment, vectors = quantize(mimi.quantizer.semantic, z, number.clamp(max=1))
    rest = torch.where(number < 0, number, (number - 1).clamp(min=0))
    acoustic, more, _ = quantize(mimi.quantizer.acoustic, z, rest)
    losses = {"commitment": commitment + more, **phone_loss(heads, vectors, phones)}
    losses["spread"] = spread_loss(mimi.quantizer.acoustic.input_proj(z).transpose(1, 2))
    losses["bands"] = bands(semantic + acoustic, clean)
    wave = mimi.from_latent(semantic + acoustic)
    losses["spectral"] = spectral(clean, wave)
    losses["wave"] = (clean - wave).abs().mean()
    return losses


CODEC_LOSSES = ("spectral", "bands", "wave", "commitment", "spread", "phone", "right", "new")


def draw_numbers(rng: np.random.Generator, batch: int) -> Tensor:
    """Quantizer dropout: how many codebooks each row uses [B]. One in eight is not quantized at all (-1)."""
    number = np.where(rng.random(batch) < 0.35, MIMI.n_q, rng.integers(1, MIMI.n_q, batch))
    return torch.from_numpy(np.where(rng.random(batch) < 0.125, -1, number)).to(DEVICE)


def stage_codec(work: Path, steps: int = 6500, batch: int = 4, unquantized: int = 300) -> None:
    """Trains all of Mimi: work/codec.pt, then its file there. In the first steps nothing is quantized."""
    speech, watched = Speech(work), Speech(work, ("rms",))
    torch.manual_seed(2)
    mimi, heads, bands = Mimi(MIMI).to(DEVICE), phone_heads().to(DEVICE), Bands().to(DEVICE)
    resume(finished(work / "ear.pt", "ear"), mimi=mimi, heads=heads, bands=bands)
    spectral, modules = SpectralLoss().to(DEVICE), {"mimi": mimi, "heads": heads, "bands": bands}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=1e-3)

    def losses(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = random_numbers(3, 1, step)
        torch.manual_seed(step)
        if step == unquantized:
            with torch.no_grad():
                z = mimi.to_latent(clips(speech, random_numbers(4), 128, own_share=0.3).sound.to(DEVICE))
            start_quantizer(mimi.quantizer.semantic, z, spread=False)
            start_quantizer(mimi.quantizer.acoustic, z, spread=True)
        number = draw_numbers(rng, batch) if step >= unquantized else torch.full((batch,), -1, device=DEVICE)
        parts = codec_step(mimi, heads, bands, spectral, clips(speech, rng, batch, own_share=0.25), number)
        total = parts["spectral"] + 0.5 * parts["bands"] + 0.3 * parts["wave"] + parts["phone"]
        if step >= unquantized:
            total = total + 0.1 * parts["commitment"] + 0.05 * parts["spread"]
        if step % 100 == 99 and "rms" in watched.makes:
            parts["new"] = watch(mimi, heads, watched, quantized=step >= unquantized)
        return total, parts

    path = work / "codec.pt"
    if goes_on(path, steps):
        forget(work, *AFTER_CODEC)  # made with another codec
    history = train(
        path, losses, CODEC_LOSSES, optimizer, modules, steps, highest=1e-3, warmup=100, clip=2.0, every=25
    )
    for quantizer in (mimi.quantizer.semantic, mimi.quantizer.acoustic):
        for codebook in quantizer.codebooks:
            codebook.embedding_sum.copy_(codebook.centroids)  # the sums and counts have served
            codebook.cluster_usage.fill_(1)
    save_mimi(in_16_bits(mimi), work / MIMI_FILE)
    write_curve(FOLDER / "codec_loss.tsv", CODEC_LOSSES, history)
    print(f"codec: finished -> {work / MIMI_FILE}")


def stage_voice(work: Path, steps: int = 800, batch: int = 4) -> None:
    """The decoder goes on, half with Moshi's voice, while all that makes the codes stays: work/voice.pt."""
    speech, spectral, path = Speech(work), SpectralLoss().to(DEVICE), work / "voice.pt"
    mimi = load_mimi(needed(work / MIMI_FILE, "codec"), MIMI, 8, DEVICE)
    decoding = (
        mimi.upsample,
        mimi.decoder_transformer,
        mimi.decoder,
        mimi.quantizer.semantic.output_proj,
        mimi.quantizer.acoustic.output_proj,
    )
    parameters = [parameter for part in decoding for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3)

    def losses(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = random_numbers(9, step)
        sound, clean, _ = (x.to(DEVICE) for x in clips(speech, rng, batch, own_share=0.5))
        codes = mimi.encode(sound)[:, : rng.choice([1, 2, 4, 8], p=[0.1, 0.1, 0.1, 0.7])]
        loss = spectral(clean, mimi.from_latent(mimi.quantizer.decode(codes)))
        return loss, {"spectral": loss}

    columns = ("spectral",)
    history = train(
        path, losses, columns, optimizer, {"mimi": mimi}, steps, highest=5e-4, warmup=40, clip=5.0, every=25
    )
    save_mimi(in_16_bits(mimi), work / VOICE_FILE)
    write_curve(FOLDER / "voice_loss.tsv", columns, history)
    print(f"voice: finished -> {work / VOICE_FILE}")


def finished_codec(work: Path) -> Mimi:
    """The codec as the stage `voice` left it."""
    return load_mimi(needed(work / VOICE_FILE, "voice"), MIMI, 8, DEVICE)
