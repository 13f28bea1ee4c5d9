"""The one door to transformers, the library that defines what the files of a Hugging Face folder mean.

It is asked for configurations, tokenizers and chat templates, never for weights or code: nothing is fetched
from a network (`local_files_only`) and no code of a folder is run (`trust_remote_code` is never true). What
it raises, and it raises everything, becomes one line that names the file. Part of the hub extra; whoever
only reads runs of our own, or trains by size, needs none of it.
"""
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType

OLDEST = 5                                   # major version: 4 reads the same files in other ways


def transformers(purpose: str) -> ModuleType:
    """The package, for `purpose` ("Hugging Face folders"). ValueError where it is not there, or too old."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = optional("transformers", purpose)
    if int(found.__version__.partition(".")[0]) < OLDEST:
        raise ValueError(f"{purpose} need transformers {OLDEST} or newer, here is {found.__version__}; "
                         "pip install --upgrade 'nanoinfra[hub]'")
    return found


def optional(package: str, purpose: str) -> ModuleType:
    """Import a package of the hub extra; ValueError naming the extra where it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"{purpose} need the package {package}; pip install 'nanoinfra[hub]'") from error


def without_torch() -> None:
    """Let transformers be imported without torch, in a process that never needs it; before any import of it.

    transformers imports torch wherever it finds it, which takes seconds and hundreds of megabytes; a module
    that is None in `sys.modules` is one that cannot be imported.
    """
    sys.modules["torch"] = None


def asked(where: str, call: Callable, *args, **options):
    """`call(*args, **options)`, one of transformers'. What it raises becomes a ValueError about `where`."""
    try:
        with _silent(), panics_as_errors():
            return call(*args, **options)
    except Exception as error:               # of any kind: files come from anywhere
        raise ValueError(f"{where}: transformers does not read it: {in_one_line(error)}") from error


@contextmanager
def panics_as_errors():
    """A panic of a package written in Rust, no Exception to Python, becomes a RuntimeError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(f"it panicked: {panic}") from panic


def in_one_line(error: BaseException) -> str:
    """What `error` says, or its kind where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _silent():
    """Warnings about files are not the user's to act on here: what matters is refused."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
