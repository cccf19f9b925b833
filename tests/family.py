"""Random relatives of Moshi as their authors publish them, for the tests of tools/convert.py and
tools/prompt.py.

Each function writes a small folder and returns the official model that it holds, where there is one. Sizes
are odd and differ wherever two could be taken for each other."""

import json

import torch
from reference import lm_config, loaders, official_lm, old_names, randomise, sampling
from safetensors.torch import save_file
from torch import nn


def write_folder(folder, config, tensors, name="model.safetensors"):
    """config.json and a file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}, folder / name)
    return folder


def old_int8(state):
    """An int8 file's tensors under the older names, the scales of all codebooks in one, too."""
    scales = {name.removesuffix("_scb"): t for name, t in state.items() if name.endswith("_scb")}
    rest = {name: t for name, t in state.items() if not name.endswith("_scb")}
    return old_names(rest) | {f"{name}_scb": t for name, t in old_names(scales).items()}


# ---- LoRA, as moshi-finetune saves it ----------------------------------------------------------------------

LORA = lm_config(
    dim=40, num_heads=4, n_q=5, dep_q=3, delays=[0, 0, 1, 1, 0, 1], depformer_dim_feedforward=None
)


def adapters(lm, rank, scale, seed, tables=()):
    """Random adapters for every linear layer of an official model, and new tables, under the newer names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    found = {}
    for name, module in lm.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{name}.lora_A.weight"] = normal(rank, module.in_features) / module.in_features**0.5
            found[f"{name}.lora_B.weight"] = normal(module.out_features, rank) * scale
    for name, tensor in lm.state_dict().items():
        if name in tables:
            found[name] = normal(*tensor.shape) * 0.5
    return found


def old_adapters(tensors):
    """The older names, when an attention was one module: the adapters of all codebooks in one tensor."""
    renamed = {}
    for side in ("lora_A", "lora_B"):
        part = {name.replace(f".{side}", ""): t for name, t in tensors.items() if f".{side}." in name}
        for name, tensor in old_names(part).items():
            name = name.replace("in_proj_weight", "in_proj.weight")
            renamed[name.replace(".weight", f".{side}.weight")] = tensor
    return renamed | {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}


# ---- Hibiki ------------------------------------------------------------------------------------------------

QUALITIES = ["very_bad", "bad", "neutral", "good", "very_good"]
CONDITION = {
    "conditioners": {
        "description": {
            "type": "lut",
            "lut": {"n_bins": 7, "dim": 6, "tokenizer": "noop", "possible_values": QUALITIES},
        }
    },
    "fuser": {"sum": ["description"], "prepend": [], "cross": [], "cross_attention_pos_emb": False},
    "model_type": "hibiki",
}
HIBIKI = {
    "1B": lm_config(
        n_q=6, dep_q=3, delays=[0, 0, 2, 2, 0, 2, 2], depformer_dim_feedforward=None, **CONDITION
    ),
    "2B": lm_config(
        dim=40,
        n_q=10,
        dep_q=5,
        delays=[0, 0, 2, 2, 2, 2, 0, 2, 2, 2, 2],
        depformer_context=5,
        depformer_dim_feedforward=60,
        depformer_low_rank_embeddings=7,
        depformer_weights_per_step_schedule=[0, 1, 2, 2, 2],
        **CONDITION,
    ),
}


def hibiki_lm(config, seed=0):
    """A random official model, as its loader makes it; and the conditions that the sampler is given."""
    kwargs = {key: value for key, value in json.loads(json.dumps(config)).items() if key != "model_type"}
    lm = randomise(loaders.get_moshi_lm(None, kwargs, dtype=torch.float32), seed)
    return lm.eval().requires_grad_(False)


def conditions(lm, quality, batch):
    """The tensors that the official sampler is given to ask for this quality."""
    base = __import__("moshi.conditioners.base", fromlist=["ConditionAttributes"])
    asked = [base.ConditionAttributes(text={"description": quality}, tensor={}) for _ in range(batch)]
    return lm.condition_provider.prepare_and_provide(asked)


# ---- PersonaPlex -------------------------------------------------------------------------------------------

PERSONAPLEX = lm_config(
    n_q=6,
    dep_q=6,
    depformer_context=6,
    delays=[0, 0, 1, 1, 0, 1, 1],
    model_type="personaplex",
    version="7b-v1",
)


def personaplex_lm(config, seed=0):
    """A random official model that predicts the user's codebooks as well."""
    ours = ("model_type", "version", "mimi_config_name")
    return official_lm({key: value for key, value in config.items() if key not in ours}, seed)


class PersonaPlexGen:
    """Greedy generation in the order of NVIDIA's sampler, on the official model: what is given in a call
    stands in the step that the call makes, so that it is read in the next one. Nothing is ever thrown away.

    `said` [1 + n_q, steps] are all tokens, `given` says which of them were not predicted."""

    def __init__(self, lm, steps):
        self.lm, self.step_number = lm, 0
        self.own, self.delays = lm.n_q // 2, lm.delays
        self.said = torch.full((1 + lm.n_q, steps + max(lm.delays) + 1), -2)
        self.given = torch.zeros(self.said.shape, dtype=torch.bool)
        self.sums = []  # what Helium was given in each call

    def put(self, streams, tokens, shifted=True):
        for k, token in zip(streams, tokens):
            place = self.step_number + (self.delays[k] if shifted else 0)
            self.said[k, place], self.given[k, place] = token, True

    def step(self, user, moshi=None, text=None):
        """Codes of a frame each, or None to predict -> the tokens of text and all audio, or None."""
        lm, now = self.lm, self.step_number
        if text is not None:
            self.put([0], [text])
        if moshi is not None:
            self.put(range(1, 1 + self.own), moshi)
        self.put(range(1 + self.own, 1 + lm.n_q), user)
        initial = [lm.text_initial_token_id, *[lm.initial_token_id] * lm.n_q]
        for k, delay in enumerate(self.delays):
            if now <= delay:
                self.put([k], [initial[k]], shifted=False)
        self.step_number += 1
        if now == 0:
            return None
        tokens = self.said[None, :, now - 1 : now]
        tables = [lm.text_emb, *lm.emb]
        self.sums.append(sum(table(tokens[:, k]) for k, table in enumerate(tables)))
        hidden, logits = lm.forward_text(tokens)
        self.predict(hidden, logits, now)
        first = now - max(self.delays)
        if first < 1:
            return None
        return torch.stack([self.said[k, first + delay] for k, delay in enumerate(self.delays)])

    def predict(self, hidden, logits, now):
        """The tokens of step `now`: those that are given stay, and codebooks that follow see them."""
        previous = None
        with self.lm.depformer.streaming(1):
            for k in range(1 + self.lm.dep_q):
                if k > 0:
                    logits = self.lm.forward_depformer(k - 1, previous, hidden)
                token = sampling.sample_token(logits.float(), use_sampling=False).flatten()
                if not self.given[k, now]:
                    self.said[k, now] = token
                previous = self.said[k, now].view(1, 1, 1)
