"""Sixty seconds of ../speedrun.py against 120 of frozen_loop.py, in turn, each in a process of its own.

    python scripts/bench/speedrun.py [--pairs 3] [--seconds 60] [--threads 2]

Prints every run and the medians; the speedrun wins where its median is no higher. Both are scored by one
function on the same held-out documents; a pair shares its seed. Threads of both sides sleep while they wait:
threads that spin lose nearly all their speed as soon as another process wants a core.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

SCRIPTS = Path(__file__).resolve().parent.parent
SIDES = {"speedrun": (SCRIPTS / "speedrun.py", 1), "frozen": (SCRIPTS / "bench" / "frozen_loop.py", 2)}


def run(side: str, seconds: float, seed: int, args: argparse.Namespace, cache: str) -> dict:
    """The last line the side prints; its time is its share of `seconds`."""
    script, times = SIDES[side]
    done = subprocess.run([sys.executable, script, "--data", args.data, "--seconds", str(times * seconds),
                           "--seed", str(seed), "--threads", str(args.threads), "--cache", cache],
                          stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"pair {seed}  {side:9}{result['bits_per_byte']:8.4f} bits per byte  {result['seconds']:6.1f} s  "
          f"{result['steps']:5} steps  {result['tokens']:>9,} tokens", flush=True)
    return {"side": side, "seed": seed, "load": os.getloadavg()[0], **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib", help="stdlib, a text file or a folder")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="for the speedrun; twice for the loop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/speedrun.json"))
    args = parser.parse_args()
    runs = []
    with TemporaryDirectory() as cache:      # a fresh one, so that the tokenizers' time is seen
        for seed in range(args.pairs):
            for side in sorted(SIDES, reverse=seed % 2 == 0):
                runs.append(run(side, args.seconds, seed, args, cache))
    ours, peer = (median(r["bits_per_byte"] for r in runs if r["side"] == side) for side in SIDES)
    took = [max(r["tokenizer_s"] for r in runs if r["side"] == side) for side in SIDES]
    verdict = "reached" if ours <= peer else "not reached"
    print(f"medians of {args.pairs} (timed): speedrun {ours:.4f} in {args.seconds:g} s, frozen {peer:.4f} "
          f"in {2 * args.seconds:g} s -> {verdict}; tokenizers trained before, in {took[0]} and {took[1]} s")
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "threads": args.threads, "kind": "timed",
                                    "ours": ours, "peer": peer, "runs": runs}, indent=1) + "\n")
    return int(ours > peer)


if __name__ == "__main__":
    sys.exit(main())
