"""Memory that cannot be had is refused before anything is allocated; what can be had is said, and is true."""
import json
import re

import pytest

from nanoinfra.cli import main
from nanoinfra.config import config_for_size
from nanoinfra.parse_and_run_command import parse_command_line
from nanoinfra.train import config, metrics_and_plots
from nanoinfra.train.launch import memory_check
from nanoinfra.train.launch.memory_check import (
    _PROCESS_BYTES,
    _SHARED_LIBRARIES_BYTES,
    check_memory_fits,
    config_of_named_size,
    machine_memory_by_part,
    rank_memory_by_part,
)
from tests.train.runs import finish

GB = 1e9


def asked(line):
    """(flags, ranks) of `nanoinfra train LINE`, as the command line has them."""
    flags = parse_command_line(["train", *line.split()])
    world = config.num_ranks_to_start(flags.axes, flags.launch.nproc)
    config.check_train_flags(flags, world)
    return flags, world


@pytest.fixture
def machine(monkeypatch):
    """`machine(n)`: this machine has n bytes."""
    def has(n):
        monkeypatch.setattr(memory_check, "host_memory_limit_bytes", lambda: int(n))
    return has


@pytest.fixture
def untouched(monkeypatch):
    """Nothing starts ranks, reads a corpus, draws weights or makes batches."""
    def touched(*_, **__):
        raise AssertionError("something was begun")
    for name in ("train.launch.launch_ranks.launch_ranks",
                 "train.open_model_and_data.open_dataset",
                 "train.trainer.TrainStage",
                 "train.trainer.MicroBatchLoader"):
        monkeypatch.setattr(f"nanoinfra.{name}", touched)


TOO_MUCH = ["--seq 1000000000", "--seq 1000000000 --data random", "--micro-batch 10000000",
            "--global-batch 10000000000", "--vocab 1000000000 --data random", "--micro-batch 4096 --dp 2",
            "--pp 2 --seq 100000000"]


