"""Run a lab on several ranks: `python -m nanoinfra.lab.run 08 --nproc 4`, or under torchrun on a cluster.

A lab is lessons/lNN_topic/lab.py: PREDICTIONS {key: unit}, QUESTIONS, BREAKS, MODELS, `expect(n, model)` by
formula, and `measure(mesh, model, broken)`, a Measurement a key. Rank 0 prints what was predicted beside what
was measured and writes the hand-in, work/labNN.json, in which the sentences already written stay.
Exit 0: measured and written, a `--break` exposed. 1: a count that is not the formula's, a break that nothing
exposes, a failed rank. 2: a mistake in use. A prediction that missed is no failure.
"""
import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from nanoinfra.lab import predict as book
from nanoinfra.lab.compare import RELATIVE_TOLERANCE_BY_KIND, ComparisonRow, compare_predictions
from nanoinfra.lab.course import (
    display_path,
    lesson_folders,
    lessons_folder,
    make_lessons_importable,
    work_folder,
)
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.exercise import load_python_file
from nanoinfra.lab.measure import Measurement, describe_machine
from nanoinfra.lab.predict import format_quantity
from nanoinfra.train.launch.elastic_rank import is_rank
from nanoinfra.train.launch.signals import Hearing, end_at_once

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # the launcher's


def run_lab(lab: ModuleType, model: str, broken: str = "") -> int:
    """Measure on the ranks of this run; rank 0 prints and writes. Returns the exit code."""
    import torch

    from nanoinfra.distributed.mesh import Mesh
    from nanoinfra.train.launch.elastic_rank import process_group
    device = "cuda" if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) else "cpu"
    torch.set_num_threads(1)                           # so that times on 1, 2, 4, 8 ranks compare
    with process_group(device, work_folder()):
        measured = lab.measure(Mesh(dp=WORLD, device=device), model, broken)
    if RANK:
        return 0
    name = f"{model} on {WORLD} rank{'s' if WORLD > 1 else ''}, {device}{', ' + broken if broken else ''}"
    formula = {key: ComparisonRow(key, value, measured[key], 0.0)
               for key, value in lab.expect(WORLD, model).items()}
    made = formula if broken else _compare_with_committed_predictions(lab, measured)
    said = "formula" if broken else "predicted"
    print_lab_table(name, said, made, measured, lab.PREDICTIONS)
    write_hand_in(lab, name, said, made, measured)
    off = [key for key, row in formula.items() if row.verdict == "miss"]
    print(_summary(lab, made, off, broken))
    return int(bool(off) != bool(broken))


def _compare_with_committed_predictions(lab, measured):
    tolerance = {key: RELATIVE_TOLERANCE_BY_KIND[got.kind] for key, got in measured.items()}
    return {key: ComparisonRow(key, value, measured[key], tolerance[key])
            for key, value in committed_predictions(lab).items()}


def load_lab(number: str) -> ModuleType:
    """Lab "08": the file lab.py of its lesson's folder. ValueError where there is none."""
    folders = lesson_folders(holding="lab.py")
    if number.zfill(2) not in folders:
        known = ", ".join(folders) or "none at all"
        raise ValueError(f"there is no lab {number!r}, but {known} in {display_path(lessons_folder())}; "
                         f"run this inside the repository: make lab L=08 N=4")
    make_lessons_importable()
    return load_python_file(folders[number.zfill(2)] / "lab.py")


def committed_predictions(lab: ModuleType) -> dict[str, float]:
    """{key: value}: what the student committed with predict() of what the lab asks. ValueError for a unit."""
    made = {key: book.last_prediction(key) for key in lab.PREDICTIONS if key in book.read_numbers()}
    for key, (_, unit) in made.items():
        if unit != lab.PREDICTIONS[key]:
            raise ValueError(f"{key} was predicted in {unit!r} and is measured in {lab.PREDICTIONS[key]!r}; "
                             f"predict it again")
    return {key: value for key, (value, _) in made.items()}


def print_lab_table(name: str, said: str, made: dict[str, ComparisonRow], measured: dict[str, Measurement],
                    asked: dict) -> None:
    """Print the table: what was `said` (predicted, or of a broken run formula) beside what was measured."""
    cells, rows = dict(zip(made, compare_predictions(list(made.values())).rows)), []
    for key, got in measured.items():
        missing = key in asked and key not in made
        nothing = (key, "not made" if missing else "", "", "", "", "", "missing" if missing else "shown")
        _, predicted, _, ratio, _, _, verdict = cells.get(key, nothing)
        rows.append((key, predicted, format_quantity(got.value, got.unit), ratio, got.kind, verdict))
    DisplayTable(name, ("quantity", said, "measured", "ratio", "kind", "verdict"), rows).show()


