"""The shape of a decoder: the twelve numbers from which parameters, FLOPs and bytes follow.

`ModelConfig` is all that formulas, model, checkpoints and planner know of a model; `SIZES` is the one dial
of the command line. A family says which parts a decoder is made of: GPT-2 (Radford et al. 2019), LLaMA
(Touvron et al. 2023; SmolLM2 is one), Qwen3 (2025: LLaMA with normed queries and keys), OPT (Zhang et al.
2022: GPT-2 with ReLU), BLOOM (2022: GPT-2 with ALiBi and normed embeddings).
"""
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Family:
    """The parts a decoder is made of. Adding a family is adding a row to `FAMILIES`."""
    norm: str                  # "layer" (weight and bias) or "rms" (weight)
    mlp: str                   # "gelu", "relu" (up, down) or "swiglu" (gate, up, down)
    position: str              # "learned", "rope" or "alibi"
    bias: bool                 # do the linear layers of a block have biases
    qk_norm: bool = False      # RMS norm over each head of q and of k, before RoPE
    embed_norm: bool = False   # a norm after the embedding


FAMILIES = {
    "gpt2": Family(norm="layer", mlp="gelu", position="learned", bias=True),
    "llama": Family(norm="rms", mlp="swiglu", position="rope", bias=False),
    "qwen3": Family(norm="rms", mlp="swiglu", position="rope", bias=False, qk_norm=True),
    "opt": Family(norm="layer", mlp="relu", position="learned", bias=True),
    "bloom": Family(norm="layer", mlp="gelu", position="alibi", bias=True, embed_norm=True),
}


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

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is not one of {', '.join(FAMILIES)}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            fits = max(d for d in range(1, self.heads + 1)
                       if self.heads % d == 0 and d <= max(1, self.kv_heads))
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly; "
                             f"try kv_heads={fits}")

    @property
    def parts(self) -> Family:
        """The parts this decoder is made of."""
        return FAMILIES[self.family]

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
