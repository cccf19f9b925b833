"""A page where one talks to Moshi and watches its streams: python tools/live.py, then http://localhost:8017

The page is live.html beside this file, this its server. The model runs in a thread of its own, in the
project's one loop, `converse`. Between page and server go
    -> a frame of the user, 16-bit samples, binary: waits in a queue for the loop
    -> what the page wishes, JSON: becomes the loop's `change` and `texts`, or temperatures
    <- what a frame brought, binary: the length of a JSON text, that text, then Moshi's 16-bit samples
It listens on 127.0.0.1 alone, serves its own page alone, and talks with one visitor at a time.
"""

import argparse
import asyncio
import contextlib
import io
import json
import queue
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

try:
    from aiohttp import WSCloseCode, web
except ImportError as error:
    sys.exit(f"live.py: error: {error}; first: pip install -r requirements-live.txt (or: make live)")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from files import plain
from generate import TINY, SoundWriter, converse
from moshi_min import NO_INPUT, TOKENIZER_FILE, UNGENERATED, MoshiGen, captured, load_checkpoint

BACKLOG = 12  # frames that may wait for the model, about a second of them; the next one is dropped
BURST, PACE = 50, 1.25  # messages that may come at once; then how many in a frame's time
PATIENCE = 10  # seconds that a page may take to read what it is sent
LONGEST = 11250  # frames of a conversation, 15 minutes: a page that was forgotten makes room, and memory ends
LIMITS = {"temp": 2, "temp_text": 2, "codebooks": 99, "silent": 1}  # the wishes: numbers from 0 to this


