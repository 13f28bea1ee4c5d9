"""The peak memory of a training rank, by part: modelled bytes that follow from shapes and flags.

The parts are weights, gradients and optimizer states, sharded by tp, pp and ZeRO (formulas/zero.py); saved
activations of each micro-batch in flight (formulas/saved_activations.py); temporary work tensors of one
product, layer or update; communication buffers; input batches. The largest moment of a run counts. On a CPU
the heap adds its fragmentation. States: Rajbhandari et al. 2020; activations: Korthikanti et al. 2022.
"""
from math import prod
from typing import NamedTuple

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.communication_by_axis import (
    TIED_WEIGHT_NAME,
    rank_parameter_shapes,
    stage_chunk_layers,
)
from nanoinfra.formulas.model_states import DTYPE_BYTES
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.pipeline import predicted_micro_batches_in_flight, stage_message_bytes
from nanoinfra.formulas.saved_activations import (
    embedding_and_head_bytes_by_term,
    layer_activation_bytes_by_term,
    recompute_working_bytes,
    saved_activation_bytes_of_layers,
)
from nanoinfra.formulas.tensor_parallel import padded_seq_len, tp_rank_config
from nanoinfra.formulas.zero import zero_buffer_bytes, zero_model_state_bytes_of_shapes, zero_padded_numel

_LOGIT_ROWS_BYTES = 2 << 20                  # of logits at a time, as in parallel/vocab_parallel.py
_PREFETCHED_STEPS = 2                        # steps that the loader makes ahead
_MMAP_THRESHOLD_BYTES = 32 << 20             # DEFAULT_MMAP_THRESHOLD_MAX of glibc
_HEAP_HOLE_SHARE = {2: 0.7, 4: 0.25, 8: 0.25}        # share of what a step allocates, by bytes of a number
_STEP_PARTS = ("activations", "work", "buffers")     # parts that a step allocates and frees


class ParallelLayout(NamedTuple):
    """How a model is parallelized: the sizes of the mesh axes, ZeRO stage, pipeline schedule."""
    pp: int = 1
    dp: int = 1
    tp: int = 1
    sp: str = "none"                         # one of SEQUENCE_PARALLEL_MODES
    zero_stage: int = 0
    schedule: str = "1f1b"
    virtual_stages: int = 1                  # chunks of the model that each stage holds


