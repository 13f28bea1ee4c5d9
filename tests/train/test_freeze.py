"""What --freeze names stays as it is, bit for bit, on any mesh; the rest trains as it would on one rank."""
import functools
import json

import pytest
import torch

from nanoinfra.cli import main
from nanoinfra.config import sized
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.footprint import Layout, Recipe, model_states
from nanoinfra.formulas.parameters import shapes
from nanoinfra.formulas.pipeline import chunk_names
from nanoinfra.parallel.pipeline.schedules import accumulate
from nanoinfra.train import metrics
from nanoinfra.train.checkpoint import checkpoint
from nanoinfra.train.config import MeshFlags, ModelFlags, TrainFlags
from nanoinfra.train.freeze import frozen_names
from nanoinfra.train.pretrained import pretrained
from nanoinfra.train.step import execute
from nanoinfra.train.train_stage import Replica, drawn

PATTERNS = ["embed.*", "blocks.0.*", "*.attn.k.weight"]
FLAGS = ["train", "--model", "test", "--data", "random", "--dtype", "float64", "--steps", "3", "--seq", "23",
         "--global-batch", "7", "--micro-batch", "2", "--warmup", "1", "--clip", "0.4", "--threads", "1",
         "--untied", "--freeze", *PATTERNS]
UNTIED = sized("test", tied=False)
CASES = ["--dp 2 --zero 3 --recompute full", "--tp 2 --sp", "--pp 2 --schedule zb-h1"]
MORE = ["--dp 2", "--dp 2 --zero 1", "--dp 2 --zero 2 --recompute full", "--tp 2 --recompute full",
        "--pp 2 --schedule gpipe", "--pp 2 --dp 2 --zero 1",
        "--tp 2 --dp 2 --zero 3", "--pp 2 --tp 2 --sp"]


def test_names_are_matched_as_a_shell_would():
    config = sized("test")
    assert frozen_names(["blocks.1.attn.[qk].weight"], config) == {"blocks.1.attn.q.weight",
                                                                   "blocks.1.attn.k.weight"}
    assert frozen_names([], config) == frozenset()
    got = frozen_names(["*norm*"], config)
    assert got == {name for name in shapes(config) if "norm" in name}


@pytest.mark.parametrize("patterns, chunks, says", [
    (["block.0.*"], 1, "'block.0.*' is no parameter's name; they are embed.weight, blocks.N.norm1.weight"),
    (["*"], 1, "nothing to train in this model"),
    (["embed.*", "blocks.[01].*"], 2, "chunk 0 of the pipeline's 2")])
def test_what_cannot_be_frozen_is_refused(patterns, chunks, says):
    with pytest.raises(ValueError) as error:
        frozen_names(patterns, sized("test"), chunks)
    assert says in str(error.value)


@pytest.mark.parametrize("untied", [False, True])
def test_every_parameter_is_in_a_chunk_and_a_tied_one_in_two(untied):
    config = sized("test", tied=not untied)
    first, *_, last = chunks = chunk_names(config, 3, 8)
    assert {name for chunk in chunks for name in chunk} == set(shapes(config))
    assert ("embed.weight" in last) == (not untied) and "embed.weight" in first and "norm.weight" in last


@pytest.mark.parametrize("more", [*CASES, *(pytest.param(case, marks=pytest.mark.prove) for case in MORE)])
def test_any_mesh_trains_the_rest_as_one_rank_does(ranks, tmp_path, more):
    world = 2 ** sum(axis in more for axis in ("--dp", "--tp", "--pp"))
    want, weights = alone(tmp_path.parent)
    assert ranks(world).run(main, [*FLAGS, *more.split(), "--out", str(tmp_path)]) == [0] * world
    for got, one in zip(metrics.read(tmp_path / "metrics.jsonl"), want, strict=True):
        assert got["loss"] == pytest.approx(one["loss"], rel=1e-8)
        assert got["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-8)
    config = sized("test", 257, 23, False)
    frozen, read = frozen_names(PATTERNS, config), drawn(config, 0)
    for name, p in pretrained(tmp_path, torch.float64)[0].named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-8, atol=1e-10)
        assert torch.equal(p.detach(), read(name, ()).double()) == (name in frozen), name
    manifest = json.loads((checkpoint.newest(tmp_path / "checkpoints") / "manifest.json").read_text())
    moments = {name.partition("/")[2] for name in manifest["tensors"] if name.startswith("exp_avg/")}
    assert moments == weights.keys() - frozen


