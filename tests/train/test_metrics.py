"""What a run says of itself can be read back, cut, drawn and opened in Perfetto."""
import json

import torch

from nanoinfra.distributed.comm_log import CommRecord
from nanoinfra.parallel.pipeline.schedules import Forward
from nanoinfra.train import metrics_and_plots


def line(step):
    return {"step": step, "loss": 1 / 3 + step, "tokens": 10, "tokens_per_s": 5.0}


def test_floats_survive_at_full_precision_and_each_line_is_there_at_once(tmp_path):
    log = metrics_and_plots.MetricsLog(tmp_path / "m.jsonl")
    log.write_step(line(1))
    assert metrics_and_plots.read_metrics(tmp_path / "m.jsonl") == [line(1)]  # before the file is closed
    log.file.close()


def test_going_on_cuts_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    whole = "".join(json.dumps(line(i)) + "\n" for i in (1, 2, 3))
    path.write_text(whole + '{"step": 4, "sent": {"data": 4}')
    log = metrics_and_plots.MetricsLog(path, resumed_after_step=2)
    log.write_step(line(3))
    log.file.close()
    assert metrics_and_plots.read_metrics(path) == [line(1), line(2), line(3)]


def test_a_new_run_starts_an_empty_log(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(line(1)) + "\n")
    metrics_and_plots.MetricsLog(tmp_path / "m.jsonl").file.close()
    assert metrics_and_plots.read_metrics(tmp_path / "m.jsonl") == []


def test_sent_adds_payload_by_axis_and_keeps_scalars_apart():
    sizes = (("grads", 40), ("scalars", 8), ("grads", 2))
    rows = [CommRecord("all_reduce", "data", tag, 2, size, 1, 0.0) for tag, size in sizes]
    assert metrics_and_plots.payload_bytes_by_axis(rows) == {"data": 42, "scalars": 8}


def test_held_counts_a_shared_storage_once():
    x = torch.zeros(10)
    assert metrics_and_plots.distinct_storage_bytes([x, x[2:5], x.view(2, 5),
                                                     torch.zeros(3, dtype=torch.float64)]) == 40 + 24


def test_running_mean_is_corrected_for_its_start():
    assert metrics_and_plots._running_mean([2.0, 2.0, 2.0]) == [2.0, 2.0, 2.0]
    assert metrics_and_plots._running_mean([1.0, 2.0], weight=0.5) == [1.0, (0.25 + 1.0) / 0.75]


def test_trace_has_one_process_a_rank_in_microseconds():
    rows = [CommRecord("all_reduce", "data", "grads", 2, 40, 1, start_time=1.5, end_time=1.75,
                       wait_seconds=0.125)]
    name, step, wire = metrics_and_plots.perfetto_trace_events(3, [(Forward(2), 1.0, 1.25)],
                                                               rows)
    assert name["args"]["name"] == "rank 3" and {e["pid"] for e in (name, step, wire)} == {3}
    assert (step["name"], step["ts"], step["dur"]) == ("Forward", 1e6, 0.25e6)
    assert step["args"] == {"micro_batch": 2, "chunk": 0}
    assert (wire["name"], wire["ts"], wire["args"]) == (
        "all_reduce", 1.5e6, {"tag": "grads", "payload_bytes": 40, "wait_ms": 125.0})


def test_plot_draws_losses_and_held_out_points(tmp_path):
    log = metrics_and_plots.MetricsLog(tmp_path / "m.jsonl")
    for i in range(5):
        log.write_step({**line(i), **({"held_out_bpb": 2.0 - i / 10} if i % 2 else {})})
    log.file.close()
    metrics_and_plots.plot_loss_curve(tmp_path / "m.jsonl", tmp_path / "loss.png", "test")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
