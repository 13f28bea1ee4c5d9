"""Tensor parallelism by itself: what it sends, the largest tensor it makes, a foreign model around it."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanoinfra.distributed.mesh import Mesh, single_rank_axis
from nanoinfra.formulas.collectives import ring_bytes_per_rank
from nanoinfra.formulas.tensor_parallel import SEQUENCE_PARALLEL_MODES as SP
from nanoinfra.formulas.tensor_parallel import kv_head_replicas, tp_collectives_per_step
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.parallelize import ParallelChunk, ParallelConfig
from nanoinfra.parallel.sequence_parallel import SequenceParallelRegion
from nanoinfra.parallel.tensor_parallel import (
    TensorParallelRegion,
    column_parallel_linear,
    shard_linear,
)
from tests.parallel.test_tensor_parallel_decoder import config, drawn

ROOT = Path(__file__).resolve().parents[2]
B, T = 3, 7


@pytest.mark.parametrize("family, tp, sp, recompute, micro_batches", [
    *(("gpt2", 2, sp, recompute, 2) for sp in SP for recompute in ("none", "selective", "full")),
    *((family, 4, sp, "none", 1) for family in ("llama", "qwen3", "bloom") for sp in SP),
    ("llama-9/3", 3, "gather", "full", 1), ("opt", 4, "none", "full", 1)])
def test_sends_what_the_paper_says(ranks, family, tp, sp, recompute, micro_batches):
    want = tp_collectives_per_step(config(family), tp, B, T, micro_batches, dtype_bytes=8, grad_bytes=8,
                                   sp=sp,
                                   recompute=recompute)
    for got, wire in ranks(tp).run(sent, family, tp, sp, recompute, micro_batches):
        assert got == want
        payload = {op: sum(n for (o, _), (_, n) in want.items() if o == op) for op, _ in want}
        if kv_head_replicas(config(family), tp) == 1:            # or else k and v are summed over fewer ranks
            assert wire == pytest.approx(sum(ring_bytes_per_rank(op, n, tp) for op, n in payload.items()))


@pytest.mark.parametrize("sp", SP)
def test_no_tensor_is_larger_than_a_ranks_logits(ranks, sp):
    """With a vocabulary that outweighs everything else: B T ceil(V/t) numbers, forward and backward."""
    V, most = 997, 2 * 12 * -(-997 // 4)
    got = ranks(4).run(largest, sp, V)
    assert max(got) == most > 2 * 12 * V / 4 - 1


def test_an_axis_of_one_rank_is_the_plain_layer():
    torch.manual_seed(0)
    up, down, x = nn.Linear(5, 8).double(), nn.Linear(8, 5).double(), torch.randn(2, 3, 5).double()
    plain, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = down(up(plain).tanh())
    want.sum().backward()
    grads = [p.grad.clone() for p in (*up.parameters(), *down.parameters())]
    up.zero_grad(), down.zero_grad()
    region = TensorParallelRegion(single_rank_axis("tp"))
    h, = region.column_parallel_linear(ours, up)
    got = region.row_parallel_linear(h.tanh(), down)
    got.sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-13, atol=1e-13)
    for p, grad in zip((*up.parameters(), *down.parameters()), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-13, atol=1e-13)


def test_the_input_that_needs_no_gradient_sends_none(ranks):
    assert ranks(2).run(read_a_constant) == [[]] * 2


@pytest.mark.parametrize("sp", SP)
@pytest.mark.parametrize("frozen", [("q", "k", "v", "up"), ("embed", "head"), ("norm1", "norm2", "norm")])
def test_what_is_frozen_sends_no_more_and_leaves_nothing_open(ranks, sp, frozen):
    for rows, want in ranks(2).run(frozen_step, sp, frozen):
        assert all(end >= begin > 0 for _, _, begin, end in rows)
        assert [(op, tag) for op, tag, *_ in rows] == want


def test_the_inputs_gradient_travels_while_the_weights_is_computed(ranks):
    want = ["regather_input", "reduce_input_grad", "wait for regather_input", "wait for reduce_input_grad"]
    assert ranks(2).run(read_with_a_watch) == [want] * 2


def test_one_vector_is_read_and_a_frozen_share_stays_frozen():
    linear = nn.Linear(4, 2)
    out, = column_parallel_linear(TensorParallelRegion(single_rank_axis("tp")), torch.ones(4), linear)
    out.sum().backward()
    torch.testing.assert_close(linear.weight.grad, torch.ones(2, 4))
    frozen = nn.Linear(4, 2).requires_grad_(False)
    mine = shard_linear(frozen, 0, type("A", (), {"size": 2, "rank": 1})).weight
    assert not mine.requires_grad and mine.shape == (1, 4) and mine.untyped_storage().nbytes() == 16


def test_a_width_that_the_ranks_cannot_share_is_refused():
    axis = type("A", (), {"size": 3, "rank": 0})
    with pytest.raises(ValueError, match="3 ranks cannot share 8 outputs evenly; give a width that"):
        shard_linear(nn.Linear(6, 8), 0, axis)
    with pytest.raises(ValueError, match="3 ranks cannot share 8 inputs evenly"):
        shard_linear(nn.Linear(8, 6), 1, axis)


@pytest.mark.prove
def test_lifted_alone_it_trains_a_foreign_module(tmp_path):
    for room in ("nanoinfra/distributed", "nanoinfra/formulas"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / "nanoinfra" / "formulas").iterdir():
        if path.name not in ("__init__.py", "collectives.py"):          # the emulated wire's, nothing else
            path.unlink()
    (tmp_path / "nanoinfra" / "__init__.py").touch()
    (tmp_path / "nanoinfra" / "parallel").mkdir()
    for name in ("tensor_parallel.py", "sequence_parallel.py"):
        shutil.copy(ROOT / "nanoinfra" / "parallel" / name, tmp_path / "nanoinfra" / "parallel")
    (tmp_path / "foreign.py").write_text(FOREIGN)
    done = subprocess.run([sys.executable, "foreign.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"] * 6


FOREIGN = """
import torch
from torch import nn
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.parallel.sequence_parallel import SequenceParallelRegion
from nanoinfra.parallel.tensor_parallel import TensorParallelRegion, shard_linear

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.in_proj = lambda x, *linears: [linear(x) for linear in linears]
        self.out_proj = lambda y, linear: linear(y)

    def forward(self, x):
        h, = self.in_proj(self.norm(x), self.up)
        return x + self.out_proj(h.relu(), self.down)

