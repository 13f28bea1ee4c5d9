"""Data parallelism: the gradients are one rank's, each byte leaves once, and overlap hides what it says."""
import copy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from nanoinfra.config import config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.memory.recompute import activation_checkpoint
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.data_parallel import GRAD_SYNC_MODES, DataParallel, pack_grad_buckets
from nanoinfra.train.loss import count_valid_tokens, linear_cross_entropy
from tests.parity import assert_same_gradients

IGNORE = -100


def test_gradients_match_one_rank(ranks):
    want = gradients_alone()
    for n in (2, 3):
        for how in GRAD_SYNC_MODES:
            for rank, got in enumerate(ranks(n).run(gradients_shared, how, micro_batches=2)):
                assert_same_gradients(got, want, where=f"{how}, rank {rank} of {n}")


def test_gradients_of_unequal_micro_batches_match(ranks):
    want = gradients_alone()
    for got in ranks(4).run(gradients_shared, "overlap", micro_batches=3):
        assert_same_gradients(got, want)


def test_sends_each_gradient_once_however_often_it_accumulates(ranks):
    psi = 8 * sum(p.numel() for p in model().parameters())
    for micro_batches in (1, 3):
        for how, calls in (("each", len(list(model().parameters()))), ("buckets", 4), ("overlap", 4)):
            for rows in ranks(2).run(traffic, how, micro_batches):
                assert [row.op for row in rows] == ["all_reduce"] * calls
                assert sum(row.payload_bytes for row in rows) == psi
                assert sum(row.modelled_ring_bytes for row in rows) == psi          # 2 (N-1)/N of it, N = 2


def test_overlap_launches_within_backward_and_buckets_after(ranks):
    for how, early in (("each", False), ("buckets", False), ("overlap", True)):
        for rows, backward_end in ranks(2).run(launch_times, how):
            first = min(row.start_time for row in rows)
            assert (first < backward_end) == early, how


def test_before_the_last_micro_batch_nothing_leaves(ranks):
    for sent in ranks(2).run(sent_while_accumulating):
        assert sent == 0


def test_frozen_and_unused_parameters(ranks):
    for grads, rows in ranks(2).run(frozen_and_unused):
        assert set(grads) == {"used.weight", "unused.weight", "late.weight"}
        assert grads["unused.weight"].abs().sum() == 0
        assert torch.equal(grads["used.weight"], torch.full((3, 4), 2.0))  # ones from each of two ranks
        assert torch.equal(grads["late.weight"], torch.full((3, 4), 1.0))  # used on rank 1 alone
        assert len(rows) == 3


def test_replicas_start_equal_whatever_their_random_state(ranks):
    first, *others = ranks(3).run(first_weights)
    for other in others:
        assert torch.equal(other, first)


def test_a_bucket_reduces_in_the_dtype_asked_for(ranks):
    for grad, rows in ranks(2).run(bf16_model_float32_gradients):
        assert grad.dtype == torch.float32
        assert sum(row.payload_bytes for row in rows) == 4 * grad.numel()


def test_buckets_hold_backward_order_up_to_their_size():
    named = [(str(i), nn.Parameter(torch.zeros(size))) for i, size in enumerate((3, 5, 2, 9, 1))]
    buckets = pack_grad_buckets(named, bucket_bytes=32, grad_dtype=None)                # 8 float32 numbers
    assert [[p.numel() for p in bucket.grad_views] for bucket in buckets] == [[3, 5], [2], [9], [1]]
    assert all(view.data_ptr() >= b.flat_grads.data_ptr() for b in buckets for view in b.grad_views.values())


def test_a_module_used_twice_under_recompute_is_right_or_refused():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 3).double(), torch.ones(2, 3, dtype=torch.float64)
    net(net(x)).sum().backward()
    want = {name: p.grad for name, p in net.named_parameters()}
    for how in GRAD_SYNC_MODES:
        net.zero_grad()
        twin = copy.deepcopy(net)
        shared = DataParallel(twin, Mesh().data, how, bucket_bytes=1)
        shared.prepare_for_backward(is_last=True)
        # each use delivers its gradient
        loss = activation_checkpoint(twin, activation_checkpoint(twin, x)).sum()
        if how == "overlap":
            with pytest.raises(RuntimeError, match='used twice under recompute; use grad_sync="buckets"'):
                loss.backward()
        else:
            loss.backward()
            assert_same_gradients(shared.finish_grad_sync(), want, where=how)


