"""The directory of a run: config.json, tokenizer/, metrics.jsonl, loss.png, checkpoints/.

What a run must remember is its checkpoint: weights, optimizer, step, samples consumed, seconds spent, and the
identity of what it reads. Rank 0 writes the small files; every rank its part of a checkpoint
(train/checkpoint/checkpoint.py). One run at a time has it (train/run_directory/lock.py), and none but a run's
is taken (train/run_directory/ownership.py).
"""
import json
import sys
from contextlib import ExitStack

from nanoinfra.distributed import comm
from nanoinfra.model.weights.hugging_face.tokenizer_files import clear_text
from nanoinfra.train import metrics
from nanoinfra.train.checkpoint import checkpoint, retention
from nanoinfra.train.checkpoint.manifest import read_manifest
from nanoinfra.train.checkpoint.tensor_shards import CheckpointError
from nanoinfra.train.config import RunFlags, TrainFlags, to_json
from nanoinfra.train.launch.elastic_rank import STOPPED, launch_id, make_folder, restarted
from nanoinfra.train.pretrained import keep_text
from nanoinfra.train.run_directory.lock import locked
from nanoinfra.train.run_directory.ownership import VERSION, check_out, last_config
from nanoinfra.train.run_directory.resume_check import check_same, described
from nanoinfra.train.run_inputs import Inputs
from nanoinfra.train.train_stage import Replica


