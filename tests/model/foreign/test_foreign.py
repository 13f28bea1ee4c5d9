"""Foreign model files against transformers: a cut in `make test`, all cases in `make prove`."""
import os

import pytest

from nanoinfra.model import rope
from tests.model.foreign.broken import broken_cases
from tests.model.foreign.configs import config_case, config_cases
from tests.model.foreign.exports import export_cases
from tests.model.foreign.folders import named_cases
from tests.model.foreign.ggufs import gguf_cases
from tests.model.foreign.judge import Case, judge_all, judged, ours, share_opened, table
from tests.model.foreign.templates import template_cases
from tests.model.foreign.texts import text_cases
from tests.model.foreign.weights import weight_cases

KINDS = {
    "named": named_cases,
    "configurations": config_cases,
    "weights": weight_cases,
    "text": text_cases,
    "templates": template_cases,
    "exports": export_cases,
    "GGUF": gguf_cases,
    "broken files": broken_cases,
}
CUT = {
    "named": 20, "configurations": 40, "weights": 20, "text": 8, "templates": 20, "exports": 15, "GGUF": 25,
    "broken files": 20,
}
EVER = (                                     # names of cases that were faults once, one of each sort
    "weights llama both, index stale", "weights llama index of numbers", "weights llama index of a list",
    "config llama is_causal=False", "config llama rope_parameters=[1]",
    "config llama num_attention_heads=x", "config llama num_hidden_layers=inf",
    "config llama attention_chunk_size=4", "text gpt2, truncation", "text llama2, spaces between",
    "text llama3, split specials", "text no fallback", "text mistral",
    "text unigram bytes, padding longest", "text gpt2, eos a list", "text gpt2, eos list",
    "text qwen2, pointer", "text slow byt5", "text slow ctrl", "template chatml, tool",
    "template llama3, tool", "template date, user", "template generation, all", "template undefined, user",
    "template specials, user", "template raises, user", "template include, user", "template division, user",
    "template recursive, user", "template place dict", "template place list of numbers",
    "export llama 3000 then 1000000000 bytes", "export llama 1000000000 then 3000 bytes",
    "export llama into a folder with shards", "export llama rope_scaling yarn attention",
    "export llama mlp_bias yes", "export llama window 7", "export phi3 rope_scaling linear",
    "broken tokenizer_config.json deep", "gguf flip 147", "gguf tokenizer.ggml.tokens = many",
)


def faults(kinds):
    return [
        f"{verdict.name}: {verdict.why}"
        for verdicts in kinds.values()
        for verdict in verdicts
        if verdict.what == "fault"
    ]


def test_a_cut_of_all_foreign_files_is_equal_or_refused(tmp_path):
    every = {kind: make() for kind, make in KINDS.items()}
    cases = {case.name: case for kind, made in every.items() for case in spread(made, CUT[kind])}
    found = [case for made in every.values() for case in made if case.name in EVER]
    assert {case.name for case in found} == set(EVER)
    cases |= {case.name: case for case in found}
    verdicts = {"a cut": judge_all(cases.values(), tmp_path)}
    assert not faults(verdicts), "\n".join(faults(verdicts))


@pytest.mark.prove
@pytest.mark.parametrize("kind", KINDS)
def test_every_foreign_file_is_equal_or_refused(kind, tmp_path):
    found = {kind: judge_all(KINDS[kind](), tmp_path)}
    print(table(found))
    assert not faults(found), table(found) + "\n" + "\n".join(faults(found))
    assert share_opened(found[kind]) >= 0.9, table(found)


def spread(cases, most):
    """`most` cases, evenly over all."""
    return cases[:: max(1, len(cases) // most)][:most]


def test_the_judge_catches_a_silent_difference(tmp_path, monkeypatch):
    honest = rope.apply_rotary_emb
    case = config_case("llama", num_key_value_heads=1)
    assert judged(case, tmp_path / "a").what == "equal"
    monkeypatch.setattr("nanoinfra.model.attention.apply_rotary_emb",
                        lambda x, angles: honest(x, angles) * (1 + 1e-4))
    verdict = judged(case, tmp_path / "b")
    assert verdict.what == "fault" and "silent difference" in verdict.why


@pytest.mark.parametrize(
    "raised, what",
    [
        (ValueError("no such key"), "refused"),
        (ValueError("two\nlines"), "fault"),
        (KeyError("x"), "fault"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "x"), "fault"),
    ],
)
def test_one_line_is_refused_and_anything_else_a_fault(tmp_path, raised, what):
    def judge(folder):
        def opened():
            raise raised

        return ours(opened)

    assert judged(Case("raises", lambda folder: None, judge), tmp_path / "it").what == what


def test_a_case_that_hangs_or_dies_is_a_fault_and_the_next_one_goes_on(tmp_path):
    def hang(folder):
        while True:
            pass

    def die(folder):
        os._exit(3)

    cases = [
        Case(name, lambda folder: None, judge)
        for name, judge in (("hangs", hang), ("dies", die), ("opens", lambda folder: "equal"))
    ]
    assert [verdict.what for verdict in judge_all(cases, tmp_path, seconds=0.5)] == [
        "fault",
        "fault",
        "equal",
    ]
