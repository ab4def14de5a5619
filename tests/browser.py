"""A headless Chromium, driven over the DevTools protocol: open a page, wait for text, read it, take its picture."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from conftest import skip

CHROMIUM = shutil.which("chromium")


def needs_chromium() -> None:
    """Skip without Chromium; in CI, where `make test` installs it, fail."""
    if CHROMIUM is None:
        reason = "no chromium: as root, apt-get install chromium"
        skip(reason)


class Browser:
    """One page of a running Chromium."""

    def __init__(self, address: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.calls = 0
        self.loop.run_until_complete(self._connect(address))

    def open(self, url: str) -> None:
        """Load `url` anew, also when it differs from the page that is shown in its #fragment alone."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def size(self, width: int, height: int = 900, *, scale: float = 1, dark: bool = False) -> None:
        """Set the window in CSS pixels, and the colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self) -> str:
        """All text that is shown, shadow roots left out."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait_for(self, *words: str, timeout_s: float = 60) -> str:
        """Wait until the page shows all of `words`; returns its text."""
        deadline = time.monotonic() + timeout_s
        while True:
            text = self.text()
            missing = [word for word in words if word not in text]
            if not missing:
                return text
            assert time.monotonic() < deadline, f"{missing} not shown after {timeout_s} s:\n{text[:3000]}"
            time.sleep(0.3)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """PNG of the window, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def print_to_pdf(self) -> bytes:
        """As the page's own @page rule says."""
        answer = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        return base64.b64decode(answer["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        return self.loop.run_until_complete(self._call(method, parameters))

    def close(self) -> None:
        self.loop.run_until_complete(self.session.close())
        self.loop.close()

    async def _connect(self, address: str) -> None:
        self.session = aiohttp.ClientSession()
        self.socket = await self.session.ws_connect(address, max_msg_size=0)
        await self._call("Page.enable", {})

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        number = self.calls
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(timeout=60)).data)
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh Chromium on loopback with a profile of its own, ended with its block."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",  # CI runs as root
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--no-first-run",
                "--disable-background-networking",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            port = None
            for line in process.stderr:
                if found := re.search(r"ws://127\.0\.0\.1:(\d+)/", line):
                    port = int(found[1])
                    break
            assert port, "Chromium ended without a word of its port"
            browser = Browser(_page(port))
            yield browser
            browser.close()
        finally:
            process.terminate()
            process.wait(timeout=20)


def _page(port: int) -> str:
    """Address of the protocol of the first page."""
    import urllib.request

    deadline = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
            pages = [target for target in json.load(answer) if target["type"] == "page"]
        if pages:
            return str(pages[0]["webSocketDebuggerUrl"])
        assert time.monotonic() < deadline
        time.sleep(0.1)
