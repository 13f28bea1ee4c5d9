"""Large models on clusters of their time: for each mesh what a GPU holds, idles and sends, by the formulas.

`gpt3_on` is modelled altogether: A100s at half of their peak, 300 GB/s each way inside a node of eight, 25
GB/s between nodes, as Narayanan et al. 2021 had them. `bloom_trials` puts formulas beside what BigScience
timed on 48 such nodes before BLOOM was trained (25 February 2022; github.com/bigscience-workshop/bigscience,
train/tr11-176B-ml/chronicles-prequel.md).
"""
from math import ceil

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.collectives import ring_bytes
from nanoinfra.formulas.flops import train_flops
from nanoinfra.formulas.parameters import parameters
from nanoinfra.formulas.pipeline import bubble
from nanoinfra.formulas.traffic_by_axis import sent
from nanoinfra.lab.display_table import DisplayTable

GPT3 = ModelConfig(51200, 12288, 96, 96, 96, 128, 4 * 12288, 2048, family="gpt2")
BATCH, TOKENS = 1536, 300e9                  # sequences of a step, tokens of the training
SPEED, NODE, NET, MEMORY = 156e12, 300e9, 25e9, 80e9                     # FLOP/s, bytes/s twice, bytes
COLUMNS = ("pp x dp x tp", "in a node", "states", "idle", "computes and idles", "waits on pp", "on dp",
           "on tp", "300 billion tokens")
BLOOM = ModelConfig(250880, 14336, 72, 64, 64, 224, 4 * 14336, 2048, family="bloom")     # 181 billion
TRIALS = {                                   # pp, dp, tp, micro-batch: GB in use, seconds of a step
    (1, 48, 8, 1): ("", "out of memory"), (2, 24, 8, 2): (76, 136.13), (6, 8, 8, 4): (55, 114.11),
    (12, 4, 8, 4): (49, 117.07), (6, 16, 4, 2): (57, 111.71), (12, 8, 4, 2): (44, 110.48),
    (24, 4, 4, 1): ("", 130.60), (6, 32, 2, 2): ("", "out of memory"), (12, 16, 2, 2): (63, 112.50)}


def gpt3_on(pp: int = 1, dp: int = 1, tp: int = 1, inside: str = "", zero: int = 1) -> tuple[str, ...]:
    """A row of `COLUMNS`: a step of GPT-3 on a mesh whose axis `inside` lies inside the nodes.

    Micro-batches are of one sequence; ZeRO, stage 1 or 3, cuts over dp. Activations are left out, and nothing
    is hidden behind compute.
    """
    mesh, m, psi = f"{pp} x {dp} x {tp}", ceil(BATCH / dp), parameters(GPT3) / pp / tp
    try:
        on = wires(GPT3, pp, dp, tp, 1, m)
    except ValueError as refused:
        return mesh, "", "", "", "", "", "", "", str(refused)
    on["dp"] *= 1.5 * m if zero == 3 else 1                              # 3 m Psi / 2 Psi
    waits = [size / (NODE if axis == inside else NET) for axis, size in on.items()]
    compute = train_flops(GPT3, BATCH, GPT3.context) / (pp * dp * tp) / SPEED / (1 - bubble(pp, m))
    states = psi * (16 / dp if zero == 3 else 4 + 12 / dp)
    days = (compute + sum(waits)) * TOKENS / BATCH / GPT3.context / 86400
    return (mesh, inside, f"{states / 1e9:.0f} GB", f"{bubble(pp, m):.0%}", f"{compute:.0f} s",
            *(f"{s:.1f} s" for s in waits), f"{days:,.0f} days" if states < MEMORY else "out of memory")


def bloom_trials() -> DisplayTable:
    """The trials, ZeRO-1 and full recompute: by formula all but the last two columns."""
    rows = []
    for (pp, dp, tp, batch), timed in TRIALS.items():
        m = 2048 // (dp * batch)
        on = wires(BLOOM, pp, dp, tp, batch, m, recompute="full")
        states = parameters(BLOOM) / pp / tp * (4 + 12 / dp)
        rows.append((f"{pp} x {dp} x {tp}", str(batch), f"{bubble(pp, m):.0%}", f"{states / 1e9:.0f}",
                     *(f"{size / 1e9:,.0f}" for size in on.values()), *map(str, timed)))
    columns = ("pp x dp x tp", "micro-batch", "idle", "GB of states", "GB sent on pp", "on dp",
               "on tp (in a node)", "GB in use", "s a step")
    return DisplayTable("BLOOM before its training: formulas, and at the right what BigScience timed",
                        columns, rows)


def wires(config: ModelConfig, pp: int, dp: int, tp: int, batch: int, micro_batches: int,
          recompute: str = "none") -> dict[str, float]:
    """{axis: bytes} that a GPU in the middle of the pipeline sends in rings in a step, 16 bits a number."""
    on = sent(config, pp, dp, tp, batch, config.context, micro_batches, 2, pp // 2, recompute=recompute)
    return {"pp": ring_bytes("send", on["pp"], pp), "dp": ring_bytes("all_reduce", on["dp"], dp),
            "tp": ring_bytes("all_reduce", on["tp"], tp)}