def write_hand_in(lab: ModuleType, name: str, said: str, made: dict[str, ComparisonRow],
          measured: dict[str, Measurement]) -> None:
    """Put this run into the hand-in, beside earlier ones; sentences that stand there stay."""
    before = read_hand_in(lab)
    sentences = {question: before.get("sentences", {}).get(question, "") for question in lab.QUESTIONS}
    numbers = {key: {said: made[key].predicted if key in made else None, "measured": asdict(got)}
               for key, got in measured.items()}
    runs = before.get("runs", {}) | {name: {"ranks": WORLD, "machine": _machine(), "numbers": numbers}}
    new = hand_in_file(lab).with_suffix(".new")
    hand_in = {"lab": _number(lab), "runs": runs, "sentences": sentences}
    new.write_text(json.dumps(hand_in, indent=1) + "\n")
    new.replace(hand_in_file(lab))


def read_hand_in(lab: ModuleType) -> dict:
    """The hand-in as it stands, {} where there is none. ValueError where it is no longer JSON."""
    try:
        return json.loads(hand_in_file(lab).read_text()) if hand_in_file(lab).exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{display_path(hand_in_file(lab))} cannot be read ({error}); mend the quotes and "
                         "commas there, or move it away") from error


def hand_in_file(lab: ModuleType) -> Path:
    """The hand-in."""
    return work_folder() / f"lab{_number(lab)}.json"


def _number(lab):
    return Path(lab.__file__).parent.name[1:3]


def _machine():
    import torch
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return gpu + describe_machine()


def _summary(lab, made, off, broken):
    file = f"The hand-in is {display_path(hand_in_file(lab))}: fill in its {len(lab.QUESTIONS)} sentences."
    if broken:
        return f"{broken}: {'exposed by ' + ', '.join(off) if off else 'nothing here exposes it'}.\n{file}"
    hits = sum(row.verdict == "pass" for row in made.values())
    wrong = f"The code is wrong, not you: {', '.join(off)} should be what formulas/ says.\n" if off else ""
    return f"{len(made)} of {len(lab.PREDICTIONS)} predictions made, {hits} of them exact.\n{wrong}{file}"


def _progress(lab):
    made = committed_predictions(lab)
    missing = ", ".join(key for key in lab.PREDICTIONS if key not in made)
    said = f"lab {_number(lab)}: {len(made)} of {len(lab.PREDICTIONS)} predictions made"
    return f"{said}; missing: {missing}" if missing else said


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; make lab L=08 N=4 runs lab 08 on four ranks")


def _arguments(argv):
    parser = _Parser(prog="python -m nanoinfra.lab.run", description="run a lab on some ranks")
    parser.add_argument("lab", help="its number, as 08")
    parser.add_argument("--nproc", type=int, default=1, help="ranks to start here; torchrun has its own word")
    parser.add_argument("--model", default="", help="a size of the model's dial; default the lab's first")
    parser.add_argument("--break", dest="broken", default="", help="run a known-wrong variant")
    parser.add_argument("--check", action="store_true", help="say which predictions are made; run nothing")
    return parser.parse_args(argv)


def _checked(given):
    """The lab and the model, once all that can be wrong before it runs is not."""
    lab = load_lab(given.lab)
    if given.nproc < 1:
        raise ValueError(f"--nproc {given.nproc} is too small; give at least 1")
    for what, value, known in (("break", given.broken, lab.BREAKS), ("model", given.model, lab.MODELS)):
        if value and value not in known:
            raise ValueError(f"lab {_number(lab)} knows no {what} {value!r}; there are {', '.join(known)}")
    committed_predictions(lab)
    read_hand_in(lab)
    return lab, given.model or lab.MODELS[0]


def _failure(lab, error):
    file = work_folder() / f"lab{_number(lab)}_rank{RANK}.txt"
    file.write_text("".join(traceback.format_exception(error)))
    why = " ".join(str(error).split())[:200]
    return (f"lab {_number(lab)}: rank {RANK} of {WORLD} failed, {type(error).__name__}: {why} "
            f"(the traceback is in {display_path(file)})")


def main(argv: list[str] | None = None) -> int:
    """The command line of every rank: one of them speaks, and a failing rank says so in one line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        given = _arguments(argv)
        lab, model = _checked(given)
    except ValueError as mistake:
        if RANK == 0:
            print(f"lab: {mistake}", file=sys.stderr)
        else:
            time.sleep(2)                              # torchrun ends all as soon as one has ended
        return 2
    try:
        if not is_rank():
            print(_progress(lab), flush=True)
        if given.check:
            return 0
        if given.nproc > 1 and not is_rank():
            from nanoinfra.train.launch.launcher import launch
            return launch(argv, given.nproc, module="nanoinfra.lab.run")
        return run_lab(lab, model, given.broken)
    except Exception as error:
        print(_failure(lab, error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    Hearing(end_at_once).start()
    sys.exit(main())
