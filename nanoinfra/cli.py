"""The command line: `nanoinfra train`, `nanoinfra generate`, `nanoinfra serve`, `nanoinfra doctor`.

A user's mistake is one line on stderr with a fix that works, and exit code 2; an error that does not come
from nanoinfra's own checks keeps its traceback. Signals are heard before anything else is imported.
"""
import errno
import sys
import traceback
from pathlib import Path

from nanoinfra.train.launch import signals, standard_streams

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        from nanoinfra.commands import run_command  # tyro takes a while
        return run_command(argv)
    except ValueError as error:
        if not _ours(error):
            raise
        return _mistake(str(error))
    except BrokenPipeError:
        if standard_streams.stdout_is_read():
            raise                            # it was another pipe
        return standard_streams.give_up_stdout()
    except OSError as error:
        return _mistake(_of_the_system(error))


def _of_the_system(error):
    """What the system refuses, in one line; raises what no user can mend."""
    where = f"{error.filename or 'to disk'}: {error.strerror}"
    if error.errno in DISK:
        return f"cannot write {where}; make room or name another --out"
    if error.errno in GONE and error.filename:
        return f"{where}; was it removed or moved meanwhile?"
    if error.errno in TOO_MANY_FILES:
        return f"{error.strerror}, more than this process may; raise the limit, say by ulimit -n 4096"
    raise error


def _mistake(message):
    from nanoinfra.train.launch import elastic_rank
    if not elastic_rank.leave_error(message):
        print(f"nanoinfra: {message}", file=sys.stderr)
    return 2


def _ours(error):
    """Was it raised by a line of nanoinfra, rather than somewhere below?"""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).resolve().is_relative_to(Path(__file__).resolve().parent)


def run() -> None:
    """The console script."""
    standard_streams.prepare(lasting=sys.argv[1:2] == ["train"])
    signals.Hearing(signals.end_at_once).start()
    code = main()
    signals.ignore_from_here_on()
    sys.exit(code)


if __name__ == "__main__":
    run()
