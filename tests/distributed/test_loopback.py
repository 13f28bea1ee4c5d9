"""On one host nothing listens beyond loopback, and nothing a stranger writes into a store is unpickled."""
import os
import pickle
import socket
from unittest import mock

import pytest

from nanoinfra.distributed.loopback_tcp_store import (
    bind_gloo_and_nccl_to_loopback,
    connect_to_loopback_store,
    is_loopback,
    start_loopback_store,
)
from tests.distributed.at_rest import pooled, teamed
from tests.distributed.sockets import (
    Payload,
    beyond_loopback,
    listening,
    needs_linux,
    open_to_others,
    plant,
)
from tests.distributed.stranger import visit


def at(port):
    """Where this process listens at `port`."""
    return [address for address, each in listening([os.getpid()]) if each == port]


@needs_linux
def test_a_store_listens_on_loopback_alone_until_it_is_gone():
    store = start_loopback_store()
    port, client = store.port, connect_to_loopback_store(store.port)
    assert at(port) == ["127.0.0.1"]
    client.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(OSError, match="in use"):
        start_loopback_store(port)
    del client, store
    assert at(port) == []


def test_loopback_has_these_names():
    for name in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        assert is_loopback(name)
    for name in ("", "0.0.0.0", "::", "10.0.0.1", "fe80::1", "node1", "localhost.example.org"):
        assert not is_loopback(name)


def test_whatever_the_user_said_both_backends_take_loopback():
    with mock.patch.dict(os.environ, GLOO_SOCKET_IFNAME="eth0", NCCL_SOCKET_IFNAME="eth0"):
        bind_gloo_and_nccl_to_loopback()
        assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"]
        assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")


@needs_linux
def test_the_look_at_sockets_finds_what_is_open(tmp_path):
    """As well in children, of UDP, and Unix sockets without or with a file."""
    me, found = [os.getpid()], lambda: {address for address, _ in beyond_loopback([os.getpid()])}
    before = found(), open_to_others(me)
    with socket.create_server(("0.0.0.0", 0)), socket.socket(type=socket.SOCK_DGRAM) as udp, \
            socket.create_server(("::", 0), family=socket.AF_INET6), socket.socket(socket.AF_UNIX) as named, \
            socket.socket(socket.AF_UNIX) as abstract:
        udp.bind(("0.0.0.0", 0))
        for each, name in ((named, str(tmp_path / "name")), (abstract, f"\0{tmp_path}")):
            each.bind(name)
            each.listen()
        tmp_path.chmod(0o755)
        (tmp_path / "name").chmod(0o777)
        assert found() >= {"0.0.0.0", "::"}
        assert len(open_to_others(me)) == len(before[1]) + 2
        tmp_path.chmod(0o700)
        assert len(open_to_others(me)) == len(before[1]) + 1
    assert (found(), open_to_others(me)) == before


@needs_linux
def test_the_stranger_would_be_noticed(tmp_path):
    store, ran = start_loopback_store(), tmp_path / "ran"
    assert plant(store.port, ran, ["key"]) == ["key"] and not ran.exists()
    pickle.loads(store.get("key"))
    assert ran.exists() and isinstance(pickle.dumps(Payload(ran)), bytes)


@needs_linux
@pytest.mark.parametrize("ranks_at_rest", [pooled, teamed])
def test_ranks_listen_on_loopback_and_load_no_planted_pickle(ranks_at_rest):
    seen = visit(ranks_at_rest)
    assert len(seen.listens) >= 3 and seen.planted > 8       # the store, two of gloo's; and what was in it
    assert (seen.beyond, seen.open_to_others, seen.ran, seen.ended_well) == ([], [], False, True)
