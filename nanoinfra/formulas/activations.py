"""Bytes that forward leaves for backward, tensor by tensor: saved activations, parameters apart.

In 16 bits a layer of GPT-2 keeps 32 BTC, statistics and attention's squares; with tensor parallelism over t
ranks (8 + 24/t) BTC, sequence-parallel too, gathered again in backward, 32/t BTC. Korthikanti et al. 2022,
table 2, has 34, 10 + 24/t, 34/t and 5 BHT^2: with dropout's masks, which ours is without (`table_2` below).
B sequences, T tokens, V vocabulary, C width, L layers, H query heads, KV key heads, K head_dim, F hidden.
Of t ranks it is rank 0's that is counted, the largest where a cut does not come out even.
"""
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import RECOMPUTED
from nanoinfra.formulas.tensor_parallel import padded_seq, part

SQUARES = ("mask", "softmax", "weights")     # the terms that grow with T^2


def activation_bytes(config: ModelConfig, batch: int, seq: int, dtype_bytes: int, attention: str = "sdpa",
                     recompute: str = "none", tp: int = 1, sp: str = "none") -> int:
    """Bytes that forward leaves for backward, from tokens to loss, of `batch` sequences of `seq` tokens."""
    every = range(config.layers)
    ends = end_terms(config, batch, seq, dtype_bytes, tp, sp)
    return sum(ends.values()) + layers_bytes(config, every, batch, seq, dtype_bytes, attention, recompute, tp,
                                             sp)


def layers_bytes(config: ModelConfig, layers: Iterable[int], batch: int, seq: int, dtype_bytes: int,
                 attention: str = "sdpa", recompute: str = "none", tp: int = 1, sp: str = "none") -> int:
    """Bytes that the forward of `layers`, the numbers of some, leaves for backward: what is at no end."""
    windows = Counter(map(config.window_of, layers))
    terms = {window: activation_terms(replace(config, window=window), batch, seq, dtype_bytes, attention,
                                      recompute, tp, sp) for window in windows}
    return sum(n * sum(terms[window].values()) for window, n in windows.items())


def activation_terms(config: ModelConfig, batch: int, seq: int, dtype_bytes: int, attention: str = "sdpa",
                     recompute: str = "none", tp: int = 1, sp: str = "none") -> dict[str, int]:
    """Bytes that one layer's forward leaves for backward, by term, on one of `tp` ranks.

    Where `config` has a window it is a layer with one that is counted.

    `dtype_bytes` (8, 4 or 2) is that of weights and activations alike; `attention` is the core, naive or
    sdpa, the latter with torch's fused CPU kernel. A tensor that several products read counts once.
    With "selective" recompute the naive core leaves no squares, with "full" a layer leaves its input alone:
    2 BTC in 16 bits, Korthikanti et al. 2022, table 2. (Random states, 5 KB a recomputed call, not counted.)

    Tensor parallelism divides what is between f and g: heads and the MLP's hidden. With `sp` the norms' part
    is of ceil(T/t) tokens too; the inputs of qkv and MLP stay whole in "keep", as t ceil(T/t) tokens came in
    the all-gather, and are of ceil(T/t) tokens in "gather", as in the paper.
    """
    _check(attention, recompute)
    tokens = _tokens(batch, seq, tp, sp)
    if recompute == "full":
        return {"block_input": tokens.residual * config.width * dtype_bytes}
    terms = _layer(part(config, tp), tokens, dtype_bytes, attention)
    return {term: n for term, n in terms.items() if recompute == "none" or term not in SQUARES}


def working_bytes(config: ModelConfig, batch: int, seq: int, dtype_bytes: int, attention: str = "sdpa",
                  recompute: str = "full", tp: int = 1, sp: str = "none") -> int:
    """Bytes that come on top of what is kept while backward runs one layer again, one layer at a time.

    "full" needs all that the layer would have kept, less the input where the norm reads it as it is kept
    (RMSNorm reads a wide copy in 16 bits). "selective" needs the squares; with grouped or unrotated heads
    torch's batched product copies q, k or v as well, which is not counted. Nor is, with sp "gather", the
    input of t ceil(T/t) tokens that backward gathers again and lets go.
    """
    _check(attention, recompute)
    tokens = _tokens(batch, seq, tp, sp)
    terms = _layer(part(config, tp), tokens, dtype_bytes, attention)
    if recompute != "full":
        return sum(terms[term] for term in SQUARES) if recompute == "selective" else 0
    shared = config.parts.norm == "layer" or dtype_bytes >= 4
    return sum(terms.values()) - (tokens.residual * config.width * dtype_bytes if shared else 0)


def end_terms(config: ModelConfig, batch: int, seq: int, dtype_bytes: int, tp: int = 1,
              sp: str = "none") -> dict[str, int]:
    """Bytes kept outside the layers, by term, on one of `tp` ranks.

    tokens and learned positions are int64 indices, whole on every rank; under RoPE, positions are cos and
    sin, once for all layers. BLOOM has one norm more, the embedding's. The loss keeps this rank's logits of
    all tokens, ceil(V/t) each, written over by their gradient, and what the head read; the three numbers a
    token that ranks exchange are gone by then.
    """
    d, tokens, norms = dtype_bytes, _tokens(batch, seq, tp, sp), 2 if config.parts.embed_norm else 1
    places = {"learned": 8 * padded_seq(seq, tp, sp), "rope": seq * config.head_dim * _wide(d), "alibi": 0}
    return {
        "tokens": 8 * batch * seq,
        "positions": places[config.parts.position],
        **_norms(config, norms, tokens.residual, d),
        "head_input": tokens.read * config.width * d,
        "logits": batch * seq * part(config, tp).vocab * d,
    }


