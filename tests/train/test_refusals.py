"""Each technique says itself what it refuses; the command line and the matrix read the one list."""
import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoinfra.cli import main
from nanoinfra.config import config_for_size
from nanoinfra.train.config import (
    AxesFlags,
    MemoryFlags,
    OptimizerFlags,
    PipelineFlags,
    check_combinations,
    check_train_flags,
    flags_by_name,
    make_train_flags,
    refused_combinations,
)
from nanoinfra.train.refusals import techniques

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import matrix  # noqa: E402

LIST = "nanoinfra.train.refusals.techniques.TECHNIQUES"
OF_MODULE = {                                # what says the refusals of each module of parallel/ and memory/
    "parallel/data_parallel.py": "parallel/refusals/data_parallel.py",
    "parallel/sequence_parallel.py": "parallel/refusals/sequence_parallel.py",
    "parallel/tensor_parallel.py": "parallel/refusals/tensor_parallel.py",
    "parallel/tensor_parallel_decoder.py": "parallel/refusals/tensor_parallel.py",
    "parallel/vocab_parallel.py": "parallel/refusals/tensor_parallel.py",
    "parallel/zero.py": "parallel/refusals/zero.py",
    "parallel/pipeline/schedules.py": "parallel/refusals/pipeline.py",
    "parallel/pipeline/split_backward.py": "parallel/refusals/pipeline.py",
    "parallel/pipeline/stage.py": "parallel/refusals/pipeline.py",
    "memory/recompute.py": "memory/refusals/recompute.py",
    "parallel/parallelize.py": None,         # applies them all
    "parallel/parameter_server.py": None,    # of a lesson, with no flag
    "parallel/pipeline/simulator.py": None}  # computes what a schedule would take
DERIVED = {"num_micro_batches", "world_size", "model_config"}          # which techniques see besides flags
REFUSED = [({"cp": 2}, "not built yet; use --cp 1, --dp 2"),
           ({"zero": 1, "grad_sync": "each"}, "--grad-sync each is plain"),
           ({"recompute": "selective"}, "--attention sdpa keeps none"),
           ({"recompute": "full", "schedule": "zb-h1", "pp": 2}, "has two of those"),
           ({"sp_save_gathered": True, "tp": 2}, "give --sp too"), ({"sp": True}, "--tp is 1"),
           ({"eval_every": 2, "data": "random"}, "--data random has none"),
           ({"model": ".", "untied": True}, "shape a model that is drawn"),
           ({"model": "test", "tp": 3}, "try --tp 2"),
           ({"optimizer": "sgd", "betas": (0.9, 0.9)}, "of AdamW's step"), ({"betas": (0.9, 1.0)}, "below 1"),
           ({"min_lr": 0.1, "lr_schedule": "constant", "lr": 1.0}, "leave one of them out"),
           ({"min_lr": 0.1, "lr": 0.01}, "above the peak, --lr 0.01"),
           ({"zero": 3, "pp": 2}, "use --zero 1"), ({"virtual_stages": 2, "pp": 2}, "--schedule interleaved"),
           ({"model": "test", "pp": 5}, "at most 4"),
           ({"model": "test", "freeze": ("head.*",)}, "no parameter's name")]


@pytest.fixture
def toy(monkeypatch):
    """`toy(refusals)`: a technique of that name is in the list."""
    def join(refusals):
        made = SimpleNamespace(__name__="toy", refusals=refusals)
        monkeypatch.setattr(LIST, (*techniques.TECHNIQUES, made))
    return join


def reasons(world=None, **values):
    flags = make_train_flags(**values)
    sizes = flags.axes
    return list(refused_combinations(flags, world or (sizes.dp or 1) * sizes.pp * sizes.cp * sizes.tp))


def no_zero_in_float64(flags):
    if flags.zero and flags.dtype == "float64":
        yield f"--zero {flags.zero} is a toy's enemy in float64; use --zero 0"


@pytest.mark.parametrize("values, says", REFUSED, ids=[" ".join(values) for values, _ in REFUSED])
def test_each_refusal_is_the_only_one_and_is_the_commands_answer(values, says):
    [reason] = reasons(**values)
    assert says in reason
    assert reasons() == []


def test_every_technique_refuses_something():
    """So that the cases above leave none out."""
    found = set()
    for values, says in REFUSED:
        world = values.get("pp", 1) * values.get("cp", 1) * values.get("tp", 1)
        seen = seen_by_techniques(make_train_flags(**values), world)
        found |= {each.__name__ for each in techniques.TECHNIQUES
                  if any(says in reason for reason in each.refusals(seen))}
    assert found == {each.__name__ for each in techniques.TECHNIQUES}


def seen_by_techniques(flags, world):
    """The namespace that a technique is given."""
    seen, before = [], techniques.technique_refusals
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(techniques, "technique_refusals", lambda each: seen.append(each) or before(each))
        list(refused_combinations(flags, world))
    return seen[0]


def test_a_technique_sees_flags_by_name_with_what_was_left_to_default():
    seen = seen_by_techniques(make_train_flags(model="test", micro_batch=2, vocab=300), 4)
    assert vars(seen).keys() == flags_by_name(make_train_flags()).keys() | DERIVED
    assert (seen.dp, seen.global_batch, seen.num_micro_batches, seen.world_size) == (4, 8, 1, 4)
    assert seen.lr > 0 and seen.model_config == config_for_size("test", 300)


