"""Breaks the code on purpose, one line at a time, and says which breaks the tests notice: `python tests/mutations.py`.

A test that cannot fail proves nothing. Each mutation is a small text change in a copy of the tree, on which the tests
of that file run until the first failure. Not part of the test suite (it takes a few minutes). Words as arguments
choose the mutations whose file or description contains one of them. Exit code 1 if one goes unnoticed.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# (what breaks, the text as it stands (once in the file), what it becomes)
MIMI = [
    ("rope turns the other way", "pairs * turns)", "pairs * turns.conj())"),
    (
        "rope pairs the halves",
        "torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))",
        "torch.complex(*x.float().chunk(2, -1))",
    ),
    ("rope's angles", "-math.log(max_period) * 2 / head_dim", "-math.log(max_period) / head_dim"),
    ("window one too wide", "(age < context)", "(age <= context)"),
    ("window one too narrow", "(age < context)", "(age < context - 1)"),
    ("no causal mask", "(age >= 0) & (age < context)", "(age < context)"),
    ("empty slots are seen", " & (key_positions >= 0)", ""),
    ("ring one too small", "self.ring_size = context + step - 1", "self.ring_size = context"),
    ("ring forgets a step", "last = position + length - 1", "last = position + length"),
    ("position does not move", "position += length", "position += 0"),
    ("zeros before the downsampling", "bias=False, repeat_first=True)", "bias=False, repeat_first=False)"),
    (
        "first input repeated for ever",
        'state[self]["started"].fill_(True)',
        'state[self]["started"].fill_(False)',
    ),
    (
        "padding on the right",
        "x = torch.cat([past.expand(*x.shape[:2], self.padding), x], dim=-1)",
        "x = torch.cat([x, past.expand(*x.shape[:2], self.padding)], dim=-1)",
    ),
    ("wrong end of the chunk kept", "copy_(x[..., -self.padding:])", "copy_(x[..., :self.padding])"),
    ("transposed conv forgets its tail", 'state[self]["tail"].copy_(later[:, -1:])', "pass"),
    (
        "transposed conv keeps the bias in its tail",
        'state[self]["tail"].copy_(later[:, -1:])',
        'state[self]["tail"].copy_(later[:, -1:] + (0 if bias is None else bias[:, None]))',
    ),
    (
        "transposed conv drops the left",
        "self.convtr(x)[..., :-self.stride]",
        "self.convtr(x)[..., self.stride:]",
    ),
    ("transposed conv halves swapped", "now, later = parts.view", "later, now = parts.view"),
    (
        "residual without its input",
        "return x + super().forward(x, state)",
        "return super().forward(x, state)",
    ),
    (
        "an activation too few",
        "layers += [nn.ELU(), CausalConvTranspose1d(width,",
        "layers += [nn.ELU(0.5), CausalConvTranspose1d(width,",
    ),
    ("approximate GELU", "nn.GELU()", 'nn.GELU("tanh")'),
    ("no LayerScale", "self.scale2 * self.feed_forward", "self.feed_forward"),
    ("norms swapped", "self.feed_forward(self.norm2(x))", "self.feed_forward(self.norm1(x))"),
    ("no floor under the usage", "self.cluster_usage.clamp(min=1e-5)", "self.cluster_usage.clamp(min=1e-9)"),
    ("farthest centroid's half lost", "centroids.pow(2).sum(1) / 2}", "centroids.pow(2).sum(1)}"),
    (
        "acoustic codebooks all quantize the same",
        "residual = residual - codebook.decode(codes[-1], state)",
        "residual = residual - 0 * codebook.decode(codes[-1], state)",
    ),
    (
        "acoustic after semantic, not beside it",
        "torch.cat([codes, self.acoustic.encode(z,",
        "torch.cat([codes, self.acoustic.encode(z - self.semantic.decode(codes, state),",
    ),
    (
        "one codebook too few decoded",
        "self.acoustic.decode(codes[:, 1:], state)",
        "self.acoustic.decode(codes[:, 1:-1], state)",
    ),
    (
        "encoder's ratios in the decoder's order",
        "for ratio in config.ratios[::-1]:",
        "for ratio in config.ratios:",
    ),
    ("the wave is padded in front", "F.pad(pcm, (0, missing))", "F.pad(pcm, (missing, 0))"),
    (
        "an activation too few inside",
        "nn.ELU(), CausalConv1d(channels // 2, channels, 1))",
        "nn.ELU(0.5), CausalConv1d(channels // 2, channels, 1))",
    ),
    ("one ring for all layers", "x = layer(x, window, ring)", "x = layer(x, window, rings[0])"),
    ("unknown keys are let through", "if unknown := given.keys() - table.keys():", "if unknown := set():"),
    ("any value will do", "if value != expected:", "if False:"),
    ("any number will do", "if not good or is_list", "if is_list"),
    ("a list will do", 'if not good or is_list != field.type.startswith("tuple"):', "if not good:"),
    ("extra tensors are let through", "    if unused:\n", "    if False:\n"),
    ("shapes are not checked", "if stored != list(shape):", "if False:"),
    ("older names not read", "older if older in unused else name", "name"),
]

MOSHI = [
    ("norm in the model's own precision", "wide = x.float()", "wide = x"),
    ("another epsilon", "torch.rsqrt(1e-8 + ", "torch.rsqrt(1e-3 + "),
    ("gate and up swapped", "gate, up = x.chunk(2, dim=-1)", "up, gate = x.chunk(2, dim=-1)"),
    (
        "the rule for 4 * dim",
        "21 * dim // 8 if feedforward == 4 * dim else 2 * feedforward // 3",
        "2 * feedforward // 3",
    ),
    (
        "-1 is a token",
        "torch.where((tokens == NO_INPUT)[..., None], 0, ",
        "torch.where((tokens < -9)[..., None], 0, ",
    ),
    ("depth sees later codebooks", "is_causal=past is None", "is_causal=False"),
    (
        "depth query heads share otherwise",
        "grouped = self.num_kv_heads != self.num_heads\n        y = ",
        "k, v = (t.repeat(1, self.num_heads // self.num_kv_heads, 1, 1) for t in (k, v)); grouped = False\n        y = ",
    ),
    ("depth norms swapped", "codebook_linear(self.norm2(x), ", "codebook_linear(self.norm1(x), "),
    (
        "depth reads one table later",
        "[self.text_emb, *self.audio_emb][codebooks]",
        "[self.text_emb, *self.audio_emb.roll(1, 0)][codebooks]",
    ),
    (
        "a codebook's weights for another, stepwise",
        "x = layer(x, codebooks, cache)",
        "x = layer(x, codebooks if cache is None else slice(0, 1), cache)",
    ),
    ("depth forgets the codebooks before", "k, v = torch.cat(past, dim=3)", "k, v = past[-1]"),
    ("delay by one less", "starts = [longest - shift for", "starts = [longest - min(shift, 4) for"),
    (
        "undelay by one less",
        "padded[:, k, shift : shift + length]",
        "padded[:, k, min(shift, 2) : min(shift, 2) + length]",
    ),
    (
        "mask of what ran out lost",
        "there = torch.arange(length, device=x.device) < length",
        "there = torch.arange(length, device=x.device) <= length",
    ),
    ("what ran out is no NaN", "value=math.nan", "value=0.0"),
    ("text and audio start alike", "tokens = [self.config.text_card] + ", "tokens = [self.config.card] + "),
    (
        "a stream's table for another",
        "embed(table.weight, tokens[:, 1 + k]) for k, table in",
        "embed(table.weight, tokens[:, max(k, 1)]) for k, table in",
    ),
    ("no out_norm", "hidden = self.out_norm(self.transformer(", "hidden = (self.transformer("),
    (
        "forward without initial tokens",
        "[1 + shift for shift in delays], self.initial)",
        "[1 + shift for shift in delays], codes[0, :, 0].clamp(min=0))",
    ),
    ("unknown targets count", "audio_mask & known[:, 1:]", "audio_mask"),
    (
        "depth of undelayed codes",
        "self.depth(hidden, delay(codes, delays, self.initial))",
        "self.depth(hidden, codes)",
    ),
    (
        "padding weighs as words do",
        "torch.where(is_padding, text_padding_weight, 1.0)",
        "torch.where(is_padding, 1.0, 1.0)",
    ),
    ("EPAD is no padding", " | (text == config.existing_text_end_padding_id)", ""),
    ("the wrong codebook weighs more", "audio_weights[:, 0] = ", "audio_weights[:, 1] = "),
    ("mean over the number, not the weights", "/ weights[mask].sum()", "/ mask.sum()"),
    (
        "temperature after softmax",
        "torch.softmax(logits.float() / temp, dim=-1)",
        "torch.softmax(logits.float(), dim=-1) / temp",
    ),
    (
        "noise by token, not by rank",
        "choice = (top / torch.empty_like(top).exponential_(1)).argmax(dim=-1, keepdim=True)",
        "choice = (top / torch.empty_like(top).exponential_(1).gather(-1, tokens.argsort(-1))).argmax(-1, keepdim=True)",
    ),
    (
        "top-k of the text for audio",
        "sample(logits, self.temp, self.top_k)",
        "sample(logits, self.temp, self.top_k_text)",
    ),
    (
        "user one step late",
        "where = (self.offset + self.delays[own:]) % columns",
        "where = (self.offset + 1 + self.delays[own:]) % columns",
    ),
    ("initial tokens a step too short", "self.offset <= self.delays", "self.offset < self.delays"),
    (
        "forced tokens draw no numbers",
        "                token = sample(logits, self.temp, self.top_k)",
        "                if (forced[:, k] != UNGENERATED).all():\n                    made.append(forced[:, k])\n"
        "                    continue\n                token = sample(logits, self.temp, self.top_k)",
    ),
    (
        "forced only after the loop",
        "made.append(torch.where(forced[:, k] == UNGENERATED, token, forced[:, k]))",
        "made.append(token)",
    ),
    (
        "realigned by one too few",
        "where = (self.offset - self.max_delay + self.delays[:own])",
        "where = (self.offset - self.max_delay + self.delays[:own].clamp(max=2))",
    ),
    (
        "columns are not cleared",
        "self.cache.index_fill_(2, (now + self.max_delay + 1) % columns, UNGENERATED)",
        "pass",
    ),
    (
        "a step speaks too early",
        "if self.steps > self.max_delay else None",
        "if self.steps >= self.max_delay else None",
    ),
    (
        "reset keeps the memory",
        "                tensor.zero_()\n        self.cache.fill_(UNGENERATED)",
        "                pass\n        self.cache.fill_(UNGENERATED)",
    ),
    (
        "reset keeps the tokens",
        "        self.cache.fill_(UNGENERATED)\n        self.offset.zero_()",
        "        self.offset.zero_()",
    ),
    ("prefill at another offset", "self.offset.fill_(frames)", "self.offset.fill_(frames + 1)"),
    (
        "prefill leaves no forced tokens",
        "frames - self.max_delay), tokens.shape[-1],",
        "frames - self.max_delay), frames + 1,",
    ),
    ("prefill forces initial tokens", "torch.full_like(initial, UNGENERATED)", "initial"),
    (
        "prefill's history one frame late",
        "delay(codes, shifts, initial), self.state)",
        "delay(codes, self.config.delays, initial), self.state)",
    ),
    (
        "prefill hears the user a frame early",
        "self.step(codes[:, self.own :, -1:])",
        "self.step(codes[:, self.own :, -2:-1] if frames > 1 else codes[:, self.own :, -1:])",
    ),
    ("depth decoder inherits nothing", '("num_layers", "kv_repeat", "gating",', '("num_layers", "gating",'),
    (
        "depth feed-forward has a width of its own",
        'fields["depformer_dim_feedforward"] = int(fields["hidden_scale"] * fields["depformer_dim"])',
        'fields["depformer_dim_feedforward"] = int(4.125 * fields["depformer_dim"])',
    ),
]

SHARED = [  # in mimi_min.py, but Moshi uses it otherwise: grouped queries, a ring without a spare slot
    (
        "query heads share keys otherwise",
        "grouped = self.num_kv_heads != self.num_heads",
        "k, v = (t.repeat(1, self.num_heads // self.num_kv_heads, 1, 1) for t in (k, v)); grouped = False",
    ),
    (
        "keys rotated, queries not",
        "q, k = rope(qk, window.turns).split([self.num_heads, self.num_kv_heads], dim=1)",
        "q, k = (rope(qk, window.turns) if i else qk for i in (0, 1)); q = q[:, :self.num_heads]; "
        "k = k[:, self.num_heads:]",
    ),
    (
        "loading reads it all into memory",
        "file.get_tensor(name).to(dtype=dtype)",
        "file.get_tensor(name).clone().to(dtype=dtype)",
    ),
    (
        "codebooks stacked in the wrong order",
        "for k in range(shape[0])]",
        "for k in reversed(range(shape[0]))]",
    ),
]

GENERATE = [
    ("the first frame goes in once", "if not heard:", "if False:"),
    (
        "a last character is lost",
        'show(self.utf8.decode(b"", True) + "\\n", self.stream)',
        'show("\\n", self.stream)',
    ),
    ("the last line does not end", "        screen.end()\n", ""),
    (
        "stereo a frame early",
        "moshi, self.late = torch.stack([user, before]), moshi",
        "moshi = torch.stack([user, torch.zeros_like(user) if moshi is None else moshi])",
    ),
    (
        "aligned one frame late",
        "for f, tokens in zip(range(len(heard)),",
        "for f, tokens in zip(range(1, len(heard)),",
    ),
]

LOOP = [  # of tiny/
    (
        "goes on a step late",
        'return saved["step"], saved["history"]',
        'return saved["step"] + 1, saved["history"]',
    ),
    (
        "goes on with another optimizer",
        "first, history = resume(path, **modules, optimizer=optimizer)",
        "first, history = resume(path, **modules)",
    ),
    ("long gradients are not cut", "nn.utils.clip_grad_norm_(parameters, clip)", "pass"),
    ("the rate does not fall", "0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2", "1"),
    ("the rate does not rise", "min((step + 1) / warmup, ", "min(1, "),
]

SPEECH = [  # of tiny/
    (
        "trains what is held out",
        "zlib.crc32(self.question.encode()) % 10 == 0",
        "zlib.crc32(self.question.encode()) % 10 == 11",
    ),
    (
        "a word's phone one late",
        'np.searchsorted(starts, seconds, side="right") - 1',
        'np.searchsorted(starts, seconds, side="left") - 1',
    ),
    (
        "a phone goes on after the sound",
        "inside = (where >= 0) & (seconds",
        "inside = (where >= 0) | (seconds",
    ),
    (
        "trains the speeds that are held out",
        "speed for speed in SPEEDS if speed not in HELD_OUT_SPEEDS",
        "speed for speed in SPEEDS",
    ),
]

CODEC = [  # of tiny/
    (
        "labels of another moment",
        "speech.phone_at(i, (times + start) / RATE)",
        "speech.phone_at(i, (times + place) / RATE)",
    ),
    (
        "Moshi starts anywhere in a frame",
        "start = start // FRAME * FRAME",
        "start = start // FRAME * FRAME + 7",
    ),
    (
        "the gradient stops at the codes",
        "straight = x + (total - x).detach()",
        "straight = total.detach() + 0 * x",
    ),
    ("codebooks that were dropped sound", "total + used * nearest", "total + nearest"),
    (
        "codebooks that were dropped are followed",
        "(residual - nearest).pow(2) * used).mean()",
        "(residual - nearest).pow(2)).mean()",
    ),
    ("centroids do not move", "codebook.embedding_sum.lerp_(sums * share, 1 - decay)", "pass"),
    (
        "dead centroids stay dead",
        "gone = codebook.cluster_usage < dead",
        "gone = codebook.cluster_usage < -1",
    ),
    ("all quantize the same", "residual, total = residual - nearest,", "residual, total = residual,"),
]

LANGUAGE = [  # of tiny/
    ("a stream's first frame once", "nothing[:, [0, *range(TAIL)]]", "nothing[:, : TAIL + 1]"),
    (
        "each word a frame longer",
        "int(start * RATE / FRAME) for start in starts[1:]",
        "int(start * RATE / FRAME) + 1 for start in starts[1:]",
    ),
    (
        "no silence after the last word",
        "ends = [*begins[1:], codes.shape[1]]",
        "ends = [*begins[1:], length]",
    ),
    (
        "codes a frame late",
        "codes[row, :, lead : lead + ends[row] + tail]",
        "codes[row, :, lead + 1 : lead + 1 + ends[row] + tail]",
    ),
    (
        "answers a frame early",
        "start, stop = end + ANSWER_AFTER, None",
        "start, stop = end + ANSWER_AFTER - 1, None",
    ),
    ("no EPAD on the last frame", "if at <= FRAMES and self.text", "if at < FRAMES and self.text"),
    ("no EPAD of a number on the last frame", "start <= min(FRAMES, stop_at", "start < min(FRAMES, stop_at"),
    ("EPAD over a word", " and self.text[at - 1] == PAD:", ":"),
    ("speaks on after 'stop'", "hush(end + STOP_AFTER)", "hush(end + STOP_AFTER + 1)"),
    ("silence keeps the text", "        self.text[at:] = PAD\n", ""),
    ("no stream begins", "put(streams.user, encoded.start, 0)", "pass"),
]

EVALUATE = [  # of tiny/
    ("who never spoke has stopped", "of=int(was_speaking)", "of=1"),
    (
        "half an answer will do",
        'return " ".join(words) == asked.turn.answer',
        'return asked.turn.answer.startswith(" ".join(words))',
    ),
    ("a count may go on for ever", "return early > -0.7 * RATE and", "return"),
    ("a count may end early", ' and (words[-1] == "thirty" or early < 1.5 * COUNT_EVERY * FRAME)', ""),
    (
        "half a number will do",
        'numbers.startswith(" ".join(words) + " ")',
        'numbers.startswith(" ".join(words))',
    ),
    (
        "a click is silence",
        "range(len(after) - 49) if not after[t : t + 50].any()",
        "range(len(after) - 49) if not after[t]",
    ),
    ("heard a frame earlier", "loud[0] / 100 + FRAME / RATE <= 0.8", "loud[0] / 100 <= 0.8"),
    ("stops a frame earlier", "quiet[0] / 100 + FRAME / RATE <= 0.7", "quiet[0] / 100 <= 0.7"),
    (
        "another word makes up for a lost one",
        "recogniser.heard(sound, words) & clear",
        "recogniser.heard(sound, words)",
    ),
    (
        "words heard are those said",
        "found[block.a : block.a + block.size]",
        "found[block.b : block.b + block.size]",
    ),
]

RUNS = [
    ("mimi_min.py", MIMI, "tests/test_mimi.py"),
    ("moshi_min.py", MOSHI, "tests/test_moshi.py"),
    ("mimi_min.py", SHARED, "tests/test_moshi.py"),
    ("generate.py", GENERATE, "tests/test_generate.py"),
    ("tiny/loop.py", LOOP, "tests/test_train.py"),
    ("tiny/speech.py", SPEECH, "tests/test_train.py"),
    ("tiny/codec.py", CODEC, "tests/test_train.py"),
    ("tiny/language.py", LANGUAGE, "tests/test_train.py"),
    ("tiny/evaluate.py", EVALUATE, "tests/test_train.py"),
]


def run_tests(tree, test):
    """None if all tests pass in this tree, else the first failure's line."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "-m",
            "not cuda",
            "-k",
            "not released",
            test,
        ],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0] if failures else (done.stdout + done.stderr).strip()[-300:]