def table_2(s: int, b: int, h: int, a: int, t: int = 1, sp: bool = False, recompute: str = "none") -> float:
    """The paper's bytes a layer: s tokens, b sequences, h width, a heads, t ranks; Korthikanti et al. 2022.

    34 sbh + 5 as^2b at t = 1. Theirs are 16-bit GPT-2 with dropout, masks of a byte, softmax unfused and in
    16 bits, MHA, hidden 4 h; the norms' statistics and the causal mask are left out. Full recompute has one
    row, the block's input, whole on every rank.
    """
    if recompute not in RECOMPUTED:
        raise ValueError(f"recompute {recompute!r} is not one of {', '.join(RECOMPUTED)}")
    if recompute == "full":
        return 2 * s * b * h
    squares = 5 * a * s * s * b / t if recompute == "none" else 0
    return s * b * h * (34 / t if sp else 10 + 24 / t) + squares


class _Tokens(NamedTuple):
    """How many tokens of a micro-batch a rank keeps: where, besides between f and g, it may have fewer."""
    batch: int
    seq: int
    residual: int                  # that the norms see
    read: int                      # of the inputs of qkv, MLP and head, as kept for backward

    @property
    def all(self):
        return self.batch * self.seq


def _tokens(batch, seq, tp, sp):
    whole = batch * padded_seq(seq, tp, sp)
    mine = whole if sp == "none" else whole // tp
    return _Tokens(batch, seq, residual=mine, read=mine if sp == "gather" else whole)


def _check(attention, recompute):
    if recompute not in RECOMPUTED:
        raise ValueError(f"recompute {recompute!r} is not one of {', '.join(RECOMPUTED)}")
    if attention not in ("naive", "sdpa"):
        raise ValueError(f"attention {attention!r} is not one of naive, sdpa")
    if recompute == "selective" and attention != "naive":
        raise ValueError(f"selective recompute saves the scores of naive attention, and {attention} keeps "
                         f"none; try attention naive, or recompute full")


def _layer(config, tokens, d, attention):
    """What a layer keeps that recomputes nothing; `config` has this rank's heads and hidden."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        **_norms(config, 2, tokens.residual, d),
        "qkv_input": tokens.read * config.width * d,
        **_head_norms(config, tokens.all, d),
        "qkv": tokens.all * (queries + 2 * keys) * d,             # as the core reads them, after RoPE
        **_core(config, tokens.batch, tokens.seq, d, attention),
        "o_input": tokens.all * queries * d,
        "mlp_input": tokens.read * config.width * d,
        "mlp_hidden": tokens.all * _mlp_tensors(config) * config.hidden * d,
    }


def _mlp_tensors(config):
    """Tensors (B, T, F): gelu(up) and up, or relu(up) alone; behind a gate also up and the product."""
    return (1 if config.act == "relu" else 2) + (2 if config.parts.gated else 0)


def _norms(config, n, tokens, d):
    """n norms over C. LayerNorm reads its input, mean, 1/std; RMSNorm its input in wide, 1/rms, input/rms."""
    C = config.width
    if config.parts.norm == "layer":
        return {"norm_input": n * tokens * C * d, "norm_stats": n * tokens * 2 * d}
    return {"norm_input": n * tokens * C * _wide(d), "norm_stats": n * tokens * _wide(d),
            "norm_scaled": n * tokens * C * d}


def _head_norms(config, tokens, d):
    """RMSNorm over each head of q and k: the same three tensors."""
    if not config.parts.qk_norm:
        return {}
    heads, K = config.heads + config.kv_heads, config.head_dim
    return {"qk_norm_input": tokens * heads * K * _wide(d), "qk_norm_stats": tokens * heads * _wide(d),
            "qk_norm_scaled": tokens * heads * K * d}


def _core(config, batch, seq, d, attention):
    """What the core reads besides q, k, v.

    naive: the mask, a byte a pair; softmax, wide; its copy in 16 bits, which the product with v reads. ALiBi
    adds to the scores and leaves nothing.
    sdpa: a log-sum-exp a query, and the output; without RoPE that lies as o reads it, (B, T, H, K), and is
    one tensor with o's input. ALiBi is a mask of numbers, one for each head, (1, H, T, T); a window that
    hides something is one of (T, T). Not covered: sdpa under RoPE at head_dim 2, where torch's kernel is
    unfused.
    """
    squares, position = batch * config.heads * seq * seq, config.parts.position
    if attention == "naive":
        return {"mask": seq * seq if seq > 1 or config.window else 0, "softmax": squares * _wide(d),
                "weights": squares * d if d < 4 else 0}
    copied = position == "rope" and config.heads > 1 and seq > 1
    rows = batch * config.heads * seq
    masks = config.heads if position == "alibi" else int(config.window is not None and seq > config.window)
    return {"core_output": rows * config.head_dim * d if copied else 0, "logsumexp": rows * _wide(d),
            "mask": masks * seq * seq * d}


def _wide(d):
    """Bytes of the dtype to sum in: float32, or float64 in a float64 model."""
    return max(4, d)
