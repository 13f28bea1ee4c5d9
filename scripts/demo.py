"""Three minutes of nanoinfra: train a small code model on two ranks, let it write, let a real model answer.

    make demo            or: python scripts/demo.py --seconds 180

Trains on the Python standard library of this machine, saves runs/demo/loss.png and a checkpoint, completes
40 function headers it has never seen and counts how many become whole functions, trained and untrained.
"""
import argparse
import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanoinfra.data.corpus import load_corpus
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.serve.command_line_options import GenerateOptions
from nanoinfra.serve.generate_with_kv_cache import generate
from nanoinfra.serve.generate_with_kv_cache import main as answer
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.config import RunFlags
from nanoinfra.train.launch.elastic_rank import STOP_NOTE_FILE
from nanoinfra.train.launch.stop_signals import SignalListener, exit_immediately
from nanoinfra.train.load_and_export_models import load_pretrained
from nanoinfra.train.run_directory.check_out_folder import check_out_folder, remove_run_files
from nanoinfra.train.run_directory.lock_run_directory import lock_run_directory

HEADERS, NEW_TOKENS, STATEMENTS = 40, 96, 3
QUESTION = "In one sentence: why are large language models trained on many GPUs?"
NEXT = """Try next:
  {bin}/nanoinfra generate {out} "def read(" --temperature 0.8   # it goes on from your own prompt
  {bin}/nanoinfra train --dp 2 --steps 50 --trace trace.json   # two ranks in https://ui.perfetto.dev
  make lessons                                                  # the course, from one rank to many\
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="of training")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--headers", type=int, default=HEADERS, help="held-out function headers to complete")
    args = parser.parse_args()
    began = time.time()
    train(args)
    complete(args)
    chat()
    programs = os.path.relpath(Path(sys.executable).parent)
    print(f"\n{time.time() - began:.0f} s in all. The curve is in {args.out / 'loss.png'}, the checkpoint in "
          f"{args.out / 'checkpoints'}.\n\n" + NEXT.format(bin=programs, out=args.out), flush=True)


def train(args):
    """Two ranks of the command line, anew: an earlier demo's run goes, and nothing else does."""
    try:
        check_out_folder(RunFlags(out=args.out))
        with lock_run_directory(args.out):
            remove_run_files(args.out)
    except ValueError as error:
        sys.exit(f"demo: {error}")
    print(f"1. Training on two ranks for {args.seconds:.0f} s", flush=True)
    every = max(5, int(args.seconds))        # steps: the curve gets a few points of held-out bits per byte
    command = [sys.executable, "-m", "nanoinfra.cli", "train", "--model", "nano",
               "--dtype", "bfloat16", "--dp", "2", "--micro-batch", "8",
               "--max-seconds", str(args.seconds), "--eval-every", str(every),
               "--save-every", str(every), "--out", str(args.out)]
    with subprocess.Popen(command) as run:
        stop = SignalListener(run.send_signal)      # it saves, and says how to go on
        stop.start()
        code = run.wait()
        stop.stop()
    if code or (args.out / STOP_NOTE_FILE).exists():
        sys.exit(code)
    lines = metrics_and_plots.read_metrics(args.out / "metrics.jsonl")
    tokens = sum(line["tokens"] for line in lines)
    print(f"   {len(lines)} steps, {tokens:,} tokens: loss {lines[0]['loss']:.2f} -> "
          f"{lines[-1]['loss']:.2f}, held out {lines[-1]['held_out_bpb']:.3f} bits per byte")


def complete(args):
    """What share of held-out headers becomes a whole function, trained and untrained."""
    torch.set_num_threads(1)                 # matrices this small gain nothing from a second thread
    trained, text, _ = load_pretrained(args.out)
    untrained = init_weights(Decoder(trained.config), seed=0)
    prompts = headers(args.headers)
    print(f"\n2. Completing {len(prompts)} function headers it has never seen", flush=True)
    shares, shown = {}, None
    for name, model in (("trained", trained), ("untrained", untrained)):
        written = [complete_one(model, text, prompt, seed) for seed, prompt in enumerate(prompts)]
        shares[name] = sum(is_whole(function) for function in written) / len(written)
        shown = shown or next(filter(is_whole, written), written[0])
    print("\n".join("   | " + line for line in shown.splitlines()))
    print(f"   whole functions of at least {STATEMENTS} statements: trained {shares['trained']:.0%}, "
          f"untrained {shares['untrained']:.0%}")


def headers(count):
    """The first `count` one-line headers of top-level functions in the held-out files, one a file in turn."""
    found = [re.findall(r"^def \w+\([^()\n]*\):\n", document.text, re.M)
             for document in load_corpus().held_out]
    turns = range(max(map(len, found)))
    return [functions[turn] for turn in turns for functions in found if turn < len(functions)][:count]


def complete_one(model, text, prompt, seed):
    """The function that `prompt` begins, as the model writes it, cut at the last complete line."""
    prompt = prompt.rstrip()                 # the model has learned line end and indent as one token
    ids = text.encode(prompt)
    new = list(generate(model, ids, NEW_TOKENS, temperature=0.5, top_k=40, seed=seed,
                        eos_token_ids=text.eos_token_ids))
    written = prompt + text.decode(new)
    if len(new) == NEW_TOKENS:               # it was cut off: the last line is a part of one
        written = written.rpartition("\n")[0] + "\n"
    first, *rest = written.splitlines(keepends=True)
    body = re.match(r"(?:[ \t]+.*\n?|\s*\n)*", "".join(rest)).group()  # up to the next line not indented
    return (first + body).rstrip() + "\n"


def is_whole(function):
    """Does it parse, as one function of at least so many statements?"""
    try:
        body = ast.parse(function).body
    except (SyntaxError, ValueError):        # a null byte is a ValueError
        return False
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(body[0])) - 1 if body else 0
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef) and statements >= STATEMENTS


def chat():
    """A real model answers, with the same decoder and the same generate."""
    print(f"\n3. SmolLM2-135M, asked: {QUESTION}\n   ", end="", flush=True)
    answer(GenerateOptions("smollm2-135m", QUESTION, chat=True, max_new_tokens=80, dtype="bfloat16"),
           write=lambda piece: print(piece.replace("\n", "\n   "), end="", flush=True))


if __name__ == "__main__":
    SignalListener(exit_immediately).start()
    main()
