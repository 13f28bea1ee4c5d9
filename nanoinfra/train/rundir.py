"""The directory of a run: config.json, tokenizer/, metrics.jsonl, loss.png, checkpoints/.

What a run must remember is its checkpoint: weights, optimizer, step, samples consumed, and the identity of
what it reads. Rank 0 writes the small files; every rank its part of a checkpoint (train/checkpoint.py).
"""
import json
import sys
from pathlib import Path

from nanoinfra.dist import comm
from nanoinfra.model.files import read_json
from nanoinfra.model.hf_text import clear_text
from nanoinfra.train import checkpoint, metrics
from nanoinfra.train.config import TrainFlags, to_json
from nanoinfra.train.inputs import Inputs
from nanoinfra.train.manifest import read_manifest
from nanoinfra.train.pretrained import keep_text
from nanoinfra.train.rank import STOPPED, launch_id, make_folder, restarted
from nanoinfra.train.replica import Replica


class RunDir:
    """One rank's view of it. Raises ValueError where it cannot be written."""

    def __init__(self, path: Path, mesh):
        self.path, self.mesh, self.first = path, mesh, mesh.rank == 0
        self.checkpoints = path / "checkpoints"
        make_folder(self.checkpoints)

    def begin(self, inputs: Inputs, replica: Replica, resume: bool) -> dict:
        """The state to go on from; of a new run {"step": 0, "consumed": 0}.

        Ranks that the same launch has started again go on without being asked to.
        """
        there = checkpoint.checkpoints(self.checkpoints)
        if resume or (self._again() and there):
            return self._resume(inputs, replica)
        if there:
            raise ValueError(f"{self.path} holds a run already, with {there[-1].name}; go on from it with "
                             "--resume, name another --out, or remove that folder")
        return {"step": 0, "consumed": 0}

    def _again(self):
        """Has this launch had ranks before? One of them may be on a host that joins only now."""
        earlier = read_json(self.path / "config.json").get("launch")
        again = restarted() or launch_id() is not None and earlier == launch_id()
        return any(comm.gather_objects(again, self.mesh.world, "checkpoint"))

    def _resume(self, inputs, replica):
        """Take the newest good checkpoint back into `replica`."""
        folder = self._newest()
        state = checkpoint.read_state(folder)
        for key, value in inputs.identity.items():
            if state[key] != value:
                raise ValueError(f"--resume: the run in {self.path} has {key} {state[key]}, this one {value};"
                                 " give the flags it was started with, which are in its config.json")
        wanted = [piece for piece, _ in replica.pieces()]
        pieces = checkpoint.load(folder, wanted, read_manifest(folder))  # rank 0 has verified every byte
        replica.load(pieces, state)
        return state

    def save(self, step: int, replica: Replica, state: dict, keep: int) -> None:
        """A checkpoint; each tensor, or part of one, is written by one of the ranks that hold it."""
        data, pieces = self.mesh.data, replica.pieces()
        mine = pieces if replica.parallel.plan.zero else pieces[data.rank::data.size]
        state = {"step": step, **replica.state(), **state}
        checkpoint.save(self.checkpoints, step, mine, state, self.mesh.world, keep)

    def describe(self, flags: TrainFlags, inputs: Inputs) -> None:
        """Leave config.json and the tokenizer for whoever loads the run."""
        if not self.first:
            return
        config = {"nanoinfra": 1, "model": inputs.model.to_dict(), "flags": to_json(flags),
                  "inputs": inputs.identity, "launch": launch_id()}
        metrics.replace(self.path / "config.json", json.dumps(config, indent=2) + "\n")
        if inputs.weights:
            keep_text(inputs.weights, self.path / "tokenizer")
        elif inputs.source.tokenizer:
            clear_text(self.path / "tokenizer", config=True)
            inputs.source.tokenizer.save(self.path / "tokenizer")
        (self.path / STOPPED).unlink(missing_ok=True)

    def plot(self, title: str) -> None:
        """loss.png from metrics.jsonl."""
        if self.first:
            metrics.plot(self.path / "metrics.jsonl", self.path / "loss.png", title)

    def say_stopped(self, step: int) -> None:
        """Tell the launcher that a signal's stop was a good one."""
        if self.first:
            (self.path / STOPPED).write_text(json.dumps({"step": step}))

    def last_good(self) -> str:
        """The newest checkpoint, in words."""
        saved = checkpoint.checkpoints(self.checkpoints)
        return f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"

    def _newest(self):
        found = checkpoint.newest_of_all(self.checkpoints, self.mesh.world,
                                         say=lambda text: print(text, file=sys.stderr))
        if found is None:
            there = checkpoint.checkpoints(self.checkpoints)
            remedy = f"remove {self.checkpoints} to train anew" if there else "start without --resume"
            raise ValueError(f"--resume: no good checkpoint in {self.checkpoints}; {remedy}")
        return found
