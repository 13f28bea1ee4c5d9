"""Bytes of a training rank's model states, and of a server's KV cache. Activations: formulas/activations.py.

States: 16 Psi with AdamW, in float32 as in mixed precision; Rajbhandari et al. 2020 (ZeRO), section 3.1.
KV cache: 2 L KV K numbers a token; Kwon et al. 2023 (vLLM), section 3.
"""
from nanoinfra.config import ModelConfig

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_STATES = {"sgd": (), "adamw": ("exp_avg", "exp_avg_sq")}


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
    return held | {kind: max(4, own) * psi for kind in OPTIMIZER_STATES[optimizer]}


def kv_cache_bytes_per_token(config: ModelConfig, dtype_bytes: int, tp: int = 1) -> int:
    """Bytes of one cached token's keys and values, all layers: 2 L KV K numbers (Kwon et al. 2023).

    Each of `tp` ranks holds KV/tp of the heads, or a copy of one where there are fewer heads than ranks.
    """
    return 2 * config.layers * max(1, config.kv_heads // tp) * config.head_dim * dtype_bytes
