"""Render chat templates (Jinja) in a child process: a template is a program, and a thread cannot be killed.

A child has a few seconds of CPU time for each chat and a limit of memory. A child that needs more is
killed, and the next chat starts a new one. Messages between both are JSON: no untrusted data is unpickled.
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

from nanoinfra.model.tokenizer import Tokenizer, apply_chat_template, load_chat_template_renderer
from nanoinfra.model.weights.call_transformers import hide_torch_from_transformers
from nanoinfra.train.launch.elastic_rank import die_with_parent

_MAX_CPU_SECONDS_PER_CHAT = 2.0              # of CPU time
_RENDER_TIMEOUT_SECONDS = 20                 # of wall time, on a busy machine
_STARTUP_TIMEOUT_SECONDS = 120               # until a new child is ready
_MAX_ADDRESS_SPACE_BYTES = 1 << 30           # RLIMIT_AS of a child
_MAX_RENDERED_BYTES = 1 << 21                # of a rendered chat: more than any body brings
_CHILD_PROGRAM = "from nanoinfra.serve.server.openai.chat_template_process import main; main()"


class ChatTemplateProcess:
    """A child process that renders chat templates for one thread; Linux kills it when that thread ends.

    Each chat may take `cpu_seconds` of CPU time.
    """

    def __init__(self, cpu_seconds: float = _MAX_CPU_SECONDS_PER_CHAT):
        self.cpu_seconds = cpu_seconds
        self.process, self.pipe = None, None

    def render_chat_template(self, chat_template: str, messages: list[dict], tokenizer: Tokenizer,
                             tools: list[dict] | None = None) -> str:
        """The rendered prompt. Raises ValueError if the template fails, or the child ends or is too slow."""
        try:
            if self.process and self.process.poll() is not None:         # it was killed between two chats
                self._kill()
            if self.process is None:
                self._start()
            request = [chat_template, messages, tokenizer.special_tokens_map, tools]
            self.pipe.send_bytes(json.dumps(request).encode())
            reply = json.loads(self._receive(_RENDER_TIMEOUT_SECONDS))
        except (EOFError, OSError) as error:
            raise ValueError(self._kill() if self.process else str(error)) from error
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["text"]

    def kill(self) -> None:
        """Kill the child, from any thread; a render in progress raises ValueError."""
        if process := self.process:
            process.kill()

    def close(self) -> None:
        """End the child and wait for its end."""
        if self.process:
            self._kill()

    __del__ = close

    def _start(self):
        mine, theirs = socket.socketpair()
        with mine, theirs:
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):      # a stopped child reads nothing
                mine.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _RENDER_TIMEOUT_SECONDS, 0))
            self.process = subprocess.Popen([sys.executable, "-c", _CHILD_PROGRAM, str(theirs.fileno()),
                                             str(self.cpu_seconds)], pass_fds=[theirs.fileno()],
                                            stdin=subprocess.DEVNULL)
            self.pipe = Connection(mine.detach())
        self._receive(_STARTUP_TIMEOUT_SECONDS)

    def _receive(self, timeout):
        if not self.pipe.poll(timeout):
            raise TimeoutError
        return self.pipe.recv_bytes()

    def _kill(self):
        """Kill the child; returns the reason why it did not answer."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)           # it may end by itself
        alive = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        code = self.process.returncode
        self.process, self.pipe = None, None
        if alive or code == -signal.SIGPROF:
            return f"it took more than {self.cpu_seconds:g} s for these messages"
        return f"its process ended with {code}"


def main() -> None:
    """The child's main function. argv: file descriptor of its pipe, seconds of CPU time for each chat."""
    die_with_parent()
    for signum in (signal.SIGINT, signal.SIGTERM):           # for the server, which ends the child
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE_BYTES, _MAX_ADDRESS_SPACE_BYTES))
    hide_torch_from_transformers()
    with suppress(ValueError):               # the first chat reports it
        load_chat_template_renderer()
    pipe, cpu_seconds = Connection(int(sys.argv[1])), float(sys.argv[2])
    pipe.send_bytes(b"ready")
    with suppress(EOFError, OSError):        # the server has ended
        while True:
            request = json.loads(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)    # SIGPROF kills the process after it
            reply = _render_to_json(*request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send_bytes(reply)


def _render_to_json(template: str, messages: list[dict], special_tokens: dict[str, str],
                    tools: list[dict] | None = None) -> bytes:
    """The rendered text, or the error of the template, as JSON."""
    try:
        tokenizer = Tokenizer(None, other_special_tokens=special_tokens)
        reply = {"text": apply_chat_template(template, messages, tokenizer, tools)}
        if len(reply["text"].encode()) > _MAX_RENDERED_BYTES:            # raises for half a surrogate pair
            reply = {"error": f"it makes more than {_MAX_RENDERED_BYTES} bytes of them"}
    except Exception as error:               # a template is a program, and may raise anything
        reply = {"error": str(error) or type(error).__name__}
    return json.dumps(reply).encode()
