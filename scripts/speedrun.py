"""As few held-out bits per byte as a minute of training on a laptop's CPU can buy.

    python scripts/speedrun.py --seconds 60 --seed 0 --threads 2

The clock runs from the first optimizer step to the last; before it no data is seen but by the tokenizer,
whose training time is printed. What pays: a small vocabulary, one block, hashed tables of n-grams, attention
born as an induction head (Olsson et al. 2022), so that copying need not be discovered. H heads of width K.
"""
import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.data.corpus import load_corpus
from nanoinfra.data.micro_batch_loader import HeldOutSet, MicroBatchLoader
from nanoinfra.data.token_datasets import IGNORE_INDEX, pack_corpus
from nanoinfra.data.train_tokenizer import get_or_train_tokenizer
from nanoinfra.train.loss import linear_cross_entropy

V, C, H, T, B = 1024, 128, 2, 512, 4
K = C // H
ORDERS, ROWS = (2, 3), 500_009               # n-grams share one table; a prime number of rows
LR = {"matrices": 3e-3, "embed": 2e-2, "head": 5e-3, "ngrams": 0.1}
WARMUP, DECAY = 0.02, 0.6                    # shares of the run: the rate rises, later falls to zero


def bf16(w):
    return w.to(torch.bfloat16)              # weights are float32, products are not


def norm(x):
    return F.layer_norm(x, x.shape[-1:])     # one kernel on a CPU; rms_norm is six


class GPT(nn.Module):
    """One pre-norm block, attention born looking for what followed the tokens now at hand, and ReLU^2."""

    def __init__(self, vocab):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(vocab, C) / 2)
        self.head = nn.Parameter(self.embed.detach() / 10)               # untied, but born alike
        self.ngrams = nn.Embedding(ROWS, C, sparse=True)
        nn.init.zeros_(self.ngrams.weight)
        q, v, *up = torch.randn(6, C, C) * C**-0.5
        self.qkv, self.o = nn.Parameter(torch.cat([q, q, v])), nn.Parameter(v.T)     # k = q: like finds like,
        self.up, self.down = nn.Parameter(torch.cat(up)), nn.Parameter(torch.zeros(C, 4 * C))    # o v: a copy
        speed = torch.cat([1024 ** -torch.linspace(0, 1, K // 4), torch.zeros(K // 4)])     # half stand still
        angle = torch.arange(T)[:, None] * speed                         # (T, K/2)
        cos, sin = angle.cos().repeat(1, 2), torch.cat([angle.sin(), -angle.sin()], 1)
        self.turn = bf16(torch.stack([cos, sin]))[:, :, None]            # (2, T, 1, K)
        self.mask = bf16(torch.full((T, T), -torch.inf).triu(1))

    def hidden(self, x):
        """(B, T) -> (B, T, C), after the final norm."""
        h = norm(bf16(F.embedding(x, self.embed) + self.ngrams(ngram_rows(x)).sum(0)))
        h = h + self.attend(norm(h) @ bf16(self.qkv).T) @ bf16(self.o).T
        h = h + F.relu(norm(h) @ bf16(self.up).T).square() @ bf16(self.down).T
        return norm(h)

    def attend(self, qkv):
        b, t, _ = qkv.shape
        qk, v = qkv.view(b, t, 3 * H, K).split([2 * H, H], 2)
        qk, (cos, sin) = norm(qk), self.turn[:, :t]
        q, k = torch.addcmul(qk * cos, qk.roll(K // 2, -1), sin).split(H, 2)         # (B, T, H, K)
        k = F.pad(k, (0, 0, 0, 0, 1, 0))[:, :t]                          # a key is the token before's
        q, k, v = (z.transpose(1, 2).reshape(b * H, t, K) for z in (q, k, v))
        scores = torch.baddbmm(self.mask[:t, :t], q, k.mT, alpha=0.12)   # (B H, T, T)
        return (scores.softmax(-1) @ v).view(b, H, t, K).transpose(1, 2).reshape(b, t, C)

    def forward(self, x):
        return self.hidden(x) @ bf16(self.head).T                        # (B, T, V)


def ngram_rows(x):
    """Where the table keeps the n-gram that ends at each token: (orders, B, T)."""
    hashed, rows = x, {}
    for n in range(2, max(ORDERS) + 1):
        hashed = hashed * 1_000_003 + F.pad(x, (n - 1, 0))[:, :x.shape[1]]
        rows[n] = hashed % ROWS
    return torch.stack([rows[n] for n in ORDERS])


def train(model, loader, seconds):
    """Until `seconds` are over; returns (steps, seconds taken)."""
    groups = {"matrices": [model.qkv, model.o, model.up, model.down], "embed": [model.embed],
              "head": [model.head]}
    adam = torch.optim.Adam([{"params": params, "peak": LR[name]} for name, params in groups.items()],
                            betas=(0.9, 0.95), fused=True)
    squares = torch.zeros_like(model.ngrams.weight)
    steps, began, done = 0, time.perf_counter(), 0.0                     # done: share of the time
    while done < 1:
        [(x, y, *_)] = loader.next_step()                                # (B, T) each
        loss = linear_cross_entropy(model.hidden(x), bf16(model.head), y, y.numel())
        loss.backward()
        scale = min(1, done / WARMUP + 0.05, (1 - done) / DECAY)
        for group in adam.param_groups:
            group["lr"] = scale * group["peak"]
        adam.step()
        adam.zero_grad()
        adagrad(model.ngrams.weight, squares, scale * LR["ngrams"])
        steps, done = steps + 1, (time.perf_counter() - began) / seconds
        if steps % 100 == 0:
            print(f"{done * seconds:5.1f} s  step {steps}  loss {loss.item():.3f}", flush=True)
    return steps, done * seconds


@torch.no_grad()
def adagrad(weight, squares, lr):
    """The step of Duchi et al. 2011, on the rows with a gradient alone."""
    grad = weight.grad.coalesce()
    rows, g = grad.indices()[0], grad.values()
    squares[rows] += g * g
    weight[rows] -= lr * g / (squares[rows].sqrt() + 1e-10)
    weight.grad = None


def bits_per_byte(model, held_out):
    """-sum log2 p over all held-out tokens, end of text included, / UTF-8 bytes; `model` gives logits."""
    with torch.no_grad():
        nats = sum(F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), ignore_index=IGNORE_INDEX,
                                   reduction="sum").item() for x, y, *_ in held_out.micro_batches(8))
    return held_out.bits_per_byte(nats)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="stdlib", help="stdlib, a text file or a folder")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", help="where tokenizer and tokens are kept; default: the user's cache")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    corpus = load_corpus(args.data)
    bpe = get_or_train_tokenizer(corpus, V, args.cache)
    loader = MicroBatchLoader(pack_corpus(corpus, bpe, args.cache), seed=args.seed, seq_len=T, micro_batch=B)
    model = GPT(bpe.vocab_size)
    steps, took = train(model, loader, args.seconds)
    loader.close()
    bits = round(bits_per_byte(model, HeldOutSet(corpus.held_out, bpe, T)), 4)
    run = {"bits_per_byte": bits, "seconds": round(took, 2), "steps": steps, "tokens": steps * B * T}
    print(json.dumps(run | {"corpus": corpus.sha256[:16], "tokenizer_s": round(bpe.train_seconds, 1)}))


if __name__ == "__main__":
    main()
