"""The lock of a run directory: one run at a time; the lock ends with its process, kill -9 included.

It is flock(2) on a file that names its holder. A launcher holds it for its ranks, restarted ones included;
under torchrun rank 0 holds it, and a restarted rank 0 waits for the one before it. Reading a run takes no
lock, as a finished checkpoint is never written to.
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

from nanoinfra.train.launch.elastic_rank import LAUNCH_ID_PREFIX, is_launched_rank, launch_id, make_run_folder

LOCK_FILE_NAME = ".nanoinfra.lock"
_PROCESS_UUID = uuid.uuid4().hex             # containers may share host name and process id
_POLL_SECONDS = 0.1


@contextmanager
def lock_run_directory(out: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of the run directory `out`, which is made. Raises ValueError when another process has it.

    A holder of this same launch may take `wait_seconds` to end. Nested in this process, and in a rank whose
    launcher holds the lock, it does nothing; on a file system without locks it prints a warning.
    """
    make_run_folder(out)
    led = is_launched_rank() and (launch_id() or "").startswith(LAUNCH_ID_PREFIX)
    file = None if led else _take(out / LOCK_FILE_NAME, time.monotonic() + wait_seconds)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):                      # a file that stays does no harm
                (out / LOCK_FILE_NAME).unlink()                    # before the lock is released
            os.close(file)


def _take(path, until):
    """The locked file; None when this process holds the lock already, or there are no locks here."""
    while True:
        file = _open(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            if holder.get("process") == [_PROCESS_UUID, os.getpid()]:
                return None
            if launch_id() is None or holder.get("launch") != launch_id() or time.monotonic() > until:
                raise ValueError(_refusal(path.parent, holder)) from None
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            os.close(file)
            print(f"nanoinfra: {path} cannot be locked ({error.strerror}): take care that no second run goes "
                  f"into {path.parent}", file=sys.stderr)
            return None
        else:
            if _is_at(path, file):
                _sign(file)
                return file
            os.close(file)                               # its holder has removed it since; try the new file


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
    who = {"process": [_PROCESS_UUID, os.getpid()], "host": socket.gethostname(), "since": since,
           "launch": launch_id()}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(who).encode(), 0)


def _holder(file):
    """What the holder has written into the file; {} when it is not (yet) readable."""
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
