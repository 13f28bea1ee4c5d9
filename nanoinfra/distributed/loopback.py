"""Ranks of one host meet on its loopback interface, where no other host can reach them.

A TCPStore asks nobody for a secret, and torch's listens on every interface; it takes a listening socket of
ours instead. gloo and NCCL listen on whatever interface the host's name or their search gives, unless told.
What remains open is open to this host's own users: who connects can disturb ranks, but nothing that comes
from a store or a rank is unpickled (train/launch/rendezvous.py says what holds on several hosts).
"""
import ipaddress
import os
import socket
import sys
from datetime import timedelta

import torch.distributed as dist

HOST = "127.0.0.1"
PATIENCE = timedelta(seconds=300)            # that the store may take to appear, and a key in it


def master_store(port: int = 0) -> dist.TCPStore:
    """A TCPStore of this process that listens on loopback alone; `port` 0 takes a free one, `.port` says it.

    Raises OSError where the port is taken.
    """
    listener = socket.create_server((HOST, port))
    store = dist.TCPStore(HOST, listener.getsockname()[1], is_master=True, wait_for_workers=False,
                          timeout=PATIENCE, master_listen_fd=listener.fileno())
    listener.detach()                        # it is the store's now, which closes it
    return store


def client_store(port: int) -> dist.TCPStore:
    """A client of the `master_store` at `port`."""
    return dist.TCPStore(HOST, port, is_master=False, timeout=PATIENCE)


def bind_to_loopback() -> None:
    """Tell gloo and NCCL, before a process group is made, to listen on loopback alone."""
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def is_loopback(host: str) -> bool:
    """Is this name or address one of loopback? A name is not looked up: "localhost" alone is."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
