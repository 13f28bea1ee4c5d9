"""ZeRO: the gradients are one rank's at every stage, and what is cut is neither held nor sent twice."""
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas import zero as formulas
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.memory import recompute
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.parallelize import fsdp_units
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from nanoinfra.parallel.zero import ZeroDataParallel
from nanoinfra.train.loss import count_valid_tokens
from nanoinfra.train.optimizer import MixedPrecisionOptimizer, unscale_and_clip_grads
from tests.families import KINDS
from tests.parallel.test_data_parallel import batches, gradients_alone, model
from tests.parity import assert_same_gradients

BUCKET = 1 << 16                             # several buckets of the test model's 0.4 MB in float64


@pytest.mark.parametrize("n", [2, 3, 4])
def test_gradients_match_one_rank(ranks, n):
    want = gradients_alone()
    for stage in (1, 2, 3):
        for micro_batches, how in ((1, "none"), (3, "full")):
            got = ranks(n).run(gradients_shared, stage, micro_batches, how)
            assert_same_gradients(whole(got), want, where=f"stage {stage}, {micro_batches}, recompute {how}")


def test_after_cutting_every_parameter_is_a_leaf_and_its_shards_make_it_up(ranks):
    want = {name: p.detach() for name, p in model().named_parameters()}
    for stage in (1, 2, 3):
        got = ranks(3).run(cut, stage)
        for held, *_ in got:
            assert held == {name: (0 if stage == 3 else 8 * formulas.zero_padded_numel(tuple(w.shape), 3))
                            for name, w in [*want.items(), ("head.weight", want["embed.weight"])]}
        for name, w in whole([shards for _, shards, _ in got]).items():
            assert torch.equal(w, want[name]), name
        assert [shapes["embed.weight"] for *_, shapes in got] == [(86, 32)] * 3      # ceil(257 / 3) rows


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sends_what_the_paper_says(ranks, stage):
    config = config_for_size("test", context=16)
    for n, micro_batches in ((2, 1), (3, 3)):
        bytes_ = formulas.zero_payload_bytes(config, n, stage, micro_batches, "float64")
        calls = formulas.zero_collective_calls(config, n, stage, micro_batches, "float64",
                                               bucket_bytes=BUCKET)
        for rows in ranks(n).run(traffic, stage, micro_batches):
            for op in ("reduce_scatter", "all_gather"):
                mine = [row for row in rows if row.op == op]
                assert (sum(row.payload_bytes for row in mine), len(mine)) == (bytes_[op], calls[op]), (n, op)
            assert {row.tag for row in rows} == {"grads", "weights"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_holds_no_more_than_the_formula_at_any_moment(ranks, stage, dtype):
    config = ModelConfig(64, 64, 4, 4, 2, 16, 176, 16)                     # blocks as large as the embedding
    limit, of_others = memory_limit(config, 3, stage, dtype), activations(config, dtype)
    for steps in ranks(3).run(bytes_held, config, stage, dtype):
        peaks = [max(marks, key=lambda mark: mark[1]) for marks in steps]  # gloo may let go late, once
        label, most = min(peaks, key=lambda mark: mark[1])
        assert most <= limit + of_others, f"{label}: {most:,} > {limit:,} + {of_others:,}"
        assert most > 0.6 * limit                                          # and the limit is not a loose one
        assert {label.split()[-2] for label, _ in steps[0]} >= {"enters", "leaves", "grads", "weights"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_unused_shared_and_small_parameters(ranks, stage):
    want = odd_alone()
    got = ranks(4).run(odd_shared, stage)
    assert_same_gradients(whole([grads for grads, _ in got]), want)
    assert want["unused.weight"].abs().sum() == 0 and "frozen.weight" not in want
    assert all(norm == pytest.approx(torch.stack([w.norm() for w in want.values()]).norm().item(), rel=1e-12)
               for _, norm in got)


def test_a_unit_that_is_partly_frozen_stays_whole_until_backward_has_left_it(ranks):
    want = partly_frozen()[0]
    for stage in (1, 3):
        for rank, (grads, rows, sent) in enumerate(ranks(2).run(partly_frozen, stage)):
            for name, w in want.items():
                torch.testing.assert_close(grads[name], 2 * w[slice(*rows[name])], rtol=1e-12, atol=0)
            assert sent == {1: 8 * (16 + 16 + 8), 3: 0}[stage], rank           # the frozen 16 not again


@pytest.mark.parametrize("family", KINDS)
def test_units_are_what_the_formula_takes_for_units(family):
    config = ModelConfig(63, 16, 2, 4, 4, 4, 24, 12, tied=False, family=family)
    net = Decoder(config)
    found = fsdp_units(net, VocabParallelCrossEntropy(net.head))
    got = [[tuple(p.shape) for top in unit for p in top.parameters()] for unit in found]
    assert [sorted(unit) for unit in got] == [sorted(unit) for unit in formulas.zero3_unit_shapes(config)]


def test_a_module_in_two_units_is_refused():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two units"):
        ZeroDataParallel(net, Mesh().data, 3, [[net[0], net[1]], [net[0][0]]])


def test_what_was_sent_for_and_not_used_is_never_used_later(ranks):
    for got in ranks(2).run(ways):
        assert got == [[2.0, 2.0]] * 2


def test_the_last_ranks_may_have_no_row_at_all(ranks):
    got = ranks(4).run(rows_of, 5)
    assert [rows for rows, _ in got] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert all(shard[stop - start:].abs().sum() == 0 for (start, stop), shard in got)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_replicas_start_from_rank_0(ranks, stage):
    got = ranks(3).run(first_outputs, stage)
    assert all(torch.equal(each, got[0]) for each in got)


def test_a_model_on_the_meta_device_is_filled_by_name(ranks):
    for name, shard, rows in ranks(2).run(filled_by_name):
        assert torch.equal(shard[:rows[1] - rows[0]], torch.full((rows[1] - rows[0], 5), len(name) + 0.0))


def test_torchs_own_checkpoint_and_modules_that_go_another_way(ranks):
    for got, want, unit_bytes in ranks(2).run(another_way):
        assert_same_gradients(got, want)
        assert unit_bytes == 0                                             # freed after use all the same


@pytest.mark.timed
def test_prefetch_hides_what_the_schedule_says(ranks):
    layers, floats, compute, wire = 8, 50_000, 0.025, (1e-3, 5.5e6)
    gather = ring_collective_seconds("all_gather", 4 * floats, 2,
                                     *wire)              # 0.019 s, less than compute
    scatter = ring_collective_seconds("reduce_scatter", 4 * floats, 2, *wire)
    want = stage3_seconds(layers, compute, gather, scatter)
    got = max(ranks(2).run(stage3_step, layers, floats, compute, wire))
    serial = layers * (3 * compute + 2 * gather + scatter)
    assert want < 0.75 * serial
    assert got == pytest.approx(want, rel=0.1)


@pytest.mark.prove
def test_lifted_alone_it_trains_a_foreign_module(tmp_path):
    home = Path(__file__).resolve().parents[2] / "nanoinfra"
    shutil.copytree(home / "distributed", tmp_path / "nanoinfra" / "distributed")
    (tmp_path / "nanoinfra" / "parallel").mkdir()
    shutil.copy(home / "parallel" / "zero.py", tmp_path / "nanoinfra" / "parallel")
    (tmp_path / "train.py").write_text(FOREIGN)
    argv = [sys.executable, "-W", "error", "train.py"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same", "same"] * 3


@pytest.mark.parametrize("stage", [0, 4])
def test_unknown_stage_is_refused(stage):
    with pytest.raises(ValueError, match="stages 1, 2 and 3"):
        ZeroDataParallel(nn.Linear(2, 2), Mesh().data, stage)


def test_a_unit_of_two_dtypes_is_refused():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    with pytest.raises(ValueError, match="one dtype"):
        ZeroDataParallel(net, Mesh().data, 3, [[net]])


@pytest.mark.prove
def test_payload_of_17_million_parameters_is_the_papers_within_2_percent(ranks):
    config = ModelConfig(8192, 384, 6, 6, 6, 64, 1536, 256, tied=False, family="gpt2")
    psi = 17_037_312
    for stage, a, want in ((1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 3), (3, 1, 3), (3, 2, 6)):
        for rows, counted in ranks(2).run(traffic_of, config, stage, a):
            assert counted == psi
            elements = sum(row.payload_bytes / 4 for row in rows if row.tag in ("grads", "weights"))
            assert elements == pytest.approx(want * psi, rel=0.02), (stage, a)
            assert elements * 4 == sum(formulas.zero_payload_bytes(config, 2, stage, a).values())


FOREIGN = """
import torch
from torch import nn
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.parallel.zero import ZeroDataParallel

x, y = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3

def train(n, stage):
    mesh = Mesh(dp=n)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    zero = ZeroDataParallel(net, mesh.data, stage, bucket_bytes=100)
    sgd = torch.optim.SGD(zero.param_shards.values(), lr=0.1)
    for step in range(5):
        mine = slice(mesh.dp.rank, None, n)
        zero.zero_grad()
        loss = nn.functional.cross_entropy(net(x[mine]), y[mine], reduction="sum") / len(x)
        zero.prepare_for_backward(is_last=True)
        loss.backward()
        grads = zero.finish_grad_sync()
        for name, shard in zero.param_shards.items():
            shard.grad = grads[name]
        sgd.step()
        zero.all_gather_params()
    return net(x).detach()

if __name__ == "__main__":
    with RankPool(2) as two:
        for stage in (1, 2, 3):
            want = train(1, stage)
            for got in two.run(train, 2, stage):
                print("same" if torch.allclose(got, want, rtol=1e-12) else "different")
"""


def whole(ranks):
    """{name: tensor}, put together from each rank's {name: ((start, stop), shape, shard)}."""
    return {name: torch.cat([shard[:stop - start] for (start, stop), _, shard in (r[name] for r in ranks)])
            .view(ranks[0][name][1]) for name in ranks[0]}


def described(shared, tensors):
    return {name: (shared.row_ranges[name], shared.full_shapes[name], x.clone()) for name,
            x in tensors.items()}


def zeroed(stage, n=None, **more):
    mesh = Mesh(dp=n or dist.get_world_size())
    torch.manual_seed(mesh.rank)                       # a random state of its own on each rank
    net = model()
    last = VocabParallelCrossEntropy(net.head)
    return mesh, net, last, ZeroDataParallel(net, mesh.data, stage, fsdp_units(net, last),
                                             bucket_bytes=BUCKET, **more)


def gradients_shared(stage, micro_batches, how):
    mesh, net, last, shared = zeroed(stage)
    recompute.apply_activation_checkpointing(net, how)
    run(net, last, shared, batches(mesh, micro_batches), mesh)
    return described(shared, shared.finish_grad_sync())


def run(net, last, shared, mine, mesh):
    [count] = count_valid_tokens(mine, mesh.data)
    mesh.comm_log.take_records()
    shared.zero_grad()
    for i, batch in enumerate(mine):
        loss = last(net.hidden_states(batch.tokens), batch.targets).sum() / count
        shared.prepare_for_backward(is_last=i == len(mine) - 1)
        loss.backward()
    return shared.finish_grad_sync()


def cut(stage):
    _, net, _, shared = zeroed(stage)
    held = {name: p.untyped_storage().nbytes() for name, p in net.named_parameters()}
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in net.parameters())
    return held, described(shared, shared.param_shards), {name: tuple(s.shape) for name,
                                                          s in shared.param_shards.items()}


def traffic(stage, micro_batches):
    mesh, net, last, shared = zeroed(stage)
    run(net, last, shared, batches(mesh, micro_batches), mesh)
    shared.all_gather_params()
    return mesh.comm_log.take_records()


def traffic_of(config, stage, micro_batches):
    mesh, net = Mesh(dp=2), Decoder(config)
    counted = sum(p.numel() for p in net.parameters())
    last = VocabParallelCrossEntropy(net.head)
    shared = ZeroDataParallel(net, mesh.data, stage, fsdp_units(net, last))
    x, y = torch.zeros(2, 1, 8, dtype=torch.long)
    run(net, last, shared, [Batch(x, y)] * micro_batches, mesh)
    shared.all_gather_params()
    return mesh.comm_log.take_records(), counted


def memory_limit(config, n, stage, dtype):
    """States and buffers by the formulas, and the gradient that autograd is just handing over."""
    name, grad = str(dtype).removeprefix("torch."), 4
    held = formulas.zero_model_state_bytes(config, n, stage, name, grad_bytes=grad)
    on_the_way = formulas.zero_buffer_bytes(config, n, stage, name, grad, BUCKET)
    return sum(held.values()) + on_the_way + dtype.itemsize * config.hidden * config.width


def activations(config, dtype):
    """The most that forward and backward of a micro-batch hold on one rank, beside weights and gradients."""
    net = Decoder(config).to(dtype)
    x, y = torch.zeros(2, 1, 4, dtype=torch.long)
    with LiveTensorBytes() as storages:
        storages.mark_module_boundaries(net)
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        VocabParallelCrossEntropy(net.head)(net.hidden_states(x), y).mean().backward()
        return storages.peak_bytes


def bytes_held(config, stage, dtype):
    mesh = Mesh(dp=3)
    x, y = torch.zeros(2, 1, 4, dtype=torch.long)
    with LiveTensorBytes(mark_operators=False) as storages:
        net = init_weights(Decoder(config), seed=0)
        last = VocabParallelCrossEntropy(net.head)
        shared = ZeroDataParallel(net, mesh.data, stage, fsdp_units(net, last), dtype, torch.float32, BUCKET)
        optimizer = MixedPrecisionOptimizer(shared.param_shards)
        optimizer.state_dict()  # moments from the first step on
        storages.mark_module_boundaries(nn.ModuleList([net, last]), mesh.comm_log)
        steps = []
        for _ in range(3):
            run(net, last, shared, [Batch(x, y)] * 2, mesh)
            grads = shared.finish_grad_sync()
            unscale_and_clip_grads(grads, 1.0, axes=[mesh.data])
            optimizer.step(grads, lr=1e-3)
            grads = None
            shared.all_gather_params()
            steps.append(storages.marks)
            storages.marks = []
        return steps


class Odd(nn.Module):
    """A tied head, a module used twice, a frozen and an unused one, and tensors smaller than the world."""

    def __init__(self):
        super().__init__()
        self.embed, self.twice = nn.Embedding(7, 3), nn.Linear(3, 3)
        self.frozen, self.unused = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)
        self.scale, self.gain = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, x):
        y = self.twice(torch.tanh(self.twice(self.embed(x)))) * self.scale + self.gain
        return self.head(torch.tanh(self.frozen(y)))


