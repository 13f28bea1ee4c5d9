"""Lab 16: one trace served on N ranks under three policies: steps, messages, bytes, and memory by block.

    make lab L=16 N=2                          static batches, Orca, pages
    make lab L=16 N=2 BREAK=all-heads          the same with a mistake in it

A LLaMA with 8 query and 4 KV heads, cut over all N ranks, serves 32 requests greedily, in float32. The real
engine does it three times, in KV memory for as many tokens: in stretches of the longest sequence, filled when
the last batch has ended (static) or when one is free (Orca), and in blocks (pages). Steps, collectives,
payload and what sequences leave empty are counted, tokens/s timed. The handout: handout.md.
"""
import contextlib
from dataclasses import replace
from unittest import mock

import torch

from lessons.l16_paging.engine_runs import serve_trace
from lessons.l16_paging.replay import LoggingScheduler, random_trace, trace_sizes
from nanoinfra.config import config_for_size
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas import paged_kv_memory
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.formulas.parameters import parameter_count, parameter_shapes
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, median_of_times
from nanoinfra.lab.predict import format_quantity
from nanoinfra.model.initialization import draw_initial_tensor
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.parallelize import parallelize_for_serving
from nanoinfra.serve.engine.paged_attention import PagedKVCache

WAYS = ("static", "orca", "pages")
UNITS = {"steps": "steps", "calls": "calls", "bytes": "B"}
PREDICTIONS = {**{f"L16.lab_{what}_{way}": unit for what, unit in UNITS.items() for way in WAYS},
               "L16.lab_waste_whole": "tokens", "L16.lab_waste_pages": "tokens", "L16.lab_memory": "B"}
QUESTIONS = ("Which of the three policies would you give more memory, and what would it do with it?",
             "Which of your predictions was furthest off, and what had you not thought of?",
             "Which row exposed your break, and what would a user of the server have noticed?")
BREAKS = ("batches-after-all", "no-cache", "coarse-blocks", "all-heads")
MODELS = ("nano", "test", "micro", "small")
LONGEST, SEATS, SIZE = 96, 6, 8              # tokens of a sequence; stretches that fit; tokens of a block
PLACES, VOCAB, BYTES, REPEATS = SEATS * LONGEST, 257, 4, 3           # float32
JOBS = random_trace(32, LONGEST, gap=1.0, seed=2)
TRACE = trace_sizes(JOBS)                        # (arrival, prompt, new) of each


def measure(mesh, model, broken=""):
    """{key: Measurement}: steps, collectives, bytes, what is left empty, memory of a rank; tokens/s."""
    config, found, rows, said = shape(model), {}, [], {}
    mesh = Mesh(tp=mesh.world.size, device=mesh.device)
    net = parallelize_for_serving(decoder_on_meta_device(config), mesh, drawn(config), torch.float32)
    for way in WAYS:
        if mesh.rank == 0:
            print(f"{way} ...", flush=True)
        engine, said[way], sent, speeds = served(mesh, net, way, broken)
        log, calls, size = engine.scheduler, *map(sum, zip(*sent.values(), (0, 0)))
        found |= {f"steps_{way}": counted(log.steps, "steps"), f"calls_{way}": counted(calls, "calls"),
                  f"bytes_{way}": counted(size, "B"), f"speed_{way}": median_of_times(speeds, "tokens/s"),
                  f"waste_{way}": counted(sum(log.left.values()), "tokens")}
        most = max(len(step.work) for step in log.log)
        rows += [(way, tag, str(calls), format_quantity(size, "B"), str(most),
                  f"{log.computed / log.steps:.1f}",
                  str(sum(a != b for a, b in zip(said[way], said["static"]))))
                 for tag, (calls, size) in sorted(sent.items()) or [("none", (0, 0))]]
    found["waste_whole"] = found.pop("waste_orca")
    found["memory"] = counted(engine.kv_cache.kv_memory.untyped_storage().nbytes(), "B")
    if mesh.rank == 0:
        show(config, mesh.tp.size, rows)
    return {f"L16.lab_{key}": found[key] for key in sorted(found, key=order) if key != "waste_static"}


