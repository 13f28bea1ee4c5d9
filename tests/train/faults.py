"""What can happen to a run, and a run under which it happens: killed and stopped ranks, a full disk, broken
checkpoints. Needs Linux: a run's ranks are found through /proc.
"""
import getpass
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from nanoinfra.train.checkpoint import save_and_load
from tests.processes import alive, started, until
from tests.train.runs import FLAGS, children, running

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds a run's ranks through /proc")
CONSTANT = ["--lr-schedule", "constant"]
CACHES = {"torchinductor_" + getpass.getuser()}                # torch's own, empty


class Survivor:
    """A run, restarts allowed, in a world of its own for temporary files. `with` ends whatever is left."""

    def __init__(self, folder: Path, steps: int, restarts: int, mesh=("--dp", "2"), timeout: float = 10):
        self.run, self.tmp, self.said, self.attempts = folder / "run", folder / "tmp", folder / "said", 0
        self.tmp.mkdir(parents=True)
        argv = [*FLAGS, *CONSTANT, *mesh, "--steps", str(steps), "--timeout", str(timeout),
                "--out", str(self.run)]
        with ExitStack() as stack, open(self.said, "w") as said:
            run = self.start(argv, restarts, stdout=said, stderr=subprocess.STDOUT,
                             env={**os.environ, "TMPDIR": str(self.tmp)})
            self.process, self.end = stack.enter_context(run), stack.pop_all().close

    def start(self, argv, restarts, **more):
        return running([*argv, "--max-restarts", str(restarts)], **more)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def went_on_after(self) -> list[int]:
        """Of each attempt so far the step it went on after."""
        opened = [line for line in self.said.read_text().splitlines() if line.startswith("test: ")]
        return [int("0" + line.partition("going on after step ")[2]) for line in opened]

    def next_attempt(self, steps: int) -> int:
        """Wait until one more attempt has made `steps` steps; the step it went on after."""
        self.attempts += 1
        until(lambda: len(self.went_on_after()) >= self.attempts, self)
        assert len(self.went_on_after()) == self.attempts, f"one more died:\n{self.said.read_text()}"
        before = self.went_on_after()[-1]
        until(lambda: self.last_step() >= before + steps, self)
        return before

    def last_step(self) -> int:
        """The last whole line of its metrics."""
        with open(self.run / "metrics.jsonl", "rb") as f:
            f.seek(max(0, os.stat(f.fileno()).st_size - 4000))
            whole = f.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        return json.loads(whole)["step"] if whole.startswith(b"{") else 0

    def ranks(self) -> list[int]:
        """The processes of its ranks."""
        return children(self.process.pid)

    def saved(self) -> int:
        """The step of its newest good checkpoint."""
        good = save_and_load.find_newest_checkpoint(self.run / "checkpoints", warn=lambda refused: None)
        return save_and_load.read_checkpoint_state(good)["step"] if good else 0

    def poll(self):
        return self.process.poll()

    def communicate(self):
        return None, self.said.read_text()


class TorchrunSurvivor(Survivor):
    """The same command line under torchrun."""

    def start(self, argv, restarts, **more):
        torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "2",
                    "--monitor-interval", "0.1", "--max-restarts", str(restarts)]
        return started([*torchrun, "-m", "nanoinfra.cli", *argv], **more)


def kill(survivor, draw):
    """kill -9 of a rank."""
    os.kill(draw.choice(survivor.ranks()), signal.SIGKILL)


def stop(survivor, draw):
    """A rank hangs: no signal but SIGKILL reaches it, its connections stay open."""
    os.kill(draw.choice(survivor.ranks()), signal.SIGSTOP)


def corrupt(survivor, draw):
    """A byte of the newest checkpoint is another, a file of it is short or gone; then a rank is killed."""
    pids = survivor.ranks()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)                                       # no save may come between
    finished = save_and_load.list_checkpoints(survivor.run / "checkpoints")
    if len(finished) > 1:
        damage(draw.choice(sorted(finished[-1].iterdir())), draw)
    os.kill(draw.choice(pids), signal.SIGKILL)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def damage(path: Path, draw: random.Random) -> None:
    """Change one bit of the file, or cut it, or remove it."""
    whole, how = path.read_bytes(), draw.choice(["flip", "cut", "remove"])
    at = draw.randrange(len(whole))
    path.unlink()
    if how == "flip":
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    elif how == "cut":
        path.write_bytes(whole[:at])


def fill_disk(survivor, draw):
    """From now on a rank can write no file past 2,000 bytes: its next save fails, or its next metrics."""
    resource.prlimit(draw.choice(survivor.ranks()), resource.RLIMIT_FSIZE, (2000, 2000))


FAULTS = kill, stop, corrupt, fill_disk


def disturb(survivor: Survivor, faults, draw: random.Random) -> None:
    """Inject each of `faults` in its turn; no attempt may go on from before the last good checkpoint."""
    must = 0
    for i, fault in enumerate(faults):
        before = survivor.next_attempt(draw.randint(1, 6))
        assert before >= must, f"fault {i}: attempt went on after step {before}, {must} was saved"
        time.sleep(0.1 * draw.random())                                    # anywhere in a step or a save
        ranks = survivor.ranks()
        fault(survivor, draw)
        until(lambda old=ranks: not any(map(alive, old)), survivor)
        must = survivor.saved()                                            # while the next import torch
    survivor.next_attempt(1)


def leaves_nothing(survivor: Survivor, shared: set[str]) -> None:
    """No process, temporary file or shared memory of the run is there, so neither is a port."""
    assert not processes_of(survivor.run)
    assert {path.name for path in survivor.tmp.iterdir()} <= CACHES
    assert not [path for path in survivor.tmp.rglob("*") if path.is_file()]
    assert set(os.listdir("/dev/shm")) <= shared
    assert {path.name for path in survivor.run.iterdir()} == {"checkpoints", "config.json", "loss.png",
                                                              "metrics.jsonl"}
    assert not list((survivor.run / "checkpoints").glob("*.tmp"))


def processes_of(run: Path) -> list[int]:
    """Processes, zombies aside, whose command line names the run's directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] if str(run).encode() in path.read_bytes() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