def test_unknown_step_is_refused():
    with pytest.raises(ValueError, match="each, buckets, overlap"):
        DataParallel(nn.Linear(2, 2), Mesh().data, "sometimes")


@pytest.mark.timed
@pytest.mark.parametrize("how", ["buckets", "overlap"])
def test_exposed_wait_is_what_the_schedule_predicts(ranks, how):
    layers, floats, compute, wire = 4, 100_000, 0.05, (1e-3, 8e6)
    send = ring_collective_seconds("all_reduce", 4 * floats, 2,
                                   *wire)                # 0.052 s, just above compute
    want = layers * send if how == "buckets" else exposed(layers, compute, send)
    for _ in range(3):                                                     # a busy machine gets three tries
        got = max(ranks(2).run(exposed_wait, how, layers, floats, compute, wire))
        if got == pytest.approx(want, rel=0.1):
            break
    assert got == pytest.approx(want, rel=0.1)


def test_lifted_alone_it_trains_a_foreign_module(tmp_path):
    home = Path(__file__).resolve().parents[2] / "nanoinfra"
    shutil.copytree(home / "distributed", tmp_path / "nanoinfra" / "distributed")
    (tmp_path / "nanoinfra" / "parallel").mkdir()
    shutil.copy(home / "parallel" / "data_parallel.py", tmp_path / "nanoinfra" / "parallel")
    (tmp_path / "train.py").write_text(FOREIGN)
    argv = [sys.executable, "-W", "error", "train.py"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same", "same"]


FOREIGN = """
import torch
from torch import nn
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.parallel.data_parallel import DataParallel

x, y = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3

def train(n):
    mesh = Mesh(dp=n)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    shared, sgd = DataParallel(net, mesh.data, bucket_bytes=100), torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(5):
        shared.zero_grad()
        shared.prepare_for_backward(is_last=True)
        mine = slice(mesh.dp.rank, None, n)
        (nn.functional.cross_entropy(net(x[mine]), y[mine], reduction="sum") / len(x)).backward()
        for name, grad in shared.finish_grad_sync().items():
            net.get_parameter(name).grad = grad.clone()
        sgd.step()
        sgd.zero_grad()
    return torch.cat([p.detach().flatten() for p in net.parameters()])

if __name__ == "__main__":
    torch.manual_seed(0)
    want = train(1)
    with RankPool(2) as two:
        for got in two.run(train, 2):
            print("same" if torch.allclose(got, want, rtol=1e-12) else "different")
"""


def model(dtype=torch.float64):
    return init_weights(Decoder(config_for_size("test", context=16)), seed=3).to(dtype)


def samples():
    """Seven sequences whose valid targets differ: 7 does not divide by 2, 3 or 4."""
    random = torch.Generator().manual_seed(1)
    x = torch.randint(257, (7, 16), generator=random)
    y = torch.randint(257, (7, 16), generator=random)
    for i in range(7):
        y[i, 2 + 2 * i:] = IGNORE
    return x, y


def gradients_alone():
    net, (x, y) = model(), samples()
    count = int((y != IGNORE).sum())
    logits = net(x).flatten(0, 1)                                          # (B T, V)
    total = nn.functional.cross_entropy(logits, y.flatten(), ignore_index=IGNORE, reduction="sum")
    (total / count).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def gradients_shared(how, micro_batches):
    import torch.distributed as dist
    mesh = Mesh(dp=dist.get_world_size())
    torch.manual_seed(mesh.rank)                       # a random state of its own on each rank
    net, mine = model(), batches(mesh, micro_batches)
    shared = DataParallel(net, mesh.data, how, bucket_bytes=1 << 17)
    run(net, shared, mine, mesh)
    return {name: grad.clone() for name, grad in shared.grads.items()}


def batches(mesh, micro_batches):
    x, y = (part[mesh.dp.rank::mesh.dp.size] for part in samples())
    cuts = [part.tensor_split(micro_batches) for part in (x, y)]
    nothing = Batch(x.new_zeros(1, 16), y.new_full((1, 16), IGNORE))
    return [Batch(a, b) if len(a) else nothing for a, b in zip(*cuts)]


def run(net, shared, mine, mesh):
    [count] = count_valid_tokens(mine, mesh.data)
    mesh.comm_log.take_records()
    shared.zero_grad()
    for i, batch in enumerate(mine):
        shared.prepare_for_backward(is_last=i == len(mine) - 1)
        hidden = net.hidden_states(batch.tokens)
        linear_cross_entropy(hidden, net.head.weight, batch.targets, count).backward()
    return shared.finish_grad_sync()


def traffic(how, micro_batches):
    mesh = Mesh(dp=2)
    net = model()
    run(net, DataParallel(net, mesh.data, how, bucket_bytes=1 << 17), batches(mesh, micro_batches), mesh)
    return mesh.comm_log.take_records()


def launch_times(how):
    mesh = Mesh(dp=2)
    net, mine = model(), batches(mesh, 1)
    shared = DataParallel(net, mesh.data, how, bucket_bytes=1 << 14)
    mesh.comm_log.take_records()
    shared.prepare_for_backward(is_last=True)
    linear_cross_entropy(net.hidden_states(mine[0].tokens), net.head.weight, mine[0].targets, 50).backward()
    end = time.monotonic()
    shared.finish_grad_sync()
    return mesh.comm_log.take_records(), end


def sent_while_accumulating():
    mesh = Mesh(dp=2)
    net = model()
    shared = DataParallel(net, mesh.data, "overlap", bucket_bytes=1 << 14)
    mesh.comm_log.take_records()
    for batch in batches(mesh, 3)[:2]:
        shared.prepare_for_backward(is_last=False)
        linear_cross_entropy(net.hidden_states(batch.tokens), net.head.weight, batch.targets, 50).backward()
    return len(mesh.comm_log.take_records())


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.frozen = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.unused, self.late = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.frozen.weight.requires_grad_(False)


def frozen_and_unused():
    mesh = Mesh(dp=2)
    net = Partly()
    shared = DataParallel(net, mesh.data, "overlap", bucket_bytes=1)
    mesh.comm_log.take_records()
    shared.prepare_for_backward(is_last=True)
    x = torch.ones(1, 4)
    y = net.used(x) + net.frozen(x) + (net.late(x) if mesh.rank == 1 else 0)
    y.sum().backward()
    grads = {name: grad.clone() for name, grad in shared.finish_grad_sync().items()}
    return grads, mesh.comm_log.take_records()


def first_weights():
    mesh = Mesh(dp=3)
    torch.manual_seed(mesh.rank)
    net = nn.Linear(5, 5)
    DataParallel(net, mesh.data)
    return net.weight.detach().clone()


def bf16_model_float32_gradients():
    mesh = Mesh(dp=2)
    net = nn.Linear(5, 5, bias=False).bfloat16()
    shared = DataParallel(net, mesh.data, grad_dtype=torch.float32)
    mesh.comm_log.take_records()
    shared.prepare_for_backward(is_last=True)
    net(torch.ones(2, 5, dtype=torch.bfloat16)).sum().backward()
    return shared.finish_grad_sync()["weight"], mesh.comm_log.take_records()


class Slow(torch.autograd.Function):
    """Multiply by a weight; its gradient takes `compute` seconds of sleep, so that ranks share no core."""

    @staticmethod
    def forward(ctx, x, weight, compute):
        ctx.compute, ctx.size = compute, weight.shape
        return x + weight.sum()

    @staticmethod
    def backward(ctx, upstream):
        time.sleep(ctx.compute)
        return upstream, upstream * torch.ones(ctx.size), None


def exposed_wait(how, layers, floats, compute, wire):
    mesh = Mesh(dp=2, emulated_links={"dp": wire})
    weights = nn.ParameterList(nn.Parameter(torch.zeros(floats)) for _ in range(layers))
    shared = DataParallel(weights, mesh.data, how, bucket_bytes=4 * floats)
    mesh.comm_log.take_records()
    shared.prepare_for_backward(is_last=True)
    x = torch.zeros((), requires_grad=True)
    for weight in weights:
        x = Slow.apply(x, weight, compute)
    x.backward()
    shared.finish_grad_sync()
    return sum(row.wait_seconds for row in mesh.comm_log.take_records())


def exposed(layers, compute, send):
    """Bucket i is ready at (i+1) compute, sent when the wire is free; what outlasts backward is exposed."""
    free = 0.0
    for i in range(layers):
        free = max(free, (i + 1) * compute) + send
    return free - layers * compute
