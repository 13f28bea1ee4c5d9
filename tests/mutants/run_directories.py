"""Known-wrong run directories: two runs in one, another's files overwritten, what is spoilt taken again.

The subject is the command line. Each run is a few steps of the smallest model, on one rank.
"""
import contextlib
import fcntl
import io
import tempfile
from contextlib import contextmanager
from pathlib import Path

from nanoinfra.cli import main
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.train.checkpoint import list_and_delete_checkpoints, save_and_load
from nanoinfra.train.run_directory.lock_run_directory import LOCK_FILE_NAME

FLAGS = ["train", "--model", "test", "--data", "random", "--seq", "8", "--micro-batch", "2", "--threads", "1",
         "--save-every", "1", "--keep-checkpoints", "9"]

folder = Check("a run's directory")


@contextmanager
def made(subject):
    """run(*flags): the exit code of such a run into the folder `run.out`, which `subject` gets as well."""
    with tempfile.TemporaryDirectory() as place:
        def run(*more):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return subject([*FLAGS, "--out", place, *more])
        run.out = Path(place)
        yield run


@folder.criterion("a folder that another run has is refused", "property")
def _(subject):
    with made(subject) as run, open(run.out / LOCK_FILE_NAME, "w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        if (code := run("--steps", "1")) != 2:
            raise CriterionNotMet(f"a second run into a locked folder ends with {code}, want 2")


@folder.criterion("what is another's stays as it was", "property")
def _(subject):
    with made(subject) as run:
        (run.out / "config.json").write_text('{"model_type": "llama"}')
        code, left = run("--steps", "1"), (run.out / "config.json").read_text()
        if code != 2 or left != '{"model_type": "llama"}':
            raise CriterionNotMet(f"a run into a model's folder ends with {code} and leaves config.json as "
                                  f"{left[:40]}")


@folder.criterion("what was left behind is not taken again", "property")
def _(subject):
    with made(subject) as run:
        run("--steps", "3")
        run("--resume-from", "1", "--steps", "1")
        saved = [path.name for path in save_and_load.list_checkpoints(run.out / "checkpoints")]
        if saved != ["step_00000001"]:
            raise CriterionNotMet(f"after --resume-from 1 --resume may take {saved[-1]}")


@folder.criterion("a link at an old checkpoint's name ends no save, and its target stays", "property")
def _(subject):
    with made(subject) as run, tempfile.TemporaryDirectory() as theirs:
        Path(theirs, "weights").write_text("precious")
        run("--steps", "1")
        (run.out / "checkpoints" / "step_00000000").symlink_to(theirs)
        code = run("--resume", "--steps", "3", "--keep-checkpoints", "1")
        if code or not Path(theirs, "weights").exists():
            raise CriterionNotMet(f"ends with {code}, and the link's target is {'kept' if code else 'lost'}")


@contextmanager
def no_lock(out, wait_seconds=0.0):
    yield


def anything(run):
    """Every folder will do."""


def follows_links(path, say):
    for child in path.iterdir():
        child.unlink()
    list_and_delete_checkpoints.os.rename(path, path.with_name(f"{path.name}.tmp"))


def everywhere(name, replacement):
    """Of lock_run_directory.py or check_out_folder.py, for the launcher and for the rank."""
    attribute = name.partition(":")[2]
    return patched(patched(main, name, replacement),
                   f"nanoinfra.train.run_directory.run_directory:{attribute}", replacement)


LOCKED, STAYS, LEFT, LINKED = (criterion.name for criterion in folder.criteria)
MUTANTS = [
    Mutant("two runs in one folder", folder,
           everywhere("nanoinfra.train.run_directory.lock_run_directory:lock_run_directory",
                      no_lock), LOCKED),
    Mutant("overwrites what it finds", folder,
           everywhere("nanoinfra.train.run_directory.check_out_folder:check_out_folder", anything),
           STAYS),
    Mutant("leaves spoilt checkpoints where they are", folder, patched(
        main, "nanoinfra.train.checkpoint.list_and_delete_checkpoints:abandon_checkpoints_after",
        lambda root, step: []), LEFT),
    Mutant("follows links when it deletes", folder, patched(
        main, "nanoinfra.train.checkpoint.list_and_delete_checkpoints:_discard", follows_links), LINKED),
]
