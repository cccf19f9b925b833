"""A headless Chromium, driven over its DevTools protocol by the aiohttp that the page needs anyway.

`python tests/browser.py FOLDER` takes pictures of the page.
"""

import asyncio
import base64
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0
    --use-fake-ui-for-media-stream --use-fake-device-for-media-stream""".split()


class Browser:
    """`async with Browser(path) as browser`: one page, whose microphone hears this WAV once, then silence."""

    def __init__(self, microphone: Path):
        self.microphone, self.number = microphone, 0
        self.problems: list[dict] = []  # what the page has thrown, or could not load

    async def __aenter__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        heard = Path(self.folder.name) / "heard.wav"
        with wave.open(str(self.microphone)) as old, wave.open(str(heard), "wb") as new:
            new.setparams(old.getparams())
            # At the end it would go on with the last 10 ms for ever, so there is a minute of silence.
            new.writeframes(old.readframes(old.getnframes()) + bytes(60 * old.getframerate() * 2))
        flags = [f"--use-file-for-fake-audio-capture={heard}%noloop", f"--user-data-dir={self.folder.name}"]
        command = [CHROMIUM, *FLAGS, *flags, "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.session = aiohttp.ClientSession()
        port, deadline = Path(self.folder.name) / "DevToolsActivePort", time.monotonic() + 60
        while not (port.exists() and port.read_text().count("\n")):
            assert time.monotonic() < deadline and self.process.poll() is None, "Chromium does not start"
            await asyncio.sleep(0.1)
        async with self.session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
            page = next(tab for tab in await answer.json() if tab["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *_):
        await self.session.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()

    async def call(self, method: str, **parameters) -> dict:
        """Calls a method of the protocol."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(message["params"])
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.problems.append(message["params"])

    async def run(self, code: str):
        """What JavaScript gives, waited for, as if the user had clicked."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = await self.call("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, code: str, seconds: float = 30) -> bool:
        """Waits until the JavaScript is true; False if that takes too long."""
        deadline = time.monotonic() + seconds
        while not (true := await self.run(f"!!({code})")) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return true

    async def open(self, address: str) -> None:
        """Opens a page, and waits until its script has run."""
        await self.call("Page.navigate", url=address)
        ready = "document.readyState === 'complete' && document.querySelector('#source')?.length"
        assert await self.until(ready), "the page does not load"

    async def press(self, key: str) -> None:
        """A key, as from the keyboard."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **text)

    async def look(self, width: int, height: int, dark: bool = False, scale: float = 1) -> bytes:
        """A picture of the page in a window of this size, as a PNG."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Emulation.setScrollbarsHidden", hidden=True)
        twice = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        await self.run(twice)
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])


async def take_pictures(folder: Path) -> None:
    """The page while it counts: page.png, page-dark.png and page-narrow.png."""
    async with visit(live.Server(TINY)) as visitor, Browser(TINY / "question.wav") as browser:
        await browser.open(visitor.address)
        await browser.run("$('source').value = 'count.wav'; $('source').onchange(); $('start').click()")
        await browser.until("$('words').textContent.includes('nine') && run.length > 120", 60)
        await browser.run("pause(); look(run.findIndex(column => column.word === ' eight') - 1)")
        for name, *size in (
            ("page", 1200, 1060),
            ("page-dark", 1200, 1060, True),
            ("page-narrow", 390, 844, False, 2),
        ):
            (folder / f"{name}.png").write_bytes(await browser.look(*size))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
    import live
    from test_live import TINY, visit

    asyncio.run(take_pictures(Path(sys.argv[1])))
