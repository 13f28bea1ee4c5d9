"""Bytes of the model states of training (weights, gradients, optimizer states) and of the KV cache.

Model states take 16 Psi bytes with AdamW, in float32 as in mixed precision; Rajbhandari et al. 2020 (ZeRO),
section 3.1. The KV cache takes 2 L KV K numbers a token; Kwon et al. 2023 (vLLM), section 3.
Psi parameters, L layers, KV key/value heads, K head_dim. Activations are in formulas/activations.py.
"""
from nanoinfra.config import ModelConfig

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_STATES = {"sgd": (), "adamw": ("exp_avg", "exp_avg_sq")}


def state_bytes(psi: int, precision: str = "float32", optimizer: str = "adamw",
                grad_bytes: int | None = None) -> dict[str, int]:
    """Bytes of the model states of `num_parameters` parameters, by kind.

    In mixed precision (16-bit weights) the master weights and the optimizer states are float32; `grad_bytes`
    is 2 (ZeRO's 16 Psi), or 4 where gradients accumulate in float32 (18 Psi, as BLOOM planned). In float32
    and float64 everything has the bytes of `precision`. AdamW's step counter, one number a tensor, is left
    out. Raises ValueError for an unknown precision or optimizer.
    """
    if precision not in BYTES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(BYTES)}")
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZER_STATES)}")
    own = BYTES[precision]
    held = {"weights": own * psi, "gradients": (own if grad_bytes is None else grad_bytes) * psi}
    if own < 4:
        held["master"] = 4 * psi
    return held | {kind: max(4, own) * psi for kind in OPTIMIZER_STATES[optimizer]}


def kv_cache_bytes_per_token(config: ModelConfig, dtype_bytes: int, tp: int = 1) -> int:
    """Bytes that the KV cache of one token takes in all layers: 2 L KV K numbers (Kwon et al. 2023).

    Each of `tp` ranks holds KV/tp of the KV heads, or a replica of one head where there are fewer than ranks.
    """
    return 2 * config.layers * max(1, config.kv_heads // tp) * config.head_dim * dtype_bytes
