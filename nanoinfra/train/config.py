"""The flags of `nanoinfra train`, in five groups. No torch here: `--help` must answer at once.

Not every combination has to exist at once; `check` refuses one that does not, with the reason, before any
rank starts. Sizes, learning rates and contexts that are not given follow from --model.
"""
import os
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from nanoinfra.config import SIZES
from nanoinfra.data.token_cache import check_cache
from nanoinfra.distributed.mesh_check import check_fits
from nanoinfra.formulas.pipeline import split
from nanoinfra.formulas.tensor_parallel import check_heads
from nanoinfra.parallel.pipeline import schedules

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]              # a group's flags carry no prefix
FINE_TUNING_LR = 1e-4                                    # where weights are given, and no --lr
Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelFlags:
    """The model."""
    model: str = "nano"                                  # a size (see README), a folder, smollm2-135m
    vocab: int | None = None                             # vocabulary; default: the size's
    untied: bool = False                                 # give the head weights of its own
    attention: Literal["naive", "sdpa"] = "sdpa"         # naive writes the T x T scores to memory
    recompute: Literal["none", "selective", "full"] = "none"  # what to run again in backward, not keep
    dtype: Dtype = "float32"                             # to compute in; 16 bits have float32 masters
    grad_dtype: Dtype | None = None                      # to sum gradients in; default: at least float32
    freeze: tuple[str, ...] = ()                         # parameters to leave as they are: 'embed.*', ...
    seed: int = 0                                        # of weights and of the order of samples


@dataclass(frozen=True)
class DataFlags:
    """The data."""
    data: str = "stdlib"                                 # stdlib, random, a text file, or a folder of them
    seq: int | None = None                               # tokens in a sample; default: the model's context
    micro_batch: int = 8                                 # sequences a data-parallel rank runs at once
    global_batch: int | None = None                      # sequences in one step; default: micro-batch x dp


@dataclass(frozen=True)
class MeshFlags:
    """The mesh: world = pp x dp x cp x tp ranks."""
    nproc: int | None = None                             # ranks to start here; default: product of the axes
    dp: int | None = None                                # data parallel; default: ranks / (pp x cp x tp)
    pp: int = 1                                          # pipeline parallel
    cp: int = 1                                          # context parallel
    tp: int = 1                                          # tensor parallel
    sp: bool = False                                     # cut the stream between matrices by tokens, over tp
    sp_keep: bool = False                                # keep what --sp gathers; else gather it in backward
    zero: Literal[0, 1, 2, 3] = 0                        # cut over dp: 1 optimizer, 2 gradients, 3 weights
    data_parallel: Literal["each", "buckets", "overlap"] = "overlap"  # when gradients leave, at --zero 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None                           # a rank; default: OMP_NUM_THREADS, or cores / ranks
    wire: tuple[str, ...] = ()                           # emulate AXIS=LATENCY,BANDWIDTH, in s and bytes/s


