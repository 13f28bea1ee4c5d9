"""`nanoinfra serve`: one port, one server on it, and an end that lets running answers finish.

SIGTERM or Ctrl-C: what runs may go on for a while, what is new is refused with 503; then the process ends
with 0 and leaves nothing behind, also while it loads or when the engine hangs. A second signal takes the
while away. Before `main`, while Python begins, a signal ends it with one line (train/launch/signals.py).
"""
import functools
import socket
import sys

from nanoinfra.distributed.cpu_threads import use_threads
from nanoinfra.serve.options import EngineOptions, ServeOptions, check_serve_options
from nanoinfra.serve.processes.tp_group import TensorParallelGroup
from nanoinfra.serve.server.http.api_keys import VARIABLE, read_keys
from nanoinfra.serve.server.http.shutdown_signals import end_with_0

NEEDS = ("fastapi", "uvicorn", "prometheus_client")


@end_with_0
def main(options: ServeOptions, factory=None) -> int:
    """Serve until a signal comes; returns 0. `factory(team)` makes the engine, by default as `options` say.

    Raises ValueError for flags that cannot be, a port that is taken, a model that cannot be loaded.
    """
    check_serve_options(options)
    keys = read_keys(options)                # before the ranks inherit the environment
    _check_extra()
    from nanoinfra.serve.processes.engine_client import EngineClient
    from nanoinfra.serve.server.app import build
    from nanoinfra.serve.server.http.access_control import Access, is_loopback_address
    from nanoinfra.serve.server.http.graceful_shutdown import Server
    from nanoinfra.serve.server.metrics import Counters
    name, tp = options.served_model_name or options.engine.model, options.engine.tp
    worker = EngineClient(factory or functools.partial(open_ranked, options.engine), Counters(name), tp)
    with listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        access = Access(keys, is_loopback_address(host), options.allow_origin, options.cache_salt_per_key)
        _say_where(name, host, port, access)
        Server(build(worker, name, access), options.shutdown_timeout,
               _limits(options.engine)).run(sockets=[listener])
    if worker.load_error:
        raise ValueError(worker.load_error)
    return 0


def open_ranked(options: EngineOptions, team: TensorParallelGroup):
    """The engine of one rank, in its own process."""
    from nanoinfra.serve.engine.load_engine import load_engine
    use_threads(options.threads, options.tp)
    engine = load_engine(options, team.init_tp_mesh(options.tp))
    if engine.tokenizer is None:
        raise ValueError(f"{options.model} holds no tokenizer.json to talk with it; copy the one it was "
                         "trained with into it")
    return engine


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the port. Raises ValueError if it cannot be, before a model is loaded for nothing.

    It says that it is TCP's: else asyncio leaves Nagle's algorithm on, and every answer takes 40 ms longer.
    """
    listener = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        return listener
    except OSError as error:
        if listener:
            listener.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}; name another --host or "
                         "--port; --port 0 finds one that is free") from error


def _limits(engine):
    """More connections than requests that the engine takes, so that who comes then is told so."""
    from nanoinfra.serve.server.http.connections import MOST_CONNECTIONS, limits_here
    return limits_here(max(MOST_CONNECTIONS, 2 * (engine.max_num_seqs + engine.max_queued_requests)))


def _say_where(name, host, port, access):
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"nanoinfra: {name} at {where}, once it is loaded", file=sys.stderr, flush=True)
    if not access.loopback and not access.keys:
        print(f"nanoinfra: whoever reaches port {port} of this machine may use it, web pages too; to ask for "
              f"a key, set {VARIABLE}", file=sys.stderr, flush=True)


def _check_extra():
    for package in NEEDS:
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ValueError(f"the server needs the package {error.name}; "
                             'pip install "nanoinfra[serve]"') from error