def main():
    """Apply each mutation in a copy and print what came of it."""
    words, unnoticed = sys.argv[1:], []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("mimi_min.py", "moshi_min.py", "generate.py", "pyproject.toml"):
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, tree / name)
        for name in ("tests", "tiny", "lessons"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("work"))
        for file, mutations, test in RUNS:
            chosen = [m for m in mutations if not words or any(word in f"{file} {m[0]}" for word in words)]
            if not chosen:
                continue
            before = run_tests(tree, test)
            assert before is None, f"{test} fails without any mutation: {before}"
            source = (ROOT / file).read_text()
            for what, old, new in chosen:
                if source.count(old) != 1:
                    print(f"STALE     {file} {what}: {source.count(old)} places read {old!r}")
                    unnoticed.append(f"{file}: {what} (stale)")
                    continue
                (tree / file).write_text(source.replace(old, new))
                start = time.time()
                caught = run_tests(tree, test)
                unnoticed += [] if caught else [f"{file}: {what}"]
                print(
                    f"{'caught   ' if caught else 'UNNOTICED'} {file} {what} ({time.time() - start:.0f} s) "
                    f"{caught.split(' - ')[0] if caught else ''}",
                    flush=True,
                )
            (tree / file).write_text(source)
    print(f"unnoticed: {unnoticed}" if unnoticed else "every break was noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
