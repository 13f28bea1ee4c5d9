"""The command line: `nanoinfra train`, `nanoinfra generate`, `nanoinfra serve`, `nanoinfra doctor`.

A user's mistake is answered by one line on stderr with a fix that works, and exit code 2; an error that does
not come from nanoinfra's own checks keeps its traceback. Signal handlers are set before other imports.
"""
import errno
import sys
import traceback
from pathlib import Path

from nanoinfra.train.launch import standard_streams, stop_signals

_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_NOT_FOUND_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_TOO_MANY_FILES_ERRNOS = (errno.EMFILE, errno.ENFILE)


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv` (default: sys.argv) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        from nanoinfra.parse_and_run_command import run_command  # tyro takes a while
        return run_command(argv)
    except ValueError as error:
        if not _ours(error):
            raise
        return _mistake(str(error))
    except BrokenPipeError:
        if standard_streams.stdout_has_reader():
            raise                            # another pipe broke, not stdout
        return standard_streams.discard_stdout()
    except OSError as error:
        return _mistake(_of_the_system(error))


def _of_the_system(error):
    """One line on an OSError that the user can mend; raises any other."""
    where = f"{error.filename or 'to disk'}: {error.strerror}"
    if error.errno in _DISK_ERRNOS:
        return f"cannot write {where}; make room or name another --out"
    if error.errno in _NOT_FOUND_ERRNOS and error.filename:
        return f"{where}; was it removed or moved meanwhile?"
    if error.errno in _TOO_MANY_FILES_ERRNOS:
        return f"{error.strerror}, more than this process may; raise the limit, say by ulimit -n 4096"
    raise error


def _mistake(message):
    from nanoinfra.train.launch import elastic_rank
    if not elastic_rank.send_error_to_launcher(message):
        print(f"nanoinfra: {message}", file=sys.stderr)
    return 2


def _ours(error):
    """Whether nanoinfra's own code raised the error, not a library that it calls."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).resolve().is_relative_to(Path(__file__).resolve().parent)


def run() -> None:
    """The entry point of the `nanoinfra` program: set up streams and signals, run the command, exit."""
    standard_streams.prepare_standard_streams(survive_closed_pipe=sys.argv[1:2] == ["train"])
    stop_signals.SignalListener(stop_signals.exit_immediately).start()
    code = main()
    stop_signals.ignore_termination_signals()
    sys.exit(code)


if __name__ == "__main__":
    run()
