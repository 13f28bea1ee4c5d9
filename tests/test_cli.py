"""The command line as its users meet it: quick help, one line a mistake, a full disk that harms nothing."""
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from nanoinfra.cli import main
from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.checkpoint import safetensors_and_manifest, save_and_load

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["train", "--model", "test", "--data", "random", "--seq", "8", "--micro-batch", "2", "--threads", "1"]


def test_help_takes_less_than_a_second():
    """Of CPU: what else runs takes none of it."""
    before = sum(os.times()[2:4])
    seconds([sys.executable, "-m", "nanoinfra.cli", "--help"])
    assert sum(os.times()[2:4]) - before < 1.0


def test_help_imports_no_torch():
    code = ("import sys, nanoinfra.cli, nanoinfra.parse_and_run_command\n"
            "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.prove
def test_importing_the_trainer_adds_half_a_second_to_torch():
    pairs = [(seconds([sys.executable, "-c", "import torch, torch.distributed"]),
              seconds([sys.executable, "-c", BARE + "import nanoinfra.train.trainer"])) for _ in range(5)]
    assert median(b - a for a, b in pairs) <= 0.5


def test_trainer_needs_no_optional_package(tmp_path):
    """Triton, jupyter and transformers are made absent; the run trains all the same."""
    argv = [*QUICK, "--steps", "2", "--out", str(tmp_path)]
    code = BARE + f"from nanoinfra.cli import main; sys.exit(main({argv}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")) == 2


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "jupyterlab", "jupytext", "nbgrader", "IPython",
                                      "transformers", "gguf", "fastapi", "uvicorn", "prometheus_client"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""

MISTAKES = {
    "decay of sgd": (["--optimizer", "sgd", "--weight-decay", "0.1"], "--weight-decay: of AdamW's step"),
    "betas": (["--betas", "0.9", "1.0"], "each is at least 0 and below 1; try --betas 0.9 0.95"),
    "minimum above peak": (["--lr", "1e-3", "--min-lr", "0.01"], "--min-lr 0.01 is above the peak"),
    "minimum of a constant": (["--min-lr", "0", "--lr-schedule", "constant"], "leave one of them out"),
    "frozen by no name": (["--freeze", "layers.0.*"], "they are embed.weight, blocks.N."),
    "an empty corpus": (["--data", "{tmp}/empty"], "empty"),
    "a sequence longer than the corpus": (["--data", "{tmp}/short", "--seq", "100000"], "--seq"),
    "a mesh that does not fit the ranks": (["--nproc", "3", "--dp", "2"], "try --dp 3"),
    "an axis that is not built": (["--cp", "2"], "--cp 1"),
    "more stages than layers": (["--pp", "8"], "at most 4"),
    "chunks of a schedule that has none": (["--pp", "2", "--virtual-stages", "2"], "--schedule interleaved"),
    "an interleaved schedule that would hang": (
        ["--pp", "2", "--schedule", "interleaved", "--virtual-stages", "2", "--global-batch", "6"],
        "try 4 micro-batches"),
    "halves of a backward that one stage has not": (["--schedule", "zb-h1"], "try --pp 2"),
    "halves of a backward that runs again": (
        ["--pp", "2", "--schedule", "zb-h1", "--recompute", "full"], "--schedule 1f1b"),
    "gradients cut with every micro-batch": (["--pp", "2", "--zero", "2"], "use --zero 1"),
    "more ranks than can share the heads": (["--tp", "3"], "try --tp 2"),
    "an axis without ranks": (["--tp", "0", "--nproc", "2"], "at least 1"),
    "fewer ranks than an axis has": (["--tp", "2", "--nproc", "1"], "try 2 ranks"),
    "a stream cut over one rank": (["--sp"], "give --tp 2"),
    "kept, what is not gathered": (["--sp-save-gathered", "--tp", "2"], "give --sp too"),
    "an unknown model": (["--model", "gigantic"], "test, nano, micro"),
    "an unknown flag": (["--modle", "nano"], "did you mean --model? see nanoinfra train --help"),
    "a flag cut short": (["--step", "5"], "option --step; did you mean --steps? see nanoinfra train --help"),
    "a flag with its value": (["--max_restart=1"], "did you mean --max-restarts?"),
    "a switch": (["--resum"], "did you mean --resume?"),
    "a misspelt choice": (["--schedule", "1fb1"], "did you mean 1f1b? see nanoinfra train --help"),
    "a choice of another range": (["--zero", "4"], "'3'); see nanoinfra train --help"),
    "a misspelt model": (["--model", "nanoo"], "did you mean nano?"),
    "a device that is not there": (["--device", "cuda"], "no CUDA device here"),
    "a device that is not there, for two ranks": (["--device", "cuda", "--dp", "2"], "no CUDA device here"),
    "an --out below a file": (["--out", "{tmp}/binary/run", "--dp", "2"], "Not a directory"),
    "a --trace in no folder": (["--trace", "{tmp}/none/trace.json"], "there is no folder"),
    "a --trace in no folder, of two ranks": (["--trace", "{tmp}/none/t.json", "--dp", "2"], "--trace"),
    "a value of the wrong kind": (["--steps", "many"], "--steps"),
    "a folder that is not there": (["--data", "{tmp}/nowhere"], "nowhere"),
    "a file that is no text": (["--data", "{tmp}/binary"], "UTF-8"),
    "an --out that is a file": (["--out", "{tmp}/binary"], "binary"),
    "an --out that is a file, for two ranks": (["--out", "{tmp}/binary", "--dp", "2"], "binary"),
    "a wire that is no wire": (["--emulate-link", "dp=fast"], "dp=20e-6,1e9"),
    "no steps": (["--steps", "0"], "at least 1"),
    "ZeRO and another way to send": (["--zero", "2", "--grad-sync", "each"], "leave one of them out"),
    "selective recompute of a fused core": (["--recompute", "selective"], "--attention naive"),
    "nothing to resume": (["--resume", "--out", "{tmp}/new"], "start without --resume"),
}


