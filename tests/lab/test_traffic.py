import pytest
import torch

from nanoinfra.lab.instruments.tensor_read_bytes import TensorReadBytes


@pytest.mark.parametrize("run, want", [
    (lambda w: w @ torch.ones(4), 48), (lambda w: torch.ones(2, 3) @ w, 48),
    (lambda w: torch.ones(2, 4) @ w.T, 48), (lambda w: w[1:] @ torch.ones(4), 32),               # of the view
    (lambda w: (w @ torch.ones(4), w.sum()), 96), (lambda w: w @ w.T, 96),                        # each time
    (lambda w: w.view(4, 3).mT[None].expand(5, 3, 4), 0), (lambda w: w.clone() + w.detach(), 96),
    (lambda w: w[:, 0].fill_(1.0), 0), (lambda w: w.copy_(torch.ones(3, 4)), 0),                 # written
    (lambda w: torch.ones(3, 4).copy_(w), 48), (lambda w: torch.cat([w, torch.ones(1, 4)]), 48),
    (lambda w: torch.nn.functional.embedding(torch.tensor([1, 1]), w), 0),
    (lambda w: torch.ones(3, 4).add_(other=w), 48)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_read_is_counted(run, want, device):
    with torch.device(device), torch.no_grad():
        w = torch.ones(3, 4)
        with TensorReadBytes(weights=[w], other=[torch.ones(7)]) as traffic:
            run(w)
    assert traffic.read_bytes["weights"] == want and traffic.read_bytes["other"] == 0
