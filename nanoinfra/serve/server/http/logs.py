"""What the server writes to its log: a line that repeats is counted, and clients cannot draw on the terminal.

Anybody who connects can make the server log, as often as they like. A line is known by where in the code it
comes from, so that what is remembered does not grow with what clients send.
"""
import logging
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("uvicorn.error", "asyncio", "nanoinfra.serve")
MOST = 1000                                  # places that are remembered


def visible(text: str) -> str:
    """The text, with what does not print as itself, line ends too, as Python would spell it."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@contextmanager
def counted_logs() -> Iterator[None]:
    """While it lasts, the server's loggers write a line for the 1st, 2nd, 4th, 8th ... time it comes."""
    repeats = CountRepeats()
    for name in LOGGERS:
        logging.getLogger(name).addFilter(repeats)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(repeats)


class CountRepeats(logging.Filter):
    """Lets every power of two of a line through, with the count; tracebacks with the first alone."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Also makes the line visible."""
        place = (record.pathname, record.lineno, *_raised_at(record.exc_info))
        if len(self.counts) >= MOST and place not in self.counts:
            self.counts.clear()
        self.counts[place] += 1
        count = self.counts[place]
        record.msg, record.args = visible(record.getMessage().strip()), ()
        if count > 1:
            record.msg += f" ({count} times by now)"
            record.exc_info = record.exc_text = None
        elif record.exc_info:
            lines = "".join(traceback.format_exception(*record.exc_info)).rstrip().split("\n")
            record.exc_text = "\n".join(map(visible, lines))
        return count & (count - 1) == 0


def _raised_at(exc_info):
    """The kind of the exception and where it comes from."""
    if not exc_info or not exc_info[2]:
        return ()
    last = traceback.extract_tb(exc_info[2])[-1]
    return exc_info[0], last.filename, last.lineno
