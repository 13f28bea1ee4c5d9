"""SIGTERM and Ctrl-C while no server takes them (drain.py), before or after it: nothing runs, so all ends.

What Python does by itself is a traceback and code 1 for Ctrl-C, and death by the signal for SIGTERM.
"""
import atexit
import functools
import os
import signal
import threading
from collections.abc import Callable

ENDING = (signal.SIGINT, signal.SIGTERM)


def end_with_0(main: Callable) -> Callable:
    """`main`, in which these signals end the process at once, with exit code 0, unless it takes them over.

    They still do when it has returned, as the process is about to end then; an error gives them back. Outside
    the main thread, which alone hears signals, `main` is as it was.
    """
    @functools.wraps(main)
    def ends(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return main(*args, **kwargs)
        before = {sign: signal.signal(sign, lambda *_: os._exit(0)) for sign in ENDING}
        try:
            code = main(*args, **kwargs)
        except BaseException:
            _set(before)
            raise
        atexit.register(_set, dict.fromkeys(ENDING, signal.SIG_IGN))     # Python's last moments drop handlers
        return code
    return ends


def _set(handlers):
    for sign, handler in handlers.items():
        signal.signal(sign, handler)
