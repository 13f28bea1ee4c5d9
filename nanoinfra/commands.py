"""What the command line says, and who does it: flags of `train`, `generate`, `serve` and `doctor`.

Flags are generated from dataclasses that import no torch, so `--help` answers at once. tyro's own errors come
in a box; they leave here as one line, with the name that was meant where there is one like it.
"""
import contextlib
import difflib
import io
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, get_args, get_type_hints

import tyro

from nanoinfra.lab.doctor.doctor_flags import DoctorFlags
from nanoinfra.serve.options import GenerateOptions, ServeOptions
from nanoinfra.train.config import TrainFlags

Command = (Annotated[TrainFlags, tyro.conf.subcommand("train")]
           | Annotated[GenerateOptions, tyro.conf.subcommand("generate")]
           | Annotated[ServeOptions, tyro.conf.subcommand("serve")]
           | Annotated[DoctorFlags, tyro.conf.subcommand("doctor")])


def run_command(argv: list[str]) -> int:
    """Do what `argv` says; returns the exit code. Raises ValueError for a user's mistake."""
    options = parse(argv)
    return COMMANDS[type(options)](options, argv)


def parse(argv: list[str]):
    """The options of one command. Raises ValueError with one line for what they cannot be."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Command, prog="nanoinfra", args=argv, description=(
                "LLM infrastructure, rebuilt small: train, then use what you trained."))
    except SystemExit as stop:
        if not stop.code:
            raise                            # --help
        raise ValueError(_in_one_line(said.getvalue(), argv)) from None


def _in_one_line(box, argv):
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    rules = [i for i, line in enumerate(lines) if not line.strip("─-╰╯")]    # ASCII where it has to be
    begin = 1 if rules[0] == 0 else 0
    message = " ".join(lines[begin:rules[begin]]).strip(" .")
    command = argv[0] if argv and argv[0] in _kinds() else ""
    meant = ";"
    if unknown := re.match(r"Unrecognized(?: or misplaced)? options: ([^\s,=]+)", message):
        word = unknown[1]
        message = f"unrecognized {'option' if word[:1] == '-' or command else 'command'} {word}"
        meant = _similar(word, flag_names(_kinds()[command]) if command else _kinds())
    elif choice := re.match(r"invalid choice '(.*?)' .*Expected one of \((.*)\)", message):
        meant = _similar(choice[1], re.findall(r"'(.*?)'", choice[2]))
    return f"{message}{meant} see {' '.join(('nanoinfra', command)).strip()} --help"


def _similar(word, names):
    close = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ";"


def _kinds():
    """{name: dataclass} of the commands."""
    return {get_args(each)[1].name: get_args(each)[0] for each in get_args(Command)}


def flag_names(options: type) -> Iterator[str]:
    """The flags that come from a dataclass, and from those in it."""
    hints = get_type_hints(options)
    for field in fields(options):
        kind, name = hints[field.name], field.name.replace("_", "-")
        if is_dataclass(kind):
            yield from flag_names(kind)
        else:
            yield from ([f"--{name}", f"--no-{name}"] if kind is bool else [f"--{name}"])


def _train(flags, argv):
    from nanoinfra.train import config
    from nanoinfra.train.launch import elastic_rank, preflight
    from nanoinfra.train.launch.memory_check import check_memory
    from nanoinfra.train.run_directory.lock import locked
    from nanoinfra.train.run_directory.ownership import check_out
    if elastic_rank.joined():
        return _train_here(flags, argv)
    if elastic_rank.is_rank():
        if not elastic_rank.launched_by_us():
            preflight.check_rank(lambda world: config.check(flags, world))
        return _train_here(flags, argv)
    world, run = config.ranks_wanted(flags.mesh), flags.run
    config.check(flags, world)
    preflight.check_device(flags.mesh.device, world)
    check_memory(flags, world)
    check_out(run)
    preflight.check_paths(run.out, run.trace)                # makes the folder
    with locked(run.out):
        if world > 1 or run.max_restarts:
            from nanoinfra.train.launch.launcher import launch
            return launch(argv, world, run.out, run.max_restarts)
        return _train_here(flags, argv)


def _train_here(flags, argv):
    from nanoinfra.train.launch import elastic_rank, stop_message
    from nanoinfra.train.trainer import train
    with elastic_rank.process_group(flags.mesh.device, flags.run.out, flags.run.timeout):
        train(flags)
    stop_message.say_where(flags.run.out, argv)
    return 0


def _generate(options, argv):
    from nanoinfra.train.launch import elastic_rank
    if options.tp > 1 and not elastic_rank.is_rank() and not elastic_rank.joined():
        from nanoinfra.train.launch.launcher import launch
        return launch(argv, options.tp)
    from nanoinfra.serve.generate import main as generate
    with elastic_rank.process_group("cpu"):
        return generate(options)


def _serve(options, argv):
    from nanoinfra.serve.server.launch_server import main as serve
    return serve(options)


def _doctor(flags, argv):
    from nanoinfra.lab.doctor.doctor_flags import check_doctor_flags
    from nanoinfra.train.launch import elastic_rank, preflight
    if not elastic_rank.is_rank() and not elastic_rank.joined():
        preflight.check_device(flags.device, world := check_doctor_flags(flags))
        if world > 1:
            from nanoinfra.train.launch.launcher import launch
            return launch(argv, world)
    from nanoinfra.lab.doctor.doctor import run_doctor
    with elastic_rank.process_group(flags.device):
        run_doctor(flags)
    return 0


COMMANDS = {TrainFlags: _train, GenerateOptions: _generate, ServeOptions: _serve, DoctorFlags: _doctor}
