"""Checks on --resume: whether these flags continue the same run, and which flags have changed.

The model, the data and the optimizer must be the same, or it is another run and is refused. Every other
changed flag that affects the losses is printed, with the change of the learning rate.
"""
import json
from pathlib import Path

from nanoinfra.config import MODEL_SIZES
from nanoinfra.train.config import TrainFlags, flags_to_dict
from nanoinfra.train.open_model_and_data import RunInputs

_REQUIRED_STATE_KEYS = ("step", "consumed", "updates", "scale", "seed", "seq", "corpus", "tokenizer", "model",
                        "flags")
_REPORTED_FLAGS = {"model": ("model", "dtype", "grad_dtype"), "optimizer": None,      # None: all of them
                   "run": ("steps", "max_seconds")}


def data_description(inputs: RunInputs) -> dict:
    """Describe the data for error messages: its name, documents, bytes, and the vocabulary size."""
    corpus, tokenizer = inputs.dataset.corpus, inputs.dataset.tokenizer
    vocab = tokenizer.vocab_size if tokenizer else inputs.model_config.vocab
    if corpus is None:
        return {"data": "random", "vocab": vocab}
    return {"data": corpus.name, "documents": len(corpus.train) + len(corpus.held_out),
            "bytes": sum(corpus.train_and_held_out_bytes), "vocab": vocab}


def check_resumes_same_run(run: Path, state: dict, inputs: RunInputs, flags: TrainFlags,
                           description: dict) -> None:
    """Raise ValueError, with the difference and a remedy, unless `flags` continue the run saved in `state`.

    `description` is what `data_description` returns for `inputs`; `run` is the run directory.
    """
    if missing := [key for key in _REQUIRED_STATE_KEYS if key not in state]:
        raise ValueError(f"--resume: the checkpoint of {run} says nothing of {', '.join(missing)}, so "
                         "another version of nanoinfra wrote it; go on with that one, or start a run of its "
                         f"own from its weights: --model {run} --out another")
    was, now = state["flags"]["model"], flags_to_dict(flags)["model"]
    if was["model"] != now["model"] and {was["model"], now["model"]} & MODEL_SIZES.keys():
        raise ValueError(f"--resume: the run in {run} trains --model {was['model']}, this is --model "
                         f"{now['model']}; give --model {was['model']}")
    for key in ("seed", "seq"):
        if state[key] != inputs.data_identity[key]:
            raise ValueError(f"--resume: the run in {run} has {key} {state[key]}, this one "
                             f"{inputs.data_identity[key]}; give --{key} {state[key]}")
    _check_text(run, state, inputs, description)
    _check_model(run, state, inputs)
    _check_optimizer(run, state, flags)
    _check_frozen(run, state, flags)


def describe_changed_flags(state: dict, flags: TrainFlags, threads: int, global_batch: int) -> list[str]:
    """List the changed flags that affect the losses: ["--steps 800 (500 before)", ...]."""
    was, now = state["flags"], flags_to_dict(flags)
    said = []
    for group, names in _REPORTED_FLAGS.items():
        for name in [name for name in names or now[group] if name in was[group].keys() & now[group].keys()]:
            before, here = was[group][name], _plain(now[group][name])
            if before != here:
                said.append(f"--{name.replace('_', '-')} {_word(here)} ({_word(before)} before)")
    for word, before, here in (("--global-batch", state.get("global_batch"), global_batch),
                               ("--threads", state.get("threads"), threads)):
        if before not in (None, here):
            said.append(f"{word} {here} ({before} before)")
    return said


def _check_text(run, state, inputs, text):
    was, same = state.get("text", {}), state["corpus"] == inputs.data_identity["corpus"]
    if same and state["tokenizer"] == inputs.data_identity["tokenizer"]:
        return
    if not same:
        raise ValueError(f"--resume: the run in {run} was trained on {_text(was)}, and now there is "
                         f"{_text(text, was)}; {_text_remedy(run, was, text)}")
    if was.get("vocab", text["vocab"]) != text["vocab"]:
        raise ValueError(f"--resume: the run in {run} has a vocabulary of {was['vocab']}, this one of "
                         f"{text['vocab']}; give {_model_flags(state)}")
    raise ValueError(f"--resume: the run in {run} has another tokenizer of {text['vocab']} entries than this "
                     f"one; give {_model_flags(state)} as it was, and the tokenizers package that trained it")


def _text(text, other=None):
    """Describe the data in words; if `other` has the same size, say that only the content differs."""
    if "documents" not in text:
        return f"--data {text['data']}" if text else "other text"
    if other and all(other.get(key) == text[key] for key in ("documents", "bytes")):
        return f"as much in --data {text['data']}, but not the same text"
    return f"--data {text['data']} of {text['documents']:,} documents, {text['bytes']:,} bytes"


def _text_remedy(run, was, text):
    if was and was["data"] != text["data"]:
        back = f"give --data {was['data']}"
    else:
        back = "put the text back as it was"
    if "documents" not in was:               # random tokens: no tokenizer to read a text with
        return back
    return f"{back}, or train the new text into its weights as a run of its own: --model {run} --out another"


def _check_model(run, state, inputs):
    was, now = state["model"], _plain(inputs.model_config.to_dict())
    if unknown := was.keys() - now.keys():
        raise ValueError(f"--resume: the model of the run in {run} has {', '.join(sorted(unknown))}, which "
                         "this version of nanoinfra does not know; go on with the version that wrote it")
    other = [key for key in now if was.get(key) != now[key]]
    if other:
        differs = ", ".join(f"{key} {was.get(key)} (here {now[key]})" for key in other)
        raise ValueError(f"--resume: the model of the run in {run} has {differs}; give {_model_flags(state)}")


def _check_optimizer(run, state, flags):
    was, now = state["flags"]["optimizer"]["optimizer"], flags.optimizer.optimizer
    if was != now:
        raise ValueError(f"--resume: the run in {run} has the state of --optimizer {was}, which {now} cannot "
                         f"use; give --optimizer {was}, or start a run of its own from its weights: --model "
                         f"{run} --out another")


def _check_frozen(run, state, flags):
    was, now = (" ".join(given) for given in (state["flags"]["model"].get("freeze", []), flags.model.freeze))
    if was != now:
        raise ValueError(f"--resume: the run in {run} trains with {_freeze(was)}, this with {_freeze(now)}, "
                         f"and what was frozen has no optimizer state; give {_freeze(was)}, or start a run "
                         f"of its own from its weights: --model {run} --out another")


def _freeze(patterns):
    return f"--freeze {patterns}" if patterns else "no --freeze"


def _model_flags(state):
    """The flags that describe the run's model."""
    flags = state["flags"]["model"]
    more = f" --vocab {flags['vocab']}" if flags.get("vocab") else " without --vocab"
    more = more if flags["model"] in MODEL_SIZES else ""
    return f"--model {flags['model']}{more}{' --untied' * flags['untied']}"


def _plain(value):
    return json.loads(json.dumps(value))     # as JSON keeps it: tuples become lists


def _word(value):
    return "not given" if value is None else value
