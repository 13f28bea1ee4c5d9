"""The peak memory of a training rank, by part: modelled bytes that follow from shapes and flags.

The parts are weights, gradients and optimizer states, sharded by tp, pp and ZeRO (formulas/zero.py); saved
activations of each micro-batch in flight (formulas/activations.py); temporary work tensors of one product,
layer or update; communication buffers; input batches. The largest moment of a run counts. On a CPU the heap
adds its fragmentation. States: Rajbhandari et al. 2020; activations: Korthikanti et al. 2022.
"""
from math import prod
from typing import NamedTuple

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.activations import activation_terms, end_terms, layers_bytes, working_bytes
from nanoinfra.formulas.model_states import BYTES
from nanoinfra.formulas.parameters import shapes
from nanoinfra.formulas.pipeline import in_flight, message_bytes
from nanoinfra.formulas.tensor_parallel import padded_seq, part
from nanoinfra.formulas.traffic_by_axis import TIED, chunks, held_shapes
from nanoinfra.formulas.zero import padded, states_bytes, zero_buffers

ROWS_BYTES = 2 << 20                         # of logits at a time, as in parallel/vocab_parallel.py
MAPPED = 32 << 20                            # DEFAULT_MMAP_THRESHOLD_MAX of glibc
HOLES = {2: 0.7, 4: 0.25, 8: 0.25}           # share of what a step allocates, by bytes of a number
MADE = ("activations", "work", "buffers")    # parts that a step allocates and frees
PREFETCH = 2                                 # steps that the loader makes ahead


class Layout(NamedTuple):
    """How a model is parallelized: the sizes of the mesh axes, ZeRO stage, pipeline schedule."""
    pp: int = 1
    dp: int = 1
    tp: int = 1
    sp: str = "none"                         # one of SEQUENCE_PARALLEL_MODES
    zero: int = 0
    schedule: str = "1f1b"
    virtual: int = 1                         # chunks of the model that each stage holds


class Recipe(NamedTuple):
    """The shapes and settings of one training step on a data-parallel rank."""
    seq: int                                 # T
    micro_batch: int                         # sequences in one forward
    micro_batches: int = 1                   # forwards in one step (gradient accumulation)
    dtype: str = "float32"
    grad_dtype: str = "float32"
    optimizer: str = "adamw"
    attention: str = "sdpa"
    recompute: str = "none"
    frozen: frozenset[str] = frozenset()     # names of parameters that are not trained

    @property
    def itemsize(self) -> int:
        """Bytes of one number of weights and hidden states."""
        return BYTES[self.dtype]


