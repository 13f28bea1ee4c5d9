"""A run that was killed goes on as if it had not been: bitwise on the same mesh, to 1e-8 on another."""
import json
import os
import random
import signal
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.checkpoint import save_and_load
from tests.processes import until
from tests.train.runs import (
    FLAGS,
    STEPS,
    bits,
    children,
    close,
    finish,
    lines,
    rank_of,
    running,
    undisturbed,
    weights,
)


def test_resume_is_bitwise_and_cuts_the_lines_after_the_checkpoint(ranks, tmp_path):
    want = undisturbed(tmp_path)
    run = tmp_path / "run"
    ranks(2).run(main, [*FLAGS, "--steps", "7", "--dp", "2", "--lr-schedule", "constant", "--out", str(run)])
    lost = run / "checkpoints" / "step_00000007"
    (lost / "manifest.json").unlink()                                      # as if it had died while saving
    ranks(2).run(main, [*FLAGS, "--dp", "2", "--lr-schedule", "constant", "--out", str(run), "--resume"])
    got = metrics_and_plots.read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    assert bits(got) == bits(want)
    assert weights(run) == weights(tmp_path / "undisturbed")


def test_resume_on_another_mesh_continues_the_run(ranks, tmp_path):
    want = undisturbed(tmp_path)
    run = tmp_path / "run"
    constant = ["--lr-schedule", "constant", "--out", str(run)]
    ranks(2).run(main, [*FLAGS, "--steps", "6", "--dp", "2", *constant])
    ranks(3).run(main, [*FLAGS, "--dp", "3", *constant, "--resume"])
    close(metrics_and_plots.read_metrics(run / "metrics.jsonl"), want)


def test_a_run_keeps_its_global_batch_on_fewer_ranks(ranks, tmp_path):
    """Where none is given it follows from the mesh the run began on."""
    argv = [flag for flag in FLAGS if flag not in ("--global-batch", "7")] + ["--lr-schedule", "constant"]
    want, run = tmp_path / "want", tmp_path / "run"
    assert main([*argv, "--global-batch", "6", "--out", str(want)]) == 0
    ranks(3).run(main, [*argv, "--steps", "5", "--out", str(run)])           # 3 x --micro-batch 2
    ranks(2).run(main, [*argv, "--resume", "--out", str(run)])
    close(metrics_and_plots.read_metrics(run / "metrics.jsonl"),
          metrics_and_plots.read_metrics(want / "metrics.jsonl"))


@pytest.mark.prove
@pytest.mark.parametrize("meshes", [
    ("--zero 3 --dp 3", "--zero 1 --dp 2 --tp 2 --sp", "--zero 2 --dp 4", "--tp 4"),
    ("--dp 2", "--zero 3 --dp 4", "--zero 2 --dp 3", "--zero 1")])
def test_any_mesh_goes_on_from_any_other(ranks, tmp_path, meshes):
    want = undisturbed(tmp_path)
    go_on(ranks, tmp_path / "run", meshes, every=3)
    close(metrics_and_plots.read_metrics(tmp_path / "run" / "metrics.jsonl"), want)


@pytest.mark.prove
def test_a_tour_of_all_pairs_of_meshes(ranks, tmp_path):
    meshes = ("--dp 1", "--tp 2", "--tp 4 --sp", "--tp 2 --sp --sp-save-gathered --dp 3 --zero 3",
              "--dp 2 --tp 2 --zero 1", "--dp 2 --tp 4 --zero 2 --sp", "--dp 3 --zero 3")
    n = len(meshes)
    tour = [meshes[k] for i in range(n) for j in range(i + 1, n) for k in (i, j)] + [meshes[0]]
    assert len({*zip(tour, tour[1:])}) == n * (n - 1)
    argv = [*FLAGS, "--steps", str(len(tour)), "--dp", "1", "--lr-schedule", "constant"]
    assert main([*argv, "--out", str(tmp_path / "want")]) == 0
    go_on(ranks, tmp_path / "run", tour, every=1)
    close(metrics_and_plots.read_metrics(tmp_path / "run" / "metrics.jsonl"),
          metrics_and_plots.read_metrics(tmp_path / "want" / "metrics.jsonl"))


