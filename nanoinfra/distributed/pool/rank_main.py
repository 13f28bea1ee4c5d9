"""One rank of a pool: takes calls from a pipe, runs each from one fresh state, ends when the pipe closes.

The listening thread is also the watch: whatever the rank is doing, it ends with its parent. The pool asks all
ranks the same Call; a rank answers ("stdout" or "stderr", line) as it prints, then ("result", value) or
("error", traceback).
"""
import importlib
import io
import os
import queue
import random
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import cloudpickle
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.modules import module

from nanoinfra.distributed.ledger import Board, report_to
from nanoinfra.distributed.loopback import bind_to_loopback, client_store
from nanoinfra.distributed.mesh import emulate


@dataclass(frozen=True)
class Call:
    """`fn(*args, **kw)` on every rank, in `folder`, with the wire, mutants and threads of a pool."""
    fn: Callable
    args: tuple
    kw: dict
    mutants: tuple
    wire: dict | None
    threads: int
    folder: str


def serve(pipe, rank: int, world: int, port: int, board: str) -> None:
    """Join the process group at `port`, then answer calls until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C reaches all; the parent decides what it means
    calls, outbox = queue.SimpleQueue(), _Outbox(pipe)
    sys.stdout, sys.stderr = _Lines(outbox, "stdout"), _Lines(outbox, "stderr")
    threading.Thread(target=_listen, args=(pipe, calls), daemon=True).start()
    position = Board(board, world, rank)
    report_to(position)
    outbox.answer(_join, rank, world, port)
    while True:
        text = calls.get()
        position.entered.clear()                       # each call counts from nothing
        outbox.answer(_run, text)


def _join(rank, world, port):
    bind_to_loopback()
    dist.init_process_group("gloo", store=client_store(port), rank=rank, world_size=world)


def _listen(pipe, calls):
    try:
        while True:
            calls.put(pipe.recv_bytes())
    except (EOFError, OSError):                        # the parent closed the pipe, or is no more
        os._exit(0)


def _run(text):
    call = cloudpickle.loads(text)
    environment = dict(os.environ)
    _fresh_state(call)
    try:
        with warnings.catch_warnings(), _mutated(call.mutants):
            warnings.simplefilter("error")
            return call.fn(*call.args, **call.kw)
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _fresh_state(call):
    os.chdir(call.folder)
    emulate(call.wire)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(call.threads)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    for name, hooks in vars(module).items():           # torch's hooks on every nn.Module
        if name.startswith("_global_") and isinstance(hooks, dict):
            hooks.clear()
    module._global_is_full_backward_hook = None


@contextmanager
def _mutated(mutants):
    with ExitStack() as stack:
        for mutant in mutants:
            stack.enter_context(mutant() if callable(mutant) else _replaced(*mutant))
        yield


def _replaced(path, attribute, replacement):
    importlib.import_module(path)                      # so that a wrong path says so plainly
    return mock.patch(f"{path}.{attribute}", replacement)


class _Outbox:
    """The pipe to the parent; several threads may print."""

    def __init__(self, pipe):
        self.pipe, self.lock = pipe, threading.Lock()

    def post(self, kind: str, value) -> None:
        text = cloudpickle.dumps((kind, value))
        with self.lock:
            self.pipe.send_bytes(text)

    def answer(self, work: Callable, *args) -> None:
        """Send what `work` returns, or how it failed."""
        try:
            value = work(*args)
            sys.stdout.finish()
            sys.stderr.finish()
            self.post("result", value)
        except BaseException as error:                 # SystemExit too: who leaves the call has failed it
            self.post("error", _trace(error))


def _trace(error):
    """The traceback from the caller's function on, without the frames of this file."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


class _Lines(io.TextIOBase):
    """A text stream that posts whole lines, so that ranks do not print into each other's."""

    def __init__(self, outbox, name):
        self.outbox, self.name, self.rest = outbox, name, ""

    def writable(self):
        return True

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.outbox.post(self.name, line)
        return len(text)

    def finish(self) -> None:
        """Post a last line that has no newline."""
        if self.rest:
            self.write("\n")
