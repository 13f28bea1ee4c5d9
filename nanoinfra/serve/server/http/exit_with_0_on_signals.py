"""SIGTERM and Ctrl-C before and after the HTTP server runs: the process exits with code 0 at once.

While it runs, the server handles them (uvicorn_graceful_shutdown.py). Python alone would print a traceback
and exit with code 1 on Ctrl-C, and would be killed by SIGTERM.
"""
import atexit
import functools
import os
import signal
import threading
from collections.abc import Callable

SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_zero_on_shutdown_signals(main: Callable) -> Callable:
    """Decorate `main`: SHUTDOWN_SIGNALS exit the process with code 0, unless it sets other handlers.

    The handlers stay after `main` has returned, until Python ends. If it raises, the handlers from before
    are restored. Python handles signals in the main thread only; in others `main` is unchanged.
    """
    @functools.wraps(main)
    def main_with_handlers(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return main(*args, **kwargs)
        old_handlers = {signum: signal.signal(signum, lambda *_: os._exit(0)) for signum in SHUTDOWN_SIGNALS}
        try:
            result = main(*args, **kwargs)
        except BaseException:
            _set_handlers(old_handlers)
            raise
        ignored = dict.fromkeys(SHUTDOWN_SIGNALS, signal.SIG_IGN)        # Python drops handlers while it ends
        atexit.register(_set_handlers, ignored)
        return result
    return main_with_handlers


def _set_handlers(handlers):
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
