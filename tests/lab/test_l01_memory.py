import importlib.util
from pathlib import Path

import pytest

MUTANTS = Path(__file__).parents[2] / "lessons" / "l01_memory" / "mutants.py"
HINTS = {
    "makes new weights": "lies elsewhere in memory after a step, in torch.bfloat16",
    "forgets bias correction": "no bias correction?",
    "has no masters": "for want of a float32 master that is kept",
    "makes masters anew": "for want of a float32 master that is kept",
    "keeps moments in 16 bits": "divided by eps alone: are moments in 16 bits, or g * g?",
    "counts parameters as steps": "`t` counts steps, not parameters",
    "corrects by one minus beta": "1 - beta, where 1 - beta^t corrects?",
    "has eps inside the root": "eps stands beside the root, not in it",
    "multiplies by the factor in 16 bits": "multiplied in 16 bits? Make p.grad float32 first",
    "has betas of its own": "are 0.9 and 0.95 written in? Use `betas`",
    "has an eps of its own": "is 1e-8 written in? Use `eps`",
    "keeps the initial weights": "in float32; a fourth float32 tensor, of gradients or weights?",
    "scales up to the limit": "clipping only ever shrinks",
    "takes the norm in 16 bits": "is the norm itself infinite in 16 bits?",
    "divides by a norm of 0": "all gradients are 0: the factor is 1/scale",
    "ignores the factor": "the gradient is factor x p.grad",
    "keeps moments in bfloat16": "`state` holds 16-bit tensors: moments in 16 bits?",
    "keeps float32 gradients": "16 each; want 12: master, first and second moment in float32; a fourth",
    "scales nothing": "is the loss scaled before backward",
    "divides in float16": "nothing divided after it but by `factor`?",
    "never undoes the scale": "the scale is still in it",
    "clips before it undoes the scale": "the norm of the scaled gradients was clipped: undo the scale first",
    "never clips": "never clipped?",
    "looks at the first tensor": "middle.grad is inf",
    "looks for infinity alone": "first.grad is nan, and move(nan) was called",
    "keeps the gradients": "are gradients of earlier steps still in p.grad?",
    "never grows back": "doubled after grow_after good steps in a row",
    "never halves": "half after an overflow",
    "counts good steps across an overflow": "does an overflow set `good` back to 0?",
    "copies gradients to float32": "a second copy?",
}


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("l01_mutants", MUTANTS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {mutant.name: mutant for mutant in module.MUTANTS}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named(mutants, name):
    assert HINTS[name] in mutants[name].check.report(mutants[name].variant).first_failure.text