def go_on(ranks, run, meshes, every):
    """`every` steps on each of `meshes`, one after the other."""
    for i, mesh in enumerate(meshes):
        argv = [*FLAGS, *mesh.split(), "--steps", str((i + 1) * every), "--lr-schedule", "constant", "--out",
                str(run)] + ["--resume"] * (i > 0)
        given = dict(zip(argv, argv[1:]))
        world = int(given.get("--dp", 1)) * int(given.get("--tp", 1))
        assert ranks(world).run(main, argv) == [0] * world


@pytest.mark.prove
@pytest.mark.parametrize("zero", ["1", "3"])
def test_resume_under_zero_is_bitwise(ranks, tmp_path, zero):
    argv = [*FLAGS, "--dp", "3", "--zero", zero, "--dtype", "bfloat16", "--lr-schedule", "constant"]
    for out, *parts in (("whole", STEPS), ("parts", 5, STEPS)):
        for i, n in enumerate(parts):
            ranks(3).run(main, [*argv, "--out", str(tmp_path / out), "--steps", str(n)] + ["--resume"] * i)
    got, want = (metrics_and_plots.read_metrics(tmp_path / out / "metrics.jsonl") for out in ("parts",
                                                                                              "whole"))
    assert bits(got) == bits(want)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.prove
def test_killed_rank_then_resume_is_bitwise(tmp_path):
    kill_and_resume(tmp_path, [("step", 5, 1)], seed=0)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_ten_kills_at_random_moments(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    moments = [("save" if i % 3 == 2 else "step", draw.randint(3, STEPS - 1), draw.randrange(2))
               for i in range(10)]
    kill_and_resume(tmp_path, moments, seed)


@pytest.mark.prove
def test_killed_rank_then_resume_on_three_ranks(tmp_path):
    want = undisturbed(tmp_path)
    run = tmp_path / "run"
    constant = ["--lr-schedule", "constant", "--out", str(run)]
    kill_at(run, [*FLAGS, "--dp", "2", *constant], "step", 5, 0)
    assert finish([*FLAGS, "--dp", "3", *constant, "--resume"]) == 0
    close(metrics_and_plots.read_metrics(run / "metrics.jsonl"), want)


def test_sigterm_saves_and_ends_well(tmp_path):
    run = tmp_path / "run"
    argv = [*FLAGS, "--steps", "100000", "--save-every", "0", "--dp", "2", "--out", str(run)]
    with running(argv) as process:
        until(lambda: lines(run) >= 3, process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 0, said
    saved = save_and_load.find_newest_checkpoint(run / "checkpoints")
    step = json.loads((run / "stopped.json").read_text())["step"]
    assert save_and_load.read_checkpoint_state(saved)["step"] == step == lines(run) >= 3
    assert not (run / "where_ranks_stand").exists()


def kill_and_resume(tmp_path, moments, seed):
    want = undisturbed(tmp_path)
    for i, (kind, step, rank) in enumerate(moments):
        run = tmp_path / f"run{i}"
        argv = [*FLAGS, "--dp", "2", "--lr-schedule", "constant", "--out", str(run)]
        said = kill_at(run, argv, kind, step, rank)
        assert f"rank {rank} was killed by signal 9" in said, f"seed {seed}, kill {i}: {said}"
        assert finish([*argv, "--resume"]) == 0, f"seed {seed}, kill {i}"
        got = metrics_and_plots.read_metrics(run / "metrics.jsonl")
        assert bits(got) == bits(want), f"seed {seed}, kill {i}: {kind} {step} {rank}"
        assert weights(run) == weights(tmp_path / "undisturbed")


def kill_at(run: Path, argv: list[str], kind: str, step: int, rank: int) -> str:
    """kill -9 `rank` once `step` steps are written, or at the first save after; what the launcher said."""
    with running(argv) as process:
        until(lambda: lines(run) >= step, process)
        if kind == "save":
            until(lambda: list((run / "checkpoints").glob("*.tmp")), process)
        pids = {rank_of(pid): pid for pid in children(process.pid)}
        os.kill(pids[rank], signal.SIGKILL)
        said = process.communicate()[1]
    assert process.returncode == 1
    return said
