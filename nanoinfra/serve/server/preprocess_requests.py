"""Make engine requests of a request body in threads: parse it, render the chat template, tokenize.

The event loop is never blocked. Each kind of work (texts, chats, large bodies, responses) has its own
thread pool and its own limit of waiting work, so slow work (an endless chat template, a body of half a
megabyte) delays only work of the same kind.
"""
import asyncio
import ctypes
import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server.openai.chat_template_process import ChatTemplateProcess
from nanoinfra.serve.server.openai.completion_requests import (
    BaseCompletionRequest,
    ChatCompletionRequest,
    build_engine_requests,
    parse_request_body,
)
from nanoinfra.serve.server.openai.completion_responses import BaseCompletionResponse

LARGE_BODY_BYTES = 1 << 16                   # a body with more bytes is parsed in a pool of its own
_THREADS_PER_POOL = {"texts": 2, "chats": 2, "large": 1, "answers": 1}
_MAX_WAITING_PER_POOL = 1024                 # work that may wait for one pool
_MAX_LARGE_BODIES = 4                        # large bodies that are received or processed at once
_MALLOC_OPTIONS = {"M_ARENA_MAX": (-8, 2), "M_MMAP_THRESHOLD": (-3, 1 << 17),
                   "M_TRIM_THRESHOLD": (-1, 1 << 17)}


class RequestPreprocessor:
    """The thread pools of one server, and the processes that render its chat templates."""

    def __init__(self):
        configure_malloc_to_return_memory()
        self.thread_pools = {pool: ThreadPoolExecutor(n, f"nanoinfra {pool}")
                             for pool, n in _THREADS_PER_POOL.items()}
        self.num_waiting, self.num_large_bodies = Counter(), 0
        self.thread_local, self.template_processes = threading.local(), []

    async def run_in_pool(self, pool: str, call: Callable, *args: Any) -> Any:
        """Run `call(*args)` in a thread of `pool` for its result. Raises APIError (429) if it is full."""
        if self.num_waiting[pool] >= _MAX_WAITING_PER_POOL:
            raise APIError(429, f"{_MAX_WAITING_PER_POOL} requests wait to be read; come back later")
        self.num_waiting[pool] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread_pools[pool], call, *args)
        finally:
            self.num_waiting[pool] -= 1

    async def parse_and_tokenize(self, request_type: type[BaseCompletionRequest],
                                 response_type: type[BaseCompletionResponse], body: bytes, response_id: str,
                                 served_model_name: str, engine_ready: EngineReady) -> BaseCompletionResponse:
        """Parse, render and tokenize `body`; returns the response, still empty. Raises APIError."""
        large = len(body) > LARGE_BODY_BYTES
        pool = "large" if large else "chats" if issubclass(request_type, ChatCompletionRequest) else "texts"
        return await self.run_in_pool(pool, self._parse_and_tokenize, request_type, response_type, body,
                                      response_id, served_model_name, engine_ready, large)

    async def encode_response(self, num_tokens: int, encode: Callable[[], bytes],
                              response: BaseCompletionResponse) -> bytes:
        """Return `encode()`, which writes `num_tokens` tokens of `response`; in a thread if that is slow."""
        if response.is_slow_to_encode(num_tokens):
            return await self.run_in_pool("answers", encode)
        return encode()

    @contextmanager
    def reserve_large_body_slot(self) -> Iterator[None]:
        """Hold one of the few slots for large bodies. Raises APIError (429) if none is free."""
        if self.num_large_bodies >= _MAX_LARGE_BODIES:
            raise APIError(429, f"{_MAX_LARGE_BODIES} bodies larger than {LARGE_BODY_BYTES} bytes are read "
                           "now; come back later")
        self.num_large_bodies += 1
        try:
            yield
        finally:
            self.num_large_bodies -= 1

    def close(self) -> None:
        """End the threads and the processes, and give up their work."""
        for pool in self.thread_pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for process in self.template_processes:
            process.kill()
        for pool in self.thread_pools.values():
            pool.shutdown()
        for process in self.template_processes:
            process.close()

    def _parse_and_tokenize(self, request_type, response_type, body, response_id, served_model_name,
                            engine_ready, large):
        with _paused_garbage_collector() if large else nullcontext():
            request = parse_request_body(request_type, body)
        if request.model not in (None, served_model_name):
            raise model_not_found_error(request.model, served_model_name)
        engine_requests = build_engine_requests(request, response_id, engine_ready, self._render)
        return response_type(request, response_id, served_model_name, engine_requests, engine_ready.tokenizer)

    def _render(self, *chat):
        local = self.thread_local
        if not hasattr(local, "template_process"):
            local.template_process = ChatTemplateProcess()
            self.template_processes.append(local.template_process)
        return local.template_process.render_chat_template(*chat)


def model_not_found_error(requested_model: str, served_model_name: str) -> APIError:
    """The error for a client that asks for a model that is not served (404)."""
    return APIError(404, f"there is no model {requested_model!r:.200} here; there is {served_model_name!r}",
                    "model", "model_not_found")


def configure_malloc_to_return_memory() -> None:
    """Make glibc return freed memory to the system, and let all threads share two malloc arenas.

    By default its thresholds grow with the largest freed block, and every thread keeps up to 64 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)    # other systems do not have it
    for option, value in _MALLOC_OPTIONS.values() if mallopt else ():
        mallopt(option, value)


@contextmanager
def _paused_garbage_collector():
    """Disable Python's cyclic garbage collector while JSON is parsed. Only one thread may use this."""
    gc.disable()                             # it would scan the growing result again and again
    try:
        yield
    finally:
        gc.enable()
