"""The table of predicted and measured numbers that every lesson ends with.

A counted number must equal its prediction, a time on the emulated link must be within 10 % of it. A row with
tolerance None is shown and not judged. A modelled number is no measurement, so it is never a pass.
"""
import math
from dataclasses import dataclass

from nanoinfra.lab import predict as book
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import Measurement
from nanoinfra.lab.predict import format_quantity

RELATIVE_TOLERANCE_BY_KIND = {"counted": 0.0, "timed": 0.10, "modelled": None}


@dataclass(frozen=True)
class ComparisonRow:
    """A prediction and its measurement. `tolerance` is relative; None means that the row is not judged."""
    name: str
    predicted: float
    measured: Measurement
    tolerance: float | None
    num_predictions: int = 1           # how many were made; `predicted` is the last one

    @property
    def ratio(self) -> float:
        """Measured divided by predicted, and 1 when both are 0."""
        if self.predicted == 0:
            return 1.0 if self.measured.value == 0 else math.inf
        return self.measured.value / self.predicted

    @property
    def verdict(self) -> str:
        """"pass", "miss", or "shown" for a row that is not judged."""
        if self.tolerance is None or self.measured.kind == "modelled":
            return "shown"
        exact = 1e-12                                # 2 (N-1)/N is not a binary fraction
        return "pass" if abs(self.ratio - 1) <= self.tolerance + exact else "miss"


@dataclass(frozen=True, repr=False)
class ComparisonTable(DisplayTable):
    """The rows of `compare_predictions` as a table that displays itself."""
    comparisons: tuple[ComparisonRow, ...] = ()

    @property
    def passed(self) -> bool:
        """True if at least one row was judged, and none of those missed."""
        verdicts = [row.verdict for row in self.comparisons]
        return "miss" not in verdicts and "pass" in verdicts


def compare_predictions(keys_or_rows: list[str | ComparisonRow],
                        tolerance: dict[str, float | None] | None = None) -> ComparisonTable:
    """Compare predictions with measurements: a row for each key such as "L02.bytes".

    `tolerance` has other relative tolerances than those of the measurement's kind, by key. ValueError for a
    key that was not predicted or not measured.
    """
    lines = tuple(row if isinstance(row, ComparisonRow) else _row(row, tolerance or {})
                  for row in keys_or_rows)
    columns = ("quantity", "predicted", "measured", "ratio", "kind", "tolerance", "verdict")
    return ComparisonTable("predicted and measured", columns, [_cells(row) for row in lines], lines)


def _row(key, tolerance):
    value, _ = book.last_prediction(key)
    entry = book.read_predictions()[key]
    fields = entry.get("measured")
    if not fields:
        raise ValueError(f"{key} is predicted but not measured yet; run measure(\"{key}\", ...) first")
    got = Measurement(**fields)
    return ComparisonRow(key, value, got, tolerance.get(key, RELATIVE_TOLERANCE_BY_KIND[got.kind]),
                         len(entry["predicted"]))


def _cells(row):
    m = row.measured
    kind = f"timed, median of {m.n}" if m.kind == "timed" else m.kind
    allowed = {None: "not judged", 0.0: "exact"}.get(row.tolerance, f"{row.tolerance or 0:.0%}")
    predicted, measured = format_quantity(row.predicted, m.unit), format_quantity(m.value, m.unit)
    if row.num_predictions > 1:
        nth = {2: "2nd", 3: "3rd"}.get(row.num_predictions, f"{row.num_predictions}th")
        predicted += f" ({nth} prediction)"
    return row.name, predicted, measured, f"{row.ratio:.4g}", kind, allowed, row.verdict
