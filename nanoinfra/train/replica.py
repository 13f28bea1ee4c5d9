"""One stage that holds the whole model: what the executor drives when there is no pipeline.

Forward keeps a micro-batch's loss, backward frees it, gradients are summed over the data axis by
parallel/data.py, and the optimizer moves float32 masters. The loss is divided by the step's global count of
valid tokens before any backward, so nothing is divided afterwards.
"""
from collections.abc import Iterator

import torch

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.init import init_weights
from nanoinfra.parallel import compose
from nanoinfra.train.config import TrainFlags
from nanoinfra.train.loss import cross_entropy
from nanoinfra.train.optim import Optimizer, clip


class Replica:
    """Model, gradients and optimizer of one rank. Implements `step.Stage`.

    `weights` (float32) is the model to go on from; without it one of `config` is drawn from the seed.
    """

    def __init__(self, config: ModelConfig, flags: TrainFlags, mesh, weights: Decoder | None = None):
        dtype = getattr(torch, flags.model.dtype)
        asked = flags.model.grad_dtype
        grad_dtype = getattr(torch, asked) if asked else torch.promote_types(dtype, torch.float32)
        model = weights or init_weights(Decoder(config, flags.model.attention), flags.model.seed)
        masters = None
        if dtype.itemsize < 4:
            masters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model = model.train().to(dtype).to(mesh.device)
        self.parallel = compose.apply(self.model, mesh, flags.mesh.data_parallel, grad_dtype)
        self.optimizer = Optimizer(self.model, flags.optimizer.optimizer, masters)
        self.limit = flags.optimizer.clip

    def begin(self, batches: list, count: int, lr: float) -> None:
        """A new step: its micro-batches [(x (B, T), y (B, T))], valid tokens on all ranks, learning rate."""
        self.batches, self.count, self.lr = batches, count, lr
        self.losses, self.loss = {}, torch.zeros((), dtype=torch.float64)
        self.parallel.begin_step()

    def forward(self, micro: int) -> None:
        """This rank's share of the step's loss from one micro-batch."""
        x, y = self.batches[micro]
        self.losses[micro] = self._loss(x, y, self.count)

    def backward(self, micro: int, last: bool) -> None:
        """Its gradients, into the buckets."""
        loss = self.losses.pop(micro)
        self.loss += loss.detach().cpu()
        self.parallel.before_backward(last)
        loss.backward()

    def reduce_grads(self) -> None:
        """Wait for the sums over the data axis."""
        self.grads = self.parallel.finish()

    def step(self) -> None:
        """Clip and update; `grad_norm` is the norm before clipping."""
        self.grad_norm = clip(self.grads, self.limit)
        self.optimizer.step(self.grads, self.lr)

    @torch.no_grad()
    def nats(self, batches: Iterator) -> float:
        """-sum ln p over the valid targets of this rank's held-out batches."""
        return sum(float(self._loss(x, y, 1)) for x, y in batches)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything it keeps between steps: weights, gradient buckets, masters, moments."""
        yield from self.model.parameters()
        yield from (bucket.flat for bucket in self.parallel.buckets)
        yield from self.optimizer.state().values()

    def _loss(self, x, y, count):
        device = self.model.head.weight.device
        return cross_entropy(self.model.hidden(x.to(device)), self.model.head.weight, y.to(device), count)
