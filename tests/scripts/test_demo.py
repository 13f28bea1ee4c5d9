"""The demo is what a newcomer sees first: it runs, and its count of whole functions can be trusted."""
import importlib.util
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoinfra.train import metrics_and_plots
from nanoinfra.train.checkpoint import save_and_load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_make_demo_runs_for_five_seconds(tmp_path):
    done = subprocess.run(["make", "demo", "SECONDS=5", f"OUT={tmp_path}", "HEADERS=3"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["held_out_bpb"] > 0
    assert save_and_load.find_newest_checkpoint(tmp_path / "checkpoints") and (tmp_path / "loss.png").exists()
    assert re.search(r"trained \d+%, untrained \d+%", done.stdout)
    answer = done.stdout.partition("SmolLM2-135M, asked")[2].partition("s in all")[0]
    assert len(answer.split()) > 20                                        # the question, and an answer
    assert done.stdout.count("nanoinfra ") >= 2 and "make lessons" in done.stdout


def test_the_demo_deletes_an_earlier_run_and_nothing_else(demo, tmp_path, monkeypatch):
    def ends(*_):
        raise InterruptedError
    monkeypatch.setattr(demo.subprocess, "Popen", ends)
    args = SimpleNamespace(out=tmp_path, seconds=1)
    for name, text in {"config.json": '{"nanoinfra": 1}', "metrics.jsonl": "", "notes": "mine"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InterruptedError):
        demo.train(args)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit, match="not of a run of nanoinfra"):
        demo.train(args)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "config.json"}


@pytest.mark.parametrize("text, whole", [
    ("def f(x):\n    a = x\n    b = a\n    return b\n", True),
    ("def f(x):\n    if x:\n        return 1\n    return 2\n", True),
    ("def f(x):\n    a = x\n    return a\n", False),                       # two statements
    ("def f(x):\n    a = x\n    b = (a\n    return b\n", False),           # does not parse
    ("def f(x):\n", False),
    ("def f(x):\n    a\n    b\n    c\nx = 1\n", False),                    # more than the function
    ("def f(x):\n    a\0\n    b\n    c\n", False),
])
def test_a_whole_function(demo, text, whole):
    assert demo.is_whole(text) == whole


def test_headers_are_held_out_and_one_line(demo):
    headers = demo.headers(40)
    held_out = [document.text for document in demo.load_corpus().held_out]
    assert len(headers) == 40
    for header in headers:
        assert header.startswith("def ") and header.endswith(":\n") and header.count("\n") == 1
        assert any(header in text for text in held_out)
