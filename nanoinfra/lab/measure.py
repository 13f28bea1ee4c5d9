"""A measurement is counted (exact), timed (median of n, with spread and machine) or modelled (by a formula).

`measure("L02.bytes", run)` calls `run()` only after a prediction for that key was committed with `predict`,
and stores the result beside it in work/numbers.json.
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
    """A number, its unit and how it was obtained. `spread`: the largest less the smallest of n values."""
    value: float
    unit: str
    kind: str                  # of MEASUREMENT_KINDS
    n: int = 1                 # number of values; `value` is their median
    spread: float = 0.0
    machine: str = ""          # where a time was measured

    def __post_init__(self):
        if self.kind not in MEASUREMENT_KINDS:
            raise ValueError(f"a number is {', '.join(MEASUREMENT_KINDS)}; {self.kind!r} is none of them")

    def __str__(self):
        if self.kind != "timed":
            return f"{format_quantity(self.value, self.unit)} ({self.kind})"
        spread = format_quantity(self.spread, self.unit)
        return f"{format_quantity(self.value, self.unit)} (timed, median of {self.n}, spread {spread})"


def measure(prediction_key: str, run: Callable[..., Measurement], *args) -> Measurement:
    """Run `run(*args)` and store its Measurement beside the prediction for `prediction_key`.

    ValueError, before anything runs, if nothing was predicted; and for another unit than that of the
    prediction.
    """
    _, unit = book.last_prediction(prediction_key)
    got = run(*args)
    if not isinstance(got, Measurement):
        raise ValueError(f"{prediction_key}: what is measured gave {got!r}, and must return a Measurement; "
                         f"try counted({got!r}, {unit!r})")
    if got.unit != unit:
        raise ValueError(f"{prediction_key} was predicted in {unit!r} and measured in {got.unit!r}; "
                         f"predict it again in {got.unit!r}")
    numbers = book.read_predictions()
    numbers[prediction_key]["measured"] = asdict(got)
    book.write_predictions(numbers)
    print(f"{prediction_key}: {got}")
    return got


def counted(value: float, unit: str) -> Measurement:
    """A Measurement of kind "counted": an exact count."""
    return Measurement(value, unit, "counted")


def modelled(value: float, unit: str) -> Measurement:
    """A Measurement of kind "modelled": the value of a formula, which nobody has measured."""
    return Measurement(value, unit, "modelled")


def median_of_times(values: list[float], unit: str = "s") -> Measurement:
    """A Measurement of kind "timed": the median of times, or rates, that ranks or benchmarks returned."""
    spread = max(values) - min(values)
    return Measurement(statistics.median(values), unit, "timed", len(values), spread, describe_machine())


def timed(run: Callable[[], object], n: int = 5) -> Measurement:
    """Time `run()`: the median seconds of n calls, after one warm-up call."""
    run()
    return median_of_times([_seconds(run) for _ in range(n)])


def _seconds(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@functools.cache
def describe_machine() -> str:
    """This machine in words: its cores and its processor."""
    return f"{os.cpu_count()} cores, {processor_name()}"
