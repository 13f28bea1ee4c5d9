"""Lab 07: what cutting every layer costs, and why its ranks stand in one node. The handout: handout.md.

    make lab L=07 N=4                          tensor parallelism, alone and with sequence parallelism
    make lab L=07 N=4 BREAK=norms-apart        the same with a mistake in it

A GPT-2 with 8 heads, cut over all N ranks, in bfloat16 with float32 masters. The trainer's own stage
(train/training_pipeline_stage.py) takes a few steps of one micro-batch in each mode: "none", without sequence
parallelism; "keep" and "gather", with it, what is gathered being kept for backward or gathered again.
Collectives are counted by tag, what a layer leaves for backward by autograd's own hooks; both exactly. Steps
are then timed on the wire that is there and on two emulated ones: an H100's NVLink, 450 GB/s a direction, and
its share of the network, 50 GB/s, both 4000 times slower.
"""
import contextlib
import time
from dataclasses import replace
from statistics import median as middle
from unittest import mock

import torch

from nanoinfra.config import config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.saved_activations import layer_activation_bytes_by_term
from nanoinfra.formulas.tensor_parallel import tp_collectives_per_layer, tp_collectives_per_step
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.instruments.saved_activations import SavedActivations
from nanoinfra.lab.measure import counted, median_of_times
from nanoinfra.lab.predict import format_quantity
from nanoinfra.parallel.pipeline.schedules import gradient_accumulation_schedule
from nanoinfra.parallel.tensor_parallel import TensorParallelRegion
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.loss import count_valid_tokens
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage

MODES = {"none": {}, "keep": {"sp": True, "sp_save_gathered": True}, "gather": {"sp": True}}
WIRES = {"real": {}, "node": {"tp": (20e-6, 112.5e6)}, "net": {"tp": (20e-6, 12.5e6)}}      # s, bytes/s
TAGS = ("ends", "loss", "tp grads")                                  # besides "layers"
PREDICTIONS = {f"L07.lab_{what}_{mode}": unit for what, unit in
               (("calls", "calls"), ("bytes", "B"), ("kept", "B"), ("wait", "s")) for mode in MODES}
QUESTIONS = ("An all-reduce became a reduce-scatter and an all-gather: where did your bytes stay, where not?",
             "Which of your predictions was furthest off, and what had you not thought of?",
             "At which N would you put the ranks of a layer into two nodes, and what would a step take then?")
BREAKS = ("column-without-sum", "norms-apart", "kept-after-all")
MODELS = ("nano", "test", "micro", "small")
SEQUENCES, T, STEPS, BYTES = 4, 128, 4, 2                            # B; bfloat16
HEADS = 8


def measure(mesh, model, broken=""):
    """{key: Measurement}: calls and bytes of a layer, bytes it keeps, bytes of the other tags, seconds."""
    config, found, rows, times = shape(model), {}, [], []
    for mode in MODES:
        for wire in WIRES if not broken else ("real",):
            if mesh.rank == 0:
                print(f"sp {mode}, {wire} wire ...", flush=True)
            axis_mesh = Mesh(tp=mesh.world.size, emulated_links=WIRES[wire], device=mesh.device)
            kept, sent, waits, seconds, loss = train(axis_mesh, config, mode, broken)
            found[f"{wire}_{mode}"] = median_of_times(seconds)
            times.append((mode, wire, loss, seconds, waits, in_layers(sent), axis_mesh.tp.emulated_link))
        found |= counts(config, mode, kept, sent)
        found[f"wait_{mode}"] = median_of_times(waits)                        # on the last wire, the slow one
        rows += [(mode, tag, op, str(calls), format_quantity(size, "B"))
                 for (op, tag), (calls, size) in sorted(sent.items())]
    if mesh.rank == 0:
        show(config, mesh.world.size, rows, times)
    return {f"L07.lab_{key}": found[key] for key in sorted(found, key=order)}


def expect(n, model):
    """{key: number} by formula, on n ranks: all that is counted."""
    config, want = shape(model), {}
    for mode in MODES:
        sent = tp_collectives_per_step(config, n, SEQUENCES, T, dtype_bytes=BYTES, sp=mode)
        layer = sum(layer_activation_bytes_by_term(config, SEQUENCES, T, BYTES, tp=n, sp=mode).values())
        want |= {key: got.value for key, got in counts(config, mode, layer, sent).items()}
        want[f"calls_{mode}"] = sum(tp_collectives_per_layer(mode).values()) * (n > 1)
    return {f"L07.lab_{key}": value for key, value in want.items()}


def shape(model):
    """GPT-2 in the width and depth of a size, with heads and a head of its own for 8 ranks."""
    size = config_for_size(model)
    return replace(size, family="gpt2", heads=HEADS, kv_heads=HEADS, head_dim=size.width // HEADS,
                   hidden=4 * size.width, context=T, tied=False)


