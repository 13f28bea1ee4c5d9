"""Two runs never write into one directory, and a lock outlives nobody."""
import errno
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.train.run_directory import lock_run_directory as lock
from nanoinfra.train.run_directory.lock_run_directory import lock_run_directory
from tests.processes import started, until
from tests.train.faults import needs_linux, processes_of
from tests.train.runs import CLI, FLAGS, SAID, lines

HOLD = """
import sys
from pathlib import Path
from nanoinfra.train.run_directory.lock_run_directory import lock_run_directory
with lock_run_directory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


RANK = {"RANK": "0", "WORLD_SIZE": "1"}          # of a launcher's process


@contextmanager
def another(out, launch="none"):
    """A process of its own that holds the lock of `out`, in the launch of that name."""
    env = {**os.environ, **RANK, "TORCHELASTIC_RUN_ID": launch}
    with started([sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                 env=env) as process:
        assert process.stdout.readline() == b"held\n"
        yield process


def test_a_second_run_is_one_line_that_names_the_first_until_that_is_killed(tmp_path, capsys):
    out = tmp_path / "run"
    with another(out) as first:
        assert main([*FLAGS, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"--out {out} is in use: process {first.pid} on " in said
        assert "since 20" in said and "another --out" in said
        assert [path.name for path in out.iterdir()] == [lock.LOCK_FILE_NAME]
        first.kill()                         # the file stays, the lock does not
        first.wait()
        with lock_run_directory(out):
            written = (out / lock.LOCK_FILE_NAME).read_text()
            assert f'"process": ["{lock._PROCESS_UUID}", {os.getpid()}]' in written
    assert list(out.iterdir()) == []


@needs_linux
@pytest.mark.prove
@pytest.mark.parametrize("launcher", [CLI, [Path(sys.executable).parent / "torchrun", "--standalone",
                                            "--nproc-per-node", "2", "-m", "nanoinfra.cli"]])
def test_a_run_on_two_ranks_holds_it_until_it_is_killed(tmp_path, launcher, capsys):
    """By our launcher, and by torchrun, where rank 0 does."""
    argv = [*FLAGS, "--dp", "2", "--out", str(tmp_path / "run"), "--lr-schedule", "constant"]
    with started([*launcher, *argv, "--steps", "100000"], **SAID) as first:
        until(lambda: lines(tmp_path / "run") >= 5, first)
        assert main([*argv, "--resume"]) == 2 and "is in use: process " in capsys.readouterr().err
        first.kill()
        until(lambda: not processes_of(tmp_path / "run"))
    assert main([*argv[:-2], "--dp", "1", "--steps", "7", "--resume"]) == 0
    assert not (tmp_path / "run" / lock.LOCK_FILE_NAME).exists()


def test_every_rank_of_a_second_run_refuses(ranks, tmp_path):
    with another(tmp_path):
        assert ranks(2).run(main, [*FLAGS, "--dp", "2", "--out", str(tmp_path)]) == [2, 2]


def test_the_lock_is_one_for_a_process_and_for_the_ranks_of_its_launch(tmp_path, monkeypatch):
    with lock_run_directory(tmp_path), lock_run_directory(tmp_path):
        pass
    with another(tmp_path):
        for name, value in {"RANK": "0", "WORLD_SIZE": "2",
                            "TORCHELASTIC_RUN_ID": lock.LAUNCH_ID_PREFIX + "1"}.items():
            monkeypatch.setenv(name, value)
        with lock_run_directory(tmp_path):
            pass
        assert (tmp_path / lock.LOCK_FILE_NAME).exists()


def test_a_rank_that_starts_again_waits_for_the_one_before_it(tmp_path, monkeypatch):
    for name, value in (RANK | {"TORCHELASTIC_RUN_ID": "same"}).items():
        monkeypatch.setenv(name, value)
    with another(tmp_path, "same") as before:
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: before.kill())
        with lock_run_directory(tmp_path, wait_seconds=600):
            assert before.wait() == -9
    with another(tmp_path, "other"), pytest.raises(ValueError, match="is in use"), \
            lock_run_directory(tmp_path, wait_seconds=600):
        pass


def test_a_lock_that_is_removed_as_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def after_its_holder_has_gone(file, how):
        if not removed:
            removed.append((tmp_path / lock.LOCK_FILE_NAME).unlink())
        real(file, how)
    monkeypatch.setattr(lock.fcntl, "flock", after_its_holder_has_gone)
    with lock_run_directory(tmp_path):
        assert removed and lock._PROCESS_UUID in (tmp_path / lock.LOCK_FILE_NAME).read_text()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock_run_directory(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_an_unreadable_holder_is_still_a_holder(tmp_path):
    with open(tmp_path / lock.LOCK_FILE_NAME, "w") as file:
        file.write("[")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process trains into it"), lock_run_directory(tmp_path):
            pass
