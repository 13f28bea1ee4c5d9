"""The ranks of one engine on this machine. What rank 0 hears all of them hear, in the same order.

Commands go through pipes, not collectives: a collective has to end in time, and an idle server waits for
ever. So a late collective always means a rank that died or hangs, and the engine is started again.
"""
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

        from nanoinfra.distributed.loopback import bind_to_loopback, client_store, master_store
        from nanoinfra.distributed.mesh import Mesh
        if tp > 1:
            bind_to_loopback()
            store = master_store() if self.rank == 0 else None
            port = self.share(store and store.port)
            store = store or client_store(port)
            dist.init_process_group("gloo", timeout=PATIENCE, store=store, rank=self.rank, world_size=tp)
        return Mesh(tp=tp)
