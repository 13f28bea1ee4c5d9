"""Log filters: repeated lines are counted instead of written, and control characters are escaped.

Any client can make the server log as often as it likes. Lines count as the same if they come from the same
place in the code, so the memory of the filter does not grow with what clients send.
"""
import logging
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGER_NAMES = ("uvicorn.error", "asyncio", "nanoinfra.serve")
_MAX_REMEMBERED_LINES = 1000                 # places in the code


def escape_unprintable(text: str) -> str:
    """The text with unprintable characters, line ends too, written as Python's escape sequences."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@contextmanager
def count_repeated_log_lines() -> Iterator[None]:
    """A context in which the server's loggers write a repeated line only the 1st, 2nd, 4th, 8th ... time."""
    repeated_log_filter = RepeatedLogFilter()
    for name in _LOGGER_NAMES:
        logging.getLogger(name).addFilter(repeated_log_filter)
    try:
        yield
    finally:
        for name in _LOGGER_NAMES:
            logging.getLogger(name).removeFilter(repeated_log_filter)


class RepeatedLogFilter(logging.Filter):
    """Passes the 1st, 2nd, 4th, 8th ... record of each place in the code; tracebacks only with the 1st."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """True for a record to write; it gets its count, and unprintable characters are escaped."""
        log_site = (record.pathname, record.lineno, *_raised_at(record.exc_info))
        if len(self.counts) >= _MAX_REMEMBERED_LINES and log_site not in self.counts:
            self.counts.clear()
        self.counts[log_site] += 1
        count = self.counts[log_site]
        record.msg, record.args = escape_unprintable(record.getMessage().strip()), ()
        if count > 1:
            record.msg += f" ({count} times by now)"
            record.exc_info = record.exc_text = None
        elif record.exc_info:
            lines = "".join(traceback.format_exception(*record.exc_info)).rstrip().split("\n")
            record.exc_text = "\n".join(map(escape_unprintable, lines))
        return count & (count - 1) == 0


def _raised_at(exc_info):
    """The type of the exception, and the file and line that raised it."""
    if not exc_info or not exc_info[2]:
        return ()
    last = traceback.extract_tb(exc_info[2])[-1]
    return exc_info[0], last.filename, last.lineno