@pytest.mark.parametrize("line", TOO_MUCH)
def test_what_cannot_be_had_is_refused_before_anything_is_begun(machine, untouched, capsys, tmp_path, line):
    machine(24 * GB)
    out = tmp_path / "run"
    assert main(["train", *line.split(), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"nanoinfra: the run would hold [\d,.]+ GB \(modelled: (\w+ [\d,.]+ GB(, )?)+\), and "
                        r"this machine has 24\.0 GB; try --.*\n", said), said
    assert not out.exists()


REMEDIES = {
    "--model nano --attention naive --seq 1024 --micro-batch 16": (2.5 * GB, "--attention sdpa"),
    "--model nano --micro-batch 64": (1.3 * GB, "--recompute full"),
    "--model small --dp 2 --micro-batch 1 --seq 64 --recompute full": (4.5 * GB, "--zero 1"),
    "--model micro --micro-batch 64 --recompute full": (1.5 * GB, "--micro-batch 32 --global-batch 64"),
    "--model micro --micro-batch 16 --seq 16384": (3 * GB, "--recompute full --micro-batch 2 --global-batch"),
    "--model small --pp 2 --schedule zb-h1": (9 * GB, "--micro-batch"),    # which runs no block again
    "--model small --micro-batch 1 --seq 65536 --recompute full": (12 * GB, "--dtype bfloat16"),
    "--model small --micro-batch 1 --seq 1000000": (10 * GB, "--seq 8192"),
    "--model xl --micro-batch 1": (24 * GB, "--model large"),
    "--model test --data random --dp 8": (1 * GB, "take fewer ranks"),
}


@pytest.mark.parametrize("line", REMEDIES)
def test_the_remedy_fits(machine, line):
    has, remedy = REMEDIES[line]
    machine(has)
    with pytest.raises(ValueError, match=remedy) as refused:
        check_memory_fits(*asked(line))
    if tried := re.search(r"; try (.*)", str(refused.value)):
        words = tried[1].split()
        kept = re.sub(f"({'|'.join(words[::2])}) \\S+", "", line)
        check_memory_fits(*asked(f"{kept} {tried[1]}"))


def test_what_fits_exactly_is_not_refused(machine):
    flags, world = asked("--model nano --dp 2")
    total = sum(machine_memory_by_part(flags, world, config_of_named_size(flags)).values())
    machine(total)
    check_memory_fits(flags, world)
    machine(total - 1)
    with pytest.raises(ValueError, match="this machine has"):
        check_memory_fits(flags, world)


def test_a_machine_answers_for_its_own_ranks(monkeypatch):
    flags, world = asked("--model nano --dp 2 --pp 2 --data random")
    model = config_of_named_size(flags)
    both = machine_memory_by_part(flags, world, model)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    halves = []
    for rank in (0, 3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        halves.append(machine_memory_by_part(flags, world, model))
    first, last = (sum(half.values()) for half in halves)
    assert first + last == sum(both.values()) + _SHARED_LIBRARIES_BYTES
    assert halves[0]["weights"] != halves[1]["weights"]                    # stages of their own


def test_text_counts_as_far_as_a_rank_keeps_it(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, size in (("a", 3000), ("in/deep/b", 5000)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert memory_check.data_text_bytes(tmp_path) == 8000
    assert memory_check.data_text_bytes(tmp_path / "a") == 3000
    assert memory_check.data_text_bytes(tmp_path / "none") == memory_check.data_text_bytes("random") == 0


def test_a_run_says_what_it_holds(machine, capsys, tmp_path):
    line = "--model test --data random --steps 1 --threads 1"
    flags, world = asked(line)
    want = sum(machine_memory_by_part(flags, world, config_of_named_size(flags)).values()) / GB
    machine(24 * GB)
    assert main(["train", *line.split(), "--out", str(tmp_path)]) == 0
    assert f"; holds {want:.1f} of 24.0 GB, modelled: processes 0.3 GB" in capsys.readouterr().out


RUNS = ["--model nano --micro-batch 32",
        "--model nano --micro-batch 16 --dtype bfloat16",
        "--model nano --micro-batch 16 --dtype float64 --recompute full",
        "--model nano --micro-batch 16 --attention naive --recompute selective",
        "--model nano --micro-batch 24 --dp 2 --zero 2",
        "--model nano --micro-batch 24 --tp 2 --attention naive",
        "--model nano --micro-batch 12 --global-batch 48 --pp 2 --untied",
        "--model nano --micro-batch 24 --dp 2 --zero 3",
        "--model micro --micro-batch 4 --seq 256 --tp 2 --sp",
        "--model small --micro-batch 1 --seq 128 --dp 2 --zero 1 --recompute full",
        pytest.param("--model micro --micro-batch 16 --seq 256 --dp 2 --zero 3 --recompute full",
                     marks=pytest.mark.xfail(reason="said 0.84 of the peak: holes in the heap, most likely"))]


@pytest.mark.prove
@pytest.mark.parametrize("line", RUNS)
def test_what_is_said_is_what_is_held(tmp_path, line):
    """Of the rank that holds the most; and so it is without what every process has."""
    line = f"{line} --data random --steps 3 --threads 1"
    flags, world = asked(line)
    said = max(sum(rank_memory_by_part(flags, world, config_of_named_size(flags), rank).values()) for rank
               in range(world))
    assert finish(["train", *line.split(), "--out", str(tmp_path)]) == 0
    got = max(step["peak_bytes"]["rss"] for step
              in metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")) - _SHARED_LIBRARIES_BYTES
    print(f"said {said / 1e6:,.0f} MB, had {got / 1e6:,.0f} MB, {said / got:.2f}; without the process "
          f"{(said - _PROCESS_BYTES) / (got - _PROCESS_BYTES):.2f}: {line}")
    assert said == pytest.approx(got, rel=0.15)
    assert said - _PROCESS_BYTES == pytest.approx(got - _PROCESS_BYTES, rel=0.15)


def test_weights_are_looked_at_before_the_corpus_is_read(machine, untouched, monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"nanoinfra": 1, "model": config_for_size("nano").to_dict()}))
    (run / "checkpoints").mkdir()
    machine(24 * GB)
    monkeypatch.setattr("nanoinfra.train.open_model_and_data.open_pretrained_weights",
                        lambda *_: Opened(config_for_size("nano")))
    argv = ["train", "--model", str(run), "--seq", "100000000", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "this machine has 24.0 GB; try --seq " in said, said


class Opened:
    """Weights of which only the configuration matters."""
    tokenizer = chat_template = tokenizer_folder = read_parameter = None

    def __init__(self, model):
        self.config = model
