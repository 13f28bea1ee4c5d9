"""Answer many prompts at once: a batch generator with its loop in sight.

    python scripts/serve.py                                        a model drawn at random, and two prompts
    python scripts/serve.py --model smollm2-135m "The sea is" "Once upon a time"
    python scripts/serve.py --model runs/mine --file prompts.txt   a run directory or a Hugging Face folder
    torchrun --nproc-per-node 2 scripts/serve.py                   the same answers from two ranks

Every step hands out a budget of tokens: to sequences that run, one after their last, then to prompts that
wait, in chunks. Keys and values lie in blocks, taken when a token needs one; prompts that begin alike share
them. What each prompt is answered does not depend on the others: greedily, it is `nanoinfra generate`'s.
"""
import argparse
import os
import time
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist

from nanoinfra.config import sized
from nanoinfra.distributed.cpu_threads import use_threads
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.parameters import parameters, shapes
from nanoinfra.model.init import draw
from nanoinfra.model.weights.fill_model import Weights, empty
from nanoinfra.parallel.parallelize import serving
from nanoinfra.serve.engine.block_pool import Blocks
from nanoinfra.serve.engine.paged_attention import PagedKV
from nanoinfra.serve.engine.scheduler import Scheduler, Sequence
from nanoinfra.train.pretrained import open_pretrained

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="*", help="texts to go on from")
parser.add_argument("--file", type=Path, help="more of them, one a line")
parser.add_argument("--model", default="test", help="a run directory, a Hugging Face folder, smollm2-135m; "
                                                    "test is drawn at random and reads bytes")
parser.add_argument("--max-tokens", type=int, default=32, help="new ones for each prompt")
parser.add_argument("--blocks", type=int, default=256, help="of KV memory")
parser.add_argument("--block-size", type=int, default=16, help="tokens of a block")
parser.add_argument("--budget", type=int, default=512, help="tokens in a step, of all sequences")
parser.add_argument("--seats", type=int, default=64, help="sequences in a step")
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
parser.add_argument("--ids", action="store_true", help="print the new tokens' ids")
args = parser.parse_args()


def drawn():
    """The `test` size with weights drawn by name."""
    config = sized("test")
    every = shapes(config)
    return Weights(config, lambda name, box=(): draw(name, every[name], config.layers, seed=0)[box])


def encode(prompt):
    return text.encode(prompt) if text else list(prompt.encode())


def decode(tokens):
    return text.decode(tokens) if text else bytes(t for t in tokens if t < 256).decode(errors="replace")


def refuse(mistake):
    if mesh.rank == 0:
        parser.error(str(mistake))
    raise SystemExit(2)


# Who am I? Ranks share every layer's heads; all of them plan, compute and choose alike
if "RANK" in os.environ:                     # torchrun started us
    dist.init_process_group("gloo")
mesh = Mesh(tp=world_size())
use_threads()

# Model: each rank reads its part
try:
    config, read, text, *_ = drawn() if args.model == "test" else open_pretrained(args.model, mesh.world)
    model = serving(empty(config), mesh, read, getattr(torch, args.dtype))
    lines = args.file.read_text().splitlines() if args.file else []
    prompts = args.prompts + [line for line in lines if line]
    prompts = prompts or ["The first of all programs", "The first of all questions"]
except (OSError, ValueError) as mistake:
    refuse(mistake)

# Memory in blocks, and who waits for it
blocks, kv = Blocks(args.blocks, args.block_size), PagedKV(model, args.blocks, args.block_size)
scheduler = Scheduler(blocks, args.budget, args.seats, queue=len(prompts), queue_tokens=1 << 30)
try:
    sequences = [Sequence(encode(prompt)) for prompt in prompts]
    for prompt, sequence in zip(prompts, sequences):
        if args.max_tokens < 1:
            raise ValueError(f"--max-tokens {args.max_tokens} leaves nothing to do; ask for at least 1")
        if sequence.prompt + args.max_tokens > config.cached_context:
            raise ValueError(f"{prompt[:30]!r} has {sequence.prompt} tokens: with {args.max_tokens} new ones "
                             f"they do not fit the context of {config.cached_context}; lower --max-tokens")
        scheduler.add(sequence)
except ValueError as mistake:
    refuse(mistake)

ends = text.ends if text else ()
began, steps, most, hits, preempted = time.perf_counter(), 0, 0, 0, 0
while scheduler.running or scheduler.waiting:
    plan = scheduler.plan()                                      # who computes how many tokens
    for sequence in plan.full:                                   # alone, and memory is full: it ends here
        scheduler.finish(sequence)
    if not plan.work:
        continue
    with torch.inference_mode():
        work, tokens, places = kv.begin(plan)                    # (1, N) of all sequences, one after another
        hidden = model.hidden(tokens, places, kv)[0]             # (N, C); attention finds its blocks in kv
        scheduler.done(plan)
        lasts = [end - 1 for end in accumulate(count for _, _, count in work)]
        ready = [(row, each) for row, (each, _, _) in zip(lasts, work) if each.computed == len(each.tokens)]
        rows = hidden[[row for row, _ in ready]]                 # (B, C) of those that have caught up
        tokens = model.head(rows).argmax(-1).tolist() if ready else []

    hits += sum(each.hit for each, first, _ in work if first == each.hit < each.prompt)
    steps, most, preempted = steps + 1, max(most, blocks.used), preempted + len(plan.preempted)
    for token, (_, sequence) in zip(tokens, ready):
        if token not in ends:
            sequence.tokens.append(token)
        if token in ends or len(sequence.tokens) == sequence.prompt + args.max_tokens:
            scheduler.finish(sequence)                           # its blocks are free for others

seconds = time.perf_counter() - began
if mesh.rank == 0:
    for prompt, sequence in zip(prompts, sequences):
        new = sequence.tokens[sequence.prompt:]
        print(f"{prompt}|{decode(new)}" + (f"\nids {new}" if args.ids else ""))
    made = sum(len(each.tokens) - each.prompt for each in sequences)
    print(f"\n{parameters(config):,} parameters on {mesh.tp.size} ranks: {made} tokens for {len(prompts)} "
          f"prompts in {steps} steps, {made / seconds:,.0f} tokens/s; at most {most} of {args.blocks} blocks "
          f"used, {hits} prompt tokens known already, {preempted} sent away for want of blocks")
if dist.is_initialized():
    dist.destroy_process_group()
