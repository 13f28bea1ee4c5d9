"""Pipeline parallelism: the model's layers in chunks, one after another, on different ranks (stages).

Stages send each other hidden states, B T C numbers forward and as many gradients back for each micro-batch
and border between chunks; a stage idles (p-1)/(m+p-1) of the step, the bubble (formulas/pipeline.py).
schedules.py has the order of the instructions. Sends and receives are asynchronous and waited for where their
tensors are needed, so messages overlap with computation; shapes are known in advance. GPipe: Huang et al.
2019; PipeDream: Narayanan et al. 2019. Composes with everything inside a chunk, and with data parallelism.
"""
import torch
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import MeshAxis
from nanoinfra.parallel.pipeline.schedules import (
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
    message_peer,
)
from nanoinfra.parallel.pipeline.split_backward import SplitBackward


class PipelineStage:
    """One rank's chunks of a model; its methods carry out a schedule's instructions (train/step.py's Stage).

    A subclass defines the chunks: `embed_input`, `forward_chunk` and `activation_shape`, and where it matters
    `loss_grad` and `prepare_for_backward`. `axis` holds the stages; messages to earlier stages use
    `reverse_axis`, the same ranks with a process group of their own. `split_backward`: the schedule splits
    backwards in two halves. Messages are in `dtype`.
    """

    def __init__(self, axis: MeshAxis, reverse_axis: MeshAxis, num_chunks: int = 1,
                 dtype: torch.dtype = torch.float32, device: str = "cpu", split_backward: bool = False):
        self.axis, self.reverse_axis = axis, reverse_axis
        self.dtype, self.device = dtype, device
        self.split_backward = split_backward
        self.first_stage_chunk = 0, 0                    # (stage, chunk) of the model's first and last chunk
        self.last_stage_chunk = axis.size - 1, num_chunks - 1
        self._saved_for_backward = {}                    # (micro-batch, chunk) -> what its backward needs
        self._pending_recvs, self._pending_sends = {}, {}                # message -> AsyncCollective
        self._ready_to_send = {}                         # message -> tensor

    def embed_input(self, micro_batch: int) -> torch.Tensor:
        """The hidden states that the model's first chunk gets for a micro-batch: its embedded tokens."""
        raise NotImplementedError

    def forward_chunk(self, chunk: int, x: torch.Tensor, micro_batch: int) -> torch.Tensor:
        """The output of `chunk` for hidden states `x`; of the model's last chunk the loss, ()."""
        raise NotImplementedError

    def activation_shape(self, micro_batch: int) -> tuple[int, ...]:
        """The shape of the hidden states between any two chunks, as this rank has them."""
        raise NotImplementedError

    def loss_grad(self, loss: torch.Tensor) -> torch.Tensor | None:
        """The gradient that the loss's backward starts from (loss scaling); None is 1."""

    def prepare_for_backward(self, chunk: int, is_last: bool) -> None:
        """Called before a backward of `chunk`'s weights; `is_last` is true for the last one of the step."""

    def forward(self, micro_batch: int, chunk: int = 0) -> None:
        """Run a chunk on the received hidden states, or on the embedded input."""
        here = self.axis.rank, chunk
        is_first = here == self.first_stage_chunk
        if is_first:
            received = self.embed_input(micro_batch)
        else:
            received = self._received(RecvActivation(micro_batch, chunk))
        x = received.detach().requires_grad_() if self.split_backward and is_first else received
        y = self.forward_chunk(chunk, x, micro_batch)
        self._saved_for_backward[micro_batch, chunk] = received, x, y
        if here != self.last_stage_chunk:
            self._ready_to_send[SendActivation(micro_batch, chunk)] = y.detach()

    def backward(self, micro_batch: int, chunk: int = 0, is_last: bool = False) -> None:
        """Compute the gradients of a chunk's weights and of its input."""
        _, x, y = self._saved_for_backward.pop((micro_batch, chunk))
        self.prepare_for_backward(chunk, is_last)
        y.backward(self._output_grad(micro_batch, chunk, y))
        self._keep_input_grad(micro_batch, chunk, x)

    def backward_input(self, micro_batch: int, chunk: int = 0) -> None:
        """Compute only the gradient of a chunk's input."""
        received, x, y = self._saved_for_backward.pop((micro_batch, chunk))
        both_halves = SplitBackward(y, x)
        both_halves.backward_input(self._output_grad(micro_batch, chunk, y))
        self._keep_input_grad(micro_batch, chunk, x)
        self._saved_for_backward[micro_batch, chunk] = received, x, both_halves

    def backward_weight(self, micro_batch: int, chunk: int = 0, is_last: bool = False) -> None:
        """Compute the gradients of a chunk's weights, after `backward_input`."""
        received, x, both_halves = self._saved_for_backward.pop((micro_batch, chunk))
        self.prepare_for_backward(chunk, is_last)
        both_halves.backward_weight()
        if (self.axis.rank, chunk) == self.first_stage_chunk and received.requires_grad:
            received.backward(x.grad)

    def start_recv(self, message: RecvActivation | RecvGrad) -> None:
        """Start to receive. The instruction that needs the tensor waits for it."""
        src, _ = message_peer(message, self.axis.rank, self.axis.size)
        buffer = torch.empty(self.activation_shape(message.micro_batch), dtype=self.dtype, device=self.device)
        self._pending_recvs[message] = comm.recv(buffer, self._axis_for(src, self.axis.rank), src,
                                                 _tag(message), async_op=True)

    def start_send(self, message: SendActivation | SendGrad) -> None:
        """Start to send, and keep the tensor until it has arrived."""
        dst, _ = message_peer(message, self.axis.rank, self.axis.size)
        axis = self._axis_for(self.axis.rank, dst)
        self._pending_sends[message] = comm.send(self._ready_to_send.pop(message), axis, dst, _tag(message),
                                                 async_op=True)
        grads = [one for one in self._pending_sends if isinstance(one, SendGrad)]
        if len(grads) > 2:                   # no schedule needs more in flight, even where a send blocks
            self._pending_sends.pop(grads[0]).wait()

    def wait_sends(self) -> None:
        """Wait until all messages have been sent; drop activations that no backward used."""
        for message in list(self._pending_sends):
            self._pending_sends.pop(message).wait()
        self._saved_for_backward.clear()

    def _received(self, message):
        return self._pending_recvs.pop(message).wait().requires_grad_(torch.is_grad_enabled())

    def _output_grad(self, micro_batch, chunk, y):
        if (self.axis.rank, chunk) == self.last_stage_chunk:
            return self.loss_grad(y)
        grad = self._pending_recvs.pop(RecvGrad(micro_batch, chunk)).wait()
        self._pending_sends.pop(SendActivation(micro_batch, chunk)).wait()   # it has arrived
        return grad

    def _keep_input_grad(self, micro_batch, chunk, x):
        if (self.axis.rank, chunk) != self.first_stage_chunk:
            self._ready_to_send[SendGrad(micro_batch, chunk)] = x.grad

    def _axis_for(self, src, dst):
        return self.axis if src < dst else self.reverse_axis


def cut_to_pipeline_chunk(model: nn.Module, start_layer: int, stop_layer: int,
                          is_last_chunk: bool | None = None) -> nn.Module:
    """Keep of a decoder only layers [start_layer, stop_layer), and embedding or head if they belong to these.

    Works in place; parameter names stay. A tied head on another stage than the embedding keeps the
    embedding's name. `is_last_chunk`: whether the chunk has the final norm and the head; by default the chunk
    with the last layer does.
    """
    is_last = stop_layer == len(model.blocks) if is_last_chunk is None else is_last_chunk
    kept = nn.ModuleList()
    for layer in range(start_layer, stop_layer):
        kept.add_module(str(layer), model.blocks[layer])
    model.blocks = kept
    if start_layer > 0:
        model.embed = model.head if is_last and model.config.tied else None
        model.positions = model.embed_norm = None
    if not is_last:
        model.norm, model.head = nn.Identity(), None
    return model


def _tag(message):
    return "activations" if isinstance(message, (SendActivation, RecvActivation)) else "gradients"
