"""The parameter server, synchronous: workers push gradients, servers step and own the weights, workers pull.

    servers=1            all weights on one rank: 2 Psi W over its link in a step; a worker moves 2 Psi
    servers=S            a slice on each of S ranks: 2 Psi W / S over a server's link
    servers=axis.size    on the workers: push is a reduce-scatter, pull an all-gather, 2 Psi (N-1)/N: ZeRO-1
Li et al. 2014 (asynchronous there). Any elementwise optimizer; composes with any module that fits a rank.
N ranks, S servers, W workers, K elements a slice: Psi = S K, padded to full slices.
"""
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

from nanoinfra.distributed import comm


class ParameterServer:
    """One rank's part: the first `servers` ranks of `axis` are servers, the others workers; or all are both.

    The parameters count as one flat vector, cut into a slice a server, whose `optimizer([slice])` moves it.
    The servers' first weights are pulled at once. `is_worker` says whether this rank has a gradient to give:
    of the loss divided by the *global* count, because servers sum. ValueError for servers not in 1 to N.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], axis,
                 optimizer: Callable[[list[torch.Tensor]], Optimizer], servers: int = 1):
        _check(servers, axis.size)
        self.params, self.axis, self.servers = list(params), axis, servers
        self.together = servers == axis.size
        self.is_server = axis.rank < servers
        self.is_worker = self.together or not self.is_server
        self.workers = range(0 if self.together else servers, axis.size)
        if self.is_server:
            self.slice = self._cut([p.detach() for p in self.params])[axis.rank].clone()             # (K,)
            self.optimizer = optimizer([self.slice])
        self.pull()

    def step(self) -> None:
        """Every `p.grad` (None counts as zeros) leaves and is None again; every p is the new weight."""
        total = self.push()
        if self.is_server:
            self.slice.grad = total
            self.optimizer.step()
        self.pull()

    def push(self) -> torch.Tensor | None:
        """Gradients go to the servers; on a server, its slice of their sum (K,)."""
        if self.is_server and not self.together:
            inbox, total = torch.empty_like(self.slice), torch.zeros_like(self.slice)
            for worker in self.workers:
                total += comm.recv(inbox, self.axis, worker, "push")
            return total
        grads = self._cut([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params])  # (S, K)
        for p in self.params:
            p.grad = None
        if self.together:
            return comm.reduce_scatter(grads, self.axis, "push")
        _wait([comm.send(grads[s], self.axis, s, "push", wait=False) for s in range(self.servers)])

    def pull(self) -> None:
        """The servers' weights come to the workers."""
        if self.together:
            self._publish(comm.all_gather(self.slice, self.axis, "pull"))
        elif self.is_server:
            _wait([comm.send(self.slice, self.axis, w, "pull", wait=False) for w in self.workers])
        else:
            slices = self._cut([p.detach() for p in self.params])                                    # (S, K)
            _wait([comm.recv(slices[s], self.axis, s, "pull", wait=False) for s in range(self.servers)])
            self._publish(slices)

    def _cut(self, tensors):
        """All as one new vector, zeros at its end, a row a server: (S, K)."""
        flat = torch.cat([t.flatten() for t in tensors])                                             # (Psi,)
        return torch.nn.functional.pad(flat, (0, -len(flat) % self.servers)).view(self.servers, -1)

    def _publish(self, slices):
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, slices.flatten()[:sum(sizes)].split(sizes)):
            p.data.copy_(part.view_as(p))


def _wait(messages):
    for message in messages:
        message.wait()


def _check(servers, ranks):
    if not 1 <= servers <= ranks:
        fits = f"1 to {ranks - 1} beside the workers, or {ranks}, one on each" if ranks > 1 else "servers=1"
        raise ValueError(f"{servers} servers do not fit {ranks} rank{'s' if ranks > 1 else ''}; try {fits}")
