"""Stages together are the model: gradients in float64, what is sent and kept, and time on the clock."""
import functools
from dataclasses import replace

import pytest
import torch

from lessons.l06_pipeline.figures import measured_timeline
from lessons.l06_pipeline.measurements import rehearse_schedule
from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas import pipeline as formulas
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.pipeline.schedules import build_pipeline_schedule
from nanoinfra.parallel.pipeline.simulator import simulate_schedule
from nanoinfra.parallel.pipeline.stage import cut_to_pipeline_chunk
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.optimizer import unscale_and_clip_grads
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage
from tests.parity import assert_same_gradients

V, C, T = 61, 12, 9
MICROS = 1, 3, 4, 8
CASES = [(pp, kind, v) for pp in (2, 4) for kind, v in (("gpipe", 1), ("1f1b", 1), ("zb-h1", 1),
                                                        ("interleaved", 2))]
TIMES, SLOT = (3, 4, 3), 0.01                # slots of s: forward, backward to the input, to the weights


def config(family, tied=True):
    return ModelConfig(V, C, 8, 2, 1 if family != "gpt2" else 2, 6, 20, 16, tied, family)


def batches(m):
    """m micro-batches of one or two samples, with valid tokens that differ."""
    rng = torch.Generator().manual_seed(m)
    made = []
    for k in range(m):
        x, y = torch.randint(V, (2, 1 + k % 2, T), generator=rng)
        y[0, :k % T] = IGNORE_INDEX
        made.append(Batch(x, y))
    return made, sum(batch.num_valid_targets for batch in made)


def one_step(cfg, mesh, kind, v, micros):
    """For each m {loss, norm, gradients, bytes sent, most micro-batches kept} of one rank."""
    flags = make_train_flags(dtype="float64", pp=mesh.pp.size, schedule=kind, virtual_stages=v)
    replica, found = TrainStage(cfg, flags, mesh), {}
    for m in micros:
        given, count = batches(m)
        mesh.comm_log.take_records()
        replica.begin_step(given, count)
        most = 0
        for what in replica.build_step_schedule(m)[:-1]:                              # all but the step
            execute_schedule([what], replica)
            most = max(most, len(replica._saved_for_backward))
        rows = [row for row in mesh.comm_log.take_records() if row.op == "send"]
        grads = {name: grad.clone() for name, grad in replica.grads.items()}
        norm = unscale_and_clip_grads(dict(replica.grads), 0, axes=replica.parallel_model.grad_norm_axes(),
                                      counted_in_norm=replica.parallel_model.counted_in_norm)
        found[m] = {"loss": replica.loss.item(), "norm": norm, "grads": grads, "most": most,
                    "sent": sum(row.payload_bytes for row in rows),
                    "left": (replica._pending_recvs, replica._ready_to_send, replica._pending_sends)}
    return found


def on_a_rank(cfg, pp, kind, v, micros):
    return one_step(cfg, Mesh(pp=pp), kind, v, micros)


@functools.cache
def alone(cfg):
    return one_step(cfg, Mesh(), "1f1b", 1, MICROS)


@pytest.mark.parametrize("family, tied", [("llama", True), ("gpt2", False)])
@pytest.mark.parametrize("pp, kind, v", CASES)
def test_gradients_match_one_rank(ranks, pp, kind, v, family, tied):
    cfg = config(family, tied)
    micros = [m for m in MICROS if kind != "interleaved" or m % pp == 0]
    results = ranks(pp).run(on_a_rank, cfg, pp, kind, v, micros)
    for m in micros:
        want, got = alone(cfg)[m], [result[m] for result in results]
        assert sum(one["loss"] for one in got) == pytest.approx(want["loss"], rel=1e-12)
        for one in got:
            assert one["norm"] == pytest.approx(want["norm"], rel=1e-12)
            for name, grad in one["grads"].items():                        # a tied weight's at both ends
                torch.testing.assert_close(grad, want["grads"][name], rtol=1e-9, atol=1e-12)
        merged = {name: grad for one in got for name, grad in one["grads"].items()}
        assert_same_gradients(merged, want["grads"], where=f"{kind} pp {pp} m {m}")
        assert sum(len(one["grads"]) for one in got) == len(parameter_shapes(cfg)) + tied


