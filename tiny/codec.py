"""The stages `codec` and `voice`: a narrow Mimi learns to code the speech, then to sound like Moshi."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loop import DEVICE, FOLDER, forget, in_16_bits, needed, random_numbers, train, write_curve
from mimi_min import Mimi, MimiConfig, load_mimi, save_mimi
from moshi_min import MIMI_FILE
from speech import FRAME, RATE, Speech

# The released Mimi, only narrower: the rates, strides and kernels are the same.
MIMI = MimiConfig(
    n_filters=16,
    dimension=128,
    num_layers=2,
    num_heads=4,
    dim_feedforward=512,
    context=32,
    n_q=8,
    bins=256,
    quantizer_dimension=32,
)
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
    mimi = Mimi(MIMI).to(DEVICE)
    start_weights(mimi)
    phone_heads = nn.Linear(MIMI.quantizer_dimension, 2 * len(speech.names)).to(DEVICE)
    spectral = SpectralLoss().to(DEVICE)
    parameters = [*mimi.parameters(), *phone_heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3)
    quantizers = (mimi.quantizer.semantic, mimi.quantizer.acoustic)

    def losses(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = random_numbers(3, step)
        torch.manual_seed(step)
        if step == unquantized:
            with torch.no_grad():
                z = mimi.to_latent(clips(speech, random_numbers(4), 96)[0])
            for quantizer in quantizers:
                start_codebooks(quantizer, z)
        number = None
        if step >= unquantized:  # quantizer dropout: half of the rows with all codebooks, half with 1, 2 or 4
            few = rng.choice([1, 2, 4], batch)
            number = torch.from_numpy(np.where(rng.random(batch) < 0.5, 8, few)).to(DEVICE)
        parts = codec_step(mimi, phone_heads, spectral, clips(speech, rng, batch), number)
        total = parts["spectral"] + 0.3 * parts["wave"]
        if number is not None:
            total = total + 0.25 * parts["commitment"] + 0.3 * parts["phone"]
        return total, parts

    path, modules = work / "codec.pt", {"mimi": mimi, "heads": phone_heads}
    if not path.exists():
        forget(work, "voice.pt", "encoded.pt", "lm.pt")  # made with another codec
    history = train(
        path, losses, CODEC_LOSSES, optimizer, modules, steps, highest=1.2e-3, warmup=40, clip=5.0, every=25
    )
    for codebook in (codebook for quantizer in quantizers for codebook in quantizer.codebooks):
        codebook.embedding_sum.copy_(codebook.centroids)  # the sums and counts have served
        codebook.cluster_usage.fill_(1)
    save_mimi(in_16_bits(mimi), work / MIMI_FILE)  # the folder's comes from the stage `voice`
    write_curve(FOLDER / "codec_loss.tsv", CODEC_LOSSES, history)
    print(f"codec: {path} is at step {steps} -> {work / MIMI_FILE}")


def stage_voice(work: Path, steps: int = 1000, batch: int = 8) -> None:
    """The decoder goes on, mostly with Moshi's voice, while all that makes the codes stays: work/voice.pt."""
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
        sound, _ = clips(speech, rng, batch, own_share=0.75)
        codes = mimi.encode(sound)[:, : rng.choice([1, 2, 4, 8], p=[0.1, 0.1, 0.1, 0.7])]
        loss = spectral(sound, mimi.from_latent(mimi.quantizer.decode(codes)))
        return loss, {"spectral": loss}

    columns = ("spectral",)
    history = train(
        path, losses, columns, optimizer, {"mimi": mimi}, steps, highest=5e-4, warmup=40, clip=5.0, every=25
    )
    save_mimi(in_16_bits(mimi), FOLDER / MIMI_FILE)
    write_curve(FOLDER / "voice_loss.tsv", columns, history)
    print(f"voice: {path} is at step {steps} -> {FOLDER / MIMI_FILE}")


def finished_codec() -> Mimi:
    """The codec in the folder, as the stage `voice` left it there."""
    return load_mimi(needed(FOLDER / MIMI_FILE, "voice"), MIMI, 8, DEVICE)
