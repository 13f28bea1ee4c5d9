"""Bytes are exact: every expected number is counted by hand, in float32."""
import gc
import time

import pytest
import torch
from torch import nn

from nanoinfra.config import config_for_size
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.saved_activations import saved_activation_bytes
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.model.decoder import Decoder
from nanoinfra.train.loss import linear_cross_entropy
from nanoinfra.train.optimizer import MixedPrecisionOptimizer


def test_a_tensor_counts_while_it_lives_and_its_views_count_once():
    with LiveTensorBytes() as storages:
        x = torch.zeros(10, 10)
        views = x[3], x.T, x.view(-1), x.detach()
        y = x + 1
        assert storages.live_bytes() == 800
        del x
        assert storages.live_bytes() == 800              # its views hold it
        del views
        assert storages.live_bytes() == 400
        del y
        assert storages.live_bytes() == 0


def test_older_tensors_count_only_if_passed_and_writing_into_one_makes_it_no_younger():
    old, passed = torch.zeros(100), torch.zeros(50)
    with LiveTensorBytes(initial_tensors=[passed, passed[:3]]) as storages:
        for x in (old, passed):
            x.add_(1)
            x.view(2, -1).t()
        torch.add(old, 1, out=old)
        torch._foreach_mul_([old], 2)
        assert storages.live_bytes() == 200
        del passed, x
        assert storages.live_bytes() == 0


def test_a_storage_resized_to_nothing_and_back_is_seen():
    with LiveTensorBytes() as storages:
        x = torch.zeros(25)
        sizes = [storages.live_bytes()]
        for size in (0, 100):
            x.untyped_storage().resize_(size)
            sizes.append(storages.live_bytes())
    assert sizes == [100, 0, 100]


def test_what_only_autograd_holds_counts_and_so_do_gradients():
    x, w = torch.ones(10), torch.ones(10, requires_grad=True)
    with LiveTensorBytes() as storages:
        loss = (w * x).exp().sum()                 # exp's result is saved for its backward: 40, and the loss
        assert storages.live_bytes() == 44
        loss.backward()
        assert storages.live_bytes() == 44               # its gradient took its place
        w.grad = None
        assert storages.live_bytes() == 4


def test_saved_activations_are_what_the_formula_says():
    config = config_for_size("test")
    model = Decoder(config)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    with LiveTensorBytes(initial_tensors=[tokens]) as storages:
        loss = linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens, 32)
        assert storages.live_bytes() == saved_activation_bytes(config, 2, 16, 4) + loss.nbytes


def test_an_optimizer_makes_moments_and_masters():
    model = Decoder(config_for_size("test")).bfloat16()
    psi = parameter_count(config_for_size("test"))
    with LiveTensorBytes() as storages:
        optimizer = MixedPrecisionOptimizer(model, "adamw")
        assert storages.live_bytes() == 4 * psi
        grads = {name: torch.zeros_like(p) for name, p in optimizer.params.items()}
        optimizer.step(grads, lr=1e-3)
        assert storages.live_bytes() == (12 + 2) * psi + 4 * len(grads)      # a step counter a tensor
        grads = None
        assert storages.live_bytes() == 12 * psi + 4 * len(optimizer.master_weights)


def test_meta_tensors_hold_nothing():
    with LiveTensorBytes(initial_tensors=[torch.empty(9, device="meta")]) as storages, torch.device("meta"):
        x = nn.Linear(100, 100)(torch.zeros(5, 100))
        assert storages.live_bytes() == 0 and x.shape == (5, 100)


def test_watch_marks_module_boundaries_both_ways_and_ends_with_the_context():
    model, x = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh()), torch.ones(2, 4)
    with LiveTensorBytes() as storages:
        storages.mark_module_boundaries(model)
        y = model(x).sum()
        y.backward()
    marks = [                                      # at the end the gradients of loss, sum and tanh
        ("model enters forward", 0), ("model.0 enters forward", 0), ("model.0 leaves forward", 48),
        ("model.1 enters forward", 48), ("model.1 leaves forward", 96), ("model leaves forward", 48),
        ("model.1 enters backward", 56), ("model enters backward", 56),
        ("model.0 enters backward", 56), ("model.1 leaves backward", 56)]
    assert storages.marks == marks
    assert storages.peak_bytes == 96
    y = model(x).sum()                             # unwatched again
    y.backward()
    assert len(storages.marks) == len(marks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_backward_after_the_context_marks_nothing():
    model = nn.Linear(4, 6)
    with LiveTensorBytes() as storages:
        storages.mark_module_boundaries(model)
        y = model(torch.ones(2, 4)).sum()
    before = list(storages.marks)
    y.backward()
    assert storages.marks == before


def test_operators_are_marked_on_request():
    with LiveTensorBytes(mark_operators=True) as storages:
        x = torch.ones(5)
        y = (x + 1) * 2
    assert [*storages.marks] == [("ones", 20), ("add", 40), ("mul", 60)] and len(y) == 5
    assert storages.peak_bytes == 60


def test_a_step_of_nothing_leaves_nothing():
    with LiveTensorBytes() as storages:
        (torch.ones(3, requires_grad=True) * 2).sum().backward()
        gc.collect()
        assert storages.live_bytes() == 0


def gather_under_way():
    mesh = Mesh(dp=2)
    x = torch.ones(100)
    with LiveTensorBytes() as storages:
        storages.mark_module_boundaries(comm_log=mesh.comm_log)
        pending = comm.all_gather(x, mesh.dp, "weights", async_op=True)
        storages.record_mark("computes")
        pending.wait()
        del pending
        deadline = time.monotonic() + 50           # gloo's thread lets go of the buffers a moment later
        while storages.live_bytes() and time.monotonic() < deadline:
            time.sleep(0.001)
        storages.record_mark("done")
        comm.reduce_scatter(torch.ones(2, 50), mesh.dp, "grads")
    comm.barrier(mesh.dp)
    return storages.marks, vars(mesh.comm_log).keys() & {"start_record", "finish_record"}


def test_collectives_are_marked_and_their_buffers_count(ranks):
    for marks, left_behind in ranks(2).run(gather_under_way):
        assert marks == [("all_gather weights enters", 800), ("computes", 800),
                         ("all_gather weights leaves", 800), ("done", 0),
                         ("reduce_scatter grads enters", 800),         # the input, and a row of each rank
                         ("reduce_scatter grads leaves", 1000)]        # and their sum
        assert not left_behind


@pytest.mark.parametrize("operators", [False, True])
def test_it_changes_no_number(operators):
    def gradients(around):
        torch.manual_seed(0)
        model = Decoder(config_for_size("test"))
        tokens = torch.arange(32).view(2, 16)
        with around:
            linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens, 32).backward()
        return [p.grad for p in model.parameters()]
    want, got = gradients(torch.enable_grad()), gradients(LiveTensorBytes(mark_operators=operators))
    assert all(torch.equal(a, b) for a, b in zip(want, got))
