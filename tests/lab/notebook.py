"""A lesson's notebook, run in a kernel as a student's is, or faster in this process, which has torch."""
import os
import sys
import warnings
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from traitlets.config import Config

from nanoinfra.distributed.pool.ranks import Ranks
from tests.cpu_seconds import METER


def in_a_kernel(file: Path) -> None:
    """Run all cells in a Jupyter kernel of their own, however long they take."""
    where = {"metadata": {"path": str(file.parent)}}
    client = NotebookClient(nbformat.read(file, 4), timeout=None, startup_timeout=3600, resources=where,
                            on_cell_executed=lambda **_: METER.note())         # before its pools end with it
    client.execute()


def in_this_process(file: Path) -> None:
    """Run all cells in an IPython shell; its pools end with it, those that the checks share live on."""
    main, folder = sys.modules["__main__"], os.getcwd()
    os.chdir(file.parent)
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")           # as in a kernel
            for cell in nbformat.read(file, 4).cells:
                if cell.cell_type == "code":
                    shell.run_cell(cell.source).raise_error()
    finally:
        for pool in [each for each in shell.user_ns.values() if isinstance(each, Ranks)]:
            pool.close()
        shell.reset(new_session=False)
        sys.modules["__main__"] = main
        os.chdir(folder)