@pytest.mark.parametrize("kind, v", [("1f1b", 1), ("interleaved", 2)])
def test_a_head_that_stands_alone_is_the_last_chunk_s_and_no_other_s(ranks, kind, v):
    cfg = replace(config("llama"), vocab=2000, layers=4)
    assert formulas.split_layers_into_chunks(cfg, 2 * v, cfg.context)[-1] == (4, 4)
    results = [result[4] for result in ranks(2).run(on_a_rank, cfg, 2, kind, v, [4])]
    want = one_step(cfg, Mesh(), "1f1b", 1, [4])[4]
    merged = {name: grad for one in results for name, grad in one["grads"].items()}
    assert_same_gradients(merged, want["grads"], where=kind)
    assert all(one["norm"] == pytest.approx(want["norm"], rel=1e-12) for one in results)


@pytest.mark.parametrize("pp, kind, v", CASES)
def test_it_sends_and_keeps_what_the_formulas_say(ranks, pp, kind, v):
    cfg, m = config("llama"), 4
    got = [result[m] for result in ranks(pp).run(on_a_rank, cfg, pp, kind, v, [m])]
    both = [formulas.pipeline_sent_bytes_per_stage(cfg, pp, m // 2, size, T, 8, v)
            for size in (1, 2)]                                              # half have two samples
    assert [one["sent"] for one in got] == [a + b for a, b in zip(*both)]
    assert [one["most"] for one in got] == [formulas.predicted_micro_batches_in_flight(kind, pp, r, m,
                                                                                       v) for r in range(pp)]
    assert all(one["left"] == ({}, {}, {}) for one in got)


def test_chunks_keep_the_names_and_share_them_out():
    for tied in (True, False):
        cfg = config("gpt2", tied)
        parts = [cut_to_pipeline_chunk(decoder_on_meta_device(cfg),
                                       *border) for border in formulas.split_layers_into_chunks(cfg, 4, T)]
        named = [[name for name, _ in part.named_parameters()] for part in parts]
        assert sorted(name for names in named for name in names) == sorted(
            [*parameter_shapes(cfg), *(["embed.weight"] if tied else [])])
        assert [any("norm." in name and "blocks" not in name for name in names) for names in named] == [
            False, False, False, True]
        assert all(tuple(p.shape) == parameter_shapes(cfg)[name] for part in parts
                   for name, p in part.named_parameters())
    untied = replace(config("llama"), tied=False)
    assert "embed.weight" not in dict(cut_to_pipeline_chunk(decoder_on_meta_device(untied), 6,
                                                            8).named_parameters())


@pytest.mark.timed
@pytest.mark.parametrize("kind, v", [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 2)])
def test_stages_work_at_the_same_time(ranks, kind, v):
    overlaps(ranks, 4, kind, v, [4])


@pytest.mark.prove
@pytest.mark.parametrize("pp, kind, v", CASES)
def test_every_schedule_works_at_the_same_time(ranks, pp, kind, v):
    ms = [m for m in MICROS if kind != "interleaved" or m % pp == 0]
    overlaps(ranks, pp, kind, v, ms)


def overlaps(ranks, pp, kind, v, ms):
    """Wall time within 8 % of the clock's, where stages sleep: two cores hold any number of sleepers."""
    for m in ms:
        lists = build_pipeline_schedule(kind, pp, m, v)
        stages = ranks(pp).run(rehearse_schedule, lists, TIMES, SLOT, repeats=3)
        walls = sorted(measured_timeline([real for real, _ in trial]).step_seconds for trial in zip(*stages))
        want = simulate_schedule(lists, *(t / v * SLOT for t in TIMES)).step_seconds
        print(f"{kind} pp {pp} m {m}: {want * 1e3:.1f} ms by the clock, {walls[1] * 1e3:.1f} timed")
        assert walls[1] == pytest.approx(want, rel=0.08), (kind, pp, m, walls)