class Model:
    """A checkpoint, what is watched of it, and what may change between two steps."""

    def __init__(self, folder: Path, device: str):
        moshi, self.mimi, self.tokenizer, config = load_checkpoint(folder, device)
        if self.mimi is None:
            raise ValueError(f"{folder} holds a text model, which neither hears nor speaks; name another one")
        sampling = {"use_sampling": True, **config.get("lm_gen_config", {})}
        self.gen = MoshiGen(moshi, greedy=not sampling.pop("use_sampling"), **sampling)
        self.pads = moshi.config.existing_text_padding_id, moshi.config.existing_text_end_padding_id
        # A step leaves the text's logits in a place where they can be read; a captured graph does so, too.
        self.text_logits = torch.zeros(moshi.config.text_card, device=device)

        def look(module: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> None:  # [1, S, text_card]
            self.text_logits.copy_(logits[0, -1])

        moshi.text_linear.register_forward_hook(look)

    def likeliest(self) -> list[tuple[int, float]]:
        """The last step's five likeliest text tokens, with their probabilities at its temperature."""
        top = torch.softmax(self.text_logits / max(self.gen.temp_text, 1e-6), dim=-1).topk(5)
        return [(token, round(p, 4)) for token, p in zip(top.indices.tolist(), top.values.tolist())]

    def tokens(self, text: str) -> list[int]:
        """A sentence for the text stream: before a word EPAD, after it PAD for as long as it may sound."""
        tokens: list[int] = []
        for word in text.split() if self.tokenizer else ():
            pieces = self.tokenizer.encode(word)
            tokens += [self.pads[1], *pieces] + ((len(word) + 1) // 2 - len(pieces)) * [self.pads[0]]
        return tokens


class Talk:
    """A conversation. `listen` and `wish` belong to the server's thread, the rest to the model's."""

    def __init__(self, model: Model, socket: web.WebSocketResponse):
        self.model, self.socket, self.loop, self.received = model, socket, asyncio.get_running_loop(), 0
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()  # (number, frame); None ends the conversation
        self.wishes = {"temp": model.gen.temp, "temp_text": model.gen.temp_text, "codebooks": 99, "silent": 0}
        self.to_say: deque[int] = deque(maxlen=1000)  # text tokens
        self.all_heard, self.all_said, self.sounds = [], [], []  # the run, to be saved

    async def listen(self) -> tuple[int, bytes]:
        """Takes what the page sends until it goes or breaks a rule. Returns what to close with."""
        mimi, left, before = self.model.mimi, float(BURST), time.monotonic()
        try:
            async for message in self.socket:
                now = time.monotonic()
                left, before = min(BURST, left + (now - before) * PACE * mimi.frame_rate) - 1, now
                if left < 0:
                    return WSCloseCode.POLICY_VIOLATION, b"too many messages at once"
                if message.type == web.WSMsgType.TEXT:
                    self.wish(message.data)
                elif message.type == web.WSMsgType.BINARY and len(message.data) == 2 * mimi.frame_size:
                    if self.waiting.qsize() < BACKLOG:
                        self.waiting.put((self.received, message.data))
                    self.received += 1
                else:
                    return WSCloseCode.UNSUPPORTED_DATA, b"a frame has %d bytes" % (2 * mimi.frame_size)
            return WSCloseCode.OK, b""
        except (ValueError, TypeError, RecursionError):
            return WSCloseCode.INVALID_TEXT, b"there is no such wish"
        finally:
            self.waiting.put(None)

    def wish(self, text: str) -> None:
        """Takes {"say": text}, or numbers by the names in LIMITS, and nothing else."""
        for name, value in dict(json.loads(text)).items():
            if name == "say" and isinstance(value, str) and len(value) <= 300:
                self.to_say.extend(self.model.tokens(value))
            elif name in LIMITS and isinstance(value, (int, float)) and 0 <= value <= LIMITS[name]:
                self.wishes[name] = value
            else:
                raise ValueError(f"not a wish: {name}")

    def frames(self) -> Iterator[torch.Tensor]:
        """The user's frames [1, 1, T] as they come. Between two of them temperatures may change."""
        while (item := self.waiting.get()) is not None and item[0] < LONGEST:
            self.number, self.came = item[0], time.monotonic()
            gen, wished = self.model.gen, (self.wishes["temp"], self.wishes["temp_text"])
            if (gen.temp, gen.temp_text) != wished:  # a captured graph has the old ones in it: take a new one
                (gen.temp, gen.temp_text), gen._run = wished, captured(gen._step, gen.device, gen.cuda_graph)
            self.frame = torch.from_numpy(np.frombuffer(item[1], "<i2") / np.float32(32768))
            yield self.frame[None, None]

    def change(self, codes: torch.Tensor) -> torch.Tensor:
        """What Moshi hears of the user's codes [1, K, 1]: not the codebooks that are switched off."""
        switched_on = torch.arange(codes.shape[1], device=codes.device)[:, None] < self.wishes["codebooks"]
        return torch.where(switched_on, codes, NO_INPUT)

    def texts(self) -> Iterator[torch.Tensor]:
        """The text tokens [1] to be said: those of a sentence, or PAD while Moshi has to be silent."""
        while True:
            otherwise = self.model.pads[0] if self.wishes["silent"] else UNGENERATED
            yield torch.tensor([self.to_say.popleft() if self.to_say else otherwise])

    def run(self) -> None:
        """Talks until the page goes, or for as long as a conversation may last."""
        gen = self.model.gen
        chances = deque([[]] * (gen.max_delay - gen.config.delays[0]))  # of the text that is not out yet
        gen.reset()
        for heard, said, sound in converse(self.model.mimi, gen, self.frames(), self.change, self.texts()):
            own = [NO_INPUT] * gen.own if said is None else said[0, :, 0].tolist()
            self.all_said += [own] if said is not None else []
            if heard is None:  # without any delay Moshi is ahead of the user: see `converse`
                continue
            self.all_heard.append(heard[0, :, 0].tolist())
            self.sounds.append((self.frame, None if sound is None else sound[0, 0].cpu()))
            chances.append(self.model.likeliest())
            result = {"number": self.number, "codes": own + self.all_heard[-1], "chances": chances.popleft()}
            result |= {"pauses": gen.pauses[0].tolist(), "ms": 1000 * (time.monotonic() - self.came)}
            head = json.dumps(result).encode()
            pcm = b"" if sound is None else (32767 * sound.clamp(-1, 1)).short().cpu().numpy().tobytes()
            message = self.socket.send_bytes(len(head).to_bytes(4, "little") + head + pcm)
            asyncio.run_coroutine_threadsafe(message, self.loop).result(PATIENCE)

    def save(self, name: str) -> bytes:
        """The run so far: the codes as `generate.py --tokens` has them, or the sound as `--stereo` has it."""
        file, mimi, delays = io.BytesIO(), self.model.mimi, self.model.gen.config.delays
        if name == "run.npz":
            codes = [said + heard for said, heard in zip(self.all_said, self.all_heard)]
            np.savez(file, codes=np.array(codes).T, delays=delays, frame_rate=mimi.frame_rate)
        else:
            writer = SoundWriter(file, True, mimi.sample_rate, False)
            for user, moshi in list(self.sounds):
                writer.add(user, moshi)
            writer.finish()
        return file.getvalue()


class Server:
    """What the page asks for: itself, files, a conversation."""

    def __init__(self, folder: Path, device: str = "cpu", history: list[Path] | None = None):
        self.talk, self.turn = None, asyncio.Lock()  # the last conversation; held while it goes on
        self.app = web.Application(middlewares=[only_from_here])
        self.files = {path.name: path for path in history or sorted(TINY.glob("*.wav"))}
        if history:  # a saved run: its codes, and letters for them
            tokenizer = SentencePieceProcessor(str(folder / TOKENIZER_FILE))
            self.facts: dict = {"codes": np.load(history[0])["codes"].T.tolist()}
        else:
            self.app.router.add_get("/talk", self.converse)
            self.model = model = Model(folder, device)
            tokenizer, gen, mimi = model.tokenizer, model.gen, model.mimi
            self.facts = {"delays": gen.config.delays, "own": gen.own, "pads": model.pads, "temp": gen.temp}
            self.facts |= {"temp_text": gen.temp_text, "rate": mimi.sample_rate, "size": mimi.frame_size}
        pieces = map(tokenizer.id_to_piece, range(tokenizer.vocab_size())) if tokenizer else ()
        self.facts |= {"files": list(self.files), "pieces": list(pieces)}
        self.files[""] = Path(__file__).with_suffix(".html")
        self.app.router.add_get("/{name:.*}", self.give)

    async def give(self, request: web.Request) -> web.StreamResponse:
        """The page, what it has to know, a file, or the last conversation."""
        name = request.match_info["name"]
        if name in ("run.npz", "run.wav") and self.talk:
            return web.Response(body=await asyncio.to_thread(self.talk.save, name))
        if name == "about":
            return web.json_response(self.facts)
        if name not in self.files:
            raise web.HTTPNotFound
        return web.FileResponse(self.files[name])

    async def converse(self, request: web.Request) -> web.WebSocketResponse:
        """A conversation over a WebSocket, until the page goes, breaks a rule or does not read."""
        socket = web.WebSocketResponse(heartbeat=20, timeout=2, max_msg_size=8192, compress=False)
        await socket.prepare(request)
        if self.turn.locked():
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER, message=b"somebody else is talking to it")
            return socket
        async with self.turn:
            self.talk = talk = Talk(self.model, socket)
            thread, page = map(asyncio.create_task, (asyncio.to_thread(talk.run), talk.listen()))
            await asyncio.wait((thread, page), return_when=asyncio.FIRST_COMPLETED)
            code, reason = page.result() if page.done() else (WSCloseCode.GOING_AWAY, b"the model stopped")
            await socket.close(code=code, message=reason, drain=False)
            with contextlib.suppress(ConnectionError, futures.TimeoutError):  # there is no page any more
                await thread
        return socket


@web.middleware
async def only_from_here(request: web.Request, handler) -> web.StreamResponse:
    """Serves its own page alone. A script of another site has another Origin, which a browser names with
    every WebSocket; a name that was made to point to this machine is another Host."""
    allowed = [f"http://{request.host}"] + [None] * (request.path != "/talk")
    if request.url.host not in ("localhost", "127.0.0.1") or request.headers.get("Origin") not in allowed:
        raise web.HTTPForbidden(text="this page is for this machine alone")
    return await handler(request)


def main(argv: list[str] | None = None) -> None:
    """Opens what was named and serves."""
    parser = argparse.ArgumentParser(prog="live.py", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=TINY, help="a folder in the official format")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--history", nargs="+", type=Path, help="RUN.npz [RUN.wav], to look at a saved run")
    args = parser.parse_args(argv)
    try:
        server = Server(args.checkpoint, args.device, args.history)
        web.run_app(server.app, host="127.0.0.1", port=args.port, access_log=None, shutdown_timeout=2)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"live.py: error: {plain(error)}")


if __name__ == "__main__":
    main()
