"""Checks of lesson 04: activation checkpointing keeps gradients and random state, and saves memory."""
import functools
from dataclasses import replace

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.compare_tensors import assert_same_tensor
from nanoinfra.lab.instruments.saved_activations import SavedActivations
from nanoinfra.memory.recompute import apply_activation_checkpointing
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.train.loss import linear_cross_entropy

PREDICTIONS = {"L04.kept_none": "B", "L04.kept_selective": "B", "L04.kept_full": "B",
               "L04.flops_selective": "FLOPs", "L04.flops_full": "FLOPs", "L04.time_full": "x"}
# Five layers, and T = 7: factors that no other slip has.
CONFIG = ModelConfig(vocab=61, width=24, layers=5, heads=4, kv_heads=4, head_dim=6, hidden=40, context=64,
                     family="gpt2")
GROUPED = replace(CONFIG, kv_heads=2, head_dim=13)
SEQUENCES, T = 3, 7
HOW = ("none", "selective", "full")

recompute = Check("recompute")
kept_bytes = Check("kept_bytes")
CHECKS = (recompute, kept_bytes)


@recompute.criterion("the same output", "property")
def _(subject):
    assert_same_tensor("fn(x)", _step(subject, back=False)["out"], _step(_plain)["out"], 0)


@recompute.criterion("backward runs", "property")
def _(subject):
    try:
        _step(subject)
    except (NotImplementedError, CriterionNotMet):
        raise
    except Exception as error:                       # of a student's function, or of autograd because of it
        why = next((text for part, text in _RAISED.items() if part in str(error)), "")
        first = str(error).split(". ")[0].rstrip(".")
        raise CriterionNotMet(f"out.backward() raised {type(error).__name__}: {first}{why}") from None


_RAISED = {"does not require grad": ". Was fn run under torch.enable_grad(), on x.detach().requires_grad_()?",
           "backward through the graph a second time": ". Was x detached? Its graph is not fn's to run",
           "incorrect number of gradients": ". One for each of fn, anchor, x, *rest"}


@recompute.criterion("an input that needs a gradient", "parity")
def _(subject):
    ones = _step(_plain, upstream=torch.ones_like)["grads"]
    _same_gradients(_step(subject)["grads"], _step(_plain)["grads"], slips={"is `upstream` used?": ones})


@recompute.criterion("an input that needs none", "parity")
def _(subject):
    _same_gradients(_step(subject, learns=False)["grads"], _step(_plain, learns=False)["grads"])


@recompute.criterion("a decoder's gradients, to 1e-10", "parity")
def _(subject):
    _same_gradients(_decoder_gradients(subject), _decoder_gradients(_plain), 1e-10)


@recompute.criterion("the same dice in the second run", "parity")
def _(subject):
    got, want = (_step(call, dropout=0.5)["grads"] for call in (subject, _plain))
    try:
        _same_gradients(got, want)
    except CriterionNotMet as wrong:
        raise CriterionNotMet(f"with dropout inside, {wrong}; the second run drops other numbers than the "
                              "first: set torch's random state back to what it was before the "
                              "first") from None


@recompute.criterion("the dice roll on as without", "parity")
def _(subject):
    got, want = (_step(call, dropout=0.5)["dice"] for call in (subject, _plain))
    for when, a, b in zip(("between forward and backward", "after backward"), got, want):
        if a != b:
            raise CriterionNotMet(f"the random number drawn {when} is {a:.6f}, want {b:.6f}: the caller's "
                                  "random state was changed. Backward must leave it as it found it")


@recompute.criterion("keeps the input alone", "resource")
def _(subject):
    blocks, x = _blocks(subject), torch.zeros(SEQUENCES, T, CONFIG.width, requires_grad=True)
    with SavedActivations(blocks.parameters()) as kept:
        out = functools.reduce(lambda x, block: block(x), blocks, x)
    _tensor(out)
    got, want = kept.saved_bytes(), CONFIG.layers * x.nbytes
    if got != want:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in kept.saved_tensors()[:4])
        why = "no save_for_backward? What hangs on ctx is neither counted nor freed with the graph"
        if got > want:
            why = f"more than x is kept, {shapes} ...: does fn run with grad in forward?"
        if got == want + x.nbytes:                        # the others' outputs are inputs, too
            why = "the output as well? It is the next block's input"
        raise CriterionNotMet(f"{CONFIG.layers} blocks keep {got:,} bytes, want {want:,}, one input each: "
                              f"{why}")


