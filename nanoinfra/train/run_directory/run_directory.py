"""The run directory: config.json, tokenizer/, metrics.jsonl, loss.png, checkpoints/.

A checkpoint holds all that a run needs to resume: weights, optimizer state, step, samples consumed, seconds
spent, and the identity of its data. Rank 0 writes the small files, every rank its shards of a checkpoint
(train/checkpoint/save_and_load.py). One run at a time has it (train/run_directory/lock_run_directory.py), and
none but a run's is taken (train/run_directory/check_out_folder.py).
"""
import json
import sys
from contextlib import ExitStack

from nanoinfra.distributed import comm
from nanoinfra.model.weights.hugging_face.tokenizer_files import remove_tokenizer_files
from nanoinfra.renamed_flags import with_new_flag_names
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.checkpoint import list_and_delete_checkpoints, save_and_load
from nanoinfra.train.checkpoint.safetensors_and_manifest import read_manifest
from nanoinfra.train.checkpoint.tensor_shards import CheckpointError
from nanoinfra.train.config import RunFlags, TrainFlags, flags_to_dict, group_by_flag
from nanoinfra.train.launch.elastic_rank import (
    STOP_NOTE_FILE,
    launch_id,
    make_run_folder,
    ranks_were_restarted,
)
from nanoinfra.train.load_and_export_models import save_pretrained_tokenizer
from nanoinfra.train.open_model_and_data import RunInputs
from nanoinfra.train.run_directory.check_out_folder import (
    RUN_DIRECTORY_VERSION,
    check_out_folder,
    read_run_config,
)
from nanoinfra.train.run_directory.check_resume_and_report_changes import (
    check_resumes_same_run,
    data_description,
)
from nanoinfra.train.run_directory.lock_run_directory import lock_run_directory
from nanoinfra.train.training_pipeline_stage import TrainStage


