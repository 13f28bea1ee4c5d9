"""The memory check: has this machine, or each GPU, the memory that formulas/training_peak_memory.py predicts?

Refused is only what exceeds all that the machine, or the card, has. The numbers are modelled: tensors are
counted, the process was measured once, as the constants here say, and so was the heap
(formulas/training_peak_memory.py).
"""
import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nanoinfra.config import MODEL_SIZES, ModelConfig
from nanoinfra.distributed.host_memory import available_memory_bytes, host_memory_limit_bytes, peak_rss_bytes
from nanoinfra.formulas.training_peak_memory import (
    ParallelLayout,
    TrainingStepConfig,
    heap_fragmentation_bytes,
    peak_memory_by_part,
)
from nanoinfra.train.config import (
    TrainFlags,
    check_train_flags,
    config_of_named_size,
    global_batch_and_num_micro_batches,
    mesh_axis_sizes,
    replace_flags,
)
from nanoinfra.train.frozen_parameters import frozen_parameter_names

# of a rank without tensors; what a machine's ranks share of it
_PROCESS_BYTES = 260 << 20                   # of a rank process, without its tensors
_SHARED_LIBRARIES_BYTES = 150 << 20          # that the processes of a machine share
_CUDA_CONTEXT_BYTES = 600 << 20              # of a rank on its GPU: CUDA's, cuBLAS's and NCCL's own
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")             # torchrun's variables
_STDLIB_TEXT_BYTES = 12 << 20                # text of the embedded corpus


def check_memory_fits(flags: TrainFlags, world_size: int, config: ModelConfig | None = None) -> None:
    """Raise ValueError, with flags that would fit, when this machine cannot hold its ranks of the run.

    `config` must be given once weights that --model names have been opened; before that their size is not
    known and nothing is checked. `flags` must then contain the sequence length.
    """
    config = config or config_of_named_size(flags)
    if config is None or (there := memory_capacity_bytes(flags)) is None:
        return
    parts = machine_memory_by_part(flags, world_size, config)
    if sum(parts.values()) > there:
        where = "this machine" if flags.launch.device == "cpu" else "a card"
        raise ValueError(f"the run would hold {_gb(sum(parts.values()))} (modelled: {_largest(parts)}), and "
                         f"{where} has {_gb(there)}; {_remedy(flags, world_size, config, there)}")


def describe_memory_need(flags: TrainFlags, world_size: int, config: ModelConfig) -> str:
    """The memory that this machine's ranks hold together, in words for the first line of a run."""
    parts, there = machine_memory_by_part(flags, world_size, config), memory_capacity_bytes(flags)
    many = len(ranks_sharing_memory(flags, world_size)) > 1
    of, total = f" of {there / 1e9:,.1f}" if there else "", sum(parts.values())
    return (f"{'ranks hold' if many else 'holds'} {total / 1e9:,.1f}{of} GB"
            f"{_others(flags, world_size, total)}, modelled: {_largest(parts)}")


def machine_memory_by_part(flags: TrainFlags, world_size: int, config: ModelConfig) -> dict[str, int]:
    """Bytes that the ranks of this machine hold together, by part; with GPUs, of this rank's GPU."""
    total = Counter(libraries=_SHARED_LIBRARIES_BYTES) if flags.launch.device == "cpu" else Counter()
    for rank in ranks_sharing_memory(flags, world_size):
        total.update(rank_memory_by_part(flags, world_size, config, rank))
    return dict(total)


def rank_memory_by_part(flags: TrainFlags, world_size: int, config: ModelConfig,
                        rank: int = 0) -> dict[str, int]:
    """Bytes that a rank holds at its peak, by part, without the libraries that it shares with others."""
    mesh = mesh_axis_sizes(flags.axes, world_size)
    stage = rank // (world_size // mesh["pp"])                                # pp is the outermost axis
    layout, step = parallel_layout_from_flags(flags, mesh), step_config_from_flags(flags, mesh["dp"], config)
    what = config, layout, step, stage
    parts = peak_memory_by_part(*what)
    if flags.launch.device == "cuda":
        return parts | {"data": 0, "processes": _CUDA_CONTEXT_BYTES}
    text = data_text_bytes(flags.data.data)
    training = parts | {"fragmentation": heap_fragmentation_bytes(*what), "text": text,
                        "processes": _PROCESS_BYTES}
    reading = {"text": 2 * text, "processes": _PROCESS_BYTES}  # once as read, once in documents
    return max(training, reading, key=lambda each: sum(each.values()))


def parallel_layout_from_flags(flags: TrainFlags, mesh: dict[str, int]) -> ParallelLayout:
    """The flags as a layout for formulas/training_peak_memory.py; `mesh` is from `mesh_axis_sizes`."""
    sp = "none" if not flags.axes.sp else "keep" if flags.memory.sp_save_gathered else "gather"
    return ParallelLayout(mesh["pp"], mesh["dp"], mesh["tp"], sp, flags.memory.zero, flags.pipeline.schedule,
                          flags.pipeline.virtual_stages)


