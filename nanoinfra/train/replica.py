"""One stage that holds the whole model: what the executor drives when there is no pipeline.

Forward keeps a micro-batch's loss, backward frees it, gradients are summed over the data axis by
parallel/data.py or zero.py, and the optimizer moves float32 masters, whole or in shards. The loss is divided
by the step's global count of valid tokens before any backward, so nothing is divided afterwards; in float16
it is multiplied by a scale on the way, and a step whose gradients overflow on any rank is skipped on all.
"""
import math
from collections.abc import Callable, Iterable, Iterator

import torch

from nanoinfra.formulas.params import shapes
from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.fill import empty
from nanoinfra.model.init import draw, init_weights
from nanoinfra.parallel import compose
from nanoinfra.train.config import TrainFlags
from nanoinfra.train.loss import HeadLoss
from nanoinfra.train.optim import Optimizer, clip
from nanoinfra.train.pieces import Piece
from nanoinfra.train.scale import LossScale


class Replica:
    """Model, gradients and optimizer of one rank. Implements `step.Stage`.

    `weights` (float32) is the model to go on from; without it one of `config` is drawn from the seed, under
    ZeRO a parameter at a time.
    """

    def __init__(self, config: ModelConfig, flags: TrainFlags, mesh, weights: Decoder | None = None):
        dtype = getattr(torch, flags.model.dtype)
        asked, zero = flags.model.grad_dtype, flags.mesh.zero
        grad_dtype = getattr(torch, asked) if asked else torch.promote_types(dtype, torch.float32)
        model, source, masters = weights, None, None
        if weights is None and zero:         # no rank ever holds all of it
            model, source = empty(config, flags.model.attention), drawn(config, flags.model.seed, mesh.device)
        elif weights is None:
            model = init_weights(Decoder(config, flags.model.attention), flags.model.seed)
        if dtype.itemsize < 4 and not zero:
            masters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model, self.device = model.train(), mesh.device
        self.head_loss = HeadLoss(model.head)
        self.parallel = compose.apply(model if source else model.to(mesh.device), mesh, self.head_loss, zero,
                                      flags.model.recompute, flags.mesh.data_parallel, dtype, grad_dtype,
                                      source)
        self.optimizer = Optimizer(self.parallel.shards, flags.optimizer.optimizer, masters)
        self.limit, self.scale = flags.optimizer.clip, LossScale() if dtype == torch.float16 else None
        self.cut_over = mesh.data if zero else None

    def begin(self, batches: list, count: int, lr: float) -> None:
        """A new step: its micro-batches [(x (B, T), y (B, T))], valid tokens on all ranks, learning rate."""
        self.batches, self.count, self.lr = batches, count, lr
        self.losses, self.loss = {}, torch.zeros((), dtype=torch.float64)
        self.grads = None                    # the last step's, which would live on beside this one's
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
        loss.backward(torch.full_like(loss, self.scale.value) if self.scale else None)

    def reduce_grads(self) -> None:
        """Wait for the sums over the data axis."""
        self.grads = self.parallel.finish()

    def step(self) -> None:
        """Clip and update; `grad_norm` is the norm before clipping.

        `skipped`: float16 gradients overflowed somewhere; the norm, which all ranks share, is no number then.
        """
        self.grad_norm = clip(self.grads, self.limit, self.cut_over, self.scale.value if self.scale else 1.0)
        self.skipped = self.scale is not None and not math.isfinite(self.grad_norm)
        if self.scale:
            self.scale.update(self.skipped)
        if not self.skipped:
            self.optimizer.step(self.grads, self.lr)
            self.parallel.publish()

    def norm(self) -> dict:
        """The step's line of metrics on it: null where float16 overflowed, which skipped the step."""
        norm = {"grad_norm": None if self.skipped else self.grad_norm}
        return norm | {"loss_scale": self.scale.value} if self.scale else norm

    @torch.no_grad()
    def nats(self, batches: Iterator) -> float:
        """-sum ln p over the valid targets of this rank's held-out batches."""
        return sum(float(self._loss(x, y, 1)) for x, y in batches)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything it keeps between steps: weights, gradient buckets, masters, moments."""
        yield from self.parallel.tensors()
        yield from self.optimizer.state().values()

    def pieces(self) -> list[tuple[Piece, torch.Tensor]]:
        """What a checkpoint keeps of this rank: the tensors of the optimizer's state; under ZeRO its rows."""
        state = self.optimizer.state().items()
        if self.cut_over is None:
            return [(Piece.whole(key, tensor.shape), tensor) for key, tensor in state]
        return [pair for key, tensor in state if (pair := self._rows(key, tensor))[1].numel()]

    def state(self) -> dict:
        """What else a run needs to go on: the optimizer's count of steps, float16's scale."""
        return {"updates": self.optimizer.steps, "scale": self.scale.state() if self.scale else None}

    def load(self, pairs: Iterable[tuple[Piece, torch.Tensor]], state: dict) -> None:
        """Take back what `pieces` and `state` gave, whatever ranks wrote it."""
        self.optimizer.load({piece.name: tensor for piece, tensor in pairs}, state["updates"])
        if self.scale and state["scale"]:
            self.scale.load(state["scale"])
        self.parallel.publish()

    def _rows(self, key, tensor):
        name = key.rpartition("/")[2]
        (start, stop), shape = self.parallel.rows[name], self.parallel.shapes[name]
        piece = Piece.whole(key, shape)
        piece = piece.cut(0, start, stop) if shape else piece
        return piece, tensor[:stop - start].view(-1, *shape[1:])

    def _loss(self, x, y, count):
        return self.head_loss(self.model.hidden(x.to(self.device)), y.to(self.device), count)


def drawn(config: ModelConfig, seed: int, device: str) -> Callable[[str], torch.Tensor]:
    """name -> first weights (float32), the numbers `init_weights` draws for it."""
    every = shapes(config)
    return lambda name: draw(name, every[name], config.layers, seed).to(device)
