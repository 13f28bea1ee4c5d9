"""The flags of `nanoinfra train`, in six groups; no torch is imported, so that `--help` answers at once.

`check_train_flags` refuses a combination that is not supported, with the reason, before any rank starts.
Sizes, learning rates and contexts that are not given follow from --model.
"""
import os
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from nanoinfra.config import MODEL_SIZES
from nanoinfra.data.tokenizer_and_token_cache import make_cache_folder
from nanoinfra.distributed.check_mesh_size import check_mesh_size
from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.formulas.tensor_parallel import check_tp_fits_model
from nanoinfra.parallel.pipeline import schedules

_T = TypeVar("T")
_Flat = Annotated[_T, tyro.conf.arg(name="")]  # the flags of a group have no prefix
_FINE_TUNING_LR = 1e-4  # the peak learning rate when --model names weights and --lr is not given
_DtypeName = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelFlags:
    """The model."""
    model: str = "nano"  # a size (table in README), a run directory, a Hugging Face folder, smollm2-135m
    vocab: int | None = None  # vocabulary size of a model that is drawn; default: the size's
    untied: bool = False  # give the output head weights of its own, not those of the embedding
    attention: Literal["naive", "sdpa"] = "sdpa"  # naive writes the T x T scores to memory
    recompute: Literal["none", "selective", "full"] = "none"  # activation checkpointing: what to recompute
    dtype: _DtypeName = "float32"  # to compute in; 16-bit types have float32 master weights
    grad_dtype: _DtypeName | None = None  # to sum gradients in; default: at least float32
    freeze: tuple[str, ...] = ()  # parameters that are not trained, by name patterns: 'embed.*' 'blocks.0.*'
    seed: int = 0  # of the initial weights and of the order of samples


@dataclass(frozen=True)
class DataFlags:
    """The data."""
    data: str = "stdlib"  # stdlib (Python's library), random (tokens), a text file, or a folder of text files
    seq: int | None = None  # sequence length: tokens in a sample; default: the model's context
    micro_batch: int = 8  # sequences in one forward pass of a data-parallel rank
    global_batch: int | None = None  # sequences in one optimizer step; default: micro-batch x dp


@dataclass(frozen=True)
class MeshFlags:
    """The mesh: world = pp x dp x cp x tp ranks."""
    nproc: int | None = None  # ranks to start on this host; default: the product of the axes
    dp: int | None = None  # data-parallel size; default: ranks / (pp x cp x tp)
    pp: int = 1  # pipeline-parallel size
    cp: int = 1  # context-parallel size
    tp: int = 1  # tensor-parallel size
    sp: bool = False  # sequence parallel: shard activations between the matrices by tokens, over tp
    sp_save_gathered: bool = False  # save what --sp gathers for backward, do not gather it again
    zero: Literal[0, 1, 2, 3] = 0  # shard over dp: 1 optimizer state, 2 also gradients, 3 also weights
    # how --zero 0 all-reduces gradients: each parameter's alone, in buckets, in buckets that overlap backward
    grad_sync: Literal["each", "buckets", "overlap"] = "overlap"
    device: Literal["cpu", "cuda"] = "cpu"  # cuda: one GPU a rank
    threads: int | None = None  # CPU threads of a rank; default: OMP_NUM_THREADS, or cores / ranks
    emulate_link: tuple[str, ...] = ()  # slow an axis down: AXIS=LATENCY,BANDWIDTH in seconds and bytes/s


@dataclass(frozen=True)
class PipelineFlags:
    """The pipeline, with --pp 2 or more."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1"] = "1f1b"  # the order of forward and backward
    virtual_stages: int = 1  # model chunks of each stage, for --schedule interleaved


@dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer."""
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd is plain, without momentum
    lr: float | None = None  # peak learning rate; default: the size's
    warmup: int = 10  # steps of linear learning-rate warm-up
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # the learning rate after the warm-up
    min_lr: float | None = None  # learning rate at the end of the cosine; default: a tenth of the peak
    betas: tuple[float, float] | None = None  # decay rates of AdamW's two moments; default: 0.9 0.95
    weight_decay: float | None = None  # AdamW's weight decay, of matrices only; default: 0.1
    clip: float = 1.0  # clip gradients to this global norm; 0: never


