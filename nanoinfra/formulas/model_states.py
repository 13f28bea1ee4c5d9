"""Bytes of the model states of training (weights, gradients, optimizer states) and of the KV cache.

Model states take 16 Psi bytes with AdamW, in float32 as in mixed precision; Rajbhandari et al. 2020 (ZeRO),
section 3.1. The KV cache takes 2 L KV K numbers a token; Kwon et al. 2023 (vLLM), section 3.
Psi parameters, L layers, KV key/value heads, K head_dim. Activations are in formulas/saved_activations.py.
"""
from nanoinfra.config import ModelConfig

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_STATE_NAMES = {"sgd": (), "adamw": ("exp_avg", "exp_avg_sq")}


def model_state_bytes(num_parameters: int, precision: str = "float32", optimizer: str = "adamw",
                      grad_bytes: int | None = None) -> dict[str, int]:
    """Bytes of the model states of `num_parameters` parameters, by kind.

    In mixed precision (16-bit weights) the master weights and the optimizer states are float32; `grad_bytes`
    is 2 (ZeRO's 16 Psi), or 4 where gradients accumulate in float32 (18 Psi, as BLOOM planned). In float32
    and float64 everything has the bytes of `precision`. AdamW's step counter, one number a tensor, is left
    out. Raises ValueError for an unknown precision or optimizer.
    """
    if precision not in DTYPE_BYTES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(DTYPE_BYTES)}")
    if optimizer not in OPTIMIZER_STATE_NAMES:
        raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZER_STATE_NAMES)}")
    own = DTYPE_BYTES[precision]
    grad = own if grad_bytes is None else grad_bytes
    held = {"weights": own * num_parameters, "gradients": grad * num_parameters}
    if own < 4:
        held["master"] = 4 * num_parameters
    return held | {kind: max(4, own) * num_parameters for kind in OPTIMIZER_STATE_NAMES[optimizer]}


def kv_cache_bytes_per_token(config: ModelConfig, dtype_bytes: int, tp: int = 1) -> int:
    """Bytes that the KV cache of one token takes in all layers: 2 L KV K numbers (Kwon et al. 2023).

    Each of `tp` ranks holds KV/tp of the KV heads, or a replica of one head where there are fewer than ranks.
    """
    return 2 * config.layers * max(1, config.kv_heads // tp) * config.head_dim * dtype_bytes
