"""The model configuration: sizes, model family and RoPE scaling of a decoder, and the named model sizes.

`ModelConfig` is all that formulas, model, checkpoints and planner know of a model. Families: GPT-2 (Radford
et al. 2019), LLaMA (Touvron et al. 2023; also SmolLM2), Qwen2 (2024: LLaMA with biases of q, k, v), Qwen3
(2025: LLaMA with RMSNorm on q and k), Mistral (Jiang et al. 2023: LLaMA with a sliding window), Phi-3 (Abdin
et al. 2024: the same), OPT (Zhang et al. 2022: GPT-2 with ReLU), BLOOM (2022: GPT-2 with ALiBi and a norm
after the embedding).
"""
from dataclasses import asdict, dataclass, replace

ACTIVATION_NAMES = ("silu", "gelu", "gelu_tanh", "relu")     # gelu is exact (erf), gelu_tanh GPT-2's formula
ATTENTION_LINEARS = ("q", "k", "v", "o")
MLP_LINEARS = ("gate", "up", "down")


@dataclass(frozen=True)
class Architecture:
    """The building blocks of a model family. To add a family is to add a row to `MODEL_FAMILIES`."""
    norm_type: str             # "layer" (weight and bias) or "rms" (weight)
    gated_mlp: bool            # the MLP has a gate: down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    mlp_activation: str        # one of ACTIVATION_NAMES, unless the configuration names another
    position_encoding: str     # "learned", "rope" or "alibi"
    biased_linears: tuple[str, ...] = ()   # linears of a block with a bias, unless the configuration says so
    qk_norm: bool = False      # RMSNorm over each head of q and of k, before RoPE
    embed_norm: bool = False   # a norm after the embedding


_LLAMA = Architecture(norm_type="rms", gated_mlp=True, mlp_activation="silu", position_encoding="rope")
_GPT2 = Architecture(norm_type="layer", gated_mlp=False, mlp_activation="gelu_tanh",
                     position_encoding="learned", biased_linears=ATTENTION_LINEARS + MLP_LINEARS)
