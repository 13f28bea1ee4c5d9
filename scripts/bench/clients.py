"""What people call a server with, unmodified: openai for Python and Node, langchain-openai, curl.

    python scripts/bench/clients.py [--langchain PEER/bin/python] [--url URL --name MODEL] [--out FILE]

Starts `nanoinfra serve MODEL` on a free port, unless --url says where one answers, and runs the programs of
chat_clients/ against it, which ask greedily, so that one question has one answer whichever way it is asked.
What is not installed is not run, and said so with what would install it: openai for Python is in the extra
[dev]; npm brings openai-node, into a folder that is removed; langchain-openai wants an environment of its
own: python3 -m venv PEER && PEER/bin/pip install langchain-openai. Ends with 1 after a wrong answer. Load
generators are in load_clients.py.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PROGRAMS = Path(__file__).resolve().with_name("chat_clients")


@contextmanager
def serving(model: str, name: str) -> Iterator[str]:
    """The address of `nanoinfra serve model`, while it runs."""
    command = [sys.executable, "-m", "nanoinfra.cli", "serve", model, "--port", "0", "--served-model-name",
               name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stderr.readline()
        if not (url := re.search(r"http://\S+\d", said)):
            raise SystemExit(f"the server says no address, but {said!r}")
        for line in process.stderr:
            if "ready" in line:
                break
        yield url[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def commands(langchain: str | None, folder: Path) -> Iterator[tuple[str, list[str] | None, str]]:
    """(client, its command or None where it is not there, what would install it) of each."""
    def program(name, python=sys.executable):
        return [os.path.abspath(python), str(PROGRAMS / name)]
    yield ("openai", program("openai_python.py") if find_spec("openai") else None,
           'pip install "nanoinfra[dev]"')
    yield "openai-node", _node(folder), "install node and npm, and let npm reach its registry"
    yield ("langchain-openai", program("with_langchain.py", langchain) if langchain else None,
           "python3 -m venv PEER && PEER/bin/pip install langchain-openai, then --langchain PEER/bin/python")
    yield "curl", program("with_curl.py") if shutil.which("curl") else None, "install curl"


def _node(folder):
    """The command of openai-node, once it is installed in `folder`."""
    if not (shutil.which("node") and shutil.which("npm")):
        return None
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai"]
    if subprocess.run(install, cwd=folder, stdout=sys.stderr).returncode:
        return None
    return ["node", shutil.copy(PROGRAMS / "openai_node.mjs", folder)]


def cases(client: str, command: list[str], url: str, name: str, folder: Path) -> Iterator[dict]:
    """What a client's program prints, a case each; where it ends too early, that is a wrong one."""
    head, wrong, cases = {"client": client, "version": "?"}, 0, 0
    with (tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            [*command, url, name], cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True) as process):
        for line in map(json.loads, process.stdout):
            if "version" in line:
                head = line
            else:
                cases, wrong = cases + 1, wrong + ("wrong" in line)
                yield head | line
        code = process.wait()
        errors.seek(0)
        if code != int(wrong > 0) or not cases:
            yield head | {"case": "the program", "wrong": f"it ended with {code}: {errors.read()[-500:]}"}


def show(row: dict) -> None:
    """A line of the table: client, version, case, what came."""
    said = row.get("result") or row.get("missing") or f"WRONG: {row['wrong']}"
    print(f"{row['client']:17}{row.get('version', ''):9}{row['case']:32}{said!r:.110}", flush=True)


def run(url: str, name: str, langchain: str | None) -> list[dict]:
    """Every client against the server at `url`, printed as it comes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for client, command, remedy in commands(langchain, Path(folder)):
            found = cases(client, command, url, name, Path(folder)) if command else [
                {"client": client, "case": "not run", "missing": remedy}]
            for row in found:
                show(row)
                rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what to serve; it needs a chat template")
    parser.add_argument("--url", help="of a server that runs; default: one is started")
    parser.add_argument("--name", help="what it calls the model; default: as --model")
    parser.add_argument("--langchain", help="python of the environment that has langchain-openai")
    parser.add_argument("--out", type=Path, help="write the table as JSON, as lessons/results/clients.json")
    given = parser.parse_args()
    name = given.name or given.model
    if given.url:
        rows = run(given.url.rstrip("/").removesuffix("/v1"), name, given.langchain)
    else:
        with serving(given.model, name) as url:
            rows = run(url, name, given.langchain)
    wrong = sum("wrong" in row for row in rows)
    print(f"{len(rows)} cases, {wrong} wrong")
    if given.out:
        given.out.write_text(json.dumps({"model": given.model, "kind": "counted", "cases": len(rows),
                                         "wrong": wrong, "results": rows}, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
