"""One server, some, one on each worker: the same weights, and bytes that fall from 2 Psi W to ZeRO-1's."""
import functools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.collectives import pull_seconds, step_bytes
from nanoinfra.parallel.parameter_server import ParameterServer
from nanoinfra.parallel.zero import Zero

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = functools.partial(torch.optim.Adam, lr=0.01)
FORMS = [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3), (4, 4)]          # (ranks, servers)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_parameter_server_matches_one_rank(ranks, optimizer):
    want = trained_plainly(optimizer)
    assert (train(optimizer, 1)[0] - want).abs().max() <= 1e-12
    for n, servers in FORMS:
        for rank, (got, is_worker, held) in enumerate(ranks(n).run(train, optimizer, servers)):
            if is_worker:
                assert (got - want).abs().max() <= 1e-12, f"rank {rank} of {n}, {servers} servers"
            moments = (2 if optimizer is ADAM else 1) * -(-want.numel() // servers)
            assert held == (moments if rank < servers else 0)


def test_parameter_server_sends_what_the_paper_says(ranks):
    psi = 8 * sum(p.numel() for p in model().parameters())
    for n, servers in FORMS:
        padded = -(-psi // 8 // servers) * servers * 8
        want_server, want_worker = step_bytes(padded, n, servers)
        for rank, rows in enumerate(ranks(n).run(traffic, servers)):
            got = sum(row.wire_bytes for row in rows)
            assert got == pytest.approx(want_server if rank < servers else want_worker, rel=1e-12)
            assert [row.op for row in rows] == operations(rank, n, servers)
            assert sum(row.payload for row in rows if row.tag == "push") == \
                sum(row.payload for row in rows if row.tag == "pull")


def test_the_busiest_link_falls_with_each_invention(ranks):
    psi, n = 8 * 46, 4                                                     # bytes; even for two servers
    busiest = {servers: max(sum(row.wire_bytes for row in rows) for rows in ranks(n).run(traffic, servers))
               for servers in (1, 2, 4)}
    assert busiest[1] == 2 * psi * 3
    assert busiest[2] == 2 * psi * 2 / 2
    assert busiest[4] == pytest.approx(2 * (psi + 16) * 3 / 4)             # two numbers of padding


def test_servers_on_the_workers_are_zero_1(ranks):
    for (weights, rows), (want, zeros_rows) in zip(ranks(2).run(on_the_workers), ranks(2).run(zero_1)):
        assert (weights - want).abs().max() <= 1e-12
        assert rows == zeros_rows == [("reduce_scatter", 8 * 26), ("all_gather", 8 * 26)]


@pytest.mark.timed
def test_pulling_from_one_server_takes_as_long_as_there_are_workers(ranks):
    """Pull alone: an emulated wire charges the sender's link, so the incast of push is not felt."""
    floats, wire = 50_000, (1e-3, 8e6)
    seconds = {(n, servers): shortest(ranks(n).run(pull_times, floats, servers, wire), servers)
               for n, servers in ((2, 1), (3, 1), (4, 1), (4, 2), (4, 4))}
    for (n, servers), got in seconds.items():
        assert got == pytest.approx(pull_seconds(8 * floats, n, servers, *wire), rel=0.1), (n, servers)
    for n in (3, 4):
        assert seconds[n, 1] == pytest.approx((n - 1) * seconds[2, 1], rel=0.1)
    assert seconds[4, 4] < seconds[4, 2] < seconds[3, 1] < seconds[4, 1]


def test_a_number_of_servers_that_does_not_fit_is_refused(ranks):
    with pytest.raises(ValueError, match="2 servers do not fit 1 rank; try servers=1"):
        ParameterServer(model().parameters(), Mesh().dp, SGD, servers=2)
    want = "0 servers do not fit 3 ranks; try 1 to 2 beside the workers, or 3, one on each"
    assert ranks(3).run(refused) == [want] * 3


@pytest.mark.prove
def test_lifted_alone_it_trains_a_foreign_module(tmp_path):
    home = Path(__file__).resolve().parents[2] / "nanoinfra"
    shutil.copytree(home / "distributed", tmp_path / "nanoinfra" / "distributed")
    (tmp_path / "nanoinfra" / "parallel").mkdir()
    shutil.copy(home / "parallel" / "parameter_server.py", tmp_path / "nanoinfra" / "parallel")
    (tmp_path / "train.py").write_text(FOREIGN)
    argv = [sys.executable, "-W", "error", "train.py"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same", "same", "same"]


FOREIGN = """
import torch
from torch import nn
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.ranks import Ranks
from nanoinfra.parallel.parameter_server import ParameterServer

x, y = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3

def train(n, servers):
    mesh = Mesh(dp=n)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    server = ParameterServer(net.parameters(), mesh.dp, torch.optim.Adam, servers)
    for step in range(5):
        if server.is_worker:
            mine = slice(mesh.dp.rank - server.workers[0], None, len(server.workers))
            (nn.functional.cross_entropy(net(x[mine]), y[mine], reduction="sum") / len(x)).backward()
        server.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()]) if server.is_worker else None

if __name__ == "__main__":
    torch.manual_seed(0)
    want = train(1, 1)
    with Ranks(2) as two:
        for servers in (1, 2):
            for got in two.run(train, 2, servers):
                if got is not None:
                    print("same" if torch.allclose(got, want, rtol=1e-12) else "different")
"""


def model():
    """46 numbers in uneven tensors; one of them is never used."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    net.unused = nn.Parameter(torch.ones(8, dtype=torch.float64))
    return net


def loss(net, rank, n):
    """Of this worker's share of seven samples, over all seven."""
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(7, 3, generator=draw, dtype=torch.float64), torch.randint(2, (7,), generator=draw)
    logits = net(x[rank::n])                                                   # (B, 3)
    return nn.functional.cross_entropy(logits, y[rank::n], reduction="sum") / 7


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def trained_plainly(optimizer):
    net = model()
    mover = optimizer(net.parameters())
    for _ in range(5):
        mover.zero_grad()
        loss(net, 0, 1).backward()
        mover.step()
    return flat(net)


def train(optimizer, servers):
    import torch.distributed as dist
    mesh = Mesh(dp=dist.get_world_size() if dist.is_initialized() else 1)
    net = model()
    server = ParameterServer(net.parameters(), mesh.dp, optimizer, servers)
    for _ in range(5):
        if server.is_worker:
            loss(net, server.workers.index(mesh.dp.rank), len(server.workers)).backward()
        server.step()
    state = server.optimizer.state[server.slice] if server.is_server else {}
    held = sum(t.numel() for t in state.values() if isinstance(t, torch.Tensor) and t.dim())
    return flat(net), server.is_worker, held


def traffic(servers):
    import torch.distributed as dist
    mesh = Mesh(dp=dist.get_world_size())
    server = ParameterServer(model().parameters(), mesh.dp, SGD, servers)
    mesh.ledger.take()
    server.step()
    return mesh.ledger.take()


def even():
    """26 numbers in rows that two ranks share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def on_the_workers():
    mesh, net = Mesh(dp=2), even()
    server = ParameterServer(net.parameters(), mesh.dp, ADAM, servers=2)
    for _ in range(5):
        mesh.ledger.take()
        loss(net, mesh.dp.rank, 2).backward()
        server.step()
    return flat(net), [(row.op, row.payload) for row in mesh.ledger.take()]


def zero_1():
    mesh, net = Mesh(dp=2), even()
    zero = Zero(net, mesh.dp, stage=1)
    mover = ADAM(list(zero.shards.values()))
    for _ in range(5):
        mesh.ledger.take()
        zero.begin_step()
        zero.before_backward(last=True)
        loss(net, mesh.dp.rank, 2).backward()
        for name, grad in zero.finish().items():
            zero.shards[name].grad = grad
        mover.step()
        zero.publish()
    return flat(net), [(row.op, row.payload) for row in mesh.ledger.take()]


def operations(rank, n, servers):
    if servers == n:
        return ["reduce_scatter", "all_gather"]
    if rank < servers:
        return ["recv"] * (n - servers) + ["send"] * (n - servers)
    return ["send"] * servers + ["recv"] * servers


def pull_times(floats, servers, wire):
    """This rank's (begin, end) of three pulls."""
    import torch.distributed as dist
    mesh, spans = Mesh(dp=dist.get_world_size(), wire={"dp": wire}), []
    weights = [nn.Parameter(torch.zeros(floats, dtype=torch.float64))]
    server = ParameterServer(weights, mesh.dp, SGD, servers)
    for _ in range(3):
        comm.barrier(mesh.dp)
        begin = time.monotonic()
        server.pull()
        spans.append((begin, time.monotonic()))
    return spans


def shortest(spans, servers):
    """Seconds from the last server's begin to the last rank's end, where other programs disturbed least."""
    return min(max(end for _, end in pull) - max(begin for begin, _ in pull[:servers])
               for pull in zip(*spans))


def refused():
    mesh = Mesh(dp=3)
    try:
        ParameterServer(model().parameters(), mesh.dp, SGD, servers=0)
    except ValueError as mistake:
        return str(mistake)
