"""`nanoinfra serve`: open the port, start engine client and HTTP server, shut down gracefully.

On SIGTERM or Ctrl-C running requests may continue for --shutdown-timeout seconds, and new ones get 503.
Then the process exits with code 0 and leaves no process behind, also while the model loads or when the
engine hangs. A second signal ends it at once. A signal before `run_server`, while Python starts, ends it
with one line (train/launch/stop_signals.py).
"""
import functools
import socket
import sys
from collections.abc import Callable

from nanoinfra.distributed.cpu_threads import set_torch_threads
from nanoinfra.serve.command_line_options import EngineOptions, ServeOptions, check_serve_options
from nanoinfra.serve.processes.tensor_parallel_group import TensorParallelGroup
from nanoinfra.serve.server.http.api_keys import API_KEY_VARIABLE, read_api_keys
from nanoinfra.serve.server.http.exit_with_0_on_signals import exit_zero_on_shutdown_signals

_REQUIRED_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@exit_zero_on_shutdown_signals
def run_server(options: ServeOptions, engine_factory: Callable | None = None) -> int:
    """Serve until a signal comes; returns the exit code 0.

    `engine_factory(tp_group)` makes the engine of each rank; by default it is load_rank_engine. Raises
    ValueError for impossible flags, a port that is in use, and a model that cannot be loaded.
    """
    check_serve_options(options)
    api_keys = read_api_keys(options)        # before the ranks inherit the environment
    _check_packages()
    from nanoinfra.serve.processes.engine_client import EngineClient
    from nanoinfra.serve.server.fastapi_app import build_app
    from nanoinfra.serve.server.http.access_control import AccessPolicy, is_loopback_address
    from nanoinfra.serve.server.http.uvicorn_graceful_shutdown import GracefulServer
    from nanoinfra.serve.server.prometheus_metrics import ServerMetrics
    served_model_name, tp = options.served_model_name or options.engine.model, options.engine.tp
    engine_client = EngineClient(engine_factory or functools.partial(load_rank_engine, options.engine),
                                 ServerMetrics(served_model_name), tp)
    with create_server_socket(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        access_policy = AccessPolicy(api_keys, is_loopback_address(host), options.allow_origin,
                                     options.cache_salt_per_key)
        _print_address(served_model_name, host, port, access_policy)
        GracefulServer(build_app(engine_client, served_model_name, access_policy), options.shutdown_timeout,
                       _connection_limits(options.engine)).run(sockets=[listener])
    if engine_client.load_error:
        raise ValueError(engine_client.load_error)
    return 0


def load_rank_engine(options: EngineOptions, tp_group: TensorParallelGroup):
    """Load the engine of one rank; called in that rank's own process."""
    from nanoinfra.serve.engine.load_engine import load_engine
    set_torch_threads(options.threads, options.tp)
    engine = load_engine(options, tp_group.init_tp_mesh(options.tp))
    if engine.tokenizer is None:
        raise ValueError(f"{options.model} holds no tokenizer.json to talk with it; copy the one it was "
                         "trained with into it")
    return engine


def create_server_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket on the port. Raises ValueError if the port cannot be used.

    It is made before the model is loaded. Its protocol is set to TCP: otherwise asyncio leaves Nagle's
    algorithm on, and every response takes 40 ms longer.
    """
    listener = None
    try:
        family, socket_type, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket_type, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        return listener
    except OSError as error:
        if listener:
            listener.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}; name another --host or "
                         "--port; --port 0 finds one that is free") from error


def _connection_limits(engine):
    """Allow more connections than the engine takes requests, so that clients beyond it still get a 429."""
    from nanoinfra.serve.server.http.connection_limits import (
        DEFAULT_MAX_CONNECTIONS,
        connection_limits_within_ulimit,
    )
    return connection_limits_within_ulimit(max(DEFAULT_MAX_CONNECTIONS,
                                               2 * (engine.max_num_seqs + engine.max_queued_requests)))


def _print_address(served_model_name, host, port, access_policy):
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"nanoinfra: {served_model_name} at {url}, once it is loaded", file=sys.stderr, flush=True)
    if not access_policy.loopback_only and not access_policy.api_keys:
        print(f"nanoinfra: whoever reaches port {port} of this machine may use it, web pages too; to ask for "
              f"a key, set {API_KEY_VARIABLE}", file=sys.stderr, flush=True)


def _check_packages():
    for package in _REQUIRED_PACKAGES:
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ValueError(f"the server needs the package {error.name}; "
                             'pip install "nanoinfra[serve]"') from error
