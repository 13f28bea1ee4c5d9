"""The one list of techniques that refuse combinations of flags: the check before a run and the matrix ask it.

A technique says itself what it is not combined with, and why: its module has a generator `refusals(flags)`
over the flags by name. Where the technique's own file imports torch, that generator stands in the folder
refusals/ beside it, so that a mistake is answered before torch is loaded. To add a technique is to add its
module to `TECHNIQUES`.
"""
from collections.abc import Iterator
from inspect import isgenerator
from types import SimpleNamespace

from nanoinfra.memory.refusals import recompute
from nanoinfra.parallel.refusals import (
    context_parallel,
    data_parallel,
    pipeline,
    sequence_parallel,
    tensor_parallel,
    zero,
)
from nanoinfra.train import frozen_parameters
from nanoinfra.train.refusals import held_out_evaluation, optimizer, pretrained_weights

TECHNIQUES = (context_parallel, data_parallel, zero, recompute, sequence_parallel, held_out_evaluation,
              pretrained_weights, tensor_parallel, optimizer, pipeline, frozen_parameters)


def technique_refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield the reason of each refusal of each technique in `TECHNIQUES`, for `flags` by name.

    Raises TypeError for a technique that has no generator `refusals(flags)`.
    """
    for technique in TECHNIQUES:
        refusals = getattr(technique, "refusals", None)
        reasons = refusals(flags) if callable(refusals) else None
        if not isgenerator(reasons):
            raise TypeError(f"{getattr(technique, '__name__', technique)} is one of TECHNIQUES and has no "
                            "generator refusals(flags); give it one that yields the reason of each refusal")
        yield from reasons