def train(n, how):
    torch.manual_seed(0)
    net, x, axis = Net().double(), torch.randn(2, 5, 6).double(), Mesh(tp=n).tp
    if how != "plain":
        region = (TensorParallelRegion(axis) if how == "whole" else
                  SequenceParallelRegion(axis, save_gathered=how == "keep"))
        net.in_proj = region.column_parallel_linear
        net.out_proj = region.row_parallel_linear
        shard_linear(net.up, 0, axis), shard_linear(net.down, 1, axis)
    for _ in range(3):
        if how in ("keep", "gather"):
            region.set_seq_len(5)
            mine = torch.zeros(2, 3, 6).double()
            start = 3 * axis.rank
            mine[:, :min(3, 5 - start)] = x[:, start:start + 3]
            loss = (net(mine)[:, :min(3, 5 - start)] ** 2).sum()
        else:
            loss = (net(x) ** 2).sum()
        loss.backward()
        if how in ("keep", "gather"):                  # what saw my tokens alone
            from nanoinfra.distributed import comm
            for p in (*net.norm.parameters(), net.down.bias):
                comm.all_reduce(p.grad, axis)
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.01 * p.grad
                p.grad = None
    up, down = net.up.weight.detach(), net.down.weight.detach()
    return up, down, net.norm.weight.detach(), net.down.bias.detach()

if __name__ == "__main__":
    up, down, norm, bias = train(1, "plain")
    with RankPool(2) as two:
        for how in ("whole", "keep", "gather"):
            for rank, got in enumerate(two.run(train, 2, how)):
                want = up[4 * rank:][:4], down[:, 4 * rank:][:, :4], norm, bias
                same = all(torch.allclose(g, w, rtol=1e-12) for g, w in zip(got, want))
                print("same" if same else "different")