def counts(config, mode, kept, sent):
    """{key: Measurement} of what one layer keeps, and of {(op, tag): (calls, bytes)} of one step."""
    calls, size = (sum(pair) // config.layers for pair in zip((0, 0), *in_layers(sent).values()))
    found = {f"calls_{mode}": counted(calls, "calls"), f"bytes_{mode}": counted(size, "B"),
             f"kept_{mode}": counted(kept, "B")}
    for tag in TAGS:
        beside = sum(size for (_, at), (_, size) in sent.items() if at == tag)
        found[f"{tag.split()[-1]}_{mode}"] = counted(beside, "B")
    return found


def in_layers(sent):
    """Of what was sent, {op: (calls, bytes)} of the layers."""
    return {op: pair for (op, tag), pair in sent.items() if tag == "layers"}


def train(mesh, config, mode, broken):
    """(bytes a layer keeps, {(op, tag): (calls, bytes)}, [wait], [seconds], loss) of a few steps."""
    mode = "keep" if (broken, mode) == ("kept-after-all", "gather") else mode
    flags = make_train_flags(dtype="bfloat16", tp=mesh.tp.size, **MODES[mode])
    with mistake(broken):
        replica = TrainStage(config, flags, mesh)
        _, *steps = [step(mesh, replica) for _ in range(STEPS)]
        kept = kept_by_layer(mesh, replica)
    sents, waits, seconds = zip(*steps)
    return kept, sents[-1], waits, seconds, replica.loss.item()


def mistake(broken):
    """A known-wrong variant, in force while this is."""
    if broken == "column-without-sum":
        return mock.patch.object(TensorParallelRegion, "reduce_input_grad",
                                 lambda region, grad, tag: comm.AsyncCollective(grad))
    if broken == "norms-apart":
        return mock.patch.object(TensorParallel, "all_reduce_partial_grads", lambda tensor, grads: grads)
    return contextlib.nullcontext()


def step(mesh, replica):
    """({(op, tag): (calls, bytes)}, seconds that no rank could avoid to wait in layers, seconds)."""
    batches = [tokens(mesh, replica.parallel_model.chunks[0].model.config.vocab)]
    [count] = count_valid_tokens(batches, mesh.data)
    comm.barrier(mesh.tp)
    mesh.comm_log.take_records()
    begin = time.monotonic()
    replica.begin_step(batches, count, lr=1e-3)
    execute_schedule(gradient_accumulation_schedule(1), replica)
    rows = [row for row in mesh.comm_log.take_records() if row.tag in ("layers", *TAGS)]
    if mesh.device == "cuda":
        torch.cuda.synchronize()
    comm.barrier(mesh.tp)
    seconds, sent = time.monotonic() - begin, {}
    for row in rows:
        calls, size = sent.get((row.op, row.tag), (0, 0))
        sent[row.op, row.tag] = calls + 1, size + row.payload_bytes
    waits = torch.tensor([row.wait_seconds for row in rows if row.tag == "layers"], dtype=torch.float64)
    return sent, comm.all_reduce(waits, mesh.tp, op="min").sum().item(), seconds


def tokens(mesh, vocab):
    """The micro-batch, (B, T): the same on all ranks, in every step."""
    draw = torch.Generator().manual_seed(0)
    return Batch(*torch.randint(vocab, (2, SEQUENCES, T), generator=draw).to(mesh.device))


def kept_by_layer(mesh, replica):
    """Bytes that a layer's forward leaves for backward: those kept after the second, less after the first."""
    batches, marks = [tokens(mesh, replica.parallel_model.chunks[0].model.config.vocab)], []
    [count] = count_valid_tokens(batches, mesh.data)
    replica.begin_step(batches, count, lr=0.0)
    with SavedActivations(replica.parallel_model.chunks[0].model.parameters()) as kept:
        hooks = [block.register_forward_hook(lambda *_: marks.append(kept.saved_bytes()))
                 for block in replica.parallel_model.chunks[0].model.blocks]
        replica.forward(0)
    for hook in hooks:
        hook.remove()
    replica.backward(0, is_last=True)
    replica.reduce_grads()
    return int(comm.all_reduce(torch.tensor(marks[1] - marks[0]), mesh.tp, op="max"))


def show(config, n, rows, times):
    """Print what was sent by tag, and steps beside what the alpha-beta model says of their layers' wire."""
    print(f"GPT-2 of {parameter_count(config):,} parameters over {n} ranks, {SEQUENCES} x {T} tokens a step")
    DisplayTable("in one step", ("sp", "tag", "collective", "calls", "payload"), rows).show()
    lines = []
    for mode, wire, loss, seconds, waits, sent, link in times:
        modelled = ""
        if link:
            each = {op: ring_collective_seconds(op, size / calls, n, link.latency, link.bandwidth)
                    for op, (calls, size) in sent.items()}
            modelled = format_quantity(sum(calls * each[op] for op, (calls, _) in sent.items()), "s")
        timed = (format_quantity(middle(values), "s") for values in (seconds, waits))
        lines.append((mode, wire, f"{loss:.3f}", *timed, modelled))
    columns = ("sp", "wire", "loss", "step, timed", "waited in layers, timed", "modelled")
    DisplayTable(f"the loss of step {STEPS}, and seconds", columns, lines).show()


def order(key):
    """The table's: of a layer, of the other tags, seconds waited, seconds a step."""
    kinds = ("calls", "bytes", "kept", "ends", "loss", "grads", "wait", *WIRES)
    return kinds.index(key.partition("_")[0])
