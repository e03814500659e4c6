"""A page in headless Chromium, driven through the DevTools protocol: clicks, keys, screenshots, and what went wrong.

https://chromedevtools.github.io/devtools-protocol/; the websocket is aiohttp's, which fsspec brings along.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

PROGRAMS = (
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
OPTIONS = (
    *("--headless=new", "--remote-debugging-port=0", "--no-first-run", "--no-default-browser-check"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb"),
)
TIMEOUT_S = 120
LISTENING = "DevTools listening on "


def find_chromium() -> str | None:
    """Return the path of a Chromium or Chrome, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One tab.

    Attributes:
        problems: uncaught exceptions, console messages above "info", and entries of the browser's log.
        requests: addresses that were asked for, data URIs left out.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._loop = asyncio.new_event_loop()
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._process: subprocess.Popen[str] | None = None
        self._client: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._tab: str | None = None
        self._number = 0
        self._events: deque[dict[str, Any]] = deque()
        self.problems: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> Browser:
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Chromium refuses to sandbox root
        command = [self._program, *OPTIONS, *root, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            self._await(self._connect(self._address()))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        if self._client is not None:
            self._await(self._client.close())
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
        self._loop.close()
        self._profile.cleanup()

    def _address(self) -> str:
        assert self._process is not None
        assert self._process.stderr is not None
        lines: list[str] = []
        for line in self._process.stderr:
            lines.append(line)
            if line.startswith(LISTENING):
                return line.removeprefix(LISTENING).strip()
        raise RuntimeError(f"{self._program} ended without listening:\n{''.join(lines)}")

    def _await(self, awaitable: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(awaitable, TIMEOUT_S))

    async def _connect(self, address: str) -> None:
        self._client = aiohttp.ClientSession()
        self._socket = await self._client.ws_connect(address, max_msg_size=0)
        target = await self._call("Target.createTarget", {"url": "about:blank"})
        attached = await self._call("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        self._tab = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable", {})

    async def _receive(self) -> dict[str, Any]:
        assert self._socket is not None
        message: dict[str, Any] = await self._socket.receive_json()
        if "method" in message:
            self._events.append(message)
            self._note(message["method"], message["params"])
        return message

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        assert self._socket is not None
        self._number += 1
        number = self._number
        session = {"sessionId": self._tab} if self._tab else {}
        await self._socket.send_json({"id": number, "method": method, "params": parameters, **session})
        while (message := await self._receive()).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(parameters["entry"]))
        elif method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith("data:"):
            self.requests.append(parameters["request"]["url"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol on the tab."""
        return self._await(self._call(method, parameters))

    def size(self, width: int, height: int, *, scale: float = 1.0, mobile: bool = False, dark: bool = False) -> None:
        """Set the window's size in CSS pixels, and the colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path) -> None:
        """Open a file and wait until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._await(self._loaded())

    async def _loaded(self) -> None:
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            await self._receive()

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Scroll an element into view and click into it, at shares of its width and height."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )
        place = {"x": box[0] + across * box[2], "y": box[1] + down * box[3], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **place)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **place)

    def press(self, key: str) -> None:
        """Press and release a key that types nothing, for example ArrowLeft."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def screenshot(self, target: Path, *, whole: bool = False) -> Path:
        """Write what the window shows, or the whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(shot["data"]))
        return target