class TrainingStepConfig(NamedTuple):
    """The shapes and settings of one training step on a data-parallel rank."""
    seq_len: int                             # T
    micro_batch_size: int                    # sequences in one forward
    num_micro_batches: int = 1               # forwards in one step (gradient accumulation)
    dtype: str = "float32"
    grad_dtype: str = "float32"
    optimizer: str = "adamw"
    attention: str = "sdpa"
    recompute: str = "none"
    frozen_parameters: frozenset[str] = frozenset()      # names of parameters that are not trained

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number of weights and hidden states."""
        return DTYPE_BYTES[self.dtype]


def peak_memory_by_part(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig,
                        stage: int = 0) -> dict[str, int]:
    """Bytes that a rank of pipeline stage `stage` holds at its peak, by part; without the process itself."""
    worst = max(memory_by_moment(config, layout, step, stage).values(), key=lambda parts: sum(parts.values()))
    return {name: n for name, n in worst.items() if n}


def memory_by_moment(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig,
                     stage: int = 0) -> dict[str, dict[str, int]]:
    """Bytes by part at each moment of the run that can be the peak.

    "start": weights are drawn or read; "loss": all activations are there; "layer": backward recomputes a
    layer; "reduced": gradients are reduced; "update": the optimizer steps.
    """
    states = rank_model_state_bytes(config, layout, step, stage)
    whole, travelling = states.pop("gradients"), _communication_buffer_bytes(config, layout, step, stage)
    last = stage == layout.pp - 1
    kept = stage_activation_bytes(config, layout, step, stage)
    held = _live_gradient_bytes(layout, step, whole)
    ends = sum(_end_bytes_by_term(config, layout, step).values()) if last else 0
    common = states | {"data": input_batch_bytes(step)}
    is_tied = config.tied and layout.zero_stage == 0 and layout.pp == 1
    tied = _head_grad_bytes(config, layout, step) if is_tied else 0
    return {
        "start": states | {"work": _init_work_bytes(config)},
        "loss": common | {"gradients": held, "activations": kept, "buffers": travelling,
                          "work": _loss_work_bytes(config, layout, step) if last else 0},
        "layer": common | {"gradients": held, "activations": kept - ends, "buffers": travelling,
                           "work": tied + _layer_work_bytes(config, layout, step)},
        "reduced": common | {"gradients": whole, "buffers": travelling, "work": tied},
        "update": common | {"gradients": whole, "work": _optimizer_work_bytes(step, whole)},
    }


def rank_model_state_bytes(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig,
                           stage: int = 0) -> dict[str, int]:
    """Bytes of "weights", "gradients" and "optimizer" (master weights and moments) with all gradients.

    ZeRO-1 keeps gradients unsharded from micro-batch to micro-batch; with a single micro-batch it reduces
    them as stage 2 does. Frozen parameters have weights alone, sharded by ZeRO-3.
    """
    zero = 2 if layout.zero_stage == 1 and step.num_micro_batches == 1 else layout.zero_stage
    held = rank_parameter_shapes(config, layout.pp, layout.tp, stage, v=layout.virtual_stages)
    trained = {name: shape for name, shape in held.items() if name not in step.frozen_parameters}
    is_used_twice = config.tied and layout.pp == 1 and TIED_WEIGHT_NAME in trained
    used = [*trained.values(), *([held[TIED_WEIGHT_NAME]] if is_used_twice else [])]
    found = zero_model_state_bytes_of_shapes(trained.values(), used, layout.dp, zero, step.dtype,
                                             step.optimizer, DTYPE_BYTES[step.grad_dtype])
    weights, gradients = found.pop("weights"), found.pop("gradients")
    shards = layout.dp if layout.zero_stage else 1
    frozen = sum(zero_padded_numel(held[name], shards) for name in held.keys() - trained.keys())
    weights += step.dtype_bytes * (frozen // layout.dp if layout.zero_stage == 3 else frozen)
    return {"weights": weights, "gradients": gradients, "optimizer": sum(found.values())}


def _live_gradient_bytes(layout: ParallelLayout, step: TrainingStepConfig, whole: int) -> int:
    """Bytes of gradients while activations are at their peak; `whole` is what they take at the step's end.

    Plain data parallelism keeps its buckets. ZeRO frees the last step's: its first micro-batch finds none.
    """
    return whole if layout.zero_stage == 0 or step.num_micro_batches > 1 else 0


def stage_activation_bytes(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig,
                           stage: int = 0) -> int:
    """Bytes of saved activations of the micro-batches in flight in a stage, with its input and output."""
    p, v, d = layout.pp, layout.virtual_stages, step.dtype_bytes
    in_flight = predicted_micro_batches_in_flight(layout.schedule, p, stage, step.num_micro_batches, v)
    arguments = _layer_arguments(layout, step)
    each = [saved_activation_bytes_of_layers(config, range(*chunk), *arguments)
            for chunk in stage_chunk_layers(config, p, stage, v)]
    last = _head_activation_bytes(config, layout, step) if stage == p - 1 else 0
    border = stage_message_bytes(config, step.micro_batch_size, step.seq_len, d) if p > 1 else 0
    return in_flight * (sum(each) // v + 2 * border) + last


def _head_activation_bytes(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig) -> int:
    """Bytes of logits, final norm and head input, for the micro-batches in flight in the last stage."""
    each = sum(_end_bytes_by_term(config, layout, step).values())
    return _micro_batches_in_last_chunk(layout, step) * each


def _logits_bytes(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig) -> int:
    """Bytes of the logits of the micro-batches in flight in the last stage."""
    return _micro_batches_in_last_chunk(layout, step) * _end_bytes_by_term(config, layout, step)["logits"]


def _loss_work_bytes(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig) -> int:
    """Work bytes of the loss: rows of float32 logits, or the head's two gradients and its scaled input."""
    d, tokens = step.dtype_bytes, step.micro_batch_size * step.seq_len
    rows = min(_LOGIT_ROWS_BYTES, tokens * tp_rank_config(config, layout.tp).vocab * max(4, d))
    head = 2 * tokens * config.width * d + _head_grad_bytes(config, layout, step)
    return max(rows * (2 if d < 4 else 1), head)


def _layer_work_bytes(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig) -> int:
    """Work bytes of one layer's backward: what it recomputes, and gradients of its activations.

    These gradients are three of the hidden states (float32 at least), those of the MLP's hidden units (two
    with a gate) and of one matrix; or two of naive attention's matrices, when the inputs of the MLP and of
    the values' product are freed.
    """
    mine, wide = tp_rank_config(config, layout.tp), max(4, step.dtype_bytes)
    arguments = _layer_arguments(layout, step)
    tokens = step.micro_batch_size * padded_seq_len(step.seq_len, layout.tp, layout.sp)
    matrix = mine.hidden * config.width * step.dtype_bytes
    hidden = tokens * mine.hidden * step.dtype_bytes * (2 if config.architecture.gated_mlp else 1)
    squares = 0
    if step.attention == "naive":
        read = layer_activation_bytes_by_term(config, *arguments[:4], "none", *arguments[5:])
        squares = (2 * step.micro_batch_size * mine.heads * step.seq_len ** 2 * wide
                   - read["mlp_hidden"] - read["weights"])
    gradients = 3 * tokens * config.width * wide + max(hidden + matrix, squares)
    return recompute_working_bytes(config, *arguments) + gradients + _mask_work_bytes(mine, step)


