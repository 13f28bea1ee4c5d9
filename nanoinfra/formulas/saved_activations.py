"""Activation memory: the bytes of the activations that forward saves for backward, tensor by tensor.

In 16 bits a GPT-2 layer saves 32 BTC bytes, the norms' statistics and the attention matrices; with tensor
parallelism over t ranks (8 + 24/t) BTC; with sequence parallelism too, gathered again in backward, 32/t BTC.
Korthikanti et al. 2022, table 2, has 34, 10 + 24/t, 34/t and 5 BHT^2: with dropout masks, which we have not.
B sequences, T tokens, V vocabulary, C width, L layers, H query heads, KV key heads, K head_dim, F hidden.
The bytes are rank 0's of the t ranks: it holds the largest shard where a split is uneven.
"""
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import RECOMPUTED_FLOP_TERMS
from nanoinfra.formulas.tensor_parallel import padded_seq_len, tp_rank_config

ATTENTION_MATRIX_TERMS = ("mask", "softmax", "weights")     # the terms that grow with T^2


def saved_activation_bytes(config: ModelConfig, batch: int, seq: int, dtype_bytes: int,
                           attention: str = "sdpa", recompute: str = "none", tp: int = 1,
                           sp: str = "none") -> int:
    """Bytes that forward saves for backward, from tokens to loss, for `batch` sequences of `seq` tokens."""
    layers = saved_activation_bytes_of_layers(config, range(config.layers), batch, seq, dtype_bytes,
                                              attention, recompute, tp, sp)
    ends = embedding_and_head_bytes_by_term(config, batch, seq, dtype_bytes, tp, sp)
    return sum(ends.values()) + layers


def saved_activation_bytes_of_layers(config: ModelConfig, layers: Iterable[int], batch: int, seq: int,
                                     dtype_bytes: int, attention: str = "sdpa", recompute: str = "none",
                                     tp: int = 1, sp: str = "none") -> int:
    """Bytes that forward saves for backward in the layers with the indices `layers`.

    The embedding, the final norm and the head are not part of them.
    """
    windows = Counter(map(config.sliding_window_of_layer, layers))
    found = 0
    for window, count in windows.items():
        terms = layer_activation_bytes_by_term(replace(config, window=window), batch, seq, dtype_bytes,
                                               attention, recompute, tp, sp)
        found += count * sum(terms.values())
    return found


def layer_activation_bytes_by_term(config: ModelConfig, batch: int, seq: int, dtype_bytes: int,
                                   attention: str = "sdpa", recompute: str = "none", tp: int = 1,
                                   sp: str = "none") -> dict[str, int]:
    """Bytes that the forward of one layer saves for backward, by term, on one of `tp` ranks.

    Where `config` has a sliding window, the layer has it too.

    Weights and activations have `dtype_bytes` (8, 4 or 2) a number. `attention` is the attention core, naive
    or sdpa (torch's fused CPU kernel). A tensor that several products read counts once.
    `recompute` is activation checkpointing: with "selective" the naive core saves no attention matrices, with
    "full" a layer saves only its input, 2 BTC in 16 bits (Korthikanti et al. 2022, table 2). The random
    states, 5 KB a recomputed call, are not counted.

    Tensor parallelism divides the heads and the MLP's hidden units. With sequence parallelism (`sp`) the
    norms' inputs have ceil(T/t) tokens. The inputs of q, k, v and of the MLP have all t ceil(T/t) tokens with
    "keep", which saves the all-gathered tensor, and ceil(T/t) tokens with "gather", as in the paper.
    """
    _check(attention, recompute)
    tokens = _tokens(batch, seq, tp, sp)
    if recompute == "full":
        return {"block_input": tokens.residual * config.width * dtype_bytes}
    terms = _layer(tp_rank_config(config, tp), tokens, dtype_bytes, attention)
    return {term: n for term, n in terms.items() if recompute == "none" or term not in ATTENTION_MATRIX_TERMS}


def recompute_working_bytes(config: ModelConfig, batch: int, seq: int, dtype_bytes: int,
                            attention: str = "sdpa", recompute: str = "full", tp: int = 1,
                            sp: str = "none") -> int:
    """Extra bytes that backward needs while it recomputes one layer (activation checkpointing).

    "full" needs all that the layer would have saved, less its input where the norm reads the saved tensor
    itself (in 16 bits RMSNorm reads a float32 copy). "selective" needs the attention matrices. Not counted:
    the copies of q, k or v that torch's batched product makes for grouped or unrotated heads, and with sp
    "gather" the input of t ceil(T/t) tokens that backward gathers again for a moment.
    """
    _check(attention, recompute)
    tokens = _tokens(batch, seq, tp, sp)
    terms = _layer(tp_rank_config(config, tp), tokens, dtype_bytes, attention)
    if recompute != "full":
        return sum(terms[term] for term in ATTENTION_MATRIX_TERMS) if recompute == "selective" else 0
    shared = config.architecture.norm_type == "layer" or dtype_bytes >= 4
    return sum(terms.values()) - (tokens.residual * config.width * dtype_bytes if shared else 0)


