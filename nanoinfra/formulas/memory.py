"""Bytes a training rank holds, tensor by tensor: model states, saved activations; and a server's KV cache.

States: 16 Psi with AdamW, in float32 as in mixed precision; Rajbhandari et al. 2020 (ZeRO), section 3.1.
Activations are what our decoder's backward reads, parameters apart. In 16 bits a layer of GPT-2 keeps 32 BTC
and attention's squares; Korthikanti et al. 2022, equation 2, has 34 BTC + 5 BHT^2, with dropout's masks.
B sequences, T tokens, V vocabulary, C width, L layers, H query heads, KV key heads, K head_dim, F hidden.
"""
from nanoinfra.formulas.flops import RECOMPUTED
from nanoinfra.formulas.shape import ModelConfig

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_STATES = {"sgd": (), "adamw": ("exp_avg", "exp_avg_sq")}
SQUARES = ("mask", "softmax", "weights")     # the terms that grow with T^2


def state_bytes(psi: int, precision: str = "float32", optimizer: str = "adamw",
                grad_bytes: int | None = None) -> dict[str, int]:
    """Bytes of the model states of `psi` parameters, by kind.

    In 16 bits, weights have a master copy and optimizer states in float32; `grad_bytes` is 2 (ZeRO's 16 Psi)
    or 4 where gradients add up in float32 (18 Psi, as BLOOM planned). In float32 and float64 everything has
    the precision's own bytes. AdamW's step counter, one number a tensor, is left out.
    """
    if precision not in BYTES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(BYTES)}")
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZER_STATES)}")
    own = BYTES[precision]
    held = {"weights": own * psi, "gradients": (own if grad_bytes is None else grad_bytes) * psi}
    if own < 4:
        held["master"] = 4 * psi
    return held | {kind: _wide(own) * psi for kind in OPTIMIZER_STATES[optimizer]}


def kv_cache_bytes_per_token(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of one cached token's keys and values, all layers: 2 L KV K numbers (Kwon et al. 2023)."""
    return 2 * config.layers * config.kv_heads * config.head_dim * dtype_bytes


def activation_bytes(config: ModelConfig, batch: int, seq: int, dtype_bytes: int,
                     attention: str = "sdpa", recompute: str = "none") -> int:
    """Bytes that forward leaves for backward, from tokens to loss, of `batch` sequences of `seq` tokens."""
    layer = activation_terms(config, batch, seq, dtype_bytes, attention, recompute)
    return config.layers * sum(layer.values()) + sum(end_terms(config, batch, seq, dtype_bytes).values())


def activation_terms(config: ModelConfig, batch: int, seq: int, dtype_bytes: int,
                     attention: str = "sdpa", recompute: str = "none") -> dict[str, int]:
    """Bytes that one layer's forward leaves for backward, by term.

    `dtype_bytes` (8, 4 or 2) is that of weights and activations alike; `attention` is the core, naive or
    sdpa, the latter with torch's fused CPU kernel. A tensor that several products read counts once.
    With "selective" recompute the naive core leaves no squares, with "full" a layer leaves its input alone:
    2 BTC in 16 bits, Korthikanti et al. 2022, table 2. (Random states, 5 KB a recomputed call, not counted.)
    """
    _check(attention, recompute)
    if recompute == "full":
        return {"block_input": batch * seq * config.width * dtype_bytes}
    terms = _layer(config, batch, seq, dtype_bytes, attention)
    return {term: n for term, n in terms.items() if recompute == "none" or term not in SQUARES}


def working_bytes(config: ModelConfig, batch: int, seq: int, dtype_bytes: int,
                  attention: str = "sdpa", recompute: str = "full") -> int:
    """Bytes that come on top of what is kept while backward runs one layer again, one layer at a time.

    "full" needs all that the layer would have kept, less the input where the norm reads it as it is kept
    (RMSNorm reads a wide copy in 16 bits). "selective" needs the squares; with grouped or unrotated heads
    torch's batched product copies q, k or v as well, which is not counted.
    """
    _check(attention, recompute)
    terms = _layer(config, batch, seq, dtype_bytes, attention)
    if recompute != "full":
        return sum(terms[term] for term in SQUARES) if recompute == "selective" else 0
    shared = config.parts.norm == "layer" or dtype_bytes >= 4
    return sum(terms.values()) - (batch * seq * config.width * dtype_bytes if shared else 0)


def end_terms(config: ModelConfig, batch: int, seq: int, dtype_bytes: int) -> dict[str, int]:
    """Bytes kept outside the layers, by term.

    tokens and learned positions are int64 indices; under RoPE, positions are cos and sin, once for
    all layers. The loss keeps the logits, written over by their gradient (`train/loss.py`).
    """
    d, tokens = dtype_bytes, batch * seq
    learned = config.parts.position == "learned"
    return {
        "tokens": 8 * tokens,
        "positions": 8 * seq if learned else seq * config.head_dim * _wide(d),
        **_norms(config, 1, tokens, d),
        "head_input": tokens * config.width * d,
        "logits": tokens * config.vocab * d,
    }


def _check(attention, recompute):
    if recompute not in RECOMPUTED:
        raise ValueError(f"recompute {recompute!r} is not one of {', '.join(RECOMPUTED)}")
    if attention not in ("naive", "sdpa"):
        raise ValueError(f"attention {attention!r} is not one of naive, sdpa")
    if recompute == "selective" and attention != "naive":
        raise ValueError(f"selective recompute saves the scores of naive attention, and {attention} keeps "
                         f"none; try attention naive, or recompute full")


def _layer(config, batch, seq, d, attention):
    """What a layer keeps that recomputes nothing."""
    tokens = batch * seq
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden = {"gelu": 2, "swiglu": 4}[config.parts.mlp]      # up, gelu(up); gate, silu(gate), up, product
    return {
        **_norms(config, 2, tokens, d),
        "qkv_input": tokens * config.width * d,
        **_head_norms(config, tokens, d),
        "qkv": tokens * (queries + 2 * keys) * d,                 # as the core reads them, after RoPE
        **_core(config, batch, seq, d, attention),
        "o_input": tokens * queries * d,
        "mlp_input": tokens * config.width * d,
        "mlp_hidden": tokens * hidden * config.hidden * d,
    }


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

    naive: the mask, a byte a pair; softmax, wide; its copy in 16 bits, which the product with v reads.
    sdpa: a log-sum-exp a query, and the output; without RoPE that lies as o reads it, (B, T, H, K), and is
    one tensor with o's input. Not covered: sdpa under RoPE at head_dim 2, where torch's kernel is unfused.
    """
    squares = batch * config.heads * seq * seq
    if attention == "naive":
        return {"mask": seq * seq if seq > 1 else 0, "softmax": squares * _wide(d),
                "weights": squares * d if d < 4 else 0}
    copied = config.parts.position == "rope" and config.heads > 1 and seq > 1
    rows = batch * config.heads * seq
    return {"core_output": rows * config.head_dim * d if copied else 0, "logsumexp": rows * _wide(d)}


def _wide(d):
    """Bytes of the dtype to sum in: float32, or float64 in a float64 model."""
    return max(4, d)