def odd():
    torch.manual_seed(3)
    return Odd().double(), torch.arange(12).view(4, 3) % 7, torch.arange(12).view(4, 3) % 5


def odd_alone():
    net, x, y = odd()
    nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}


def odd_shared(stage):
    mesh, (net, x, y) = Mesh(dp=4), odd()
    shared = ZeroDataParallel(net, mesh.data, stage, bucket_bytes=100)
    assert net.head.weight is not net.embed.weight                         # each use a leaf of its own
    for _ in range(2):                                                     # nothing is left from the first
        shared.zero_grad()
        for x_, y_ in zip(x[mesh.rank:mesh.rank + 1], y[mesh.rank:mesh.rank + 1]):
            loss = nn.functional.cross_entropy(net(x_[None]).flatten(0, 1), y_, reduction="sum") / y.numel()
            shared.prepare_for_backward(is_last=True)
            loss.backward()
        grads = shared.finish_grad_sync()
        shared.all_gather_params()
    return described(shared, grads), unscale_and_clip_grads(grads, 0, axes=[mesh.data])


def partly_frozen(stage=0):
    """(gradients, rows, bytes gathered after the step): the middle unit's first matrix is frozen."""
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    net = nn.Sequential(nn.Linear(4, 4, bias=False), middle, nn.Linear(4, 2, bias=False)).double()
    middle[0].weight.requires_grad_(False)
    mesh = Mesh(dp=2 if stage else 1)
    shared = ZeroDataParallel(net, mesh.data, stage, [[unit] for unit in net]) if stage else None
    if shared:
        shared.prepare_for_backward(is_last=True)
    net(torch.ones(3, 4, dtype=torch.float64)).square().sum().backward()
    if not shared:
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, None, 0
    grads = shared.finish_grad_sync()
    mesh.comm_log.take_records()
    shared.all_gather_params()
    rows = {name: shared.row_ranges[name] for name in grads}
    return grads, rows, sum(row.payload_bytes for row in mesh.comm_log.take_records())


