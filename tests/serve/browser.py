"""Headless Chromium for a test: open a page, run its JavaScript, look at it."""
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


class Page:
    """A page that is open."""

    def __init__(self, socket):
        self.socket, self.sent, self.errors = socket, 0, []

    def call(self, method, **params):
        """One command of the DevTools protocol; what the page logs as an error meanwhile is kept."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(said["params"])
            if said.get("id") == self.sent:
                return said["result"]

    def run(self, script):
        """The value of a JavaScript expression."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def picture(self):
        """A PNG of it."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


@contextmanager
def opened(url, folder, *flags, width=1280, height=800):
    """The page at `url`; `folder` is for the browser's own files, `flags` are more for Chromium."""
    import websocket
    command = [CHROMIUM, *FLAGS, *flags, f"--window-size={width},{height}", f"--user-data-dir={folder}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as browser:
        try:
            port = Path(folder, "DevToolsActivePort")
            until(lambda: port.exists() and port.read_text().count("\n"))
            address = _address(int(port.read_text().split()[0]))
            with closing(websocket.create_connection(address, timeout=300)) as socket:
                page = Page(socket)
                for domain in ("Runtime", "Log", "Page"):
                    page.call(f"{domain}.enable")
                page.call("Page.navigate", url=url)
                here = f"location.href.startsWith({url!r}) && document.readyState == 'complete'"
                until(lambda: page.run(here))
                yield page
        finally:
            os.killpg(browser.pid, signal.SIGKILL)


def _address(port):
    """Of the first page there is."""
    pages = []

    def found():
        listed = httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
        pages.extend(each for each in listed if each["type"] == "page")
        return pages
    until(found)
    return pages[0]["webSocketDebuggerUrl"]