@functools.cache
def alone(folder):
    out = folder / "alone-frozen"
    assert main([*FLAGS, "--out", str(out)]) == 0
    model = pretrained(out, torch.float64)[0]
    return metrics.read(out / "metrics.jsonl"), {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_come_back_from_a_checkpoint(ranks, dtype):
    for whole in ranks(2).run(reloaded, dtype):
        for stage, weights in whole.items():
            want = drawn(sized("test"), 1)
            for name, got in weights.items():
                assert torch.equal(got, want(name, ()).to(got.dtype)), (stage, name)


def reloaded(dtype):
    """{stage: {name: whole weight}} of two ranks that were drawn from seed 0 and loaded what seed 1 wrote."""
    found = {}
    for stage in (0, 1, 2):
        old, new = (Replica(sized("test"), TrainFlags(
            ModelFlags(dtype=dtype, freeze=("embed.*", "blocks.2.*"), seed=seed),
            mesh=MeshFlags(zero=stage, dp=2)), Mesh(dp=world_size())) for seed in (1, 0))
        new.load([(piece, tensor.clone()) for piece, tensor in old.pieces()], old.state())
        model = new.parallel.each[0].model
        found[stage] = {name: p.detach().clone() for name, p in model.named_parameters()
                        if name.startswith(("embed.", "blocks.2."))}
    return found


def test_the_flags_reach_the_optimizer_and_the_run_says_what_it_trains(tmp_path, capsys):
    given = "--freeze embed.* --lr 0.01 --min-lr 0.004 --warmup 0"
    argv, moved = [*FLAGS[:FLAGS.index("--freeze")], *given.split()], {}
    for steps, decay in ((1, 0.0), (1, 0.3), (2, 0.3)):
        out = tmp_path / f"{steps}-{decay}"
        assert main([*argv, "--steps", str(steps), "--weight-decay", str(decay), "--out", str(out)]) == 0
        moved[steps, decay] = pretrained(out, torch.float64)[0].get_parameter("blocks.1.mlp.up.weight")
    assert "62,816 parameters (54,592 of them trained)" in capsys.readouterr().out
    rates = [line["lr"] for line in metrics.read(out / "metrics.jsonl")]
    assert rates == pytest.approx([0.01, 0.007])           # a cosine's beginning and its middle
    first = drawn(sized("test", 257, 23, False), 0)("blocks.1.mlp.up.weight", ()).double()
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
    """As formulas/footprint.py counts it."""
    def bytes_held(*freeze):
        flags = TrainFlags(ModelFlags(dtype="bfloat16", freeze=freeze), mesh=MeshFlags(zero=zero))
        recipe = Recipe(8, 1, dtype="bfloat16", frozen=frozen_names(freeze, UNTIED))
        replica = stepped(flags)
        held = metrics.held([*replica.tensors(), *replica.grads.values()])
        assert held == sum(model_states(UNTIED, Layout(zero=zero), recipe).values())
        return held
    blocks = sum(torch.Size(shape).numel() for name, shape in shapes(UNTIED).items() if ".0." in name)
    saved = blocks * (16 if zero < 3 else 14)              # masters, two moments, gradients; the weights stay
    assert bytes_held() - bytes_held("blocks.0.*") == saved


def stepped(flags):
    """One rank's replica after a step's backward, its gradients in hand."""
    replica = Replica(UNTIED, flags, Mesh())
    x = torch.ones(2, 8, dtype=torch.long)
    replica.begin([(x, x)], 16, lr=1e-3)
    execute(accumulate(1), replica)
    return replica
