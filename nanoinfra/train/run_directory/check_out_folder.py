"""Check the folder --out: it may be new or a run's, not of another version nor another program's.

A run writes config.json, metrics.jsonl, loss.png, tokenizer/ and checkpoints/. When a folder holds files of
these names that are no run's, --out is refused before anything is written. No torch is imported here, as the
check runs before ranks start.
"""
import os
import shutil
from dataclasses import fields
from pathlib import Path

from nanoinfra.config import ModelConfig
from nanoinfra.model.weights.read_json_files import read_json
from nanoinfra.renamed_flags import with_new_flag_names
from nanoinfra.train.config import RunFlags, group_by_flag

RUN_DIRECTORY_VERSION = 1  # of a run directory, "nanoinfra" in its config.json
RUN_FILES = ("config.json", "metrics.jsonl", "loss.png")
_RUN_FOLDERS = ("checkpoints", "tokenizer")
_MANIFEST_START = b'"nanoinfra checkpoint'  # in the first line of a manifest
_TRACE_START = b'{"traceEvents"'                 # how a --trace begins


def check_out_folder(run: RunFlags) -> None:
    """Raise ValueError when a run into --out, or its --trace, would overwrite files that are not a run's."""
    out, resuming = run.out, run.resume or run.resume_from is not None
    try:
        if resuming and not out.exists():
            raise ValueError(f"--resume: there is no {out}; give the run's --out, or start without --resume")
        _check_place(out.resolve())
        if out.is_dir():
            _check_kinds(out)
            _check_owner(out)
        if run.trace:
            _check_trace(run.trace, out)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or out}: {error.strerror}; name an --out that you may "
                         "read and write") from error


def read_model_config(run: Path) -> ModelConfig:
    """Read the model configuration of a run directory. Raises ValueError when another version wrote it."""
    config, path = read_json(run / "config.json"), run / "config.json"
    _check_version(config, run)
    model = config.get("model")
    known = {field.name for field in fields(ModelConfig)}
    if not isinstance(model, dict):
        raise ValueError(f"{path} says nothing of the model; it is not as a run has left it")
    if unknown := model.keys() - known:
        raise ValueError(f"{path} describes a model by {', '.join(sorted(unknown))}, which this version of "
                         f"nanoinfra (run format {RUN_DIRECTORY_VERSION}) does not know; use the version "
                         "that wrote it")
    try:
        return ModelConfig(**model)
    except TypeError as error:
        raise ValueError(f"{path} does not describe a whole model: {error}") from error


def remove_run_files(out: Path) -> None:
    """Delete the files that a run has written into `out`, and nothing else; links are not followed."""
    for path in (out / name for name in (*RUN_FILES, *_RUN_FOLDERS)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_run_config(run: Path) -> dict:
    """Return a run's config.json with its flags under today's names, {} when it is missing or broken."""
    try:
        return with_new_flag_names(read_json(run / "config.json"), group_by_flag())
    except ValueError:
        return {}


def _check_place(out):
    if out == out.parent:
        raise ValueError(f"--out {out} is the whole file system; name a folder, --out runs/mine")
    for run in (out.parent, out.parent.parent):
        if out.relative_to(run).parts[0] in _RUN_FOLDERS and "nanoinfra" in read_run_config(run):
            raise ValueError(f"--out {out} is a part of the run in {run}; give --out {run} to go on with it, "
                             "or a folder outside")


def _check_kinds(out):
    for name in RUN_FILES:
        if (out / name).is_dir():
            raise ValueError(f"--out {out} holds a folder {name}, where a run has a file; name another --out")
    for name in _RUN_FOLDERS:
        if os.path.lexists(out / name) and not (out / name).is_dir():
            raise ValueError(f"--out {out} holds a file {name}, where a run has a folder; name another --out")
    if (out / "tokenizer").is_symlink():
        raise ValueError(f"{out / 'tokenizer'} is a link, and a run writes a tokenizer of its own there; "
                         "remove the link, or name another --out")


def _check_owner(out):
    """Raise ValueError unless the folder is free, or a run's by its config.json or checkpoints."""
    there = [name for name in (*RUN_FILES, *_RUN_FOLDERS) if os.path.lexists(out / name)
             and not _is_empty(out / name)]
    ours, config = _has_checkpoints(out), read_run_config(out)
    if "nanoinfra" in config:
        _check_version(config, out)
    elif config or there and not ours:
        raise ValueError(f"--out {out} holds {', '.join(there)}, which would be overwritten and are not of a "
                         "run of nanoinfra; name another --out")


def _check_version(config, run):
    if (version := config.get("nanoinfra")) != RUN_DIRECTORY_VERSION:
        raise ValueError(f"{run} holds a run of another version of nanoinfra: its format is {version}, and "
                         f"this version reads {RUN_DIRECTORY_VERSION}; use the version that wrote it")


def _check_trace(trace, out):
    own = [out / name for name in (*RUN_FILES, *_RUN_FOLDERS)]
    if any(path.resolve() in (trace.resolve(), *trace.resolve().parents) for path in own):
        raise ValueError(f"--trace {trace}: the run itself writes to that; try --trace {out}/trace.json")
    if trace.exists():
        if trace.is_dir():
            raise ValueError(f"--trace {trace} is a folder; name a file in it")
        with trace.open("rb") as file:
            if file.read(len(_TRACE_START)) not in (_TRACE_START, b""):
                raise ValueError(f"--trace {trace} is a file already, and no timeline; name another")
    elif not trace.parent.is_dir() and trace.parent.resolve() != out.resolve():
        raise ValueError(f"--trace {trace}: there is no folder {trace.parent}; make it first")


def _has_checkpoints(out):
    """Whether it holds a checkpoint of nanoinfra, even if config.json is missing or broken."""
    for path in (out / "checkpoints").glob("step_*/manifest.json"):
        with path.open("rb") as file:
            if _MANIFEST_START in file.read(64):
                return True
    return False


def _is_empty(path):
    return path.is_dir() and not any(path.iterdir())
