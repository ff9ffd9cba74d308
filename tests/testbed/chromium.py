"""A real headless Chromium, driven by its DevTools protocol over a WebSocket of the standard library's sockets."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.testbed.processes import until

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
    "--hide-scrollbars",
    "about:blank",
)
ANSWER_S = 60.0


class Tab:
    """One page of a browser; `problems` holds what went to its console as an error, and what it could not load."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._socket = socket.create_connection((where.hostname or "127.0.0.1", where.port or 80), timeout=ANSWER_S)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._file = self._socket.makefile("rb")
        assert b" 101 " in self._file.readline()
        while self._file.readline().strip():
            pass
        self._count = 0
        self.problems: list[str] = []
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Performance.enable", timeDomain="threadTicks")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    # ---- the protocol ----------------------------------------------------------------------------------------------------------

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept."""
        self._count += 1
        self._send(json.dumps({"id": self._count, "method": method, "params": parameters}).encode())
        while True:
            message = json.loads(self._receive())
            if message.get("id") == self._count:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._notice(message)

    def _notice(self, message: dict[str, Any]) -> None:
        kind, what = message.get("method", ""), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(what["exceptionDetails"])[:500])
        elif kind == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.problems.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        elif kind == "Runtime.consoleAPICalled" and what["type"] == "error":
            self.problems.append(json.dumps(what["args"])[:500])
        elif kind == "Network.requestWillBeSent":
            self.events.append(what["request"])

    def _send(self, data: bytes) -> None:
        mask = os.urandom(4)
        size = bytes((0x80 | len(data),)) if len(data) < 126 else struct.pack("!BH", 0x80 | 126, len(data))
        size = size if len(data) < 1 << 16 else struct.pack("!BQ", 0x80 | 127, len(data))
        masked = bytes(byte ^ mask[place % 4] for place, byte in enumerate(data))
        self._socket.sendall(b"\x81" + size + mask + masked)

    def _receive(self) -> bytes:
        parts = []
        while True:
            first, second = self._file.read(2)
            size = second & 0x7F
            if size > 125:
                size = int.from_bytes(self._file.read(2 if size == 126 else 8), "big")
            data = self._file.read(size)
            if first & 0x0F in (0, 1):
                parts.append(data)
                if first & 0x80:
                    return b"".join(parts)

    # ---- what a person does ----------------------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Go there; the page may still be loading when this returns."""
        self.call("Page.navigate", url=url)

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        until(lambda: self.eval(f"Boolean({expression})"), lambda: f"{expression}; problems: {self.problems}; {self.text()[:1000]}")

    def text(self) -> str:
        """What there is to read."""
        return str(self.eval("document.body ? document.body.innerText : ''"))

    def busy_s(self) -> float:
        """Processor time of the page's main thread so far: scripts, style, layout, paint."""
        metrics = {each["name"]: each["value"] for each in self.call("Performance.getMetrics")["metrics"]}
        return float(metrics["TaskDuration"])

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, by its DOM name."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27, "ArrowDown": 40, "PageDown": 34}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        same = {"key": key, "code": {" ": "Space"}.get(key, key), "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **same)
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def size(self, width: int, height: int, *, phone: bool = False, scale: float = 1.0) -> None:
        """The window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)

    def prefer(self, **features: str) -> None:
        """Media features, prefers_color_scheme="dark" for example."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def picture(self, path: Path) -> None:
        """A PNG of what is in sight."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A browser of its own with one tab; it ends with the block."""
    program = shutil.which("chromium")
    assert program, "apt-get install chromium"
    home = folder / "chromium"
    environment = {**os.environ, "HOME": str(folder)}
    with (folder / "chromium.log").open("wb") as log:
        browser = subprocess.Popen(
            [program, f"--user-data-dir={home}", *FLAGS], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        port_file = home / "DevToolsActivePort"
        until(lambda: port_file.exists() and port_file.read_text().count("\n") >= 1, lambda: (folder / "chromium.log").read_text()[-2000:])
        port = int(port_file.read_text().split()[0])

        def page() -> str | None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                return next((each["webSocketDebuggerUrl"] for each in json.load(answer) if each["type"] == "page"), None)
            return None

        tab = Tab(until(page, "a tab"))
        try:
            yield tab
        finally:
            tab.close()
    finally:
        browser.terminate()
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