def step_config_from_flags(flags: TrainFlags, dp: int, config: ModelConfig) -> TrainingStepConfig:
    """The work of one of `dp` data-parallel ranks in a step, for formulas/training_peak_memory.py."""
    model, (G, m) = flags.model, global_batch_and_num_micro_batches(flags.data, dp)
    grad_dtype = model.grad_dtype or ("float64" if model.dtype == "float64" else "float32")
    return TrainingStepConfig(flags.data.seq or config.context, min(flags.data.micro_batch, -(-G // dp)), m,
                              model.dtype,
                              grad_dtype, flags.optimizer.optimizer, model.attention, flags.memory.recompute,
                              frozen_parameter_names(model.freeze, config))


def ranks_sharing_memory(flags: TrainFlags, world_size: int) -> range:
    """The ranks that share this machine's memory; with GPUs, the one rank of this GPU."""
    if not os.environ.keys() >= set(_RANK_VARIABLES):                              # none has been started yet
        return range(1 if flags.launch.device == "cuda" else world_size)
    rank, place, many = (int(os.environ[name]) for name in _RANK_VARIABLES)
    first = rank - place
    return range(rank, rank + 1) if flags.launch.device == "cuda" else range(first, first + many)


def memory_capacity_bytes(flags: TrainFlags) -> int | None:
    """The total memory of this machine, or of this rank's GPU; None when it cannot be known."""
    if flags.launch.device == "cpu":
        return host_memory_limit_bytes()
    import torch
    card = int(os.environ.get("LOCAL_RANK", 0))                          # asked without a context of its own
    return torch.cuda.get_device_properties(card).total_memory if card < torch.cuda.device_count() else None


@functools.cache
def data_text_bytes(data: str | Path) -> int:
    """Bytes of the text that --data names, which a rank keeps besides its tokens; 0 for a missing file."""
    if str(data) in ("random", "stdlib"):
        return _STDLIB_TEXT_BYTES if str(data) == "stdlib" else 0
    path = Path(data)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def memory_saving_flags(flags: TrainFlags, dp: int, context: int) -> Iterator[dict]:
    """Yield {flag: value} that need less memory, least harmful first; before "bfloat16" they keep losses."""
    G, _ = global_batch_and_num_micro_batches(flags.data, dp)
    half = [{"micro_batch": flags.data.micro_batch >> k, "global_batch": G}
            for k in range(1, flags.data.micro_batch.bit_length())]
    zero = [{"zero": stage} for stage in range(flags.memory.zero + 1, 4 if dp > 1 else 0)]
    less = {"recompute": "full"} | ({"attention": "sdpa"} if flags.model.attention == "naive" else {})
    least = less | (half[-1] if half else {})
    yield from ({"attention": "sdpa"}, {"recompute": "full"}, *zero, *half)
    yield from (less | each for each in (*half, *zero))
    yield from (least | each for each in (*zero, {"dtype": "bfloat16"}))
    yield from _smaller(flags, G, flags.data.seq or context)


def _smaller(flags, G, seq):
    """Smaller runs: shorter samples, a smaller global batch, the size's own vocabulary, a smaller model."""
    yield from ({"seq": 1 << k} for k in reversed(range(5, seq.bit_length())) if 1 << k < seq)
    yield from ({"global_batch": G >> k} for k in range(1, G.bit_length()))
    sizes, model = list(MODEL_SIZES), flags.model
    if model.model in sizes:
        yield {"vocab": min(model.vocab or 0, MODEL_SIZES[model.model].config.vocab) or None}
        yield from ({"model": name} for name in reversed(sizes[:sizes.index(model.model)]))


def _remedy(flags, world_size, config, there):
    """The first of `memory_saving_flags` that fits, in words."""
    dp = mesh_axis_sizes(flags.axes, world_size)["dp"]
    for values in memory_saving_flags(flags, dp, config.context):
        other = replace_flags(flags, **values)
        if other != flags and _works(other, world_size) and _fits(other, world_size, config, there):
            return "try " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
    return "no other --recompute, --zero, --micro-batch, --dtype or --seq makes it fit; take fewer ranks"


def _works(flags, world_size):
    try:
        check_train_flags(flags, world_size)
    except ValueError:
        return False
    return True


def _fits(flags, world_size, config, there):
    config = config_of_named_size(flags) or config
    return sum(machine_memory_by_part(flags, world_size, config).values()) <= there


def _others(flags, world_size, total):
    """A warning when less memory is free now, besides what the ranks hold already."""
    free = available_memory_bytes() + len(ranks_sharing_memory(flags, world_size)) * peak_rss_bytes()
    return f" ({_gb(free)} free at present)" if flags.launch.device == "cpu" and total > free else ""


def _largest(parts):
    """The four largest parts, in words, without those below 0.05 GB."""
    first = sorted(parts.items(), key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {_gb(n)}" for name, n in first if n >= 0.05e9)


def _gb(n):
    return f"{n / 1e9:,.1f} GB"
