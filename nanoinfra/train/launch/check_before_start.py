"""Checks before a rank starts: folders can be written, devices exist, the launcher's variables make sense.

Each check raises ValueError with one line: what is wrong, why, and what to do.
"""
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from nanoinfra.train.launch.elastic_rank import make_run_folder

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # they make a process a rank


def check_paths_writable(out: Path, trace: Path | None) -> None:
    """Raise ValueError unless the run directory and the --trace file can be written."""
    make_run_folder(out)
    with _writing(f"--out {out}"), tempfile.TemporaryFile(dir=out):      # fails on a read-only disk
        pass
    if trace:
        with _writing(f"--trace {trace}"), open(trace, "a"):
            pass


def check_device_available(device: str, num_ranks: int) -> None:
    """Raise ValueError unless this host has a device for each of `num_ranks` ranks."""
    if device != "cuda":
        return
    import torch
    found = torch.cuda.device_count()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "" if hidden is None else f", with CUDA_VISIBLE_DEVICES={hidden!r}"
    if found == 0:
        why = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise ValueError(f"--device cuda: torch sees no CUDA device here{seen}{why}; use --device cpu")
    if found < num_ranks:
        raise ValueError(f"--device cuda: {num_ranks} ranks on this host and {found} CUDA devices{seen}; "
                         f"a rank needs one of its own: start {found}, or use --device cpu")


def check_launcher_environment(check: Callable[[int], object]) -> None:
    """Raise ValueError unless RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT make sense together.

    `check(world_size)` may refuse the world size.
    """
    told = {name: os.environ.get(name, "") for name in _LAUNCHER_VARIABLES}
    here = describe_launcher_environment()
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


def describe_launcher_environment() -> str:
    """RANK and WORLD_SIZE of the environment, in words for an error message."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return f"RANK={rank} and WORLD_SIZE={world} in the environment make this process a rank"


@contextmanager
def _writing(flag):
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to {flag}: {error.strerror}; give one that can be written") from None
