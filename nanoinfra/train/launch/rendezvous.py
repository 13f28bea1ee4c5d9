"""How the ranks of a run find each other, by the variables that their launcher gave them.

On one host all is on loopback (distributed/loopback.py), and our own launcher reads nothing that a rank or a
stranger wrote. Several hosts need a network that you trust: their store and their connections have no secret
and no cipher, and torchrun, which starts ranks there, listens on every interface and unpickles what it finds
at its c10d rendezvous: whoever reaches that port runs code of his own. Rank 0 says so on start.
"""
import os
import sys
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from nanoinfra.distributed.loopback import bind_to_loopback, client_store, is_loopback, master_store
from nanoinfra.train.launch.elastic_rank import launched_by_us, restarted
from nanoinfra.train.launch.preflight import by_environment

START = timedelta(seconds=300)               # that ranks may start one after the other
SOON = 20.0                                  # seconds in which they do unless one is missing


def meet() -> dict:
    """Wait until every rank is there: imports may take longer than a collective ever should.

    Returns what init_process_group takes: store, rank and world_size. A store that torchrun keeps from one
    attempt to the next still has the addresses of ranks that are dead.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if on_one_host():
        bind_to_loopback()
    if rank == 0 and not restarted() and (risk := exposure()):
        print(f"nanoinfra: {risk}", file=sys.stderr, flush=True)
    store = _store(rank)
    if _launcher_has_store():
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store = PrefixStore(f"attempt {attempt} of {world} ranks", store)
    store.set(f"rank {rank}", "is there")
    _wait_for_all(store, rank, world)
    return {"store": store, "rank": rank, "world_size": world}


def _wait_for_all(store, rank, world):
    """Until every rank is in `store`; who is started by hand, or by what is left in a shell, is told why."""
    everybody = [f"rank {r}" for r in range(world)]
    soon = time.monotonic() + SOON
    while not store.check(everybody) and time.monotonic() < soon:
        time.sleep(0.02)
    if not store.check(everybody) and not launched_by_us():
        print(f"nanoinfra: rank {rank} waits for the other ranks of {world}, {START.seconds} s at most; "
              f"{by_environment()}: unset them if no launcher has set them", file=sys.stderr, flush=True)
    try:
        store.wait(everybody, START)
    except RuntimeError as error:
        there = [r for r in range(world) if store.check([f"rank {r}"])]
        raise ValueError(f"of {world} ranks only {there} came within {START.seconds} s; "
                         f"{by_environment()}") from error


def on_one_host() -> bool:
    """Are all ranks on this host? They are if they meet on loopback, or if one launcher has all."""
    here, all_ranks = os.environ.get("LOCAL_WORLD_SIZE"), os.environ["WORLD_SIZE"]
    return is_loopback(os.environ["MASTER_ADDR"]) or here == all_ranks


def exposure() -> str:
    """What another host could do to this run, in one line; "" where none can reach it."""
    if not on_one_host():
        return ("ranks on several hosts trust their network: whoever reaches their ports can change this run "
                "and run code in torchrun; keep strangers off it, by a firewall or a network of its own")
    if launched_by_us() or (is_loopback(os.environ["MASTER_ADDR"]) and not _launcher_has_store()):
        return ""
    return ("torchrun listens on every interface and trusts whoever connects; on one host, nanoinfra starts "
            "the ranks itself, on loopback: nanoinfra train --dp 2, or make lab")


def _store(rank: int) -> Store:
    """The launcher's, or one that rank 0 has: on loopback where the ranks meet there."""
    port = int(os.environ["MASTER_PORT"])
    if _launcher_has_store() or not is_loopback(os.environ["MASTER_ADDR"]):
        return next(rendezvous("env://", timeout=START))[0]
    try:
        return master_store(port) if rank == 0 else client_store(port)
    except OSError as error:
        raise ValueError(f"MASTER_PORT {port}: {error.strerror}; {by_environment()}") from error
    except RuntimeError as error:
        raise ValueError(f"there is no rank 0 at port {port} of this host; {by_environment()}") from error


def _launcher_has_store():
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
