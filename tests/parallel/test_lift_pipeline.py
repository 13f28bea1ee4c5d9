"""Pipeline parallelism in another's project: the few files it needs, and a module it has never seen."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[2] / "nanoinfra"
FOLDER = "parallel/pipeline"
FILES = f"{FOLDER}/schedules.py", f"{FOLDER}/split_backward.py", f"{FOLDER}/stage.py", "train/step.py"


@pytest.mark.prove
def test_lifted_alone_it_trains_a_foreign_module(tmp_path):
    shutil.copytree(HOME / "distributed", tmp_path / "nanoinfra" / "distributed",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        (tmp_path / "nanoinfra" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / file, tmp_path / "nanoinfra" / file)
    (tmp_path / "foreign.py").write_text(FOREIGN)
    done = subprocess.run([sys.executable, "-W", "error", "foreign.py"], cwd=tmp_path, capture_output=True,
                          text=True, env={"PATH": "/usr/bin", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"] * 4


FOREIGN = """
import torch
from torch import nn
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.parallel.pipeline.stage import PipelineStage
from nanoinfra.parallel.pipeline.schedules import build_pipeline_schedule
from nanoinfra.train.step import execute_schedule

x, y = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(7) % 3
micros = list(zip(x.split([2, 1, 3, 1]), y.split([2, 1, 3, 1])))
WIDE = 6

class Stage(PipelineStage):
    def __init__(self, net, mesh, kind):
        super().__init__(mesh.pp, mesh.duplicate_axis("pp"), dtype=torch.float64,
                         split_backward=kind == "zb-h1")
        self.net, self.sgd = net, torch.optim.SGD(net.parameters(), lr=0.1)

    def embed_input(self, micro):
        return micros[micro][0]

    def activation_shape(self, micro):
        return len(micros[micro][0]), WIDE

    def forward_chunk(self, chunk, x, micro):
        x = self.net(x)
        if self.axis.rank < self.axis.size - 1:
            return x
        return nn.functional.cross_entropy(x, micros[micro][1], reduction="sum") / len(y)

    def reduce_grads(self):
        self.wait_sends()

    def step(self):
        self.sgd.step()
        self.sgd.zero_grad()

def train(p, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 3))
    mesh = Mesh(pp=p)
    halves = [net] if p == 1 else [net[:2], net[2:]]                  # the second keeps names "2", "3", "4"
    stage = Stage(halves[mesh.pp.rank].double(), mesh, kind)
    for _ in range(5):
        execute_schedule(build_pipeline_schedule(kind, p, len(micros))[mesh.pp.rank], stage)
    return {name: weight.detach() for name, weight in stage.net.named_parameters()}

if __name__ == "__main__":
    want = train(1, "1f1b")
    torch.manual_seed(0)
    still = nn.Linear(5, WIDE).double().weight
    assert not torch.allclose(still, want["0.weight"], rtol=1e-2)     # it has learnt
    with RankPool(2) as two:
        for kind in ("1f1b", "zb-h1"):
            got = two.run(train, 2, kind)
            assert sorted([*got[0], *got[1]]) == sorted(want), [*map(list, got)]
            for part in got:
                alike = all(torch.allclose(part[n], want[n], rtol=1e-12) for n in part)
                print("same" if alike else "different")
"""
