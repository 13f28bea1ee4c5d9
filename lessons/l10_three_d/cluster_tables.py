"""Tables of GPT-3 and BLOOM on clusters: what a GPU holds, how long it idles and what it sends, by mesh.

`gpt3_on_mesh` is modelled: A100s at half of their peak, 300 GB/s each way inside a node of eight, 25 GB/s
between nodes (Narayanan et al. 2021). `bloom_trials_table` puts formulas beside what BigScience timed on 48
such nodes before BLOOM was trained (25 February 2022; github.com/bigscience-workshop/bigscience,
train/tr11-176B-ml/chronicles-prequel.md).
"""
from math import ceil

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.collectives import ring_bytes_per_rank
from nanoinfra.formulas.communication_by_axis import step_bytes_by_axis
from nanoinfra.formulas.flops import forward_backward_flops
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.pipeline import pipeline_bubble_fraction
from nanoinfra.lab.display_table import DisplayTable

GPT3 = ModelConfig(51200, 12288, 96, 96, 96, 128, 4 * 12288, 2048, family="gpt2")
_GPT3_BATCH, _GPT3_TOKENS = 1536, 300e9                  # sequences of a step, tokens of the training
# FLOP/s, bytes/s twice, bytes
_A100_FLOPS_PER_SECOND = 156e12              # half of its peak
_NVLINK_BYTES_PER_SECOND = 300e9             # each way, inside a node of eight
_NETWORK_BYTES_PER_SECOND = 25e9             # between nodes
_A100_MEMORY_BYTES = 80e9
GPT3_COLUMNS = ("pp x dp x tp", "in a node", "states", "idle", "computes and idles", "waits on pp", "on dp",
                "on tp", "300 billion tokens")
BLOOM = ModelConfig(250880, 14336, 72, 64, 64, 224, 4 * 14336, 2048, family="bloom")     # 181 billion
BLOOM_TRIALS = {                                   # pp, dp, tp, micro-batch: GB in use, seconds of a step
    (1, 48, 8, 1): ("", "out of memory"), (2, 24, 8, 2): (76, 136.13), (6, 8, 8, 4): (55, 114.11),
    (12, 4, 8, 4): (49, 117.07), (6, 16, 4, 2): (57, 111.71), (12, 8, 4, 2): (44, 110.48),
    (24, 4, 4, 1): ("", 130.60), (6, 32, 2, 2): ("", "out of memory"), (12, 16, 2, 2): (63, 112.50)}


def gpt3_on_mesh(pp: int = 1, dp: int = 1, tp: int = 1, inside: str = "", zero: int = 1) -> tuple[str, ...]:
    """A row of `GPT3_COLUMNS`: a training step of GPT-3 on a mesh whose axis `inside` lies inside the nodes.

    A micro-batch is one sequence. ZeRO, stage 1 or 3, shards over dp. Activations are left out, and no
    communication is hidden behind compute.
    """
    mesh, m, psi = f"{pp} x {dp} x {tp}", ceil(_GPT3_BATCH / dp), parameter_count(GPT3) / pp / tp
    try:
        on = ring_bytes_by_axis(GPT3, pp, dp, tp, 1, m)
    except ValueError as refused:
        return mesh, "", "", "", "", "", "", "", str(refused)
    on["dp"] *= 1.5 * m if zero == 3 else 1                              # 3 m Psi / 2 Psi
    waits = [size / (_NVLINK_BYTES_PER_SECOND if axis == inside else _NETWORK_BYTES_PER_SECOND)
             for axis, size in on.items()]
    flops = forward_backward_flops(GPT3, _GPT3_BATCH, GPT3.context) / (pp * dp * tp)
    compute = flops / _A100_FLOPS_PER_SECOND / (1 - pipeline_bubble_fraction(pp, m))
    states = psi * (16 / dp if zero == 3 else 4 + 12 / dp)
    days = (compute + sum(waits)) * _GPT3_TOKENS / _GPT3_BATCH / GPT3.context / 86400
    verdict = f"{days:,.0f} days" if states < _A100_MEMORY_BYTES else "out of memory"
    return (mesh, inside, f"{states / 1e9:.0f} GB", f"{pipeline_bubble_fraction(pp, m):.0%}",
            f"{compute:.0f} s",
            *(f"{s:.1f} s" for s in waits), verdict)


def bloom_trials_table() -> DisplayTable:
    """BLOOM's trials with ZeRO-1 and full recompute. All columns but the last two are by formula."""
    rows = []
    for (pp, dp, tp, batch), timed in BLOOM_TRIALS.items():
        m = 2048 // (dp * batch)
        on = ring_bytes_by_axis(BLOOM, pp, dp, tp, batch, m, recompute="full")
        states = parameter_count(BLOOM) / pp / tp * (4 + 12 / dp)
        rows.append((f"{pp} x {dp} x {tp}", str(batch), f"{pipeline_bubble_fraction(pp, m):.0%}",
                     f"{states / 1e9:.0f}",
                     *(f"{size / 1e9:,.0f}" for size in on.values()), *map(str, timed)))
    columns = ("pp x dp x tp", "micro-batch", "idle", "GB of states", "GB sent on pp", "on dp",
               "on tp (in a node)", "GB in use", "s a step")
    return DisplayTable("BLOOM before its training: formulas, and at the right what BigScience timed",
                        columns, rows)


def ring_bytes_by_axis(config: ModelConfig, pp: int, dp: int, tp: int, batch: int, micro_batches: int,
                       recompute: str = "none") -> dict[str, float]:
    """{axis: bytes} that a GPU of a middle pipeline stage sends in a step, by ring collectives in 16 bits."""
    on = step_bytes_by_axis(config, pp, dp, tp, batch, config.context, micro_batches, 2, pp // 2,
                            recompute=recompute)
    return {"pp": ring_bytes_per_rank("send", on["pp"], pp),
            "dp": ring_bytes_per_rank("all_reduce", on["dp"], dp),
            "tp": ring_bytes_per_rank("all_reduce", on["tp"], tp)}
