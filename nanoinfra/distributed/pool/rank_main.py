"""The main function of one rank process of a pool: it runs the calls that come through a pipe.

Each call starts from the same fresh state (seeds, dtype, hooks). The pool sends every rank the same RankCall;
a thread listens, and ends the process when the pipe closes, so that no rank outlives its parent. A rank
answers ("stdout" or "stderr", line) as it prints, then ("result", value) or ("error", traceback).
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
from multiprocessing.connection import Connection
from unittest import mock

import cloudpickle
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.modules import module

from nanoinfra.distributed.loopback_tcp_store import bind_gloo_and_nccl_to_loopback, connect_to_loopback_store
from nanoinfra.distributed.mesh import set_default_emulated_links
from nanoinfra.distributed.rank_status_board import StatusBoard, report_status_to


@dataclass(frozen=True)
class RankCall:
    """`fn(*args, **kwargs)`, to be run on every rank, and the settings of the pool that it runs under."""
    fn: Callable
    args: tuple
    kwargs: dict
    mutants: tuple                           # replacements in force during the call, see RankPool.run
    emulated_links: dict | None
    threads_per_rank: int
    working_directory: str


def rank_main(pipe: Connection, rank: int, world_size: int, store_port: int, status_board_path: str) -> None:
    """Join the process group by the store at `store_port`, then run calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C reaches every process; the parent handles it
    calls, outbox = queue.SimpleQueue(), _Outbox(pipe)
    sys.stdout, sys.stderr = _Lines(outbox, "stdout"), _Lines(outbox, "stderr")
    threading.Thread(target=_listen, args=(pipe, calls), daemon=True).start()
    board = StatusBoard(status_board_path, world_size, rank)
    report_status_to(board)
    outbox.answer(_join, rank, world_size, store_port)
    while True:
        text = calls.get()
        board.entered_counts.clear()                   # each call counts its collectives from 0
        outbox.answer(_run, text)


def _join(rank, world_size, store_port):
    bind_gloo_and_nccl_to_loopback()
    dist.init_process_group("gloo", store=connect_to_loopback_store(store_port), rank=rank,
                            world_size=world_size)


def _listen(pipe, calls):
    try:
        while True:
            calls.put(pipe.recv_bytes())
    except (EOFError, OSError):                        # the parent closed the pipe, or has ended
        os._exit(0)


def _run(text):
    call = cloudpickle.loads(text)
    environment = dict(os.environ)
    _fresh_state(call)
    try:
        with warnings.catch_warnings(), _mutated(call.mutants):
            warnings.simplefilter("error")
            return call.fn(*call.args, **call.kwargs)
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _fresh_state(call):
    os.chdir(call.working_directory)
    set_default_emulated_links(call.emulated_links)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(call.threads_per_rank)
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
    importlib.import_module(path)                      # so that a wrong path raises a plain ImportError
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
        """Send what `work` returns, or the traceback of its failure."""
        try:
            value = work(*args)
            sys.stdout.finish()
            sys.stderr.finish()
            self.post("result", value)
        except BaseException as error:                 # SystemExit too: it did not return
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
