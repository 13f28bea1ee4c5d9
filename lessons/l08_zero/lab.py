"""Lab 08: what ZeRO cuts, what it sends for that, and how one sees that it cuts nothing. See handout.md.

    make lab L=08 N=4                          stages 0, 1, 2, 3 on four ranks
    make lab L=08 N=4 BREAK=never-freed        the same with a mistake in it

The trainer's own stage (train/training_pipeline_stage.py) takes a few steps of two micro-batches at each
stage of ZeRO, in mixed precision as in the paper: weights and gradients in bfloat16, masters and moments in
float32. Bytes held are counted between the micro-batches and before the optimizer steps, the larger of both;
gradients and weights that are on their way, and the unit at work, come on top (formulas/zero.py bounds them).
"""
import time
from unittest import mock

import torch

from nanoinfra.config import config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed import comm
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.zero import zero_model_state_bytes, zero_payload_bytes
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, median_of_times
from nanoinfra.lab.predict import format_quantity
from nanoinfra.parallel.pipeline.schedules import Backward, ReduceGrads, gradient_accumulation_schedule
from nanoinfra.parallel.zero import FSDPParamGroup
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.loss import count_valid_tokens
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage

STAGES = (0, 1, 2, 3)
PREDICTIONS = {f"L08.lab_{what}_{stage}": "B" for what in ("held", "sent") for stage in STAGES}
QUESTIONS = ("Stage 1 hands its collectives twice the bytes of stage 0: why does a ring carry no more?",
             "Which of your predictions was furthest off, and what had you not thought of?",
             "Which rows exposed your break, and why could the loss not?")
BREAKS = ("unsharded-optimizer", "gradients-kept", "never-freed")
MODELS = ("nano", "test", "micro", "small")
MICRO_BATCHES, SEQUENCES, T, STEPS = 2, 2, 64, 4


def measure(mesh, model, broken=""):
    """{key: Measurement}: bytes held, bytes and calls sent, and seconds, a stage."""
    config, found, rows = config_for_size(model, tied=False), {}, []
    for stage in STAGES:
        if mesh.rank == 0:
            print(f"stage {stage} ...", flush=True)
        held, sent, calls, seconds, loss = train(mesh, config, stage, broken)
        found[stage] = {"held": counted(sum(held), "B"), "sent": counted(sent, "B"),
                        "calls": counted(calls, "calls"), "step": median_of_times(seconds)}
        rows.append((str(stage), *(format_quantity(n, "B") for n in held), f"{loss:.3f}"))
    if mesh.rank == 0:
        title = f"{parameter_count(config):,} parameters: what a rank holds"
        DisplayTable(title, ("stage", "weights", "gradients", "optimizer", "loss"), rows).show()
    return {f"L08.lab_{what}_{stage}": found[stage][what]
            for what in ("held", "sent", "calls", "step") for stage in STAGES}


def expect(n, model):
    """{key: bytes} by formula, on n ranks."""
    config = config_for_size(model, tied=False)
    held = [sum(zero_model_state_bytes(config, n, stage, "bfloat16").values()) for stage in STAGES]
    sent = [sum(zero_payload_bytes(config, n, stage, MICRO_BATCHES, "bfloat16").values()) * (n > 1)
            for stage in STAGES]
    return {f"L08.lab_{what}_{stage}": value for what, values in (("held", held), ("sent", sent))
            for stage, value in zip(STAGES, values)}


def train(mesh, config, stage, broken):
    """([bytes of weights, gradients, optimizer], bytes sent, calls, [seconds], loss) of a few steps."""
    stage = {("unsharded-optimizer", 1): 0, ("gradients-kept", 2): 1}.get((broken, stage), stage)
    flags = make_train_flags(dtype="bfloat16", grad_dtype="bfloat16", zero=stage)
    free = (lambda unit: None) if broken == "never-freed" else FSDPParamGroup.reshard
    with mock.patch.object(FSDPParamGroup, "reshard", free):
        replica = TrainStage(config, flags, mesh)
        _, *steps = [step(mesh, replica) for _ in range(STEPS)]
    helds, rows, seconds = zip(*steps)                               # helds (steps, 2 moments, 3 kinds)
    held = comm.all_reduce(torch.tensor(helds).amax((0, 1)), mesh.data, op="max").tolist()
    loss = comm.all_reduce(replica.loss, mesh.data).item()
    return held, sum(row.payload_bytes for row in rows[-1]), len(rows[-1]), seconds, loss


def step(mesh, replica):
    """([bytes held by kind] at two moments, the ledger's rows of weights and gradients, seconds) of one."""
    batches, held = share(mesh), []
    [count] = count_valid_tokens(batches, mesh.data)
    comm.barrier(mesh.data)
    mesh.comm_log.take_records()
    begin = time.monotonic()
    replica.begin_step(batches, count, lr=1e-3)
    for instruction in gradient_accumulation_schedule(MICRO_BATCHES):
        execute_schedule([instruction], replica)
        if instruction in (Backward(0), ReduceGrads()):
            held.append(held_by(replica))
    rows = [row for row in mesh.comm_log.take_records() if row.tag in ("weights", "grads")]
    if mesh.device == "cuda":
        torch.cuda.synchronize()
    comm.barrier(mesh.data)
    return held, rows, time.monotonic() - begin


def share(mesh):
    """This rank's micro-batches, (B, T) each: the same tokens in every step."""
    draw = torch.Generator().manual_seed(mesh.data.rank)
    x, y = torch.randint(257, (2, MICRO_BATCHES * SEQUENCES, T), generator=draw).to(mesh.device)
    return list(map(Batch, x.split(SEQUENCES), y.split(SEQUENCES)))


def held_by(replica):
    """Bytes of [weights, gradients, optimizer with masters], each storage once."""
    shared = replica.parallel_model.chunks[0].data_parallel
    if reducer := getattr(shared, "reducer", None):                  # ZeRO's
        filling = [bucket.flat_grads for bucket in reducer.buckets if bucket.flat_grads is not None]
        gradients = [*reducer.grads.values(), *filling]
    else:
        gradients = [bucket.flat_grads for bucket in shared.buckets]
    return [nbytes(tensors) for tensors in (replica.parallel_model.chunks[0].model.parameters(), gradients,
                                            replica.optimizer.state_dict().values())]


def nbytes(tensors):
    """Bytes of the storages behind `tensors`: none once what they held is freed."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
