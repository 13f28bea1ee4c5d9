"""Lab 06: what four schedules idle, hold and send, on N stages. The handout: handout.md.

    make lab L=06 N=4                          GPipe, 1F1B, interleaved, zero bubble
    make lab L=06 N=4 BREAK=weights-at-the-end the same with a mistake in it

Two runs of each schedule. First the ranks rehearse it: stages sleep for slots of time, each message carries
the slot in which it left, and so idle slots are counted by what was really sent, beside the seconds. Then the
trainer's own stage (train/training_pipeline_stage.py) takes a few steps in bfloat16: a GPT-2 of 16 layers,
equal chunks for 2 to 16 of them. Bytes that layers keep are counted by autograd's own hooks, over those of
one micro-batch: so many micro-batches are held. On one rank every schedule but GPipe is plain accumulation.
"""
import contextlib
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch

from lessons.l06_pipeline.measurements import rehearse_schedule, run_pipeline_steps, schedule_of_order
from nanoinfra.config import config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed import comm
from nanoinfra.formulas import pipeline as formulas
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, median_of_times
from nanoinfra.lab.predict import format_quantity
from nanoinfra.parallel.pipeline.schedules import (
    Backward,
    BackwardInput,
    BackwardWeight,
    build_pipeline_schedule,
    gpipe,
    one_f_one_b,
)

KINDS = {"gpipe": ("gpipe", 1), "1f1b": ("1f1b", 1), "inter": ("interleaved", 2), "zb": ("zb-h1", 1)}
UNITS = {"idle": "slots", "held": "micros", "sent": "B"}
PREDICTIONS = {f"L06.lab_{what}_{kind}": unit for what, unit in UNITS.items() for kind in KINDS}
QUESTIONS = ("Your stages idle: with twice the micro-batches, what becomes of the bubble, and of the memory?",
             "Which of your predictions was furthest off, and what had you not thought of?",
             "Which rows exposed your break, and why could the loss not?")
BREAKS = ("gpipe-in-disguise", "weights-at-the-end", "padded-messages")
MODELS = ("nano", "test", "micro", "small")
TIMES, SLOT, REPEATS = (3, 4, 2), 0.005, 3            # slots of a forward and both halves of a backward; s
MICROS, SEQUENCES, T, CONTEXT, BYTES = 16, 2, 48, 64, 2                 # m; B; bfloat16
LAYERS, VOCAB = 16, 257


def measure(mesh, model, broken=""):
    """{key: Measurement}: slots idle, micro-batches held, bytes sent; seconds asleep and in training."""
    config, found, rows = shape(model), {}, []
    single = run_pipeline_steps(config, "gpipe", mesh.world.size, 1, micro_batches(1), "bfloat16",
                                mesh.device)["kept"]
    for kind in KINDS:
        if mesh.rank == 0:
            print(f"{kind} ...", flush=True)
        idle, steps = rehearsed(mesh, kind, broken)
        run = trained(mesh, config, kind, broken)
        held, messages = run["kept"] / single, [row.payload_bytes for row in run["rows"] if row.op == "send"]
        found |= {f"idle_{kind}": counted(idle, "slots"), f"step_{kind}": median_of_times(steps),
                  f"held_{kind}": counted(max(over(mesh, [held])), "micros"),
                  f"sent_{kind}": counted(max(over(mesh, [sum(messages)])), "B"),
                  f"train_{kind}": median_of_times(over(mesh, run["seconds"]))}
        each = comm.all_gather_json([held, len(messages), run["loss"]], mesh.world)
        rows.append((KINDS[kind][0], *(", ".join(f"{one[i]:g}" for one in each) for i in range(2)),
                     f"{sum(loss for *_, loss in each):.3f}"))
    if mesh.rank == 0:
        show(config, mesh.world.size, rows)
    return {f"L06.lab_{key}": found[key] for key in sorted(found, key=order)}


def expect(n, model):
    """{key: number} by formula, on n ranks: all that is counted."""
    config, want = shape(model), {}
    for kind in KINDS:
        name, v = used(kind, n)
        held = max(formulas.predicted_micro_batches_in_flight(name, n, r, MICROS, v) for r in range(n)) / v
        sent = max(formulas.pipeline_sent_bytes_per_stage(config, n, MICROS, SEQUENCES, T, BYTES, v))
        want |= {f"idle_{kind}": formulas.pipeline_idle_seconds(name, n, MICROS, *TIMES, v),
                 f"held_{kind}": held,
                 f"sent_{kind}": sent}
    return {f"L06.lab_{key}": value for key, value in want.items()}