class RunDirectory:
    """One rank's view of the run directory, locked inside `with`.

    Another process of this launch that holds the lock may take `lock_wait_seconds` to end. Raises ValueError
    when the folder is not a run's or another process is training into it.
    """

    def __init__(self, run: RunFlags, mesh, lock_wait_seconds: float = 0):
        self.flags, self.mesh = run, mesh
        self.lock_wait_seconds = lock_wait_seconds
        self.is_first_rank = mesh.rank == 0
        self.path, self.checkpoints_folder = run.out, run.out / "checkpoints"
        self._open_locks, self._given_warnings = ExitStack(), set()
        self.resumed_after_step = 0

    def __enter__(self):
        with self._open_locks:               # released again if the check fails
            save_and_load.run_on_first_rank(self.mesh.world, self._take)
            self._open_locks = self._open_locks.pop_all()
        return self

    def __exit__(self, *_):
        self._open_locks.close()

    def load_starting_state(self, inputs: RunInputs, stage: TrainStage, flags: TrainFlags) -> dict:
        """Load the checkpoint to resume from into `stage`, and return its state.

        A new run gets {"step": 0, "consumed": 0}. Ranks that the same launch has restarted resume without
        --resume.
        """
        restarted, self.data_description = self._is_restart(), data_description(inputs)
        name = save_and_load.run_on_first_rank(self.mesh.world, lambda: self._chosen(restarted))
        if name is None:
            return {"step": 0, "consumed": 0}
        folder = self.checkpoints_folder / name
        state = with_new_flag_names(save_and_load.read_checkpoint_state(folder), group_by_flag())
        check_resumes_same_run(self.path, state, inputs, flags, self.data_description)
        wanted = [shard for shard, _ in stage.tensor_shards()]
        # Rank 0 has verified every byte already.
        stage.load_state_dict(save_and_load.load_shards(folder, wanted, read_manifest(folder)), state)
        self.resumed_after_step = state["step"]
        if self.flags.resume_from is not None and not restarted:
            save_and_load.run_on_first_rank(self.mesh.world, lambda: self._abandon_after(state["step"]))
        return state

    def save_checkpoint(self, step: int, stage: TrainStage, state: dict, keep: int) -> None:
        """Save a checkpoint; each tensor or shard is written by one of the ranks that hold it."""
        data, shards = self.mesh.data, stage.tensor_shards()
        own = shards if stage.parallel_model.config.zero_stage else shards[data.rank::data.size]
        state = {"step": step, "text": self.data_description, **stage.state_dict(), **state}
        save_and_load.save_checkpoint(self.checkpoints_folder, step, own, state, self.mesh.world, keep,
                                      self.warn_once)

    def write_config_and_tokenizer(self, flags: TrainFlags, inputs: RunInputs) -> None:
        """Write config.json and tokenizer/, with which the run can be loaded and served."""
        if not self.is_first_rank:
            return
        config = {"nanoinfra": RUN_DIRECTORY_VERSION, "model": inputs.model_config.to_dict(),
                  "flags": flags_to_dict(flags), "inputs": inputs.data_identity,
                  "text": self.data_description, "launch": launch_id()}
        text = json.dumps(config, indent=2) + "\n"
        metrics_and_plots.replace_file(self.path / "config.json", text)
        if inputs.pretrained_weights:
            save_pretrained_tokenizer(inputs.pretrained_weights, self.path / "tokenizer")
        elif inputs.dataset.tokenizer:
            remove_tokenizer_files(self.path / "tokenizer", include_config=True)
            inputs.dataset.tokenizer.save(self.path / "tokenizer")
        (self.path / STOP_NOTE_FILE).unlink(missing_ok=True)

    def write_loss_plot(self, title: str) -> None:
        """Draw loss.png from metrics.jsonl; when it cannot be written, print a warning and go on."""
        if self.is_first_rank:
            try:
                metrics_and_plots.plot_loss_curve(self.path / "metrics.jsonl",
                                                  self.path / "loss.png", title)
            except OSError as error:
                self.warn_once(f"cannot write {self.path / 'loss.png'}: {error.strerror or error}; the run "
                               "goes on without it")

    def warn_once(self, text: str) -> None:
        """Print a warning to stderr, each text only once."""
        if text not in self._given_warnings:
            self._given_warnings.add(text)
            print(f"nanoinfra: {text}", file=sys.stderr, flush=True)

    def write_stop_note(self, step: int) -> None:
        """Leave the launcher a note that the run was stopped by a signal and has saved step `step`."""
        if self.is_first_rank:
            (self.path / STOP_NOTE_FILE).write_text(json.dumps({"step": step}))

    def describe_last_checkpoint(self, step: int) -> str:
        """Say which checkpoint to resume from, after a loss or weights of `step` that are not finite.

        When that is the first step after resuming, the checkpoint itself is spoilt: no update has happened.
        """
        saved = save_and_load.list_checkpoints(self.checkpoints_folder)
        if not saved:
            return "no checkpoint was saved yet"
        *before, newest = saved
        steps = [str(list_and_delete_checkpoints.checkpoint_step(path)) for path in before]
        earlier = f"--resume-from {' or '.join(steps)}"
        if step == self.resumed_after_step + 1 == list_and_delete_checkpoints.checkpoint_step(newest) + 1:
            way = f"go on from an earlier one with {earlier}" if before else "no earlier one is left"
            return f"the last checkpoint is {newest}, which is spoilt already; {way}"
        way = f", or, if that is spoilt already, from an earlier one with {earlier}" if before else ""
        return f"the last checkpoint is {newest}: go on from there with --resume{way}"

    def _take(self):
        """On rank 0: check whose folder it is, lock it, and make checkpoints/."""
        check_out_folder(self.flags)
        self._open_locks.enter_context(lock_run_directory(self.path, wait_seconds=self.lock_wait_seconds))
        make_run_folder(self.checkpoints_folder)

    def _is_restart(self):
        """Whether this launch has had ranks before that trained into this folder; asked of all ranks."""
        config, start = read_run_config(self.path), self.flags.resume_from
        again = ranks_were_restarted() or launch_id() is not None and config.get("launch") == launch_id()
        if start is not None:                # else they died before later ones were set aside
            again = again and config.get("flags", {}).get("run", {}).get("resume_from") == start
        return any(comm.all_gather_json(again, self.mesh.world, "checkpoint"))

    def _chosen(self, restarted):
        """The name of the checkpoint to resume from, None for a new run; ValueError if neither is allowed."""
        there = save_and_load.list_checkpoints(self.checkpoints_folder)
        if self.flags.resume_from is not None and not restarted:
            return self._asked_for(there)
        if self.flags.resume or restarted and there:
            return self._newest(there)
        if there:
            raise ValueError(f"{self.path} holds a run already, with {there[-1].name}; go on from it with "
                             "--resume, or name another --out")
        if not restarted and (lines := metrics_and_plots.read_metrics(self.path / "metrics.jsonl")):
            raise ValueError(f"{self.path} holds the metrics of {len(lines)} steps of a run that has no "
                             "checkpoint to go on from; name another --out, or remove its metrics.jsonl to "
                             "begin anew")
        return None

    def _asked_for(self, there):
        step = self.flags.resume_from
        folder = list_and_delete_checkpoints.checkpoint_folder(self.checkpoints_folder, step)
        steps = [str(list_and_delete_checkpoints.checkpoint_step(path)) for path in there if path != folder]
        others = f"; there are those of steps {', '.join(steps)}" if steps else "; there is no other"
        if folder not in there:
            raise ValueError(f"--resume-from {step}: {self.checkpoints_folder} has no checkpoint of it"
                             f"{others}")
        try:
            save_and_load.verify_checkpoint(folder)
        except CheckpointError as error:
            raise ValueError(f"--resume-from {step}: {error}{others}") from error
        return folder.name

    def _newest(self, there):
        found = save_and_load.find_newest_checkpoint(self.checkpoints_folder, self.warn_once)
        if found is None:
            begun = there or metrics_and_plots.read_metrics(self.path / "metrics.jsonl")
            remedy = "train anew into another --out" if begun else "start without --resume"
            raise ValueError(f"--resume: no good checkpoint in {self.checkpoints_folder}; {remedy}")
        return found.name

    def _abandon_after(self, step):
        for path in list_and_delete_checkpoints.abandon_checkpoints_after(self.checkpoints_folder, step):
            print(f"{path.with_suffix('').name} is set aside as {path.name}: --resume will not take it; "
                  "remove it when you need it no more", flush=True)
