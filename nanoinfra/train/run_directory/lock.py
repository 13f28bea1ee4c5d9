"""One run at a time in a run's directory: a lock that ends with its process, kill -9 included.

It is flock(2) on a file that says who holds it. A launcher holds it for its ranks, those it starts again
among them; under torchrun rank 0 does, and one that is started again waits for the rank 0 before it. Who only
reads a run takes no lock: a finished checkpoint is never written to.
"""
import fcntl
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from nanoinfra.train.launch.elastic_rank import OURS, is_rank, launch_id, make_folder

NAME = ".nanoinfra.lock"
ME = uuid.uuid4().hex                        # two containers may have one host name, and one process id
POLL = 0.1                                   # seconds


@contextmanager
def locked(out: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the run directory `out`, which is made. Raises ValueError where another does, and names it.

    A holder of this same launch may take `patience` seconds to end. Inside another `locked`, and in a rank
    whose launcher holds the lock, this does nothing; on a file system without locks it warns.
    """
    make_folder(out)
    led = is_rank() and (launch_id() or "").startswith(OURS)
    file = None if led else _take(out / NAME, time.monotonic() + patience)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):                      # a file that stays is as free as none
                (out / NAME).unlink()                    # while it is still ours
            os.close(file)


def _take(path, until):
    """The locked file; None where this process has it already, or where there are no locks."""
    while True:
        file = _open(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            if holder.get("process") == [ME, os.getpid()]:
                return None
            if launch_id() is None or holder.get("launch") != launch_id() or time.monotonic() > until:
                raise ValueError(_refusal(path.parent, holder)) from None
            time.sleep(POLL)
        except OSError as error:
            os.close(file)
            print(f"nanoinfra: {path} cannot be locked ({error.strerror}): take care that no second run goes "
                  f"into {path.parent}", file=sys.stderr)
            return None
        else:
            if _is_at(path, file):
                _sign(file)
                return file
            os.close(file)                               # its holder has removed it since: there is a new one


def _open(path):
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ValueError(f"cannot write to --out {path.parent}: {error.strerror}; name a folder that you may "
                         "write to") from error


def _is_at(path, file):
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _sign(file):
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    who = {"process": [ME, os.getpid()], "host": socket.gethostname(), "since": since, "launch": launch_id()}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(who).encode(), 0)


def _holder(file):
    """What its holder has written; {} if that is not readable, as in the moment before it is written."""
    try:
        who = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return who if isinstance(who, dict) else {}


def _refusal(out, holder):
    who = "another process trains into it"
    if {"process", "host", "since"} <= holder.keys():
        who = f"process {holder['process'][1]} on {holder['host']} trains into it since {holder['since']}"
    return f"--out {out} is in use: {who}; wait until it ends, stop it, or name another --out"