@dataclass(frozen=True)
class RunFlags:
    """The run."""
    steps: int = 100  # optimizer steps
    max_seconds: float | None = None  # train this long instead; saving and evaluating do not count
    eval_every: int = 0  # evaluate on held-out text every N steps and at the end; 0: never
    save_every: int = 0  # save a checkpoint every N steps, besides the one at the end
    keep_checkpoints: int = 2  # keep this many of the newest checkpoints
    out: Path = Path("runs/train")  # run directory: metrics.jsonl, checkpoints, config.json
    resume: bool = False  # resume from the newest good checkpoint in --out
    resume_from: int | None = None  # resume from the checkpoint of this step; later ones are set aside
    trace: Path | None = None  # write a Perfetto timeline with one row a rank to this file
    max_restarts: int = 0  # restart all ranks from the last checkpoint, this many times, when one fails
    timeout: float = 600  # seconds until a rank that does not enter a collective counts as lost


@dataclass(frozen=True)
class TrainFlags:
    """Train a decoder, on one rank or many; the losses do not depend on the mesh."""
    model: _Flat[ModelFlags] = field(default_factory=ModelFlags)
    data: _Flat[DataFlags] = field(default_factory=DataFlags)
    mesh: _Flat[MeshFlags] = field(default_factory=MeshFlags)
    pipeline: _Flat[PipelineFlags] = field(default_factory=PipelineFlags)
    optimizer: _Flat[OptimizerFlags] = field(default_factory=OptimizerFlags)
    run: _Flat[RunFlags] = field(default_factory=RunFlags)


