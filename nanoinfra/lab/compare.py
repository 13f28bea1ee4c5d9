"""Predicted beside measured: the table every lesson ends in.

A counted number must match exactly, a time on the emulated wire within 10 %, an allocator's bytes within 5 %
(`ALLOCATOR`). `tolerance=None` shows a row without judging it. A modelled number is no measurement: never a
pass.
"""
import math
from dataclasses import dataclass

from nanoinfra.lab import predict as book
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import Measurement
from nanoinfra.lab.predict import format_quantity

RELATIVE_TOLERANCE_BY_KIND = {"counted": 0.0, "timed": 0.10, "modelled": None}
ALLOCATOR = 0.05


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the table. `tolerance` is relative; None does not judge."""
    name: str
    predicted: float
    measured: Measurement
    tolerance: float | None
    num_predictions: int = 1           # predictions made, of which `predicted` is the last

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 when both are 0."""
        if self.predicted == 0:
            return 1.0 if self.measured.value == 0 else math.inf
        return self.measured.value / self.predicted

    @property
    def verdict(self) -> str:
        """"pass", "miss", or "shown" where nothing is judged."""
        if self.tolerance is None or self.measured.kind == "modelled":
            return "shown"
        exact = 1e-12                                # 2 (N-1)/N is not a binary fraction
        return "pass" if abs(self.ratio - 1) <= self.tolerance + exact else "miss"


@dataclass(frozen=True, repr=False)
class ComparisonTable(DisplayTable):
    """What `compare` gives: shows itself; `passed` is true when every judged row hit."""
    comparisons: tuple[ComparisonRow, ...] = ()

    @property
    def passed(self) -> bool:
        """No row missed, and at least one was judged."""
        verdicts = [row.verdict for row in self.comparisons]
        return "miss" not in verdicts and "pass" in verdicts


def compare_predictions(rows: list[str | ComparisonRow],
                        tolerance: dict[str, float | None] | None = None) -> ComparisonTable:
    """A table of `rows`: keys that were predicted and measured, or Rows. `tolerance` overrides by key."""
    lines = tuple(row if isinstance(row, ComparisonRow) else _row(row, tolerance or {}) for row in rows)
    columns = ("quantity", "predicted", "measured", "ratio", "kind", "tolerance", "verdict")
    return ComparisonTable("predicted and measured", columns, [_cells(row) for row in lines], lines)


def _row(key, tolerance):
    value, _ = book.last_prediction(key)
    entry = book.read_numbers()[key]
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