MODEL_FAMILIES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": replace(_LLAMA, biased_linears=("q", "k", "v")),
    "qwen3": replace(_LLAMA, qk_norm=True),
    "opt": replace(_GPT2, mlp_activation="relu"),
    "bloom": replace(_GPT2, position_encoding="alibi", embed_norm=True),
}


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling: how RoPE's frequencies change for a longer context than the model was first trained with.

    The formulas, and the fields that each kind reads, are in model/rope.py.
    """
    kind: str                              # "linear", "dynamic", "yarn", "llama3" or "factors"
    factor: float = 1.0
    original_context: int = 0              # the length the model was first trained with; all but linear
    low_freq_factor: float = 1.0           # llama3
    high_freq_factor: float = 4.0          # llama3
    beta_fast: float = 32.0                # yarn
    beta_slow: float = 1.0                 # yarn
    attention_factor: float = 1.0          # yarn: cos and sin are multiplied by it
    truncate: bool = True                  # yarn: the ramp begins and ends at whole pairs
    factors: tuple[float, ...] = ()        # factors: what each pair's frequency is divided by, (K/2,)


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of one decoder; the letters are those of shape comments. It is hashable.

    Raises ValueError for an unknown family or activation, a window below 1, or heads that kv_heads does not
    divide.
    """
    vocab: int                 # V
    width: int                 # C
    layers: int                # L
    heads: int                 # H, query heads
    kv_heads: int              # KV heads; divides H
    head_dim: int              # K; H*K may differ from C (Qwen3)
    hidden: int                # F, inside the MLP
    context: int               # T, the longest sequence (context length)
    tied: bool = True          # the head shares its weight with the embedding
    family: str = "llama"      # a key of MODEL_FAMILIES
    eps: float = 1e-5          # inside the norms
    theta: float = 10000.0     # RoPE base
    rope_scaling: RopeScaling | None = None
    window: int | None = None  # sliding window: tokens that a query sees, itself included; None: no window
    full_layers: int = 0       # so many of the first layers have no window
    activation: str | None = None          # of the MLP; None: the family's
    attention_bias: bool | None = None     # q, k, v and o have biases; None: as the family
    mlp_bias: bool | None = None           # the linears of the MLP have biases; None: as the family

    def __post_init__(self):
        if self.family not in MODEL_FAMILIES:
            raise ValueError(f"family {self.family!r} is not one of {', '.join(MODEL_FAMILIES)}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            fits = max(d for d in range(1, self.heads + 1)
                       if self.heads % d == 0 and d <= max(1, self.kv_heads))
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly; "
                             f"try kv_heads={fits}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} tokens shows a query nothing; try window=1 or None")
        if self.mlp_activation not in ACTIVATION_NAMES:
            raise ValueError(f"activation {self.mlp_activation!r} is not one of "
                             f"{', '.join(ACTIVATION_NAMES)}")
        if isinstance(self.rope_scaling, dict):                          # from JSON
            scaling = self.rope_scaling | {"factors": tuple(self.rope_scaling["factors"])}
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))

    @property
    def architecture(self) -> Architecture:
        """The building blocks of this decoder's family."""
        return MODEL_FAMILIES[self.family]

    @property
    def mlp_activation(self) -> str:
        """The name of the MLP's activation: the configuration's, or the family's."""
        return self.activation or self.architecture.mlp_activation

    @property
    def max_cacheable_seq_len(self) -> int:
        """The longest sequence that a KV cache can hold.

        Dynamic RoPE scaling changes the angles of all keys past the original context, so cached keys would be
        wrong there.
        """
        scaling = self.rope_scaling
        return scaling.original_context if scaling and scaling.kind == "dynamic" else self.context

    def has_bias(self, linear_name: str) -> bool:
        """Whether this linear of a block ("q", "k", "v", "o", "gate", "up" or "down") has a bias."""
        said = self.attention_bias if linear_name in ATTENTION_LINEARS else self.mlp_bias
        return linear_name in self.architecture.biased_linears if said is None else said

    def sliding_window_of_layer(self, layer: int) -> int | None:
        """The sliding window of this layer: tokens that a query sees, itself included; None: no window."""
        return None if layer < self.full_layers else self.window

    def to_dict(self) -> dict:
        """The fields by name, as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ModelSize:
    """A named model size: its configuration, and a learning rate for AdamW that suits it."""
    config: ModelConfig
    lr: float


def _size(family, vocab, width, layers, heads, kv_heads, hidden, context, tied, lr):
    K = width // heads
    return ModelSize(ModelConfig(vocab, width, layers, heads, kv_heads, K, hidden, context, tied, family), lr)


MODEL_SIZES = {              # V      C    L   H  KV     F     T  tied    lr
    "test": _size("llama",   257,   32,   4,  4,  2,   88,   64, True, 3e-3),
    "nano": _size("llama",  4096,  128,   4,  4,  2,  344,  256, True, 3e-3),
    "micro": _size("llama", 4096,  256,  12,  8,  4,  688,  512, True, 1.5e-3),
    "small": _size("gpt2", 50257,  768,  12, 12, 12, 3072, 1024, True, 6e-4),
    "medium": _size("gpt2", 50257, 1024, 24, 16, 16, 4096, 1024, True, 3e-4),
    "large": _size("gpt2", 50257, 1280,  36, 20, 20, 5120, 1024, True, 2.5e-4),
    "xl": _size("gpt2",    50257, 1600,  48, 25, 25, 6400, 1024, True, 2e-4),
}


def config_for_size(size: str, vocab: int | None = None, context: int | None = None,
                    tied: bool | None = None) -> ModelConfig:
    """The ModelConfig of a named size, with another vocabulary, context or tying where given.

    Raises ValueError for a name that `MODEL_SIZES` does not have.
    """
    if size not in MODEL_SIZES:
        raise ValueError(f"no size named {size!r}; there are {', '.join(MODEL_SIZES)}")
    given = {"vocab": vocab, "context": context, "tied": tied}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(MODEL_SIZES[size].config, **given)
