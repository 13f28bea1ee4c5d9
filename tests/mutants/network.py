"""Known-wrong networks: torch's store and rendezvous as they come, gloo left to itself, a risk not said.

Ranks of a launcher, a pool and an engine are started and visited by a stranger
(tests/distributed/stranger.py); a mutant of the library is patched in, here or in the ranks.
"""
import functools
import os
from unittest import mock

from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from nanoinfra.lab.check import Check, CriterionBlocked, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.train.launch import rendezvous
from tests.distributed.at_rest import launched, pooled, teamed, torchs_store
from tests.distributed.stranger import visit

MEET, SAFE, LOOPBACK = ("they meet", "a planted pickle is not loaded", "nothing listens beyond loopback")


def visits(name):
    """A check of one visit to the ranks that the subject starts."""
    check = Check(name)
    seen = functools.lru_cache(1)(visit)     # one visit for all three criteria

    @check.criterion(SAFE, "property")
    def _(subject):
        if not os.path.exists("/proc/self/net/tcp"):
            raise CriterionBlocked("finds sockets through Linux's /proc")
        if seen(subject).ran:
            raise CriterionNotMet("a pickle that a stranger wrote into a store was loaded, and his code ran")

    @check.criterion(LOOPBACK, "property")
    def _(subject):
        found = seen(subject)
        if found.beyond or not found.listens:          # nobody: gloo was told an interface that is not here
            raise CriterionNotMet(f"other hosts reach {found.beyond} of {found.listens}: torch's own store, "
                                  "or gloo left to itself?")

    @check.criterion(MEET, "parity")
    def _(subject):
        if not (found := seen(subject)).ended_well or not found.planted:
            raise CriterionNotMet("the ranks did not meet, or have no store")
    return check


def c10d(run_id):
    """The rendezvous that torchrun takes."""
    return get_rendezvous_handler(RendezvousParameters("c10d", "localhost:0", run_id, 1, 1))


def leaves_gloo_alone(ranks_at_rest, home):
    """The ranks without `bind_gloo_and_nccl_to_loopback`, where the environment names another interface."""
    def variant(look):
        return ranks_at_rest(look, f"{home}:bind_gloo_and_nccl_to_loopback")
    return variant


warning = Check("what is said of a network")
SEVERAL = {"MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "7",
           "TORCHELASTIC_USE_AGENT_STORE": "True"}
ONE = SEVERAL | {"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "2"}
OURS = ONE | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "nanoinfra-7"}


@warning.criterion("several hosts are told that they trust their network", "property")
def _(subject):
    if not said(subject, SEVERAL).startswith("ranks on several hosts trust"):
        raise CriterionNotMet(f"{said(subject, SEVERAL)!r} on two hosts")


@warning.criterion("torchrun on one host is said to listen on every interface", "property")
def _(subject):
    if not said(subject, ONE).startswith("torchrun listens on every interface"):
        raise CriterionNotMet(f"{said(subject, ONE)!r} under torchrun")


@warning.criterion("nothing is said where all is on loopback", "property")
def _(subject):
    if text := said(subject, OURS):
        raise CriterionNotMet(f"{text!r} under nanoinfra's own launcher")


def said(subject, told):
    with mock.patch.dict(os.environ, told, clear=True):
        return subject()


def exposure():
    return rendezvous.network_exposure_warning()


HOSTS, TORCHRUN, QUIET = (c.name for c in warning.criteria)
of_launcher, of_pool, of_engine = map(visits, ("launched ranks", "ranks of a pool", "an engine's ranks"))
MODULE = "nanoinfra.train.launch.rendezvous"
MUTANTS = [
    Mutant("the c10d rendezvous", of_launcher,
           patched(launched, "nanoinfra.train.launch.launch_ranks:LoopbackRendezvous", c10d), SAFE),
    Mutant("torch's own store", of_launcher,
           patched(launched, "nanoinfra.train.launch.launch_ranks:start_loopback_store",
                   torchs_store), LOOPBACK),
    Mutant("gloo left to itself", of_launcher, leaves_gloo_alone(launched, MODULE), LOOPBACK),
    Mutant("torch's own store", of_pool,
           patched(pooled, "nanoinfra.distributed.pool.rank_processes:start_loopback_store", torchs_store),
           LOOPBACK),
    Mutant("gloo left to itself", of_pool, leaves_gloo_alone(pooled, "nanoinfra.distributed.pool.rank_main"),
           LOOPBACK),
    Mutant("torch's own store", of_engine, lambda look: teamed(look, store=torchs_store), LOOPBACK),
    Mutant("gloo left to itself", of_engine, leaves_gloo_alone(teamed,
                                                               "nanoinfra.distributed.loopback_tcp_store"),
           LOOPBACK),
    Mutant("two hosts taken for one", warning,
           patched(exposure, f"{MODULE}:all_ranks_on_one_host", lambda: True), HOSTS),
    Mutant("every launcher taken for ours", warning,
           patched(exposure, f"{MODULE}:launched_by_nanoinfra", lambda: True), TORCHRUN),
    Mutant("our launcher taken for torchrun", warning,
           patched(exposure, f"{MODULE}:launched_by_nanoinfra", lambda: False), QUIET),
]
