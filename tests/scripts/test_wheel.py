"""What `pip install nanoinfra` brings: the library and its kernels, no lesson, no test; it runs alone."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LAB = 0.15                              # of the wheel's lines of Python
SOURCES = ("nanoinfra", "kernels", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, so that a build leaves nothing in them."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        path = ROOT / name
        clean = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, copy / name, ignore=clean) if path.is_dir() else shutil.copy(path, copy)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps",
                    "--no-index", "--no-build-isolation", "-w", copy / "wheels", copy], check=True)
    (file,) = (copy / "wheels").iterdir()
    return file


def test_it_holds_the_library_and_no_lesson(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if ".dist-info/" not in name]
        lines = {name: len(file.read(name).splitlines()) for name in names if name.endswith(".py")}
    folders = {"nanoinfra": ROOT / "nanoinfra", "nanoinfra/kernels": ROOT / "kernels"}
    want = {f"{below}/{path.relative_to(folder)}" for below, folder in folders.items()
            for path in folder.rglob("*.*") if path.is_file() and "__pycache__" not in path.parts}
    assert set(names) == want
    lab = sum(count for name, count in lines.items() if name.startswith("nanoinfra/lab/"))
    assert lab <= MOST_LAB * sum(lines.values())


@pytest.mark.prove
def test_alone_it_trains_and_generates_with_its_kernels(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / name).write_text(f"{name} one two three four five six\n" * 99)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, check=True,
                              capture_output=True, text=True).stdout
    cli = ["-m", "nanoinfra.cli"]
    where = run("-c", "import nanoinfra.kernels.cpu.decode_kernels as k; print(k.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "site")
    run(*cli, "train", "--model", "test", "--vocab", "300", "--data", "text", "--seq", "16", "--dp", "2",
        "--steps", "3", "--micro-batch", "1", "--out", "run")
    assert run(*cli, "generate", "run", "one", "--max-new-tokens", "4").startswith("one")
    said = run("-c", "from nanoinfra.distributed.mesh import Mesh\n"
                     "from nanoinfra.serve.engine.load_engine import load_engine\n"
                     "from nanoinfra.serve.command_line_options import EngineOptions\n"
                     "print(type(load_engine(EngineOptions(model='run'), Mesh()).kv_cache).__name__)")
    assert said.strip() == "CpuPagedKVCache"
