"""A single row's products: gemv of decode.c against torch's F.linear and oneDNN's packed weights.

    python scripts/bench/gemv.py [--pairs 9] [--masks native avx2 x86-64]

All products of one token of SmolLM2-135M (30 layers of q k v, o, gate up, down, and the head), each with
weights of its own, so that they come from memory: as many tokens a second as products alone would allow.
Sides alternate in one process. `native`: the machine as it is. `avx2`: torch, oneDNN and the C compiler held
to AVX2. `x86-64`: those libraries held to AVX2, the C to plain x86-64, which is reported only.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

MASKED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}   # read when torch is imported
MASKS = {"native": {}, "avx2": {**MASKED, "CFLAGS": "-march=haswell"},
         "x86-64": {**MASKED, "CFLAGS": "-march=x86-64"}}
SHAPES = [(576, 960), (576, 576), (576, 3072), (1536, 576)]              # (in, out) of a layer's products
LAYERS, HEAD = 30, (576, 49152)


def sides(dtype):
    """{name: a function that computes all products of one token}, and for what the C was compiled."""
    import torch
    import torch.nn.functional as F
    from nanoinfra.kernels.cpu import decode_kernels

    from nanoinfra.serve.engine import packed_linear
    kernels = decode_kernels.compile_decode_kernels(dtype, K=64, KV=3, G=3, BLOCK=16)
    linears = [torch.nn.Linear(*shape, bias=False, dtype=dtype) for shape in [*SHAPES * LAYERS, HEAD]]
    ours = [packed_linear.PackedLinear(linear, gemv=kernels.gemv) for linear in linears]
    rows = {n: torch.randn(1, 1, n).to(dtype) for n in {linear.in_features for linear in linears}}
    work = [(rows[linear.in_features], linear, fast) for linear, fast in zip(linears, ours)]
    found = {"gemv": lambda: [fast(x) for x, _, fast in work],
             "F.linear": lambda: [F.linear(x, linear.weight) for x, linear, _ in work]}
    if not packed_linear.why_onednn_cannot_pack(dtype):
        found["packed"] = lambda: [fast._product(x) for x, _, fast in work]
    return found, kernels.instruction_set().decode()


def race(mask, pairs):
    """Under `mask`, which this process was started with: the summaries of each dtype and peer."""
    import torch
    sys.path.insert(0, str(Path(__file__).parent))
    from paired import alternate, summary
    results = []

    def rate(run, calls=10):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return calls / (time.perf_counter() - begin)
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            found, instructions = sides(dtype)
            ours = found.pop("gemv")
            for name, peer in found.items():
                rate(ours, 3), rate(peer, 3)
                pairs_of = alternate(lambda: rate(ours), lambda peer=peer: rate(peer), pairs)  # noqa: B023
                name = f"{mask}, {str(dtype).removeprefix('torch.')}: C for {instructions} against {name}"
                results.append(summary(name, pairs_of, "tokens/s"))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=[*MASKS])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gemv.json"))
    parser.add_argument("--within", choices=MASKS, help=argparse.SUPPRESS)   # it is in force already
    args = parser.parse_args()
    if args.within:
        args.out.write_text(json.dumps(race(args.within, args.pairs)))
        return
    from nanoinfra.lab.measure import describe_machine
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for mask in args.masks:
        command = [sys.executable, __file__, "--within", mask, "--pairs", str(args.pairs), "--out", args.out]
        subprocess.run(command, env={**os.environ, **MASKS[mask]}, check=True)
        results += json.loads(args.out.read_text())
    args.out.write_text(json.dumps({"machine": describe_machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