def mesh_axis_sizes(flags: MeshFlags, world_size: int) -> dict[str, int]:
    """Return {"pp":, "dp":, "cp":, "tp":} for `world_size` ranks. Raises ValueError when they do not fit."""
    if flags.cp != 1:
        raise ValueError(f"--cp {flags.cp}: context parallelism is not built yet; use --cp 1, "
                         f"--dp {world_size}")
    dp = flags.dp if flags.dp is not None else max(1, world_size // max(1, flags.pp * flags.cp * flags.tp))
    check_mesh_size(world_size, flags.pp, dp, flags.cp, flags.tp)
    return {"pp": flags.pp, "dp": dp, "cp": flags.cp, "tp": flags.tp}


def num_ranks_to_start(flags: MeshFlags) -> int:
    """Return the number of ranks to start on this host: --nproc, or the product of the named axes."""
    product = (flags.dp or 1) * flags.pp * flags.cp * flags.tp
    world = flags.nproc or product
    if world < 1:
        raise ValueError(f"{world} ranks cannot train; give every axis and --nproc at least 1")
    return world


def parse_emulated_links(links: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Parse --emulate-link: {"dp": (20e-6, 1e9)}, in seconds and bytes/s, from ("dp=20e-6,1e9",)."""
    result = {}
    for link in links:
        try:
            axis, numbers = link.split("=")
            latency, bandwidth = map(float, numbers.split(","))
        except ValueError:
            raise ValueError(f"--emulate-link {link!r} is not AXIS=LATENCY,BANDWIDTH; "
                             "try --emulate-link dp=20e-6,1e9") from None
        if axis not in ("pp", "dp", "cp", "tp") or latency < 0 or bandwidth <= 0:
            raise ValueError(f"--emulate-link {link!r}: the axis is pp, dp, cp or tp, latency is at least "
                             "0 s and bandwidth more than 0 bytes/s; try --emulate-link dp=20e-6,1e9")
        result[axis] = latency, bandwidth
    return result


def check_train_flags(flags: TrainFlags, world_size: int) -> None:
    """Raise ValueError for every mistake that can be seen before a rank starts or data is read."""
    mesh = mesh_axis_sizes(flags.mesh, world_size)
    parse_emulated_links(flags.mesh.emulate_link)
    _check_memory(flags)
    at_least = {"--micro-batch": (flags.data.micro_batch, 1), "--global-batch": (flags.data.global_batch, 1),
                "--seq": (flags.data.seq, 1), "--steps": (flags.run.steps, 1),
                "--keep-checkpoints": (flags.run.keep_checkpoints, 1),
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
    if flags.run.max_seconds is not None and flags.run.max_seconds <= 0:
        raise ValueError(f"--max-seconds {flags.run.max_seconds} leaves no time for a step; "
                         "try --max-seconds 60")
    _check_data(flags.data.data, flags.run)
    _check_model(flags.model, flags.mesh.tp)
    _check_optimizer(flags.optimizer, peak_learning_rate(flags))
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
    make_cache_folder()


def _check_memory(flags):
    if flags.mesh.zero and flags.mesh.grad_sync != "overlap":
        raise ValueError(f"--grad-sync {flags.mesh.grad_sync} is plain data parallelism's, and "
                         f"--zero {flags.mesh.zero} sends buckets as they fill; leave one of them out")
    if flags.model.recompute == "selective" and flags.model.attention != "naive":
        raise ValueError(f"--recompute selective runs naive attention's scores again, and --attention "
                         f"{flags.model.attention} keeps none; use --attention naive, or --recompute full")
    if flags.mesh.sp_save_gathered and not flags.mesh.sp:
        raise ValueError("--sp-save-gathered keeps what sequence parallelism gathers; give --sp too")
    if flags.mesh.sp and flags.mesh.tp == 1:
        raise ValueError("--sp cuts the stream over the ranks of --tp, and --tp is 1; give --tp 2, or leave "
                         "--sp out")


def _check_pipeline(flags, dp):
    pp, zero = flags.mesh.pp, flags.mesh.zero
    kind, v = flags.pipeline.schedule, flags.pipeline.virtual_stages
    if pp > 1 and zero > 1:
        raise ValueError(f"--zero {zero} sends gradients or weights with every micro-batch, and a pipeline "
                         f"needs many of them: that is not built for --pp {pp}; use --zero 1, which cuts the "
                         "optimizer's state")
    if kind == "zb-h1" and flags.model.recompute == "full":
        raise ValueError("--recompute full runs a block again in backward, and --schedule zb-h1 has two of "
                         "those; use --recompute none, or --schedule 1f1b")
    _, m = global_batch_and_num_micro_batches(flags.data, dp)
    schedules.check_schedule_config(kind, pp, m, v)
    if flags.model.model in MODEL_SIZES:
        split_layers_into_chunks(MODEL_SIZES[flags.model.model].config, pp * v, flags.data.seq or 1)


def _check_model(flags, tp):
    if flags.model in MODEL_SIZES:
        check_tp_fits_model(MODEL_SIZES[flags.model].config, tp)
        return
    if flags.model != "smollm2-135m" and not Path(flags.model).exists():
        close = get_close_matches(flags.model, [*MODEL_SIZES, "smollm2-135m"], n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--model {flags.model!r} is neither a size ({', '.join(MODEL_SIZES)}), nor "
                         f"smollm2-135m, nor a folder or .gguf file that is there{meant}")
    if flags.vocab or flags.untied:
        raise ValueError(f"--vocab and --untied shape a model that is drawn; {flags.model} has its shape "
                         "already: leave them out")


def peak_learning_rate(flags: TrainFlags) -> float:
    """Return --lr; by default the size's own rate, or 1e-4 when --model names weights."""
    size = MODEL_SIZES.get(flags.model.model)
    usual = size.lr if size else _FINE_TUNING_LR
    return usual if flags.optimizer.lr is None else flags.optimizer.lr


def global_batch_and_num_micro_batches(flags: DataFlags, dp: int) -> tuple[int, int]:
    """Return the global batch G and the micro-batches of a step, m = ceil(G / (M dp))."""
    G = flags.global_batch or flags.micro_batch * dp
    return G, ceil(G / (flags.micro_batch * dp))


def flags_to_dict(flags: TrainFlags) -> dict:
    """Return {group: {flag: value}} with values that JSON can hold."""
    return {group.name: {f.name: str(v) if isinstance(v := getattr(part, f.name), Path) else v
                         for f in fields(part)}
            for group in fields(flags) for part in [getattr(flags, group.name)]}
