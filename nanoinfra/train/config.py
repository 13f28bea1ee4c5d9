"""The flags of `nanoinfra train`, in eight groups; no torch is imported, so that `--help` answers at once.

`check_train_flags` refuses a value that cannot be, and then, before any rank starts, each combination that
one of the techniques in train/refusals/techniques.py refuses. Sizes, learning rates and contexts that are not
given follow from --model.
"""
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import tyro

from nanoinfra.config import MODEL_SIZES, ModelConfig, config_for_size
from nanoinfra.data.tokenizer_and_token_cache import make_cache_folder
from nanoinfra.distributed.check_mesh_size import check_mesh_size
from nanoinfra.train.refusals import techniques

_Flat = tyro.conf.OmitArgPrefixes              # a group's flags have no prefix; --help shows it in a box
_FINE_TUNING_LR = 1e-4  # the peak learning rate when --model names weights and --lr is not given
_DtypeName = Literal["float64", "float32", "bfloat16", "float16"]
_SMALLEST_VALUES = {"dp": 1, "pp": 1, "cp": 1, "tp": 1, "micro_batch": 1, "global_batch": 1, "seq": 1,
                    "steps": 1, "keep_checkpoints": 1, "threads": 1, "vocab": 257, "warmup": 0, "clip": 0,
                    "lr": 0, "min_lr": 0, "weight_decay": 0, "eval_every": 0, "save_every": 0,
                    "resume_from": 1, "max_restarts": 0, "timeout": 1}


@dataclass(frozen=True)
class ModelFlags:
    """The model, and the numbers it computes in."""
    model: str = "nano"  # a size (table in README), a run directory, a Hugging Face folder, smollm2-135m
    vocab: int | None = None  # vocabulary size of a model that is drawn; default: the size's
    untied: bool = False  # give the output head weights of its own, not those of the embedding
    attention: Literal["naive", "sdpa"] = "sdpa"  # naive writes the T x T scores to memory
    dtype: _DtypeName = "float32"  # to compute in; 16-bit types have float32 master weights
    grad_dtype: _DtypeName | None = None  # to sum gradients in; default: at least float32
    freeze: tuple[str, ...] = ()  # parameters that are not trained, by name patterns: 'embed.*' 'blocks.0.*'
    seed: int = 0  # of the initial weights and of the order of samples


@dataclass(frozen=True)
class DataFlags:
    """The data and the batch."""
    data: str = "stdlib"  # stdlib (Python's library), random (tokens), a text file, or a folder of text files
    seq: int | None = None  # sequence length: tokens in a sample; default: the model's context
    micro_batch: int = 8  # sequences in one forward pass of a data-parallel rank
    global_batch: int | None = None  # sequences in one optimizer step; default: micro-batch x dp


@dataclass(frozen=True)
class AxesFlags:
    """The axes of the mesh: world = pp x dp x cp x tp ranks."""
    dp: int | None = None  # data-parallel size; default: ranks / (pp x cp x tp)
    pp: int = 1  # pipeline-parallel size
    cp: int = 1  # context-parallel size
    tp: int = 1  # tensor-parallel size
    sp: bool = False  # sequence parallel: shard activations between the matrices by tokens, over tp
    # how --zero 0 all-reduces gradients: each parameter's alone, in buckets, in buckets that overlap backward
    grad_sync: Literal["each", "buckets", "overlap"] = "overlap"


@dataclass(frozen=True)
class MemoryFlags:
    """Memory: what is sharded, and what is computed again instead of being kept."""
    zero: Literal[0, 1, 2, 3] = 0  # shard over dp: 1 optimizer state, 2 also gradients, 3 also weights
    recompute: Literal["none", "selective", "full"] = "none"  # activation checkpointing: what to recompute
    sp_save_gathered: bool = False  # save what --sp gathers for backward, do not gather it again


