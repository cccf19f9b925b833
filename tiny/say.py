"""Makes a question to try: `python tiny/say.py "what is two plus three" -o my.wav [--make flite]`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the three files are

from loop import random_numbers  # noqa: E402
from voices import MAKES, RATE, write_wave  # noqa: E402


def main() -> None:
    """Speaks a text with the first synthesizer that is there, or with the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("-o", "--output", type=Path, default=Path("my.wav"), help="default: %(default)s")
    parser.add_argument(
        "--make", choices=list(MAKES), help="of synthesizer; default: the first that is there"
    )
    parser.add_argument("--seed", type=int, default=1, help="another number, another voice")
    args = parser.parse_args()
    words = re.findall(r"[\w']+", args.text.replace("+", " plus "))
    text = " ".join(words)  # a sentence: voices end it as they like
    if not text:
        parser.error("nothing to say: give it some words")
    missing = []
    for name in [args.make] if args.make else MAKES:
        try:
            said = MAKES[name]().draw(text, random_numbers(args.seed))
        except SystemExit as error:
            missing.append(str(error))
            continue
        sound = np.pad(said.sound, (RATE // 2, 0))  # it needs a moment to listen
        write_wave(args.output, sound)
        print(f"{name}: {len(sound) / RATE:.1f} s -> {args.output}")
        return
    raise SystemExit("no synthesizer is there:\n" + "\n".join(missing))


if __name__ == "__main__":
    main()
