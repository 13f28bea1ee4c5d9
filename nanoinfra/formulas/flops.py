"""FLOPs of a decoder: 2 a multiply-add, matrix products only (norms, softmax, ReLU, ALiBi, look-ups count 0).

A trained token costs 6 (parameters in matrix products) + 12 L H K T: its forward, and twice that backward.
GPT-2, a step: 72 B L T C^2 (1 + T/(6 C) + V/(12 L C)), Korthikanti et al. 2022, equation 7.
MFU is defined here and nowhere else, after Chowdhery et al. 2022 (PaLM), appendix B.
B sequences of T tokens, V vocabulary, C width, L layers, H query heads, KV key heads, K head_dim, F hidden.
"""
from nanoinfra.config import ModelConfig

LAYER = ("qkvo", "scores", "values", "mlp")
RECOMPUTED = {"none": (), "selective": ("scores", "values"), "full": LAYER}     # terms that run forward twice


def forward_flops(config: ModelConfig, seq: int, causal: bool = False) -> dict[str, int]:
    """FLOPs of one token's forward in a sequence of `seq`, all layers, by term.

    scores is q k^T, values is softmax(scores) v. By convention a query meets all `seq` keys (PaLM, Megatron);
    with `causal` it meets half of them (FlashAttention), where the mask itself leaves (seq + 1)/2 on average.
    The head counts; the embedding, a look-up, does not.
    """
    C, L, K = config.width, config.layers, config.head_dim
    queries, keys = config.heads * K, config.kv_heads * K
    square = L * queries * seq if causal else 2 * L * queries * seq
    return {
        "qkvo": 2 * L * C * (2 * queries + 2 * keys),
        "scores": square,
        "values": square,
        "mlp": 2 * L * C * config.hidden * (3 if config.parts.gated else 2),
        "head": 2 * C * config.vocab,
    }


def train_flops(config: ModelConfig, batch: int, seq: int, causal: bool = False,
                recompute: str = "none") -> int:
    """FLOPs of forward and backward over `batch` sequences of `seq` tokens.

    "none" gives the model FLOPs, 3 x forward: each product has two in backward, one for either factor. The
    others give hardware FLOPs. "selective" runs scores and values again: 72 B L T C^2 (1 + 2T/9C + V/12LC)
    for GPT-2, where Korthikanti et al. 2022, equation 8, print T/3C and so add them three times. "full" runs
    all layers again, but not the head: 96 B L T C^2 (1 + T/6C + V/16LC), Narayanan et al. 2021, equation 3.
    Assumed: every weight is trained. Not counted, by convention: the backward of a fused attention computes
    its scores again, 2 L H K T^2 a sequence.
    """
    if recompute not in RECOMPUTED:
        raise ValueError(f"recompute {recompute!r} is not one of {', '.join(RECOMPUTED)}")
    forward = forward_flops(config, seq, causal)
    return batch * seq * (3 * sum(forward.values()) + sum(forward[term] for term in RECOMPUTED[recompute]))


def mfu(tokens_per_s: float, config: ModelConfig, seq: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of `peak_flops` (FLOP/s of all devices) that model FLOPs make up.

    Counted is `train_flops` with its defaults: no recompute, attention not halved, the head in, the
    embedding's look-up out. So recompute lowers MFU, and a kernel that skips the masked half raises it.
    """
    return tokens_per_s * train_flops(config, 1, seq) / seq / peak_flops
