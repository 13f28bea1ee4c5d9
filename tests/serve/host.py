"""A server for tests: the real app, worker and uvicorn, with the fake engine, on a port of its own."""
import functools
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from nanoinfra.serve.processes.engine_client import EngineClient
from nanoinfra.serve.server.fastapi_app import build_app
from nanoinfra.serve.server.http.access_control import AccessPolicy
from nanoinfra.serve.server.http.connection_limits import ConnectionLimits
from nanoinfra.serve.server.http.uvicorn_graceful_shutdown import GracefulServer
from nanoinfra.serve.server.launch_server import create_server_socket
from nanoinfra.serve.server.prometheus_metrics import ServerMetrics
from tests import processes
from tests.serve.fake import fake

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "nanoinfra.cli", "serve", "--port", "0"]
PATIENCE = 300.0                             # seconds for an answer: a loaded machine is slow, and not wrong

CODE = """
import functools, sys
from nanoinfra.serve.server.launch_server import run_server
from nanoinfra.serve.command_line_options import EngineOptions, ServeOptions
from tests.serve.fake import {factory}
options = ServeOptions(EngineOptions("fake", tp={tp}), port=0, shutdown_timeout={drain})
sys.exit(run_server(options, functools.partial({factory}, **{engine})))
"""


@contextmanager
def serving(tp=1, key=None, hung=300.0, wait=True, factory=fake, access=None, limits=None, port=0,
            worker=None, **engine):
    """(client, server) with `engine` for the fake's arguments; all is over when it is left."""
    listener = create_server_socket("127.0.0.1", port)
    worker = worker or EngineClient(functools.partial(factory, **engine), ServerMetrics("fake"), tp, hung)
    access = access or AccessPolicy((key,) if key else ())
    server = GracefulServer(build_app(worker, "fake", access), 2.0, limits or ConnectionLimits())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
            if wait:
                until(lambda: client.get("/health").status_code == 200)
            yield client, server
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def running(tp=1, drain=20.0, factory=fake, ready=True, **engine):
    """(process, client): what `nanoinfra serve` runs, in a process of its own."""
    code = CODE.format(tp=tp, drain=drain, factory=factory.__name__, engine=engine)
    with started([sys.executable, "-c", code], ready) as both:
        yield both


@contextmanager
def started(command, ready=True, environment=None):
    """(process, client) of a command that serves, once it is `ready`, or says where it will be.

    However this ends, nothing of it is left.
    """
    with processes.started(command, cwd=ROOT, env=environment or os.environ, text=True,
                           stderr=subprocess.PIPE) as process:
        said = process.stderr.readline()
        if not (url := re.search(r"http://\S+\d", said)):
            raise RuntimeError(f"{command[-1]} says no address, but {said!r}")
        with httpx.Client(base_url=url[0], timeout=PATIENCE, trust_env=False) as client:
            if ready:
                until(lambda: client.get("/health").status_code == 200)
            yield process, client


def until(true):
    """Wait for it, as tests.processes.until does. A connection that cannot be made, or ends, is a no."""
    def holds():
        with suppress(httpx.TransportError):             # before the port is open
            return true()
        return False
    processes.until(holds)


def metric(client, name):
    """The value of a metric without a further label, as Prometheus reads it."""
    start = f'vllm:{name}{{model_name="fake"}}'
    return next(float(line.split()[-1]) for line in client.get("/metrics").text.splitlines()
                if line.startswith(start))
