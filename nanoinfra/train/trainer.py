"""The training loop, and the run around it.

The same seed, data and flags give the same losses on any mesh, to rounding: weights are drawn by name, samples are
dealt from one global order, the loss is normalised once. What a run must remember is its checkpoint: weights,
optimizer, step, samples consumed and seed.
"""
import json
import math
import os
import signal
import sys
import threading
import time

import torch

from nanoinfra.data.loader import Loader
from nanoinfra.dist import comm
from nanoinfra.dist.mesh import Mesh, world_size
from nanoinfra.formulas.params import parameters
from nanoinfra.formulas.shape import SIZES
from nanoinfra.train import checkpoint, metrics
from nanoinfra.train.config import TrainFlags, check, micro_batches, parse_wire, plan_mesh, to_json
from nanoinfra.train.inputs import open_inputs
from nanoinfra.train.launch import STOPPED
from nanoinfra.train.loss import count_valid
from nanoinfra.train.optim import learning_rate
from nanoinfra.train.pieces import Piece
from nanoinfra.train.replica import Replica
from nanoinfra.train.step import accumulate, execute


def train(flags: TrainFlags) -> list[dict]:
    """Train as `flags` say, on this rank of the run; returns the lines of metrics. Every rank calls it."""
    run = Run(flags)
    try:
        while run.going():
            batches = run.loader.next()
            valid, run.stopping = count_valid(batches, run.mesh.data, run.asked_to_stop)
            run.replica.begin(batches, valid, run.learning_rate())
            spans = execute(accumulate(len(batches)), run.replica)
            run.report(valid, spans)
            if run.due(flags.run.save_every) or not run.going():
                run.save()
        return run.end()
    finally:
        run.close()


