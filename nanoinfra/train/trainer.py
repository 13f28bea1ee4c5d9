"""The training loop, and the run around it.

The same seed, data and flags give the same losses on any mesh, to rounding: weights are drawn by name,
samples are dealt from one global order, the loss is normalised once.
"""
import json
import math
import time
from contextlib import contextmanager
from dataclasses import replace

import torch

from nanoinfra.data.loader import Loader
from nanoinfra.distributed import comm
from nanoinfra.distributed.cpu_threads import use_threads
from nanoinfra.distributed.host_memory import resident_peak
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.parameters import parameters
from nanoinfra.train import metrics
from nanoinfra.train.config import TrainFlags, check, micro_batches, parse_wire, peak_lr, plan_mesh, to_json
from nanoinfra.train.freeze import trained_parameters
from nanoinfra.train.launch.elastic_rank import is_rank
from nanoinfra.train.launch.memory_check import changed, check_memory, describe_memory
from nanoinfra.train.launch.signals import StopRequest
from nanoinfra.train.loss import count_valid
from nanoinfra.train.optimizer import learning_rate
from nanoinfra.train.run_directory.resume_check import changed_flags
from nanoinfra.train.run_directory.run_directory import RunDir
from nanoinfra.train.run_inputs import open_inputs
from nanoinfra.train.step import execute
from nanoinfra.train.train_stage import Replica


def train(flags: TrainFlags) -> list[dict]:
    """Train as `flags` say, on this rank of the run; returns the lines of metrics. Every rank calls it."""
    check(flags, world_size())
    check_memory(flags, world_size())
    wire = parse_wire(flags.mesh.wire)
    mesh = Mesh(**plan_mesh(flags.mesh, world_size()), wire=wire or None, device=flags.mesh.device,
                timeout=flags.run.timeout)
    use_threads(flags.mesh.threads)
    with RunDir(flags.run, mesh) as folder:
        run = Run(flags, mesh, folder)
        try:
            while run.going():
                batches = run.loader.next()
                seen = batches if run.speaks else ()
                valid, run.stopping = count_valid(seen, mesh.world, run.request.asked)
                run.replica.begin(batches, valid, run.learning_rate())
                spans = execute(run.replica.schedule(len(batches)), run.replica)
                run.report(valid, spans)
                if run.due(flags.run.save_every) or not run.going():
                    run.save()
            return run.end()
        finally:
            run.close()