def test_several_reasons_are_all_said_and_the_first_is_the_answer():
    flags = make_train_flags(zero=2, pp=2, grad_sync="each", sp=True)
    got = list(refused_combinations(flags, 2))
    assert len(got) == 3
    assert "--grad-sync" in got[0] and "use --zero 1" in got[1] and "--sp cuts" in got[2]
    with pytest.raises(ValueError, match="^--grad-sync each"):
        check_combinations(flags, 2)


def test_what_is_not_built_is_said_before_what_does_not_fit_the_ranks():
    for values, world, says in (({"cp": 2}, 3, "use --cp 1, --dp 3"), ({"dp": 2}, 3, "try --dp 3"),
                                ({"tp": 0}, 2, "--tp 0 is too small; give at least 1")):
        with pytest.raises(ValueError, match=says):
            check_train_flags(make_train_flags(data="random", **values), world)


def test_weights_are_checked_once_they_have_been_opened():
    flags = make_train_flags(model=".", tp=3, freeze=("head.*",))
    assert list(refused_combinations(flags, 3)) == []
    got = list(refused_combinations(flags, 3, config_for_size("test")))
    assert "try --tp 2" in got[0] and "no parameter's name" in got[1]


def test_a_technique_that_joins_the_list_is_asked_and_answers_in_one_line(toy, capsys, tmp_path):
    toy(no_zero_in_float64)
    argv = ["train", "--model", "test", "--data", "random", "--dp", "2", "--out", str(tmp_path / "run")]
    assert main([*argv, "--zero", "1", "--dtype", "float64"]) == 2
    assert capsys.readouterr().err == "nanoinfra: --zero 1 is a toy's enemy in float64; use --zero 0\n"
    assert reasons(zero=1, dp=2) == []


def test_the_matrix_shows_what_a_technique_refuses_in_grey_with_the_reason(toy):
    toy(no_zero_in_float64)
    rows = matrix.measure([("untied head",), ("ZeRO-1",), ("ZeRO-3", "tp")])
    assert rows[0]["error"] < matrix.TOLERANCE
    assert [row["refused"] for row in rows[1:]] == [
        f"--zero {stage} is a toy's enemy in float64; use --zero 0" for stage in (1, 3)]
    axes = matrix.picture(rows).figure.axes[0]
    colours = [tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for patch in axes.patches]
    assert colours == [(213, 232, 212), (238, 238, 238), (238, 238, 238)]
    said = [text.get_text() for text in axes.texts]
    assert said[1:3] == ["refused\n(1)", "refused\n(2)"]
    assert "(1) --zero 1 is a toy's enemy" in said[3] and "(2) --zero 3 is a toy's enemy" in said[3]


@pytest.mark.parametrize("refusals", [None, "--zero", lambda flags: "--zero is refused", lambda flags: None,
                                      lambda flags: ["--zero is refused"]])
def test_a_technique_without_a_generator_is_refused_by_name(toy, refusals):
    toy(refusals)
    with pytest.raises(TypeError, match="toy is one of TECHNIQUES and has no generator refusals"):
        check_combinations(make_train_flags(), 1)


def test_a_module_without_refusals_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(LIST, (ast,))
    with pytest.raises(TypeError, match="ast is one of TECHNIQUES"):
        check_combinations(make_train_flags(), 1)


def test_each_module_of_parallel_and_memory_is_in_the_list_or_has_no_flags():
    house = ROOT / "nanoinfra"
    files = [path for room in ("parallel", "memory") for path in (house / room).rglob("*.py")
             if path.name != "__init__.py" and path.parent.name != "refusals"]
    assert {str(path.relative_to(house)) for path in files} == OF_MODULE.keys()
    listed = {str(Path(each.__file__).relative_to(house)) for each in techniques.TECHNIQUES}
    assert set(filter(None, OF_MODULE.values())) <= listed
    beside = {str(path.relative_to(house)) for path in house.rglob("refusals/[!_]*.py")}
    assert beside - {"train/refusals/techniques.py"} <= listed


def test_some_technique_asks_for_every_flag_of_axes_memory_pipeline_and_optimizer():
    trees = [ast.parse(Path(each.__file__).read_text()) for each in techniques.TECHNIQUES]
    asked = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.value.id == "flags"}
    groups = (AxesFlags, MemoryFlags, PipelineFlags, OptimizerFlags)
    flags = {flag.name for group in groups for flag in fields(group)}
    assert flags - asked == {"dp", "warmup", "clip"}             # which go with anything
    assert asked <= flags_by_name(make_train_flags()).keys() | DERIVED


def test_refusals_import_no_torch_and_nothing_of_the_flags():
    """A mistake is answered at once, and a technique that is lifted out needs no file of flags."""
    code = ("import sys; sys.modules['torch'] = None; import nanoinfra.train.refusals.techniques\n"
            "sys.exit('nanoinfra.train.config' in sys.modules)")
    command = [sys.executable, "-W", "error", "-c", code]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
