"""Who listens where, read from Linux's /proc, and a stranger who writes pickles into a store.

A pickle is a program: whoever loads `Payload` touches a file, and so says that a stranger's code ran.
"""
import base64
import ipaddress
import os
import pickle
import stat
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds listening sockets through /proc")
LISTENS, UNCONNECTED = "0A", "07"            # states in /proc/net/tcp, and in udp
ACCEPTS = 0x10000                            # a flag in /proc/net/unix


def family(pid: int) -> list[int]:
    """The process, its children, theirs, and so on."""
    found, new = [], [pid]
    while new:
        found += new
        new = [int(child) for each in new for child in _children(each)]
    return found


def listening(pids: list[int]) -> list[tuple[str, int]]:
    """(address, port) of each TCP socket on which one of `pids` listens, and of its UDP sockets."""
    owned, found = set().union(*map(_sockets, pids)), []
    for protocol, state in (("tcp", LISTENS), ("tcp6", LISTENS), ("udp", UNCONNECTED), ("udp6", UNCONNECTED)):
        for line in Path(f"/proc/{pids[0]}/net/{protocol}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in owned:
                address, port = fields[1].split(":")
                found.append((_address(address), int(port, 16)))
    return found


def beyond_loopback(pids: list[int]) -> list[tuple[str, int]]:
    """Those of `listening` that another host can reach."""
    return [at for at in listening(pids) if not ipaddress.ip_address(at[0]).is_loopback]


def open_to_others(pids: list[int]) -> list[str]:
    """Names of Unix sockets on which one of `pids` listens and to which another user could connect."""
    owned, names = set().union(*map(_sockets, pids)), []
    for line in Path(f"/proc/{pids[0]}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & ACCEPTS and fields[6] in owned:
            names += fields[7:8]
    return [name for name in names if name.startswith("@") or not _private(Path(name))]


def stranger(port: int) -> dist.TCPStore:
    """A client of the store at `port`, as anybody on this host can make one."""
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))


class Payload:
    """Pickled, it touches the file at `path` when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(port: int, ran: Path, known=()) -> list[str]:
    """Put a pickle that makes the file `ran` under each key of the store, and each `known` one; the keys."""
    store, text = stranger(port), pickle.dumps(Payload(ran))
    keys = sorted({*store.list_keys(), *known})
    for key in keys:
        rendezvous = "torch.rendezvous." in key        # torch's c10d one keeps its state in base64
        store.set(key, base64.b64encode(text) if rendezvous else text)
    return keys


def another_interface() -> str:
    """One that is not loopback and has a route, where the machine has one; else a name that none has."""
    routes = Path("/proc/net/route").read_text().splitlines()[1:]
    return next((line.split()[0] for line in routes), "nowhere0")


def _children(pid):
    try:
        return [child for task in Path(f"/proc/{pid}/task").iterdir()
                for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):    # it has ended meanwhile
        return []


def _sockets(pid):
    """Inodes of a process's sockets, as text."""
    found = set()
    with suppress(FileNotFoundError, ProcessLookupError):              # it has ended meanwhile
        for file in Path(f"/proc/{pid}/fd").iterdir():
            found.add(os.readlink(file))
    return {name[8:-1] for name in found if name.startswith("socket:[")}


def _address(text):
    """/proc writes each 4 bytes as a number of this machine."""
    raw = bytes.fromhex(text)
    if sys.byteorder == "little":
        raw = b"".join(raw[i:i + 4][::-1] for i in range(0, len(raw), 4))
    found = ipaddress.ip_address(raw)
    return str(getattr(found, "ipv4_mapped", None) or found)


def _private(path):
    """May nobody else write to this socket, or reach it through its folder?"""
    if not path.exists():
        return True                          # unlinked: nobody finds it
    return any(not stat.S_IMODE(each.stat().st_mode) & 0o077 for each in (path, path.parent))
