"""Every field of the configuration classes of eight families, alone and in pairs where they interact.

The fields are transformers' own (dataclasses.fields), and keys that its code reads by getattr. A legal value
makes a model of its own; values of a wrong type or of an absurd size stand beside the base model's weights.
"""
import dataclasses
import itertools
import random
from functools import partial

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.model.foreign.fields import ABSOLUTE, LEGAL, NEUTRAL, PAIRS, ROPE_VALUES, ROPES, WRONG
from tests.model.foreign.judge import Case
from tests.model.foreign.models import ABSENT, BASES, opens_there, raw, same_logits, write_model

ROTARY = ("llama", "mistral", "phi3", "qwen2", "qwen3")


def config_cases(most_of_a_group: int = 30) -> list[Case]:
    """All cases, each name once."""
    made = []
    for family in BASES:
        for draw in (_alone, _wrong, _ropes) if family in ROTARY else (_alone, _wrong):
            cases = list(draw(family))
            most = len(cases) if family == "llama" or draw is _alone else 60
            made += random.Random(family).sample(cases, min(most, len(cases)))
        made += _together(family, most_of_a_group)
    return list({case.name: case for case in made}.values())


def config_case(family: str, build: bool = True, must: bool = False, at_least: int = 0, **edits) -> Case:
    """The folder of a family's base model with some keys of config.json set.

    It is well-formed where transformers opens it and each key is one of the family's own.
    """
    own = _fields(family) | set(BASES[family]) | {*NEUTRAL, "rope_scaling", "rope_parameters", "rope_theta"}
    spelled = ",".join(f"{key}={'ABSENT' if value is ABSENT else value}" for key, value in edits.items())
    make = partial(write_model, config=raw(family, **edits), build=build)
    return Case(
        f"config {family} {spelled[:140]}",
        make,
        partial(same_logits, at_least=at_least),
        opens_there if build and own >= set(edits) else False,
        must,
    )


def _fields(family):
    return {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}


def _alone(family):
    fields = _fields(family)
    yield config_case(family)
    for field in sorted(fields | (set(LEGAL) if family == "llama" else set(LEGAL) - set(NEUTRAL))):
        if field in fields:
            large = field in BASES[family] and isinstance(BASES[family][field], int)     # by default
            yield config_case(family, build=not large, **{field: ABSENT})
        for value in LEGAL.get(field, []):
            yield config_case(family, **{field: value})


def _wrong(family):
    for field in sorted(_fields(family) | set(BASES[family]) | {"is_causal", "attention_chunk_size"}):
        for value in WRONG[::3] if field in NEUTRAL else WRONG:
            yield config_case(family, build=False, **{field: value})


def _together(family, most):
    for at, group in enumerate(PAIRS if family in ROTARY else ABSOLUTE):
        every = list(itertools.product(*group.values()))
        for values in random.Random(f"{family}{at}").sample(every, min(most, len(every))):
            yield config_case(family, **dict(zip(group, values)))


def _ropes(family):
    """Scaled RoPE in the new spelling and both old ones, at the top, inside and on either side."""
    for kind, given in ROPES.items():
        new = {"rope_type": kind, "rope_theta": 500.0, **given}
        for edits in (
            {"rope_parameters": new, "rope_theta": ABSENT},
            {"rope_parameters": new, "rope_theta": 9.0},
            {"rope_scaling": {"rope_type": kind, **given}},
            {"rope_scaling": {"type": kind, **given}},
            {"rope_scaling": {"type": kind, **given}, "rope_theta": ABSENT},
            {
                "rope_scaling": {"type": kind, **given},
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            },
            {"rope_scaling": {"rope_type": kind, "type": "linear", **given}},
            {"rope_scaling": {"type": kind, **given}, "max_position_embeddings": 20},
            {"rope_scaling": {"type": kind, **given}, "original_max_position_embeddings": 10},
            {"rope_scaling": {"type": kind}},
            {"rope_scaling": {"full_attention": new}},
            {
                "rope_parameters": {
                    "full_attention": new,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
                },
                "rope_theta": ABSENT,
            },
        ):
            yield config_case(family, **edits)
        for key, values in ROPE_VALUES.items():
            for value in values:
                yield config_case(family, rope_theta=ABSENT, rope_parameters={**new, key: value})
            for value in WRONG if family == "llama" and (key in given or key == "rope_theta") else ():
                yield config_case(family, build=False, rope_parameters={**new, key: value})
    for value in (7, "linear", [], [1], {}, True):
        for key in ("rope_scaling", "rope_parameters"):
            yield config_case(family, build=False, **{key: value})
