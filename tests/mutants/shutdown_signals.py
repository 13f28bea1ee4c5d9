"""Known-wrong answers to SIGTERM and Ctrl-C while no server takes them."""
import contextlib
import os
import signal
from unittest import mock

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.server.http import exit_with_0_on_signals

ending = Check("ending without a server")


def ended(main):
    """`main` as a command, and then Python's last moments: (its handlers, those after, how it ended)."""
    before, last, how = handlers(), [], []
    with mock.patch("atexit.register", lambda call, *args: last.append((call, args))):
        try:
            how.append(exit_with_0_on_signals.exit_zero_on_shutdown_signals(main)())
        except ValueError as error:
            how.append(error)
        after = handlers()
        try:
            for call, args in last:
                call(*args)
            return before, after, handlers(), how[0]
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)


def handlers():
    return {sign: signal.getsignal(sign) for sign in exit_with_0_on_signals.SHUTDOWN_SIGNALS}


@ending.criterion("without a server a signal ends it with 0", "property")
def _(subject):
    *_, inside = subject(handlers)
    for sign, handler in inside.items():
        with mock.patch("os._exit") as leave, contextlib.suppress(KeyboardInterrupt):
            if callable(handler):
                handler(sign, None)
        if leave.call_args != mock.call(0):
            raise CriterionNotMet(f"{sign.name} while packages are imported: {handler}, want an end with 0")


@ending.criterion("a mistake gives the signals back", "property")
def _(subject):
    def mistake():
        raise ValueError("no such flag")
    before, after, *_ = subject(mistake)
    if before != after:
        raise CriterionNotMet(f"after a mistake {after}, want {before}")


@ending.criterion("no signal ends Python's last moments", "property")
def _(subject):
    *_, last, _ = subject(handlers)
    if any(handler != signal.SIG_IGN for handler in last.values()):
        raise CriterionNotMet(f"at the end {last}: Python drops handlers before it is gone; want SIG_IGN")


def keeps_them(main):
    """It takes the signals, and gives nothing back."""
    def ends():
        for sign in exit_with_0_on_signals.SHUTDOWN_SIGNALS:
            signal.signal(sign, lambda *_: os._exit(0))
        return main()
    return ends


def forgets_the_last(main, whole=exit_with_0_on_signals.exit_zero_on_shutdown_signals):
    def ends():
        with mock.patch("atexit.register"):
            return whole(main)()
    return ends


EARLY, MISTAKE, LAST = (criterion.name for criterion in ending.criteria)
END = "nanoinfra.serve.server.http.exit_with_0_on_signals:exit_zero_on_shutdown_signals"
MUTANTS = [
    Mutant("signals are Python's until a server is there", ending,
           patched(ended, END, lambda main: main), EARLY),
    Mutant("a mistake keeps the signals", ending, patched(ended, END, keeps_them), MISTAKE),
    Mutant("the last moments are nobody's", ending, patched(ended, END, forgets_the_last), LAST),
]
