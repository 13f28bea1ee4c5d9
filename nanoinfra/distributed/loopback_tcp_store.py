"""Rendezvous on the loopback interface: ranks of one host meet where no other host can reach them.

A TCPStore has no authentication, and by default it listens on every interface; so it is given a listening
socket on loopback. gloo and NCCL are told to use loopback too; by default they follow the host's name.
Users of this host can still connect and disturb the ranks, but nothing that comes from a store or a rank is
unpickled (train/launch/rendezvous.py says what holds on several hosts).
"""
import ipaddress
import os
import socket
import sys
from datetime import timedelta

import torch.distributed as dist

LOOPBACK_HOST = "127.0.0.1"
_STORE_TIMEOUT = timedelta(seconds=300)      # for the store to start listening, and for a key to be set


def start_loopback_store(port: int = 0) -> dist.TCPStore:
    """Start a TCPStore server that listens on loopback only; with `port` 0 on a free port, see its `.port`.

    Raises OSError where the port is taken.
    """
    listener = socket.create_server((LOOPBACK_HOST, port))
    store = dist.TCPStore(LOOPBACK_HOST, listener.getsockname()[1], is_master=True, wait_for_workers=False,
                          timeout=_STORE_TIMEOUT, master_listen_fd=listener.fileno())
    listener.detach()                        # the store owns it now, and closes it
    return store


def connect_to_loopback_store(port: int) -> dist.TCPStore:
    """A client of the TCPStore that `start_loopback_store` started at `port`."""
    return dist.TCPStore(LOOPBACK_HOST, port, is_master=False, timeout=_STORE_TIMEOUT)


def bind_gloo_and_nccl_to_loopback() -> None:
    """Make gloo and NCCL use the loopback interface only. Call it before a process group is made."""
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def is_loopback(host: str) -> bool:
    """Whether this name or address means loopback. No name is looked up: of names, only "localhost" does."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