@pytest.mark.parametrize("argv, says", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_a_remedy(tmp_path, capsys, argv, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    for name in "ab":
        (tmp_path / "short" / name).write_text(f"{name} short text\n" * 20)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    given = [part.replace("{tmp}", str(tmp_path)) for part in argv]
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path / "out"), *given]) == 2
    out = capsys.readouterr()
    assert out.err.count("\n") == 1 and out.err.startswith("nanoinfra: ") and says in out.err, out.err


COMMANDS = {
    "trian --steps 2": "unrecognized command trian; did you mean train? see nanoinfra --help",
    "serv m": "unrecognized command serv; did you mean serve? see nanoinfra --help",
    "serve m --block-sise 4 --foo": "unrecognized option --block-sise; did you mean --block-size? "
    "see nanoinfra serve --help",
    "generate m p --tempreature 2": "did you mean --temperature? see nanoinfra generate --help",
    "generate m p --dtype bflot16": "did you mean bfloat16? see nanoinfra generate --help",
    "doctor --devise cpu": "did you mean --device? see nanoinfra doctor --help",
    "doctor --device cuda": "no CUDA device here",
    "xyz": "unrecognized command xyz; see nanoinfra --help",
}


@pytest.mark.parametrize("line, says", COMMANDS.items(), ids=COMMANDS.keys())
def test_a_misspelt_word_says_what_was_meant(capsys, line, says):
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("nanoinfra: ") and says in said and said.count("\n") == 1, said


def test_a_disk_that_takes_nothing_is_seen_before_ranks_start(tmp_path, monkeypatch, capsys):
    """As root sees a file system that is mounted read-only: the folder is there, no file can be made."""
    def refuses(*args, **more):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    assert main([*QUICK, "--dp", "2", "--out", str(tmp_path)]) == 2
    assert "cannot write to --out" in (said := capsys.readouterr().err) and "Read-only" in said


@pytest.mark.parametrize("code, says", [(errno.EMFILE, "ulimit -n"), (errno.EACCES, "cannot write"),
                                        (errno.ENOENT, "was it removed or moved meanwhile?")])
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, code, says):
    def refuses(argv):
        raise OSError(code, os.strerror(code), "runs/a")
    monkeypatch.setattr("nanoinfra.parse_and_run_command.run_command", refuses)
    assert main(["train"]) == 2
    assert says in (said := capsys.readouterr().err) and said.count("\n") == 1


LEFT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}


@pytest.mark.parametrize("left, argv, says", [
    ({"RANK": "0", "WORLD_SIZE": "2"}, [], "but MASTER_ADDR and MASTER_PORT are not set"),
    ({"RANK": "0", "WORLD_SIZE": "1", **LEFT}, ["--dp", "2"], "unset them if no launcher has set them"),
    ({"RANK": "2", "WORLD_SIZE": "2", **LEFT}, [], "ranks of 2 count from 0"),
    ({"RANK": "a", "WORLD_SIZE": "2", **LEFT}, [], "RANK=a is no number")])
