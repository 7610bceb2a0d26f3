"""Firefox as it is installed, by WebDriver BiDi: Playwright drives builds of its own, or the newest only.

Playwright 1.65 asks Firefox for emulation.setMediaFeaturesOverride, which an ESR of 153 does not know.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pages import PATIENCE, eventually

FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
ABSENT = (
    "no explorer and no page were opened in Firefox, which is not installed (apt-get install firefox-esr)"
)


class Firefox:
    """One tab."""

    def __init__(self, address: str) -> None:
        from websocket import create_connection  # Jupyter's own

        self._socket = create_connection(f"{address}/session", timeout=PATIENCE, suppress_origin=True)
        self._sent = 0
        self._ask("session.new", capabilities={})
        self._tab = self._ask("browsingContext.getTree")["contexts"][0]["context"]

    def open(self, url: str) -> None:
        self._ask("browsingContext.navigate", context=self._tab, url=url, wait="complete")

    def evaluate(self, expression: str) -> object:
        """The value of an expression, which must be text, a number or a truth value."""
        target = {"context": self._tab}
        answer = self._ask("script.evaluate", expression=expression, target=target, awaitPromise=True)
        if answer["type"] == "exception":
            raise RuntimeError(answer["exceptionDetails"]["text"])
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        eventually(lambda: self.evaluate(expression), f"it never came: {expression}")

    def press(self, key: str) -> None:
        """A key, where the focus is; the private characters of WebDriver stand for End and the like."""
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._ask(
            "input.performActions",
            context=self._tab,
            actions=[{"type": "key", "id": "keys", "actions": strokes}],
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self._ask("browsingContext.captureScreenshot", context=self._tab)["data"])
        )

    def _ask(self, method: str, **given: object) -> dict:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": given}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._sent:
            pass  # of events none is asked for
        if answer["type"] == "error":
            raise RuntimeError(f"{method}: {answer['message']}")
        return answer["result"]


@contextmanager
def firefox() -> Iterator[Firefox]:
    """With a profile of its own, and no window."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        log = Path(profile, "firefox.log")
        command = [FIREFOX, "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"]
        with open(log, "wb") as written:
            process = subprocess.Popen(command, stdout=written, stderr=written)
        try:
            listening = re.compile(r"WebDriver BiDi listening on (ws://\S+)")
            eventually(lambda: listening.search(log.read_text()), "Firefox did not start")
            yield Firefox(listening.search(log.read_text())[1])
        finally:
            process.terminate()
            process.wait(PATIENCE)
