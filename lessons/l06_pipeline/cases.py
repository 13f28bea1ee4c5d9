"""Test cases of lesson 06: a small decoder in pipeline stages, and what each stage did."""
import functools
import time
import weakref

import torch
import torch.nn.functional as F

from nanoinfra.config import ModelConfig
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.pipeline.schedules import SCHEDULES
from nanoinfra.parallel.pipeline.stage import cut_to_pipeline_chunk

CONFIG = ModelConfig(vocab=61, width=12, layers=4, heads=2, kv_heads=1, head_dim=6, hidden=20, context=16,
                     tied=False)
T = 9
NAP = 0.02                                   # s a forward; a backward takes twice as long


class Stage:
    """What a student's executor drives, and what it did with that."""

    def __init__(self, chunk, first: bool, last: bool, batches, nap: float = 0.0):
        self.chunk, self.first, self.last, self.batches, self.nap = chunk, first, last, batches, nap
        self.did, self.refs, self.most = [], [], 0

    def enter(self, k: int) -> torch.Tensor:
        """The embedded tokens of micro-batch k, (B, T, C): what the first stage begins with."""
        return self.chunk.embed_tokens(self.batches[k][0], torch.arange(T))

    def place(self, k: int) -> torch.Tensor:
        """Room for the stream of micro-batch k, (B, T, C), to receive into."""
        return torch.empty(len(self.batches[k][0]), T, CONFIG.width, dtype=torch.float64)

    def run(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """What this stage's layers make of x: the stream, (B, T, C), or on the last stage the loss, ()."""
        time.sleep(self.nap)
        y = self.chunk.blocks_and_norm(x, torch.arange(T))
        if self.last:
            y = _nats(self.chunk.head(y), self.batches[k][1]) / count(self.batches)
        y.register_hook(lambda grad: self._backward(k))
        self.refs.append(weakref.ref(y))
        self.did.append(("Forward", k))
        self.most = max(self.most, sum(ref() is not None for ref in self.refs))
        return y

    def _backward(self, k):
        time.sleep(2 * self.nap)
        self.did.append(("Backward", k))


def model() -> Decoder:
    """float64, the same weights on every rank."""
    return init_weights(Decoder(CONFIG), seed=6).double()


@functools.cache
def batch(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Micro-batch k, one or two sequences, with valid targets that differ."""
    x, y = torch.randint(CONFIG.vocab, (2, 1 + k % 2, T), generator=torch.Generator().manual_seed(k))
    y[0, :k % T] = IGNORE_INDEX
    return x, y


def batches(m: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Those of a step of m micro-batches."""
    return [batch(k) for k in range(m)]


def count(batches) -> int:
    """Valid targets of the step."""
    return sum(int((y != IGNORE_INDEX).sum()) for _, y in batches)


def share(m: int, k: int) -> dict[str, torch.Tensor]:
    """Micro-batch k's part of a step's gradients, of m micro-batches."""
    return {name: grad / count(batches(m)) for name, grad in _gradients(k).items()}


def one_rank(m: int) -> dict[str, torch.Tensor]:
    """The gradients of m micro-batches on one rank."""
    return {name: sum(share(m, k)[name] for k in range(m)) for name in share(m, 0)}


@functools.cache
def _gradients(k):
    """Of the sum over micro-batch k's targets."""
    net, (x, y) = model(), batch(k)
    _nats(net(x), y).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def order(kind: str, n: int, r: int, m: int) -> list:
    """What stage r of n is to do."""
    return list(SCHEDULES[kind](n, r, m))


def step(subject, n: int, kind: str, m: int, nap: float = 0.0) -> dict:
    """On each rank, what `subject` did with its stage; rows of n ranks do the same side by side."""
    mesh = Mesh(pp=n, dp=world_size() // n)
    r, todo = mesh.pp.rank, order(kind, n, mesh.pp.rank, m)
    chunk = cut_to_pipeline_chunk(model(), *split_layers_into_chunks(CONFIG, n, T)[r])
    stage = Stage(chunk, r == 0, r == n - 1, batches(m), nap)
    comm.barrier(mesh.world)
    mesh.comm_log.take_records()
    begin = time.monotonic()
    subject(todo, stage, mesh.pp)
    end = time.monotonic()
    rows = [row for row in mesh.comm_log.take_records() if row.op in ("send", "recv", "ring_shift")]
    return {"grads": {name: p.grad for name, p in chunk.named_parameters()}, "did": stage.did,
            "most": stage.most, "rows": rows, "order": todo, "span": (begin, end)}


def sent(n: int, r: int, m: int) -> tuple[int, int]:
    """(messages, bytes) that stage r of n sends in a step."""
    borders = (r > 0) + (r < n - 1)
    return borders * m, borders * sum(x.numel() * CONFIG.width * 8 for x, _ in batches(m))


def _nats(logits, y):
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
