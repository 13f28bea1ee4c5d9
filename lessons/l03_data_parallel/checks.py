"""Checks of lesson 03: data-parallel gradients equal one rank's, and overlap with backward."""
import functools
import time

import torch
import torch.nn.functional as F

from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.compare_tensors import assert_same_tensor
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.data_parallel import pack_grad_buckets

PREDICTIONS = {"L03.calls_each": "calls", "L03.calls_buckets": "calls", "L03.bytes": "B",
               "L03.wait_each": "s", "L03.wait_buckets": "s", "L03.wait_overlap": "s"}
CONFIG = ModelConfig(vocab=61, width=24, layers=3, heads=4, kv_heads=2, head_dim=6, hidden=40, context=16)
BUCKET = 24_000                              # bytes: a bucket a block, and one for the embedding

summed_gradients = Check("summed_gradients")
overlapped_gradients = Check("overlapped_gradients")
CHECKS = (summed_gradients, overlapped_gradients)


@summed_gradients.criterion("the same gradients on every rank", "property")
def _(subject):
    _same_everywhere(subject)


@summed_gradients.criterion("one rank's gradients, to 1e-10", "parity")
def _(subject):
    _equal_one_rank(subject)


@summed_gradients.criterion("sends each gradient once", "resource")
def _(subject):
    _sent_once(subject, len(list(model().parameters())))


@overlapped_gradients.criterion("waits for every bucket", "property")
def _(subject):
    for rank, run in enumerate(_runs(subject, 4, 2, BUCKET)):
        if left := sum(row.end_time == 0 for row in run["rows"]):
            raise CriterionNotMet(f"rank {rank} never waits for {left} of {len(run['rows'])} all-reduces: it "
                                  "returns gradients that may be half summed")


@overlapped_gradients.criterion("the same gradients on every rank", "property")
def _(subject):
    _same_everywhere(subject, BUCKET)


@overlapped_gradients.criterion("one rank's gradients, to 1e-10", "parity")
def _(subject):
    _equal_one_rank(subject, BUCKET)


@overlapped_gradients.criterion("sends each bucket once", "resource")
def _(subject):
    _sent_once(subject, len(buckets()), BUCKET)


@overlapped_gradients.criterion("buckets leave during backward", "resource")
def _(subject):
    want = sum("embed.weight" not in names for names in buckets())
    for rank, run in enumerate(_runs(subject, 4, 2, BUCKET)):
        got = sum(row.start_time < run["end"] for row in run["rows"])
        if got < want:
            raise CriterionNotMet(f"rank {rank}: when backward reaches the embedding, {got} buckets have "
                                  f"left, want {want}: "
                                  f"{'does each leave when it is full?' if got else 'sent after backward?'}")


@overlapped_gradients.criterion("nothing waits during backward", "resource")
def _(subject):
    for rank, run in enumerate(_runs(subject, 4, 2, BUCKET)):
        if got := sum(row.end_time < run["end"] for row in run["rows"]):
            raise CriterionNotMet(f"rank {rank} has waited for {got} buckets before backward is over: "
                                  "all_reduce(..., wait=True) in the hook, and .wait() after backward")


def _same_everywhere(subject, *bucket):
    runs = _runs(subject, 4, 2, *bucket)
    for rank, run in enumerate(runs):
        for name, want in runs[0]["grads"].items():
            got = run["grads"].get(name)
            causes = {"not summed over the ranks?": got}
            assert_same_tensor(f"{name}.grad, against rank 0", got, want, rank, 4, likely_causes=causes)


def _equal_one_rank(subject, *bucket):
    for n, micro_batches in ((1, 2), (2, 1), (4, 2)):
        slips = _slips(n)
        for rank, run in enumerate(_runs(subject, n, micro_batches, *bucket)):
            for name, want in one_rank().items():
                got = run["grads"].get(name)
                _number(rank, name, got)
                causes = {text: grads[name] for text, grads in slips.items()}
                assert_same_tensor(f"{name}.grad", got, want, rank, max(n, 2), 1e-10, causes)


def _sent_once(subject, calls, *bucket):
    psi = sum(p.numel() for p in model().parameters()) * 8                             # float64
    for n, micro_batches in ((2, 1), (4, 3)):
        for rank, run in enumerate(_runs(subject, n, micro_batches, *bucket)):
            got = len(run["rows"]), sum(row.payload_bytes for row in run["rows"])
            if got != (calls, psi):
                raise CriterionNotMet(f"rank {rank} of {n} sums {got[1]:,} bytes in {got[0]} calls, want "
                                      f"{psi:,} in {calls} (micro-batches: {micro_batches}): "
                                      f"{_cause(got, psi, micro_batches)}")


