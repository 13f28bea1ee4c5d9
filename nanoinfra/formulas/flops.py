"""FLOPs of a decoder and MFU. Only matrix products count, 2 FLOPs for each multiply-add.

Norms, softmax, activations, ALiBi and embedding look-ups count 0. Training on one token costs
6 (parameters in matrix products) + 12 L H K T: one forward, and twice as much in backward.
GPT-2, a step: 72 B L T C^2 (1 + T/(6 C) + V/(12 L C)), Korthikanti et al. 2022, equation 7.
MFU is defined here and nowhere else, after Chowdhery et al. 2022 (PaLM), appendix B.
B sequences of T tokens, V vocabulary, C width, L layers, H query heads, KV key heads, K head_dim, F hidden.
"""
from nanoinfra.config import ModelConfig

_LAYER_TERMS = ("qkvo", "scores", "values", "mlp")
RECOMPUTED_FLOP_TERMS = {"none": (), "selective": ("scores", "values"), "full": _LAYER_TERMS}
"""The terms of forward that backward computes again, for each mode of activation recomputation."""


def forward_flops_per_token(config: ModelConfig, seq: int, causal: bool = False) -> dict[str, int]:
    """FLOPs of the forward of one token in a sequence of `seq` tokens, over all layers, by term.

    "scores" is q k^T, "values" is softmax(scores) v. By convention a query meets all `seq` keys (PaLM,
    Megatron); with `causal` it meets half of them (FlashAttention; the mask leaves (seq + 1)/2 on average).
    The head counts; the embedding, a look-up, does not.
    """
    C, L, K = config.width, config.layers, config.head_dim
    queries, keys = config.heads * K, config.kv_heads * K
    square = L * queries * seq if causal else 2 * L * queries * seq
    return {
        "qkvo": 2 * L * C * (2 * queries + 2 * keys),
        "scores": square,
        "values": square,
        "mlp": 2 * L * C * config.hidden * (3 if config.architecture.gated_mlp else 2),
        "head": 2 * C * config.vocab,
    }


def forward_backward_flops(config: ModelConfig, batch: int, seq: int, causal: bool = False,
                           recompute: str = "none") -> int:
    """FLOPs of forward and backward over `batch` sequences of `seq` tokens.

    recompute "none" gives the model FLOPs, 3 x forward: each product has two in backward, one for each
    factor. The other modes give hardware FLOPs. "selective" computes scores and values again:
    72 B L T C^2 (1 + 2T/9C + V/12LC) for GPT-2; Korthikanti et al. 2022, equation 8, print T/3C and so add
    them three times. "full" computes all layers again, but not the head: 96 B L T C^2 (1 + T/6C + V/16LC),
    Narayanan et al. 2021, equation 3. Every weight is assumed to be trained. By convention the backward of a
    fused attention kernel, which computes its scores again (2 L H K T^2 a sequence), does not count them.
    """
    if recompute not in RECOMPUTED_FLOP_TERMS:
        raise ValueError(f"recompute {recompute!r} is not one of {', '.join(RECOMPUTED_FLOP_TERMS)}")
    forward = forward_flops_per_token(config, seq, causal)
    recomputed = sum(forward[term] for term in RECOMPUTED_FLOP_TERMS[recompute])
    return batch * seq * (3 * sum(forward.values()) + recomputed)


def model_flops_utilization(tokens_per_s: float, config: ModelConfig, seq: int, peak_flops: float) -> float:
    """MFU, model FLOPs utilization: model FLOPs/s as a share of `peak_flops` (FLOP/s of all devices).

    Model FLOPs are `forward_backward_flops` with its defaults: no recompute, attention not halved, the head
    included. So recompute lowers MFU, and a kernel that skips the masked half of attention raises it.
    """
    return tokens_per_s * forward_backward_flops(config, 1, seq) / seq / peak_flops