@dataclass(frozen=True)
class PipelineFlags:
    """The pipeline, with --pp 2 or more."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1"] = "1f1b"  # the order of forward and backward
    virtual_stages: int = 1  # model chunks of each stage, for --schedule interleaved


@dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer and its learning rate."""
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
    """The run: how long it is, what it saves, and where."""
    steps: int = 100  # optimizer steps
    max_seconds: float | None = None  # train this long instead; saving and evaluating do not count
    eval_every: int = 0  # evaluate on held-out text every N steps and at the end; 0: never
    save_every: int = 0  # save a checkpoint every N steps, besides the one at the end
    keep_checkpoints: int = 2  # keep this many of the newest checkpoints
    out: Path = Path("runs/train")  # run directory: metrics.jsonl, checkpoints, config.json
    resume: bool = False  # resume from the newest good checkpoint in --out
    resume_from: int | None = None  # resume from the checkpoint of this step; later ones are set aside
    trace: Path | None = None  # write a Perfetto timeline with one row a rank to this file


@dataclass(frozen=True)
class LaunchFlags:
    """The launch of the ranks, and what they run on."""
    nproc: int | None = None  # ranks to start on this host; default: the product of the axes
    device: Literal["cpu", "cuda"] = "cpu"  # cuda: one GPU a rank
    threads: int | None = None  # CPU threads of a rank; default: OMP_NUM_THREADS, or cores / ranks
    emulate_link: tuple[str, ...] = ()  # slow an axis down: AXIS=LATENCY,BANDWIDTH in seconds and bytes/s
    max_restarts: int = 0  # restart all ranks from the last checkpoint, this many times, when one fails
    timeout: float = 600  # seconds until a rank that does not enter a collective counts as lost


@dataclass(frozen=True)
class TrainFlags:
    """Train a decoder, on one rank or many; the losses do not depend on the mesh."""
    model: _Flat[ModelFlags] = field(default_factory=ModelFlags)
    data: _Flat[DataFlags] = field(default_factory=DataFlags)
    axes: _Flat[AxesFlags] = field(default_factory=AxesFlags)
    memory: _Flat[MemoryFlags] = field(default_factory=MemoryFlags)
    pipeline: _Flat[PipelineFlags] = field(default_factory=PipelineFlags)
    optimizer: _Flat[OptimizerFlags] = field(default_factory=OptimizerFlags)
    run: _Flat[RunFlags] = field(default_factory=RunFlags)
    launch: _Flat[LaunchFlags] = field(default_factory=LaunchFlags)


def mesh_axis_sizes(axes: AxesFlags, world_size: int) -> dict[str, int]:
    """Return {"pp":, "dp":, "cp":, "tp":} for `world_size` ranks. Raises ValueError when they do not fit."""
    dp = data_parallel_size(axes, world_size)
    check_mesh_size(world_size, axes.pp, dp, axes.cp, axes.tp)
    return {"pp": axes.pp, "dp": dp, "cp": axes.cp, "tp": axes.tp}


def data_parallel_size(axes: AxesFlags, world_size: int) -> int:
    """Return --dp, or what the other axes leave of `world_size` ranks, at least 1."""
    return axes.dp if axes.dp is not None else max(1, world_size // max(1, axes.pp * axes.cp * axes.tp))


def num_ranks_to_start(axes: AxesFlags, nproc: int | None) -> int:
    """Return the number of ranks to start on this host: --nproc, or the product of the named axes."""
    product = (axes.dp or 1) * axes.pp * axes.cp * axes.tp
    world = nproc or product
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
    parse_emulated_links(flags.launch.emulate_link)
    given = flags_by_name(flags)
    for name, least in _SMALLEST_VALUES.items():
        if given[name] is not None and given[name] < least:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} is too small; give at least {least}")
    if flags.run.max_seconds is not None and flags.run.max_seconds <= 0:
        raise ValueError(f"--max-seconds {flags.run.max_seconds} leaves no time for a step; "
                         "try --max-seconds 60")
    _check_folders(flags.data.data, flags.run.out)
    _check_model(flags.model.model)
    check_combinations(flags, world_size)
    mesh_axis_sizes(flags.axes, world_size)


def check_combinations(flags: TrainFlags, world_size: int, model_config: ModelConfig | None = None) -> None:
    """Raise ValueError with the first reason of `refused_combinations`, which takes the same arguments."""
    if reason := next(refused_combinations(flags, world_size, model_config), None):
        raise ValueError(reason)


