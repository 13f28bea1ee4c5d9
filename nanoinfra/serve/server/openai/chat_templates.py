"""Chat templates rendered in a child process: they are programs, and a thread cannot be ended.

A child has some seconds of processor time for each chat, and MEMORY bytes; one that takes more is ended, and
the next chat starts another. What it hears and says is JSON, so nothing of a stranger's is unpickled here.
"""
import json
import resource
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from nanoinfra.model.tokenizer import Text, render_chat, renderer
from nanoinfra.model.weights.import_transformers import without_torch
from nanoinfra.train.launch.elastic_rank import end_with_parent

SECONDS = 2.0                                # of the processor, for one chat
PATIENCE = 20                                # seconds of a clock, on a machine however busy
STARTING = 120                               # seconds of a clock until a new child is ready
MEMORY = 1 << 30                             # bytes of addresses
MOST_RENDERED = 1 << 21                         # bytes of a chat, rendered: more than any body brings
START = "from nanoinfra.serve.server.openai.chat_templates import main; main()"


class TemplateProcess:
    """A child that renders chats for one thread: Linux ends the child with that thread.

    Each chat has `seconds` of the processor.
    """

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self.process, self.pipe = seconds, None, None

    def render(self, template: str, messages: list[dict], text: Text, tools: list[dict] | None = None) -> str:
        """What render_chat returns for the same. Raises ValueError where it fails or ends."""
        try:
            if self.process and self.process.poll() is not None:         # killed by somebody, between chats
                self._end()
            if self.process is None:
                self._start()
            self.pipe.send_bytes(json.dumps([template, messages, text.special_tokens, tools]).encode())
            said = json.loads(self._hear(PATIENCE))
        except (EOFError, OSError) as error:
            raise ValueError(self._end() if self.process else str(error)) from error
        if "error" in said:
            raise ValueError(said["error"])
        return said["text"]

    def kill(self) -> None:
        """End the child, from any thread; who waits for it gets a ValueError."""
        if process := self.process:
            process.kill()

    def close(self) -> None:
        """Leave nothing of the child."""
        if self.process:
            self._end()

    __del__ = close

    def _start(self):
        mine, theirs = socket.socketpair()
        with mine, theirs:
            for way in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):         # a stopped child reads nothing
                mine.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", PATIENCE, 0))
            self.process = subprocess.Popen([sys.executable, "-c", START, str(theirs.fileno()),
                                             str(self.seconds)], pass_fds=[theirs.fileno()],
                                            stdin=subprocess.DEVNULL)
            self.pipe = Connection(mine.detach())
        self._hear(STARTING)

    def _hear(self, seconds):
        if not self.pipe.poll(seconds):
            raise TimeoutError
        return self.pipe.recv_bytes()

    def _end(self):
        """End the child; why there was no answer."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)                                       # it may be ending by itself
        alive = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        code, self.process, self.pipe = self.process.returncode, None, None
        if alive or code == -signal.SIGPROF:
            return f"it took more than {self.seconds:g} s for these messages"
        return f"its process ended with {code}"


def main() -> None:
    """Be the child: chats come through pipe argv[1], each has argv[2] seconds of the processor."""
    end_with_parent()
    for sign in (signal.SIGINT, signal.SIGTERM):             # meant for the server, which ends this one
        signal.signal(sign, signal.SIG_IGN)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    without_torch()
    with suppress(ValueError):               # it is said of the first chat
        renderer()
    pipe, seconds = Connection(int(sys.argv[1])), float(sys.argv[2])
    pipe.send_bytes(b"ready")
    with suppress(EOFError, OSError):                        # the server is no more
        while True:
            asked = json.loads(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_PROF, seconds)    # then SIGPROF ends the process
            said = answer(*asked)
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send_bytes(said)


def answer(template: str, messages: list[dict], special_tokens: dict[str, str],
           tools: list[dict] | None = None) -> bytes:
    """JSON: the text, or the error that messages make of a template."""
    try:
        said = {"text": render_chat(template, messages, Text(None, named=special_tokens), tools)}
        if len(said["text"].encode()) > MOST_RENDERED:       # raises for half a surrogate pair
            said = {"error": f"it makes more than {MOST_RENDERED} bytes of them"}
    except Exception as error:               # a template may fail in every way a program can
        said = {"error": str(error) or type(error).__name__}
    return json.dumps(said).encode()
