"""Lab 10: N ranks, dealt to three axes in four ways: what each way sends, and whether it trains one model.

    make lab L=10 N=4                          all on dp, all on tp, all on pp, and a cube
    make lab L=10 N=4 BREAK=one-end            the same with a mistake in it

A LLaMA of 8 layers and 8 heads in float64, so that a wrong sum shows at once. The trainer's own stage
(train/training_pipeline_stage.py) takes one step, 16 sequences, on each mesh; payloads are counted by axis,
all ranks together. A gradient is off where a rank's part of it is not data parallelism's to 1e-10, a norm to
1e-8. Steps are timed on the wire that is there, the cube's also with a slow one, 12.5 MB/s, under one axis at
a time. The handout: handout.md.
"""
import contextlib
import time
from dataclasses import replace
from statistics import median as middle
from unittest import mock

import torch

from lessons.l10_three_d.figures import payload_bytes_by_axis
from nanoinfra.config import config_for_size
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.communication_by_axis import step_bytes_by_axis
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.instruments.gradient_parity import (
    count_valid_targets,
    float64_train_flags,
    make_stage_and_batches,
    relative_gradient_errors,
)
from nanoinfra.lab.measure import counted, median_of_times
from nanoinfra.lab.predict import format_quantity
from nanoinfra.parallel.parallelize import ParallelModel
from nanoinfra.train.config import OptimizerFlags
from nanoinfra.train.step import execute_schedule

MESHES, AXES, NET = ("copies", "cut", "deep", "cube"), ("pp", "dp", "tp"), (20e-6, 12.5e6)      # s, bytes/s
SENT = ("copies_dp", "cut_tp", "deep_pp", "deep_tied", "cube_tp", "cube_pp", "cube_dp", "cube_tied")
COUNTED = (*SENT, *(f"{what}_{name}" for what in ("off", "norm") for name in MESHES))
TIMED = (*(f"step_{name}" for name in MESHES), *(f"slow_{axis}" for axis in AXES))
PREDICTIONS = {f"L10.lab_{what}": "B" for what in SENT}
QUESTIONS = ("Which axis would you lay between two nodes, and what do your bytes and your steps say to that?",
             "Which of your predictions was furthest off, and what had you not thought of?",
             "Which rows exposed your break, and which stayed right all the same?")
BREAKS = ("one-end", "counted-twice", "own-tokens", "every-micro-batch")
MODELS = ("nano", "test", "micro", "small")
SEQUENCES, B, T, STEPS = 16, 2, 64, 3


def measure(mesh, model, broken=""):
    """{key: Measurement}: payload by axis, gradients and norms that are off, seconds."""
    config, ways, found, rows = shape(model), meshes(mesh.world.size), {}, []
    right = train(mesh, config, ways["copies"], steps=1)
    for name, sizes in ways.items():
        got = train(mesh, config, sizes, broken=broken)
        found |= {f"{name}_{axis}": counted(size, "B") for axis, size in got["sent"].items()}
        found |= {f"off_{name}": counted(gradients_off(mesh, got, right), "gradients"),
                  f"norm_{name}": counted(norms_off(mesh, got, right), "ranks")}
        found[f"step_{name}"] = median_of_times(got["seconds"])
        rows.append((name, " x ".join(map(str, sizes.values())), f"{got['loss']:.6f}",
                     *(format_quantity(size / 1e6, "MB") for size in got["sent"].values())))
    slow = {axis: train(mesh, config, sizes, {axis: NET}, broken) for axis, n in sizes.items() if n > 1}
    found |= {f"slow_{axis}": median_of_times(run["seconds"]) for axis, run in slow.items()}
    if mesh.rank == 0:
        show(config, rows, got, slow)
    return {f"L10.lab_{key}": found[key] for key in (*COUNTED, *TIMED) if key in found}


