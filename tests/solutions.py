"""Solutions of the exercises in lessons/exercises.py, and for each one that is wrong in one thing."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F


def timed_words(text, pieces):
    found = []
    for frame, token in enumerate(text.tolist()):
        if token in (0, 3):
            continue
        if pieces[token].startswith("▁"):
            found.append((0.08 * frame, pieces[token][1:]))
        elif found:
            found[-1] = found[-1][0], found[-1][1] + pieces[token]
    return found


def pack(codes, size):
    width = (size - 1).bit_length()
    bits = "".join(f"{code:0{width}b}" for code in codes.T.flatten().tolist())
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))


def unpack(data, codebooks, frames, size):
    width = (size - 1).bit_length()
    bits = "".join(f"{byte:08b}" for byte in data)
    codes = [int(bits[n * width : (n + 1) * width], 2) for n in range(codebooks * frames)]
    return torch.tensor(codes).view(frames, codebooks).T


def causal_conv(x, weight):
    return F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight)


def receptive_field(layers):
    seen = 1
    for kernel, stride in reversed(layers):
        seen = (seen - 1) * stride + kernel
    return seen


def residual_quantize(x, codebooks):
    codes = []
    for centroids in codebooks:
        codes.append(torch.cdist(x, centroids).argmin(dim=1))
        x = x - centroids[codes[-1]]
    return torch.stack(codes)


def slot_positions(last, ring_size):
    positions = last - (last - torch.arange(ring_size)) % ring_size
    return positions.clamp(min=-1)


def helium_parameters(dim, layers, hidden, kv_repeat):
    attention = dim * dim * 2 + 2 * dim * dim // kv_repeat  # queries and output; keys and values
    return layers * (attention + 3 * dim * hidden + 2 * dim)


def put_words(words, frames):
    text = torch.full((frames,), 3)
    for start, tokens in words:
        if start > 0 and start - 1 < frames and text[start - 1] == 3:
            text[start - 1] = 0
        for frame, token in enumerate(tokens, start):
            if frame < frames:
                text[frame] = token
    return text


def depth_inputs(text, audio):
    return torch.cat([text[None], audio[:-1]])


def delayed(codes, delays, initial):
    out = initial[:, None].repeat(1, codes.shape[1])
    for k, shift in enumerate(delays):
        out[k, shift:] = codes[k, : codes.shape[1] - shift]
    return out


def strip(delays, own, step):
    longest = max(delays)
    shifts, columns = torch.tensor(delays)[:, None], torch.arange(2 * longest + 2)
    frames = step - 1 - longest + columns - shifts
    newest = longest + shifts  # the user's; of its own streams the step has made one column more than it read
    newest[:own] = longest + 1
    return frames.masked_fill(columns > newest, -2), step - 1, step - longest


def text_loss(logits, targets, padding_weight):
    known = targets != -1
    weights = torch.where((targets == 3) | (targets == 0), padding_weight, 1.0)[known]
    return (F.cross_entropy(logits[known], targets[known], reduction="none") * weights).sum() / weights.sum()


def official_name(ours):
    ours = ours.replace(".attention.in_proj.", ".self_attn.in_proj_").replace(".attention.", ".self_attn.")
    ours = ours.replace(".feed_forward.0", ".gating.linear_in")
    return ours.replace(".feed_forward.2", ".gating.linear_out")


def _tokens_as_words(text, pieces):
    places = [(f, t) for f, t in enumerate(text.tolist()) if t not in (0, 3)]
    return [(0.08 * frame, pieces[token].strip("▁")) for frame, token in places]


def _pack_in_bytes(codes, size):
    return b"".join(code.to_bytes(2 if size > 256 else 1, "big") for code in codes.T.flatten().tolist())


def _without_epad(words, frames):
    text = put_words(words, frames)
    return torch.where(text == 0, 3, text)


def _all_streams_alike(delays, own, step):
    return strip(delays, len(delays), step)


def _no_residual(x, codebooks):
    return torch.stack([torch.cdist(x, centroids).argmin(dim=1) for centroids in codebooks])


WRONG = {
    lesson: SimpleNamespace(**function)
    for lesson, function in {
        0: {"timed_words": _tokens_as_words},
        1: {"pack": _pack_in_bytes, "unpack": unpack},  # whole bytes a code
        2: {"causal_conv": lambda x, weight: F.conv1d(x, weight, padding="same")},  # looks ahead
        3: {"receptive_field": lambda layers: 1 + sum(kernel - 1 for kernel, _ in layers)},  # no strides
        4: {"residual_quantize": _no_residual},
        5: {"slot_positions": lambda last, ring_size: last - (last - torch.arange(ring_size)) % ring_size},
        # as many keys and values as queries
        6: {"helium_parameters": lambda dim, layers, hidden, _: layers * dim * (4 * dim + 3 * hidden + 2)},
        7: {"put_words": _without_epad},
        8: {"depth_inputs": lambda text, audio: audio},  # each codebook would read itself
        9: {
            "delayed": lambda codes, delays, initial: torch.stack(
                [codes[k].roll(shift) for k, shift in enumerate(delays)]
            )
        },
        10: {"strip": _all_streams_alike},  # the user's codes come in elsewhere
        11: {"text_loss": lambda logits, targets, weight: F.cross_entropy(logits, targets, ignore_index=-1)},
        12: {"official_name": lambda ours: ours.replace("attention", "self_attn")},
    }.items()
}
