"""As few held-out bits per byte as a minute of training on a laptop's CPU can buy.

    python scripts/speedrun.py --seconds 60 --seed 0 --threads 2

The clock runs from the first optimizer step to the last; what comes before sees no data but the tokenizer's
training, whose time is printed. Ways to be quick: a small vocabulary, bf16 weights with float32 masters, Muon
(Jordan et al. 2024), a hashed table of bigrams, and a first block born as an induction head (Olsson et al.
2022), so that copying need not be discovered. B T C as ever, H heads of K, V vocabulary, L layers.
"""
import argparse
import json
import time

import torch
import torch.nn.functional as F

from nanoinfra.data.corpus import load_corpus
from nanoinfra.data.loader import HeldOut, Loader
from nanoinfra.data.source import IGNORE, pack
from nanoinfra.data.tokenizer import tokenizer_for
from nanoinfra.train.loss import cross_entropy

V, C, L, H, T, B = 1024, 128, 1, 2, 512, 4
K = C // H
BIGRAMS = 65536                              # rows of the hashed table
RATES = {"blocks": 0.02, "embed": 0.02, "head": 0.005, "bigrams": 0.1}
WARMUP, DECAY = 0.02, 0.6                    # shares of the run in which the rate rises, and falls to zero


class Model:
    """A pre-norm decoder. `weights` compute in bf16; the table of bigrams is read and written by row."""

    def __init__(self, vocab: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        blocks = torch.randn(L, 12, C, C, generator=draw) * C**-0.5      # q k v o, four of up, four of down
        blocks[:, 3], blocks[:, 8:] = 0, 0                               # a block starts as the identity, but
        blocks[0, 1], blocks[0, 3] = blocks[0, 0], blocks[0, 2].T        # the first matches and hands on what
        embed = torch.randn(vocab, C, generator=draw) / 2                # it matched: k = q, o v = identity
        self.masters = {"blocks": blocks, "embed": embed, "head": embed / 10}
        self.weights = {name: w.bfloat16().requires_grad_() for name, w in self.masters.items()}
        self.bigrams = torch.zeros(BIGRAMS, C)
        self.mask = torch.full((T, T), -torch.inf, dtype=torch.bfloat16).triu(1)
        still = torch.zeros(K // 4)                                      # half of the pairs do not turn
        angle = torch.arange(T)[:, None] * torch.cat([1024 ** -torch.linspace(0, 1, K // 4), still])
        self.cos = angle.cos().repeat(1, 2).bfloat16()[:, None]          # (T, 1, K)
        self.sin = torch.cat([angle.sin(), -angle.sin()], 1).bfloat16()[:, None]

    def hidden(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(B, T, C) after the final norm; `rows` (B, T, C) are the table's for `x` (B, T)."""
        h = norm(F.embedding(x, self.weights["embed"]) + rows)
        for i, block in enumerate(self.weights["blocks"].unbind()):
            qkv, o, up, down = block.split([3, 1, 4, 4])
            h = h + self.attend(norm(h) @ qkv.flatten(0, 1).T, shift=i == 0) @ o[0].T
            h = h + F.relu(norm(h) @ up.flatten(0, 1).T).square() @ down.flatten(0, 1)
        return norm(h)

    def attend(self, qkv: torch.Tensor, shift: bool) -> torch.Tensor:
        """Causal attention over (B, T, 3C); with `shift` a key is that of the token before: what followed?"""
        b, t, _ = qkv.shape
        qk, v = qkv.view(b, t, 3 * H, K).split([2 * H, H], 2)
        qk = norm(qk)
        qk = torch.addcmul(qk * self.cos[:t], qk.roll(K // 2, -1), self.sin[:t])
        q, k = qk.split(H, 2)                                            # (B, T, H, K)
        k = F.pad(k, (0, 0, 0, 0, 1, 0))[:, :t] if shift else k
        q, k, v = (z.transpose(1, 2).reshape(b * H, t, K) for z in (q, k, v))
        scores = torch.baddbmm(self.mask[:t, :t], q, k.mT, alpha=0.12)   # (B H, T, T)
        return (scores.softmax(-1) @ v).view(b, H, t, K).transpose(1, 2).reshape(b, t, C)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, V) for `x` (B, T)."""
        return self.hidden(x, self.bigrams[bigram(x)].bfloat16()) @ self.weights["head"].T


def norm(x):
    return F.layer_norm(x, x.shape[-1:])     # one kernel here; rms_norm is six


def bigram(x):
    """Row of the table for each token and the one before it: (B, T)."""
    return (F.pad(x, (1, 0))[:, :-1] * 36313 + x * 27191) % BIGRAMS


class Optimizer:
    """Muon on the blocks' C x C matrices, Adam on embedding and head, Adagrad on the rows in use."""

    def __init__(self, model: Model):
        self.model, self.steps, self.squares = model, 0, torch.zeros_like(model.bigrams)
        self.m, self.v = ({name: torch.zeros_like(w) for name, w in model.masters.items()} for _ in "mv")

    @torch.no_grad()
    def step(self, scale: float, at: torch.Tensor, rows: torch.Tensor) -> None:
        """Rates times `scale`; `at` (B, T) is where the table was read, `rows` holds the gradient there."""
        self.steps += 1
        for name, w in self.model.weights.items():
            update = self.muon if name == "blocks" else self.adam
            self.model.masters[name] -= scale * RATES[name] * update(name, w.grad.float())
            w.copy_(self.model.masters[name])
            w.grad = None
        used, place = at.unique(return_inverse=True)
        g = torch.zeros(len(used), C).index_add_(0, place.flatten(), rows.grad.float().flatten(0, 1))
        self.squares[used] += g * g
        self.model.bigrams[used] -= scale * RATES["bigrams"] * g / (self.squares[used].sqrt() + 1e-10)

    def adam(self, name, g, beta1=0.9, beta2=0.95):
        m, v = self.m[name].lerp_(g, 1 - beta1), self.v[name].lerp_(g * g, 1 - beta2)
        return m / (1 - beta1**self.steps) / ((v / (1 - beta2**self.steps)).sqrt() + 1e-10)

    def muon(self, name, g, beta=0.95):
        m = self.m[name].lerp_(g, 1 - beta)
        return orthogonal(g.lerp(m, beta).flatten(0, 1)).view_as(g)      # Nesterov's look ahead


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """U V' of each matrix U S V' of `g` (N, C, C), roughly: five steps of Newton-Schulz."""
    x = (g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def bits_per_byte(logits, held_out: HeldOut) -> float:
    """-sum log2 p over all held-out tokens, end of text included, / UTF-8 bytes; `logits` maps x to (B, T, V)."""
    nats = 0.0
    with torch.no_grad():
        for x, y in held_out.batches(8):
            nats += F.cross_entropy(logits(x).flatten(0, 1).float(), y.flatten(), ignore_index=IGNORE,
                                    reduction="sum").item()
    return held_out.bits_per_byte(nats)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib", help="stdlib, a text file or a folder")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", help="where tokenizer and tokens are kept; default: the user's cache")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = load_corpus(args.data)
    tokenizer = tokenizer_for(corpus, V, args.cache)
    loader = Loader(pack(corpus, tokenizer, args.cache), seed=args.seed, seq=T, micro_batch=B)
    model = Model(tokenizer.vocab_size, args.seed)
    optimizer = Optimizer(model)
    began, done = time.perf_counter(), 0.0                               # done: share of the time
    while done < 1:
        [(x, y)] = loader.next()                                         # (B, T) each
        at = bigram(x)
        rows = model.bigrams[at].bfloat16().requires_grad_()             # (B, T, C)
        loss = cross_entropy(model.hidden(x, rows), model.weights["head"], y, y.numel())
        loss.backward()
        optimizer.step(min(1, done / WARMUP + 0.05, (1 - done) / DECAY), at, rows)
        done = (time.perf_counter() - began) / args.seconds
        if optimizer.steps % 100 == 0:
            print(f"{done * args.seconds:5.1f} s  step {optimizer.steps}  loss {loss.item():.3f}", flush=True)
    loader.close()
    found = bits_per_byte(model.logits, HeldOut(corpus.held_out, tokenizer, T))
    print(json.dumps({"bits_per_byte": round(found, 4), "seconds": round(done * args.seconds, 2),
                      "steps": optimizer.steps, "tokens": optimizer.steps * B * T, "corpus": corpus.hash[:16],
                      "tokenizer_s": round(tokenizer.train_s, 1)}))


if __name__ == "__main__":
    main()
