"""Draw README's picture from a real run: data parallelism in three steps on an emulated wire.

    python scripts/figures.py            writes lessons/results/data_parallel.png

Two ranks; a small decoder whose every block's backward takes 12 ms (it sleeps, so two cores are enough), and
a wire of 0.5 ms and 60 MB/s. What is drawn are the spans of the ranks' own ledgers.
"""
import sys
import time
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from nanoinfra.config import ModelConfig
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.lab.draw import BLUE, GREY, MATPLOTLIB_STYLE, ORANGE
from nanoinfra.model.decoder import Decoder
from nanoinfra.parallel.data_parallel import GRAD_SYNC_MODES, DataParallel
from nanoinfra.train.loss import linear_cross_entropy

CONFIG = ModelConfig(vocab=521, width=96, layers=6, heads=4, kv_heads=2, head_dim=24, hidden=256, context=32)
WIRE, COMPUTE, BUCKET = {"dp": (0.5e-3, 60e6)}, 0.012, 400_000


def step(how):
    """One step on this rank: ([begin, end] of each block's backward, ledger rows), seconds from the first."""
    mesh = Mesh(dp=2)
    model, compute = Decoder(CONFIG), []

    def sleep(module, *_):
        begin = time.monotonic()
        time.sleep(COMPUTE)
        compute.append((begin, time.monotonic()))
    for block in model.blocks:
        block.register_full_backward_pre_hook(sleep)
    shared = DataParallel(model, mesh.data, how, bucket_bytes=BUCKET)
    x = torch.randint(CONFIG.vocab, (2, 32))
    for _ in range(2):                       # the first warms up
        compute.clear()
        mesh.comm_log.take_records()
        shared.zero_grad()
        shared.prepare_for_backward(is_last=True)
        linear_cross_entropy(model.hidden_states(x), model.head.weight, x, 128).backward()
        shared.finish_grad_sync()
    rows, start = mesh.comm_log.take_records(), compute[0][0]
    return ([(a - start, b - start) for a, b in compute],
            [(r.start_time - start, r.end_time - start, r.wait_seconds) for r in rows])


def draw(results):
    with rc_context(MATPLOTLIB_STYLE):
        figure = Figure(figsize=(9, 5), layout="constrained")
        every = figure.subplots(3, sharex=True)
    titles = ("one all-reduce a parameter", "buckets, after backward", "buckets, while backward goes on")
    for axes, how, title in zip(every, GRAD_SYNC_MODES, titles):
        compute, rows = results[how]
        exposed = sum(wait for *_, wait in rows)
        axes.barh([0] * len(compute), [(b - a) * 1e3 for a, b in compute], left=[a * 1e3 for a, _ in compute],
                  color=GREY, height=0.6, edgecolor="white")
        free = 0.0
        for begin, end, wait in rows:        # transfers queue for the wire: one begins when the last one ends
            start, free = max(begin, free), end
            axes.barh(1, (end - start) * 1e3, left=start * 1e3, color=BLUE, height=0.6, edgecolor="white")
            shown = min(wait, end - start)
            axes.barh(1, shown * 1e3, left=(end - shown) * 1e3, color=ORANGE, height=0.6, edgecolor="white")
        axes.set_title(f"{title}: {len(rows)} calls, {exposed * 1e3:.0f} ms of waiting exposed (timed)")
        axes.set_yticks([0, 1], ["backward", "wire"])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
    every[0].bar(0, 0, color=BLUE, label="hidden: the rank works on")
    every[0].bar(0, 0, color=ORANGE, label="exposed: the rank stands waiting")
    every[0].legend(loc="upper right", fontsize=10, frameon=False)
    every[-1].set_xlim(left=0)
    every[-1].set_xlabel("ms since backward began, rank 0 of 2")
    return figure


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "lessons/results/data_parallel.png")
    with RankPool(2, emulated_links=WIRE) as ranks:
        results = {how: ranks.run(step, how)[0] for how in GRAD_SYNC_MODES}
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(out, dpi=130)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
