"""The tensor-parallel group of one engine on this machine: its ranks, and pipes from rank 0 to the others.

Commands go through pipes, not through collectives: a collective has a timeout, and an idle server waits for
ever. So a late collective always means a rank that died or hangs, and the engine is started again.
"""
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection

_COLLECTIVE_TIMEOUT = timedelta(seconds=120)


class TensorParallelGroup:
    """Rank `rank` and its pipes: rank 0 has one to each other rank, in their order; these have one to it."""

    def __init__(self, rank: int = 0, pipes: Sequence[Connection] = ()):
        self.rank, self.pipes = rank, pipes

    def broadcast_object(self, value=None):
        """Rank 0's `value`, on every rank. Raises EOFError or OSError where one has died."""
        if self.rank:
            return self.pipes[0].recv()
        for pipe in self.pipes:
            pipe.send(value)
        return value

    def init_tp_mesh(self, tp_size: int):
        """A Mesh of `tp_size` ranks, all of this group's. Every rank calls it."""
        import torch.distributed as dist

        from nanoinfra.distributed.loopback_tcp_store import (
            bind_gloo_and_nccl_to_loopback,
            connect_to_loopback_store,
            start_loopback_store,
        )
        from nanoinfra.distributed.mesh import Mesh
        if tp_size > 1:
            bind_gloo_and_nccl_to_loopback()
            store = start_loopback_store() if self.rank == 0 else None
            port = self.broadcast_object(store and store.port)
            store = store or connect_to_loopback_store(port)
            dist.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT, store=store, rank=self.rank,
                                    world_size=tp_size)
        return Mesh(tp=tp_size)
