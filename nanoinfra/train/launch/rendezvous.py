"""The rendezvous: the ranks of a run find each other by the variables that their launcher gave them.

On one host all connections are on loopback (distributed/loopback_tcp_store.py), and our own launcher reads
nothing that a rank or another program wrote. Several hosts need a network that you trust: the store and the
connections have no secret and no encryption, and torchrun, which starts ranks there, listens on every
interface and unpickles what it finds at its c10d rendezvous: whoever reaches that port can run code. Rank 0
prints this.
"""
import os
import sys
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from nanoinfra.distributed.loopback_tcp_store import (
    bind_gloo_and_nccl_to_loopback,
    connect_to_loopback_store,
    is_loopback,
    start_loopback_store,
)
from nanoinfra.train.launch.check_before_start import describe_launcher_environment
from nanoinfra.train.launch.elastic_rank import launched_by_nanoinfra, ranks_were_restarted

_STARTUP_TIMEOUT = timedelta(seconds=300)    # that ranks have to start
_WARN_AFTER_SECONDS = 20.0                   # until a waiting rank prints that others are missing


def rendezvous_ranks() -> dict:
    """Wait until every rank has started: imports may take longer than the timeout of a collective.

    Returns the arguments of init_process_group: store, rank and world_size. torchrun keeps its store from one
    attempt to the next, so that each attempt uses a prefix of its own.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if all_ranks_on_one_host():
        bind_gloo_and_nccl_to_loopback()
    if rank == 0 and not ranks_were_restarted() and (risk := network_exposure_warning()):
        print(f"nanoinfra: {risk}", file=sys.stderr, flush=True)
    store = _store(rank)
    if _launcher_has_store():
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store = PrefixStore(f"attempt {attempt} of {world} ranks", store)
    store.set(f"rank {rank}", "is there")
    _wait_for_all(store, rank, world)
    return {"store": store, "rank": rank, "world_size": world}


def _wait_for_all(store, rank, world):
    """Wait until every rank is in `store`; after a while, print why this process waits at all."""
    everybody = [f"rank {r}" for r in range(world)]
    soon = time.monotonic() + _WARN_AFTER_SECONDS
    while not store.check(everybody) and time.monotonic() < soon:
        time.sleep(0.02)
    if not store.check(everybody) and not launched_by_nanoinfra():
        print(f"nanoinfra: rank {rank} waits for the other ranks of {world}, {_STARTUP_TIMEOUT.seconds} s at "
              "most; "
              f"{describe_launcher_environment()}: unset them if no launcher has set them", file=sys.stderr,
              flush=True)
    try:
        store.wait(everybody, _STARTUP_TIMEOUT)
    except RuntimeError as error:
        there = [r for r in range(world) if store.check([f"rank {r}"])]
        raise ValueError(f"of {world} ranks only {there} came within {_STARTUP_TIMEOUT.seconds} s; "
                         f"{describe_launcher_environment()}") from error


def all_ranks_on_one_host() -> bool:
    """Whether all ranks are on this host: they meet on loopback, or one launcher has started all of them."""
    here, all_ranks = os.environ.get("LOCAL_WORLD_SIZE"), os.environ["WORLD_SIZE"]
    return is_loopback(os.environ["MASTER_ADDR"]) or here == all_ranks


def network_exposure_warning() -> str:
    """A one-line warning on what other hosts could do to this run; "" when none can reach it."""
    if not all_ranks_on_one_host():
        return ("ranks on several hosts trust their network: whoever reaches their ports can change this run "
                "and run code in torchrun; keep strangers off it, by a firewall or a network of its own")
    if launched_by_nanoinfra() or (is_loopback(os.environ["MASTER_ADDR"]) and not _launcher_has_store()):
        return ""
    return ("torchrun listens on every interface and trusts whoever connects; on one host, nanoinfra starts "
            "the ranks itself, on loopback: nanoinfra train --dp 2, or make lab")


def _store(rank: int) -> Store:
    """The launcher's store, or one that rank 0 starts, on loopback if the ranks meet there."""
    port = int(os.environ["MASTER_PORT"])
    if _launcher_has_store() or not is_loopback(os.environ["MASTER_ADDR"]):
        return next(rendezvous("env://", timeout=_STARTUP_TIMEOUT))[0]
    try:
        return start_loopback_store(port) if rank == 0 else connect_to_loopback_store(port)
    except OSError as error:
        raise ValueError(f"MASTER_PORT {port}: {error.strerror}; "
                         f"{describe_launcher_environment()}") from error
    except RuntimeError as error:
        raise ValueError(f"there is no rank 0 at port {port} of this host; "
                         f"{describe_launcher_environment()}") from error


def _launcher_has_store():
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
