import os
import random
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from nanoinfra.distributed import comm, emulated_link
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankFailedError


def state():
    drawn = torch.rand(1).item(), np.random.rand(), random.random()
    return (*drawn, torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), os.getcwd(),
            os.environ.get("NANO_TEST"), seen_by_a_hook())


def seen_by_a_hook():
    """Does a hook on all modules see this one?"""
    linear = nn.Linear(1, 1)
    y = linear(torch.ones(1, 1))
    return hasattr(y, "seen")


def leave_a_mess():
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    os.chdir("/")
    os.environ["NANO_TEST"] = "1"
    nn.modules.module.register_module_forward_hook(lambda m, x, y: setattr(y, "seen", True))
    warnings.simplefilter("ignore")
    return state()[3:]


def test_each_call_starts_from_one_state(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = ranks(2)
    before = pool.run(state)
    assert before[0] == before[1]
    assert before[0][3:] == (torch.float32, True, 1, str(tmp_path), None, False)
    assert pool.run(leave_a_mess) == [(torch.float64, False, 2, "/", "1", True)] * 2
    assert pool.run(state) == before


def warn():
    warnings.warn("too warm", stacklevel=1)


def test_warnings_are_errors(ranks):
    with pytest.raises(RankFailedError, match="UserWarning: too warm"):
        ranks(2).run(warn)


def say():
    rank = Mesh(dp=2).rank
    print("one\ntwo", rank)
    print("to stderr", file=sys.stderr)
    print("no newline", end="")


def test_prints_carry_the_rank(ranks, capsys):
    ranks(2).run(say)
    out, err = capsys.readouterr()
    for rank in (0, 1):
        mine = [text for text in out.splitlines() if text.startswith(f"[{rank}]")]
        assert mine == [f"[{rank}] one", f"[{rank}] two {rank}", f"[{rank}] no newline"]
    assert sorted(err.splitlines()) == ["[0] to stderr", "[1] to stderr"]


def summed():
    return comm.all_reduce(torch.ones(1), Mesh(dp=2).dp).item()


def no_sum(x, axis, tag="", op="sum", async_op=False):
    return x


@contextmanager
def every_result_doubled():
    honest, comm.all_reduce = comm.all_reduce, lambda *args: honest(*args) * 2
    yield
    comm.all_reduce = honest


def place():
    return comm.all_reduce(torch.ones(1), Mesh(dp=2, emulated_links={"dp": (0.0, 1e9)}).dp).item()


@pytest.mark.parametrize("mutants, want", [
    ([("nanoinfra.distributed.comm", "all_reduce", no_sum)], 1.0),
    ([every_result_doubled], 4.0),
    ([every_result_doubled,
      ("nanoinfra.distributed.comm", "AsyncCollective.wait", lambda self: torch.ones(1) * 5)],
     10.0),
])
def test_mutants_act_inside_the_ranks_and_are_undone(ranks, mutants, want):
    honest = comm.all_reduce
    assert ranks(2).run(summed, mutants=mutants) == [want] * 2
    assert ranks(2).run(summed) == [2.0] * 2
    assert comm.all_reduce is honest


def test_a_patch_in_the_parent_reaches_nobody(ranks, monkeypatch):
    monkeypatch.setattr(emulated_link.EmulatedLink, "start_transfer", None)
    assert ranks(2).run(place) == [2.0] * 2


@pytest.mark.parametrize("mutant, want", [
    (("nanoinfra.distributed.comm", "all_reduse", no_sum), "all_reduse"),
    (("nanoinfra.distributed.com", "all_reduce", no_sum), "No module named 'nanoinfra.distributed.com'")])
def test_a_mutant_of_nothing_is_an_error(ranks, mutant, want):
    with pytest.raises(RankFailedError, match=want):
        ranks(2).run(summed, mutants=[mutant])


def fail_deep():
    return nn.Linear(2, 2)(torch.ones(3))


def test_the_traceback_starts_in_the_callers_function(ranks):
    with pytest.raises(RankFailedError) as caught:
        ranks(1).run(fail_deep)
    frames = [text for text in str(caught.value).splitlines() if text.strip().startswith("File")]
    assert "in fail_deep" in frames[0]
    assert not any("/rank_main.py" in frame for frame in frames)
