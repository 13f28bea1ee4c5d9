"""Ranks that have met and formed groups, and wait to be looked at: of a launcher, of a pool, of an engine.

Each of `launched`, `pooled`, `teamed` starts two, calls `look(ports of their stores, processes)`, lets them
meet once more, and says whether that went well. `without` names functions, "module:attribute", that do
nothing in the ranks: guards taken out. GLOO_SOCKET_IFNAME of the ranks names an interface of other hosts.
"""
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch.distributed as dist

from nanoinfra.distributed import comm
from nanoinfra.distributed.loopback_tcp_store import start_loopback_store
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.distributed.pool import rank_main
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.distributed.pool.rank_processes import _PRELOADED_MODULES, RankFailedError
from nanoinfra.serve.processes.tensor_parallel_group import TensorParallelGroup
from nanoinfra.train.launch.elastic_rank import die_with_parent, rank_process_group
from nanoinfra.train.launch.launch_ranks import launch_ranks
from tests.distributed.sockets import another_interface, listening

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT              # torch's agent takes them
SECONDS = 300.0                              # that ranks may take to be there


def launched(look, *without: str) -> bool:
    """Ranks of train/launch/launch_ranks.py, whose launcher is this process."""
    handlers, before = {sign: signal.getsignal(sign) for sign in SIGNALS}, listening([os.getpid()])
    with TemporaryDirectory() as folder, _elsewhere():
        looker = threading.Thread(target=_look_at_launched, args=(look, Path(folder), before))
        looker.start()
        try:
            return launch_ranks([folder, *without], 2, module=__name__) == 0
        finally:
            Path(folder, "ended").touch()
            looker.join()
            for sign, handler in handlers.items():
                signal.signal(sign, handler)


def _look_at_launched(look, folder, before):
    try:
        if _wait_for(lambda: len(list(folder.glob("pid*"))) == 2 or (folder / "ended").exists()):
            pids = [int(path.name[3:]) for path in folder.glob("pid*")]
            stores = [at[1] for at in listening([os.getpid()]) if at not in before]
            look(stores, [os.getpid(), *pids])
    finally:
        (folder / "go").touch()


def _launched_rank(folder, *without):
    with _without(without), rank_process_group("cpu"):
        _meet()
        (folder / f"pid{os.getpid()}").touch()
        if _wait_for((folder / "go").exists):
            _meet()


def pooled(look, *without: str) -> bool:
    """Ranks of a pool."""
    with mock.patch("nanoinfra.distributed.pool.rank_processes.rank_main",
                    functools.partial(_pooled_rank, without)):
        try:
            with RankPool(2) as pool:
                pool.run(_meet)
                look([pool._processes.store.port], [os.getpid(), *pool.run(os.getpid)])
                pool.run(_meet)
        except RankFailedError:
            return False
    return True


def _pooled_rank(without, *args):
    with _elsewhere(), _without(without):
        rank_main.rank_main(*args)


def teamed(look, *without: str, store=start_loopback_store) -> bool:
    """The ranks of an engine, whose rank 0 opens `store`."""
    context, (ours, theirs), (first, second) = multiprocessing.get_context("forkserver"), Pipe(), Pipe()
    context.set_forkserver_preload(_PRELOADED_MODULES)
    ranks = [context.Process(target=_team_rank, args=(0, [first], theirs, store, without)),
             context.Process(target=_team_rank, args=(1, [second], None, store, without))]
    for rank in ranks:
        rank.start()
    try:
        theirs.close()
        look([ours.recv()] if ours.poll(SECONDS) else [], [rank.pid for rank in ranks])
        ours.send("go")
        for rank in ranks:
            rank.join(SECONDS)
        return [rank.exitcode for rank in ranks] == [0, 0]
    except (EOFError, OSError):              # a rank has died
        return False
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
            rank.close()


class _Reports(TensorParallelGroup):
    """Remembers the last thing shared: the store's port."""
    def broadcast_object(self, value=None):
        self.port = super().broadcast_object(value)
        return self.port


def _team_rank(rank, pipes, report, store, without):
    die_with_parent()
    team = _Reports(rank, pipes)
    start = "nanoinfra.distributed.loopback_tcp_store.start_loopback_store"
    with _elsewhere(), _without(without), mock.patch(start, store):
        mesh = team.init_tp_mesh(tp_size=2)
        comm.barrier(mesh.tp)
        if report:
            report.send(team.port)
            report.recv()
        team.broadcast_object()
        comm.barrier(mesh.tp)


def torchs_store() -> dist.TCPStore:
    """As torch opens one when it is asked for no more: a mutant of `start_loopback_store`."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _meet():
    """New groups of all ranks, which read the store, and a word of each to all."""
    mesh = Mesh(dp=world_size())
    assert comm.all_gather_json(mesh.dp.rank, mesh.dp) == list(range(mesh.dp.size))


@contextmanager
def _without(names):
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(name.replace(":", "."), lambda *args: None))
        yield


def _elsewhere():
    return mock.patch.dict(os.environ, GLOO_SOCKET_IFNAME=another_interface())


def _wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


if __name__ == "__main__":
    _launched_rank(Path(sys.argv[1]), *sys.argv[2:])
