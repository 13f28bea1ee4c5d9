"""The log: a line that repeats is counted, and what clients send cannot draw on the terminal."""
import logging

import pytest

from nanoinfra.serve.server.http.log_filters import (
    _MAX_REMEMBERED_LINES,
    RepeatedLogFilter,
    count_repeated_log_lines,
    escape_unprintable,
)


@pytest.fixture
def log(caplog):
    """(logger, the lines that it has written, with their tracebacks)."""
    logger, formatter = logging.getLogger("uvicorn.error"), logging.Formatter("%(message)s")
    with count_repeated_log_lines(), caplog.at_level("WARNING", "uvicorn.error"):
        yield logger, lambda: [formatter.format(record) for record in caplog.records]
    assert not logger.filters


def test_a_line_that_repeats_is_counted(log):
    logger, lines = log
    for i in range(1000):
        logger.warning("Invalid HTTP request of %s.", i)                  # one place, whatever it says
    logger.warning("Another.")
    *repeats, last = lines()
    assert repeats[:3] == ["Invalid HTTP request of 0.", "Invalid HTTP request of 1. (2 times by now)",
                           "Invalid HTTP request of 3. (4 times by now)"]
    assert len(repeats) == 10 and repeats[-1].endswith("(512 times by now)") and last == "Another."


def fail(word):
    if word == "odd":
        raise ValueError("of another line")
    raise ValueError(f"of {word}\x1b[31m\nnanoinfra: ready")


def test_an_error_is_written_down_once_for_each_line_it_comes_from(log):
    logger, lines = log
    for word in ("one", "two", "odd", "three"):
        try:
            fail(word)
        except ValueError:
            logger.exception("our mistake\n")
    first, again, odd = lines()
    assert "Traceback" in first and "of one\\x1b[31m" in first and "\x1b" not in first
    assert again == "our mistake (2 times by now)"
    assert "Traceback" in odd and "of another line" in odd


def test_what_does_not_print_is_spelled():
    assert escape_unprintable("déjà vu 你好 \\ '\"") == "déjà vu 你好 \\ '\""
    got = escape_unprintable("a\r\nb\x1b[2J\x00\x9b\u202e\u2028\ud800\t")
    assert got == r"a\r\nb\x1b[2J\x00\x9b\u202e\u2028\ud800\t"


def test_a_client_cannot_write_a_line_of_its_own(log):
    logger, lines = log
    logger.warning("odd: %s", "x\nnanoinfra: ready\x1b[2J")
    assert lines() == [r"odd: x\nnanoinfra: ready\x1b[2J"]


def test_what_is_remembered_has_a_bound():
    repeats = RepeatedLogFilter()
    for i in range(3 * _MAX_REMEMBERED_LINES):
        repeats.filter(logging.LogRecord("x", logging.WARNING, f"template {i}", i, "text", (), None))
    assert len(repeats.counts) <= _MAX_REMEMBERED_LINES