def embedding_and_head_bytes_by_term(config: ModelConfig, batch: int, seq: int, dtype_bytes: int,
                                     tp: int = 1, sp: str = "none") -> dict[str, int]:
    """Bytes of activations saved outside the layers, by term, on one of `tp` ranks.

    Tokens and learned positions are int64 indices, the same on every rank; with RoPE, positions are cos and
    sin, once for all layers. BLOOM has one more norm, after the embedding. The loss keeps this rank's logits
    of all tokens, ceil(V/t) each, which their gradient overwrites, and the head's input. The three numbers a
    token that the ranks all-reduce are freed before that.
    """
    d, tokens = dtype_bytes, _tokens(batch, seq, tp, sp)
    norms = 2 if config.architecture.embed_norm else 1
    positions = {"learned": 8 * padded_seq_len(seq, tp, sp), "rope": seq * config.head_dim * _wide(d),
                 "alibi": 0}
    return {
        "tokens": 8 * batch * seq,
        "positions": positions[config.architecture.position_encoding],
        **_norms(config, norms, tokens.residual, d),
        "head_input": tokens.read * config.width * d,
        "logits": batch * seq * tp_rank_config(config, tp).vocab * d,
    }


class _Tokens(NamedTuple):
    """Token counts of one micro-batch on one rank; sequence parallelism makes some of them smaller."""
    batch: int
    seq: int
    residual: int                  # tokens that the norms read
    read: int                      # tokens in the saved inputs of q, k, v, of the MLP and of the head

    @property
    def all(self):
        return self.batch * self.seq


def _tokens(batch, seq, tp, sp):
    whole = batch * padded_seq_len(seq, tp, sp)
    mine = whole if sp == "none" else whole // tp
    return _Tokens(batch, seq, residual=mine, read=mine if sp == "gather" else whole)


def _check(attention, recompute):
    if recompute not in RECOMPUTED_FLOP_TERMS:
        raise ValueError(f"recompute {recompute!r} is not one of {', '.join(RECOMPUTED_FLOP_TERMS)}")
    if attention not in ("naive", "sdpa"):
        raise ValueError(f"attention {attention!r} is not one of naive, sdpa")
    if recompute == "selective" and attention != "naive":
        raise ValueError(f"selective recompute saves the scores of naive attention, and {attention} keeps "
                         f"none; try attention naive, or recompute full")


def _layer(config, tokens, d, attention):
    """Bytes that a layer saves without recompute; `config` has this rank's heads and hidden units."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        **_norms(config, 2, tokens.residual, d),
        "qkv_input": tokens.read * config.width * d,
        **_head_norms(config, tokens.all, d),
        "qkv": tokens.all * (queries + 2 * keys) * d,             # after RoPE, as the core reads them
        **_core(config, tokens.batch, tokens.seq, d, attention),
        "o_input": tokens.all * queries * d,
        "mlp_input": tokens.read * config.width * d,
        "mlp_hidden": tokens.all * _mlp_tensors(config) * config.hidden * d,
    }


def _mlp_tensors(config):
    """Saved tensors (B, T, F): gelu(up) and up, or relu(up) alone; a gated MLP saves two more."""
    return (1 if config.mlp_activation == "relu" else 2) + (2 if config.architecture.gated_mlp else 0)


def _norms(config, n, tokens, d):
    """n norms over C. LayerNorm saves input, mean and 1/std; RMSNorm its float32 input, 1/rms, input/rms."""
    C = config.width
    if config.architecture.norm_type == "layer":
        return {"norm_input": n * tokens * C * d, "norm_stats": n * tokens * 2 * d}
    return {"norm_input": n * tokens * C * _wide(d), "norm_stats": n * tokens * _wide(d),
            "norm_scaled": n * tokens * C * d}


def _head_norms(config, tokens, d):
    """RMSNorm over each head of q and k saves the same three tensors."""
    if not config.architecture.qk_norm:
        return {}
    heads, K = config.heads + config.kv_heads, config.head_dim
    return {"qk_norm_input": tokens * heads * K * _wide(d), "qk_norm_stats": tokens * heads * _wide(d),
            "qk_norm_scaled": tokens * heads * K * d}


def _core(config, batch, seq, d, attention):
    """Bytes that the attention core saves besides q, k and v.

    naive: the mask, one byte a pair; the softmax in float32 at least; its 16-bit copy, which the product with
    v reads. ALiBi adds to the scores and saves nothing.
    sdpa: a log-sum-exp for each query, and the output. Without RoPE the output has o's layout (B, T, H, K)
    already and is the same tensor as o's input. A mask of numbers is made again in backward.
    """
    squares = batch * config.heads * seq * seq
    position = config.architecture.position_encoding
    if attention == "naive":
        return {"mask": seq * seq if seq > 1 else 0, "softmax": squares * _wide(d),
                "weights": squares * d if d < 4 else 0}
    copied = position == "rope" and config.heads > 1 and seq > 1
    rows = batch * config.heads * seq
    return {"core_output": rows * config.head_dim * d if copied else 0, "logsumexp": rows * _wide(d)}


def _wide(d):
    """Bytes of the dtype in which sums are taken: float32, or float64 in a float64 model."""
    return max(4, d)