def test_what_is_left_in_a_shell_is_named_that_makes_a_process_a_rank(
        tmp_path, monkeypatch, capsys, left, argv, says):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert main([*QUICK, *argv, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert says in said and f"RANK={left['RANK']} and WORLD_SIZE={left['WORLD_SIZE']}" in said
    assert said.count("\n") == 1, said


def test_what_is_left_of_a_launcher_without_a_rank_changes_nothing(tmp_path, monkeypatch, capsys):
    left = {"TORCHELASTIC_RUN_ID": "nanoinfra-0", "TORCHELASTIC_RESTART_COUNT": "2", "LOCAL_RANK": "1",
            "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error"), "RANK": "1", **LEFT}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path / "run")]) == 2
    assert "--resume" in capsys.readouterr().err and not (tmp_path / "error").exists()


def test_a_mistake_only_ranks_can_see_is_one_line_too(tmp_path):
    (tmp_path / "data").mkdir()
    argv = [*QUICK, "--data", str(tmp_path / "data"), "--dp", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "nanoinfra.cli", *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("nanoinfra: the corpus") and done.stderr.count("\n") == 1, done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("nanoinfra.train.trainer.count_valid_tokens", lambda *_: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main([*QUICK, "--steps", "1", "--out", str(tmp_path)])


def test_a_run_is_not_overwritten(tmp_path, capsys):
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_resume_with_other_data_is_refused(tmp_path, capsys):
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert main([*QUICK, "--steps", "4", "--seed", "1", "--resume", "--out", str(tmp_path)]) == 2
    assert "has seed 0, this one 1" in capsys.readouterr().err


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.prove)])
def test_full_disk_at_any_write_leaves_the_last_checkpoint_good(tmp_path, monkeypatch, capsys, every):
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path)]) == 0
    writes = count_writes(monkeypatch, tmp_path)
    assert writes > 14
    capsys.readouterr()
    for fails in sorted({*range(0, writes, every), writes - 1}):
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_and_manifest, "write_all_bytes", FullDisk(fails))
            assert main([*QUICK, "--steps", "3", "--resume", "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "No space left on device" in said and said.count("\n") == 1, said
        assert save_and_load.find_newest_checkpoint(tmp_path / "checkpoints").name == "step_00000002"
        assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert main([*QUICK, "--steps", "3", "--resume", "--out", str(tmp_path)]) == 0
    assert [line["step"] for line in metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_file_size_limit_stops_with_one_line(tmp_path):
    """RLIMIT_FSIZE of 200 KiB: the metrics fit, the 655 KB checkpoint does not."""
    argv = [sys.executable, "-m", "nanoinfra.cli", *QUICK, "--steps", "1", "--out", str(tmp_path)]
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "-", *argv]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert save_and_load.find_newest_checkpoint(tmp_path / "checkpoints") is None


def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_checkpoint(tmp_path, capsys):
    argv = [*QUICK, "--optimizer", "sgd", "--lr", "1e30", "--clip", "0", "--warmup", "0", "--save-every", "1"]
    assert main([*argv, "--steps", "50", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "step" in said and "nan" in said and "the last checkpoint is" in said, said
    assert said.count("\n") == 1, said
    assert save_and_load.find_newest_checkpoint(tmp_path / "checkpoints") is not None


def test_run_directory_holds_what_the_contract_says(tmp_path):
    trace = tmp_path / "trace.json"
    assert main([*QUICK, "--steps", "3", "--out", str(tmp_path), "--trace", str(trace)]) == 0
    lines = metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "step_s", "tokens_per_s",
            "mfu", "peak_bytes", "comm"}
    assert [set(line) for line in lines] == [keys] * 3
    psi = parameter_count(ModelConfig(**json.loads((tmp_path / "config.json").read_text())["model"]))
    assert lines[0]["peak_bytes"]["counted"] == 16 * psi    # float32: weights, gradients, two moments
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert names == ["Forward", "Backward", "ReduceGrads", "OptimizerStep"] * 3
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


class FullDisk:
    """The disk is full from write number `fails` on."""

    def __init__(self, fails):
        self.left, self.write = fails, safetensors_and_manifest.write_all_bytes

    def __call__(self, file, data):
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        self.write(file, data)


def count_writes(monkeypatch, tmp_path):
    """Writes of one save, counted on a run beside."""
    counter = FullDisk(-1)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_and_manifest, "write_all_bytes", counter)
        assert main([*QUICK, "--steps", "1", "--out", str(tmp_path / "count")]) == 0
    return -1 - counter.left


def seconds(argv):
    begin = time.perf_counter()
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - begin
