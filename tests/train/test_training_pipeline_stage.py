"""One rank's stage under every ZeRO stage: what reaches the wire, what is let go of, the score."""
import weakref

import pytest
import torch

from nanoinfra.cli import main
from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.pipeline.schedules import gradient_accumulation_schedule
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.config import ModelFlags, TrainFlags, make_train_flags
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage


def stepped(zero, config=None, **model):
    flags = make_train_flags(**model, zero=zero)
    replica = TrainStage(config or config_for_size("test"), flags, Mesh())
    x = torch.ones(2, 8, dtype=torch.long)
    replica.begin_step([Batch(x, x)], 16, lr=1e-3)
    execute_schedule(gradient_accumulation_schedule(1), replica)
    return replica


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_are_summed_in_the_dtype_asked_for_and_float32_by_default(zero):
    for asked, want in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        replica = stepped(zero, dtype="bfloat16", grad_dtype=asked)
        assert {grad.dtype for grad in replica.grads.values()} == {want}
        assert {p.dtype for p in replica.parallel_model.chunks[0].model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_new_step_lets_go_of_the_last_ones_gradients(zero):
    replica = stepped(zero)
    old = [weakref.ref(grad) for grad in replica.grads.values()]
    replica.begin_step([], 1, lr=0.0)
    assert not [ref for ref in old if ref() is not None]


def test_stage_3_keeps_no_parameter_of_any_family_whole():
    gpt2 = ModelConfig(64, 32, 2, 2, 2, 16, 64, 16, family="gpt2")
    for config in (gpt2, config_for_size("test")):
        model = stepped(3, config).parallel_model.chunks[0].model
        assert {p.untyped_storage().nbytes() for p in model.parameters()} == {0}


@pytest.mark.prove
def test_the_held_out_score_is_one_ranks_at_every_stage(ranks, tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(f"{name} is a letter of the alphabet.\n" * 40)
    argv = ["train", "--model", "test", "--data", str(tmp_path), "--dtype", "float64", "--seq", "16",
            "--steps", "2", "--global-batch", "4", "--micro-batch", "2", "--eval-every", "1"]
    scores = {}
    for dp, tp, *more in ((1, 1), (2, 1), (2, 1, "--zero", "3"), (1, 2, "--sp"), (2, 2, "--zero", "1")):
        out = tmp_path.parent / f"{tmp_path.name}-{dp}-{tp}-{len(more)}"
        flags = [*argv, "--dp", str(dp), "--tp", str(tp), *more, "--threads", "1", "--out", str(out)]
        assert ranks(dp * tp).run(main, flags) == [0] * (dp * tp)
        lines = metrics_and_plots.read_metrics(out / "metrics.jsonl")
        scores[dp, tp, *more] = [line["held_out_bpb"] for line in lines]
    for got in scores.values():
        assert got == pytest.approx(scores[1, 1], rel=1e-8)


def test_masters_are_the_numbers_drawn_not_those_rounded_to_16_bits():
    replica = TrainStage(config_for_size("test"), TrainFlags(ModelFlags(dtype="bfloat16")), Mesh())
    want = init_weights(Decoder(config_for_size("test")), seed=0)
    for name, master in replica.optimizer.master_weights.items():
        assert torch.equal(master, want.get_parameter(name).detach())


@pytest.mark.parametrize("mesh", ["--tp", "--dp"])
def test_seconds_are_one_ranks_seconds(ranks, tmp_path, mesh):
    argv = ["train", "--model", "test", "--data", "random", "--seq", "8", "--micro-batch", "1", mesh, "2",
            "--max-seconds", "1.5", "--threads", "1", "--out", str(tmp_path)]
    assert ranks(2).run(main, argv) == [0, 0]
    assert sum(line["step_s"] for line in metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")) >= 1.4
