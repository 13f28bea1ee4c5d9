"""Known-wrong axes and groups of parameters: split the other way, given to all, stepped with one setting."""
import torch
from torch import nn

from nanoinfra.distributed import mesh as mesh_module
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.train.optimizer import MixedPrecisionOptimizer, OptimizerGroup
from tests.parallel.test_parameter_groups import assert_parts_make, train_grouped, trained_alone

TIMEOUT, STEPS = 61.0, 2
NEIGHBOURS = [((0, 2), (0, 1)), ((1, 3), (0, 1)), ((0, 2), (2, 3)), ((1, 3), (2, 3))]
GROUPS = {"table": OptimizerGroup(["0.*"], lr_scale=0.1, weight_decay=0.0),
          "head": OptimizerGroup(["1.*"], optimizer="sgd")}

splits, grouped, stepped = Check("splits"), Check("grouped"), Check("stepped")


@splits.criterion("neighbours within, equal places across", "property")
def _(subject):
    for rank, (got, _) in enumerate(rank_pool_for_checks(4).run(halves, subject)):
        if got != NEIGHBOURS[rank]:
            raise CriterionNotMet(f"rank {rank} has outer and inner {got}, want {NEIGHBOURS[rank]}")


@splits.criterion("their groups have the mesh's timeout", "resource")
def _(subject):
    for rank, (_, got) in enumerate(rank_pool_for_checks(4).run(halves, subject)):
        if got != [TIMEOUT] * 2:
            raise CriterionNotMet(f"rank {rank}: a collective may take {got} s, want {TIMEOUT}")


def halves(split):
    """(global ranks, timeouts in s) of outer and inner, of the data axis in groups of 2."""
    axes = split(Mesh(dp=4, timeout=TIMEOUT), "data", 2)
    cpu = torch.device("cpu")
    return (tuple(axis.global_ranks for axis in axes),
            [axis.group._get_backend(cpu).options._timeout.total_seconds() for axis in axes])


@grouped.criterion("two groups on two axes train as one process", "parity")
def _(subject):
    want, weights = trained_alone("outer")
    for stages in ((0, 0), (2, 3)):
        every = rank_pool_for_checks(4).run(subject, stages, "outer")
        try:
            assert_parts_make([each["grads"][-1] for each in every], want[-1], f"stages {stages}")
            assert_parts_make([each["weights"] for each in every], weights, f"stages {stages}")
        except AssertionError as difference:
            raise CriterionNotMet(str(difference)) from None


@stepped.criterion("a group's step moves its own parameters", "property")
def _(subject):
    net = small()
    optimizer, before = subject(net, groups=GROUPS), {n: p.clone() for n, p in net.named_parameters()}
    optimizer.step_group("head", draws(net, 0), lr=0.1)
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    if moved != {"1.weight", "1.bias"}:
        raise CriterionNotMet(f"the step of the head moved {sorted(moved)}")


@stepped.criterion("each group has settings of its own", "parity")
def _(subject):
    got, want = small(), small()
    optimizer = subject(got, groups=GROUPS)
    theirs = [torch.optim.AdamW(want[0].parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
              torch.optim.SGD(want[1].parameters(), lr=0.1)]
    for step in range(STEPS):
        optimizer.step(draws(got, step), lr=0.1)
        for n, p in want.named_parameters():
            p.grad = draws(want, step)[n]
        for each in theirs:
            each.step()
    for (n, p), q in zip(got.named_parameters(), want.parameters()):
        if not torch.allclose(p, q, rtol=1e-12):
            raise CriterionNotMet(f"{n} is {(p - q).abs().max():.1e} from what its own settings make of it")


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()


def draws(net, step):
    random = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=random).double() for n, p in net.named_parameters()}


def swapped(mesh, name, inner_size):
    outer, inner = Mesh.split(mesh, name, inner_size)
    return inner, outer


def without_timeout(lines, purpose, _, world_group, make=mesh_module._process_group):
    return make(lines, purpose, None, world_group)


def every_parameter(model, names):
    return dict(model.named_parameters())


def broadcasts_all(model, selected):
    return [p.data for p in model.parameters()]


class OneLearningRate(MixedPrecisionOptimizer):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self._lr_scales = dict.fromkeys(self._lr_scales, 1.0)


class StepsEveryGroup(MixedPrecisionOptimizer):
    def step_group(self, group, grads, lr):
        for each in self.param_names:
            super().step_group(each, grads, lr)


PLACES, WAITS = (criterion.name for criterion in splits.criteria)
[TOGETHER] = (criterion.name for criterion in grouped.criteria)
MOVES, SETTINGS = (criterion.name for criterion in stepped.criteria)
SELECT = "nanoinfra.parallel.data_parallel:select_parameters"
BUFFERS = "nanoinfra.parallel.data_parallel:buffers_of_parameters"
MUTANTS = [
    Mutant("outer and inner the other way round", splits, swapped, PLACES),
    Mutant("a sub-axis with torch's timeout", splits,
           patched(Mesh.split, "nanoinfra.distributed.mesh:_process_group", without_timeout), WAITS),
    Mutant("a group that takes every parameter", grouped,
           patched(train_grouped, SELECT, every_parameter), TOGETHER),
    Mutant("a group that broadcasts what is another's", grouped,
           patched(train_grouped, BUFFERS, broadcasts_all), TOGETHER),
    Mutant("one learning rate for all groups", stepped, OneLearningRate, SETTINGS),
    Mutant("a group that steps the others too", stepped, StepsEveryGroup, MOVES),
]
