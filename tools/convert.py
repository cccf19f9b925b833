#!/usr/bin/env python3
"""Turns a relative of Moshi into a folder in the official format, which moshi_min reads.

    python tools/convert.py FOLDER OUT

It sees what FOLDER is:

    Hugging Face   Moshi (its Mimi is inside), Mimi alone, or Helium, a text model
    LoRA           adapters of moshi-finetune; --base names the folder of the model that they change
    int8           the released q8 files, which become bfloat16
    Hibiki         --quality is the translation to ask for, if not very_good
    PersonaPlex    tools/prompt.py then gives it a voice and a role
    official       stays as it is, but for --dtype

OUT is a new or an empty folder, written whole or not at all. --dtype is what the language model's weights
become: int8, bfloat16, float16 or float32. Tensors go through one by one: memory holds the largest only.

hugging_face.py and relatives.py say what becomes of each tensor, lazy.py reads and writes them.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # while torch takes its second to load, there is nothing to lose or to clean up
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        ending = getattr(signal, name, signal.SIGINT)
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, lambda number, _: os._exit(128 + number))

import argparse  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hugging_face  # noqa: E402
import relatives  # noqa: E402
from lazy import Plan, write  # noqa: E402

from files import plain, run_program, show, signals  # noqa: E402
from moshi_min import MOSHI_FILE  # noqa: E402


def is_hugging_face(given: dict) -> bool:
    """Whether config.json is one of `save_pretrained`: both formats have the model_type 'moshi'."""
    return "architectures" in given or "hidden_size" in given or given.get("model_type") in ("mimi", "helium")


def make_plan(folder: Path, base: Path | None, quality: str, dtype: str | None) -> Plan:
    """What becomes of `folder`. A ValueError or an OSError says what is wrong with it."""
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    if dtype is None and not (folder / "config.json").exists():
        raise ValueError("there is no config.json, which says what this is")
    given = relatives.read_config(folder)
    if is_hugging_face(given):
        if base is not None:
            raise ValueError("--base is for adapters, and this is a folder of Hugging Face's")
        plan = hugging_face.plan(folder, given)
    else:
        plan = relatives.plan(folder, given, base, quality, dtype)
    if dtype is not None and MOSHI_FILE in plan.tensors:
        plan.tensors[MOSHI_FILE] = relatives.cast(plan.tensors[MOSHI_FILE], dtype)
        plan.jsons["config.json"]["quantize"] = dtype == "int8"
    return plan


def write_folder(plan: Plan, out: Path) -> None:
    """All of it, or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        for name, tensors in plan.tensors.items():
            write(temporary / name, tensors)
        for name, content in plan.jsons.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, path in plan.copies.items():
            shutil.copyfile(path, temporary / name)
        temporary.chmod(0o755)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert(
    folder: Path, out: Path, base: Path | None = None, quality: str = "very_good", dtype: str | None = None
) -> str:
    """Does it, and returns what to say. ValueError and OSError say what is wrong; then there is no `out`."""
    empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir()) and not out.samefile(Path.cwd())
    if os.path.lexists(out) and not empty:
        raise ValueError(f"{out}: it is there already and not an empty folder elsewhere, name another one")
    try:
        plan = make_plan(folder, base, quality, dtype)
        write_folder(plan, out)
    except ValueError as error:
        raise ValueError(error if str(folder) in str(error) else f"{folder}: {error}") from None
    said = f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}"
    if plan.missing:
        said += f"\nto be put there, since {folder} does not have it: {', '.join(plan.missing)}"
    return said


def main() -> int:
    """Exit codes: 0, 2 after what can be put right, 128 + a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="what is to be converted")
    add("out", type=Path, metavar="OUT", help="a new or empty folder")
    add(
        "--base", type=Path, metavar="FOLDER", help="LoRA: the model that was trained, in the official format"
    )
    add("--quality", default="very_good", help="Hibiki: the translation's (default: %(default)s)")
    add(
        "--dtype",
        choices=relatives.DTYPES,
        help="of the language model (default: as they are; of int8: bfloat16)",
    )
    arguments = parser.parse_args()
    try:
        said = convert(**vars(arguments))
    except (KeyboardInterrupt, ValueError, OverflowError, RecursionError, OSError) as error:
        if any(signals) or isinstance(error, KeyboardInterrupt):  # code in C may make another error of it
            return 128 + [*signals, signal.SIGINT][0]
        show(f"convert.py: {plain(error)}\n", sys.stderr)
        return 2
    show(f"{said}\n", sys.stdout)
    return 0


if __name__ == "__main__":
    run_program(main)
