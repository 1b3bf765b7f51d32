"""A headless browser for tests, driven by Chrome's DevTools protocol over two pipes: no driver and no library is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# Everything here is local: whatever takes this long has failed.
LIMIT_S = 30.0


def find_browser() -> str | None:
    """The browser's program; None if none is installed."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


class Page:
    """One tab.

    Attributes:
      problems: Errors that the page wrote to its console, and uncaught exceptions.
      requested: Every URL that was requested, except data: and blob:.
    """

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._rest = b""
        self._number = 0
        self.problems: list[str] = []
        self.requested: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = str(self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, object]:
        """Calls a method of the protocol and waits for its result."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + LIMIT_S
        while True:
            found = self._receive(end)
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]  # type: ignore[return-value]

    def open(self, url: str, *, width: int = 1000, height: int = 700, is_dark: bool = False) -> None:
        """Loads a page in a window of a given size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str) -> object:
        """The value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")  # type: ignore[attr-defined]

    def wait(self, condition: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + LIMIT_S
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < end, f"still not true: {condition}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Types into the focused element."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Presses a key: Enter, Escape, Tab."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Clicks the middle of an element."""
        box = f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
        x, y = self.run(box + "return [r.x + r.width / 2, r.y + r.height / 2] })()")  # type: ignore[misc]
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def text(self, selector: str) -> str:
        """The visible text of the last element that matches."""
        return str(self.run(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText ?? ''"))

    def screenshot(self, path: pathlib.Path) -> None:
        """Writes a screenshot as a PNG file."""
        path.write_bytes(base64.b64decode(str(self.call("Page.captureScreenshot")["data"])))

    def _receive(self, end: float) -> Mapping[str, object]:
        while b"\0" not in self._rest:
            is_ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert is_ready, "the browser does not answer"
            piece = os.read(self._read, 1 << 16)
            assert piece, f"the browser has ended with code {self._process.poll()}"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, object] = json.loads(line)
        self._note(str(found.get("method")), found.get("params"))
        return found

    def _note(self, method: str, parameters: object) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):  # type: ignore[index]
            self.problems.append(parameters["entry"]["text"])  # type: ignore[index]
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):  # type: ignore[index]
            self.problems.append(json.dumps(parameters))
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]  # type: ignore[index]
            if not url.startswith(("data:", "blob:")):
                self.requested.append(url)


@contextlib.contextmanager
def start_browser(program: str) -> Iterator[Page]:
    """Starts a browser with one empty tab, and stops it at the end."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    to_browser, from_test = os.pipe()
    to_test, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # It reads commands from descriptor 3 and writes to 4; a shell sets them up.
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        process = subprocess.Popen(
            ["bash", "-c", script, "sh", program, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(process, from_test, to_test)
        finally:
            os.close(from_test)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            process.kill()
            process.wait()
            os.close(to_test)
