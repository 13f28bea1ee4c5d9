"""Checks of lesson 00: a student's formulas against the decoder's own tensors and torch's FLOP counter."""
import functools
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.model.decoder import Decoder

PREDICTIONS = {"L00.parameters": "", "L00.flops": "FLOPs", "L00.bytes": "B", "L00.seconds": "s"}
# Five layers: a factor that no other slip has (2, 3, 4, 6 or 12).
PLAIN = ModelConfig(vocab=61, width=24, layers=5, heads=4, kv_heads=4, head_dim=6, hidden=40, context=64)
GROUPED = replace(PLAIN, kv_heads=1)
WIDE_HEADS = replace(GROUPED, head_dim=10)   # H K = 40, but C = 24: as in Qwen3
UNTIED = replace(GROUPED, tied=False)
SEQUENCES, T = 3, 8
DIAL = tuple(config_for_size(name) for name in ("test", "nano", "micro"))

parameters = Check("parameters")
train_flops = Check("train_flops")
CHECKS = (parameters, train_flops)


@parameters.criterion("a plain decoder", "property")
def _(subject):
    _tensors(subject, PLAIN)


@parameters.criterion("fewer KV heads", "property")
def _(subject):
    _tensors(subject, GROUPED)


@parameters.criterion("heads wider than the model", "property")
def _(subject):
    _tensors(subject, WIDE_HEADS)


@parameters.criterion("a head of its own", "property")
def _(subject):
    _tensors(subject, UNTIED)


@parameters.criterion("the tensors of every LLaMA size", "parity")
def _(subject):
    for config in DIAL:
        _tensors(subject, config)


@train_flops.criterion("twice the sequences cost twice", "property")
def _(subject):
    one, two = (subject(GROUPED, batch, T) for batch in (SEQUENCES, 2 * SEQUENCES))
    _equal(_step(GROUPED, 2 * SEQUENCES, T), two, 2 * one, {"the same for any batch?": one})


@train_flops.criterion("the part that grows with T", "property")
def _(subject):
    (got, _), (want, square) = _split(subject), _split(counted_flops)
    once = "attention once a sequence? Each of the T tokens meets T keys, so it grows with T squared"
    _equal(f"the part that grows with T, {_step(GROUPED, SEQUENCES, T)}", got, want,
           _weight_slips(GROUPED, want) | {once: want + square / T})


@train_flops.criterion("the part that grows with T squared", "property")
def _(subject):
    got, want = (_split(flops)[1] for flops in (subject, counted_flops))
    _equal(f"scores and values, {_step(GROUPED, SEQUENCES, T)}", got, want, _square_slips(GROUPED, want))


@train_flops.criterion("torch counts the same", "parity")
def _(subject):
    for c in (PLAIN, WIDE_HEADS, UNTIED, *DIAL):
        want = counted_flops(c, 2, T)
        side, head = 12 * c.layers * 2 * T * T, 6 * 2 * T * c.vocab * c.width
        _equal(_step(c, 2, T), subject(c, 2, T), want, {
            "C in attention? Its heads are H K wide": want + side * (c.width - c.heads * c.head_dim),
            "the embedding as a product? It is looked up": want + head, "no head?": want - head})


@functools.cache
def counted_tensors(config: ModelConfig) -> int:
    """Parameters of the real decoder, tensor by tensor; on the meta device, so that none is ever filled."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


@functools.cache
def counted_flops(config: ModelConfig, batch: int, seq: int) -> int:
    """What torch's counter sees in forward and backward. It knows plain products, so attention is naive."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Decoder(config, attention="naive")(torch.zeros(batch, seq, dtype=torch.long)).sum().backward()
    return counter.get_total_flops()


def _tensors(subject, c):
    want, C, L, head = counted_tensors(c), c.width, c.layers, c.vocab * c.width
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    _equal(f"parameters of {_name(c)}", subject(c), want, {
        "the head counted twice? A tied one is the embedding": want + head,
        "no head? An untied one has weights of its own": want - head,
        "no norms?": want - (2 * L + 1) * C, "the last norm?": want - C,
        "as many KV heads as heads?": want + 2 * L * C * (queries - keys),
        "no o matrix?": want - L * C * queries,
        "C x C for q and o? They are C x H K": want + 2 * L * C * (C - queries),
        "two matrices in the MLP? gate, up, down are three": want - L * C * c.hidden,
        "L layers forgotten? Each one has its own matrices and norms":
            head * (2 - c.tied) + (want - C - head * (2 - c.tied)) / L + C})


def _weight_slips(c, want):
    twice = 6 * SEQUENCES * T                # FLOPs of a weight in forward and backward of them all
    head, spared = twice * c.vocab * c.width, (c.heads - c.kv_heads) * c.head_dim
    return {"no head? A tied one is a product all the same": want - head,
            "the embedding as a product? It is looked up": want + head,
            "as many KV heads as heads?": want + twice * 2 * c.layers * c.width * spared,
            "two matrices in the MLP? gate, up, down are three":
                want - twice * c.layers * c.width * c.hidden,
            "L layers forgotten? Each one has its own matrices": head + (want - head) / c.layers,
            "6 for each parameter? A norm's weights are in no product":
                want + twice * (2 * c.layers + 1) * c.width,
            "forward alone?": want / 3, "backward once, not twice?": want * 2 / 3,
            "a multiply and an add are two FLOPs?": want / 2}


def _square_slips(c, want):
    shared = c.kv_heads / c.heads
    return {"no attention? (or once a sequence: each of the T tokens meets T keys)": 0,
            "L layers forgotten? Each one has its own attention": want / c.layers,
            "forward alone?": want / 3, "backward once, not twice?": want * 2 / 3,
            "scores or values alone? Or half of the keys? By convention a query meets all T": want / 2,
            "KV heads? Each query head makes its own scores": want * shared,
            "KV heads for scores or values? Query heads share keys and values, but each has its own products":
                want * (1 + shared) / 2}


def _split(flops):
    """The parts of SEQUENCES x T tokens that grow with T and with T^2: f(T) = a T + b T^2."""
    short, long = flops(GROUPED, SEQUENCES, T), flops(GROUPED, SEQUENCES, 2 * T)
    return (4 * short - long) / 2, (long - 2 * short) / 2


def _equal(what, got, want, slips):
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise CriterionNotMet(f"{what}: got {got!r}, want a number: no return?")
    if got != want:
        why = next((": " + text for text, wrong in slips.items() if wrong == got), "")
        raise CriterionNotMet(f"{what}: want {want:,.0f}, got {got:,.0f}, {got - want:+,.0f}{why}")


def _name(c):
    return (f"V={c.vocab} C={c.width} L={c.layers} H={c.heads} KV={c.kv_heads} K={c.head_dim} F={c.hidden}, "
            f"{'tied' if c.tied else 'untied'}")


def _step(c, batch, seq):
    return f"FLOPs of a step, B={batch} T={seq} {_name(c)}"
