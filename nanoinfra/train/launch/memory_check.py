"""Will the run's memory be had? formulas/footprint.py says what each rank holds, the machine what there is.

Refused is only what exceeds all that the machine, or the card, has. The numbers are modelled: tensors are
counted, the process was measured once, as the constants here say, and so was the heap
(formulas/footprint.py).
"""
import functools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nanoinfra.config import SIZES, ModelConfig, sized
from nanoinfra.distributed.host_memory import free_memory, host_memory, resident_peak
from nanoinfra.formulas.footprint import Layout, Recipe, footprint, heap_rest
from nanoinfra.train.config import TrainFlags, check, micro_batches, plan_mesh
from nanoinfra.train.freeze import frozen_names

PROCESS, LIBRARIES = 260 << 20, 150 << 20    # of a rank without tensors; what a machine's ranks share of it
CONTEXT = 600 << 20                          # of a rank on its card: CUDA's, cuBLAS's and NCCL's own
PLACE = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")                       # torchrun's variables
STDLIB = 12 << 20                            # text of the embedded corpus


def check_memory(flags: TrainFlags, world: int, config: ModelConfig | None = None) -> None:
    """Raise ValueError, with flags that would fit, where this machine cannot hold its ranks of the run.

    `config` is the model's where --model names weights: of those nothing is known until they are opened. Then
    `flags` must say how long a sample is.
    """
    config = config or drawn_config(flags)
    if config is None or (there := capacity(flags)) is None:
        return
    parts = need(flags, world, config)
    if sum(parts.values()) > there:
        where = "this machine" if flags.mesh.device == "cpu" else "a card"
        raise ValueError(f"the run would hold {_gb(sum(parts.values()))} (modelled: {_largest(parts)}), and "
                         f"{where} has {_gb(there)}; {_remedy(flags, world, config, there)}")


def describe_memory(flags: TrainFlags, world: int, config: ModelConfig) -> str:
    """What this machine's ranks hold together, as the line that introduces a run says it."""
    parts, there, many = need(flags, world, config), capacity(flags), len(ranks_here(flags, world)) > 1
    of, total = f" of {there / 1e9:,.1f}" if there else "", sum(parts.values())
    return (f"{'ranks hold' if many else 'holds'} {total / 1e9:,.1f}{of} GB{_others(flags, world, total)}, "
            f"modelled: {_largest(parts)}")


def need(flags: TrainFlags, world: int, config: ModelConfig) -> dict[str, int]:
    """Bytes that the ranks on this machine hold together, by part; with GPUs, that this rank's card holds."""
    total = Counter(libraries=LIBRARIES) if flags.mesh.device == "cpu" else Counter()
    for rank in ranks_here(flags, world):
        total.update(rank_parts(flags, world, config, rank))
    return dict(total)


def rank_parts(flags: TrainFlags, world: int, config: ModelConfig, rank: int = 0) -> dict[str, int]:
    """Bytes that a rank holds at its worst moment, by part, but for the libraries that it shares."""
    mesh = plan_mesh(flags.mesh, world)
    stage = rank // (world // mesh["pp"])                                # pp is the outermost axis
    what = config, layout(flags, mesh), recipe(flags, mesh["dp"], config), stage
    parts = footprint(*what)
    if flags.mesh.device == "cuda":
        return parts | {"data": 0, "processes": CONTEXT}
    text = text_bytes(flags.data.data)
    training = parts | {"fragmentation": heap_rest(*what), "text": text, "processes": PROCESS}
    reading = {"text": 2 * text, "processes": PROCESS}                     # once as read, once in documents
    return max(training, reading, key=lambda each: sum(each.values()))


def layout(flags: TrainFlags, mesh: dict[str, int]) -> Layout:
    """How the flags cut the model, over `mesh` as `plan_mesh` gives it."""
    sp = "none" if not flags.mesh.sp else "keep" if flags.mesh.sp_keep else "gather"
    return Layout(mesh["pp"], mesh["dp"], mesh["tp"], sp, flags.mesh.zero, flags.pipeline.schedule,
                  flags.pipeline.virtual)