def expect(n, model):
    """{key: number} by formula, on n ranks: all that is counted."""
    config, want = shape(model), dict.fromkeys(COUNTED, 0)
    for name, sizes in meshes(n).items():
        p, d, t = sizes.values()
        ranks = [step_bytes_by_axis(config, p, d, t, B, T, SEQUENCES // (B * d), 8, stage, rank)
                 for stage in range(p) for rank in range(t)]
        want |= {f"{name}_{axis}": d * sum(each[axis] for each in ranks) for axis in ranks[0]}
    return {f"L10.lab_{key}": want[key] for key in COUNTED}


def meshes(n):
    """{name: {axis: ranks on it}} of n ranks, 1, 2, 4 or 8. The cube doubles tp first, then pp, then dp."""
    ways = ((1, n, 1), (1, 1, n), (n, 1, 1), (1 + (n > 2), max(1, n // 4), 1 + (n > 1)))
    return {name: dict(zip(AXES, sizes)) for name, sizes in zip(MESHES, ways)}


def shape(model):
    """A size's width and vocabulary, with layers and heads for 8 ranks."""
    size = config_for_size(model)
    return replace(size, layers=8, heads=8, kv_heads=8, head_dim=size.width // 8, context=T, tied=True)


def train(mesh, config, sizes, wire=None, broken="", steps=STEPS):
    """On a mesh of `sizes`, of a step that is repeated: what it sent, gave and took. The first warms up."""
    here = Mesh(**sizes, emulated_links=wire or {}, device=mesh.device)
    flags = replace(float64_train_flags(sizes, B, SEQUENCES), optimizer=OptimizerFlags(clip=0))
    with mistake(broken):
        replica, batches = make_stage_and_batches(config, flags, here, T)
        *_, (rows, _) = done = [step(here, replica, batches, broken) for _ in range(steps)]
    mine = payload_bytes_by_axis(rows)
    total = comm.all_reduce(torch.tensor([*mine.values()]), mesh.world).tolist()
    loss = comm.all_reduce(replica.loss.clone(), mesh.world).item() / here.tp.size   # the last stages have it
    return {"sent": dict(zip(mine, total)), "rows": rows, "loss": loss, "norm": replica.grad_norm,
            "grads": {name: (replica.parallel_model.optimizer_shard(name), grad)
                      for name, grad in replica.grads.items()},
            "seconds": [seconds for _, seconds in done[1:]]}


def mistake(broken):
    """A known-wrong variant, in force while this is. Two more are in `step`."""
    if broken == "one-end":
        return mock.patch.object(ParallelModel, "finish_grad_sync", lambda chunks: {
            name: grad for chunk in chunks.chunks for name, grad in chunk.finish_grad_sync().items()})
    if broken == "counted-twice":
        return mock.patch.object(ParallelModel, "counted_in_norm", lambda chunks, name: True)
    return contextlib.nullcontext()


def step(mesh, replica, batches, broken):
    """(the ledger's rows until all gradients are summed, seconds) of one step, which moves no weight."""
    own = sum(batch.num_valid_targets for batch in batches)
    count = own if broken == "own-tokens" else count_valid_targets(SEQUENCES, T)
    turns = [[one] for one in batches] if broken == "every-micro-batch" else [batches]
    grads, loss = {}, 0
    comm.barrier(mesh.world)
    mesh.comm_log.take_records()
    begin = time.monotonic()
    for turn in turns:
        replica.begin_step(turn, count, lr=0.0)
        execute_schedule(replica.build_step_schedule(len(turn))[:-1], replica)
        grads = {name: grads.get(name, 0.0) + grad for name, grad in replica.grads.items()}
        loss = loss + replica.loss
    rows, replica.grads, replica.loss = mesh.comm_log.take_records(), grads, loss
    replica.step()
    if mesh.device == "cuda":
        torch.cuda.synchronize()
    comm.barrier(mesh.world)
    return rows, time.monotonic() - begin


def gradients_off(mesh, got, right):
    """Of how many parameters has some rank a gradient that is not data parallelism's?"""
    want = {name: grad for name, (_, grad) in right["grads"].items()}
    found = relative_gradient_errors([got["grads"]], want)
    off = torch.tensor([not found.get(name, 0.0) <= 1e-10 for name in want], dtype=torch.int32)
    return int(comm.all_reduce(off, mesh.world, op="max").sum())


def norms_off(mesh, got, right):
    """On how many ranks is the norm not that?"""
    off = torch.tensor(int(not abs(got["norm"] / right["norm"] - 1) <= 1e-8))
    return int(comm.all_reduce(off, mesh.world))


def show(config, rows, cube, slow):
    """Print what each mesh sent, and the cube's steps beside what the alpha-beta model says of rank 0."""
    columns = ("mesh", "pp x dp x tp", "loss", *cube["sent"])
    DisplayTable(f"{parameter_count(config):,} parameters, a step: payloads of all ranks", columns,
                 rows).show()
    lines = [("none", format_quantity(middle(cube["seconds"]), "s"), "", "")]
    for axis, run in slow.items():
        mine = [row for row in cube["rows"] if row.axis_name.replace("data", "dp") == axis
                and row.op != "recv"]
        sent, wire = sum(row.payload_bytes for row in mine), sum(seconds_of(row) for row in mine)
        timed = format_quantity(middle(run["seconds"]), "s")
        lines.append((axis, timed, format_quantity(sent / 1e6, "MB"), format_quantity(wire, "s")))
    columns = ("slow wire under", "step, timed", "rank 0's payload", "its wire, modelled")
    if slow:
        DisplayTable("the cube once more", columns, lines).show()


def seconds_of(row):
    """What the slow wire takes for a row of the ledger."""
    return ring_collective_seconds(row.op, row.payload_bytes, row.axis_size, *NET)
