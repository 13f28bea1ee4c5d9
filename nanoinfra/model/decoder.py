"""The decoder: token embedding, L blocks of attention and MLP with residual connections, final norm, head.

It is GPT-2, LLaMA, Mistral, Phi-3, Qwen2, Qwen3, OPT or BLOOM by configuration alone (config.py has their
papers). GPT-2's block has 12 C^2 parameters in its matrices. This file knows no ranks, no pages and no
training loop: parallelism replaces linears and attention cores from outside, a KV cache is an argument.
B sequences, T tokens, C width, V vocabulary, K head_dim.
"""
import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.model.attention import NO_CONTEXT, Attention, ForwardContext
from nanoinfra.model.layers import MLP, make_norm
from nanoinfra.model.rope import rope_cos_sin


class DecoderBlock(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, attention: str = "sdpa"):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config, layer, attention)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), context)                         # (B, T, C)
        return x + self.mlp(self.norm2(x))                                # (B, T, C)


class Decoder(nn.Module):
    """A decoder-only transformer, with torch's default weights until `init_weights` or a loader fills it."""

    def __init__(self, config: ModelConfig, attention: str = "sdpa"):
        super().__init__()
        if config.architecture.position_encoding == "rope" and config.head_dim % 2:
            raise ValueError(f"head_dim {config.head_dim} is odd, but RoPE turns pairs; "
                             f"try {config.head_dim + 1}")
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        if config.architecture.position_encoding == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        self.embed_norm = make_norm(config) if config.architecture.embed_norm else None
        self.blocks = nn.ModuleList(DecoderBlock(config, layer, attention) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, positions=None, cache=None,
                document_ends: tuple[int, ...] | None = None) -> torch.Tensor:
        """Logits (B, T, V) for `tokens` (B, T); the arguments are those of `hidden_states`."""
        return self.head(self.hidden_states(tokens, positions, cache, document_ends))    # (B, T, V)

    def hidden_states(self, tokens: torch.Tensor, positions=None, cache=None,
                      document_ends: tuple[int, ...] | None = None) -> torch.Tensor:
        """The last hidden states, after the final norm: (B, T, C) for `tokens` (B, T).

        `positions` (T,) or (B, T) are the tokens' positions in their sequences, by default 0..T-1. A KV
        `cache` holds the earlier tokens and computes attention for every layer; without it attention is
        causal over `tokens`. ALiBi does not use positions: it counts the keys between. `document_ends` are
        the ends of the documents packed into a row, in tokens, the last one T: attention does not cross
        them. The documents' positions are the caller's: by default they are those in the row.
        """
        positions = self.default_positions(tokens) if positions is None else positions
        x = self.embed_tokens(tokens, positions)                          # (B, T, C)
        return self.blocks_and_norm(x, positions, cache, document_ends)

    def embed_tokens(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The input of the first block (B, T, C): token embeddings, with learned positions and norm."""
        x = self.embed(tokens)                                            # (B, T, C)
        if self.config.architecture.position_encoding == "learned":
            x = x + self.positions(positions)                             # (B, T, C)
        return x if self.embed_norm is None else self.embed_norm(x)

    def blocks_and_norm(self, x: torch.Tensor, positions: torch.Tensor, cache=None,
                        document_ends: tuple[int, ...] | None = None) -> torch.Tensor:
        """Apply all blocks and the final norm to `x` (B, T, C) at `positions`: (B, T, C).

        Raises ValueError for `document_ends` that do not end with the row, or beside a cache.
        """
        _check_document_ends(document_ends, positions.shape[-1], cache)
        context = ForwardContext(self.rope_cos_sin(positions, x.dtype), document_ends, cache)
        for block in self.blocks:
            x = block(x, context)                                         # (B, T, C)
        return self.norm(x)

    def rope_cos_sin(self, positions: torch.Tensor,
                     dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """RoPE's cos and sin at `positions`, for all blocks; None where the family has no RoPE."""
        has_rope = self.config.architecture.position_encoding == "rope"
        return rope_cos_sin(positions, self.config, dtype) if has_rope else None

    def default_positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """The positions 0..T-1 of `tokens` (B, T). Raises ValueError past the model's context."""
        T = tokens.shape[-1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.config.context}; "
                             f"give at most {self.config.context}")
        return torch.arange(T, device=tokens.device)


def _check_document_ends(ends, T, cache):
    if ends is None:
        return
    if cache is not None:
        raise ValueError("a KV cache holds sequences that are apart already; give document_ends or a cache")
    if not ends or ends[-1] != T or any(a >= b for a, b in zip((0, *ends), ends)):
        raise ValueError(f"document_ends {ends} do not cut a row of {T} tokens into documents; give growing "
                         f"ends, the last one {T}")
