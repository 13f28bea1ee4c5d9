"""The Slurm scripts' words, as bash would run them: `srun` and `scontrol` are stand-ins."""
import os
import subprocess
from pathlib import Path

import pytest

from nanoinfra.parse_and_run_command import parse_command_line

SLURM = Path(__file__).resolve().parents[2] / "scripts" / "slurm"
STANDINS = {"scontrol": "echo nodeA; echo nodeB", "hostname": "echo nodeB",
            "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"'}


@pytest.fixture
def run(tmp_path):
    """What torchrun, or Python, would be given on the second node, word by word."""
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for program in ("torchrun", "python"):
        (tmp_path / ".venv" / "bin" / program).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (tmp_path / ".venv" / "bin" / program).chmod(0o755)

    def words(script, *argv, **slurm):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm}
        done = subprocess.run(["bash", SLURM / script, *argv], cwd=tmp_path, env=env, check=True,
                              capture_output=True, text=True)
        return done.stdout.splitlines()
    return words


@pytest.mark.parametrize("gpus, device, ranks", [("4", "cuda", "4"), ("", "cpu", "2")])
def test_training_meets_at_the_first_node_and_may_lose_the_other(run, gpus, device, ranks):
    got = run("train.sbatch", "--model", "small", "--out", "runs/a b", SLURM_JOB_NODELIST="node[A-B]",
              SLURM_NNODES="2", SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE=gpus)
    flags = dict(word.lstrip("-").split("=", 1) for word in got if word.startswith("--") and "=" in word)
    assert (flags["nnodes"], flags["nproc-per-node"], flags["max-restarts"]) == ("1:2", ranks, "9")
    assert (flags["rdzv-endpoint"], flags["local-addr"], flags["rdzv-id"]) == ("nodeA:29400", "nodeB", "7")
    assert flags["rdzv-conf"].startswith("is_host=false,")
    ours = parse_command_line(got[got.index("nanoinfra.cli") + 1:])  # as nanoinfra understands it
    assert (ours.launch.device, ours.model.model, str(ours.run.out)) == (device, "small", "runs/a b")


def test_a_lab_starts_its_ranks_itself_on_loopback(run):
    got = run("lab.sbatch", "06", "--break", "held", SLURM_GPUS_ON_NODE="4")
    assert got == ["-m", "nanoinfra.lab.run_lab", "--nproc", "4", "06", "--break", "held"]
    assert run("lab.sbatch", SLURM_GPUS_ON_NODE="")[-2:] == ["2", "08"]