class Run:
    """All that a training run holds on one rank. `step` counts finished steps, `elapsed` is rank 0's clock in s."""

    def __init__(self, flags: TrainFlags):
        check(flags, world_size())
        self.flags, self.out = flags, flags.run.out
        self.mesh = Mesh(**plan_mesh(flags.mesh, world_size()), wire=parse_wire(flags.mesh.wire) or None,
                         device=flags.mesh.device)
        self.first = self.mesh.rank == 0
        use_threads(flags.mesh.threads)
        make_folder(self.out)
        self.inputs = open_inputs(flags, self.mesh)
        self.replica = Replica(self.inputs.model, flags, self.mesh)
        self.step, self.elapsed, self.stopping, self.asked_to_stop = 0, 0.0, 0, 0
        self.lines, self.spans, self.rows = [], [], []
        consumed = self._resume() if flags.run.resume else 0
        data = self.mesh.data
        self.loader = Loader(self.inputs.source, seed=flags.model.seed, seq=self.inputs.seq, start=consumed,
                             global_batch=micro_batches(flags.data, data.size)[0],
                             micro_batch=flags.data.micro_batch, dp_rank=data.rank, dp_size=data.size)
        self._describe()
        self.log = metrics.Log(self.out / "metrics.jsonl", self.step) if self.first else None
        self.bar = metrics.Bar(flags.run.steps, flags.run.seconds, self.step) if self.first else None
        self.old_handler = on_sigterm(self._ask_to_stop)
        self.mesh.ledger.take()
        self.began = self.mark = time.monotonic()

    def going(self) -> bool:
        """Is there another step? Every rank answers alike."""
        done = self.elapsed >= self.flags.run.seconds if self.flags.run.seconds else self.step >= self.flags.run.steps
        return not (done or self.stopping)

    def learning_rate(self) -> float:
        """For the step about to be taken."""
        o, r = self.flags.optimizer, self.flags.run
        progress = self.elapsed / r.seconds if r.seconds else self.step / r.steps
        peak = SIZES[self.flags.model.model].lr if o.lr is None else o.lr
        return learning_rate(self.step + 1, progress, o.warmup, peak, o.lr_schedule)

    def due(self, every: int) -> bool:
        """Is this step one of each `every`? Never where that is 0."""
        return bool(every) and self.step % every == 0

    def report(self, valid: int, spans: list) -> None:
        """Agree on the finished step's numbers and write them; stop a run whose loss is no longer a number."""
        self.step += 1
        replica, mesh, every = self.replica, self.mesh, self.flags.run.eval_every
        clock = (time.monotonic() - self.began) * self.first             # summed over ranks: rank 0's
        loss, self.elapsed = comm.all_reduce(torch.stack([replica.loss, torch.tensor(clock, dtype=torch.float64)]),
                                             mesh.data, "scalars").tolist()
        if not (math.isfinite(loss) and math.isfinite(replica.grad_norm)):
            raise ValueError(f"step {self.step}: loss {loss}, gradient norm {replica.grad_norm}; {self._last_good()}; "
                             f"try --lr {replica.lr / 3:.2g} or a longer --warmup")
        now = time.monotonic()
        step_s, self.mark = now - self.mark, now
        line = {"step": self.step, "loss": loss, "grad_norm": replica.grad_norm, "lr": replica.lr, "tokens": valid,
                "step_s": step_s, "tokens_per_s": valid / step_s, "mfu": None, **self._resources(spans)}
        if self.inputs.held_out and (self.due(every) or not self.going()):
            line["held_out_bpb"] = self.evaluate()
        self.lines.append(line)
        if self.first:
            self.log.write(line)
            self.bar.show(line, self.elapsed, last=not self.going())

    def evaluate(self) -> float:
        """Held-out bits per byte, over all ranks."""
        data, held_out = self.mesh.data, self.inputs.held_out
        nats = self.replica.nats(held_out.batches(self.flags.data.micro_batch, data.rank, data.size))
        total = comm.all_reduce(torch.tensor(nats, dtype=torch.float64), data, "scalars")
        self.mark = time.monotonic()                                      # not part of the next step's time
        return held_out.bits_per_byte(total.item())

    def save(self) -> None:
        """A checkpoint of this step; each tensor is written by one of the ranks that hold it."""
        data, state = self.mesh.data, self.replica.optimizer.state()
        mine = [(Piece.whole(name, tensor.shape), tensor) for i, (name, tensor) in enumerate(state.items())
                if i % data.size == data.rank]
        checkpoint.save(self.out / "checkpoints", self.step, mine,
                        {"step": self.step, **self.loader.state(), "threads": torch.get_num_threads(),
                         "model": self.inputs.model.to_dict(), "flags": to_json(self.flags)},
                        self.mesh.world, self.flags.run.keep)
        self._plot()
        self.mesh.ledger.take()
        self.mark = time.monotonic()

    def end(self) -> list[dict]:
        """Write the timeline, and say whether a signal ended the run."""
        if self.flags.run.trace:
            events = metrics.trace_events(self.mesh.rank, self.spans, self.rows)
            ranks = comm.gather_objects(events, self.mesh.world, "trace")
            if self.first:
                self.flags.run.trace.write_text(json.dumps({"traceEvents": [e for events in ranks for e in events]}))
        if self.first and self.stopping:
            (self.out / STOPPED).write_text(json.dumps({"step": self.step}))
        return self.lines

    def close(self) -> None:
        """Give back the loader's thread, the terminal, the log and the signal handler."""
        self.loader.close()
        if self.first:
            self.bar.close()
            self.log.file.close()
        on_sigterm(self.old_handler)

    def _resources(self, spans):
        """Bytes held and sent, the largest of any rank; the report's own traffic is left out."""
        rows = self.mesh.ledger.take()
        if self.flags.run.trace:
            self.spans, self.rows = self.spans + spans, self.rows + rows
        sent = metrics.sent(rows)
        numbers = [metrics.held(self.replica.tensors()), metrics.resident_peak(), *sent.values()]
        held, rss, *sent_most = map(int, metrics.largest(numbers, self.mesh.world))
        self.mesh.ledger.take()
        return {"peak_bytes": {"counted": held, "rss": rss}, "comm": dict(zip(sent, sent_most))}

    def _resume(self):
        """Take everything back from the newest good checkpoint; returns the samples consumed."""
        found = None
        if self.first:
            found = checkpoint.newest(self.out / "checkpoints", say=lambda text: print(text, file=sys.stderr))
        name = comm.gather_objects(found and found.name, self.mesh.world, "checkpoint")[0]
        if name is None:
            raise ValueError(f"--resume: no good checkpoint in {self.out / 'checkpoints'}; start without --resume")
        folder, optimizer = self.out / "checkpoints" / name, self.replica.optimizer
        state = checkpoint.read_state(folder)
        if state["seed"] != self.flags.model.seed:
            raise ValueError(f"--resume: the run in {self.out} has seed {state['seed']}; give --seed {state['seed']}")
        wanted = [Piece.whole(name, tensor.shape) for name, tensor in optimizer.state().items()]
        manifest = checkpoint.disk.read_manifest(folder)                  # rank 0 has verified every byte
        optimizer.load({piece.name: tensor for piece, tensor in checkpoint.load(folder, wanted, manifest)}, state["step"])
        self.step = state["step"]
        return state["consumed"]

    def _describe(self):
        """Leave config.json and the tokenizer for whoever loads the run, and say what is about to happen."""
        if not self.first:
            return
        model, source = self.inputs.model, self.inputs.source
        corpus = {"name": self.flags.data.data, "hash": source.corpus.hash if source.corpus else None}
        (self.out / "config.json").write_text(json.dumps(
            {"nanoinfra": 1, "model": model.to_dict(), "flags": to_json(self.flags), "corpus": corpus}, indent=2) + "\n")
        if source.tokenizer:
            source.tokenizer.save(self.out / "tokenizer")
        (self.out / STOPPED).unlink(missing_ok=True)
        G, m = micro_batches(self.flags.data, self.mesh.data.size)
        print(f"{self.flags.model.model}: {parameters(model):,} parameters, {self.flags.model.dtype}, {self.mesh}; "
              f"{G} x {self.inputs.seq} tokens a step in {m} micro-batches a rank; into {self.out}", flush=True)

    def _last_good(self):
        saved = checkpoint.checkpoints(self.out / "checkpoints")
        return f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"

    def _plot(self):
        if self.first:
            metrics.plot(self.out / "metrics.jsonl", self.out / "loss.png", f"{self.flags.model.model} on {self.mesh}")

    def _ask_to_stop(self, *_):
        self.asked_to_stop = 1


def make_folder(out) -> None:
    """The run directory. Raises ValueError where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to --out {out}: {error.strerror}; name a folder that you may write to") from error


def use_threads(wanted: int | None) -> None:
    """`wanted` threads for this rank, or its share of this host's cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    threads = wanted or max(1, (os.cpu_count() or 1) // ranks_here)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def on_sigterm(handler):
    """Install `handler` and return the old one; signals reach the main thread alone."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGTERM, handler)
    return None
