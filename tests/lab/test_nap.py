import time

import torch
from torch import nn

from nanoinfra.lab.instruments.emulated_compute import emulate_compute_time


def test_a_module_sleeps_a_sample_and_changes_no_number():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)
    net(x).sum().backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    naps = emulate_compute_time(net, 0.01)
    begin = time.monotonic()
    out = net(x).sum()
    between = time.monotonic()
    out.backward()
    end = time.monotonic()
    assert between - begin >= 2 * 4 * 0.005 and end - between >= 2 * 4 * 0.01
    assert len(naps) == 2 and all(stop - start >= 0.04 for start, stop in naps)
    assert naps[0][1] <= naps[1][0]                                # the last module first
    for p, grad in zip(net.parameters(), want):
        assert torch.equal(p.grad, grad)


def test_a_module_naps_before_its_gradients_arrive():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    naps, arrived = emulate_compute_time(net, 0.005), {}
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: arrived.update({name: len(naps)}))
    net(torch.ones(1, 3)).sum().backward()
    assert arrived == {"1.weight": 1, "1.bias": 1, "0.weight": 2, "0.bias": 2}