def shape(model):
    """GPT-2 in the width of a size, with a vocabulary so small that the head is less than a layer."""
    size = config_for_size(model)
    return replace(size, family="gpt2", layers=LAYERS, vocab=VOCAB, context=CONTEXT, tied=False,
                   kv_heads=size.heads, hidden=4 * size.width)


def used(kind, n):
    """(schedule, chunks a stage): on one rank there is nothing to interleave and no gap to fill."""
    return KINDS[kind] if n > 1 or kind == "gpipe" else KINDS["1f1b"]


def lists(kind, n, broken):
    """What each of n stages does; with a mistake if it is this schedule's."""
    if (broken, kind) == ("gpipe-in-disguise", "1f1b"):
        return schedule_of_order(gpipe, n, MICROS)
    if (broken, kind) == ("weights-at-the-end", "zb") and n > 1:
        return schedule_of_order(weights_at_the_end, n, MICROS)
    name, v = used(kind, n)
    return build_pipeline_schedule(name, n, MICROS, v)


def weights_at_the_end(p, r, m):
    """1F1B in two halves, all second ones put off until nothing else is left."""
    for what in one_f_one_b(p, r, m):
        yield BackwardInput(what.micro_batch) if isinstance(what, Backward) else what
    yield from (BackwardWeight(k) for k in range(m))


def rehearsed(mesh, kind, broken):
    """(slots that the idlest stage idles, [seconds of a step]) of stages that sleep."""
    trials = rehearse_schedule(lists(kind, mesh.world.size, broken), TIMES, SLOT, mesh.device, REPEATS)
    _, slots = trials[-1]
    ends = max(over(mesh, [slots[-1][2]]))
    worked = sum(end - begin for _, begin, end in slots)
    begins = [-begin for begin in over(mesh, [-real[0][1] for real, _ in trials])]
    steps = [end - begin for begin, end in zip(begins, over(mesh, [real[-1][2] for real, _ in trials]))]
    return max(over(mesh, [ends - worked])), steps


def trained(mesh, config, kind, broken):
    """What pipes.train counts of a step of the real stage."""
    n, batches, mistake = mesh.world.size, micro_batches(MICROS), contextlib.nullcontext()
    name, v = used(kind, n)
    if broken == "padded-messages":
        wire = SimpleNamespace(send=send_padded, recv=recv_padded)
        mistake = mock.patch("nanoinfra.parallel.pipeline.stage.comm", wire)
    with mistake:
        todo = lists(kind, n, broken)
        return run_pipeline_steps(config, name, n, v, batches, "bfloat16", mesh.device, todo, REPEATS)


def send_padded(x, axis, dst, tag="", async_op=False):
    """All messages as long as the model's context: zeros behind the tokens."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, CONTEXT - x.shape[1]))
    return comm.send(padded, axis, dst, tag, async_op=async_op)


def recv_padded(x, axis, src, tag="", async_op=False):
    """The tokens of such a message."""
    room = torch.nn.functional.pad(x, (0, 0, 0, CONTEXT - x.shape[1]))
    pending = comm.recv(room, axis, src, tag, async_op=async_op)
    return SimpleNamespace(wait=lambda: x.copy_(pending.wait()[:, :x.shape[1]]))


def micro_batches(m):
    """A step's micro-batches, (B, T) each: the same on all ranks, in every step."""
    draw = torch.Generator().manual_seed(0)
    return [Batch(*torch.randint(VOCAB, (2, SEQUENCES, T), generator=draw)) for _ in range(m)]


def over(mesh, values):
    """The largest of each value over the ranks."""
    return comm.all_reduce(torch.tensor(values, dtype=torch.float64), mesh.world, op="max").tolist()


def show(config, n, rows):
    """What each stage held and sent."""
    slots = f"{', '.join(map(str, TIMES))} slots of {format_quantity(SLOT, 's')}"
    print(f"{parameter_count(config):,} parameters, {LAYERS} layers; {MICROS} micro-batches of "
          f"{SEQUENCES} x {T} tokens; a stage that sleeps takes {slots}")
    columns = "schedule", "micro-batches held by each", "messages sent by each", "loss"
    DisplayTable(f"{n} stage{'s' if n > 1 else ''}", columns, rows).show()


def order(key):
    """The table's: idle, held, sent, seconds asleep, seconds in training."""
    return (*UNITS, "step", "train").index(key.partition("_")[0])
