"""Two groups of parameters of one model, each over an axis of its own, as experts and the rest have them.

A toy mixture of two experts on four ranks: a rank holds one expert, for its own samples, so an expert's
gradient is summed over the ranks that hold it and the rest's over all.
"""
import pytest
import torch
from torch import nn

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.zero import zero_model_state_bytes_of_shapes, zero_padded_numel
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.zero import ZeroDataParallel
from nanoinfra.train.optimizer import MixedPrecisionOptimizer
from tests.parity import assert_same_gradients

RANKS, SAMPLES, STEPS = 4, 8, 3
STAGES = [(0, 0), (1, 1), (2, 2), (3, 3), (3, 0), (1, 3), (0, 2)]      # of the rest, of the experts


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
                                     for _ in range(experts))

    def forward(self, x, expert):
        return x + self.experts[expert](torch.tanh(self.shared(x)))


class Mixture(nn.Module):
    def __init__(self, experts, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.blocks = nn.ModuleList(Block(experts) for _ in range(2))
        self.last = nn.Linear(5, 2)          # after the blocks: ZeRO-3 fetches units in this order
        self.ungrouped = nn.Parameter(torch.full((2,), float(seed)))
        self.double()

    def forward(self, x, expert):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, expert)
        return self.last(x) + 0 * self.ungrouped


def names_of(net, experts):
    return {name for name, _ in net.named_parameters()
            if name != "ungrouped" and ("experts" in name) == experts}


def samples():
    return torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(1)).double().split((3, 2), dim=1)


def loss_of(net, x, y, expert):
    return (net(x, expert) - y).square().sum() / SAMPLES


def trained_alone(expert_axis):
    """[{name: gradient} of each step], and the weights after them, of both experts in one process."""
    of_rank = expert_of_rank(expert_axis)
    net = Mixture(2, seed=0)
    for i, block in enumerate(net.blocks):                       # an expert starts as its first rank's
        for expert in range(2):
            first = Mixture(1, seed=of_rank.index(expert)).blocks[i].experts[0]
            block.experts[expert].load_state_dict(first.state_dict())
    rest = {name: p for name, p in Mixture(1, seed=0).state_dict().items() if "experts" not in name}
    net.load_state_dict(rest, strict=False)
    (x, y), sgd, grads = samples(), torch.optim.SGD(net.parameters(), lr=0.1), []
    for _ in range(STEPS):
        sgd.zero_grad()
        for rank in range(RANKS):
            loss_of(net, x[rank::RANKS], y[rank::RANKS], of_rank[rank]).backward()
        grads.append({name: p.grad.clone() for name, p in net.named_parameters() if name != "ungrouped"})
        sgd.step()
    return grads, {name: p.detach() for name, p in net.named_parameters() if name != "ungrouped"}


def expert_of_rank(expert_axis):
    """Which expert a rank holds, where the ranks of `expert_axis` of split("data", 2) hold the same."""
    return [0, 0, 1, 1] if expert_axis == "inner" else [0, 1, 0, 1]


def grouped(mesh, stages, expert_axis):
    """(the rank's model, its two groups)."""
    net = Mixture(1, seed=mesh.rank)
    axis = mesh.split("data", 2)[expert_axis == "inner"]
    groups = []
    for experts, stage, over in zip((False, True), stages, (mesh.data, axis)):
        names = names_of(net, experts)
        groups.append(ZeroDataParallel(net, over, stage, bucket_bytes=400, param_names=names) if stage
                      else DataParallel(net, over, bucket_bytes=400, param_names=names))
    return net, groups


def described(group, tensors, expert):
    """{name in the model of both experts: ((start, stop) of its rows, those rows)}."""
    rows = getattr(group, "row_ranges", {})
    return {name.replace("experts.0", f"experts.{expert}"):
            ((rows.get(name) or (0, len(x))), x.detach()[:len(x)].clone()) for name, x in tensors.items()}


def train_grouped(stages, expert_axis):
    mesh = Mesh(dp=RANKS)
    net, groups = grouped(mesh, stages, expert_axis)
    expert, (x, y) = expert_of_rank(expert_axis)[mesh.rank], samples()
    optimizer = MixedPrecisionOptimizer({name: shard for group in groups
                                         for name, shard in group.param_shards.items()}, "sgd")
    grads, sent, held = [], [], []
    for _ in range(STEPS):
        mesh.comm_log.take_records()
        for group in groups:
            group.zero_grad()
        micro_batches = list(zip(x[mesh.rank::RANKS].split(1), y[mesh.rank::RANKS].split(1)))
        for i, (some_x, some_y) in enumerate(micro_batches):
            for group in groups:
                group.prepare_for_backward(is_last=i == len(micro_batches) - 1)
            loss_of(net, some_x, some_y, 0).backward()
        found = [group.finish_grad_sync() for group in groups]
        grads.append({name: part for group, mine in zip(groups, found)
                      for name, part in described(group, mine, expert).items()})
        held.append([unique_bytes(group) for group in groups])
        optimizer.step(found[0] | found[1], lr=0.1)
        for group in groups:
            group.all_gather_params()
        sent.append(mesh.comm_log.take_records())
    weights = {name: part for group in groups
               for name, part in described(group, group.param_shards, expert).items()}
    freed = {name for name, p in net.named_parameters() if p.untyped_storage().nbytes() == 0}
    return {"grads": grads, "weights": weights, "sent": sent, "held": held, "freed": freed,
            "ungrouped": (net.ungrouped.tolist(), net.ungrouped.grad.tolist())}


