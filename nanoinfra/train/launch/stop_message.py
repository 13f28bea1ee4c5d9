"""The message on a run that a signal has stopped: the step, the saved checkpoint, the command to resume."""
import json
import shlex
from pathlib import Path

from nanoinfra.train.launch.elastic_rank import STOP_NOTE_FILE
from nanoinfra.train.launch.stop_signals import is_reporting_process, write_line_to_stderr


def report_stopped_run(out: Path, argv: list[str]) -> None:
    """If a signal has stopped the run of `nanoinfra ARGV` in `out`, print where, and how to resume it."""
    note = out / STOP_NOTE_FILE
    if note.exists() and is_reporting_process():
        step = json.loads(note.read_text())["step"]
        saved = out / "checkpoints" / f"step_{step:08d}"
        write_line_to_stderr(f"stopped after step {step}; saved in {saved}; "
                             f"go on with: {resume_command(argv)}")


def resume_command(argv: list[str]) -> str:
    """Return the command that resumes the run of `nanoinfra ARGV`: with --resume, without --resume-from."""
    kept = [word for before, word in zip(["", *argv], argv) if "--resume-from" not in (before, word)
            and not word.startswith("--resume-from=")]
    return shlex.join(["nanoinfra", *kept, *["--resume"] * ("--resume" not in kept)])
