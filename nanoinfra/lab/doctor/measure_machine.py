"""`nanoinfra doctor` describes the machine and measures matmul rates and each mesh axis's link.

The matmul rate is the measured peak that MFU divides by (formulas/flops.py). An axis is timed with
all-reduces, the pp axis with messages, at many sizes (distributed/measure_links_and_matmul.py). Latency alpha
and bandwidth beta are fitted as t = steps alpha + bytes / beta (formulas/collectives.py; Hockney 1994).
"""
import json
from dataclasses import asdict, replace
from statistics import median as middle

import torch

from nanoinfra.distributed import comm
from nanoinfra.distributed.cpu_threads import set_torch_threads
from nanoinfra.distributed.measure_links_and_matmul import (
    measure_matmul_flops_per_second,
    time_collective_by_payload,
)
from nanoinfra.distributed.mesh import MESH_AXIS_NAMES, Mesh, world_size
from nanoinfra.formulas.collectives import fit_latency_bandwidth
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.doctor import machine_info
from nanoinfra.lab.doctor.doctor_flags import DoctorFlags, doctor_axis_sizes
from nanoinfra.lab.measure import median_of_times
from nanoinfra.lab.predict import format_quantity
from nanoinfra.train.config import parse_emulated_links

_MATMUL_DTYPES = ("float32", "bfloat16")


def run_doctor(flags: DoctorFlags) -> dict:
    """Measure on all ranks; rank 0 prints tables and writes --out. Returns the report."""
    set_torch_threads(flags.threads)
    mesh = Mesh(**doctor_axis_sizes(flags, world_size()),
                emulated_links=parse_emulated_links(flags.emulate_link),
                device=flags.device)
    rates = {dtype: measure_matmul_flops_per_second(mesh, getattr(torch, dtype)) for dtype in _MATMUL_DTYPES}
    axes = [name for name in MESH_AXIS_NAMES if getattr(mesh, name).size > 1]
    report = {"nanoinfra": 1, "hosts": gather_hosts(mesh), "device": flags.device, "ranks": mesh.world.size,
              "threads": torch.get_num_threads(),
              "matmul": {dtype: _timed(mesh, rate, "FLOP/s") for dtype, rate in rates.items()},
              "wires": {name: measure_link(mesh, name) for name in axes}}
    if mesh.rank == 0:
        for grid in report_tables(report):
            grid.show()
        if flags.out:
            flags.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def gather_hosts(mesh: Mesh) -> list[dict]:
    """Describe each host of the mesh once, with the ranks that run on it."""
    found = {}
    mine = machine_info.describe_host() | {"links": machine_info.gpu_links()}
    for rank, told in enumerate(comm.all_gather_json(mine,
                                                     mesh.world)):
        found.setdefault(told["name"], told | {"ranks": []})["ranks"].append(rank)
    return list(found.values())


def measure_link(mesh: Mesh, name: str) -> dict:
    """Measure latency and bandwidth of the mesh axis `name`: medians over rounds, and times by size."""
    axis, op = getattr(mesh, name), "send" if name == "pp" else "all_reduce"
    times = time_collective_by_payload(mesh, axis, op)
    n = axis.size if op == "all_reduce" else 2
    fits = [fit_latency_bandwidth(op, n, dict(zip(times, seconds))) for seconds in zip(*times.values())]
    whole = fit_latency_bandwidth(op, n, {size: middle(seconds) for size, seconds in times.items()})
    return {"ranks": axis.size, "op": op, "emulated": axis.emulated_link is not None,
            "latency": _timed(mesh, [f.latency for f in fits], "s"),
            "bandwidth": _timed(mesh, [f.bandwidth for f in fits], "B/s"),
            "mean_miss": whole.mean_relative_error, "worst_miss": whole.max_relative_error,
            "seconds": {size: _timed(mesh, seconds, "s") for size, seconds in times.items()}}


def _timed(mesh, values, unit):
    measured = median_of_times(values, unit)
    if mesh.device == "cuda":
        measured = replace(measured, machine=f"{torch.cuda.get_device_name()}, {measured.machine}")
    return asdict(measured)


def report_tables(report: dict) -> list[DisplayTable]:
    """The report of `run_doctor` as tables: machine, matmul rates, and a table for each axis."""
    facts = [row for host in report["hosts"] for row in _host(host)]
    rates = [(dtype, *_cells(m, _giga)) for dtype, m in report["matmul"].items()]
    return [DisplayTable("Machine", ("what", "is", "kind"), facts),
            DisplayTable(f"Matrix products, {_who(report)}", ("dtype", "measured peak", "spread", "kind"),
                         rates),
            *(_wire(name, told) for name, told in report["wires"].items())]


def _host(host):
    n, processor = len(host["ranks"]), f"{host['processor']}, {host['cores']} cores"
    yield f"host {host['name']}, {n} rank{'s' * (n > 1)}", processor, "said"
    yield "memory", f"{host['memory'] / machine_info.BYTES_PER_GIB:.1f} GiB", "counted"
    busy = host["load"] > host["cores"] / 2
    yield "load, last minute", f"{host['load']:.2f}" + "; busy: times will be long" * busy, "counted"
    for i, gpu in enumerate(host["gpus"]):
        yield f"GPU {i}", f"{gpu['name']}, {gpu['memory'] / machine_info.BYTES_PER_GIB:.1f} GiB", "said"
    if host["links"]:
        yield "links between GPUs", ", ".join(host["links"]), "said"
    yield "versions", ", ".join(f"{name} {v}" for name, v in host["versions"].items()), "said"


def _who(report):
    """What the matmul rate is of: threads, or a GPU, of one rank."""
    ranks, threads = report["ranks"], report["threads"]
    who = f"{threads} thread{'s' * (threads > 1)}" if report["device"] == "cpu" else "a GPU"
    return f"{who}, one of {ranks} ranks" if ranks > 1 else who


def _wire(name, told):
    n, op, emulated = len(told["seconds"]), told["op"].replace("_", "-"), ", emulated" * told["emulated"]
    missed = f"{told['mean_miss']:.0%}, at worst {told['worst_miss']:.0%}"
    return DisplayTable(f"{name}: {told['ranks']} ranks{emulated}, {n} sizes of {op}",
                        ("fitted", "measured", "spread", "kind"),
                        [("alpha, a message's latency", *_cells(told["latency"], format_quantity)),
                         ("beta, bandwidth one way", *_cells(told["bandwidth"], _giga)),
                         ("sizes miss that line by", missed, "", "timed")])


def _cells(m, show):
    return show(m["value"], m["unit"]), show(m["spread"], m["unit"]), f"{m['kind']}, median of {m['n']}"


def _giga(value, unit):
    return f"{value / 1e9:{',.0f' if value >= 1e12 else '.3g'}} G{unit}"
