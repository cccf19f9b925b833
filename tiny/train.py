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

This file is the command. The stages are in speech.py, codec.py (two of them), language.py and evaluate.py;
loop.py is what they share, the training loop above all.

It needs espeak-ng (Debian and Ubuntu: `apt-get install espeak-ng`); `eval` also `pip install pocketsphinx`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the three files are

from codec import stage_codec, stage_voice  # noqa: E402
from evaluate import stage_eval  # noqa: E402
from language import stage_lm  # noqa: E402
from loop import FOLDER  # noqa: E402
from speech import stage_data  # noqa: E402

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
