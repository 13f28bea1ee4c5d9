"""Numbers with their kind: counted (exact), timed (median of n, with spread, on a named machine) or modelled.

`measure("L02.bytes", run)` calls `run()` only after a prediction was committed, and keeps the result beside
it.
"""
import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from nanoinfra.lab import predict as book
from nanoinfra.lab.doctor.machine_info import processor_name
from nanoinfra.lab.predict import format_quantity

MEASUREMENT_KINDS = ("counted", "timed", "modelled")


@dataclass(frozen=True)
class Measurement:
    """One number and how it came about. `spread`: largest less smallest of the n values, in the same unit."""
    value: float
    unit: str
    kind: str                  # of KINDS
    n: int = 1                 # values it is the median of
    spread: float = 0.0
    machine: str = ""          # where, for a time

    def __post_init__(self):
        if self.kind not in MEASUREMENT_KINDS:
            raise ValueError(f"a number is {', '.join(MEASUREMENT_KINDS)}; {self.kind!r} is none of them")

    def __str__(self):
        if self.kind != "timed":
            return f"{format_quantity(self.value, self.unit)} ({self.kind})"
        spread = format_quantity(self.spread, self.unit)
        return f"{format_quantity(self.value, self.unit)} (timed, median of {self.n}, spread {spread})"


def measure(key: str, run: Callable[..., Measurement], *args) -> Measurement:
    """`run(*args)`, kept beside the prediction for `key`; without one, ValueError, and nothing runs."""
    _, unit = book.last_prediction(key)
    got = run(*args)
    if not isinstance(got, Measurement):
        raise ValueError(f"{key}: what is measured returned {got!r}, and must return a Measurement; "
                         f"try counted({got!r}, {unit!r})")
    if got.unit != unit:
        raise ValueError(f"{key} was predicted in {unit!r} and measured in {got.unit!r}; "
                         f"predict it again in {got.unit!r}")
    numbers = book.read_numbers()
    numbers[key]["measured"] = asdict(got)
    book.write_numbers(numbers)
    print(f"{key}: {got}")
    return got


def counted(value: float, unit: str) -> Measurement:
    """An exact count."""
    return Measurement(value, unit, "counted")


def modelled(value: float, unit: str) -> Measurement:
    """What a formula says: never a measurement of anything."""
    return Measurement(value, unit, "modelled")


def median_of_times(values: list[float], unit: str = "s") -> Measurement:
    """The median of times that were taken elsewhere, for example in the ranks."""
    spread = max(values) - min(values)
    return Measurement(statistics.median(values), unit, "timed", len(values), spread, describe_machine())


def timed(run: Callable[[], object], n: int = 5) -> Measurement:
    """Seconds of one call of `run`: the median of n, after one call that is not counted."""
    run()
    return median_of_times([_seconds(run) for _ in range(n)])


def _seconds(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@functools.cache
def describe_machine() -> str:
    """This machine in words: cores and processor."""
    return f"{os.cpu_count()} cores, {processor_name()}"
