"""What would end a run can be seen before a rank starts: folders, devices, what the environment says it is.

Each check raises ValueError with one line: what is wrong, why, and what to do.
"""
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from nanoinfra.train.launch.elastic_rank import make_folder

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")          # what makes a process a rank


def check_paths(out: Path, trace: Path | None) -> None:
    """Can the run directory be written, and the timeline?"""
    make_folder(out)
    with _writing(f"--out {out}"), tempfile.TemporaryFile(dir=out):      # root, say, on a read-only disk
        pass
    if trace:
        with _writing(f"--trace {trace}"), open(trace, "a"):
            pass


def check_device(device: str, ranks: int) -> None:
    """Are there devices for `ranks` ranks on this host?"""
    if device != "cuda":
        return
    import torch
    found = torch.cuda.device_count()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "" if hidden is None else f", with CUDA_VISIBLE_DEVICES={hidden!r}"
    if found == 0:
        why = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise ValueError(f"--device cuda: torch sees no CUDA device here{seen}{why}; use --device cpu")
    if found < ranks:
        raise ValueError(f"--device cuda: {ranks} ranks on this host and {found} CUDA devices{seen}; "
                         f"a rank needs one of its own: start {found}, or use --device cpu")


def check_rank(check: Callable[[int], object]) -> None:
    """Do the variables that make this process a rank make sense, and does `check` take their WORLD_SIZE?"""
    told = {name: os.environ.get(name, "") for name in LAUNCHER}
    here = by_environment()
    if missing := [name for name, value in told.items() if not value]:
        raise ValueError(f"{here}, but {' and '.join(missing)} {'are' if missing[1:] else 'is'} not set; "
                         "start ranks with torchrun, or unset RANK and WORLD_SIZE to train in this process")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not told[name].isdecimal():
            raise ValueError(f"{here}, but {name}={told[name]} is no number; unset RANK and WORLD_SIZE")
    if int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise ValueError(f"{here}, but ranks of {told['WORLD_SIZE']} count from 0; unset RANK and WORLD_SIZE")
    try:
        check(int(told["WORLD_SIZE"]))
    except ValueError as error:
        raise ValueError(f"{error}; {here}: unset them if no launcher has set them") from error


def by_environment() -> str:
    """What the environment makes this process, in words."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return f"RANK={rank} and WORLD_SIZE={world} in the environment make this process a rank"


@contextmanager
def _writing(flag):
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to {flag}: {error.strerror}; give one that can be written") from None
