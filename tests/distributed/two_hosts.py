"""Two hosts on one machine: two network namespaces, and a cable of a given rate between them.

Needs Linux, `ip` and `tc` (iproute2), and the right to make namespaces, as root has. The rate is a token
bucket's (tbf) at each end; the latency stays the machine's. Names are unique, so rehearsals may run side by
side. Commands run with `start`; whatever they leave running ends with the hosts.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

RATE = 25e6                                  # bytes/s one way: 200 Mbit/s
PLACES = 0, 1


class NoRights(Exception):
    """This machine, or this user, cannot make network namespaces; the text says why."""


class TwoHosts:
    """`hosts.start(0, command)`, `hosts.kill(1)`, `hosts.unplug()`; a context manager, raises NoRights."""

    def __init__(self, rate: float = RATE):
        tag = uuid.uuid4().hex[:8]
        self.rate, self.names = rate, tuple(f"nano-{tag}-{place}" for place in PLACES)
        self.cables = tuple(f"nano{tag}{place}" for place in PLACES)
        self.addresses = "10.73.0.1", "10.73.0.2"
        self.started: list[subprocess.Popen] = []

    def __enter__(self):
        if sys.platform != "linux" or not (shutil.which("ip") and shutil.which("tc")):
            raise NoRights("needs Linux with ip and tc: install iproute2")
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self._remove()
            raise NoRights(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_):
        self._remove()

    def start(self, place: int, command: list, **more) -> subprocess.Popen:
        """Run `command` on a host; gloo there takes the cable. `more` is for Popen.

        torchrun keeps one store for the ranks of all rounds, whose address a host that joins later never
        learns (torch 2.13); the variable gives each round a store of its own.
        """
        own = {"GLOO_SOCKET_IFNAME": self.cables[place], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        process = subprocess.Popen(["ip", "netns", "exec", self.names[place], *map(str, command)],
                                   env={**os.environ, **own}, **more)
        self.started.append(process)
        return process

    def torchrun(self, place: int, nodes: str, argv: list, **more) -> subprocess.Popen:
        """One torchrun of `nanoinfra ARGV` with a rank; host 0 holds the rendezvous, so it must survive."""
        flags = {"nnodes": nodes, "nproc-per-node": 1, "max-restarts": 3, "monitor-interval": 0.1,
                 "rdzv-backend": "c10d", "rdzv-endpoint": f"{self.addresses[0]}:29400",
                 "rdzv-id": "rehearsal", "local-addr": self.addresses[place],
                 "rdzv-conf": f"is_host={place == 0},last_call_timeout=2,keep_alive_interval=1"}
        torchrun = Path(sys.executable).parent / "torchrun"
        return self.start(place, [torchrun, *(f"--{name}={value}" for name, value in flags.items()),
                                  "-m", "nanoinfra.cli", *argv], **more)

    def processes(self, place: int) -> list[int]:
        """All that run on a host: it was made for them, so each was started here."""
        return [int(pid) for pid in _do("ip", "netns", "pids", self.names[place]).split()]

    def kill(self, place: int) -> None:
        """End everything on a host at once; its kernel lives and says so to the other."""
        for pid in self.processes(place):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def unplug(self) -> None:
        """Pull the cable: no word from either host reaches the other."""
        _do("ip", "-n", self.names[1], "link", "set", self.cables[1], "down")

    def plug(self) -> None:
        """Put the cable back."""
        _do("ip", "-n", self.names[1], "link", "set", self.cables[1], "up")

    def _make(self):
        for name in self.names:
            _do("ip", "netns", "add", name)
        _do("ip", "link", "add", self.cables[0], "netns", self.names[0], "type", "veth",
            "peer", "name", self.cables[1], "netns", self.names[1])
        for name, cable, address in zip(self.names, self.cables, self.addresses):
            _do("ip", "-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _do("ip", "-n", name, "link", "set", cable, "up")
            _do("ip", "-n", name, "link", "set", "lo", "up")
            _do("tc", "-n", name, "qdisc", "add", "dev", cable, "root", "tbf",
                "rate", f"{8 * self.rate:.0f}bit", "burst", "128kb", "latency", "200ms")

    def _remove(self):
        """Processes, namespaces, cable: all that was made, also where not everything was."""
        there = [place for place in PLACES if Path("/run/netns", self.names[place]).exists()]
        while any(self.processes(place) for place in there):
            for place in there:
                self.kill(place)
            time.sleep(0.02)
        for process in self.started:
            process.wait()
        for place in there:
            _do("ip", "netns", "delete", self.names[place])        # the cable's ends go with them


def _do(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
