"""What a rank is said to hold, beside what torch allocates when it trains."""
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.model_states import DTYPE_BYTES
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.saved_activations import saved_activation_bytes, saved_activation_bytes_of_layers
from nanoinfra.formulas.training_peak_memory import (
    ParallelLayout,
    TrainingStepConfig,
    memory_by_moment,
    peak_memory_by_part,
    rank_model_state_bytes,
    stage_activation_bytes,
)
from nanoinfra.formulas.zero import zero_model_state_bytes
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage

LLAMA = ModelConfig(300, 64, 4, 4, 2, 16, 172, 128)
GPT2 = replace(LLAMA, kv_heads=4, hidden=256, family="gpt2")
RUNS = {
    "logits": (replace(LLAMA, vocab=4000), TrainingStepConfig(128, 4)),
    "naive attention": (LLAMA, TrainingStepConfig(128, 4, attention="naive")),
    "its squares, run again": (LLAMA, TrainingStepConfig(128, 4, attention="naive", recompute="selective")),
    "a layer, run again": (LLAMA, TrainingStepConfig(128, 4, recompute="full")),
    "16 bits": (GPT2, TrainingStepConfig(128, 4, dtype="bfloat16", grad_dtype="bfloat16", optimizer="sgd")),
    "64 bits": (GPT2, TrainingStepConfig(128, 4, 1, "float64", "float64", attention="naive",
                                         recompute="full")),
    "two micro-batches": (replace(LLAMA, tied=False), TrainingStepConfig(128, 2, 2)),
}


def allocated(config, recipe):
    """The most bytes that torch holds at a time in two steps of one rank, its start included."""
    tokens = torch.zeros(recipe.micro_batch_size, recipe.seq_len, dtype=torch.long)
    flags = make_train_flags(dtype=recipe.dtype, grad_dtype=recipe.grad_dtype, attention=recipe.attention,
                             recompute=recipe.recompute, optimizer=recipe.optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        replica = TrainStage(config, flags, Mesh())
        for _ in range(2):
            replica.begin_step([Batch(tokens, tokens)] * recipe.num_micro_batches, tokens.numel(), 1e-3)
            execute_schedule(replica.build_step_schedule(recipe.num_micro_batches), replica)
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("config, recipe", RUNS.values(), ids=RUNS.keys())
def test_a_step_allocates_what_is_said(config, recipe):
    said = peak_memory_by_part(config, ParallelLayout(), recipe)
    del said["data"]                                                       # which numpy makes
    assert allocated(config, recipe) == pytest.approx(sum(said.values()), rel=0.05)


def test_one_rank_keeps_what_one_forward_leaves():
    config, recipe = config_for_size("nano"), TrainingStepConfig(256, 8, 5, "bfloat16")
    assert stage_activation_bytes(config, ParallelLayout(), recipe) == saved_activation_bytes(config, 8, 256,
                                                                                              2)


@pytest.mark.parametrize("schedule, flying", [("gpipe", [6, 6]), ("1f1b", [2, 1]), ("zb-h1", [2, 2])])
def test_a_stage_keeps_the_micro_batches_that_its_schedule_has_under_way(schedule, flying):
    config, recipe = config_for_size("nano", tied=False), TrainingStepConfig(256, 8, 6)
    border, layers = 4 * 8 * 256 * 128, range(3)                           # of four: the head is like two
    first = stage_activation_bytes(config, ParallelLayout(pp=2, schedule=schedule), recipe, 0)
    assert first == flying[0] * (saved_activation_bytes_of_layers(config, layers, 8, 256, 4) + 2 * border)
    last = stage_activation_bytes(config, ParallelLayout(pp=2, schedule=schedule), recipe, 1)
    assert last > flying[1] * 4 * 8 * 256 * config.vocab                   # the logits


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_zero(zero, dtype):
    config, n = config_for_size("nano"), 4
    want = zero_model_state_bytes(config, n, zero, dtype, grad_bytes=4)
    got = rank_model_state_bytes(config, ParallelLayout(dp=n, zero_stage=zero), TrainingStepConfig(256, 8, 2,
                                                                                                   dtype))
    assert sum(got.values()) == sum(want.values()) and got["gradients"] == want["gradients"]


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_ranks_of_a_mesh_hold_the_model_once(dtype):
    """But for norms, which tensor ranks have whole, and rows of zeros."""
    config, recipe = config_for_size("nano", tied=False), TrainingStepConfig(256, 8, dtype=dtype,
                                                                             grad_dtype=dtype)
    one = sum(rank_model_state_bytes(config, ParallelLayout(), recipe).values())
    for p, d, t, zero in ((4, 1, 1, 0), (1, 1, 2, 0), (2, 4, 2, 1), (1, 8, 1, 3)):
        each = [rank_model_state_bytes(config, ParallelLayout(p, d, t, zero_stage=zero), recipe,
                                       stage) for stage in range(p)]
        cut = sum(states["optimizer"] for states in each) * t * (d if zero else 1)
        assert cut == pytest.approx(rank_model_state_bytes(config, ParallelLayout(), recipe)["optimizer"],
                                    rel=0.01)
        assert sum(sum(states.values()) for states in each) * t * d >= one * (d if zero < 1 else 0.8)
    assert one >= parameter_count(config) * 4 * DTYPE_BYTES[dtype]


def test_each_technique_takes_away_what_it_is_for():
    config, naive = config_for_size("micro"), TrainingStepConfig(512, 8, attention="naive")
    plain = peak_memory_by_part(config, ParallelLayout(), naive)

    def total(layout=ParallelLayout(), recipe=naive):                              # noqa: B008  both are constants
        return sum(peak_memory_by_part(config, layout, recipe).values())
    assert total(recipe=naive._replace(recompute="selective")) < total() * 0.7
    assert total(recipe=naive._replace(attention="sdpa")) < total() * 0.7
    assert total(recipe=naive._replace(recompute="full")) < total() * 0.3
    assert total(recipe=naive._replace(micro_batch_size=2)) < total() * 0.35
    assert total(ParallelLayout(tp=2)) < total() * 0.7
    assert peak_memory_by_part(config, ParallelLayout(dp=8, zero_stage=1),
                               naive)["optimizer"] < plain["optimizer"] / 7


def test_no_moment_is_without_the_weights():
    for parts in memory_by_moment(config_for_size("test"), ParallelLayout(dp=2, zero_stage=2),
                                  TrainingStepConfig(64, 2)).values():
        assert parts["weights"] == zero_model_state_bytes(config_for_size("test"), 2, 2)["weights"]
