"""The same trace through the real engine: what it says, and the log of its scheduler (replay.py's)."""
import time
from collections.abc import Sequence

from lessons.l16_paging.replay import Job, Watched, drive
from nanoinfra.model.decoder import Decoder
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.requests import Request, Sampling


def serve(model: Decoder, jobs: Sequence[Job], blocks: int, size: int, static: int = 0,
          watched: type[Watched] = Watched, **limits) -> tuple[Engine, list[list[int]], float]:
    """(the engine, its `scheduler` with a log; the greedy tokens of each job; seconds) once all have ended.

    `static`: seats of a batch that starts when the last one has ended. `watched` plans the steps.
    """
    engine, said = Engine(model, blocks=blocks, size=size), [[] for _ in jobs]
    engine.scheduler = watched(engine.blocks, **limits)

    def add(i):
        engine.add(Request(str(i), list(jobs[i].tokens), Sampling(temperature=0), jobs[i].new))

    def step():
        for event in engine.step():
            said[int(event.request)] += event.tokens
    begin = time.perf_counter()
    drive(jobs, engine.scheduler, add, step, static)
    return engine, said, time.perf_counter() - begin
