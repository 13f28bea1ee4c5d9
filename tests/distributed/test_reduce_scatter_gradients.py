"""Buckets: who leaves when, how much room they take, and what a second gradient or a given-up step does."""
import pytest
import torch
from torch import nn

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.reduce_scatter_gradients import (
    BucketedParam,
    GradientReducer,
    ReduceScatterBucket,
    group_by_dtype_and_bytes,
)


def reducer(bucket_bytes, n=3, dtype=torch.float32):
    leaves = [BucketedParam(nn.Parameter(torch.zeros(1, 100, dtype=dtype)), str(i), torch.Size([1, 100]))
              for i in range(n)]
    return GradientReducer(leaves, Mesh().data, bucket_bytes), [leaf.param for leaf in leaves]


def deliver(made, param, value=1.0):
    param.grad = torch.full((1, 100), value)
    made.move_grad_to_bucket(param)
    assert param.grad is None


def sums(made):
    return {name: grad[0, 0].item() for name, grad in made.finish_grad_sync().items()}


def test_a_gradient_that_comes_after_its_bucket_left_is_added():
    made, (a, b, _) = reducer(400)
    made.prepare_for_backward(sync_gradients=True)
    for param in (a, b, a):
        deliver(made, param)
    assert sums(made) == {"0": 2.0, "1": 1.0, "2": 0.0}


def test_without_leave_to_go_they_add_up_over_backwards():
    made, params = reducer(800)
    for leaving in (False, True):
        made.prepare_for_backward(leaving)
        for param in params:
            deliver(made, param)
    assert sums(made) == {"0": 2.0, "1": 2.0, "2": 2.0}


def test_a_step_that_was_given_up_leaves_nothing_behind():
    made, params = reducer(400)
    for leaving in (True, False):
        made.prepare_for_backward(leaving)
        deliver(made, params[0])
        deliver(made, params[2])
        made.zero_grad()
    made.prepare_for_backward(sync_gradients=True)
    deliver(made, params[0], 5.0)
    assert sums(made) == {"0": 5.0, "1": 0.0, "2": 0.0}


@pytest.mark.parametrize("bucket_bytes, order, alone", [
    (400, (0, 1, 2), [True, True, True]), (600, (0, 2, 1), [True, False, True])])
def test_a_bucket_opens_only_where_there_is_room(monkeypatch, bucket_bytes, order, alone):
    """One of 400 bytes under way takes 800; beside it another fits in 1200, and in 800 none."""
    made, params = reducer(bucket_bytes)
    seen, opens = [], ReduceScatterBucket.allocate_flat_grads
    monkeypatch.setattr(ReduceScatterBucket, "allocate_flat_grads",
                        lambda bucket: (seen.append(made._in_flight is None), opens(bucket)))
    made.prepare_for_backward(sync_gradients=True)
    for i in order:
        deliver(made, params[i])
    assert seen == alone


def test_packing_keeps_order_dtype_and_limit():
    items = [(torch.float32, 10), (torch.float32, 10), (torch.float64, 5), (torch.float64, 50),
             (torch.float32, 1)]
    groups = group_by_dtype_and_bytes(items, lambda item: item, max_bytes=80)
    assert groups == [items[:2], items[2:3], items[3:4], items[4:]]
    assert group_by_dtype_and_bytes([], lambda item: item) == []
