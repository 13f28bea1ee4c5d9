"""What a training rank holds at its worst moment, part by part: bytes that follow from shapes and flags.

    weights + gradients + optimizer     model states, cut by tp, pp and ZeRO          formulas/zero.py
    activations, once a micro-batch     that the schedule has under way               formulas/activations.py
    work                                what one product, layer or update has in hand
    buffers                             gradients, units, messages on their way

The largest of a run's moments counts. States: Rajbhandari et al. 2020; activations: Korthikanti et al. 2022.
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
MAPPED = 32 << 20                            # DEFAULT_MMAP_THRESHOLD_MAX
HOLES = {2: 0.7, 4: 0.25, 8: 0.25}           # of what a step makes, by bytes of a number
MADE = ("activations", "work", "buffers")    # by a step, and gone after it
PREFETCH = 2                                 # steps that the loader makes ahead


class Layout(NamedTuple):
    """Over how many ranks a model is cut, and how."""
    pp: int = 1
    dp: int = 1
    tp: int = 1
    sp: str = "none"                         # of tensor.SP
    zero: int = 0
    schedule: str = "1f1b"
    virtual: int = 1                         # chunks of a stage


class Recipe(NamedTuple):
    """What a data-parallel rank does in a step."""
    seq: int                                 # T
    micro_batch: int                         # sequences at once
    micro_batches: int = 1                   # one after another
    dtype: str = "float32"
    grad_dtype: str = "float32"
    optimizer: str = "adamw"
    attention: str = "sdpa"
    recompute: str = "none"
    frozen: frozenset[str] = frozenset()     # names of parameters that are not trained

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the stream."""
        return BYTES[self.dtype]


def footprint(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> dict[str, int]:
    """Bytes that a rank of `stage` holds at its worst moment, by part; the process itself apart."""
    worst = max(moments(config, layout, recipe, stage).values(), key=lambda parts: sum(parts.values()))
    return {name: n for name, n in worst.items() if n}


def moments(config: ModelConfig, layout: Layout, recipe: Recipe,
            stage: int = 0) -> dict[str, dict[str, int]]:
    """The parts at each moment that can be the worst one: of the start, of a step."""
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
    """Bytes of "weights", "gradients" and "optimizer" (masters and moments), all gradients in hand.

    ZeRO-1 keeps gradients whole from micro-batch to micro-batch; of a single one they leave as in stage 2.
    What is frozen has weights alone, cut by ZeRO-3.
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
    """Gradients there while activations are at their most, of `whole` at the end of the step.

    Plain data parallelism keeps its buckets. ZeRO forgets the last step's: its first micro-batch finds none.
    """
    return whole if layout.zero == 0 or recipe.micro_batches > 1 else 0


def activations(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> int:
    """Bytes kept for backward by the micro-batches that a stage has under way, and its border's streams."""
    p, v, d = layout.pp, layout.virtual, recipe.itemsize
    flying = in_flight(layout.schedule, p, stage, recipe.micro_batches, v)
    how = _how(layout, recipe)
    each = [layers_bytes(config, range(*chunk), *how) for chunk in chunks(config, p, stage, v)]
    last = last_ends(config, layout, recipe) if stage == p - 1 else 0
    border = message_bytes(config, recipe.micro_batch, recipe.seq, d) if p > 1 else 0
    return flying * (sum(each) // v + 2 * border) + last


def last_ends(config: ModelConfig, layout: Layout, recipe: Recipe) -> int:
    """Bytes of logits, final norm and what the head read, of the micro-batches that the last stage has."""
    return _flying_ends(layout, recipe) * sum(_end_terms(config, layout, recipe).values())


def logits_bytes(config: ModelConfig, layout: Layout, recipe: Recipe) -> int:
    """Those of the logits alone."""
    return _flying_ends(layout, recipe) * _end_terms(config, layout, recipe)["logits"]


def loss_work(config: ModelConfig, layout: Layout, recipe: Recipe) -> int:
    """In hand around the loss: rows of wide logits, or both gradients of the head and its scaled input."""
    d, tokens = recipe.itemsize, recipe.micro_batch * recipe.seq
    rows = min(ROWS_BYTES, tokens * part(config, layout.tp).vocab * max(4, d))
    return max(rows * (2 if d < 4 else 1), 2 * tokens * config.width * d + _head(config, layout, recipe))


def layer_work(config: ModelConfig, layout: Layout, recipe: Recipe) -> int:
    """In hand while one layer goes back: what runs again, and gradients of what it had made.

    Gradients: of the stream, three times in wide; of the MLP's hidden, twice behind a gate, and of a matrix;
    or of naive attention's squares, twice, when what the MLP and the values' product had read is gone.
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
    """The optimizer's copy of the gradients, where their dtype is not its own."""
    own, wide = BYTES[recipe.grad_dtype], max(4, recipe.itemsize)
    return 0 if own == wide else gradients // own * wide


def draw_work(config: ModelConfig) -> int:
    """The largest parameter, drawn or read whole in float32, and a rank's part of it."""
    return 2 * 4 * max(map(prod, shapes(config).values()))


def buffers(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> int:
    """What is on its way over dp (ZeRO) and pp: buckets or units, and four messages."""
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
    """Tokens and targets, int64, of the steps at hand, and one sample while it is drawn."""
    step = 16 * recipe.micro_batches * recipe.micro_batch * recipe.seq
    return (1 + PREFETCH) * step + 16 * recipe.micro_batch * recipe.seq + 41 * recipe.seq


def _how(layout, recipe):
    return (recipe.micro_batch, recipe.seq, recipe.itemsize, recipe.attention, recipe.recompute, layout.tp,
            layout.sp)


def _end_terms(config, layout, recipe):
    return end_terms(config, recipe.micro_batch, recipe.seq, recipe.itemsize, layout.tp, layout.sp)


def _flying_ends(layout, recipe):
    """How many micro-batches the last stage has under way in its last chunk."""
    flying = in_flight(layout.schedule, layout.pp, layout.pp - 1, recipe.micro_batches, layout.virtual)
    return -(-flying // layout.virtual)


def _head(config, layout, recipe):
    """Bytes of the head's gradient."""
    return part(config, layout.tp).vocab * config.width * recipe.itemsize


def heap_rest(config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 0) -> int:
    """Bytes that glibc's heap keeps beside those of `footprint` on a CPU, modelled.

    A block of 32 MiB or more is mapped by itself and given back when it is freed. A smaller one comes from
    the heap, which gives nothing back from its middle: what it held at its most stays beside blocks that are
    mapped at another moment, say logits, which are gone before a layer runs again. An aligned block does not
    fit where one of the same size was (glibc bug 14581, up to 2.37): a share of the heap is holes, measured
    with 2.36.
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