def refused_combinations(flags: TrainFlags, world_size: int,
                         model_config: ModelConfig | None = None) -> Iterator[str]:
    """Yield the reason of every technique that refuses to be combined as `flags` say, on `world_size` ranks.

    `model_config` is that of weights which --model names, where they have been opened. All techniques see one
    namespace of flags by name, in which dp, lr and global_batch have values where none was given, with
    `num_micro_batches` of a step, `world_size`, and `model_config`, which is None where it is not known yet.
    """
    dp = data_parallel_size(flags.axes, world_size)
    G, m = global_batch_and_num_micro_batches(flags.data, dp)
    return techniques.technique_refusals(SimpleNamespace(**flags_by_name(flags) | {
        "dp": dp, "lr": peak_learning_rate(flags), "global_batch": G, "num_micro_batches": m,
        "world_size": world_size, "model_config": model_config or config_of_named_size(flags)}))


def _check_folders(data, out):
    if data == "random":
        return
    if data != "stdlib" and os.path.isdir(data):
        below = os.path.relpath(os.path.realpath(out), os.path.realpath(data))
        if below == "." or not any(part.startswith(".") for part in below.split(os.sep)):    # .. and hidden
            raise ValueError(f"--out {out} lies in --data {data}, so the run would read what it writes; "
                             "name an --out outside of it")
    make_cache_folder()


def _check_model(name):
    if name not in (*MODEL_SIZES, "smollm2-135m") and not Path(name).exists():
        close = get_close_matches(name, [*MODEL_SIZES, "smollm2-135m"], n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"--model {name!r} is neither a size ({', '.join(MODEL_SIZES)}), nor "
                         f"smollm2-135m, nor a folder or .gguf file that is there{meant}")


def config_of_named_size(flags: TrainFlags) -> ModelConfig | None:
    """The model of a named size, with the largest vocabulary it may get; None when --model names weights."""
    model = flags.model
    if model.model not in MODEL_SIZES:
        return None
    return config_for_size(model.model, model.vocab, flags.data.seq, False if model.untied else None)


def peak_learning_rate(flags: TrainFlags) -> float:
    """Return --lr; by default the size's own rate, or 1e-4 when --model names weights."""
    size = MODEL_SIZES.get(flags.model.model)
    usual = size.lr if size else _FINE_TUNING_LR
    return usual if flags.optimizer.lr is None else flags.optimizer.lr


def global_batch_and_num_micro_batches(flags: DataFlags, dp: int) -> tuple[int, int]:
    """Return the global batch G and the micro-batches of a step, m = ceil(G / (M dp))."""
    G = flags.global_batch or flags.micro_batch * dp
    return G, ceil(G / (flags.micro_batch * dp))


def group_by_flag() -> dict[str, str]:
    """Return {flag: the field of TrainFlags whose group holds it}."""
    return {flag.name: group.name for group in fields(TrainFlags) for flag in fields(group.default_factory)}


def make_train_flags(**values: object) -> TrainFlags:
    """Return the flags with `values`, given by the names of flags, and defaults: make_train_flags(tp=2)."""
    return replace_flags(TrainFlags(), **values)


def replace_flags(flags: TrainFlags, **values: object) -> TrainFlags:
    """Return `flags` with other `values`, given by names of flags. Raises ValueError for an unknown name."""
    groups = group_by_flag()
    if unknown := values.keys() - groups.keys():
        raise ValueError(f"no flag is named {', '.join(sorted(unknown))}; see nanoinfra train --help")
    for group in {groups[name] for name in values}:
        own = {name: value for name, value in values.items() if groups[name] == group}
        flags = replace(flags, **{group: replace(getattr(flags, group), **own)})
    return flags


def flags_by_name(flags: TrainFlags) -> dict[str, object]:
    """Return {flag: value} of all groups; no two groups have a flag of one name."""
    return {name: getattr(getattr(flags, group), name) for name, group in group_by_flag().items()}


def flags_to_dict(flags: TrainFlags) -> dict:
    """Return {group: {flag: value}} with values that JSON can hold."""
    return {group.name: {f.name: str(v) if isinstance(v := getattr(part, f.name), Path) else v
                         for f in fields(part)}
            for group in fields(flags) for part in [getattr(flags, group.name)]}
