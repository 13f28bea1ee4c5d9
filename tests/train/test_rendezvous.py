"""How ranks meet: on loopback where one host has them all; on several, rank 0 says what they trust."""
import os
import shutil
import signal
import socket
import subprocess
import time
from unittest import mock

import pytest
from torch.distributed import HashStore, PrefixStore
from torch.distributed.elastic.events import EventSource

from nanoinfra.train.launch import rendezvous
from nanoinfra.train.launch.launch_ranks import ElasticRankAgent
from tests.distributed.sockets import (
    another_interface,
    beyond_loopback,
    family,
    listening,
    needs_linux,
    plant,
)
from tests.distributed.stranger import KNOWN
from tests.train.runs import CLI, FLAGS, children, lines, start, wait_for

OURS = {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "nanoinfra-1",
        "TORCHELASTIC_USE_AGENT_STORE": "True"}
TORCHRUN = {**OURS, "MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "none"}
BY_HAND = {"MASTER_ADDR": "127.0.0.1"}
SEVERAL = "ranks on several hosts trust their network"
ONE = "torchrun listens on every interface"


@pytest.mark.parametrize("told, one_host, says", [
    (OURS, True, ""), (BY_HAND, True, ""), (TORCHRUN, True, ONE),
    (TORCHRUN | {"MASTER_ADDR": "node1"}, True, ONE),
    ({"MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "2"}, True, ONE),
    (TORCHRUN | {"MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "1"}, False, SEVERAL),
    ({"MASTER_ADDR": "10.0.0.1"}, False, SEVERAL)])
def test_what_is_said_of_the_network(told, one_host, says):
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", **told}, clear=True):
        assert rendezvous.all_ranks_on_one_host() == one_host
        got = rendezvous.network_exposure_warning()
    assert got.startswith(says) and bool(got) == bool(says) and "\n" not in got


@needs_linux
def test_a_rank_started_by_hand_has_its_store_on_loopback(capsys):
    port = free_port()
    told = {**BY_HAND, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    with mock.patch.dict(os.environ, told):
        met = rendezvous.rendezvous_ranks()
    assert [at for at in listening([os.getpid()]) if at[1] == port] == [("127.0.0.1", port)]
    assert (met["rank"], met["world_size"], met["store"].get("rank 0")) == (0, 1, b"is there")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank, attempt, lines", [("0", "0", 1), ("1", "0", 0), ("0", "1", 0)])
def test_on_several_hosts_the_users_interface_stays_and_rank_0_says_once_what_they_trust(
        capsys, monkeypatch, rank, attempt, lines):
    store = HashStore()
    for r in range(2):
        PrefixStore(f"attempt {attempt} of 2 ranks", store).set(f"rank {r}", "is there")
    monkeypatch.setattr(rendezvous, "_store", lambda rank: store)
    told = {**TORCHRUN, "MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2", "RANK": rank,
            "GLOO_SOCKET_IFNAME": "ib0", "TORCHELASTIC_RESTART_COUNT": attempt}
    with mock.patch.dict(os.environ, told):
        rendezvous.rendezvous_ranks()
        assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0" and "NCCL_SOCKET_IFNAME" not in os.environ
    assert capsys.readouterr().err.count(f"nanoinfra: {SEVERAL}") == lines


@needs_linux
def test_a_run_of_two_ranks_is_on_loopback_loads_no_planted_pickle_and_saves_when_asked(tmp_path):
    """Started by nohup, which ignores SIGHUP."""
    run, ran = tmp_path / "run", tmp_path / "ran"
    argv = [*FLAGS, "--steps", "100000", "--save-every", "0", "--dp", "2", "--max-restarts", "1",
            "--out", str(run)]
    process = start(argv, env={**os.environ, "GLOO_SOCKET_IFNAME": another_interface()},
                    preexec_fn=ignore_hangups)
    try:
        wait_for(lambda: lines(run) >= 1, process)
        ranks = children(process.pid)
        assert len(ranks) == 2 and all(listening([rank]) for rank in ranks)
        assert beyond_loopback(family(process.pid)) == []
        stores = [port for _, port in listening([process.pid])]
        assert sum(len(plant(port, ran, KNOWN)) for port in stores) > len(KNOWN)
        for pid in (process.pid, *ranks):
            os.kill(pid, signal.SIGHUP)      # its terminal is closed
        before = lines(run)
        wait_for(lambda: lines(run) >= before + 3, process)
        for _ in range(2):                   # as `timeout` sends it
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=600)
        asked, stopped = said.splitlines()
        assert process.returncode == 0 and "nanoinfra: SIGTERM: the run stops after this step" in asked
        assert stopped == (f"nanoinfra: stopped after step {lines(run)}; saved in {run}/checkpoints/"
                           f"step_{lines(run):08d}; go on with: nanoinfra {' '.join(argv)} --resume")
    finally:
        process.kill()
        process.wait()
    assert not ran.exists()


def ignore_hangups():
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_the_launcher_looks_up_no_name_for_what_nobody_reads(monkeypatch):
    """torch's agent records an event for each rank, with the host's full name: a minute where it has none."""
    for lookup in ("getfqdn", "gethostbyaddr", "gethostbyname", "getaddrinfo"):
        monkeypatch.setattr(socket, lookup, mock.Mock(side_effect=AssertionError(lookup)))
    event = ElasticRankAgent._construct_event(mock.Mock(), "SUCCEEDED", EventSource.AGENT)
    assert event.source == EventSource.AGENT and event.name.endswith("SUCCEEDED")


@pytest.mark.prove
@needs_linux
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"),
                    reason="a host name of its own needs root and util-linux's unshare")
def test_a_host_name_that_nobody_knows_is_no_hindrance(tmp_path):
    """Where it does not resolve, two ranks take as long as elsewhere; once they took 75 s longer."""
    took = {}
    for name in ("localhost", "nowhere.invalid"):
        argv = ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "-", *CLI, *FLAGS, "--dp", "2",
                "--steps", "2", "--out", str(tmp_path / name)]
        begin = time.monotonic()
        subprocess.run(argv, check=True, timeout=540)
        took[name] = time.monotonic() - begin
    assert took["nowhere.invalid"] < 2 * took["localhost"] + 10