class Run:
    """All that a run holds on one rank. `step` counts finished steps, `elapsed` is rank 0's clock."""

    def __init__(self, flags: TrainFlags, mesh: Mesh, folder: RunDir):
        self.flags, self.mesh, self.dir = flags, mesh, folder
        self.inputs = open_inputs(flags, self.mesh)
        self.replica = Replica(self.inputs.model, flags, self.mesh, self.inputs.read)
        self.speaks = self.mesh.tp.rank == 0 and self.mesh.pp.rank == self.mesh.pp.size - 1  # of a loss
        self.stopping = 0
        self.lines, self.spans, self.rows = [], [], []
        state = self.dir.begin(self.inputs, self.replica, flags)
        self.step, self.elapsed = state["step"], state.get("elapsed", 0.0)
        G = flags.data.global_batch or state.get("global_batch")         # a run keeps it on any mesh
        self.global_batch, _ = micro_batches(replace(flags.data, global_batch=G), self.mesh.data.size)
        self.dir.describe(flags, self.inputs)
        self.loader = self._open_loader(state["consumed"])
        self.first = self.mesh.rank == 0
        if self.first:
            self._introduce(state)
            self.log = metrics.Log(self.dir.path / "metrics.jsonl", self.step)
            if self.log.lost:
                self.dir.warn(self.log.lost)
            self.bar = metrics.Bar(flags.run.steps, flags.run.seconds, self.step, self.elapsed)
        self.request = StopRequest(lone=not is_rank())
        self.request.start()
        self.mesh.ledger.take()
        self.mark = time.monotonic()
        self.began = self.mark - self.elapsed

    def going(self) -> bool:
        """Is there another step? Every rank answers alike."""
        run = self.flags.run
        done = self.elapsed >= run.seconds if run.seconds else self.step >= run.steps
        return not (done or self.stopping)

    def learning_rate(self) -> float:
        """For the step about to be taken."""
        o, run = self.flags.optimizer, self.flags.run
        progress = self.elapsed / run.seconds if run.seconds else self.step / run.steps
        return learning_rate(self.step + 1, progress, o.warmup, peak_lr(self.flags), o.lr_schedule, o.min_lr)

    def due(self, every: int) -> bool:
        """Is this step one of each `every`? Never where that is 0."""
        return bool(every) and self.step % every == 0

    def report(self, valid: int, spans: list) -> None:
        """Agree on the finished step's numbers and write them; stop a run whose loss is no number."""
        self.step += 1
        clock = torch.tensor((time.monotonic() - self.began) * self.first, dtype=torch.float64)
        both = torch.stack([self.replica.loss * self.speaks, clock])     # summed over ranks: rank 0's clock
        loss, self.elapsed = comm.all_reduce(both, self.mesh.world, "scalars").tolist()
        self._check_finite(loss)
        now = time.monotonic()
        step_s, self.mark = now - self.mark, now
        line = {"step": self.step, "loss": loss, **self.replica.norm(), "lr": self.replica.lr,
                "tokens": valid, "step_s": step_s, "tokens_per_s": valid / step_s, "mfu": None,
                **self._resources(spans)}
        if self.inputs.held_out and (self.due(self.flags.run.eval_every) or not self.going()):
            line["held_out_bpb"] = self.evaluate()
        self.lines.append(line)
        if self.first:
            self.log.write(line)
            self.bar.show(line, self.elapsed, last=not self.going())

    def evaluate(self) -> float:
        """Held-out bits per byte, over all ranks."""
        data, held_out = self.mesh.data, self.inputs.held_out
        with self._off_the_clock():
            nats = self.replica.nats(held_out.batches(self.flags.data.micro_batch, data.rank, data.size))
            mine = torch.tensor(nats * self.speaks, dtype=torch.float64)
            total = comm.all_reduce(mine, self.mesh.world, "scalars")
        return held_out.bits_per_byte(total.item())

    def save(self) -> None:
        """A checkpoint of this step, and the curve so far. ValueError where a weight is no finite number."""
        state = {**self.inputs.identity, **self.loader.state(), "threads": torch.get_num_threads(),
                 "global_batch": self.global_batch, "elapsed": self.elapsed,
                 "lr": self.replica.lr, "next_lr": self.learning_rate(),
                 "model": self.inputs.model.to_dict(), "flags": to_json(self.flags)}
        n = self.mesh.world.size
        with self._off_the_clock():
            self._check_weights()
            self.dir.save(self.step, self.replica, state, self.flags.run.keep)
            self.dir.plot(f"{self.flags.model.model}, {parameters(self.inputs.model):,} parameters, "
                          f"{self.flags.model.dtype}, {n} rank{'s' * (n > 1)}")

    def end(self) -> list[dict]:
        """Write the timeline, and say whether a signal ended the run."""
        if self.flags.run.trace:
            events = metrics.trace_events(self.mesh.rank, self.spans, self.rows)
            ranks = comm.gather_objects(events, self.mesh.world, "trace")
            if self.first:
                every = [event for events in ranks for event in events]
                self.flags.run.trace.write_text(json.dumps({"traceEvents": every}))
        if self.stopping or self.request.asked:                          # or in its very last step
            self.dir.say_stopped(self.step)
        return self.lines

    def close(self) -> None:
        """Give back the loader's thread, the terminal, the log and the signal handler."""
        self.loader.close()
        if self.first:
            self.bar.close()
            self.log.file.close()
        self.request.stop()

    @contextmanager
    def _off_the_clock(self):
        """Neither a step's time nor its traffic, nor part of --seconds."""
        begin = time.monotonic()
        yield
        self.began += time.monotonic() - begin
        self.mark += time.monotonic() - begin
        self.mesh.ledger.take()

    def _open_loader(self, consumed):
        data, flags = self.mesh.data, self.flags
        return Loader(self.inputs.source, seed=flags.model.seed, seq=self.inputs.seq,
                      global_batch=self.global_batch, micro_batch=flags.data.micro_batch, dp_rank=data.rank,
                      dp_size=data.size, start=consumed)

    def _introduce(self, state):
        G = self.global_batch
        _, m = micro_batches(replace(self.flags.data, global_batch=G), self.mesh.data.size)
        memory = (f", {self.flags.pipeline.schedule}" * (self.mesh.pp.size > 1)
                  + ", sequence parallel" * self.flags.mesh.sp
                  + f", ZeRO-{self.flags.mesh.zero}" * bool(self.flags.mesh.zero))
        asked = changed(self.flags, seq=self.inputs.seq, global_batch=G)
        held = describe_memory(asked, self.mesh.world.size, self.inputs.model)
        going_on = f", going on after step {self.step}" if self.step else ""
        freeze = self.flags.model.freeze
        trained = f" ({trained_parameters(freeze, self.inputs.model):,} of them trained)" if freeze else ""
        print(f"{self.flags.model.model}: {parameters(self.inputs.model):,} parameters{trained}, "
              f"{self.flags.model.dtype}, {self.mesh}{memory}; "
              f"{G} x {self.inputs.seq} tokens a step in {m} micro-batches a rank; "
              f"{held}; "
              f"into {self.dir.path}{going_on}", flush=True)
        if self.step:
            self._say_what_changed(state)

    def _say_what_changed(self, state):
        """Which flags are not as they were when the checkpoint was saved, and what that does to the rate."""
        changed = changed_flags(state, self.flags, torch.get_num_threads(), self.global_batch)
        was, now = state.get("next_lr"), self.learning_rate()
        jumps = was is not None and self.going() and not math.isclose(was, now, rel_tol=1e-6)
        rate = f": the learning rate goes from {state['lr']:.3g} to {now:.3g}" if jumps else ""
        if changed or rate:
            print(f"other than before: {', '.join(changed)}{rate}", flush=True)
        if not self.going():
            run = self.flags.run
            done = f"--seconds {run.seconds:g}" if run.seconds else f"--steps {run.steps}"
            print(f"nothing is left to do: the run has had {done} already; give more to go on", flush=True)

    def _resources(self, spans):
        """Bytes held and sent, the largest of any rank; the report's own traffic is left out."""
        rows = self.mesh.ledger.take()
        if self.flags.run.trace:
            self.spans, self.rows = self.spans + spans, self.rows + rows
        sent = metrics.sent(rows)
        numbers = [metrics.held(self.replica.tensors()), resident_peak(), *sent.values()]
        held, rss, *most_sent = map(int, metrics.largest(numbers, self.mesh.world))
        self.mesh.ledger.take()
        return {"peak_bytes": {"counted": held, "rss": rss}, "comm": dict(zip(sent, most_sent))}

    def _check_finite(self, loss):
        norm = self.replica.grad_norm
        if not (math.isfinite(loss) and (math.isfinite(norm) or self.replica.skipped)):
            raise ValueError(f"step {self.step}: loss {loss}, gradient norm {norm}; {self._remedy()}")

    def _check_weights(self):
        """The loss that says so comes a step after the update; a checkpoint in between would be spoilt."""
        [bad] = metrics.largest([float(not self.replica.is_finite())], self.mesh.world)
        if bad:
            raise ValueError(f"step {self.step}: its update made weights that are no finite numbers, which "
                             f"are not saved; {self._remedy()}")

    def _remedy(self):
        return f"{self.dir.last_good(self.step)}; try --lr {self.replica.lr / 3:.2g} or a longer --warmup"
