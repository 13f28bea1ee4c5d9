"""Ranks are killed, stopped, starved of disk; checkpoints are broken: the run ends as if nothing had been."""
import os
import random
import signal
import time

import pytest

from nanoinfra.train import metrics_and_plots
from nanoinfra.train.launch.elastic_rank import find_hung_ranks
from tests.processes import alive, until
from tests.train.faults import (
    CONSTANT,
    FAULTS,
    Survivor,
    TorchrunSurvivor,
    corrupt,
    disturb,
    fill_disk,
    kill,
    leaves_nothing,
    needs_linux,
    processes_of,
    stop,
)
from tests.train.runs import FLAGS, bits, children, close, finish, running, undisturbed, weights


def survives(tmp_path, faults, draw, steps, kind=Survivor, **more) -> str:
    """The run ends with the lines and the weights of one that nothing disturbs; what it said."""
    want, shared = undisturbed(tmp_path, "--steps", str(steps)), set(os.listdir("/dev/shm"))
    with kind(tmp_path / "disturbed", steps, len(faults), **more) as survivor:
        disturb(survivor, faults, draw)
        assert survivor.process.wait() == 0, survivor.said.read_text()
    got = metrics_and_plots.read_metrics(survivor.run / "metrics.jsonl")
    assert bits(got) == bits(want)
    assert weights(survivor.run) == weights(tmp_path / "undisturbed")
    if kind is Survivor:                               # torchrun's own notes in TMPDIR are torchrun's
        leaves_nothing(survivor, shared)
    return survivor.said.read_text()


@needs_linux
@pytest.mark.prove
def test_a_hung_rank_is_named_and_ended_and_the_run_goes_on(tmp_path):
    said = survives(tmp_path, [stop], random.Random(3), steps=12)
    assert "was stopped: ended it" in said
    assert "was killed by signal 9; all ranks start again (0 more restarts)" in said


