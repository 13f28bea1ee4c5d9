"""The shape of a decoder: the numbers from which parameters, FLOPs and bytes follow.

`ModelConfig` is all that formulas, model, checkpoints and planner know of a model; `SIZES` is the one dial
of the command line. A family says which parts a decoder is made of: GPT-2 (Radford et al. 2019), LLaMA
(Touvron et al. 2023; SmolLM2 is one), Qwen2 (2024: LLaMA with biases of q, k, v), Qwen3 (2025: LLaMA with
normed queries and keys), Mistral (Jiang et al. 2023: LLaMA with a sliding window), Phi-3 (Abdin et al. 2024:
the same), OPT (Zhang et al. 2022: GPT-2 with ReLU), BLOOM (2022: GPT-2 with ALiBi and normed embeddings).
"""
from dataclasses import asdict, dataclass, replace

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")          # gelu is exact (erf), gelu_tanh GPT-2's formula
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


@dataclass(frozen=True)
class Family:
    """The parts a decoder is made of. Adding a family is adding a row to `FAMILIES`."""
    norm: str                  # "layer" (weight and bias) or "rms" (weight)
    gated: bool                # has the MLP a gate: down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    activation: str            # one of ACTIVATIONS, unless the configuration names another
    position: str              # "learned", "rope" or "alibi"
    biases: tuple[str, ...] = ()   # linear layers of a block that have one, unless the configuration says
    qk_norm: bool = False      # RMS norm over each head of q and of k, before RoPE
    embed_norm: bool = False   # a norm after the embedding


LLAMA = Family(norm="rms", gated=True, activation="silu", position="rope")
GPT2 = Family(norm="layer", gated=False, activation="gelu_tanh", position="learned", biases=ATTENTION + MLP)
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "phi3": LLAMA,
    "qwen2": replace(LLAMA, biases=("q", "k", "v")),
    "qwen3": replace(LLAMA, qk_norm=True),
    "opt": replace(GPT2, activation="relu"),
    "bloom": replace(GPT2, position="alibi", embed_norm=True),
}


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched for longer sequences than a model was first trained with.

    The formulas, and which of the numbers each kind reads, are in model/rope.py.
    """
    kind: str                              # "linear", "dynamic", "yarn", "llama3" or "factors"
    factor: float = 1.0
    original_context: int = 0              # the length the model was first trained with; all but linear
    low_freq_factor: float = 1.0           # llama3
    high_freq_factor: float = 4.0          # llama3
    beta_fast: float = 32.0                # yarn
    beta_slow: float = 1.0                 # yarn
    attention_factor: float = 1.0          # yarn: cos and sin are multiplied by it
    truncate: bool = True                  # yarn: whole pairs as borders
    factors: tuple[float, ...] = ()        # factors: what each pair's frequency is divided by, (K/2,)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one decoder; letters as in shape comments. Hashable, and JSON through `to_dict`."""
    vocab: int                 # V
    width: int                 # C
    layers: int                # L
    heads: int                 # H, query heads
    kv_heads: int              # KV heads; divides H
    head_dim: int              # K; H*K may differ from C (Qwen3)
    hidden: int                # F, inside the MLP
    context: int               # longest sequence it is made for
    tied: bool = True          # the head is the embedding
    family: str = "llama"      # a key of FAMILIES
    eps: float = 1e-5          # inside the norms
    theta: float = 10000.0     # RoPE base
    rope_scaling: RopeScaling | None = None
    window: int | None = None  # tokens that a query sees, itself included; None: all before it
    full_layers: int = 0       # the first layers, which have no window
    activation: str | None = None          # of the MLP; None: the family's
    attention_bias: bool | None = None     # have q, k, v and o biases; None: as the family
    mlp_bias: bool | None = None           # have the MLP's linear layers biases; None: as the family

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is not one of {', '.join(FAMILIES)}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            fits = max(d for d in range(1, self.heads + 1)
                       if self.heads % d == 0 and d <= max(1, self.kv_heads))
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly; "
                             f"try kv_heads={fits}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} tokens shows a query nothing; try window=1 or None")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"activation {self.act!r} is not one of {', '.join(ACTIVATIONS)}")
        if isinstance(self.rope_scaling, dict):                          # from JSON
            scaling = self.rope_scaling | {"factors": tuple(self.rope_scaling["factors"])}
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))

    @property
    def parts(self) -> Family:
        """The parts this decoder is made of."""
        return FAMILIES[self.family]

    @property
    def act(self) -> str:
        """The MLP's activation."""
        return self.activation or self.parts.activation

    @property
    def cached_context(self) -> int:
        """The longest sequence whose keys may be kept: past it dynamic scaling turns all of them anew."""
        scaling = self.rope_scaling
        return scaling.original_context if scaling and scaling.kind == "dynamic" else self.context

    def has_bias(self, linear: str) -> bool:
        """Has this linear layer of a block ("q", "k", "v", "o", "gate", "up", "down") a bias?"""
        said = self.attention_bias if linear in ATTENTION else self.mlp_bias
        return linear in self.parts.biases if said is None else said

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None: all before it."""
        return None if layer < self.full_layers else self.window

    def to_dict(self) -> dict:
        """The fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Size:
    """One notch of the dial: a model, and the learning rate that suits AdamW there."""
    model: ModelConfig
    lr: float


def _size(family, vocab, width, layers, heads, kv_heads, hidden, context, tied, lr):
    K = width // heads
    return Size(ModelConfig(vocab, width, layers, heads, kv_heads, K, hidden, context, tied, family), lr)


SIZES = {                    # V      C    L   H  KV     F     T  tied    lr
    "test": _size("llama",   257,   32,   4,  4,  2,   88,   64, True, 3e-3),
    "nano": _size("llama",  4096,  128,   4,  4,  2,  344,  256, True, 3e-3),
    "micro": _size("llama", 4096,  256,  12,  8,  4,  688,  512, True, 1.5e-3),
    "small": _size("gpt2", 50257,  768,  12, 12, 12, 3072, 1024, True, 6e-4),
    "medium": _size("gpt2", 50257, 1024, 24, 16, 16, 4096, 1024, True, 3e-4),
    "large": _size("gpt2", 50257, 1280,  36, 20, 20, 5120, 1024, True, 2.5e-4),
    "xl": _size("gpt2",    50257, 1600,  48, 25, 25, 6400, 1024, True, 2e-4),
}


def sized(name: str, vocab: int | None = None, context: int | None = None,
          tied: bool | None = None) -> ModelConfig:
    """The model of size `name`, with another vocabulary, context or head where given."""
    if name not in SIZES:
        raise ValueError(f"no size named {name!r}; there are {', '.join(SIZES)}")
    given = {"vocab": vocab, "context": context, "tied": tied}
    return replace(SIZES[name].model, **{k: v for k, v in given.items() if v is not None})
