"""The house's own rules, read from its source: who imports whom, who touches the wire, how long a file is."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nanoinfra

HOUSE = Path(nanoinfra.__file__).parent
ROOT = HOUSE.parent
FLOORS = [{"config", "renamed_flags"}, {"formulas", "kernels"}, {"distributed"}, {"model", "data"},
          {"memory"}, {"parallel"},
          {"train", "serve"},
          {"tune"}, {"plan"}, {"lab"}, {"parse_and_run_command"}, {"cli"}]
BEFORE = {room: set().union(*FLOORS[:i]) for i, floor in enumerate(FLOORS) for room in floor}
BEFORE["model"] -= {"distributed"}                  # the model knows nothing of ranks
BEFORE["model"] |= {"data"}                  # whose tokenizers a run's folder has
BEFORE["serve"] |= {"train"}                 # whose checkpoints it opens
SETUP = {"HashStore", "PrefixStore", "ReduceOp", "Store", "TCPStore", "device_mesh", "destroy_process_group",
         "elastic", "get_backend", "get_rank", "get_world_size", "group", "init_process_group",
         "is_initialized", "new_subgroups_by_enumeration", "rendezvous", "run"}
DOOR = {"distributed/comm.py": {"all_reduce", "all_gather_single", "all_gather_into_tensor",
                                "reduce_scatter_single",
                                "reduce_scatter_tensor", "all_to_all_single", "broadcast", "isend", "irecv"}}
FILES = sorted(HOUSE.rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
LESSON_FILES = sorted((ROOT / "lessons").glob("*/*.py"))


def name(path):
    return str(path.relative_to(HOUSE)) if path.is_relative_to(HOUSE) else str(path.relative_to(ROOT))


def imports(tree):
    """Every dotted name that a file imports: `from a.b import c` gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(room, tree):
    """What a file of `room` imports from rooms that do not stand before it."""
    parts = [dotted.split(".") for dotted in imports(tree)]
    rooms = {p[1] for p in parts if p[0] == "nanoinfra" and len(p) > 1}
    outside = {p[0] for p in parts if p[0] in ("kernels", "lessons", "tests", "scripts")}
    return {r for r in rooms - {room} if r not in BEFORE[room]} | outside


def wire_calls(tree):
    """Names of torch.distributed that a file uses, its setup apart."""
    aliases = {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.Import)
               for a in node.names if a.name.startswith("torch.distributed")}
    aliases |= {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                and node.module == "torch" for a in node.names if a.name == "distributed"}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in aliases | {"torch.distributed"}}
    used |= {node.args[1].value for node in ast.walk(tree) if isinstance(node, ast.Call)
             and ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) in aliases}
    used |= {dotted.split(".")[2] for dotted in imports(tree) if dotted.startswith("torch.distributed.")}
    return used - SETUP


def test_the_rules_catch_offenders():
    bad = ast.parse("def f():\n    from nanoinfra.train import step\nimport lessons.l08_zero.checks\n"
                    "import kernels.adam\nfrom nanoinfra import distributed")
    assert wrong_imports("distributed", bad) == {"train", "kernels", "lessons"}
    assert wrong_imports("model", bad) == {"train", "kernels", "lessons", "distributed"}
    for text in ("import torch.distributed as d\nd.all_reduce(x)", "from torch.distributed import all_reduce",
                 "import torch\ntorch.distributed.all_reduce(x)",
                 "from torch import distributed as d\nd.all_reduce"):
        assert wire_calls(ast.parse(text)) == {"all_reduce"}, text
    assert wire_calls(ast.parse("from torch.distributed.nn import functional")) == {"nn"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file(path):
    text = path.read_text()
    tree, here = ast.parse(text), name(path)
    room = here.split("/")[0].removesuffix(".py")
    if room != "__init__":
        assert room in BEFORE, f"{here} stands in no room of the house"
        assert wrong_imports(room, tree) == set()
    assert wire_calls(tree) <= DOOR.get(here, set())
    assert len(text.splitlines()) <= 300
    assert path.name != "__init__.py" or text == ""
    assert room != "formulas" or not any(dotted.split(".")[0] == "torch" for dotted in imports(tree))


@pytest.mark.parametrize("path", LESSON_FILES, ids=name)
def test_a_lesson_imports_the_library_and_its_own_folder_alone(path):
    """So that a student's copy of one folder is whole."""
    text = path.read_text()
    found = {dotted for dotted in imports(ast.parse(text)) if dotted.split(".")[0] in ("lessons", "tests")}
    assert {dotted.split(".")[1] for dotted in found} <= {path.parent.name}
    assert len(text.splitlines()) <= (350 if path.name == "lesson.py" else 300)
    assert wire_calls(ast.parse(text)) == set()


def test_the_root_holds_the_command_line_and_the_kernels_alone():
    assert {p.name for p in HOUSE.glob("*.py")} <= {"__init__.py", "cli.py", "config.py", "kernels.py",
                                                    "parse_and_run_command.py", "renamed_flags.py"}


def test_formulas_work_without_torch():
    files = (HOUSE / "formulas").glob("[!_]*.py")
    modules = ["nanoinfra.config", *(f"nanoinfra.formulas.{path.stem}" for path in files)]
    code = f"import sys; sys.modules['torch'] = None; import {', '.join(modules)}"
    command = [sys.executable, "-W", "error", "-c", code]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