"""


def composed(family, mesh, plan, **sizes):
    cfg = config(family, **sizes)
    return ParallelChunk(decoder_on_meta_device(cfg, "naive"), mesh, plan, drawn(cfg))


def step(parallel, micro_batches, seq):
    x = torch.ones(B, seq, dtype=torch.long)
    parallel.data_parallel.zero_grad()
    for i in range(micro_batches):
        parallel.data_parallel.prepare_for_backward(is_last=i == micro_batches - 1)
        parallel.loss_head(parallel.model.hidden_states(x), x).mean().backward()
    return parallel.finish_grad_sync()


def sent(family, tp, sp, recompute, micro_batches):
    mesh = Mesh(tp=tp)
    parallel = composed(family, mesh,
                        ParallelConfig(sequence_parallel=sp, recompute=recompute, dtype=torch.float64))
    mesh.comm_log.take_records()
    step(parallel, micro_batches, T)
    rows, found = mesh.comm_log.take_records(), {}
    for row in rows:
        assert row.axis_name == "tp"
        calls, payload = found.get((row.op, row.tag), (0, 0))
        found[row.op, row.tag] = calls + 1, payload + row.payload_bytes
    return found, sum(row.modelled_ring_bytes for row in rows)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def largest(sp, vocab):
    parallel = composed("llama", Mesh(tp=4), ParallelConfig(sequence_parallel=sp, dtype=torch.float64),
                        vocab=vocab)
    x = torch.ones(2, 12, dtype=torch.long)
    with Largest() as seen:
        parallel.loss_head(parallel.model.hidden_states(x), x).mean().backward()
    return seen.numel


def frozen_step(sp, frozen):
    """[(op, tag, begin, end)] of a step, and the calls that there should be."""
    mesh, cfg = Mesh(tp=2), config("gpt2", tied=False)
    model = decoder_on_meta_device(cfg, "naive")
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[-2] not in frozen)
    parallel = ParallelChunk(model, mesh, ParallelConfig(sequence_parallel=sp, dtype=torch.float64),
                             drawn(cfg))
    mesh.comm_log.take_records()
    x = torch.ones(B, T, dtype=torch.long)
    parallel.data_parallel.zero_grad()
    parallel.data_parallel.prepare_for_backward(is_last=True)
    parallel.loss_head(model.hidden_states(x), x).mean().backward()
    rows = [(row.op, row.tag, row.start_time, row.end_time) for row in mesh.comm_log.take_records()]
    again, enter, leave = sp == "gather", "all_gather", "reduce_scatter"
    if sp == "none":
        enter, leave = None, "all_reduce"
    fwd = [(enter, "layers"), (leave, "layers")]
    once_more = [(enter, "layers")] if again and "q" not in frozen else []
    back = [(enter, "layers"), *once_more, (leave, "layers")]
    ends = [(enter, "ends"), *[("all_reduce", "loss")] * 3,
            *([(enter, "ends")] if again and "head" not in frozen else []), (leave, "ends")]
    first = [] if "embed" in frozen else [(enter, "ends")]
    want = [(leave, "ends"), *fwd * 4, *ends, *back * 4, *first]
    return rows, [call for call in want if call[0]]


def read_with_a_watch():
    """The order of what `_Read`'s backward does."""
    axis, seen = Mesh(tp=2).tp, []

    class Watched:
        def __init__(self, pending, name):
            self.pending, self.name = pending, name

        def wait(self):
            seen.append(f"wait for {self.name}")
            return self.pending.wait()

    class Region(SequenceParallelRegion):
        def reduce_input_grad(self, grad, tag):
            seen.append("reduce_input_grad")
            return Watched(super().reduce_input_grad(grad, tag), "reduce_input_grad")

        def regather_input(self, kept, tag):
            seen.append("regather_input")
            return Watched(super().regather_input(kept, tag), "regather_input")
    region = Region(axis, save_gathered=False)
    region.set_seq_len(4)
    out, = column_parallel_linear(region, torch.ones(1, 2, 3, requires_grad=True), nn.Linear(3, 2))
    out.sum().backward()
    return seen


def read_a_constant():
    mesh = Mesh(tp=2)
    linear = nn.Linear(4, 2)
    out, = column_parallel_linear(TensorParallelRegion(mesh.tp), torch.ones(3, 4), linear)
    out.sum().backward()
    assert linear.weight.grad is not None
    return mesh.comm_log.records