class RunDir:
    """One rank's view of it, open inside `with`. Raises ValueError where it is another's or in use."""

    def __init__(self, run: RunFlags, mesh):
        self.run, self.mesh, self.first = run, mesh, mesh.rank == 0
        self.path, self.checkpoints = run.out, run.out / "checkpoints"
        self.held, self.said, self.went_on_after = ExitStack(), set(), 0

    def __enter__(self):
        with self.held:                      # let go of, unless all is well
            checkpoint.ask_first(self.mesh.world, self._take)
            self.held = self.held.pop_all()
        return self

    def __exit__(self, *_):
        self.held.close()

    def begin(self, inputs: Inputs, replica: Replica, flags: TrainFlags) -> dict:
        """The state to go on from; of a new run {"step": 0, "consumed": 0}.

        Ranks that the same launch has started again go on without being asked to.
        """
        again, self.text = self._again(), described(inputs)
        name = checkpoint.ask_first(self.mesh.world, lambda: self._chosen(again))
        if name is None:
            return {"step": 0, "consumed": 0}
        folder = self.checkpoints / name
        state = checkpoint.read_state(folder)
        check_same(self.path, state, inputs, flags, self.text)
        wanted = [piece for piece, _ in replica.pieces()]
        pieces = checkpoint.load(folder, wanted, read_manifest(folder))  # rank 0 has verified every byte
        replica.load(pieces, state)
        self.went_on_after = state["step"]
        if self.run.resume_from is not None and not again:
            checkpoint.ask_first(self.mesh.world, lambda: self._abandon_after(state["step"]))
        return state

    def save(self, step: int, replica: Replica, state: dict, keep: int) -> None:
        """A checkpoint; each tensor, or part of one, is written by one of the ranks that hold it."""
        data, pieces = self.mesh.data, replica.pieces()
        mine = pieces if replica.parallel.plan.zero else pieces[data.rank::data.size]
        state = {"step": step, "text": self.text, **replica.state(), **state}
        checkpoint.save(self.checkpoints, step, mine, state, self.mesh.world, keep, self.warn)

    def describe(self, flags: TrainFlags, inputs: Inputs) -> None:
        """Leave config.json and the tokenizer for whoever loads the run."""
        if not self.first:
            return
        config = {"nanoinfra": VERSION, "model": inputs.model.to_dict(), "flags": to_json(flags),
                  "inputs": inputs.identity, "text": self.text, "launch": launch_id()}
        metrics.replace(self.path / "config.json", json.dumps(config, indent=2) + "\n")
        if inputs.weights:
            keep_text(inputs.weights, self.path / "tokenizer")
        elif inputs.source.tokenizer:
            clear_text(self.path / "tokenizer", config=True)
            inputs.source.tokenizer.save(self.path / "tokenizer")
        (self.path / STOPPED).unlink(missing_ok=True)

    def plot(self, title: str) -> None:
        """loss.png from metrics.jsonl, if it can be written: the run does not need it."""
        if self.first:
            try:
                metrics.plot(self.path / "metrics.jsonl", self.path / "loss.png", title)
            except OSError as error:
                self.warn(f"cannot write {self.path / 'loss.png'}: {error.strerror or error}; the run goes "
                          "on without it")

    def warn(self, text: str) -> None:
        """Say once what does not end the run."""
        if text not in self.said:
            self.said.add(text)
            print(f"nanoinfra: {text}", file=sys.stderr, flush=True)

    def say_stopped(self, step: int) -> None:
        """Tell the launcher that a signal's stop was a good one."""
        if self.first:
            (self.path / STOPPED).write_text(json.dumps({"step": step}))

    def last_good(self, step: int) -> str:
        """What to go on from after a loss or weights of `step` that are no numbers, in words.

        The first step of a resumed run has seen no update: its numbers are the checkpoint's own.
        """
        saved = checkpoint.checkpoints(self.checkpoints)
        if not saved:
            return "no checkpoint was saved yet"
        *before, newest = saved
        earlier = f"--resume-from {' or '.join(str(retention.step_of(path)) for path in before)}"
        if step == self.went_on_after + 1 == retention.step_of(newest) + 1:
            way = f"go on from an earlier one with {earlier}" if before else "no earlier one is left"
            return f"the last checkpoint is {newest}, which is spoilt already; {way}"
        way = f", or, if that is spoilt already, from an earlier one with {earlier}" if before else ""
        return f"the last checkpoint is {newest}: go on from there with --resume{way}"

    def _take(self):
        """Rank 0 looks whose folder it is, and keeps other runs out of it."""
        check_out(self.run)
        self.held.enter_context(locked(self.path, patience=self.run.timeout / 2))
        make_folder(self.checkpoints)

    def _again(self):
        """Has this launch had ranks before, that went on from here? One may be on a host that joins now."""
        config, start = last_config(self.path), self.run.resume_from
        again = restarted() or launch_id() is not None and config.get("launch") == launch_id()
        if start is not None:                # else they died before later checkpoints were abandoned
            again = again and config.get("flags", {}).get("run", {}).get("resume_from") == start
        return any(comm.gather_objects(again, self.mesh.world, "checkpoint"))

    def _chosen(self, again):
        """The name of the checkpoint to go on from, None for a new run. ValueError where neither may be."""
        there = checkpoint.checkpoints(self.checkpoints)
        if self.run.resume_from is not None and not again:
            return self._asked_for(there)
        if self.run.resume or again and there:
            return self._newest(there)
        if there:
            raise ValueError(f"{self.path} holds a run already, with {there[-1].name}; go on from it with "
                             "--resume, or name another --out")
        if not again and (lines := metrics.read(self.path / "metrics.jsonl")):
            raise ValueError(f"{self.path} holds the metrics of {len(lines)} steps of a run that has no "
                             "checkpoint to go on from; name another --out, or remove its metrics.jsonl to "
                             "begin anew")
        return None

    def _asked_for(self, there):
        step, folder = self.run.resume_from, retention.folder_of(self.checkpoints, self.run.resume_from)
        steps = [str(retention.step_of(path)) for path in there if path != folder]
        others = f"; there are those of steps {', '.join(steps)}" if steps else "; there is no other"
        if folder not in there:
            raise ValueError(f"--resume-from {step}: {self.checkpoints} has no checkpoint of it{others}")
        try:
            checkpoint.verify(folder)
        except CheckpointError as error:
            raise ValueError(f"--resume-from {step}: {error}{others}") from error
        return folder.name

    def _newest(self, there):
        found = checkpoint.newest(self.checkpoints, self.warn)
        if found is None:
            begun = there or metrics.read(self.path / "metrics.jsonl")
            remedy = "train anew into another --out" if begun else "start without --resume"
            raise ValueError(f"--resume: no good checkpoint in {self.checkpoints}; {remedy}")
        return found.name

    def _abandon_after(self, step):
        for path in retention.abandon_after(self.checkpoints, step):
            print(f"{path.with_suffix('').name} is set aside as {path.name}: --resume will not take it; "
                  "remove it when you need it no more", flush=True)
