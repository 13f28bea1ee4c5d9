"""The only place that imports transformers, which defines what the files of a Hugging Face folder mean.

nanoinfra asks it for configurations, tokenizers and chat templates, not for weights or code: nothing is
fetched from a network (`local_files_only`) and no code of a folder is run (`trust_remote_code` is never
true). Every exception of transformers becomes a ValueError of one line that names the file. The package is in
the hub extra; training a model by size and reading our own runs work without it.
"""
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

_OLDEST_MAJOR_VERSION = 5                    # version 4 reads the same files in other ways


def import_transformers(purpose: str) -> ModuleType:
    """Import transformers for `purpose` ("Hugging Face folders"). Raises ValueError if missing or too old."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = import_optional_package("transformers", purpose)
    if int(found.__version__.partition(".")[0]) < _OLDEST_MAJOR_VERSION:
        raise ValueError(f"{purpose} need transformers {_OLDEST_MAJOR_VERSION} or newer, here is "
                         f"{found.__version__}; pip install --upgrade 'nanoinfra[hub]'")
    return found


def import_optional_package(package: str, purpose: str) -> ModuleType:
    """Import a package of the hub extra. Raises ValueError, which names the extra, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"{purpose} need the package {package}; pip install 'nanoinfra[hub]'") from error


def hide_torch_from_transformers() -> None:
    """Make torch unimportable in this process, so that transformers loads without it. Call it first.

    transformers imports torch wherever it finds it, which takes seconds and hundreds of megabytes. Python
    cannot import a module that is None in `sys.modules`.
    """
    sys.modules["torch"] = None


def call_transformers(where: str, call: Callable, *args, **options) -> object:
    """Call a function of transformers. Whatever it raises becomes a ValueError about the file `where`."""
    try:
        with _silent(), rust_panics_as_errors():
            return call(*args, **options)
    except Exception as error:               # of any kind: the files can be anybody's
        raise ValueError(f"{where}: transformers does not read it: {error_in_one_line(error)}") from error


@contextmanager
def rust_panics_as_errors() -> Iterator[None]:
    """Turn a panic of a Rust extension, which Python does not see as an Exception, into a RuntimeError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(f"it panicked: {panic}") from panic


def error_in_one_line(error: BaseException) -> str:
    """The message of `error` in one line, or the name of its class where it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _silent():
    """Hide warnings about the files: a user cannot act on them, and what matters is refused."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
