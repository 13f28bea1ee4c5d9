"""Measure what ranks hold, send and wait for under ZeRO; the functions run inside each rank.

`measure_held_and_sent_bytes` takes a mixed-precision step (bfloat16 weights and gradients) of a decoder at a
stage of ZeRO. `run_layer_stack` takes steps of layers that sleep for as long as an accelerator would compute,
on an emulated link.
"""
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.lab.instruments.emulated_compute import emulate_compute_time
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.lab.measure import Measurement, median_of_times
from nanoinfra.model.decoder import Decoder
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.parallelize import fsdp_units
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from nanoinfra.parallel.zero import ZeroDataParallel
from nanoinfra.train.optimizer import MixedPrecisionOptimizer

STATE_KINDS = ("weights", "gradients", "masters", "moments")


def measure_held_and_sent_bytes(config: ModelConfig, stage: int, n: int, micro_batches: int = 2,
                                bucket_bytes: int = 1 << 14) -> tuple[dict[str, int], int, list]:
    """Run a step on one of n ranks: ({kind: most bytes held}, peak live bytes, communication records).

    Bytes held are counted after each backward and after the optimizer. The peak also has activations, buckets
    and gathered parameters. Stage 0 is plain data parallelism.
    """
    mesh, a = Mesh(dp=n, pp=world_size() // n), micro_batches
    x, y = torch.zeros(2, 1, 8, dtype=torch.long)
    with LiveTensorBytes() as storages:
        net, last, shared = _cut(config, mesh, stage, bucket_bytes)
        optimizer = MixedPrecisionOptimizer(shared.param_shards)
        storages.mark_module_boundaries(nn.ModuleList([net, last]), mesh.comm_log)
        mesh.comm_log.take_records()
        looks = [held_bytes_by_kind(net, shared, optimizer)]  # moments, from the first step on
        shared.zero_grad()
        for i in range(a):
            loss = last(net.hidden_states(x), y).sum() / (8 * n * a)
            shared.prepare_for_backward(is_last=i == a - 1)
            loss.backward()
            looks.append(held_bytes_by_kind(net, shared, optimizer))
        optimizer.step(shared.finish_grad_sync(), lr=1e-3)
        shared.all_gather_params()
        looks.append(held_bytes_by_kind(net, shared, optimizer))
    rows = [row for row in mesh.comm_log.take_records() if row.tag in ("grads", "weights")]
    return dict(zip(STATE_KINDS, map(max, *looks))), storages.peak_bytes, rows


def _cut(config, mesh, stage, bucket_bytes):
    net = Decoder(config)
    last = VocabParallelCrossEntropy(net.head)
    if stage == 0:
        return net, last, DataParallel(net.bfloat16(), mesh.data, "overlap", bucket_bytes)
    return net, last, ZeroDataParallel(net, mesh.data, stage, fsdp_units(net, last), torch.bfloat16,
                                       torch.bfloat16, bucket_bytes)


def held_bytes_by_kind(net: nn.Module, shared: DataParallel | ZeroDataParallel,
                       optimizer: MixedPrecisionOptimizer) -> list[int]:
    """Bytes of each of STATE_KINDS that this rank holds now. A freed parameter has none."""
    reducer = getattr(shared, "reducer", shared)
    filling = [bucket.flat_grads for bucket in reducer.buckets if bucket.flat_grads is not None]
    rows = reducer.grads.values() if isinstance(shared, ZeroDataParallel) else ()  # of what has arrived
    moments = [m for name, m in optimizer.state_dict().items() if name.startswith("exp_avg")]
    weights = {s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in net.parameters())}
    return [sum(weights.values()),
            *(sum(t.nbytes for t in ts) for ts
              in ([*filling, *rows], optimizer.master_weights.values(), moments))]


def run_layer_stack(cut: Callable, layers: int, width: int, seconds: float, wire: tuple[float, float],
                    repeats: int = 3) -> list[tuple[list, list]]:
    """Run steps of a layer stack on each rank: [(times when each layer is gathered and freed, records)].

    The layers are matrices (width, width) that take `seconds` in backward and half of that in forward.
    `cut(net, axis)` shards them, and returns the functions to call before forward and after backward.
    """
    mesh, trials = Mesh(dp=world_size(), emulated_links={"dp": wire}), []
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    emulate_compute_time(net, seconds)
    begin, finish = cut(net, mesh.data)
    times = [_clock(layer) for layer in net]
    for _ in range(repeats):
        begin()
        comm.barrier(mesh.data)
        mesh.comm_log.take_records()
        net(torch.ones(1, width)).sum().backward()
        finish()
        trials.append(([list(of) for of in times], mesh.comm_log.take_records()))
        for of in times:
            of.clear()
    return trials


def _clock(layer):
    """A list that fills with the moments when the present hooks of `layer` are done."""
    times = []

    def now(*_):
        times.append(time.monotonic())

    def leaves(_, __, output):
        now()
        output.register_hook(now)
    layer.register_forward_pre_hook(now)
    layer.register_forward_hook(leaves)
    layer.weight.register_post_accumulate_grad_hook(now)
    return times


def exposed_wait(results: Sequence) -> Measurement:
    """The exposed wait, median over repeats, of the rank that waits least: it waits for the link alone."""
    return median_of_times([min(sum(row.wait_seconds for row in rows) for _, rows in each)
                            for each in zip(*results)])