@recompute.criterion("runs fn twice", "resource")
def _(subject):
    got = _step(subject)["calls"]
    if got != 2:
        raise CriterionNotMet(f"forward and backward call fn {got} times, want 2: "
                              f"{'nothing is run again?' if got < 2 else 'each call costs a forward'}")


def _plain(fn, *args):
    return fn(*args)


class Body(nn.Module):
    """What is recomputed in most checks: two matrices, and dropout where asked for."""

    def __init__(self, dropout: float):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.dropout, self.calls = dropout, 0

    def forward(self, x):
        self.calls += 1
        return self.down(torch.dropout(torch.tanh(self.up(x)), self.dropout, True))


def _step(call, learns=True, dropout=0.0, back=True, upstream=lambda out: 2 * out):
    """One step of a Body behind `call`: output, gradients by name, two random numbers, calls of the body."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = Body(dropout).double()
        leaf = torch.randn(5, 6, dtype=torch.float64, requires_grad=learns)
        out = call(body, leaf * 1.0 if learns else leaf)                   # no leaf, as inside a model
        _tensor(out)
        first = torch.rand(()).item()
        if back:
            out.backward(upstream(out.detach()))
        grads = {"x": leaf.grad} if learns else {}
        grads |= {name: p.grad for name, p in body.named_parameters()}
        return {"out": out.detach(), "grads": grads, "dice": (first, torch.rand(()).item()),
                "calls": body.calls}


def _tensor(out):
    if not isinstance(out, torch.Tensor):
        raise CriterionNotMet(f"fn(x) came back as {out!r}, want a tensor: no return?")
    if not out.requires_grad:
        raise CriterionNotMet("the output needs no gradient, so backward would never come to fn's "
                              "parameters. Autograd asks whether an input of `.apply` needs one: give it one "
                              "that does")


def _same_gradients(got, want, rtol=1e-12, slips=None):
    for name, w in want.items():
        if got[name] is None:
            why = "is `out` sent backward in the second run?"
            if name == "x":
                why = "does the detached x require a gradient, and does backward return x.grad?"
            raise CriterionNotMet(f"`{name}` got no gradient, want one: {why}")
        causes = {"given twice: was x not detached, or backward run twice?": 2 * w}
        causes |= {text: grads[name] for text, grads in (slips or {}).items()}
        assert_same_tensor(f"{name}.grad", got[name], w, 0, 1, rtol, causes)


def _blocks(call):
    blocks = init_weights(Decoder(CONFIG), seed=3).blocks
    for block in blocks:
        block.forward = functools.partial(call, block.forward)
    return blocks


def _decoder_gradients(call):
    """Of two micro-batches, the embedding frozen: the first block's input needs no gradient."""
    model = init_weights(Decoder(replace(CONFIG, tied=False), "naive"), seed=3).double()
    model.embed.requires_grad_(False)
    model.positions.requires_grad_(False)
    for block in model.blocks:
        block.forward = functools.partial(call, block.forward)
    for seed in (0, 1):
        tokens = torch.randint(CONFIG.vocab, (2, T), generator=torch.Generator().manual_seed(seed))
        linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens, 4 * T).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@kept_bytes.criterion("full: each layer's input", "property")
def _(subject):
    want, c = counted(CONFIG, SEQUENCES, T, "full"), CONFIG
    one = SEQUENCES * T * c.width * 4
    _equal("full", c, SEQUENCES, T, subject(c, SEQUENCES, T, 4, "full"), want, {
        "one layer? Each keeps an input of its own": one, "bytes, not numbers?": want / 4,
        "the output as well? It is the next layer's input": 2 * want})


@kept_bytes.criterion("selective: nothing grows with T squared", "property")
def _(subject):
    one, two = (subject(CONFIG, SEQUENCES, n * T, 4, "selective") for n in (1, 2))
    _number(one)
    if two != 2 * one:
        raise CriterionNotMet(f"selective, B={SEQUENCES}: {one:,.0f} bytes at T={T} and {two:,.0f} at "
                              f"T={2 * T}, want twice as many: no square is kept, neither softmax nor mask")


