"""The flags of `nanoinfra doctor`. No torch here: `--help` must answer at once."""
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from nanoinfra.parallel.refusals import context_parallel
from nanoinfra.train.config import AxesFlags, mesh_axis_sizes, num_ranks_to_start, parse_emulated_links


@dataclass(frozen=True)
class DoctorFlags:
    """Say what this machine is and what it can do: devices, versions, matmul rates, the wire of each axis."""
    nproc: int | None = None                 # ranks to start here; default: product of the axes
    dp: int | None = None                    # data parallel; default: ranks / (pp x cp x tp)
    pp: int = 1                              # pipeline parallel
    cp: int = 1                              # context parallel
    tp: int = 1                              # tensor parallel
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None               # a rank; default: OMP_NUM_THREADS, or cores / ranks
    emulate_link: tuple[str, ...] = ()               # emulate AXIS=LATENCY,BANDWIDTH, in s and bytes/s
    out: Path | None = None                  # write the numbers here too, as JSON

    @property
    def axes(self) -> AxesFlags:
        """The same axes as those of `nanoinfra train`."""
        return AxesFlags(dp=self.dp, pp=self.pp, cp=self.cp, tp=self.tp)


def check_doctor_flags(flags: DoctorFlags) -> int:
    """Check the flags; returns the number of ranks to start. ValueError for one that cannot be."""
    world = num_ranks_to_start(flags.axes, flags.nproc)
    doctor_axis_sizes(flags, world)
    parse_emulated_links(flags.emulate_link)
    if flags.threads is not None and flags.threads < 1:
        raise ValueError(f"--threads {flags.threads} is too small; give at least 1")
    if flags.out and not flags.out.parent.is_dir():
        raise ValueError(f"--out {flags.out}: there is no folder {flags.out.parent}; make it first")
    return world


def doctor_axis_sizes(flags: DoctorFlags, world_size: int) -> dict[str, int]:
    """Return {"pp":, "dp":, "cp":, "tp":} for `world_size` ranks. ValueError for a mesh that cannot be."""
    for reason in context_parallel.refusals(SimpleNamespace(cp=flags.cp, world_size=world_size)):
        raise ValueError(reason)
    return mesh_axis_sizes(flags.axes, world_size)
