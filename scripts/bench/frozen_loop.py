"""The loop to beat: what one writes first. Frozen, so that it stays the same rival.

    python scripts/bench/frozen_loop.py --seconds 120 --seed 0 --threads 2

A 4096 BPE, GPT-2's block (4 layers, 128 wide, 4 heads, tied head), T 256, batch 8, bf16 autocast, fused
AdamW, warm-up, then a linear fall over the second half of the time. The clock runs from the first step to the
last. Plain torch; corpus, tokenizer, loader and score are those of ../speedrun.py.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.data.corpus import load_corpus
from nanoinfra.data.micro_batch_loader import HeldOutSet, MicroBatchLoader
from nanoinfra.data.token_datasets import pack_corpus
from nanoinfra.data.train_tokenizer import get_or_train_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from speedrun import bits_per_byte  # noqa: E402

V, C, L, H, T, B = 4096, 128, 4, 4, 256, 8
WARMUP = 100                                 # steps


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.o = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x):                                                # (B, T, C)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)      # (B, H, T, K)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab, C), nn.Embedding(T, C)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(L))), nn.LayerNorm(C)
        self.head = nn.Linear(C, vocab, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, x):                                                # (B, T) -> (B, T, V)
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.norm(self.blocks(self.embed(x) + self.positions.weight[:x.shape[1]])))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib", help="stdlib, a text file or a folder")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--cache", help="where tokenizer and tokens are kept; default: the user's cache")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    corpus = load_corpus(args.data)
    tokenizer = get_or_train_tokenizer(corpus, V, args.cache)
    loader = MicroBatchLoader(pack_corpus(corpus, tokenizer, args.cache), seed=args.seed, seq_len=T,
                              micro_batch=B)
    model = GPT(tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    step, began, done = 0, time.perf_counter(), 0.0                      # done: share of the time
    while done < 1:
        [(x, y, *_)] = loader.next_step()                                     # (B, T) each
        F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / WARMUP, 2 * (1 - done))
        optimizer.step()
        optimizer.zero_grad()
        done = (time.perf_counter() - began) / args.seconds
    loader.close()
    found = bits_per_byte(model, HeldOutSet(corpus.held_out, tokenizer, T))
    print(json.dumps({"bits_per_byte": round(found, 4), "seconds": round(done * args.seconds, 2),
                      "steps": step, "tokens": step * B * T, "corpus": corpus.sha256[:16],
                      "tokenizer_s": round(tokenizer.train_seconds, 1)}))


if __name__ == "__main__":
    main()
