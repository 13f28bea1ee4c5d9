"""Through the command line's main: a run on N ranks is the run on one, in float64, to rounding."""
import functools
import random
from itertools import product

import pytest
import torch

from nanoinfra.cli import main
from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas.tensor_parallel import tp_collectives_per_step
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.model.weights.hugging_face.load_and_save import load_hf_model, save_hf_model
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.load_and_export_models import export_to_hugging_face

FLAGS = ["train", "--model", "test", "--data", "random", "--dtype", "float64", "--steps", "5", "--seq", "23",
         "--global-batch", "7", "--warmup", "2", "--clip", "0.4"]
CASES = [  # dp, micro-batch, optimizer, untied: each value stands in some row; 7 divides by none
    (2, 1, "sgd", True), (3, 3, "adamw", True), (4, 1, "adamw", False)]                    # all: make prove
EVERY = [
    *product((2, 3, 4), (1, 3), ("adamw", "sgd"), (False, True)),
    (8, 1, "adamw", False), (8, 1, "sgd", True)]
ZERO_CASES = [  # zero, recompute, dp, micro-batch, optimizer, untied
    (1, "none", 3, 1, "adamw", False), (2, "full", 2, 3, "sgd", False), (3, "none", 4, 1, "adamw", False),
    (3, "full", 3, 3, "adamw", True)]                            # all of them: make prove
TENSOR_CASES = [  # tp, dp, more flags, micro-batch, optimizer, untied
    (2, 1, "", 3, "adamw", False), (4, 1, "--sp --sp-save-gathered", 7, "sgd", True),
    (2, 1, "--sp --recompute full", 3, "adamw", False),
    (2, 2, "--sp --zero 3 --recompute full", 3, "adamw", False)]           # and many more under make prove
EVERY_TENSOR = [
    (tp, dp, f"{sp} --zero {zero} --recompute {recompute}", 3, "adamw", untied)
    for tp, dp in ((2, 1), (4, 1), (2, 2), (2, 3), (4, 2)) for sp in ("", "--sp", "--sp --sp-save-gathered")
    for zero in (0, 1, 2, 3) for recompute, untied in (("none", False), ("full", True)) if dp > 1 or not zero]
PIPELINE_CASES = [  # pp, tp, dp, more flags, micro-batch, optimizer, untied; random ones under make prove
    (2, 1, 1, "--schedule gpipe", 2, "adamw", False),
    (2, 1, 1, "--schedule interleaved --virtual-stages 2", 2, "sgd", True),
    (4, 1, 1, "--schedule zb-h1", 3, "adamw", True), (2, 2, 1, "--sp --schedule zb-h1", 1, "adamw", False),
    (2, 1, 2, "--zero 1 --recompute full", 1, "sgd", False)]


