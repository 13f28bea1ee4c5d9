"""From a body to what the engine is asked: parsed, rendered, tokenized in threads, never in the event loop.

Each kind of work has threads of its own, and only so much of it may wait: whoever is slow (a chat whose
template goes on and on, a body of half a megabyte) keeps only others of that kind waiting.
"""
import asyncio
import ctypes
import gc
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

from nanoinfra.serve.processes.engine_loop import Ready
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.openai.chat_templates import TemplateProcess
from nanoinfra.serve.server.openai.completion_requests import Chat, Question, read, requests_of
from nanoinfra.serve.server.openai.completion_responses import Answer

LARGE = 1 << 16                              # bytes of a body
THREADS = {"texts": 2, "chats": 2, "large": 1, "answers": 1}
MOST_WAITING = 1024                          # of a kind
MOST_LARGE = 4                               # large bodies that are read, or wait
MALLOC = {"M_ARENA_MAX": (-8, 2), "M_MMAP_THRESHOLD": (-3, 1 << 17), "M_TRIM_THRESHOLD": (-1, 1 << 17)}


class Preprocessor:
    """The threads of one server, and the processes that render its chats."""

    def __init__(self):
        release_freed_memory()
        self.threads = {kind: ThreadPoolExecutor(n, f"nanoinfra {kind}") for kind, n in THREADS.items()}
        self.waiting, self.large = Counter(), 0
        self.mine, self.templates = threading.local(), []

    async def run(self, kind: str, call, *args):
        """What `call(*args)` returns, in a thread of `kind`. Raises Refused where too much waits for one."""
        if self.waiting[kind] >= MOST_WAITING:
            raise Refused(429, f"{MOST_WAITING} requests wait to be read; come back later")
        self.waiting[kind] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads[kind], call, *args)
        finally:
            self.waiting[kind] -= 1

    async def prepare(self, kind: type[Question], form: type[Answer], body: bytes, name: str, model: str,
                      ready: Ready) -> Answer:
        """The answer to `body`, still without a word; it knows the requests. Raises Refused."""
        large = len(body) > LARGE
        threads = "large" if large else "chats" if issubclass(kind, Chat) else "texts"
        return await self.run(threads, self._prepare, kind, form, body, name, model, ready, large)

    async def write(self, places: int, call, answer: Answer) -> bytes:
        """What `call()` writes of `answer`, so many tokens: in a thread, where others would wait for long."""
        return await self.run("answers", call) if answer.is_long(places) else call()

    @contextmanager
    def place_for_large(self):
        """One of the MOST_LARGE places for a large body. Raises Refused where there is none."""
        if self.large >= MOST_LARGE:
            raise Refused(429, f"{MOST_LARGE} bodies larger than {LARGE} bytes are read now; come back later")
        self.large += 1
        try:
            yield
        finally:
            self.large -= 1

    def close(self) -> None:
        """End the threads and the processes; what is under way is given up."""
        for pool in self.threads.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for child in self.templates:
            child.kill()
        for pool in self.threads.values():
            pool.shutdown()
        for child in self.templates:
            child.close()

    def _prepare(self, kind, form, body, name, model, ready, large):
        with _collector_waits() if large else nullcontext():
            question = read(kind, body)
        if question.model not in (None, model):
            raise no_such_model(question.model, model)
        return form(question, name, model, requests_of(question, name, ready, self._render), ready.text)

    def _render(self, *chat):
        if not hasattr(self.mine, "child"):
            self.mine.child = TemplateProcess()
            self.templates.append(self.mine.child)
        return self.mine.child.render(*chat)


def no_such_model(asked: str, served: str) -> Refused:
    """Why a client that asks for another model gets no answer."""
    return Refused(404, f"there is no model {asked!r:.200} here; there is {served!r}", "model",
                   "model_not_found")


def release_freed_memory() -> None:
    """Let glibc give memory back to the system when it is freed, and threads share two arenas.

    Left alone, its thresholds grow with the largest thing that was freed, and every thread keeps up to 64 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)    # other systems have none
    for option, value in MALLOC.values() if mallopt else ():
        mallopt(option, value)


@contextmanager
def _collector_waits():
    """For JSON, which has no cycles. One thread alone may call this."""
    gc.disable()                             # else it looks again and again through what is being parsed
    try:
        yield
    finally:
        gc.enable()
