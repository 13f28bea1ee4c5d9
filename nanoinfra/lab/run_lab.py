"""Run a lab on several ranks: `python -m nanoinfra.lab.run_lab 08 --nproc 4`, or under torchrun on a cluster.

A lesson's lab.py has PREDICTIONS {key: unit}, QUESTIONS, BREAKS (mistakes to plant), MODELS, `expect(n,
model)` with each key's value by formula, and `measure(mesh, model, broken)` with each key's Measurement. Rank
0 prints a table of predicted and measured numbers and adds the run to the hand-in, work/labNN.json.
Exit code 0: all is measured, and a planted mistake was exposed. 1: a count differs from its formula, no count
exposes the planted mistake, or a rank failed. 2: wrong usage. A prediction that missed is no failure.
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
from nanoinfra.lab.compare_predictions import RELATIVE_TOLERANCE_BY_KIND, ComparisonRow, compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.exercise import load_python_file
from nanoinfra.lab.find_course_folder import (
    display_path,
    lesson_folders,
    lessons_folder,
    make_lessons_importable,
    work_folder,
)
from nanoinfra.lab.measure import Measurement, describe_machine
from nanoinfra.lab.predict import format_quantity
from nanoinfra.train.launch.elastic_rank import is_launched_rank
from nanoinfra.train.launch.stop_signals import SignalListener, exit_immediately

_RANK = int(os.environ.get("RANK", 0))                 # torchrun sets both
_WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def run_lab(lab: ModuleType, model_size: str, planted_mistake: str = "") -> int:
    """Run a lab on all ranks of this run: rank 0 prints the table and writes the hand-in. Returns the exit
    code.

    `planted_mistake` names one of the lab's BREAKS: a mistake that is planted while it is measured.
    """
    import torch

    from nanoinfra.distributed.mesh import Mesh
    from nanoinfra.train.launch.elastic_rank import rank_process_group
    device = "cuda" if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) else "cpu"
    torch.set_num_threads(1)                           # so that times on 1, 2, 4, 8 ranks compare
    with rank_process_group(device, work_folder()):
        measured = lab.measure(Mesh(dp=_WORLD_SIZE, device=device), model_size, planted_mistake)
    if _RANK:
        return 0
    ranks = f"{_WORLD_SIZE} rank{'s' if _WORLD_SIZE > 1 else ''}"
    name = f"{model_size} on {ranks}, {device}{', ' + planted_mistake if planted_mistake else ''}"
    formula = {key: ComparisonRow(key, value, measured[key], 0.0)
               for key, value in lab.expect(_WORLD_SIZE, model_size).items()}
    made = formula if planted_mistake else _compare_with_committed_predictions(lab, measured)
    said = "formula" if planted_mistake else "predicted"
    print_lab_table(name, said, made, measured, lab.PREDICTIONS)
    write_lab_hand_in(lab, name, said, made, measured)
    off = [key for key, row in formula.items() if row.verdict == "miss"]
    print(_summary(lab, made, off, planted_mistake))
    return int(bool(off) != bool(planted_mistake))


def _compare_with_committed_predictions(lab, measured):
    tolerance = {key: RELATIVE_TOLERANCE_BY_KIND[got.kind] for key, got in measured.items()}
    return {key: ComparisonRow(key, value, measured[key], tolerance[key])
            for key, value in committed_predictions(lab).items()}


def load_lab(lab_number: str) -> ModuleType:
    """Run lab.py in the folder of lesson "08" and return it as a module. ValueError where there is none."""
    folders = lesson_folders(with_file="lab.py")
    if lab_number.zfill(2) not in folders:
        known = ", ".join(folders) or "none at all"
        raise ValueError(f"there is no lab {lab_number!r}, but {known} in {display_path(lessons_folder())}; "
                         f"run this inside the repository: make lab L=08 N=4")
    make_lessons_importable()
    return load_python_file(folders[lab_number.zfill(2)] / "lab.py")


def committed_predictions(lab: ModuleType) -> dict[str, float]:
    """{key: value}: the student's predictions for this lab. ValueError for one in another unit."""
    made = {key: book.last_prediction(key) for key in lab.PREDICTIONS if key in book.read_predictions()}
    for key, (_, unit) in made.items():
        if unit != lab.PREDICTIONS[key]:
            raise ValueError(f"{key} was predicted in {unit!r} and is measured in {lab.PREDICTIONS[key]!r}; "
                             f"predict it again")
    return {key: value for key, (value, _) in made.items()}


