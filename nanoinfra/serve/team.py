"""The ranks of one engine on this machine. What rank 0 hears all of them hear, in the same order.

Commands go through pipes, not collectives: a collective has to end in time, and an idle server waits for
ever. So a late collective always means a rank that died or hangs, and the engine is started again.
"""
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection

PATIENCE = timedelta(seconds=120)            # that a collective may take


class Team:
    """Rank `rank` and its pipes: rank 0 has one to each other rank, in their order; these have one to it."""

    def __init__(self, rank: int = 0, pipes: Sequence[Connection] = ()):
        self.rank, self.pipes = rank, pipes

    def share(self, value=None):
        """Rank 0's `value`, on every rank. Raises EOFError or OSError where one has died."""
        if self.rank:
            return self.pipes[0].recv()
        for pipe in self.pipes:
            pipe.send(value)
        return value

    def mesh(self, tp: int):
        """A Mesh of `tp` ranks, all of this team's. Every rank calls it."""
        import torch.distributed as dist

        from nanoinfra.dist.mesh import Mesh
        if tp > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
            store = None
            if self.rank == 0:
                store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port = self.share(store and store.port)
            store = store or dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", timeout=PATIENCE, store=store, rank=self.rank, world_size=tp)
        return Mesh(tp=tp)