def footprint(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> dict[str, int]:
    """Bytes that a rank of pipeline stage `stage` holds at its peak, by part; without the process itself."""
    worst = max(moments(config, layout, recipe, stage).values(), key=lambda parts: sum(parts.values()))
    return {name: n for name, n in worst.items() if n}


def moments(config: ModelConfig, layout: Layout, recipe: Recipe,
            stage: int = 0) -> dict[str, dict[str, int]]:
    """Bytes by part at each moment of the run that can be the peak.

    "start": weights are drawn or read; "loss": all activations are there; "layer": backward recomputes a
    layer; "reduced": gradients are reduced; "update": the optimizer steps.
    """
    states = model_states(config, layout, recipe, stage)
    whole, travelling = states.pop("gradients"), buffers(config, layout, recipe, stage)
    last = stage == layout.pp - 1
    kept, held = activations(config, layout, recipe, stage), gradients_held(layout, recipe, whole)
    ends = sum(_end_terms(config, layout, recipe).values()) if last else 0
    common = states | {"data": batches(recipe)}
    tied = _head(config, layout, recipe) if config.tied and layout.zero == 0 and last and not stage else 0
    return {
        "start": states | {"work": draw_work(config)},
        "loss": common | {"gradients": held, "activations": kept, "buffers": travelling,
                          "work": loss_work(config, layout, recipe) if last else 0},
        "layer": common | {"gradients": held, "activations": kept - ends, "buffers": travelling,
                           "work": tied + layer_work(config, layout, recipe)},
        "reduced": common | {"gradients": whole, "buffers": travelling, "work": tied},
        "update": common | {"gradients": whole, "work": update_work(recipe, whole)},
    }


def model_states(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> dict[str, int]:
    """Bytes of "weights", "gradients" and "optimizer" (master weights and moments) with all gradients.

    ZeRO-1 keeps gradients unsharded from micro-batch to micro-batch; with a single micro-batch it reduces
    them as stage 2 does. Frozen parameters have weights alone, sharded by ZeRO-3.
    """
    zero = 2 if layout.zero == 1 and recipe.micro_batches == 1 else layout.zero
    held = held_shapes(config, layout.pp, layout.tp, stage, v=layout.virtual)
    trained = {name: shape for name, shape in held.items() if name not in recipe.frozen}
    tied = [held[TIED]] if config.tied and layout.pp == 1 and TIED in trained else []
    found = states_bytes(trained.values(), [*trained.values(), *tied], layout.dp, zero, recipe.dtype,
                         recipe.optimizer, BYTES[recipe.grad_dtype])
    weights, gradients = found.pop("weights"), found.pop("gradients")
    frozen = sum(padded(held[name], layout.dp if layout.zero else 1) for name in held.keys() - trained.keys())
    weights += recipe.itemsize * (frozen // layout.dp if layout.zero == 3 else frozen)
    return {"weights": weights, "gradients": gradients, "optimizer": sum(found.values())}


def gradients_held(layout: Layout, recipe: Recipe, whole: int) -> int:
    """Bytes of gradients while activations are at their peak; `whole` is what they take at the step's end.

    Plain data parallelism keeps its buckets. ZeRO frees the last step's: its first micro-batch finds none.
    """
    return whole if layout.zero == 0 or recipe.micro_batches > 1 else 0


def activations(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> int:
    """Bytes of saved activations of the micro-batches in flight in a stage, with its input and output."""
    p, v, d = layout.pp, layout.virtual, recipe.itemsize
    flying = in_flight(layout.schedule, p, stage, recipe.micro_batches, v)
    how = _how(layout, recipe)
    each = [layers_bytes(config, range(*chunk), *how) for chunk in chunks(config, p, stage, v)]
    last = last_ends(config, layout, recipe) if stage == p - 1 else 0
    border = message_bytes(config, recipe.micro_batch, recipe.seq, d) if p > 1 else 0
    return flying * (sum(each) // v + 2 * border) + last


def last_ends(config: ModelConfig, layout: Layout, recipe: Recipe) -> int:
    """Bytes of logits, final norm and head input, for the micro-batches in flight in the last stage."""
    return _flying_ends(layout, recipe) * sum(_end_terms(config, layout, recipe).values())


def logits_bytes(config: ModelConfig, layout: Layout, recipe: Recipe) -> int:
    """Bytes of the logits of the micro-batches in flight in the last stage."""
    return _flying_ends(layout, recipe) * _end_terms(config, layout, recipe)["logits"]


def loss_work(config: ModelConfig, layout: Layout, recipe: Recipe) -> int:
    """Work bytes of the loss: rows of float32 logits, or the head's two gradients and its scaled input."""
    d, tokens = recipe.itemsize, recipe.micro_batch * recipe.seq
    rows = min(ROWS_BYTES, tokens * part(config, layout.tp).vocab * max(4, d))
    return max(rows * (2 if d < 4 else 1), 2 * tokens * config.width * d + _head(config, layout, recipe))


def layer_work(config: ModelConfig, layout: Layout, recipe: Recipe) -> int:
    """Work bytes of one layer's backward: what it recomputes, and gradients of its activations.

    These gradients are three of the hidden states (float32 at least), those of the MLP's hidden units (two
    with a gate) and of one matrix; or two of naive attention's matrices, when the inputs of the MLP and of
    the values' product are freed.
    """
    mine, how, wide = part(config, layout.tp), _how(layout, recipe), max(4, recipe.itemsize)
    tokens = recipe.micro_batch * padded_seq(recipe.seq, layout.tp, layout.sp)
    matrix = mine.hidden * config.width * recipe.itemsize
    hidden = tokens * mine.hidden * recipe.itemsize * (2 if config.parts.gated else 1)
    squares = 0
    if recipe.attention == "naive":
        read = activation_terms(config, *how[:4], "none", *how[5:])
        squares = (2 * recipe.micro_batch * mine.heads * recipe.seq ** 2 * wide
                   - read["mlp_hidden"] - read["weights"])
    return working_bytes(config, *how) + 3 * tokens * config.width * wide + max(hidden + matrix, squares)


def update_work(recipe: Recipe, gradients: int) -> int:
    """Bytes of the optimizer's copy of the gradients, where their dtype differs from the master weights'."""
    own, wide = BYTES[recipe.grad_dtype], max(4, recipe.itemsize)
    return 0 if own == wide else gradients // own * wide


def draw_work(config: ModelConfig) -> int:
    """Bytes of the largest parameter, drawn or read whole in float32, and of a rank's shard of it."""
    return 2 * 4 * max(map(prod, shapes(config).values()))


def buffers(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> int:
    """Bytes of communication buffers: ZeRO's buckets or units over dp, and four messages over pp."""
    B, d = recipe.micro_batch, recipe.itemsize
    stream = message_bytes(config, B, recipe.seq, d) // (layout.tp if layout.sp != "none" else 1)
    messages = 4 * stream if layout.pp > 1 else 0
    if layout.zero == 0:
        return messages
    grad = BYTES[recipe.grad_dtype]
    room = zero_buffers(config, layout.dp, layout.zero, recipe.dtype, grad, tp=layout.tp)
    every = sum(map(prod, held_shapes(config, layout.pp, layout.tp, stage, v=layout.virtual).values()))
    return messages + min(room, 3 * grad * every)


def batches(recipe: Recipe) -> int:
    """Bytes of int64 tokens and targets: this step's, those of prefetched steps, and a sample being made."""
    step = 16 * recipe.micro_batches * recipe.micro_batch * recipe.seq
    return (1 + PREFETCH) * step + 16 * recipe.micro_batch * recipe.seq + 41 * recipe.seq


def _how(layout, recipe):
    return (recipe.micro_batch, recipe.seq, recipe.itemsize, recipe.attention, recipe.recompute, layout.tp,
            layout.sp)


def _end_terms(config, layout, recipe):
    return end_terms(config, recipe.micro_batch, recipe.seq, recipe.itemsize, layout.tp, layout.sp)


def _flying_ends(layout, recipe):
    """The number of micro-batches in flight in the last stage's last chunk."""
    flying = in_flight(layout.schedule, layout.pp, layout.pp - 1, recipe.micro_batches, layout.virtual)
    return -(-flying // layout.virtual)


def _head(config, layout, recipe):
    """Bytes of the head's gradient."""
    return part(config, layout.tp).vocab * config.width * recipe.itemsize


def heap_rest(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> int:
    """Bytes that glibc's heap takes beside those of `peak_memory_by_part` on a CPU, modelled.

    A block of 32 MiB or more is mapped by itself and returned to the system when it is freed. A smaller one
    comes from the heap, which returns nothing from its middle: its peak stays resident beside blocks that are
    mapped at another moment, such as logits, which are freed before a layer is recomputed. And an aligned
    block does not fit where one of the same size was (glibc bug 14581, up to 2.37), so a share of the heap is
    holes, measured with glibc 2.36.
    """
    mine, column = part(config, layout.tp), recipe.micro_batch * recipe.seq * recipe.itemsize
    if column * mine.hidden >= MAPPED:
        return 0
    found = moments(config, layout, recipe, stage)
    made = {name: sum(parts.get(kind, 0) for kind in MADE) for name, parts in found.items()}
    logits = logits_bytes(config, layout, recipe) if stage == layout.pp - 1 else 0
    mapped = logits if column * mine.vocab >= MAPPED else 0
    heap = max(made["loss"] - mapped, made["layer"])
    held = sum(found["loss"].values()) - made["loss"] + heap + mapped
    worst = max(sum(parts.values()) for parts in found.values())
    return max(0, held - worst) + int(HOLES[recipe.itemsize] * heap)