def unique_bytes(group):
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes()
                for x in group.persistent_tensors()}.values())


@pytest.mark.parametrize("expert_axis", ["inner", "outer"])
@pytest.mark.parametrize("stages", STAGES)
def test_two_groups_on_two_axes_match_one_process(ranks, stages, expert_axis):
    want_grads, want_weights = trained_alone(expert_axis)
    every = ranks(RANKS).run(train_grouped, stages, expert_axis)
    for step, want in enumerate(want_grads):
        assert_parts_make([each["grads"][step] for each in every], want, f"gradients of step {step}")
    assert_parts_make([each["weights"] for each in every], want_weights, "weights")
    for rank, each in enumerate(every):
        assert each["ungrouped"] == ([float(rank)] * 2, [0.0] * 2)         # neither broadcast nor moved
        assert each["freed"] == {name for experts, stage in zip((False, True), stages) if stage == 3
                                 for name in names_of(Mixture(1, 0), experts)}


def assert_parts_make(every, want, where):
    """Each rank's rows are those of the whole, and all ranks' together are all of it."""
    seen = {name: torch.zeros(len(w)) for name, w in want.items()}
    for rank, parts in enumerate(every):
        got = {name: w.clone() for name, w in want.items()}
        for name, ((start, stop), rows) in parts.items():
            got[name][start:stop], seen[name][start:stop] = rows[:stop - start], 1
            assert rows[stop - start:].abs().sum() == 0
        assert_same_gradients(got, want, where=f"{where}, rank {rank}")
    assert all(each.all() for each in seen.values())


@pytest.mark.parametrize("stages", STAGES)
def test_each_group_sends_and_holds_what_the_formulas_say_of_its_axis(ranks, stages):
    shapes = [[tuple(p.shape) for name, p in Mixture(1, 0).named_parameters()
               if name in names_of(Mixture(1, 0), experts)] for experts in (False, True)]
    for each in ranks(RANKS).run(train_grouped, stages, "outer"):
        for i, (stage, n) in enumerate(zip(stages, (RANKS, 2))):
            for rows in each["sent"]:
                sent = {}
                for row in rows:
                    if row.axis_size == n:
                        sent[row.op] = sent.get(row.op, 0) + row.payload_bytes
                assert sent == payload_of(shapes[i], n, stage, micro_batches=2), (stages, i)
            states = zero_model_state_bytes_of_shapes(shapes[i], shapes[i], n, stage, "float64", "sgd")
            kept = states["weights"] + states["gradients"] // (n if stage == 1 else 1)       # after the step
            assert [held[i] for held in each["held"]] == [kept] * STEPS


def payload_of(shapes, n, stage, micro_batches):
    psi = 8 * sum(zero_padded_numel(shape, n if stage else 1) for shape in shapes)
    if not stage:
        return {"all_reduce": psi}
    return {"reduce_scatter": psi * (1 if stage == 1 else micro_batches),
            "all_gather": psi * (2 * micro_batches if stage == 3 else 1)}


@pytest.mark.parametrize("make", [DataParallel, lambda net, axis, param_names: ZeroDataParallel(
    net, axis, 2, param_names=param_names)], ids=["data parallel", "zero"])
def test_wrong_groups_are_refused(make):
    net, axis = Mixture(1, 0), Mesh().data
    with pytest.raises(ValueError, match="no parameter is called blocks.9.bias; param_names are"):
        make(net, axis, param_names={"blocks.9.bias", "first.weight"})
    make(net, axis, param_names={"first.weight", "last.weight"})
    with pytest.raises(ValueError, match="gradients of last.weight are summed by another group already, over "
                                         "the axis data; leave them out"):
        make(net, axis, param_names=["last.weight", "last.bias"])
    with pytest.raises(ValueError, match="first.weight, last.weight are summed by another group"):
        make(net, axis, param_names=None)
    make(net, axis, param_names=["last.bias"])                             # a refusal has changed nothing


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_group_without_trained_parameters_does_nothing(stage):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2).requires_grad_(False))
    for names in ((), {"1.weight", "1.bias"}):
        group = (ZeroDataParallel(net, Mesh().data, stage, param_names=names) if stage
                 else DataParallel(net, Mesh().data, param_names=names))
        group.zero_grad()
        group.prepare_for_backward(is_last=True)
        net(torch.ones(1, 3)).sum().backward()
        assert group.finish_grad_sync() == {} == group.param_shards
        assert group.frozen_params.keys() == set(names)
        group.all_gather_params()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("stage", [0, 2])
def test_a_modules_buffers_start_from_the_group_that_has_its_parameters(ranks, stage):
    for rank, (first, second) in enumerate(ranks(2).run(first_buffers, stage)):
        assert (first, second) == (1.0, rank + 1.0)


def first_buffers(stage):
    mesh = Mesh(dp=2)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    for norm in net:
        norm.running_mean.fill_(mesh.rank + 1.0)
    names = {"0.weight", "0.bias"}
    if stage:
        ZeroDataParallel(net, mesh.data, stage, param_names=names)
    else:
        DataParallel(net, mesh.data, param_names=names)
    return [norm.running_mean[0].item() for norm in net]