def drawn(seed, n):
    """n random compositions of three or more techniques, on up to 8 ranks."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        pp, tp, dp = (rng.choice(sizes) for sizes in ((1, 2, 4), (1, 2), (1, 2, 3)))
        kind = rng.choice(["gpipe", "1f1b", "interleaved --virtual-stages 2", "zb-h1"]) if pp > 1 else "1f1b"
        sp = rng.choice(["", "--sp", "--sp --sp-save-gathered"]) if tp > 1 else ""
        zero = rng.choice([0, 1] if pp > 1 else [0, 1, 2, 3]) if dp > 1 else 0
        recompute = rng.choice(["none", "full"]) if kind != "zb-h1" else "none"
        micro = rng.choice([1, 2, 3])
        if pp * tp * dp > 8 or (pp == 4 and "virtual" in kind) or (
                "virtual" in kind and -(-7 // (micro * dp)) % pp) or sum(
                [pp > 1, tp > 1, dp > 1, bool(sp), zero > 0, recompute != "none"]) < 3:
            continue
        found.append((pp, tp, dp, f"--schedule {kind} {sp} --zero {zero} --recompute {recompute}", micro,
                      rng.choice(["adamw", "sgd"]), rng.choice([False, True])))
    return found


EVERY_ZERO = [(0, "full", 2, 1, "adamw", False), *product(
    (1, 2, 3), ("none", "full"), (2, 3, 4), (1, 3), ("adamw", "sgd"), (False, True))]


@pytest.mark.parametrize("dp, micro, optimizer, untied", CASES)
def test_losses_and_norms_are_those_of_one_rank(ranks, tmp_path, dp, micro, optimizer, untied):
    sent = compare(ranks, tmp_path, dp, micro, optimizer, untied)
    assert sent == {8 * (54592 + 257 * 32 * untied)}                       # each gradient once a step


@pytest.mark.parametrize("zero, recompute, dp, micro, optimizer, untied", ZERO_CASES)
def test_zero_changes_no_loss_and_no_norm(ranks, tmp_path, zero, recompute, dp, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied, "--zero", zero, "--recompute", recompute)


@pytest.mark.parametrize("tp, dp, more, micro, optimizer, untied", TENSOR_CASES)
def test_tp_and_sp_change_no_loss_and_no_norm(ranks, tmp_path, tp, dp, more, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied, "--tp", tp, *more.split(), world=tp * dp)
    if dp == 1:                                                            # or else ZeRO cuts what is summed
        sp = "keep" if "--sp-save-gathered" in more else "gather" if "--sp" in more else "none"
        recompute, want = "full" if "full" in more else "none", {}
        for rows in [micro] * (7 // micro) + [7 % micro] * (7 % micro > 0):
            step = tp_collectives_per_step(config_for_size("test"), tp, rows, 23, 1, 8, 8, sp, recompute)
            want |= {key: want.get(key, 0) * (key[1] != "tp grads") + sent for key, (_, sent) in step.items()}
        lines = metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")
        assert {line["comm"]["tp"] for line in lines} == {sum(want.values())}


@pytest.mark.parametrize("pp, tp, dp, more, micro, optimizer, untied", PIPELINE_CASES)
def test_a_pipeline_changes_no_loss_and_no_norm(ranks, tmp_path, pp, tp, dp, more, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied, "--pp", pp, "--tp", tp, *more.split(),
            world=pp * tp * dp)


@pytest.mark.prove
@pytest.mark.parametrize("pp, tp, dp, more, micro, optimizer, untied", drawn(5, 24))
def test_random_compositions(ranks, tmp_path, pp, tp, dp, more, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied, "--pp", pp, "--tp", tp, *more.split(),
            world=pp * tp * dp)


@pytest.mark.prove
@pytest.mark.parametrize("tp, dp, more, micro, optimizer, untied", EVERY_TENSOR)
def test_every_combination_of_tp_and_sp(ranks, tmp_path, tp, dp, more, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied, "--tp", tp, *more.split(), world=tp * dp)


@pytest.mark.prove
@pytest.mark.parametrize("dp, micro, optimizer, untied", EVERY)
def test_every_combination(ranks, tmp_path, dp, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied)


@pytest.mark.prove
@pytest.mark.parametrize("zero, recompute, dp, micro, optimizer, untied", EVERY_ZERO)
def test_every_combination_of_zero(ranks, tmp_path, zero, recompute, dp, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied, "--zero", zero, "--recompute", recompute)


def compare(ranks, tmp_path, dp, micro, optimizer, untied, *more, world=None):
    want = alone(optimizer, untied, tmp_path)
    argv = [*FLAGS, "--dp", str(dp), "--micro-batch", str(micro), "--optimizer", optimizer,
            "--out", str(tmp_path), *map(str, more)]
    world = world or dp
    assert ranks(world).run(main, argv + ["--untied"] * untied) == [0] * world
    got = metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5]
    for w, g in zip(want, got):
        assert g["loss"] == pytest.approx(w["loss"], rel=1e-8)
        assert g["grad_norm"] == pytest.approx(w["grad_norm"], rel=1e-8)
        assert (g["tokens"], g["lr"]) == (w["tokens"], w["lr"])
    assert any(line["grad_norm"] > 0.4 for line in want)                   # so that clipping was at work
    return {line["comm"].get("data") for line in got}


def alone(optimizer, untied, tmp_path):
    return _alone(optimizer, untied, tmp_path.parent)


@functools.cache
def _alone(optimizer, untied, folder):
    out = folder / f"alone-{optimizer}-{untied}"
    argv = [*FLAGS, "--micro-batch", "7", "--optimizer", optimizer, "--threads", "1", "--out", str(out)]
    assert main(argv + ["--untied"] * untied) == 0
    return metrics_and_plots.read_metrics(out / "metrics.jsonl")


@pytest.mark.prove
def test_a_pretrained_model_with_nine_heads_on_three_ranks(ranks, tmp_path):
    """SmolLM2's 9 query and 3 KV heads, from a Hugging Face folder and out to one again."""
    config = ModelConfig(97, 36, 2, 9, 3, 4, 50, 32, family="llama")
    save_hf_model(init_weights(Decoder(config), 0), tmp_path / "given")
    argv = [*FLAGS, "--micro-batch", "7", "--model", str(tmp_path / "given"), "--lr", "1e-3",
            "--threads", "1"]
    got = {}
    for tp, more in ((1, ()), (3, ("--sp",))):
        out = tmp_path / f"tp{tp}"
        assert set(ranks(tp).run(main, [*argv, "--tp", str(tp), *more, "--out", str(out)])) == {0}
        export_to_hugging_face(out, tmp_path / f"exported{tp}", torch.float64)
        exported = load_hf_model(tmp_path / f"exported{tp}", torch.float64)
        got[tp] = metrics_and_plots.read_metrics(out / "metrics.jsonl"), exported
    for w, g in zip(got[1][0], got[3][0], strict=True):
        assert (g["loss"], g["grad_norm"]) == pytest.approx((w["loss"], w["grad_norm"]), rel=1e-8)
    for w, g in zip(got[1][1].parameters(), got[3][1].parameters(), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype, rel", [
    ("bfloat16", 2e-3), pytest.param("float16", 2e-3, marks=pytest.mark.prove)])
def test_16_bits_under_tp_stay_near_one_rank(ranks, tmp_path, dtype, rel):
    lines = {}
    for tp in (1, 2):
        argv = [*FLAGS, "--dtype", dtype, "--micro-batch", "7", "--dp", "1", "--tp", str(tp)]
        argv += ["--threads", "1", "--out", str(tmp_path / f"{tp}")] + ["--sp"] * (tp > 1)
        assert ranks(tp).run(main, argv) == [0] * tp
        lines[tp] = metrics_and_plots.read_metrics(tmp_path / f"{tp}" / "metrics.jsonl")
    for w, g in zip(lines[1], lines[2], strict=True):
        assert g["loss"] == pytest.approx(w["loss"], rel=rel)
