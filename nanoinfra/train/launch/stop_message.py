"""What is said of a run that a signal has ended: where it stopped, what is saved, how to go on."""
import json
import shlex
from pathlib import Path

from nanoinfra.train.launch.elastic_rank import STOPPED
from nanoinfra.train.launch.signals import say, speaks_for_all


def say_where(out: Path, argv: list[str]) -> None:
    """If a signal has stopped the run of `nanoinfra ARGV` in `out`: the step, what is saved, how to go on."""
    note = out / STOPPED
    if note.exists() and speaks_for_all():
        step = json.loads(note.read_text())["step"]
        say(f"stopped after step {step}; saved in {out / 'checkpoints' / f'step_{step:08d}'}; "
            f"go on with: {how_to_go_on(argv)}")


def how_to_go_on(argv: list[str]) -> str:
    """The command that resumes the run of `nanoinfra ARGV`; one that went back does not go back again."""
    kept = [word for before, word in zip(["", *argv], argv) if "--resume-from" not in (before, word)
            and not word.startswith("--resume-from=")]
    return shlex.join(["nanoinfra", *kept, *["--resume"] * ("--resume" not in kept)])
