"""Train a GPT on your own text with a loop you can read aloud, then let it write.

    python scripts/train_gpt.py                        the Python standard library, one rank
    python scripts/train_gpt.py --data notes.txt --seconds 300
    torchrun --nproc-per-node 2 scripts/train_gpt.py   the same run on two ranks

Everything the loop does stands in this file; the model, the loader and the gradient buckets are nanoinfra's.
"""
import argparse
import math
import os
import time

import torch
import torch.distributed as dist

from nanoinfra.config import MODEL_SIZES, config_for_size
from nanoinfra.data.micro_batch_loader import HeldOutSet, MicroBatchLoader
from nanoinfra.data.token_datasets import open_dataset
from nanoinfra.distributed import comm
from nanoinfra.distributed.cpu_threads import set_torch_threads
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.serve.generate_with_kv_cache import generate
from nanoinfra.train.loss import count_valid_tokens, linear_cross_entropy
from nanoinfra.train.optimizer import unscale_and_clip_grads

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="stdlib", help="stdlib, random, a text file or a folder")
parser.add_argument("--size", default="nano", choices=MODEL_SIZES, help="the one dial")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--seconds", type=float, help="stop after this long instead")
parser.add_argument("--seq", type=int, help="tokens in a sample; default: the size's context")
parser.add_argument("--micro-batch", type=int, default=8, help="sequences a rank runs at once")
parser.add_argument("--global-batch", type=int, help="sequences a step; default: micro-batch x ranks")
parser.add_argument("--lr", type=float, help="peak learning rate; default: the size's")
parser.add_argument("--warmup", type=int, default=10)
parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--prompt", default="def ", help="what it goes on from when it is done")
args = parser.parse_args()

# Who am I?
if "RANK" in os.environ:                     # torchrun started us
    dist.init_process_group("gloo")
mesh = Mesh(dp=dist.get_world_size() if dist.is_initialized() else 1)
set_torch_threads()

# Data: one global order of samples, dealt to the ranks
size = MODEL_SIZES[args.size]
seq = args.seq or size.config.context
source = open_dataset(args.data, size.config.vocab)
tokenizer = source.tokenizer
G = args.global_batch or args.micro_batch * mesh.dp.size
loader = MicroBatchLoader(source, seed=args.seed, seq_len=seq, global_batch=G, micro_batch=args.micro_batch,
                          dp_rank=mesh.dp.rank, dp_size=mesh.dp.size)

# Model: drawn by parameter name, so every rank draws the same
config = config_for_size(args.size, tokenizer.vocab_size if tokenizer else None, seq)
model = init_weights(Decoder(config), args.seed).to(getattr(torch, args.dtype))
shared = DataParallel(model, mesh.data)
matrices = [p for p in model.parameters() if p.dim() >= 2]
vectors = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
if mesh.rank == 0:
    print(f"{args.size}: {parameter_count(config):,} parameters, {G} x {seq} tokens a step "
          f"on {mesh.dp.size} ranks")


def learning_rate(step, progress):
    """Up in a line, then down along a cosine to a tenth."""
    rise = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    return (args.lr or size.lr) * rise * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


began, step, elapsed = time.time(), 0, 0.0
while elapsed < args.seconds if args.seconds else step < args.steps:
    micro_batches = loader.next_step()
    [valid] = count_valid_tokens(micro_batches, mesh.data)  # of all ranks, known before any backward

    total = torch.zeros((), dtype=torch.float64)
    shared.zero_grad()
    for i, (x, y, *_) in enumerate(micro_batches):               # (B, T) each
        loss = linear_cross_entropy(model.hidden_states(x), model.head.weight, y, valid)
        shared.prepare_for_backward(is_last=i == len(micro_batches) - 1)
        loss.backward()                                          # the last one sends its buckets as they fill
        total += loss.detach()
    gradients = shared.finish_grad_sync()                                  # {name: the sum over ranks}
    unscale_and_clip_grads(gradients, 1.0)
    for name, gradient in gradients.items():
        model.get_parameter(name).grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, elapsed / args.seconds if args.seconds else step / args.steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    step += 1
    clock = torch.tensor((time.time() - began) * (mesh.rank == 0), dtype=torch.float64)
    both = torch.stack([total, clock])                           # summed over ranks: rank 0's clock
    total, elapsed = comm.all_reduce(both, mesh.data).tolist()
    if mesh.rank == 0 and (step <= 10 or step % 10 == 0):
        print(f"step {step:4}  loss {total:.10f}  {step * G * seq / elapsed:,.0f} tokens/s", flush=True)

loader.close()
if tokenizer:
    held_out, nats = HeldOutSet(source.corpus.held_out, tokenizer, seq), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for x, y, *_ in held_out.micro_batches(args.micro_batch, mesh.data.rank, mesh.data.size):
            nats += linear_cross_entropy(model.hidden_states(x), model.head.weight, y, 1)
    nats = comm.all_reduce(nats, mesh.data).item()
    if mesh.rank == 0:
        print(f"held out: {held_out.bits_per_byte(nats):.4f} bits per byte")
        prompt = [tokenizer.eot_token_id, *tokenizer.encode(args.prompt)]
        written = generate(model, prompt, min(100, seq - len(prompt)), temperature=0.8, top_k=50,
                           eos_token_ids=[tokenizer.eot_token_id])
        print(args.prompt + tokenizer.decode(written))
if dist.is_initialized():
    dist.destroy_process_group()
