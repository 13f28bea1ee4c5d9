"""What --freeze names stays as it is, bit for bit, on any mesh; the rest trains as it would on one rank."""
import functools
import json

import pytest
import torch

from nanoinfra.cli import main
from nanoinfra.config import config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.pipeline import chunk_parameter_names
from nanoinfra.formulas.training_peak_memory import ParallelLayout, TrainingStepConfig, rank_model_state_bytes
from nanoinfra.parallel.pipeline.schedules import gradient_accumulation_schedule
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.checkpoint import save_and_load
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.frozen_parameters import frozen_parameter_names
from nanoinfra.train.load_and_export_models import load_pretrained
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage, initial_weights_reader

PATTERNS = ["embed.*", "blocks.0.*", "*.attn.k.weight"]
FLAGS = ["train", "--model", "test", "--data", "random", "--dtype", "float64", "--steps", "3", "--seq", "23",
         "--global-batch", "7", "--micro-batch", "2", "--warmup", "1", "--clip", "0.4", "--threads", "1",
         "--untied", "--freeze", *PATTERNS]
UNTIED = config_for_size("test", tied=False)
CASES = ["--dp 2 --zero 3 --recompute full", "--tp 2 --sp", "--pp 2 --schedule zb-h1"]
MORE = ["--dp 2", "--dp 2 --zero 1", "--dp 2 --zero 2 --recompute full", "--tp 2 --recompute full",
        "--pp 2 --schedule gpipe", "--pp 2 --dp 2 --zero 1",
        "--tp 2 --dp 2 --zero 3", "--pp 2 --tp 2 --sp"]


def test_names_are_matched_as_a_shell_would():
    config = config_for_size("test")
    assert frozen_parameter_names(["blocks.1.attn.[qk].weight"], config) == {"blocks.1.attn.q.weight",
                                                                             "blocks.1.attn.k.weight"}
    assert frozen_parameter_names([], config) == frozenset()
    got = frozen_parameter_names(["*norm*"], config)
    assert got == {name for name in parameter_shapes(config) if "norm" in name}


@pytest.mark.parametrize("patterns, chunks, says", [
    (["block.0.*"], 1, "'block.0.*' is no parameter's name; they are embed.weight, blocks.N.norm1.weight"),
    (["*"], 1, "nothing to train in this model"),
    (["embed.*", "blocks.[01].*"], 2, "chunk 0 of the pipeline's 2")])
def test_what_cannot_be_frozen_is_refused(patterns, chunks, says):
    with pytest.raises(ValueError) as error:
        frozen_parameter_names(patterns, config_for_size("test"), chunks)
    assert says in str(error.value)


@pytest.mark.parametrize("untied", [False, True])
def test_every_parameter_is_in_a_chunk_and_a_tied_one_in_two(untied):
    config = config_for_size("test", tied=not untied)
    first, *_, last = chunks = chunk_parameter_names(config, 3, 8)
    assert {name for chunk in chunks for name in chunk} == set(parameter_shapes(config))
    assert ("embed.weight" in last) == (not untied) and "embed.weight" in first and "norm.weight" in last


@pytest.mark.parametrize("more", [*CASES, *(pytest.param(case, marks=pytest.mark.prove) for case in MORE)])
def test_any_mesh_trains_the_rest_as_one_rank_does(ranks, tmp_path, more):
    world = 2 ** sum(axis in more for axis in ("--dp", "--tp", "--pp"))
    want, weights = alone(tmp_path.parent)
    assert ranks(world).run(main, [*FLAGS, *more.split(), "--out", str(tmp_path)]) == [0] * world
    for got, one in zip(metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl"), want,
                        strict=True):
        assert got["loss"] == pytest.approx(one["loss"], rel=1e-8)
        assert got["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-8)
    config = config_for_size("test", 257, 23, False)
    frozen, read = frozen_parameter_names(PATTERNS, config), initial_weights_reader(config, 0)
    for name, p in load_pretrained(tmp_path, torch.float64)[0].named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-8, atol=1e-10)
        assert torch.equal(p.detach(), read(name, ()).double()) == (name in frozen), name
    newest = save_and_load.find_newest_checkpoint(tmp_path / "checkpoints")
    manifest = json.loads((newest / "manifest.json").read_text())
    moments = {name.partition("/")[2] for name in manifest["tensors"] if name.startswith("exp_avg/")}
    assert moments == weights.keys() - frozen