def ways():
    """A unit was sent for, another came; then the weights changed: what do both ways give afterwards?"""
    net = nn.Sequential(*(nn.Linear(1, 2, bias=False) for _ in range(3)))
    shared, found = ZeroDataParallel(net, Mesh(dp=2).data, 3), []
    for way in ((0,), (0, 2)):
        for weight in (1.0, 2.0):
            for shard in shared.param_shards.values():
                shard.fill_(weight)
            shared.all_gather_params()
            with torch.no_grad():
                y = [net[i](torch.ones(1)) for i in (way if weight == 1.0 else (1,))][-1]
        found.append(y.tolist())
    return found


def rows_of(rows):
    shared = ZeroDataParallel(nn.Linear(3, rows, bias=False), Mesh(dp=4).data, 1)
    return shared.row_ranges["weight"], shared.param_shards["weight"].clone()


def first_outputs(stage):
    mesh = Mesh(dp=3)
    torch.manual_seed(mesh.rank)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    net[1].running_mean.fill_(mesh.rank + 1)
    ZeroDataParallel(net, mesh.data, stage)
    return net(torch.ones(2, 5)).detach()


def filled_by_name():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(5, 3, bias=False))
    shared = ZeroDataParallel(net, Mesh(dp=2).data, 3,
                              read_param=lambda name: torch.full((3, 5), len(name) + 0.0))
    [(name, shard)] = shared.param_shards.items()
    assert net(torch.ones(1, 5)).tolist() == [[5.0 * len(name)] * 3]
    return name, shard, shared.row_ranges[name]


