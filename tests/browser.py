"""A headless Chromium for tests, driven over the Chrome DevTools protocol; nothing to install but Chromium itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no Chromium; apt-get install chromium"

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
_START_SECONDS = 60
_ANSWER_SECONDS = 60
_KEYS = {
    "ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Tab": 9, "Home": 36, "End": 35,
    "PageUp": 33, "PageDown": 34,
}  # fmt: skip


class Page:
    """One tab. `errors` gathers uncaught exceptions, console errors, failed requests and CSP violations."""

    def __init__(self, address: str) -> None:
        # A proxy from the environment must not see the loopback connection.
        self._socket: ClientConnection = connect(address, max_size=None, proxy=None, open_timeout=_START_SECONDS)
        self._number = 0
        self._loaded = False
        self._errors: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a protocol command and return its result."""
        self._number += 1
        number = self._number
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=_ANSWER_SECONDS))
            if message.get("id") != number:
                self._note(message)
            elif "error" in message:
                raise RuntimeError(f"{method}: {message['error']['message']}")
            else:
                return message["result"]

    def open(self, url: str, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Load a page at a window size and in a colour scheme, until its load event."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=url)
        end = time.monotonic() + _ANSWER_SECONDS
        while not self._loaded:
            self._pump(max(0.0, end - time.monotonic()))
            if time.monotonic() > end:
                raise TimeoutError(f"{url} did not load")

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript, awaiting promises, and return its value as plain data."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30) -> Any:
        """Evaluate an expression until it is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds} s: {expression}")
            time.sleep(0.1)
        return value

    def move(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Scroll an element into view and click its middle."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key, such as `ArrowDown`."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def screenshot(self, path: Path, full: bool = True) -> Path:
        """Write a PNG of the whole page, or of the window only."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    @property
    def errors(self) -> list[str]:
        """Everything that went wrong since the page was made."""
        self._pump(0.2)
        return list(self._errors)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _pump(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            self._note(json.loads(self._socket.recv(timeout=seconds)))
            while True:
                self._note(json.loads(self._socket.recv(timeout=0.05)))

    def _note(self, message: dict[str, Any]) -> None:
        method, about = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self._errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self._errors.append(" ".join(str(a.get("value", a.get("description"))) for a in about["args"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self._errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}".strip())


class Browser:
    """A Chromium process of our own with a profile of its own; use as a context manager."""

    def __init__(self) -> None:
        if CHROMIUM is None:
            raise RuntimeError(MISSING)
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._pages: list[Page] = []
        try:
            self._port = self._await_port()
        except BaseException:
            self.close()
            raise

    def open(self, url: str, width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        """Open a page in a new tab."""
        # Chromium listens on IPv4 loopback; no proxy may stand in between.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT")
        with opener.open(request, timeout=_START_SECONDS) as answer:
            page = Page(json.load(answer)["webSocketDebuggerUrl"])
        self._pages.append(page)
        page.open(url, width, height, dark)
        return page

    def close_tabs(self) -> None:
        """Close every page that was opened."""
        for page in self._pages:
            with contextlib.suppress(Exception):
                page.call("Page.close")
            page.close()
        self._pages.clear()

    def close(self) -> None:
        """End the process group that was started here and remove its profile."""
        for page in self._pages:
            with contextlib.suppress(Exception):
                page.close()
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
                break
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _await_port(self) -> int:
        announced = Path(self._profile) / "DevToolsActivePort"
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if announced.exists() and (lines := announced.read_text().split()):
                return int(lines[0])
            time.sleep(0.1)
        raise RuntimeError(f"Chromium did not start (exit status {self._process.poll()})")