@functools.cache
def alone(folder):
    out = folder / "alone-frozen"
    assert main([*FLAGS, "--out", str(out)]) == 0
    model = load_pretrained(out, torch.float64)[0]
    return metrics_and_plots.read_metrics(out / "metrics.jsonl"), {name: p.detach() for name, p
                                                                   in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_come_back_from_a_checkpoint(ranks, dtype):
    for whole in ranks(2).run(reloaded, dtype):
        for stage, weights in whole.items():
            want = initial_weights_reader(config_for_size("test"), 1)
            for name, got in weights.items():
                assert torch.equal(got, want(name, ()).to(got.dtype)), (stage, name)


def reloaded(dtype):
    """{stage: {name: whole weight}} of two ranks that were drawn from seed 0 and loaded what seed 1 wrote."""
    found = {}
    for stage in (0, 1, 2):
        old, new = (TrainStage(config_for_size("test"), make_train_flags(
            dtype=dtype, freeze=("embed.*", "blocks.2.*"), seed=seed, zero=stage, dp=2),
            Mesh(dp=world_size())) for seed in (1, 0))
        new.load_state_dict([(piece, tensor.clone()) for piece, tensor in old.tensor_shards()],
                            old.state_dict())
        model = new.parallel_model.chunks[0].model
        found[stage] = {name: p.detach().clone() for name, p in model.named_parameters()
                        if name.startswith(("embed.", "blocks.2."))}
    return found


def test_the_flags_reach_the_optimizer_and_the_run_says_what_it_trains(tmp_path, capsys):
    given = "--freeze embed.* --lr 0.01 --min-lr 0.004 --warmup 0"
    argv, moved = [*FLAGS[:FLAGS.index("--freeze")], *given.split()], {}
    for steps, decay in ((1, 0.0), (1, 0.3), (2, 0.3)):
        out = tmp_path / f"{steps}-{decay}"
        assert main([*argv, "--steps", str(steps), "--weight-decay", str(decay), "--out", str(out)]) == 0
        moved[steps, decay] = load_pretrained(out, torch.float64)[0].get_parameter("blocks.1.mlp.up.weight")
    assert "62,816 parameters (54,592 of them trained)" in capsys.readouterr().out
    rates = [line["lr"] for line in metrics_and_plots.read_metrics(out / "metrics.jsonl")]
    assert rates == pytest.approx([0.01, 0.007])           # a cosine's beginning and its middle
    first = initial_weights_reader(config_for_size("test", 257, 23, False), 0)("blocks.1.mlp.up.weight",
                                                                               ()).double()
    torch.testing.assert_close(moved[1, 0.0] - moved[1, 0.3], 0.01 * 0.3 * first, rtol=1e-9, atol=1e-12)


def test_a_run_goes_on_with_what_it_has_frozen_and_with_nothing_else(tmp_path, capsys):
    argv = [*FLAGS, "--out", str(tmp_path)]
    assert main([*argv, "--steps", "2"]) == 0
    capsys.readouterr()
    assert main([*argv, "--resume", "--freeze", "embed.*"]) == 2
    said = capsys.readouterr().err
    assert "freeze" in said and said.count("\n") == 1
    assert main([*argv, "--resume"]) == 0


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_only_what_trains_costs_memory(zero):
    """As formulas/training_peak_memory.py counts it."""
    def bytes_held(*freeze):
        flags = make_train_flags(dtype="bfloat16", freeze=freeze, zero=zero)
        recipe = TrainingStepConfig(8, 1, dtype="bfloat16", frozen_parameters=frozen_parameter_names(freeze,
                                                                                                     UNTIED))
        replica = stepped(flags)
        held = metrics_and_plots.distinct_storage_bytes([*replica.persistent_tensors(),
                                                         *replica.grads.values()])
        assert held == sum(rank_model_state_bytes(UNTIED, ParallelLayout(zero_stage=zero), recipe).values())
        return held
    blocks = sum(torch.Size(shape).numel() for name,
                 shape in parameter_shapes(UNTIED).items() if ".0." in name)
    saved = blocks * (16 if zero < 3 else 14)              # masters, two moments, gradients; the weights stay
    assert bytes_held() - bytes_held("blocks.0.*") == saved


def stepped(flags):
    """One rank's replica after a step's backward, its gradients in hand."""
    replica = TrainStage(UNTIED, flags, Mesh())
    x = torch.ones(2, 8, dtype=torch.long)
    replica.begin_step([Batch(x, x)], 16, lr=1e-3)
    execute_schedule(gradient_accumulation_schedule(1), replica)
    return replica
