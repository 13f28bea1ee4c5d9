"""One case is a folder or file that somebody brings; we open it and so does transformers, which is right.

A case may be equal or refused in one line. Everything else is a fault: another difference, another exception,
no end within its seconds, memory past its limit. Cases run one after another in a forked process, so that one
that hangs or dies takes only itself along.
"""
import multiprocessing
import resource
import shutil
import signal
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

SECONDS = 20
MEMORY = 12 * 2**30  # address space of the process that runs cases
CLOSE = 1e-4  # largest absolute difference of float32 logits


class Case(NamedTuple):
    """`make(folder)` writes what is brought, `judge(folder)` says "equal" or raises Refused or Fault."""

    name: str
    make: Callable[[Path], None]
    judge: Callable[[Path], str]
    well: Callable[[Path], bool] | bool = False  # is it well-formed; asked where it was refused
    must: bool = False  # refused is a fault


class Refused(Exception):
    """Ours raised ValueError in one line."""


class Fault(Exception):
    """What may never be."""


class Verdict(NamedTuple):
    name: str
    what: str  # "equal", "opened" (nothing to compare), "refused" or "fault"
    why: str = ""
    well: bool = False


def ours(call: Callable, *args, **options):
    """`call(*args)`, one of our doors. Refused for a ValueError in one line, Fault for anything else."""
    try:
        return call(*args, **options)
    except ValueError as error:
        said = str(error)
        if not said.strip() or len(said.splitlines()) > 1 or type(error) is not ValueError:
            raise Fault(f"{type(error).__name__} that is no line of ours: {said!r}") from error
        raise Refused(said) from error
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        raise Fault(
            f"traceback: {type(error).__name__}: {str(error)[:200]} "
            f"({Path(last.filename).name}:{last.lineno})"
        ) from error


def same(got, want, what: str) -> None:
    """Fault where the two differ."""
    if got != want:
        raise Fault(f"{what}: {str(got)[:150]!r} where transformers has {str(want)[:150]!r}")


def seed(name: str) -> int:
    """A number that follows from the case's name alone."""
    return zlib.crc32(name.encode())


def judged(case: Case, folder: Path) -> Verdict:
    """The verdict on one case, made in `folder`."""
    folder.mkdir(parents=True)
    case.make(folder)
    try:
        return Verdict(case.name, case.judge(folder), well=True)
    except Refused as error:
        if case.must:
            return Verdict(case.name, "fault", f"must open: {error}", True)
        well = case.well if isinstance(case.well, bool) else case.well(folder)
        return Verdict(case.name, "refused", str(error), well)
    except Fault as error:
        return Verdict(case.name, "fault", str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judge_all(cases: Iterable[Case], root: Path, seconds: float = SECONDS) -> list[Verdict]:
    """The verdict on each case; a case that does not end, or takes its process along, is a fault."""
    cases, verdicts, worker = list(cases), [], None
    assert len({case.name for case in cases}) == len(cases), "two cases of one name"
    for at, case in enumerate(cases):
        worker = worker or _Worker(cases, root, seconds)
        if verdict := worker.judge(at):
            verdicts.append(verdict)
            continue
        worker.end()
        ended = (
            "hang" if worker.process.exitcode in (-signal.SIGPROF, -signal.SIGKILL) else "its process died"
        )
        verdicts.append(Verdict(case.name, "fault", f"{ended}, exit code {worker.process.exitcode}"))
        worker = None
    if worker:
        worker.end()
    return verdicts


class _Worker:
    """A forked process that judges the cases whose numbers it is sent, in `seconds` of the processor each."""

    def __init__(self, cases, root, seconds):
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe()
        self.process, self.patience = (
            fork.Process(target=_work, args=(cases, root, theirs, seconds)),
            10 * seconds,
        )
        self.process.start()
        theirs.close()

    def judge(self, at):
        """The verdict, or None where the process ends first, or neither."""
        try:
            self.pipe.send(at)
            return self.pipe.recv() if self.pipe.poll(self.patience) else None
        except (EOFError, ConnectionError):
            self.process.join(1)  # so that its own end is seen, not the one it is given
            return None

    def end(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(cases, root, pipe, seconds):
    warnings.simplefilter("ignore")
    torch.set_num_threads(torch.get_num_threads())  # makes the forked pool anew; two threads may not
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while (at := pipe.recv()) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # then SIGPROF ends the process
        try:
            verdict = judged(cases[at], root / str(at))
        except BaseException as error:  # the case's own code
            where = traceback.format_exc().strip().splitlines()[-3:]
            verdict = Verdict(cases[at].name, "fault", f"the judge failed: {error!r} {' '.join(where)}"[:600])
        pipe.send(verdict)


def table(kinds: dict[str, list[Verdict]]) -> str:
    """A row a kind of case: how many, their verdicts, the share of the well-formed ones that open."""
    heads = {
        "": 16,
        "cases": 7,
        "equal": 7,
        "opened": 8,
        "refused": 9,
        "faults": 8,
        "well-formed": 13,
        "open": 8,
    }
    lines = ["".join(f"{head:>{width}}" for head, width in heads.items())]
    for kind, verdicts in {**kinds, "all": sum(kinds.values(), [])}.items():
        count = Counter(verdict.what for verdict in verdicts)
        well = [verdict for verdict in verdicts if verdict.well]
        lines.append(
            f"{kind:16}{len(verdicts):7}{count['equal']:7}{count['opened']:8}{count['refused']:9}{count['fault']:8}"
            f"{len(well):13}{share_opened(verdicts):8.1%}"
        )
    return "\n".join(lines)


def share_opened(verdicts: list[Verdict]) -> float:
    """The share of well-formed cases that were opened."""
    well = [verdict.what != "refused" for verdict in verdicts if verdict.well]
    return sum(well) / max(1, len(well))
