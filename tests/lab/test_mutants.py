import inspect
from pathlib import Path

import pytest

from lessons.l02_ring_all_reduce import checks as l02_ring
from nanoinfra.distributed.ring_collectives import ring_all_reduce
from nanoinfra.lab.exercise import load_python_file
from nanoinfra.lab.mutants import (
    Mutant,
    collect_lesson_mutants,
    collect_library_mutants,
    main,
    patched,
    rejecting_criterion,
    run_mutants,
)

LESSONS = collect_lesson_mutants()
FIRST = [m for m in LESSONS if sum(m.check.name == n.check.name for n in LESSONS[:LESSONS.index(m)]) < 2]
NAMED = {name for file in Path(__file__).parent.glob("test_l[0-9][0-9]_*.py")      # judged there, by the text
         for name in getattr(load_python_file(file), "HINTS", ())}
FEW = [m for m in FIRST if m.name not in NAMED]
MUTANTS = sorted((Path(__file__).parents[1] / "mutants").glob("*.py"))


@pytest.mark.parametrize("mutant", FEW, ids=lambda m: f"{m.check.name}: {m.name}")
def test_the_first_two_of_a_check_are_rejected_by_their_criterion(mutant):
    assert rejecting_criterion(mutant) == mutant.rejected_by                       # all of them: make mutants


def test_a_survivor_a_wrong_reason_and_a_lone_mutant_fail():
    check = l02_ring.ring_all_reduce
    right = Mutant("not wrong at all", check, ring_all_reduce, "every rank has the sum")
    other = Mutant("wrong otherwise", check, lambda x, axis: x, "only ring_shift")
    assert rejecting_criterion(right) == ""
    assert [row[-1] for row in run_mutants([right, other]).rows] == ["wrong", "wrong"]
    assert run_mutants([other]).rows[-1][1:] == ("(a check needs two mutants)", "(has 1)", "wrong")


def test_a_patch_holds_in_the_rank_processes_and_only_during_the_call():
    lazy = patched(ring_all_reduce, "nanoinfra.distributed.ring_collectives:ring_shift", lambda x, axis,
                   tag="": x)
    report = l02_ring.ring_all_reduce.report(lazy)
    assert report.first_failure.criterion.name == "every rank has the sum"
    assert l02_ring.ring_all_reduce.report(ring_all_reduce).exit_code == 0


@pytest.mark.prove
@pytest.mark.parametrize("file", MUTANTS, ids=lambda file: file.stem)
def test_the_library_passes_the_checks_that_its_mutants_fail(file):
    patched_ones = {m.check.name: (m.check, inspect.unwrap(m.variant))
                    for m in collect_library_mutants(file.stem) if hasattr(m.variant, "__wrapped__")}
    failed = {name: failure.criterion.name for name, (check, subject) in patched_ones.items()
              if (failure := check.report(subject).first_failure)}
    assert patched_ones and not failed


@pytest.mark.prove
@pytest.mark.parametrize("file", MUTANTS, ids=lambda file: file.stem)
def test_a_mutants_methods_are_those_of_the_class_that_it_breaks(file):
    """A method that a renaming has left behind would break nothing."""
    module = load_python_file(file)
    broken = [kind for kind in vars(module).values() if inspect.isclass(kind)
              and kind.__module__ == module.__name__ and kind.__base__.__module__.startswith("nanoinfra")]
    assert [f"{kind.__name__}.{name}" for kind in broken for name, method in vars(kind).items()
            if inspect.isfunction(method) and not hasattr(kind.__base__, name)] == []


def test_mutants_are_found_from_a_folder_outside_the_repository(course):
    assert {m.check.name for m in collect_lesson_mutants("02")} == {check.name for check in l02_ring.CHECKS}
    for collect, name in ((collect_lesson_mutants, "98"), (collect_library_mutants, "l98_none")):
        with pytest.raises(ValueError, match="work inside a clone"):
            collect(name)


def test_the_command_exits_1_if_one_survives(tmp_path, capsys):
    (tmp_path / "bad.py").write_text(
        "from nanoinfra.distributed.ring_collectives import ring_all_reduce\n"
        "from lessons.l02_ring_all_reduce import checks as l02_ring\n"
        "from nanoinfra.lab.mutants import Mutant\n"
        "MUTANTS = [Mutant(name, l02_ring.ring_all_reduce, ring_all_reduce, 'only x') for name in 'ab']\n")
    assert main([str(tmp_path)]) == 1
    assert "(survives)" in capsys.readouterr().out
