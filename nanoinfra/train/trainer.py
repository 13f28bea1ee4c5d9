"""The training loop and the run around it: metrics, checkpoints, held-out evaluation, signals.

The same seed, data and flags give the same losses on any mesh, to rounding: initial weights are drawn by
parameter name, samples come from one global order, and the loss is normalised once. Gradient accumulation
is the number of micro-batches in the step's schedule.
"""
import json
import math
import time
from contextlib import contextmanager
from dataclasses import replace

import torch

from nanoinfra.data.micro_batch_loader import MicroBatchLoader
from nanoinfra.distributed import comm
from nanoinfra.distributed.cpu_threads import set_torch_threads
from nanoinfra.distributed.host_memory import peak_rss_bytes
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.config import (
    TrainFlags,
    check_train_flags,
    flags_to_dict,
    global_batch_and_num_micro_batches,
    mesh_axis_sizes,
    parse_emulated_links,
    peak_learning_rate,
    replace_flags,
)
from nanoinfra.train.frozen_parameters import trainable_parameter_count
from nanoinfra.train.launch.elastic_rank import is_launched_rank
from nanoinfra.train.launch.memory_check import check_memory_fits, describe_memory_need
from nanoinfra.train.launch.stop_signals import StopRequest
from nanoinfra.train.loss import count_valid_tokens
from nanoinfra.train.open_model_and_data import open_run_inputs
from nanoinfra.train.optimizer import scheduled_learning_rate
from nanoinfra.train.run_directory.check_resume_and_report_changes import describe_changed_flags
from nanoinfra.train.run_directory.run_directory import RunDirectory
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage


def train(flags: TrainFlags) -> list[dict]:
    """Run the training that `flags` describe; every rank calls it. Returns the lines of metrics.jsonl.

    Raises ValueError for flags that cannot work, and when a loss or a weight is not a finite number.
    """
    check_train_flags(flags, world_size())
    check_memory_fits(flags, world_size())
    links = parse_emulated_links(flags.launch.emulate_link)
    mesh = Mesh(**mesh_axis_sizes(flags.axes, world_size()), emulated_links=links or None,
                device=flags.launch.device, timeout=flags.launch.timeout)
    set_torch_threads(flags.launch.threads)
    with RunDirectory(flags.run, mesh, lock_wait_seconds=flags.launch.timeout / 2) as folder:
        run = TrainingRun(flags, mesh, folder)
        try:
            while run.should_continue():
                micro_batches = run.data_loader.next_step()
                counted = micro_batches if run.reports_loss else ()
                valid, normalizer_total, run.stop_requests = count_valid_tokens(
                    counted, mesh.world, run.stage.sum_normalizers(counted), run.stop_request.requested)
                run.stage.begin_step(micro_batches, normalizer_total, run.next_learning_rate())
                spans = execute_schedule(run.stage.build_step_schedule(len(micro_batches)), run.stage)
                run.report_step(valid, spans)
                if run.is_step_due(flags.run.save_every) or not run.should_continue():
                    run.save_checkpoint()
            return run.finish()
        finally:
            run.close()


