"""Predictions are written to `work/numbers.json` before anything is measured.

`predict("L02.bytes", 1.5 * S, "B")` stores a number; `measure` (measure.py) refuses to run without it. A
prediction is graded for being made, not for being right. Earlier predictions for the same key stay in the
file.
"""
import json
import math
import os
import re
from pathlib import Path

from nanoinfra.lab import check
from nanoinfra.lab.find_course_folder import display_path, lesson_folders, work_folder


def predict(key: str, value: float, unit: str = "") -> None:
    """Store `value` as your prediction for `key`, for example "L02.bytes".

    ValueError if `value` is no finite number, and for a key or a unit that the lesson does not ask for.
    """
    if not re.fullmatch(r"L\d\d\.\w+", key):
        raise ValueError(f"{key!r} does not name a prediction; it is lesson and quantity: \"L02.bytes\"")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a prediction is one finite number; {key} got {value!r}")
    _asked(key, unit)
    numbers = read_predictions()
    entry = numbers.setdefault(key, {"predicted": []})
    if not entry["predicted"] or (entry["predicted"][-1], entry["unit"]) != (value, unit):
        entry["predicted"].append(value)
    entry["unit"] = unit
    write_predictions(numbers)
    print(f"{key}: you predict {format_quantity(value, unit)}. Committed to "
          f"{display_path(predictions_file())}.")


def _asked(key, unit):
    number = key[1:3]
    if number not in lesson_folders(with_file="checks.py") or ".lab_" in key:   # a lab asks for its own
        return
    units = check.load_lesson_checks(number).PREDICTIONS
    if key not in units or units[key] != unit:
        *most, last = [f"{k} in {u}" if u else k for k, u in units.items()]
        got = f"{key!r}" if key not in units else f"{key} in {unit!r}"
        asked = f"{', '.join(most)} and {last}" if most else last
        raise ValueError(f"lesson {number} asks for {asked}; got {got}")


def last_prediction(key: str) -> tuple[float, str]:
    """The last prediction for `key`, and its unit. ValueError if none was made."""
    entry = read_predictions().get(key)
    if not entry:
        raise ValueError(f"nothing is predicted for {key} yet; derive it, call "
                         f"predict(\"{key}\", value, unit), then measure")
    return entry["predicted"][-1], entry["unit"]


def predictions_file() -> Path:
    """The file work/numbers.json with predictions and measurements, which a student hands in."""
    return work_folder() / "numbers.json"


def read_predictions(file: Path | None = None) -> dict:
    """Read numbers.json: {key: {"unit", "predicted": [values, oldest first], "measured"}}."""
    file = file or predictions_file()
    return json.loads(file.read_text()) if file.exists() else {}


def write_predictions(numbers: dict) -> None:
    """Write numbers.json atomically: a crash leaves either the old or the new file."""
    new = predictions_file().with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps(numbers, indent=1) + "\n")
    new.replace(predictions_file())


def format_quantity(value: float, unit: str) -> str:
    """A number with its unit as text: whole numbers in full, seconds as s, ms or us, others to 4 digits."""
    if unit == "s" and value:
        scale, name = next((s, n) for s, n in ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
                           if abs(value) >= s or n == "ns")
        return f"{value / scale:.4g} {name}"
    whole = float(value).is_integer()
    return f"{value:,.0f} {unit}".strip() if whole else f"{value:,.4g} {unit}".strip()