def expect(n, model):
    """{key: number} by formula, on n ranks: all that is counted."""
    config, want = shape(model), {}
    kept = [paged_kv_memory.kv_tokens_at_end(prompt, new) for _, prompt, new in TRACE]
    steps = {"static": paged_kv_memory.static_batching_steps(TRACE, SEATS),
             "orca": paged_kv_memory.continuous_batching_steps(TRACE, SEATS),
             "pages": paged_kv_memory.unlimited_batching_steps(TRACE)}
    for way in WAYS:
        answered = sum(new for *_, new in TRACE)
        sent = paged_kv_memory.tp_serving_collectives(config, n, steps[way], sum(kept), answered, BYTES)
        calls, size = map(sum, zip(*sent.values()))
        want |= {f"steps_{way}": steps[way], f"calls_{way}": calls, f"bytes_{way}": size}
    want["waste_whole"] = sum(LONGEST - tokens for tokens in kept)
    want["waste_pages"] = sum(paged_kv_memory.unused_slots_in_last_block(tokens, SIZE) for tokens in kept)
    want["memory"] = PLACES * kv_cache_bytes_per_token(config, BYTES, n)
    return {f"L16.lab_{key}": value for key, value in want.items()}


def shape(model):
    """A LLaMA in the width and depth of a size, with heads for 8 ranks, of which 4 have keys and values."""
    size = config_for_size(model)
    return replace(size, family="llama", heads=8, kv_heads=4, head_dim=size.width // 8, vocab=VOCAB,
                   context=LONGEST, tied=False)


def drawn(config):
    """`read(name, box)` of weights that are drawn by name, the same on any number of ranks."""
    every = parameter_shapes(config)
    return lambda name, box=(): draw_initial_tensor(name, every[name], config.layers, seed=0)[box]


def served(mesh, net, way, broken):
    """(the engine, what was said, {tag: (collectives, payload)} on this rank, [tokens/s]) of one policy."""
    size = LONGEST if way != "pages" else SIZE * (2 if broken == "coarse-blocks" else 1)
    seats = SEATS if way == "static" or broken == "batches-after-all" else 0
    watched, speeds = Forgetful if broken == "no-cache" else LoggingScheduler, []
    repeats = REPEATS if mesh.device == "cuda" or mesh.tp.size < 4 else 1          # of ranks that share cores
    with all_heads() if broken == "all-heads" else contextlib.nullcontext():
        for _ in range(repeats):
            comm.barrier(mesh.tp)
            mesh.comm_log.take_records()
            engine, said, seconds = serve_trace(net, JOBS, PLACES // size, size, seats, watched)
            rows = [row for row in mesh.comm_log.take_records() if row.tag in ("layers", "ends")]
            speeds.append(sum(map(len, said)) / seconds)
    sent = {tag: (len(mine), sum(row.payload_bytes for row in mine)) for tag in ("layers", "ends")
            if (mine := [row for row in rows if row.tag == tag])}
    return engine, said, sent, speeds


class Forgetful(LoggingScheduler):
    """Computes a sequence from its beginning in every step, as if there were no cache."""

    def schedule(self):
        for sequence in self.running:
            sequence.num_computed_tokens = 0
        return super().schedule()


def all_heads():
    """Every rank keeps room for the keys and values of all heads, and uses its own."""
    begin = PagedKVCache.__init__

    def roomy(kv, model, n, size):
        begin(kv, model, n, size)
        layers, mine, *rest = kv.kv_memory.shape
        kv.kv_memory = kv.kv_memory.new_zeros(layers, 2 * model.config.kv_heads, *rest)[:, :mine]
    return mock.patch.object(PagedKVCache, "__init__", roomy)


def show(config, n, rows):
    """What each policy sent, and how full its batches were."""
    print(f"{parameter_count(config):,} parameters, {config.heads} query and {config.kv_heads} KV heads, "
          f"over {n} rank{'s' if n > 1 else ''}; {len(JOBS)} requests, KV memory for {PLACES} tokens")
    DisplayTable("the whole trace",
                 ("policy", "tag", "collectives", "payload", "most in a batch", "tokens a step",
                  "answers unlike static's"), rows).show()


def order(key):
    """The table's: steps, collectives, bytes, what is empty, memory, tokens/s."""
    return (*UNITS, "waste", "memory", "speed").index(key.partition("_")[0])