def recipe(flags: TrainFlags, dp: int, config: ModelConfig) -> Recipe:
    """What one of `dp` data-parallel ranks does in a step."""
    model, (G, m) = flags.model, micro_batches(flags.data, dp)
    grad_dtype = model.grad_dtype or ("float64" if model.dtype == "float64" else "float32")
    return Recipe(flags.data.seq or config.context, min(flags.data.micro_batch, -(-G // dp)), m, model.dtype,
                  grad_dtype, flags.optimizer.optimizer, model.attention, model.recompute,
                  frozen_names(model.freeze, config))


def drawn_config(flags: TrainFlags) -> ModelConfig | None:
    """The model of a size, its vocabulary the most it may be; None where --model names weights."""
    model = flags.model
    if model.model not in SIZES:
        return None
    return sized(model.model, model.vocab, flags.data.seq, False if model.untied else None)


def ranks_here(flags: TrainFlags, world: int) -> range:
    """The ranks that share this machine's memory; with GPUs, the one that has this card."""
    if not os.environ.keys() >= set(PLACE):                              # none has been started yet
        return range(1 if flags.mesh.device == "cuda" else world)
    rank, place, many = (int(os.environ[name]) for name in PLACE)
    return range(rank, rank + 1) if flags.mesh.device == "cuda" else range(rank - place, rank - place + many)


def capacity(flags: TrainFlags) -> int | None:
    """Bytes that this machine, or this rank's card, has in all; None where that cannot be known."""
    if flags.mesh.device == "cpu":
        return host_memory()
    import torch
    card = int(os.environ.get("LOCAL_RANK", 0))                          # asked without a context of its own
    return torch.cuda.get_device_properties(card).total_memory if card < torch.cuda.device_count() else None


@functools.cache
def text_bytes(data: str | Path) -> int:
    """Bytes of the text that --data names, which a rank keeps besides its tokens. What is not there has 0."""
    if str(data) in ("random", "stdlib"):
        return STDLIB if str(data) == "stdlib" else 0
    path = Path(data)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def changed(flags: TrainFlags, **values) -> TrainFlags:
    """`flags` with other values, given by a flag's name."""
    for group in ("model", "data", "mesh"):
        part = getattr(flags, group)
        mine = {name: value for name, value in values.items() if hasattr(part, name)}
        flags = replace(flags, **{group: replace(part, **mine)})
    return flags


def remedies(flags: TrainFlags, dp: int, context: int) -> Iterator[dict]:
    """Other values of flags that need less, the harmless first: those above "bfloat16" keep the losses."""
    G, _ = micro_batches(flags.data, dp)
    half = [{"micro_batch": flags.data.micro_batch >> k, "global_batch": G}
            for k in range(1, flags.data.micro_batch.bit_length())]
    zero = [{"zero": stage} for stage in range(flags.mesh.zero + 1, 4 if dp > 1 else 0)]
    less = {"recompute": "full"} | ({"attention": "sdpa"} if flags.model.attention == "naive" else {})
    least = less | (half[-1] if half else {})
    yield from ({"attention": "sdpa"}, {"recompute": "full"}, *zero, *half)
    yield from (less | each for each in (*half, *zero))
    yield from (least | each for each in (*zero, {"dtype": "bfloat16"}))
    yield from _smaller(flags, G, flags.data.seq or context)


def _smaller(flags, G, seq):
    """Runs of less: shorter samples, fewer of them, the size's own vocabulary, a smaller size."""
    yield from ({"seq": 1 << k} for k in reversed(range(5, seq.bit_length())) if 1 << k < seq)
    yield from ({"global_batch": G >> k} for k in range(1, G.bit_length()))
    sizes, model = list(SIZES), flags.model
    if model.model in sizes:
        yield {"vocab": min(model.vocab or 0, SIZES[model.model].model.vocab) or None}
        yield from ({"model": name} for name in reversed(sizes[:sizes.index(model.model)]))


def _remedy(flags, world, config, there):
    """The first remedy that fits, in words."""
    dp = plan_mesh(flags.mesh, world)["dp"]
    for values in remedies(flags, dp, config.context):
        other = changed(flags, **values)
        if other != flags and _works(other, world) and _fits(other, world, config, there):
            return "try " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
    return "no other --recompute, --zero, --micro-batch, --dtype or --seq makes it fit; take fewer ranks"


def _works(flags, world):
    try:
        check(flags, world)
    except ValueError:
        return False
    return True


def _fits(flags, world, config, there):
    config = drawn_config(flags) or config
    return sum(need(flags, world, config).values()) <= there


def _others(flags, world, total):
    """A warning where so much is not free at present, besides what the ranks have by now, all alike."""
    free = free_memory() + len(ranks_here(flags, world)) * resident_peak()
    return f" ({_gb(free)} free at present)" if flags.mesh.device == "cpu" and total > free else ""


def _largest(parts):
    """The four largest of them, in words; what is less than can be seen is left out."""
    first = sorted(parts.items(), key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {_gb(n)}" for name, n in first if n >= 0.05e9)


def _gb(n):
    return f"{n / 1e9:,.1f} GB"