@needs_linux
@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_a_hundred_faults_in_a_row(tmp_path):
    """FAULTS=5 for fewer of them, SEED=1 to see the same ones again."""
    n, seed = int(os.environ.get("FAULTS", "100")), int(os.environ.get("SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    faults = [*FAULTS, *(draw.choice(FAULTS) for _ in range(n - len(FAULTS)))]
    print(f"seed {seed}: " + ", ".join(f"{faults.count(fault)} {fault.__name__}" for fault in FAULTS))
    said = survives(tmp_path, faults, draw, steps=8 * n + 50)
    assert said.count("all ranks start again") == n
    assert said.count("was stopped: ended it") == faults.count(stop)
    assert said.count("refused checkpoint") > 0


@needs_linux
@pytest.mark.prove
def test_under_torchrun_too(tmp_path):
    faults = [*FAULTS, kill, stop]
    said = survives(tmp_path, faults, random.Random(0), 100, kind=TorchrunSurvivor)
    assert said.count("was stopped: ended it") == 2 and "refused checkpoint" in said


@needs_linux
@pytest.mark.prove
@pytest.mark.parametrize("mesh", ["--pp 2", "--tp 2 --sp", "--dp 2 --zero 3", "--dp 2 --pp 2"])
def test_every_kind_of_mesh_survives(tmp_path, mesh):
    """To rounding: the losses here are those of two data-parallel ranks."""
    want = undisturbed(tmp_path, "--steps", "60")
    with Survivor(tmp_path / "disturbed", 60, 3, mesh.split()) as survivor:
        disturb(survivor, [kill, stop, fill_disk], random.Random(mesh))
        assert survivor.process.wait() == 0, survivor.said.read_text()
    close(metrics_and_plots.read_metrics(survivor.run / "metrics.jsonl"), want)


@needs_linux
@pytest.mark.prove
def test_the_launcher_is_killed_and_one_rank_is_left(tmp_path):
    """Its ranks die with it; the run goes on with fewer, on the same global batch, and cleans up."""
    want, shared = undisturbed(tmp_path, "--steps", "60"), set(os.listdir("/dev/shm"))
    with Survivor(tmp_path / "disturbed", 60, restarts=9) as survivor:
        disturb(survivor, [kill, corrupt], random.Random(1))
        survivor.process.kill()
        survivor.process.wait()
        until(lambda: not processes_of(survivor.run))
    assert not list(survivor.tmp.glob("nanoinfra*"))
    one = [*FLAGS, *CONSTANT, "--steps", "60", "--dp", "1", "--out", str(survivor.run)]
    assert finish([*one, "--resume"]) == 0
    close(metrics_and_plots.read_metrics(survivor.run / "metrics.jsonl"), want)
    leaves_nothing(survivor, shared)


@needs_linux
@pytest.mark.prove
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing(tmp_path, sign):
    shared = set(os.listdir("/dev/shm"))
    with Survivor(tmp_path / "disturbed", 10**5, restarts=9) as survivor:
        survivor.next_attempt(5)
        survivor.process.send_signal(sign)
        assert survivor.process.wait() == 0, survivor.said.read_text()
        (survivor.run / "stopped.json").unlink()
        leaves_nothing(survivor, shared)


@needs_linux
@pytest.mark.prove
@pytest.mark.parametrize("mesh", ["--dp 1", "--dp 2"])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_is_one_rule(tmp_path, mesh, sign):
    """From Python's first imports to the middle of steps and saves: saved and 0, or one line and 128 + n."""
    draw = random.Random(f"{mesh} {sign}")
    for i in range(10):
        run = tmp_path / str(i)
        with running([*FLAGS, *mesh.split(), "--steps", "100000", "--out", str(run)]) as process:
            time.sleep(0.5)                            # until Python runs a line of ours
            for _ in range(draw.randrange(40)):
                time.sleep(0.25 * (process.poll() is None))
            process.send_signal(sign)
            said = process.communicate()[1].splitlines()
        assert all("nanoinfra: " in line for line in said if line), said
        saved = process.returncode == 0
        assert process.returncode in (0, 128 + sign) and (" saved in " if saved else "stopped by") in said[-1]
        assert saved == (run / "stopped.json").exists()


@needs_linux
@pytest.mark.prove
@pytest.mark.parametrize("mesh", ["--dp 1", "--dp 2"])
def test_a_second_signal_ends_it_at_once(tmp_path, mesh):
    """Though a step takes long, or a rank is stopped and would never save."""
    with running([*FLAGS, *mesh.split(), "--seq", "4000", "--micro-batch", "64", "--global-batch", "128",
                  "--steps", "100000", "--out", str(tmp_path)]) as process:
        until((tmp_path / "config.json").exists, process)
        ranks = children(process.pid)
        if ranks:
            os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(2)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(1.5)
        asked, stopped = process.communicate()[1].splitlines()
    assert process.returncode == 130 and "SIGINT: the run stops after this step" in asked
    assert stopped.startswith("nanoinfra: stopped by SIGINT")
    assert not any(map(alive, ranks))


@needs_linux
@pytest.mark.prove
def test_no_restart_left_is_a_failure_that_leaves_nothing(tmp_path):
    shared = set(os.listdir("/dev/shm"))
    with Survivor(tmp_path / "disturbed", 10**5, restarts=0) as survivor:
        survivor.next_attempt(3)
        stop(survivor, random.Random(0))
        assert survivor.process.wait() == 1
        assert "--resume goes on from the last checkpoint" in survivor.said.read_text()
        leaves_nothing(survivor, shared)


@pytest.mark.prove
def test_a_users_mistake_is_not_tried_again(tmp_path):
    """One that only ranks see: the launcher would have said that there is no such folder."""
    (tmp_path / "run").mkdir()
    argv = [*FLAGS, "--dp", "2", "--out", str(tmp_path / "run"), "--resume", "--max-restarts", "5"]
    with running(argv) as process:
        said = process.communicate()[1]
    assert process.returncode == 2
    assert said.startswith("nanoinfra: --resume: no good checkpoint") and said.count("\n") == 1


def test_the_culprit_waits_for_nobody():
    """Rank 0 waits for 1, which waits for 2: rank 2 is the one that hangs."""
    def waits(line, ranks):
        return {"state": "waits", "line": line, "count": 1, "ranks": ranks, "entered": {line: 1}}
    hangs = {"state": "left", "entered": {}}
    assert find_hung_ranks(0, [waits("pp 1>0", (1, 0)), waits("pp 2>1", (2, 1)), hangs]) == [2]
    assert find_hung_ranks(0, [waits("dp", (0, 1, 2)), hangs, {}]) == [1, 2]
    assert find_hung_ranks(0, [waits("a", (0, 1)), waits("b", (0, 1))]) == []  # each waits for the other
