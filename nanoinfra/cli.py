"""The command line: `nanoinfra train`, `nanoinfra generate`, `nanoinfra serve`, `nanoinfra doctor`.

Flags are generated from dataclasses that import no torch, so `--help` answers at once. A user's mistake is
one line on stderr with a fix that works, and exit code 2; an error that does not come from nanoinfra's own
checks keeps its traceback.
"""
import contextlib
import errno
import io
import itertools
import sys
import traceback
from pathlib import Path
from typing import Annotated

import tyro

from nanoinfra.lab.options import DoctorFlags
from nanoinfra.serve.options import GenerateOptions, ServeOptions
from nanoinfra.train.config import TrainFlags

Command = (Annotated[TrainFlags, tyro.conf.subcommand("train")]
           | Annotated[GenerateOptions, tyro.conf.subcommand("generate")]
           | Annotated[ServeOptions, tyro.conf.subcommand("serve")]
           | Annotated[DoctorFlags, tyro.conf.subcommand("doctor")])

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = _parse(argv)
        return COMMANDS[type(options)](options, argv)
    except ValueError as error:
        if not _ours(error):
            raise
        return _mistake(str(error))
    except OSError as error:
        if error.errno not in DISK:
            raise
        return _mistake(f"cannot write {error.filename or 'to disk'}: {error.strerror}; "
                        "make room or name another --out")


def _parse(argv):
    """tyro's answer; its own errors come in a box, and leave as one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Command, prog="nanoinfra", args=argv, description=(
                "LLM infrastructure, rebuilt small: train, then use what you trained."))
    except SystemExit as stop:
        if not stop.code:
            raise                            # --help
        lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
        message = " ".join(itertools.takewhile(lambda line: line and line[0] not in "─╰", lines))
        raise ValueError(f"{message.strip(' .')}; see nanoinfra --help") from None


def _train(flags, argv):
    from nanoinfra.train import config, rank
    from nanoinfra.train.lock import locked
    from nanoinfra.train.memory_check import check_memory
    from nanoinfra.train.outdir import check_out
    if rank.joined():
        return _train_here(flags)
    check_out(flags.run)
    if rank.is_rank():
        return _train_here(flags)
    world, run = config.ranks_wanted(flags.mesh), flags.run
    config.check(flags, world)
    check_memory(flags, world)
    with locked(run.out):
        if world > 1 or run.max_restarts:
            from nanoinfra.train.launch import launch
            return launch(argv, world, run.out, run.max_restarts)
        return _train_here(flags)


def _train_here(flags):
    from nanoinfra.train.rank import process_group
    from nanoinfra.train.trainer import train
    with process_group(flags.mesh.device, flags.run.out, flags.run.timeout):
        train(flags)
    return 0


def _generate(options, argv):
    from nanoinfra.train import rank
    if options.tp > 1 and not rank.is_rank() and not rank.joined():
        from nanoinfra.train.launch import launch
        return launch(argv, options.tp)
    from nanoinfra.serve.generate import main as generate
    with rank.process_group("cpu"):
        return generate(options)


def _serve(options, argv):
    from nanoinfra.serve.host import main as serve
    return serve(options)


def _doctor(flags, argv):
    from nanoinfra.lab.options import check
    from nanoinfra.train import rank
    if not rank.is_rank() and not rank.joined() and (world := check(flags)) > 1:
        from nanoinfra.train.launch import launch
        return launch(argv, world)
    from nanoinfra.lab.doctor import doctor
    with rank.process_group(flags.device):
        doctor(flags)
    return 0


COMMANDS = {TrainFlags: _train, GenerateOptions: _generate, ServeOptions: _serve, DoctorFlags: _doctor}


def _mistake(message):
    from nanoinfra.train import rank
    if not rank.leave_error(message):
        print(f"nanoinfra: {message}", file=sys.stderr)
    return 2


def _ours(error):
    """Was it raised by a line of nanoinfra, rather than somewhere below?"""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).resolve().is_relative_to(Path(__file__).resolve().parent)


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