def gradient_rows(rows: list) -> list:
    """The ledger's rows that sum gradients: all-reduces of more than one number."""
    return [row for row in rows if row.op == "all_reduce" and row.payload_bytes > 8]


def model() -> Decoder:
    """The decoder that all are judged on: float64, the same weights on every rank, a tied head."""
    return init_weights(Decoder(CONFIG), seed=3).double()


def buckets() -> list[list[str]]:
    """The parameters' names in each bucket."""
    named = list(model().named_parameters())[::-1]
    names = {p: name for name, p in named}
    return [[names[p] for p in bucket.grad_views] for bucket in pack_grad_buckets(named, BUCKET, None)]


def batches(rank: int, n: int, micro_batches: int) -> list[Batch]:
    """A rank's share of seven sequences with 3, 5, ... 15 valid targets; an empty one gets none at all."""
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randint(CONFIG.vocab, (2, 7, 16), generator=draw)                     # (7, T) each
    for i in range(7):
        y[i, 3 + 2 * i:] = IGNORE_INDEX
    parts = zip(x[rank::n].tensor_split(micro_batches), y[rank::n].tensor_split(micro_batches))
    nothing = Batch(x[:1], torch.full_like(y[:1], IGNORE_INDEX))
    return [Batch(*part) if len(part[0]) else nothing for part in parts]


@functools.cache
def one_rank() -> dict[str, torch.Tensor]:
    """The gradients that all should have: of the mean over all valid targets."""
    [batch] = batches(0, 1, 1)
    return _gradients(batch, batch.num_valid_targets)


def _gradients(batch, count):
    net = model()
    nats = F.cross_entropy(net(batch.tokens).flatten(0, 1), batch.targets.flatten(),
                           ignore_index=IGNORE_INDEX, reduction="sum")
    (nats / count).backward()
    return {name: p.grad for name, p in net.named_parameters()}


@functools.cache
def _slips(n):
    """What all ranks would hold after the usual mistakes."""
    if n == 1:
        return {}
    shares = [batches(r, n, 1)[0] for r in range(n)]
    means = [_gradients(batch, batch.num_valid_targets) for batch in shares]
    summed = {name: sum(mean[name] for mean in means) for name in means[0]}
    return {"each rank divided by its own count, and the means were averaged?":
            {name: grad / n for name, grad in summed.items()},
            "each rank divided by its own count? The count is the step's, over all ranks": summed}


def _number(rank, name, got):
    if isinstance(got, torch.Tensor) and got.isnan().any():
        raise CriterionNotMet(f"rank {rank}: `{name}.grad` is not a number: the mean of a micro-batch whose "
                              "targets are all ignored is 0/0; sum, and divide by the step's count")


def _cause(got, psi, micro_batches):
    if micro_batches > 1 and got[1] == micro_batches * psi:
        return "sent after every micro-batch?"
    if got[1] == psi:
        return "other parts than asked for? Each call pays the latency"
    return "gradients left out?" if got[1] < psi else "something sent twice, or in a wider dtype?"


def _runs(subject, n, micro_batches, *bucket):
    """What `subject` did on each of n ranks. One rank is this process; two are a row of a 2 x 2 mesh."""
    args = subject, n, micro_batches, *bucket
    runs = [_one(*args)] if n == 1 else rank_pool_for_checks(4 if n == 2 else n).run(_one, *args)[:n]
    for rank, run in enumerate(runs):
        if not isinstance(run["grads"], dict):
            raise CriterionNotMet(f"rank {rank} returns {run['grads']!r}, "
                                  "want {name: gradient}: no return?")
    return runs


def _one(subject, n, micro_batches, *bucket):
    mesh = Mesh(dp=n, pp=world_size() // n)
    net, moments = model(), []

    def mark(_, __, out):                    # its gradient comes last, before the embedding's own
        out.register_hook(lambda grad: moments.append(time.monotonic()))
    net.embed.register_forward_hook(mark)
    grads = subject(net, batches(mesh.dp.rank, n, micro_batches), mesh.dp, *bucket)
    if isinstance(grads, dict):
        grads = {name: g.clone() if isinstance(g, torch.Tensor) else g for name, g in grads.items()}
    return {"grads": grads, "rows": gradient_rows(mesh.comm_log.take_records()),
            "end": moments[-1] if moments else 0.0}
