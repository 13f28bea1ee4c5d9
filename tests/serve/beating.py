"""A server in a process of its own, whose event loop has a heartbeat: GET /lag says how late it was at worst.

`cpu` is the processor time that the process used from one beat to the next: unlike seconds of a clock it
does not grow because other programs run.
"""
import asyncio
import functools
import json
import sys
import time

from nanoinfra.serve.processes.engine_client import EngineClient
from nanoinfra.serve.server.fastapi_app import build_app
from nanoinfra.serve.server.http.uvicorn_graceful_shutdown import GracefulServer
from nanoinfra.serve.server.launch_server import create_server_socket
from nanoinfra.serve.server.prometheus_metrics import ServerMetrics
from tests.serve.fake import TEMPLATE, Fake
from tests.serve.host import started

BEAT = 0.001
LOOP = ("{% for m in messages if m.role == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}" + TEMPLATE)


def looping(team, template=LOOP, model=None, **options):
    """The fake engine with a `model`'s tokenizer, and a template that goes on where a role is "loop"."""
    engine = Fake(**options)
    engine.chat_template = template
    if model:
        from nanoinfra.model.weights.load_model import (
            open_model_weights,  # in the engine's process alone: it imports torch
        )
        engine.tokenizer = open_model_weights(model).tokenizer
    return engine


class Beating(GracefulServer):
    """Beats from the start; the app knows the worst since it was asked."""

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.worst = {"wall": 0.0, "cpu": 0.0}
        self.beats = asyncio.create_task(self.beat())

    async def beat(self):
        while True:
            wall, cpu = time.monotonic(), time.process_time()
            await asyncio.sleep(BEAT)
            late = {"wall": time.monotonic() - wall - BEAT, "cpu": time.process_time() - cpu}
            self.worst = {name: max(self.worst[name], value) for name, value in late.items()}

    async def lag(self):
        worst, self.worst = self.worst, {"wall": 0.0, "cpu": 0.0}
        return worst


def main():
    engine = json.loads(sys.argv[1])
    worker = EngineClient(functools.partial(looping, **engine), ServerMetrics("fake"))
    app = build_app(worker, "fake")
    server = Beating(app, shutdown_timeout=2.0)
    app.add_api_route("/lag", server.lag)
    with create_server_socket("127.0.0.1", 0) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        server.run(sockets=[listener])


def beating(**engine):
    """(process, client) of such a server, as tests.serve.host.running."""
    code = "from tests.serve.beating import main; main()"
    return started([sys.executable, "-c", code, json.dumps(engine)])
