"""What is left of a recording after 1, 2, 4, 8 codebooks: `python lessons/hear.py my.wav`.

Each becomes a WAV in the folder `heard`, and one more has all in a row, the original first. The tiny codec
knows few voices. The released Mimi is a file of its own (0.4 GB), and needs no GPU:

    hf download kyutai/moshiko-pytorch-bf16 tokenizer-e351c8d8-checkpoint125.safetensors --local-dir mimi
    python lessons/hear.py my.wav --mimi mimi/tokenizer-e351c8d8-checkpoint125.safetensors
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import plain, read_json, read_wav, resample  # noqa: E402
from lessons.lab import distance, save_wav  # noqa: E402
from mimi_min import Mimi, MimiConfig, init_state, load_mimi  # noqa: E402
from moshi_min import MIMI_FILE  # noqa: E402

TINY = Path(__file__).resolve().parent.parent / "tiny"
NUMBERS = (32, 8, 4, 2, 1)  # of codebooks, as far as the codec has them


def open_codec(folder: Path, file: Path | None) -> Mimi:
    """The released Mimi from a file of its own, or the codec of a folder, with all its codebooks."""
    config, path = MimiConfig(), file
    if path is None:
        settings = folder / "config.json"
        names = read_json(settings) if settings.exists() else {}
        if names.get("mimi_config_name"):
            config = read_json(folder / names["mimi_config_name"], MimiConfig.from_dict)
        path = folder / names.get("mimi_name", MIMI_FILE)
    return load_mimi(path, config, num_codebooks=config.n_q)


@torch.no_grad()
def through(mimi: Mimi, sound: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Sound [T], in whole frames -> (codebooks, what comes back [T]), from the most codebooks to one. It goes
    frame by frame, so that a long recording takes no more memory than a short one."""
    state = init_state(mimi, 1)
    codes = torch.cat([mimi.encode(x[None, None], state) for x in sound.split(mimi.frame_size)], dim=-1)
    for number in NUMBERS:
        if number <= mimi.config.n_q:
            state = init_state(mimi, 1)
            frames = [mimi.decode(frame, state) for frame in codes[:, :number].split(1, dim=-1)]
            yield number, torch.cat(frames, dim=-1)[0, 0]


def hear(args: argparse.Namespace) -> None:
    """Reads, codes, writes, and prints a table."""
    mimi = open_codec(args.checkpoint, args.mimi)
    sound = resample(*read_wav(args.recording), mimi.sample_rate)
    sound = F.pad(sound, (0, -len(sound) % mimi.frame_size))
    args.output.mkdir(parents=True, exist_ok=True)
    row = [sound]
    print("codebooks    bit/s  distance  file")
    for number, back in through(mimi, sound):
        path = args.output / f"{args.recording.stem}-{number}.wav"
        save_wav(path, back, mimi.sample_rate)
        bits = number * math.log2(mimi.config.bins) * mimi.frame_rate
        print(f"{number:9} {bits:8,.0f} {distance(sound, back):6.1f} dB  {path}")
        row += [torch.zeros(mimi.sample_rate // 2), back]
    path = args.output / f"{args.recording.stem}-all.wav"
    save_wav(path, torch.cat(row), mimi.sample_rate)
    print(f"the original, then these in their order:  {path}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recording", type=Path, help="a WAV file")
    parser.add_argument("--mimi", type=Path, metavar="FILE", help="the released Mimi")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=TINY,
        metavar="FOLDER",
        help="the codec of a checkpoint (default: tiny/)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("heard"), metavar="FOLDER", help="default: %(default)s"
    )
    try:
        hear(parser.parse_args(argv))
        return 0
    except (OSError, ValueError) as error:
        print(f"hear.py: error: {plain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
