"""Makes the checkpoint in this folder, from nothing: `python tiny/train.py [STAGE] [--work FOLDER]`.

A small Moshi in one fixed voice: it adds, subtracts, says digits back, counts until it is told to stop, and
greets, whoever speaks. Stages, each of which can be run alone. Interrupted, they lose minutes at most; only
`eval` begins anew:

    data    synthesizers of several makes speak: questions in many voices, all of Moshi's sentences in one
    ear     the encoder of a narrow Mimi learns to tell the phones, whoever speaks, in noise, by telephone
    codec   all of Mimi learns to code speech: spectral loss, straight-through gradient, moving-average
            codebooks, quantizer dropout; its first codebook goes on telling the phones, as the real one
            learns from WavLM
    voice   what turns codes into sound goes on, half with Moshi's voice; the codes stay what they are
    heard   users' sides of conversations, each through another microphone, become codes
    lm      a narrow Moshi learns to answer them
    eval    talks with the finished folder about what training never drew, in voices that it never met,
            and prints a table (people: where there are recordings of them, see evaluate.py)

This file is the command. The stages are in speech.py, codec.py (three of them), language.py (two) and
evaluate.py; voices.py are the synthesizers, heard.py the microphones, loop.py the training loop.

It needs espeak-ng; a model that has learnt from that alone understands hardly any other voice. The first
stage says which of the other synthesizers are missing, and how to install them; tiny/requirements.txt has
what comes from PyPI, pocketsphinx for `eval` too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the three files are

from codec import stage_codec, stage_ear, stage_voice  # noqa: E402
from evaluate import stage_eval  # noqa: E402
from language import stage_heard, stage_lm  # noqa: E402
from loop import FOLDER  # noqa: E402
from speech import stage_data  # noqa: E402

STAGES = {
    "data": stage_data,
    "ear": stage_ear,
    "codec": stage_codec,
    "voice": stage_voice,
    "heard": stage_heard,
    "lm": stage_lm,
    "eval": stage_eval,
}


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
        raise SystemExit("interrupted; the same command goes on where it stopped") from None


if __name__ == "__main__":
    main()
