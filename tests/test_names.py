"""Public names: each has one meaning in the whole library, most say what they do in more than a word."""
import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

import nanoinfra

HOUSE = Path(nanoinfra.__file__).parent
ROOT = HOUSE.parent
KERNELS = ROOT / "kernels"
MODULES = sorted([*HOUSE.rglob("*.py"), *KERNELS.rglob("*.py")])
MOST_FILES = 12
ONE_WORD = 0.45                              # of all public names, at most
SHARED = {"main", "refusals"}                # each program's own entry, each technique's own refusals


def public_names(tree):
    """{name: kind} of a module: its functions, classes and constants, and what its public classes offer."""
    top = {node.name: "definition" for node in tree.body
           if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    top |= {target.id: "definition" for node in tree.body if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
    methods = {method.name: "method" for node in classes for method in node.body
               if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef))}
    return {name: kind for name, kind in {**methods, **top}.items() if not name.startswith("_")}


def words(name):
    """`block_table`, `BlockPool` and `MAX_BYTES` have two, `Engine` and `RoPE` one."""
    return len(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])", name.replace("_", " ")))


NAMES = {path: public_names(ast.parse(path.read_text())) for path in MODULES}


def test_words_are_counted():
    assert [words(name) for name in ("block_table", "BlockPool", "MAX_BYTES", "Engine", "step",
                                     "KVCache")] == [
        2, 2, 2, 1, 1, 2]


def test_no_public_name_is_defined_twice():
    where = defaultdict(list)
    for path, names in NAMES.items():
        for name, kind in names.items():
            if kind == "definition" and name not in SHARED:
                where[name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_most_names_say_what_they_do():
    every = [name for names in NAMES.values() for name in names]
    single = [name for name in every if words(name) == 1]
    assert len(single) <= ONE_WORD * len(every), sorted(single)


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}),
                         ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_has_few_files(folder):
    files = [path.name for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
    assert len(files) <= MOST_FILES, sorted(files)


def test_the_package_holds_every_folder_of_the_library_and_no_other():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [*{path.parent for path in HOUSE.rglob("*.*") if "__pycache__" not in path.parts}]
    found = {".".join(["nanoinfra", *folder.relative_to(HOUSE).parts]) for folder in folders}
    found |= {"nanoinfra.kernels." + path.parent.name for path in KERNELS.rglob("*.py")}
    assert sorted(said) == sorted(found)
