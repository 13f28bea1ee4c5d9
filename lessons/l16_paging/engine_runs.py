"""Serve a trace of requests with the real engine, with the logging scheduler of replay.py."""
import time
from collections.abc import Sequence

from lessons.l16_paging.replay import LoggingScheduler, TraceRequest, step_through_trace
from nanoinfra.model.decoder import Decoder
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams


def serve_trace(model: Decoder, jobs: Sequence[TraceRequest], blocks: int, size: int, static: int = 0,
                watched: type[LoggingScheduler] = LoggingScheduler,
                **limits) -> tuple[Engine, list[list[int]], float]:
    """Serve `jobs` greedily; returns (the engine, the tokens of each request, seconds) once all have ended.

    `static` is the size of static batches, `watched` the class of the scheduler.
    """
    engine, said = Engine(model, num_blocks=blocks, block_size=size), [[] for _ in jobs]
    engine.scheduler = watched(engine.block_pool, **limits)

    def add(i):
        engine.add_request(Request(str(i), list(jobs[i].tokens), SamplingParams(temperature=0), jobs[i].new))

    def step():
        for event in engine.step():
            said[int(event.request_id)] += event.token_ids
    begin = time.perf_counter()
    step_through_trace(jobs, engine.scheduler, add, step, static)
    return engine, said, time.perf_counter() - begin