def print_lab_table(title: str, expected_heading: str, expected: dict[str, ComparisonRow],
                    measured: dict[str, Measurement], asked_units: dict[str, str]) -> None:
    """Print expected numbers, headed "predicted" or "formula", beside measured ones."""
    cells, rows = dict(zip(expected, compare_predictions(list(expected.values())).rows)), []
    for key, got in measured.items():
        missing = key in asked_units and key not in expected
        nothing = (key, "not made" if missing else "", "", "", "", "", "missing" if missing else "shown")
        _, predicted, _, ratio, _, _, verdict = cells.get(key, nothing)
        rows.append((key, predicted, format_quantity(got.value, got.unit), ratio, got.kind, verdict))
    DisplayTable(title, ("quantity", expected_heading, "measured", "ratio", "kind", "verdict"), rows).show()


def write_lab_hand_in(lab: ModuleType, run_name: str, expected_heading: str,
                      expected: dict[str, ComparisonRow], measured: dict[str, Measurement]) -> None:
    """Add this run to the hand-in. Earlier runs and the student's sentences stay in it."""
    before = read_hand_in(lab)
    sentences = {question: before.get("sentences", {}).get(question, "") for question in lab.QUESTIONS}
    numbers = {key: {expected_heading: expected[key].predicted if key in expected else None,
                     "measured": asdict(got)}
               for key, got in measured.items()}
    runs = before.get("runs", {}) | {run_name: {"ranks": _WORLD_SIZE, "machine": _machine(),
                                                "numbers": numbers}}
    new = hand_in_file(lab).with_suffix(".new")
    hand_in = {"lab": _number(lab), "runs": runs, "sentences": sentences}
    new.write_text(json.dumps(hand_in, indent=1) + "\n")
    new.replace(hand_in_file(lab))


def read_hand_in(lab: ModuleType) -> dict:
    """The hand-in's contents, {} if there is none yet. ValueError if the file is not JSON."""
    try:
        return json.loads(hand_in_file(lab).read_text()) if hand_in_file(lab).exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{display_path(hand_in_file(lab))} cannot be read ({error}); mend the quotes and "
                         "commas there, or move it away") from error


def hand_in_file(lab: ModuleType) -> Path:
    """The file of the hand-in, work/lab08.json."""
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
    parser = _Parser(prog="python -m nanoinfra.lab.run_lab", description="run a lab on some ranks")
    parser.add_argument("lab", help="its number, as 08")
    parser.add_argument("--nproc", type=int, default=1, help="number of ranks to start; under torchrun its "
                        "own flag counts")
    parser.add_argument("--model", default="", help="a model size, as nano; default: the first of the lab")
    parser.add_argument("--break", dest="broken", default="", help="plant this mistake, which the counts "
                        "must expose")
    parser.add_argument("--check", action="store_true", help="print which predictions are made, and run "
                        "nothing")
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
    file = work_folder() / f"lab{_number(lab)}_rank{_RANK}.txt"
    file.write_text("".join(traceback.format_exception(error)))
    why = " ".join(str(error).split())[:200]
    return (f"lab {_number(lab)}: rank {_RANK} of {_WORLD_SIZE} failed, {type(error).__name__}: {why} "
            f"(the traceback is in {display_path(file)})")


def main(argv: list[str] | None = None) -> int:
    """Run the command line, in the launcher and in every rank; returns the exit code. Errors are one line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        given = _arguments(argv)
        lab, model = _checked(given)
    except ValueError as mistake:
        if _RANK == 0:
            print(f"lab: {mistake}", file=sys.stderr)
        else:
            time.sleep(2)                              # torchrun ends all as soon as one has ended
        return 2
    try:
        if not is_launched_rank():
            print(_progress(lab), flush=True)
        if given.check:
            return 0
        if given.nproc > 1 and not is_launched_rank():
            from nanoinfra.train.launch.launch_ranks import launch_ranks
            return launch_ranks(argv, given.nproc, module="nanoinfra.lab.run_lab")
        return run_lab(lab, model, given.broken)
    except Exception as error:
        print(_failure(lab, error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    SignalListener(exit_immediately).start()
    sys.exit(main())