@dataclass(frozen=True)
class PipelineFlags:
    """The pipeline, with --pp 2 or more."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1"] = "1f1b"  # who works when
    virtual: int = 1                                     # chunks of layers a stage has, when interleaved


@dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = None                              # peak; default: the size's
    warmup: int = 10                                     # steps of linear warm-up
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    min_lr: float | None = None                          # where cosine ends; default: a tenth of the peak
    betas: tuple[float, float] | None = None             # adamw's decay of its moments; default: 0.9 0.95
    weight_decay: float | None = None                    # adamw's, of matrices alone; default: 0.1
    clip: float = 1.0                                    # largest global gradient norm; 0: never clip


@dataclass(frozen=True)
class RunFlags:
    """The run."""
    steps: int = 100                                     # optimizer steps
    seconds: float | None = None                         # train so long instead, saves and scores apart
    eval_every: int = 0                                  # held-out score every N steps and at end; 0: none
    save_every: int = 0                                  # checkpoint every N steps, besides the one at end
    keep: int = 2                                        # checkpoints kept
    out: Path = Path("runs/train")                       # run directory
    resume: bool = False                                 # go on from the newest good checkpoint in --out
    resume_from: int | None = None                       # go on from this step's; later ones are set aside
    trace: Path | None = None                            # write a Perfetto timeline, one row a rank
    max_restarts: int = 0                                # start failed ranks again, from the last checkpoint
    timeout: float = 600                                 # seconds until a rank that does not come is lost


@dataclass(frozen=True)
class TrainFlags:
    """Train a decoder, on one rank or many; the losses do not depend on the mesh."""
    model: Flat[ModelFlags] = field(default_factory=ModelFlags)
    data: Flat[DataFlags] = field(default_factory=DataFlags)
    mesh: Flat[MeshFlags] = field(default_factory=MeshFlags)
    pipeline: Flat[PipelineFlags] = field(default_factory=PipelineFlags)
    optimizer: Flat[OptimizerFlags] = field(default_factory=OptimizerFlags)
    run: Flat[RunFlags] = field(default_factory=RunFlags)


def plan_mesh(flags: MeshFlags, world: int) -> dict[str, int]:
    """{"pp":, "dp":, "cp":, "tp":} for `world` ranks. Raises ValueError where they do not fit."""
    if flags.cp != 1:
        raise ValueError(f"--cp {flags.cp}: context parallelism is not built yet; use --cp 1, --dp {world}")
    dp = flags.dp if flags.dp is not None else max(1, world // max(1, flags.pp * flags.cp * flags.tp))
    check_fits(world, flags.pp, dp, flags.cp, flags.tp)
    return {"pp": flags.pp, "dp": dp, "cp": flags.cp, "tp": flags.tp}


def ranks_wanted(flags: MeshFlags) -> int:
    """How many ranks to start here: --nproc, or the product of the axes that are named."""
    product = (flags.dp or 1) * flags.pp * flags.cp * flags.tp
    world = flags.nproc or product
    if world < 1:
        raise ValueError(f"{world} ranks cannot train; give every axis and --nproc at least 1")
    return world


def parse_wire(wires: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """{"dp": (20e-6, 1e9)} from ("dp=20e-6,1e9",)."""
    result = {}
    for wire in wires:
        try:
            axis, numbers = wire.split("=")
            latency, bandwidth = map(float, numbers.split(","))
        except ValueError:
            raise ValueError(f"--wire {wire!r} is not AXIS=LATENCY,BANDWIDTH; "
                             "try --wire dp=20e-6,1e9") from None
        if axis not in ("pp", "dp", "cp", "tp") or latency < 0 or bandwidth <= 0:
            raise ValueError(f"--wire {wire!r}: the axis is pp, dp, cp or tp, latency is at least 0 s and "
                             "bandwidth more than 0 bytes/s; try --wire dp=20e-6,1e9")
        result[axis] = latency, bandwidth
    return result


def check(flags: TrainFlags, world: int) -> None:
    """Raise ValueError for what can be seen to be wrong before any rank starts or any data is read."""
    mesh = plan_mesh(flags.mesh, world)
    parse_wire(flags.mesh.wire)
    _check_memory(flags)
    at_least = {"--micro-batch": (flags.data.micro_batch, 1), "--global-batch": (flags.data.global_batch, 1),
                "--seq": (flags.data.seq, 1), "--steps": (flags.run.steps, 1), "--keep": (flags.run.keep, 1),
                "--threads": (flags.mesh.threads, 1), "--vocab": (flags.model.vocab, 257),
                "--warmup": (flags.optimizer.warmup, 0), "--clip": (flags.optimizer.clip, 0),
                "--lr": (flags.optimizer.lr, 0), "--min-lr": (flags.optimizer.min_lr, 0),
                "--weight-decay": (flags.optimizer.weight_decay, 0),
                "--eval-every": (flags.run.eval_every, 0), "--save-every": (flags.run.save_every, 0),
                "--resume-from": (flags.run.resume_from, 1),
                "--max-restarts": (flags.run.max_restarts, 0), "--timeout": (flags.run.timeout, 1)}
    for flag, (value, least) in at_least.items():
        if value is not None and value < least:
            raise ValueError(f"{flag} {value} is too small; give at least {least}")
    if flags.run.seconds is not None and flags.run.seconds <= 0:
        raise ValueError(f"--seconds {flags.run.seconds} leaves no time for a step; try --seconds 60")
    _check_data(flags.data.data, flags.run)
    _check_model(flags.model, flags.mesh.tp)
    _check_optimizer(flags.optimizer, peak_lr(flags))
    _check_pipeline(flags, mesh["dp"])


def _check_optimizer(flags, peak):
    given = [name for name, value in (("--betas", flags.betas), ("--weight-decay", flags.weight_decay))
             if value is not None]
    if flags.optimizer == "sgd" and given:
        raise ValueError(f"{' and '.join(given)}: of AdamW's step, and --optimizer sgd is plain; leave it "
                         "out, or use --optimizer adamw")
    if flags.betas and not all(0 <= beta < 1 for beta in flags.betas):
        raise ValueError(f"--betas {flags.betas[0]} {flags.betas[1]}: each is at least 0 and below 1; "
                         "try --betas 0.9 0.95")
    if flags.min_lr is not None and flags.lr_schedule == "constant":
        raise ValueError("--min-lr is where a cosine ends, and --lr-schedule constant does not fall; leave "
                         "one of them out")
    if flags.min_lr is not None and flags.min_lr > peak:
        raise ValueError(f"--min-lr {flags.min_lr} is above the peak, --lr {peak}; give at most that")


def _check_data(data, run):
    if data == "random":
        if run.eval_every:
            raise ValueError(f"--eval-every {run.eval_every} scores text that is held out, and --data random "
                             "has none; leave it out, or give --data stdlib, a text file or a folder")
        return
    if data != "stdlib" and os.path.isdir(data):
        below = os.path.relpath(os.path.realpath(run.out), os.path.realpath(data))
        if below == "." or not any(part.startswith(".") for part in below.split(os.sep)):    # .. and hidden
            raise ValueError(f"--out {run.out} lies in --data {data}, so the run would read what it writes; "
                             "name an --out outside of it")
    check_cache()


def _check_memory(flags):
    if flags.mesh.zero and flags.mesh.data_parallel != "overlap":
        raise ValueError(f"--data-parallel {flags.mesh.data_parallel} is plain data parallelism's, and "
                         f"--zero {flags.mesh.zero} sends buckets as they fill; leave one of them out")
    if flags.model.recompute == "selective" and flags.model.attention != "naive":
        raise ValueError(f"--recompute selective runs naive attention's scores again, and --attention "
                         f"{flags.model.attention} keeps none; use --attention naive, or --recompute full")
    if flags.mesh.sp_keep and not flags.mesh.sp:
        raise ValueError("--sp-keep keeps what sequence parallelism gathers; give --sp too")
    if flags.mesh.sp and flags.mesh.tp == 1:
        raise ValueError("--sp cuts the stream over the ranks of --tp, and --tp is 1; give --tp 2, or leave "
                         "--sp out")


def _check_pipeline(flags, dp):
    pp, zero, kind, v = flags.mesh.pp, flags.mesh.zero, flags.pipeline.schedule, flags.pipeline.virtual
    if pp > 1 and zero > 1:
        raise ValueError(f"--zero {zero} sends gradients or weights with every micro-batch, and a pipeline "
                         f"needs many of them: that is not built for --pp {pp}; use --zero 1, which cuts the "
                         "optimizer's state")
    if kind == "zb-h1" and flags.model.recompute == "full":
        raise ValueError("--recompute full runs a block again in backward, and --schedule zb-h1 has two of "
                         "those; use --recompute none, or --schedule 1f1b")
    _, m = micro_batches(flags.data, dp)
    schedules.check(kind, pp, m, v)
    if flags.model.model in SIZES:
        split(SIZES[flags.model.model].model, pp * v, flags.data.seq or 1)


def _check_model(flags, tp):
    if flags.model in SIZES:
        check_heads(SIZES[flags.model].model, tp)
        return
    if flags.model != "smollm2-135m" and not Path(flags.model).exists():
        close = get_close_matches(flags.model, [*SIZES, "smollm2-135m"], n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--model {flags.model!r} is neither a size ({', '.join(SIZES)}), nor smollm2-135m, "
                         f"nor a folder or .gguf file that is there{meant}")
    if flags.vocab or flags.untied:
        raise ValueError(f"--vocab and --untied shape a model that is drawn; {flags.model} has its shape "
                         "already: leave them out")


def peak_lr(flags: TrainFlags) -> float:
    """--lr, or the size's own; of given weights FINE_TUNING_LR."""
    size = SIZES.get(flags.model.model)
    usual = size.lr if size else FINE_TUNING_LR
    return usual if flags.optimizer.lr is None else flags.optimizer.lr


def micro_batches(flags: DataFlags, dp: int) -> tuple[int, int]:
    """(global batch G, micro-batches a step m = ceil(G / (M dp)))."""
    G = flags.global_batch or flags.micro_batch * dp
    return G, ceil(G / (flags.micro_batch * dp))


def to_json(flags: TrainFlags) -> dict:
    """Every flag by group and name, in JSON's types."""
    return {group.name: {f.name: str(v) if isinstance(v := getattr(part, f.name), Path) else v
                         for f in fields(part)}
            for group in fields(flags) for part in [getattr(flags, group.name)]}
