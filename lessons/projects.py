"""What you write for the projects in projects.md. The second one is written in the program itself."""

from torch import Tensor

from moshi_min import Checkpoint, Moshi


def teach_delays(checkpoint: Checkpoint, codes: Tensor, delays: tuple[int, ...]) -> Moshi:
    """Project 1. codes [1, 17, F] of a conversation, aligned -> a small Moshi with these delays that knows it
    by heart. Its text_card and card are those of checkpoint.moshi.config."""
    raise NotImplementedError


def teach_sentence(checkpoint: Checkpoint, sound: Tensor, sentence: str) -> Moshi:
    """Project 3. What the user says, [1, 1, T] with silence after it, and what Moshi shall answer -> a Moshi
    that does, in text and sound, and still answers all else as checkpoint.moshi does."""
    raise NotImplementedError