class TrainingRun:
    """One rank's part of a run: its inputs, train stage, data loader, metrics and run directory.

    `step` counts finished optimizer steps; `elapsed_seconds` is rank 0's training time.
    """

    def __init__(self, flags: TrainFlags, mesh: Mesh, folder: RunDirectory):
        self.flags, self.mesh = flags, mesh
        self.run_directory = folder
        self.inputs = open_run_inputs(flags, self.mesh)
        self.stage = TrainStage(self.inputs.model_config, flags, self.mesh, self.inputs.read_initial_weights)
        self.reports_loss = self.mesh.tp.rank == 0 and self.mesh.pp.rank == self.mesh.pp.size - 1
        self.stop_requests = 0
        self.metrics_lines = []
        self.trace_spans, self.trace_records = [], []                    # for --trace
        state = self.run_directory.load_starting_state(self.inputs, self.stage, flags)
        self.step, self.elapsed_seconds = state["step"], state.get("elapsed", 0.0)
        G = flags.data.global_batch or state.get("global_batch")         # a run keeps it on any mesh
        data = replace(flags.data, global_batch=G)
        self.global_batch, _ = global_batch_and_num_micro_batches(data, self.mesh.data.size)
        self.run_directory.write_config_and_tokenizer(flags, self.inputs)
        self.data_loader = self._open_loader(state["consumed"])
        self.is_first_rank = self.mesh.rank == 0
        if self.is_first_rank:
            self._print_start(state)
            metrics_file = self.run_directory.path / "metrics.jsonl"
            self.metrics_log = metrics_and_plots.MetricsLog(metrics_file, self.step)
            if self.metrics_log.missing_steps_warning:
                self.run_directory.warn_once(self.metrics_log.missing_steps_warning)
            self.progress_bar = metrics_and_plots.ProgressBar(
                flags.run.steps, flags.run.max_seconds, self.step, self.elapsed_seconds)
        self.stop_request = StopRequest(is_single_process=not is_launched_rank())
        self.stop_request.start()
        self.mesh.comm_log.take_records()
        self.step_started_at = time.monotonic()
        self.run_started_at = self.step_started_at - self.elapsed_seconds

    def should_continue(self) -> bool:
        """Return whether another step follows; all ranks return the same."""
        run = self.flags.run
        done = self.elapsed_seconds >= run.max_seconds if run.max_seconds else self.step >= run.steps
        return not (done or self.stop_requests)

    def next_learning_rate(self) -> float:
        """The learning rate of the next step, from the learning-rate schedule."""
        o, run = self.flags.optimizer, self.flags.run
        progress = self.elapsed_seconds / run.max_seconds if run.max_seconds else self.step / run.steps
        return scheduled_learning_rate(self.step + 1, progress, o.warmup, peak_learning_rate(self.flags),
                                       o.lr_schedule, o.min_lr)

    def is_step_due(self, every: int) -> bool:
        """Return whether `step` is a multiple of `every`; 0 means never."""
        return bool(every) and self.step % every == 0

    def report_step(self, num_valid_tokens: int, spans: list) -> None:
        """Reduce the finished step's numbers over the ranks and write them to metrics.jsonl.

        `spans` are the timed instructions of the step. Raises ValueError when the loss is not finite.
        """
        self.step += 1
        elapsed = time.monotonic() - self.run_started_at
        clock = torch.tensor(elapsed * self.is_first_rank, dtype=torch.float64)
        # Other ranks add 0, so that the sum is the loss and rank 0's clock.
        both = torch.stack([self.stage.loss * self.reports_loss, clock])
        loss, self.elapsed_seconds = comm.all_reduce(both, self.mesh.world, "scalars").tolist()
        self._check_finite(loss)
        now = time.monotonic()
        step_seconds, self.step_started_at = now - self.step_started_at, now
        line = {"step": self.step, "loss": loss, **self.stage.grad_norm_metrics(), "lr": self.stage.lr,
                "tokens": num_valid_tokens, "step_s": step_seconds,
                "tokens_per_s": num_valid_tokens / step_seconds, "mfu": None,
                **self._measure_memory_and_traffic(spans)}
        if self.inputs.held_out and (self.is_step_due(self.flags.run.eval_every)
                                     or not self.should_continue()):
            line["held_out_bpb"] = self.evaluate_held_out_bits_per_byte()
        self.metrics_lines.append(line)
        if self.is_first_rank:
            self.metrics_log.write_step(line)
            self.progress_bar.show_step(line, self.elapsed_seconds, last=not self.should_continue())

    def evaluate_held_out_bits_per_byte(self) -> float:
        """Return the loss on held-out text in bits per byte, over all ranks."""
        data, held_out = self.mesh.data, self.inputs.held_out
        with self._off_the_clock():
            batches = held_out.micro_batches(self.flags.data.micro_batch, data.rank, data.size)
            nats = self.stage.sum_held_out_nats(batches)
            local = torch.tensor(nats * self.reports_loss, dtype=torch.float64)
            total = comm.all_reduce(local, self.mesh.world, "scalars")
        return held_out.bits_per_byte(total.item())

    def save_checkpoint(self) -> None:
        """Save a checkpoint of this step and draw the loss curve so far.

        Raises ValueError, and saves nothing, when a weight is not a finite number.
        """
        state = {**self.inputs.data_identity, **self.data_loader.state_dict(),
                 "threads": torch.get_num_threads(), "global_batch": self.global_batch,
                 "elapsed": self.elapsed_seconds,
                 "lr": self.stage.lr, "next_lr": self.next_learning_rate(),
                 "model": self.inputs.model_config.to_dict(), "flags": flags_to_dict(self.flags)}
        n, size = self.mesh.world.size, parameter_count(self.inputs.model_config)
        with self._off_the_clock():
            self._check_weights()
            self.run_directory.save_checkpoint(self.step, self.stage, state, self.flags.run.keep_checkpoints)
            self.run_directory.write_loss_plot(f"{self.flags.model.model}, {size:,} parameters, "
                                               f"{self.flags.model.dtype}, {n} rank{'s' * (n > 1)}")

    def finish(self) -> list[dict]:
        """Write the Perfetto timeline of --trace, and a note when a signal stopped the run."""
        if self.flags.run.trace:
            events = metrics_and_plots.perfetto_trace_events(
                self.mesh.rank, self.trace_spans, self.trace_records)
            ranks = comm.all_gather_json(events, self.mesh.world, "trace")
            if self.is_first_rank:
                all_events = [event for events in ranks for event in events]
                self.flags.run.trace.write_text(json.dumps({"traceEvents": all_events}))
        if self.stop_requests or self.stop_request.requested:            # the latter during the last step
            self.run_directory.write_stop_note(self.step)
        return self.metrics_lines

    def close(self) -> None:
        """Close the data loader, the progress bar and metrics.jsonl, and restore the signal handlers."""
        self.data_loader.close()
        if self.is_first_rank:
            self.progress_bar.close()
            self.metrics_log.file.close()
        self.stop_request.stop()

    @contextmanager
    def _off_the_clock(self):
        """Exclude what happens inside from step times, --max-seconds and the counted traffic."""
        begin = time.monotonic()
        yield
        self.run_started_at += time.monotonic() - begin
        self.step_started_at += time.monotonic() - begin
        self.mesh.comm_log.take_records()

    def _open_loader(self, consumed):
        data, flags = self.mesh.data, self.flags
        return MicroBatchLoader(self.inputs.dataset, seed=flags.model.seed, seq_len=self.inputs.seq_len,
                                global_batch=self.global_batch, micro_batch=flags.data.micro_batch,
                                dp_rank=data.rank, dp_size=data.size, first_sample=consumed)

    def _print_start(self, state):
        """Print one line on the model, mesh, batch and memory, and what changed since the checkpoint."""
        G, config = self.global_batch, self.inputs.model_config
        _, m = global_batch_and_num_micro_batches(replace(self.flags.data, global_batch=G),
                                                  self.mesh.data.size)
        parallel = (f", {self.flags.pipeline.schedule}" * (self.mesh.pp.size > 1)
                    + ", sequence parallel" * self.flags.axes.sp
                    + f", ZeRO-{self.flags.memory.zero}" * bool(self.flags.memory.zero))
        complete = replace_flags(self.flags, seq=self.inputs.seq_len, global_batch=G)
        memory = describe_memory_need(complete, self.mesh.world.size, config)
        going_on = f", going on after step {self.step}" if self.step else ""
        freeze = self.flags.model.freeze
        trained = f" ({trainable_parameter_count(freeze, config):,} of them trained)" if freeze else ""
        print(f"{self.flags.model.model}: {parameter_count(config):,} parameters{trained}, "
              f"{self.flags.model.dtype}, {self.mesh}{parallel}; "
              f"{G} x {self.inputs.seq_len} tokens a step in {m} micro-batches a rank; "
              f"{memory}; "
              f"into {self.run_directory.path}{going_on}", flush=True)
        if self.step:
            self._print_changes(state)

    def _print_changes(self, state):
        """Print which flags differ from those of the checkpoint, and how the learning rate changes."""
        changed = describe_changed_flags(state, self.flags, torch.get_num_threads(), self.global_batch)
        was, now = state.get("next_lr"), self.next_learning_rate()
        jumps = was is not None and self.should_continue() and not math.isclose(was, now, rel_tol=1e-6)
        rate = f": the learning rate goes from {state['lr']:.3g} to {now:.3g}" if jumps else ""
        if changed or rate:
            print(f"other than before: {', '.join(changed)}{rate}", flush=True)
        if not self.should_continue():
            run = self.flags.run
            done = f"--max-seconds {run.max_seconds:g}" if run.max_seconds else f"--steps {run.steps}"
            print(f"nothing is left to do: the run has had {done} already; give more to go on", flush=True)

    def _measure_memory_and_traffic(self, spans):
        """Bytes held and sent in the step, the maximum over ranks, without the traffic of this report."""
        records = self.mesh.comm_log.take_records()
        if self.flags.run.trace:
            self.trace_spans += spans
            self.trace_records += records
        sent = metrics_and_plots.payload_bytes_by_axis(records)
        numbers = [metrics_and_plots.distinct_storage_bytes(self.stage.persistent_tensors()),
                   peak_rss_bytes(),
                   *sent.values()]
        largest = metrics_and_plots.all_reduce_max(numbers, self.mesh.world)
        held, rss, *most_sent = map(int, largest)
        self.mesh.comm_log.take_records()
        return {"peak_bytes": {"counted": held, "rss": rss}, "comm": dict(zip(sent, most_sent))}

    def _check_finite(self, loss):
        norm = self.stage.grad_norm
        if not (math.isfinite(loss) and (math.isfinite(norm) or self.stage.skipped)):
            raise ValueError(f"step {self.step}: loss {loss}, gradient norm {norm}; {self._remedy()}")

    def _check_weights(self):
        """Refuse to save weights that are not finite: the loss would show them only one step later."""
        [bad] = metrics_and_plots.all_reduce_max([float(not self.stage.weights_are_finite())],
                                                 self.mesh.world)
        if bad:
            raise ValueError(f"step {self.step}: its update made weights that are no finite numbers, which "
                             f"are not saved; {self._remedy()}")

    def _remedy(self):
        return (f"{self.run_directory.describe_last_checkpoint(self.step)}; "
                f"try --lr {self.stage.lr / 3:.2g} or a longer --warmup")
