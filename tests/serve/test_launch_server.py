"""`nanoinfra serve` as a process: what it says, how it ends, and that nothing is left of it."""
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from nanoinfra.cli import main
from nanoinfra.serve.command_line_options import GenerateOptions, parse_byte_size
from nanoinfra.serve.generate_with_kv_cache import main as generate
from tests.processes import children, gone
from tests.serve.host import ROOT, SERVE, metric, running, started, until


def answer(client, tokens, into):
    """Ask for `tokens` in a thread of its own; the response goes into the list."""
    body = {"prompt": "hello ", "max_tokens": tokens}
    thread = threading.Thread(target=lambda: into.append(client.post("/v1/completions", json=body)))
    thread.start()
    until(lambda: metric(client, "num_requests_running") == 1)
    return thread


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end(sign):
    with running(tp=2, pause=0.02) as (process, client):
        got, ranks = [], children(process.pid)
        thread = answer(client, 60, got)
        process.send_signal(sign)
        until(lambda: client.get("/health").status_code == 503)
        refused = client.post("/v1/completions", json={"prompt": "late"})
        assert refused.status_code == 503 and "about to end" in refused.text
        thread.join()
        assert got[0].status_code == 200 and got[0].json()["usage"]["completion_tokens"] == 60
        assert process.wait() == 0
        assert len(ranks) == 2 and gone(ranks) == []
        with pytest.raises(httpx.ConnectError):
            client.get("/health")
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("drain, signals", [(0.2, 1), (3600, 2)])
def test_what_does_not_end_in_time_gets_an_error(drain, signals):
    with running(2, drain, pause=0.02) as (process, client):
        got = []
        thread = answer(client, 500, got)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        thread.join()
        assert got[0].status_code == 503 and "the server ends" in got[0].text
        assert process.wait() == 0


def test_the_page_that_watches_does_not_keep_it_alive():
    with running(tp=2, pause=0.02) as (process, client), client.stream("GET", "/stats") as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        list(lines)                          # it ends
        assert process.wait() == 0


MISTAKES = {
    "a model that is not there": (["nowhere"], "nowhere"),
    "no ranks": (["m", "--tp", "0"], "--tp 0 is too small"),
    "no tokens": (["m", "--max-num-batched-tokens", "0"], "--max-num-batched-tokens 0 is too small"),
    "a port that is none": (["m", "--port", "70000"], "at most 65535"),
    "bytes that are none": (["m", "--kv-memory", "lots"], "512MiB"),
    "an empty key": (["m", "--api-key", ""], "leave it out"),
    "a key's file that is not there": (["m", "--api-key-file", "nowhere"], "-file nowhere: No such"),
    "salts without keys": (["m", "--cache-salt-per-key"], "give --api-key-file"),
    "an origin with a path": (["m", "--allow-origin", "https://a.com/"], "https://example.com"),
    "an origin that is a host": (["m", "--allow-origin", "*", "--allow-origin", "a.com"], "a.com is no"),
    "an origin that all have": (["m", "--allow-origin", "null"], "* for all"),
    "a host that is another's": (["m", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1")}


@pytest.mark.parametrize("argv, says", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_a_remedy(argv, says, capsys):
    assert main(["serve", *argv, *([] if "--port" in argv else ["--port", "0"])]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("nanoinfra: ") and says in said, said


def test_a_server_for_all_says_so_where_it_asks_for_no_key(capsys, monkeypatch):
    argv = ["serve", "nowhere", "--port", "0", "--host"]
    for host, key, warned in (("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "k", False)):
        if key:
            monkeypatch.setenv("NANOINFRA_API_KEY", key)
        assert main([*argv, host]) == 2      # there is no such model
        assert ("whoever reaches port" in capsys.readouterr().err) == warned


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["serve", "nowhere", "--port", str(other.getsockname()[1])]) == 2
    said = capsys.readouterr().err
    assert "Address already in use" in said and "--port 0" in said and said.count("\n") == 1


@pytest.mark.parametrize("absent", ["fastapi", "uvicorn", "prometheus_client"])
def test_an_absent_package_names_the_extra(absent):
    code = (f"import sys; sys.modules['{absent}'] = None\n"
            "from nanoinfra.cli import main; sys.exit(main(['serve', 'm']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert absent in done.stderr and 'pip install "nanoinfra[serve]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_and_the_server_need_no_torch():
    code = ("import sys, contextlib, io\nfrom nanoinfra.cli import main\n"
            "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
            "    main(['serve', '--help'])\n"
            "assert 'fastapi' not in sys.modules\n"
            "import nanoinfra.serve.server.fastapi_app\n"
            "import nanoinfra.serve.server.http.uvicorn_graceful_shutdown\n"
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_bytes_are_spelled_in_several_ways():
    got = [parse_byte_size(each) for each in ("64", "2KiB", "1.5MiB", "1 GiB", "2GB", "3kB")]
    assert got == [64, 2048, 3 << 19, 1 << 30, 2_000_000_000, 3000]
    for wrong in ("", "GiB", "-1", "1e9", "1XB", "1.GiB"):
        with pytest.raises(ValueError, match="512MiB"):
            parse_byte_size(wrong)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.prove)])
def test_the_real_engine_says_what_generate_says(model, tp):
    """On two ranks the second is killed then: the next answer is the same again."""
    body, said = {"prompt": "one two", "max_tokens": 9, "temperature": 0}, []
    generate(GenerateOptions(str(model), "one two", 9, dtype="float64"), said.append)
    with started([*SERVE, str(model), "--served-model-name", "tiny", "--dtype", "float64", "--tp", str(tp),
                  "--kv-memory", "1MiB"]) as (process, client):
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 128
        for rank in children(process.pid):
            assert b"glibc.malloc.hugetlb=1" in Path(f"/proc/{rank}/environ").read_bytes()
        got = client.post("/v1/completions", json=body).json()
        assert got["model"] == "tiny" and got["choices"][0]["text"] + "\n" == "".join(said)
        if tp == 2:
            os.kill(children(process.pid)[1], signal.SIGKILL)
            until(lambda: client.get("/health").status_code == 503)
            until(lambda: client.get("/health").status_code == 200)
            assert client.post("/v1/completions", json=body).json()["choices"] == got["choices"]
        process.terminate()
        assert process.wait() == 0


@pytest.mark.prove
@pytest.mark.parametrize("tp", [1, 3])
def test_a_chat_model_knows_the_capital_of_france(tp):
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    with started([*SERVE, "smollm2-135m", "--tp", str(tp)]) as (process, client):
        got = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert "Paris" in got["message"]["content"] and got["finish_reason"] == "stop"
        process.terminate()
        assert process.wait() == 0
