"""The decoder: embed the tokens, L blocks of attention and MLP around a residual stream, norm, head.

GPT-2, LLaMA, Mistral, Phi-3, Qwen2, Qwen3, OPT and BLOOM by configuration alone (config.py says who
they are). GPT-2's block has 12 C^2 parameters in its matrices. Nothing here knows of ranks, of pages or of a
training loop: parallelism replaces linears and attention cores from outside, a KV cache is an argument.
B sequences, T tokens, C width, V vocabulary, K head_dim.
"""
import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.model.attention import Attention
from nanoinfra.model.layers import MLP, make_norm
from nanoinfra.model.rope import rope_angles


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, attention: str = "sdpa"):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config, layer, attention)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rope=None, cache=None) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), rope, cache)                     # (B, T, C)
        return x + self.mlp(self.norm2(x))                                # (B, T, C)


class Decoder(nn.Module):
    """A decoder-only transformer. Holds torch's default weights until `init_weights` or a loader fills it."""

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        if config.parts.position == "rope" and config.head_dim % 2:
            raise ValueError(f"head_dim {config.head_dim} is odd, but RoPE turns pairs; "
                             f"try {config.head_dim + 1}")
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        if config.parts.position == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        self.embed_norm = make_norm(config) if config.parts.embed_norm else None
        self.blocks = nn.ModuleList(Block(config, layer, attention) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, positions=None, cache=None) -> torch.Tensor:
        """Logits (B, T, V) for `tokens` (B, T); arguments as in `hidden`."""
        return self.head(self.hidden(tokens, positions, cache))           # (B, T, V)

    def hidden(self, tokens: torch.Tensor, positions=None, cache=None) -> torch.Tensor:
        """What the head reads, after the final norm: (B, T, C) for `tokens` (B, T).

        `positions` (T,) or (B, T) are the tokens' places in their sequences, 0..T-1 where not given. `cache`,
        where given, holds the earlier tokens and attends for every layer; without it attention is plainly
        causal. ALiBi knows no positions: it counts the keys between.
        """
        positions = self.places(tokens) if positions is None else positions
        return self.layers(self.start(tokens, positions), positions, cache)

    def start(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The first block's input: (B, T, C)."""
        x = self.embed(tokens)                                            # (B, T, C)
        if self.config.parts.position == "learned":
            x = x + self.positions(positions)                             # (B, T, C)
        return x if self.embed_norm is None else self.embed_norm(x)

    def layers(self, x: torch.Tensor, positions: torch.Tensor, cache=None) -> torch.Tensor:
        """What the blocks and the final norm make of `x` (B, T, C), at `positions`: (B, T, C)."""
        rope = self.angles(positions, x.dtype)
        for block in self.blocks:
            x = block(x, rope, cache)                                     # (B, T, C)
        return self.norm(x)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype):
        """RoPE's angles at `positions`, for all blocks; None where the family has no RoPE."""
        return rope_angles(positions, self.config, dtype) if self.config.parts.position == "rope" else None

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """0..T-1 for `tokens` (B, T). Raises ValueError past the model's context."""
        T = tokens.shape[-1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.config.context}; "
                             f"give at most {self.config.context}")
        return torch.arange(T, device=tokens.device)
