"""Headless Chromium for a test: open pages, use them by mouse and keyboard, run JavaScript in them."""
import base64
import json
import os
import shutil
import signal
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path

import httpx

from tests.serve.host import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--no-proxy-server", "--remote-debugging-port=0", "--remote-allow-origins=*"]
SHIFT = 8                                    # among DevTools' modifiers
ENTER = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}


class Page:
    """A page that is open in a tab of its own."""

    def __init__(self, socket):
        self.socket, self.sent, self.errors, self.thrown = socket, 0, [], []

    def call(self, method, **params):
        """One command of the DevTools protocol; what the page logs as an error, or throws, is kept."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(said["params"])
            if said.get("method") == "Runtime.exceptionThrown":
                self.thrown.append(said["params"])
            if said.get("id") == self.sent:
                assert "result" in said, said
                return said["result"]

    def run(self, script):
        """The value of a JavaScript expression."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def open(self, url):
        """Go there, and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        until(lambda: self.run(f"location.href.startsWith({url!r}) && document.readyState == 'complete'"))

    def click(self, name, count=1):
        """Click `count` times, one directly after the other, on the element of this id."""
        x, y = self._middle(name)
        for clicks in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=clicks)

    def scroll(self, name, by):
        """Turn the wheel over an element, by so many pixels."""
        x, y = self._middle(name)
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=by)

    def type(self, text):
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def enter(self, modifiers=0):
        """The key, with `modifiers`."""
        for kind in ("keyDown", "keyUp"):
            self.press(kind, modifiers)

    def press(self, kind, modifiers=0):
        """A half of `enter`: "keyDown" or "keyUp"."""
        self.call("Input.dispatchKeyEvent", type=kind, modifiers=modifiers, **ENTER)

    def resize(self, width, height=800, dark=False):
        """Be a window of another size, or of a user who likes it dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self):
        """A PNG of it."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def _middle(self, name):
        middle = "(box => [box.x + box.width / 2, box.y + box.height / 2])"
        return self.run(f"{middle}({named(name)}.getBoundingClientRect())")


class Browser:
    """A browser that listens on a port for what it shall do."""

    def __init__(self, port):
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{port}/json", timeout=300, trust_env=False)

    def close(self):
        """Say no more to it."""
        self.api.close()

    @contextmanager
    def tab(self, url, width=1280, height=800):
        """A new tab at `url`, in front of the others. It is closed in the end."""
        import websocket
        tab = self.api.put("new?about:blank").json()
        with closing(websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=300)) as socket:
            page = Page(socket)
            for domain in ("Runtime", "Log", "Page"):
                page.call(f"{domain}.enable")
            page.resize(width, height)
            page.open(url)
            yield page
        self.api.get(f"close/{tab['id']}")


def named(name):
    """JavaScript's element of an id."""
    return f"document.getElementById({name!r})"


@contextmanager
def started(folder, *flags):
    """A browser; `folder` is for its own files, `flags` are more for Chromium."""
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as browser:
        try:
            port = Path(folder, "DevToolsActivePort")
            until(lambda: port.exists() and port.read_text().count("\n"))
            with closing(Browser(int(port.read_text().split()[0]))) as running:
                yield running
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
