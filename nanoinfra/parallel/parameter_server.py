"""A synchronous parameter server: workers push gradients, servers hold and update the weights, workers pull.

    num_servers=1           all weights on one rank: 2 Psi W over its link in a step; a worker moves 2 Psi
    num_servers=S           a slice on each of S ranks: 2 Psi W / S over a server's link
    num_servers=axis.size   on the workers: reduce-scatter and all-gather, 2 Psi (N-1)/N, as in ZeRO-1
Li et al. 2014 (asynchronous there). Any elementwise optimizer; composes with any module that fits a rank.
N ranks, S servers, W workers, K elements a slice: Psi = S K, padded to full slices.
"""
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import MeshAxis


class ParameterServer:
    """The parameter server as one rank takes part in it.

    The first `num_servers` ranks of `axis` are servers, the others workers; or every rank is both. The
    parameters count as one flat vector, with a slice for each server, which `make_optimizer([slice])`
    updates. The servers' first weights are pulled at once. `is_worker` says whether this rank has a gradient
    to push: of the loss divided by the *global* token count, because servers sum. Raises ValueError for
    `num_servers` not in 1 to N.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], axis: MeshAxis,
                 make_optimizer: Callable[[list[torch.Tensor]], Optimizer], num_servers: int = 1):
        _check_num_servers(num_servers, axis.size)
        self.params, self.axis, self.num_servers = list(params), axis, num_servers
        self._colocated = num_servers == axis.size
        self.is_server = axis.rank < num_servers
        self.is_worker = self._colocated or not self.is_server
        self.worker_ranks = range(0 if self._colocated else num_servers, axis.size)
        if self.is_server:
            slices = self._to_slices([p.detach() for p in self.params])                              # (S, K)
            self.weight_slice = slices[axis.rank].clone()                                            # (K,)
            self.optimizer = make_optimizer([self.weight_slice])
        self.pull_weights()

    def step(self) -> None:
        """Push every `p.grad` (None counts as zeros; None afterwards), update, and pull the new weights."""
        total = self.push_gradients()
        if self.is_server:
            self.weight_slice.grad = total
            self.optimizer.step()
        self.pull_weights()

    def push_gradients(self) -> torch.Tensor | None:
        """Send the gradients to the servers; returns, on a server, its slice of their sum (K,)."""
        if self.is_server and not self._colocated:
            inbox, total = torch.empty_like(self.weight_slice), torch.zeros_like(self.weight_slice)
            for worker in self.worker_ranks:
                total += comm.recv(inbox, self.axis, worker, "push")
            return total
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        slices = self._to_slices(grads)                                                              # (S, K)
        for p in self.params:
            p.grad = None
        if self._colocated:
            return comm.reduce_scatter(slices, self.axis, "push")
        _wait_all([comm.send(slices[s], self.axis, s, "push", async_op=True)
                   for s in range(self.num_servers)])

    def pull_weights(self) -> None:
        """Receive the servers' weights into `params`."""
        if self._colocated:
            self._copy_to_params(comm.all_gather(self.weight_slice, self.axis, "pull"))
        elif self.is_server:
            _wait_all([comm.send(self.weight_slice, self.axis, worker, "pull", async_op=True)
                       for worker in self.worker_ranks])
        else:
            slices = self._to_slices([p.detach() for p in self.params])                              # (S, K)
            _wait_all([comm.recv(slices[s], self.axis, s, "pull", async_op=True)
                       for s in range(self.num_servers)])
            self._copy_to_params(slices)

    def _to_slices(self, tensors):
        """All tensors as one new vector, padded with zeros, a row for each server: (S, K)."""
        flat = torch.cat([t.flatten() for t in tensors])                                             # (Psi,)
        return torch.nn.functional.pad(flat, (0, -len(flat) % self.num_servers)).view(self.num_servers, -1)

    def _copy_to_params(self, slices):
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, slices.flatten()[:sum(sizes)].split(sizes)):
            p.data.copy_(part.view_as(p))


def _wait_all(messages):
    for message in messages:
        message.wait()


def _check_num_servers(num_servers, ranks):
    if not 1 <= num_servers <= ranks:
        fits = "num_servers=1"
        if ranks > 1:
            fits = f"1 to {ranks - 1} beside the workers, or {ranks}, one on each"
        raise ValueError(f"{num_servers} servers do not fit {ranks} rank{'s' if ranks > 1 else ''}; "
                         f"try {fits}")