@kept_bytes.criterion("selective: what autograd keeps", "property")
def _(subject):
    for c in (CONFIG, GROUPED):
        want = counted(c, SEQUENCES, T, "selective")
        _equal("selective", c, SEQUENCES, T, subject(c, SEQUENCES, T, 4, "selective"), want, _slips(c, want))


@kept_bytes.criterion("none: the squares on top", "property")
def _(subject):
    got, want = (flow(CONFIG, SEQUENCES, T, 4, "none") - flow(CONFIG, SEQUENCES, T, 4, "selective")
                 for flow in (subject, lambda c, B, T, d, how: counted(c, B, T, how)))
    mask, pairs = CONFIG.layers * T * T, 4 * CONFIG.layers * SEQUENCES * CONFIG.heads * T * T
    _equal("none less selective", CONFIG, SEQUENCES, T, got, want, {
        "the same as selective?": 0, "no mask? It is kept too, a byte a pair, for all heads": want - mask,
        "the mask for each sequence? It is one for all": want + (SEQUENCES - 1) * mask,
        "the mask for each head and sequence? It is one for all": want - mask + pairs // 4,
        "one mask for all layers? Each layer makes its own": want - mask + T * T,
        "a mask of numbers? A bool has one byte": want + 3 * mask,
        "scores and softmax? Softmax's backward reads its output alone": want + pairs,
        "one head? Each makes its own square": mask + pairs / CONFIG.heads,
        "one layer?": want / CONFIG.layers})


@kept_bytes.criterion("what autograd keeps", "parity")
def _(subject):
    for c, batch, seq, dtype in ((CONFIG, 2, 16, torch.float64), (GROUPED, 1, 5, torch.float32),
                                 (replace(GROUPED, layers=1, hidden=9), 2, 11, torch.float64)):
        for how in HOW:
            got = subject(c, batch, seq, dtype.itemsize, how)
            _equal(f"{how}, {dtype}", c, batch, seq, got, counted(c, batch, seq, how, dtype), {})


@functools.cache
def counted(config: ModelConfig, batch: int, seq: int, how: str, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that autograd keeps of a forward through the layers, counted; attention is naive."""
    blocks = apply_activation_checkpointing(Decoder(config, "naive"), how).blocks.to(dtype)
    x = torch.zeros(batch, seq, config.width, dtype=dtype, requires_grad=True)
    with SavedActivations(blocks.parameters()) as kept:
        out = functools.reduce(lambda x, block: block(x), blocks, x)
    assert out.requires_grad
    return kept.saved_bytes()


def _slips(c, want):
    number = 4 * c.layers * SEQUENCES * T            # bytes of one number a token, all layers
    C, H, KV, HK = c.width, c.heads, c.kv_heads, c.heads * c.head_dim
    qkv, spared = HK + 2 * KV * c.head_dim, HK - KV * c.head_dim
    return {"one layer?": want / c.layers, "bytes, not numbers?": want / 4,
            "one norm's statistics? A layer has two norms": want - number * 2,
            "no mean and 1/std? Each norm keeps two numbers a token": want - number * 4,
            "no norm inputs?": want - number * 2 * C, "a layer has two norms": want - number * (C + 2),
            "each of the two norms keeps its input": want - number * C,
            "no q, k, v? Selective recompute starts from them": want - number * qkv,
            "as many KV heads as heads?": want + number * 2 * spared,
            "here H*K is not C, for q or for o's input": want + number * (C - HK),
            "here H*K is not C, for q and o's input": want + number * 2 * (C - HK),
            "here H*K is not C, nor KV = H": want + number * (4 * C - qkv - HK),
            "here H*K is not C: K stands in the config": want + number * (2 * (C + C * KV // H) - qkv - HK),
            "q, k and v read one and the same input": want + number * 2 * C,
            "down reads GELU's output, and GELU its input": want - number * c.hidden}


def _equal(what, c, batch, seq, got, want, slips):
    _number(got)
    if got != want:
        why = next((": " + text for text, wrong in slips.items() if wrong == got), "")
        shape = f"C={c.width} L={c.layers} H={c.heads} KV={c.kv_heads} K={c.head_dim} F={c.hidden}"
        raise CriterionNotMet(f"bytes kept, {what}, B={batch} T={seq} {shape}: want {want:,}, got "
                              f"{got:,.0f}, {got - want:+,.0f}{why}")


def _number(got):
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise CriterionNotMet(f"got {got!r}, want a number of bytes: no return?")
