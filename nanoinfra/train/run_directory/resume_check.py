"""May a run go on from a checkpoint, and what is other than it was: both in words, before a step is taken.

A run must find its model, data and kind of optimizer again, or it is another run; of everything else that a
flag can change, what has changed is said, and how it moves the learning rate.
"""
import json
from pathlib import Path

from nanoinfra.config import SIZES
from nanoinfra.train.config import TrainFlags, to_json
from nanoinfra.train.run_inputs import Inputs

NEEDED = ("step", "consumed", "updates", "scale", "seed", "seq", "corpus", "tokenizer", "model", "flags")
SAID = {"model": ("model", "dtype", "grad_dtype"), "optimizer": None,      # None: all of them
        "run": ("steps", "seconds")}


def described(inputs: Inputs) -> dict:
    """What --data gave, in numbers that a sentence can hold: name, documents, bytes, tokenizer's entries."""
    corpus, tokenizer = inputs.source.corpus, inputs.source.tokenizer
    vocab = tokenizer.vocab_size if tokenizer else inputs.model.vocab
    if corpus is None:
        return {"data": "random", "vocab": vocab}
    return {"data": corpus.name, "documents": len(corpus.train) + len(corpus.held_out),
            "bytes": sum(corpus.bytes), "vocab": vocab}


def check_same(run: Path, state: dict, inputs: Inputs, flags: TrainFlags, text: dict) -> None:
    """Raise ValueError, which says what is another and what to do, unless `flags` go on with `state`.

    `text` is what `described` gives of `inputs`.
    """
    if missing := [key for key in NEEDED if key not in state]:
        raise ValueError(f"--resume: the checkpoint of {run} says nothing of {', '.join(missing)}, so "
                         "another version of nanoinfra wrote it; go on with that one, or start a run of its "
                         f"own from its weights: --model {run} --out another")
    was, now = state["flags"]["model"], to_json(flags)["model"]
    if was["model"] != now["model"] and {was["model"], now["model"]} & SIZES.keys():
        raise ValueError(f"--resume: the run in {run} trains --model {was['model']}, this is --model "
                         f"{now['model']}; give --model {was['model']}")
    for key in ("seed", "seq"):
        if state[key] != inputs.identity[key]:
            raise ValueError(f"--resume: the run in {run} has {key} {state[key]}, this one "
                             f"{inputs.identity[key]}; give --{key} {state[key]}")
    _check_text(run, state, inputs, text)
    _check_model(run, state, inputs)
    _check_optimizer(run, state, flags)
    _check_frozen(run, state, flags)


def changed_flags(state: dict, flags: TrainFlags, threads: int, global_batch: int) -> list[str]:
    """["--steps 800 (500 before)", ...]: what moves the losses and is not as when `state` was saved."""
    was, now, said = state["flags"], to_json(flags), []
    for group, names in SAID.items():
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
    was, same = state.get("text", {}), state["corpus"] == inputs.identity["corpus"]
    if same and state["tokenizer"] == inputs.identity["tokenizer"]:
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
    """--data in words; beside an `other` of the same size they say that its content differs."""
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
    was, now = state["model"], _plain(inputs.model.to_dict())
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
    """The flags that the run's model was given by."""
    flags = state["flags"]["model"]
    more = f" --vocab {flags['vocab']}" if flags.get("vocab") else " without --vocab"
    return f"--model {flags['model']}{more if flags['model'] in SIZES else ''}{' --untied' * flags['untied']}"


def _plain(value):
    return json.loads(json.dumps(value))     # as a checkpoint has kept it: tuples are lists


def _word(value):
    return "not given" if value is None else value
