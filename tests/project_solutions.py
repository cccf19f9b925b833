"""Solutions of the projects in lessons/projects.md, and for each some that are wrong in one thing."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import Tensor

from lessons.check_project import heard
from lessons.lab import EPAD, PAD, recording, talk
from moshi_min import NO_INPUT, Checkpoint, Moshi, MoshiConfig

SMALL = {
    "dim": 96,
    "num_layers": 2,
    "num_heads": 4,
    "context": 125,
    "depformer_dim": 64,
    "depformer_num_layers": 1,
    "depformer_num_heads": 2,
    "depformer_dim_feedforward": 264,
}


def by_heart(model: Moshi, conversations: list[Tensor], updates: int, highest: float) -> Moshi:
    """Trains a model on conversations [1, 17, F], all of them in each update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=highest)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = highest * min(1, (update + 1) / 20)
        optimizer.zero_grad()
        for codes in conversations:
            model.loss(codes, first_codebook_weight=10.0)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


# ------------------------------------------------------------------------------------------ 1. other delays


def teach_delays(checkpoint: Checkpoint, codes: Tensor, delays: tuple[int, ...], updates: int = 130) -> Moshi:
    torch.manual_seed(0)
    known = checkpoint.moshi.config
    sizes = {"card": known.card, "text_card": known.text_card}
    model = Moshi(MoshiConfig(**SMALL, **sizes, delays=delays))
    return by_heart(model, [codes], updates, 5e-3)


def _usual_delays(checkpoint: Checkpoint, codes: Tensor, delays: tuple[int, ...]) -> Moshi:
    """Trained with the usual delays, and only told to have others."""
    model = teach_delays(checkpoint, codes, checkpoint.moshi.config.delays)
    model.config.delays = delays
    return model


def _other_delays(checkpoint: Checkpoint, codes: Tensor, delays: tuple[int, ...]) -> Moshi:
    return teach_delays(checkpoint, codes, checkpoint.moshi.config.delays, updates=0)


# ---------------------------------------------------------------------------------------------- 2. min-p

# What to put in the place of what, in which file.
MASK = "    top = top.masked_fill(top < min_p * top[:, :1], 0)  # the first is the largest\n"
CHOICE = "    choice = (top / torch.empty_like(top)"
LEAD = '    ("lead_seconds", '
OPTION = '    ("min_p", "least share of the likeliest", number(float, 0, 1), "lm_gen_config", "min_p", 0),\n'
MADE = "args.top_k_text, args.greedy)\n"
MIN_P = (
    ("moshi_min.py", "temp: float, top_k: int) -> Tensor:", "temp: float, top_k: int, min_p=0.0) -> Tensor:"),
    ("moshi_min.py", CHOICE, MASK + CHOICE),
    ("moshi_min.py", "False, cuda_graph: bool = True):\n", "False, cuda_graph: bool = True, min_p=0.0):\n"),
    (
        "moshi_min.py",
        "        self.moshi, self.config = moshi, moshi.config\n",
        "        if not 0 <= min_p <= 1:\n"
        '            raise ValueError(f"min_p must be from 0 to 1, not {min_p}")\n'
        "        self.moshi, self.config, self.min_p = moshi, moshi.config, min_p\n",
    ),
    ("moshi_min.py", "self.temp_text, self.top_k_text)\n", "self.temp_text, self.top_k_text, self.min_p)\n"),
    (
        "moshi_min.py",
        "sample(logits, self.temp, self.top_k)",
        "sample(logits, self.temp, self.top_k, self.min_p)",
    ),
    ("moshi_min.py", '"top_k_text", "use_sampling"}', '"top_k_text", "use_sampling", "min_p"}'),
    ("generate.py", LEAD, OPTION + LEAD),
    ("generate.py", MADE, MADE.replace(")", ", min_p=args.min_p)")),
)
# What is made instead of the change with the same old text.
WRONG_MIN_P = {
    "a share of 1, not of the likeliest": (CHOICE, MASK.replace(" * top[:, :1]", "") + CHOICE),
    "not handed on to the sampler": (MADE, MADE),
    "what is above 1 is not refused": (LEAD, OPTION.replace("0, 1)", "0)") + LEAD),
}


# ------------------------------------------------------------------------------------- 3. one more sentence


def put(checkpoint: Checkpoint, sentence: str, start: int, frames: int, pace: float) -> Tensor:
    """A text stream [frames] in which the sentence begins in frame `start`; a letter takes `pace` frames."""
    text = torch.full((frames,), PAD)
    for word in sentence.split():
        text[start - 1] = EPAD if text[start - 1] == PAD else text[start - 1]
        tokens = checkpoint.tokenizer.encode(word)
        text[start : start + len(tokens)] = torch.tensor(tokens)
        start += max(len(tokens), 2 + int(pace * len(word)))
    return text


def new_conversation(checkpoint: Checkpoint, sound: Tensor, sentence: str) -> Tensor:
    """The user's greeting and the new answer, codes [1, 17, F]."""
    said, _ = talk(checkpoint, sound)
    start = next(f for f, token in enumerate(said[0].tolist()) if token not in (PAD, EPAD))
    for pace in (0.5, 0.6, 0.4, 0.8, 0.3):  # until it says every word of what it reads aloud
        text = put(checkpoint, sentence, start, said.shape[1], pace)
        # It must not hear the question, or it would want to answer that.
        deaf = {"change": lambda codes: codes * 0 + NO_INPUT}
        tokens, voice = talk(checkpoint, sound, text=text[1:].tolist(), **deaf)
        if all(heard(text, voice)):
            break
    return torch.cat([text[None], tokens[1:], checkpoint.mimi.encode(sound)[0]])[None]


def old_conversations(checkpoint: Checkpoint) -> list[Tensor]:
    """What it can already, in its own words."""
    conversations = []
    for name in ("question.wav", "count.wav"):
        sound = recording(name)
        said, _ = talk(checkpoint, sound)
        conversations.append(torch.cat([said, checkpoint.mimi.encode(sound)[0]])[None])
    return conversations


def teach_sentence(checkpoint: Checkpoint, sound: Tensor, sentence: str, updates: int = 20) -> Moshi:
    conversations = [new_conversation(checkpoint, sound, sentence), *old_conversations(checkpoint)]
    return by_heart(copy.deepcopy(checkpoint.moshi), conversations, updates, 3e-4)


def _forgets(checkpoint: Checkpoint, sound: Tensor, sentence: str) -> Moshi:
    conversation = new_conversation(checkpoint, sound, sentence)
    return by_heart(copy.deepcopy(checkpoint.moshi), [conversation], 25, 1e-3)


def _text_alone(checkpoint: Checkpoint, sound: Tensor, sentence: str) -> Moshi:
    """New text over a voice that is silent."""
    codes = new_conversation(checkpoint, sound, sentence)
    codes[:, 1:9] = checkpoint.mimi.encode(torch.zeros_like(sound))[..., -1:]
    return by_heart(copy.deepcopy(checkpoint.moshi), [codes], 25, 1e-3)


RIGHT = {
    "delays": SimpleNamespace(teach_delays=teach_delays),
    "sentence": SimpleNamespace(teach_sentence=teach_sentence),
}
# Project, what is wrong, the function, and words of the hint.
WRONG = (
    ("delays", _usual_delays, "loss is"),
    ("delays", _other_delays, "its delays are"),
    ("sentence", _forgets, "and now says"),
    ("sentence", _text_alone, "have a sound"),
)