def _mask_work_bytes(config, step):
    """Bytes of what sdpa adds to the scores: a bias of each head for ALiBi, one mask for a window."""
    window = config.window is not None and step.seq_len > config.window
    masks = config.heads if config.architecture.position_encoding == "alibi" else int(window)
    return masks * step.seq_len ** 2 * max(4, step.dtype_bytes) if step.attention == "sdpa" else 0


def _optimizer_work_bytes(step: TrainingStepConfig, gradients: int) -> int:
    """Bytes of the optimizer's copy of the gradients, where their dtype differs from the master weights'."""
    own, wide = DTYPE_BYTES[step.grad_dtype], max(4, step.dtype_bytes)
    return 0 if own == wide else gradients // own * wide


def _init_work_bytes(config: ModelConfig) -> int:
    """Bytes of the largest parameter, drawn or read whole in float32, and of a rank's shard of it."""
    return 2 * 4 * max(map(prod, parameter_shapes(config).values()))


def _communication_buffer_bytes(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig,
                                stage: int = 0) -> int:
    """Bytes of communication buffers: ZeRO's buckets or units over dp, and four messages over pp."""
    B, d = step.micro_batch_size, step.dtype_bytes
    stream = stage_message_bytes(config, B, step.seq_len, d) // (layout.tp if layout.sp != "none" else 1)
    messages = 4 * stream if layout.pp > 1 else 0
    if layout.zero_stage == 0:
        return messages
    grad = DTYPE_BYTES[step.grad_dtype]
    room = zero_buffer_bytes(config, layout.dp, layout.zero_stage, step.dtype, grad, tp=layout.tp)
    shapes = rank_parameter_shapes(config, layout.pp, layout.tp, stage, v=layout.virtual_stages)
    return messages + min(room, 3 * grad * sum(map(prod, shapes.values())))


def input_batch_bytes(step: TrainingStepConfig) -> int:
    """Bytes of int64 tokens and targets: this step's, those of prefetched steps, and a sample being made."""
    one_step = 16 * step.num_micro_batches * step.micro_batch_size * step.seq_len
    one_sample = 16 * step.micro_batch_size * step.seq_len + 41 * step.seq_len
    return (1 + _PREFETCHED_STEPS) * one_step + one_sample


def _layer_arguments(layout, step):
    return (step.micro_batch_size, step.seq_len, step.dtype_bytes, step.attention, step.recompute, layout.tp,
            layout.sp)


def _end_bytes_by_term(config, layout, step):
    return embedding_and_head_bytes_by_term(config, step.micro_batch_size, step.seq_len, step.dtype_bytes,
                                            layout.tp, layout.sp)


def _micro_batches_in_last_chunk(layout, step):
    """The number of micro-batches in flight in the last stage's last chunk."""
    in_flight = predicted_micro_batches_in_flight(layout.schedule, layout.pp, layout.pp - 1,
                                                  step.num_micro_batches, layout.virtual_stages)
    return -(-in_flight // layout.virtual_stages)


def _head_grad_bytes(config, layout, step):
    """Bytes of the head's gradient."""
    return tp_rank_config(config, layout.tp).vocab * config.width * step.dtype_bytes


def heap_fragmentation_bytes(config: ModelConfig, layout: ParallelLayout, step: TrainingStepConfig,
                             stage: int = 0) -> int:
    """Bytes that glibc's heap takes beside those of `peak_memory_by_part` on a CPU, modelled.

    A block of 32 MiB or more is mapped by itself and returned to the system when it is freed. A smaller one
    comes from the heap, which returns nothing from its middle: its peak stays resident beside blocks that are
    mapped at another moment, such as logits, which are freed before a layer is recomputed. And an aligned
    block does not fit where one of the same size was (glibc bug 14581, up to 2.37), so a share of the heap is
    holes, measured with glibc 2.36.
    """
    mine = tp_rank_config(config, layout.tp)
    column = step.micro_batch_size * step.seq_len * step.dtype_bytes
    if column * mine.hidden >= _MMAP_THRESHOLD_BYTES:
        return 0
    found = memory_by_moment(config, layout, step, stage)
    made = {name: sum(parts.get(kind, 0) for kind in _STEP_PARTS) for name, parts in found.items()}
    logits = _logits_bytes(config, layout, step) if stage == layout.pp - 1 else 0
    mapped = logits if column * mine.vocab >= _MMAP_THRESHOLD_BYTES else 0
    heap = max(made["loss"] - mapped, made["layer"])
    held = sum(found["loss"].values()) - made["loss"] + heap + mapped
    worst = max(sum(parts.values()) for parts in found.values())
    return max(0, held - worst) + int(_HEAP_HOLE_SHARE[step.dtype_bytes] * heap)
