"""Pipeline parallelism: the model's layers in chunks, one after another, each on a stage of its own.

What travels is the stream between two layers, B T C numbers there and as many back for each micro-batch and
border; a stage idles (p-1)/(m+p-1) of the step (formulas/pipeline.py). Who does what when, schedules.py says.
Messages are posted early and waited for where they are needed, so they travel beside the computations; shapes
are known and not negotiated. GPipe: Huang et al. 2019; PipeDream: Narayanan et al. 2019. Composes with all
that works inside a chunk, and with data parallelism, for which a chunk's last backward counts.
"""
import torch
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.parallel.pipeline.schedules import (
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
    neighbour,
)
from nanoinfra.parallel.pipeline.split_backward import Halves


class PipelineStage:
    """One rank's `chunks` of a model, driven by a schedule's instructions (train/step.py's Stage).

    A subclass says what they are: `enter`, `run` and `stream`, and where it matters `upstream` and
    `before_backward`. `axis` holds the stages; messages to earlier ones take `back`, the same ranks with a
    group of their own. `halves`: the schedule splits backwards. Messages are in `dtype`.
    """

    def __init__(self, axis, back, chunks: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu",
                 halves: bool = False):
        self.axis, self.back, self.dtype, self.device, self.halves = axis, back, dtype, device, halves
        self.first, self.last = (0, 0), (axis.size - 1, chunks - 1)      # (stage, chunk)
        self.kept = {}                       # (micro, chunk) -> what its backward needs
        self.coming, self.leaving, self.sent = {}, {}, {}                # by message

    def enter(self, micro: int) -> torch.Tensor:
        """The stream that the model's first chunk gets of micro-batch `micro`."""
        raise NotImplementedError

    def run(self, chunk: int, x: torch.Tensor, micro: int) -> torch.Tensor:
        """What `chunk` makes of the stream `x`: the stream, or of the model's last chunk its loss, ()."""
        raise NotImplementedError

    def stream(self, micro: int) -> tuple[int, ...]:
        """The stream's shape at any border between chunks, as this rank has it."""
        raise NotImplementedError

    def upstream(self, loss: torch.Tensor) -> torch.Tensor | None:
        """What the loss's gradient begins with; None is 1."""

    def before_backward(self, chunk: int, last: bool) -> None:
        """Called before gradients of `chunk`'s weights come, for the `last` time in this step or not."""

    def forward(self, micro: int, chunk: int = 0) -> None:
        """Run a chunk on what came, or on what enters here."""
        here = self.axis.rank, chunk
        entered = self.enter(micro) if here == self.first else self._take(RecvActivation(micro, chunk))
        x = entered.detach().requires_grad_() if self.halves and here == self.first else entered
        y = self.run(chunk, x, micro)
        self.kept[micro, chunk] = entered, x, y
        if here != self.last:
            self.leaving[SendActivation(micro, chunk)] = y.detach()

    def backward(self, micro: int, chunk: int = 0, last: bool = False) -> None:
        """A chunk's gradients: its weights' and its input's."""
        _, x, y = self.kept.pop((micro, chunk))
        self.before_backward(chunk, last)
        y.backward(self._gradient(micro, chunk, y))
        self._pass_on(micro, chunk, x)

    def backward_input(self, micro: int, chunk: int = 0) -> None:
        """The gradient of a chunk's input alone."""
        entered, x, y = self.kept.pop((micro, chunk))
        both = Halves(y, x)
        both.inputs(self._gradient(micro, chunk, y))
        self._pass_on(micro, chunk, x)
        self.kept[micro, chunk] = entered, x, both

    def backward_weight(self, micro: int, chunk: int = 0, last: bool = False) -> None:
        """The gradients of its weights, after `backward_input`."""
        entered, x, both = self.kept.pop((micro, chunk))
        self.before_backward(chunk, last)
        both.weights()
        if (self.axis.rank, chunk) == self.first and entered.requires_grad:
            entered.backward(x.grad)

    def receive(self, message: RecvActivation | RecvGrad) -> None:
        """Have a place ready. Whoever needs what comes waits for it."""
        source, _ = neighbour(message, self.axis.rank, self.axis.size)
        into = torch.empty(self.stream(message.micro), dtype=self.dtype, device=self.device)
        self.coming[message] = comm.recv(into, self._way(source, self.axis.rank), source,
                                         _tag(message), wait=False)

    def send(self, message: SendActivation | SendGrad) -> None:
        """Let it go, and keep it until it has arrived."""
        to, _ = neighbour(message, self.axis.rank, self.axis.size)
        self.sent[message] = comm.send(self.leaving.pop(message), self._way(self.axis.rank, to), to,
                                       _tag(message), wait=False)
        grads = [one for one in self.sent if isinstance(one, SendGrad)]
        if len(grads) > 2:                   # no schedule needs more under way, even where a send blocks
            self.sent.pop(grads[0]).wait()

    def settle(self) -> None:
        """Wait until all that was sent has arrived; forget what no backward came for."""
        for message in list(self.sent):
            self.sent.pop(message).wait()
        self.kept.clear()

    def _take(self, message):
        return self.coming.pop(message).wait().requires_grad_(torch.is_grad_enabled())

    def _gradient(self, micro, chunk, y):
        if (self.axis.rank, chunk) == self.last:
            return self.upstream(y)
        grad = self.coming.pop(RecvGrad(micro, chunk)).wait()
        self.sent.pop(SendActivation(micro, chunk)).wait()               # it has arrived: this is the answer
        return grad

    def _pass_on(self, micro, chunk, x):
        if (self.axis.rank, chunk) != self.first:
            self.leaving[SendGrad(micro, chunk)] = x.grad

    def _way(self, source, to):
        return self.axis if source < to else self.back


def cut(model: nn.Module, start: int, stop: int, last: bool | None = None) -> nn.Module:
    """Leave a decoder its layers from `start` to `stop`, and of both ends what they need. Names stay.

    A tied head on another stage than the embedding keeps the embedding's name. `last`: does the chunk end the
    model? By default the one with the last layer does; but where a head stands alone, the one after it.
    """
    last, kept = stop == len(model.blocks) if last is None else last, nn.ModuleList()
    for layer in range(start, stop):
        kept.add_module(str(layer), model.blocks[layer])
    model.blocks = kept
    if start > 0:
        model.embed = model.head if last and model.config.tied else None
        model.positions = model.embed_norm = None
    if not last:
        model.norm, model.head = nn.Identity(), None
    return model


def _tag(message):
    return "activations" if isinstance(message, (SendActivation, RecvActivation)) else "gradients"