def another_way():
    """Layers in an order of their own, one of them twice, under torch's checkpoint; beside one rank alone."""
    mesh = Mesh(dp=2)
    order = (2, 0, 1, 0)

    def gradients(shard):
        torch.manual_seed(0)
        net = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double()
        shared = ZeroDataParallel(net, mesh.data, 3) if shard else None
        x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        if shared:
            shared.prepare_for_backward(is_last=True)
        for i in order:
            x = checkpoint(lambda x, i=i: torch.tanh(net[i](x)), x, use_reentrant=False)
        x.sum().backward()
        return net, shared

    net, _ = gradients(False)
    cut_net, shared = gradients(True)
    parts = shared.finish_grad_sync()
    held = sum(p.untyped_storage().nbytes() for p in cut_net.parameters())
    want = {name: 2 * p.grad[slice(*shared.row_ranges[name])] for name, p in net.named_parameters()}
    return parts, want, held


class Sleeps(nn.Module):
    """y = x + sum of a weight; forward takes `compute` seconds of sleep, backward twice that."""

    def __init__(self, floats, compute):
        super().__init__()
        self.weight, self.compute = nn.Parameter(torch.zeros(floats)), compute

    def forward(self, x):
        return Sleep.apply(x, self.weight, self.compute)


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, compute):
        ctx.compute = compute
        ctx.save_for_backward(weight)
        time.sleep(compute)
        return x + weight.sum()

    @staticmethod
    def backward(ctx, upstream):
        time.sleep(2 * ctx.compute)
        return upstream, upstream * torch.ones_like(ctx.saved_tensors[0]), None


def stage3_step(layers, floats, compute, wire):
    mesh = Mesh(dp=2, emulated_links={"dp": wire})
    net = nn.Sequential(*(Sleeps(floats, compute) for _ in range(layers)))
    shared = ZeroDataParallel(net, mesh.data, 3)
    times = []
    for _ in range(3):
        shared.zero_grad()
        begin = time.monotonic()
        y = net(torch.zeros((), requires_grad=True))
        shared.prepare_for_backward(is_last=True)
        y.backward()
        shared.finish_grad_sync()
        times.append(time.monotonic() - begin)
    return min(times)


def stage3_seconds(layers, compute, gather, scatter):
    """One link, calls in the order made: the schedule of a step, by hand.

    Forward waits for its first gather alone; so does backward. There, layer i's gradient leaves when the
    gather of layer i-2 was sent for already, and only the last one's scatter is waited for.
    """
    now = link = 0.0

    def send(seconds):
        nonlocal link
        link = max(link, now) + seconds
        return link

    for direction in (1, 2):
        arrives = send(gather)
        for i in range(layers):
            now = max(now, arrives)
            if i + 1 < layers:
                arrives = send(gather)
            now += direction * compute
            if direction == 2:
                leaves = send(scatter)
    return max(now, leaves)
