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

from nanoinfra.config import config_for_size
from nanoinfra.distributed.cpu_threads import set_torch_threads
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.parameters import parameter_count, parameter_shapes
from nanoinfra.model.initialization import draw_initial_tensor
from nanoinfra.model.weights.read_weights_into_decoder import PretrainedWeights, decoder_on_meta_device
from nanoinfra.parallel.parallelize import parallelize_for_serving
from nanoinfra.serve.engine.block_pool import BlockPool
from nanoinfra.serve.engine.paged_attention import PagedKVCache
from nanoinfra.serve.engine.scheduler import Scheduler, Sequence
from nanoinfra.train.load_and_export_models import open_pretrained_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="*", help="texts to go on from")
parser.add_argument("--file", type=Path, help="more of them, one a line")
parser.add_argument("--model", default="test", help="a run directory, a Hugging Face folder, smollm2-135m; "
                                                    "test is drawn at random and reads bytes")
parser.add_argument("--max-tokens", type=int, default=32, help="new ones for each prompt")
parser.add_argument("--blocks", type=int, default=256, help="of KV memory")
parser.add_argument("--block-size", type=int, default=16, help="tokens of a block")
parser.add_argument("--max-num-batched-tokens", type=int, default=512,
                    help="tokens in a step, of all sequences")
parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences in a step")
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
parser.add_argument("--ids", action="store_true", help="print the new tokens' ids")
args = parser.parse_args()


def drawn():
    """The `test` size with weights drawn by name."""
    config = config_for_size("test")
    every = parameter_shapes(config)

    def read(name, box=()):
        return draw_initial_tensor(name, every[name], config.layers, seed=0)[box]
    return PretrainedWeights(config, read)


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
set_torch_threads()

# Model: each rank reads its part
try:
    weights = drawn() if args.model == "test" else open_pretrained_weights(args.model, mesh.world)
    config, read, text, *_ = weights
    model = parallelize_for_serving(decoder_on_meta_device(config), mesh, read, getattr(torch, args.dtype))
    lines = args.file.read_text().splitlines() if args.file else []
    prompts = args.prompts + [line for line in lines if line]
    prompts = prompts or ["The first of all programs", "The first of all questions"]
except (OSError, ValueError) as mistake:
    refuse(mistake)

# Memory in blocks, and who waits for it
blocks, kv = BlockPool(args.blocks, args.block_size), PagedKVCache(model, args.blocks, args.block_size)
scheduler = Scheduler(blocks, args.max_num_batched_tokens, args.max_num_seqs,
                      max_queued_requests=len(prompts), max_queued_tokens=1 << 30)
try:
    sequences = [Sequence(encode(prompt)) for prompt in prompts]
    for prompt, sequence in zip(prompts, sequences):
        if args.max_tokens < 1:
            raise ValueError(f"--max-tokens {args.max_tokens} leaves nothing to do; ask for at least 1")
        if sequence.num_prompt_tokens + args.max_tokens > config.max_cacheable_seq_len:
            raise ValueError(f"{prompt[:30]!r} has {sequence.num_prompt_tokens} tokens: with "
                             f"{args.max_tokens} new ones they do not fit the context of "
                             f"{config.max_cacheable_seq_len}; "
                             "lower --max-tokens")
        scheduler.add_sequence(sequence)
except ValueError as mistake:
    refuse(mistake)

ends = text.eos_token_ids if text else ()
began, steps, most, hits, preempted = time.perf_counter(), 0, 0, 0, 0
while scheduler.running or scheduler.waiting:
    plan = scheduler.schedule()                                  # who computes how many tokens
    for sequence in plan.out_of_blocks:                          # alone, and memory is full: it ends here
        scheduler.finish_sequence(sequence)
    if not plan.scheduled_chunks:
        continue
    with torch.inference_mode():
        chunks, tokens, positions = kv.prepare_inputs(plan)      # (1, N) of all sequences, one after another
        hidden = model.hidden_states(tokens, positions,
                                     kv)[0]          # (N, C); attention finds its blocks in kv
        scheduler.mark_computed(plan)
        lasts = [end - 1 for end in accumulate(count for _, _, count in chunks)]
        ready = [(row, each) for row, (each, _, _) in zip(lasts, chunks)
                 if each.num_computed_tokens == len(each.tokens)]
        rows = hidden[[row for row, _ in ready]]                 # (B, C) of those that have caught up
        tokens = model.head(rows).argmax(-1).tolist() if ready else []

    hits += sum(each.num_cached_tokens for each, first, _ in chunks
                if first == each.num_cached_tokens < each.num_prompt_tokens)
    steps, most, preempted = steps + 1, max(most, blocks.num_used_blocks), preempted + len(plan.preempted)
    for token, (_, sequence) in zip(tokens, ready):
        if token not in ends:
            sequence.tokens.append(token)
        if token in ends or len(sequence.tokens) == sequence.num_prompt_tokens + args.max_tokens:
            scheduler.finish_sequence(sequence)                           # its blocks are free for others

seconds = time.perf_counter() - began
if mesh.rank == 0:
    for prompt, sequence in zip(prompts, sequences):
        new = sequence.tokens[sequence.num_prompt_tokens:]
        print(f"{prompt}|{decode(new)}" + (f"\nids {new}" if args.ids else ""))
    made = sum(len(each.tokens) - each.num_prompt_tokens for each in sequences)
    print(f"\n{parameter_count(config):,} parameters on {mesh.tp.size} ranks: {made} tokens for "
          f"{len(prompts)} prompts in {steps} steps, {made / seconds:,.0f} tokens/s; at most {most} of "
          f"{args.blocks} blocks used, {hits} prompt tokens known already, {preempted} sent away for want of "
          "blocks")
if dist.is_initialized():
    dist.destroy_process_group()
