"""The checks of lesson 15 say which slip it was."""
import pytest
import torch
import torch.nn.functional as F

from lessons.l15_kv_cache import checks as check
from nanoinfra.lab.exercise import export_exercises_of_notebook, load_python_file, split_into_exercises
from nanoinfra.lab.find_course_folder import clone_folder
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.model.attention_cores import naive_attention
from nanoinfra.serve.generate_with_kv_cache import generate

HINTS = {
    "sees later tokens": "changes what token 0 makes: it sees a later one (query t sees keys 0 to 0 + t)",
    "masks its own key": "whatever the memory: it sees no key: is its own masked?",
    "mixes up rows of G and T": "or rows of G and T are mixed up",
    "cuts q as (G, KV)": "are q's heads cut as (KV, G), in this order?",
    "divides by K": "divided by K, not by sqrt(K)?",
    "sees one token too many": "another token 3 changes what token 2 makes",
    "begins its mask at key 0": "the mask begins at key 0? The queries are the last T of S tokens",
    "sees one token too few": "itself is not seen? Query t sees key t",
    "sees the new tokens alone": "the new tokens alone? What is kept belongs to it",
    "returns nothing": "is NoneType, want a tensor (2, 4, 1, 6): no return?",
    "writes at the beginning": "memory[0][:, :, 4:5] is as it was: write k and v into the memory itself",
    "writes over the last token": "memory[0][:, :, 4:5] is as it was",
    "puts together and forgets": "memory[0][:, :, 0:3] is as it was",
    "writes values for keys": "keys and values changed places?",
    "writes in float32": "rounding: summed in a narrower dtype?",
    "does not divide": "no division by sqrt(K)?",
    "deals query heads in turn": "query head h reads KV head h // 2, not h % 2",
    "reads what is not there": "not a number: memory read before it was written?",
    "reads one memory for all layers": "`hidden of tokens 5 to 5, 4 heads on 2` differs",
    "copies what is kept": "makes 182,921 bytes at once, and all keys have 83,968: are they copied",
    "repeats keys for each query head": "let the 2 queries of a KV head stand side by side",
    "looks for NaN first": "reads 335,872 bytes of the memory, want 167,936: keys once, values once",
    "gives nothing": "want a tensor of tokens (2, 5): no return?",
    "gives the prompt too": "shape (2, 12), want (2, 5): with the prompt?",
    "runs all tokens again": "all tokens again? The cache has them",
    "makes a new cache each call": "all tokens again? The cache has them",
    "puts each token at place 0": "a new one is at cache.length, not at 0",
    "puts each token one place too far": "a token's place is the number of tokens before it",
    "forgets to count": "a new one is at cache.length, not at 0",
    "counts twice": "call 1 runs token 7 when cache.length says 8: add a call's tokens to cache.length",
    "runs the last token too": "the last token has gone in, and nobody asks what follows",
    "feeds the prompt's last token again": "what the call before has made, of each sequence",
    "answers with the first row": "the likeliest by the logits of the last row of its sequence",
    "gives all sequences the first one's token": "sequence 1, new token 0",
    "reads the prompt token by token": "a call reads all weights, so the prompt goes in one",
    "takes the head of all rows": "the head reads [14, 2, 2, 2, 2] rows, want [2, 2, 2, 2, 2]",
    "keeps room for the last token": "asks for caches of [12] tokens, want one of 11: the last token goes in",
    "takes memory for the context": "asks for caches of [32] tokens, want one of 11",
}
MUTANTS = {mutant.name: mutant for mutant in collect_lesson_mutants("15")}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named(name):
    failure = MUTANTS[name].check.report(MUTANTS[name].variant).first_failure
    assert HINTS[name] in failure.text


def test_every_mutant_is_rejected_by_its_criterion():
    for mutant in MUTANTS.values():
        assert mutant.check.report(mutant.variant).first_failure.criterion.name == mutant.rejected_by


def attends(core):
    def attend(memory, length, q, k, v):
        end = length + k.shape[2]
        memory[0, :, :, length:end], memory[1, :, :, length:end] = k, v
        return core(q, *memory[:, :, :, :end])
    return attend


def fused(q, k, v):
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


def einsums(q, k, v):
    (T, K), (KV, S) = q.shape[2:], k.shape[1:3]
    scores = torch.einsum("bkgtd,bksd->bkgts", q.unflatten(1, (KV, -1)), k) / K**0.5
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)


@pytest.mark.parametrize("core", [naive_attention, fused, einsums])
def test_other_ways_to_attend_pass(core):
    assert check.attend.report(attends(core)).exit_code == 0


def test_broadcasting_keys_over_query_heads_is_a_copy():
    def broadcast(q, k, v):
        q = q.unflatten(1, (k.shape[1], -1))
        scores = q @ k[:, :, None].mT / q.shape[-1] ** 0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[3])
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, :, None]).flatten(1, 2)
    assert check.attend.report(attends(broadcast)).first_failure.criterion.name == "copies no keys"


def test_the_real_loop_passes_one_sequence_at_a_time():
    model, prompt = check.cases.model(), check.cases.tokens(3, 5)
    got = [list(generate(model, row.tolist(), 6)) for row in prompt]
    assert got == check.cases.greedy(3, 5, 6).tolist()


def test_each_exercise_stands_alone(tmp_path):
    file, = export_exercises_of_notebook(clone_folder() / "lessons" / "l15_kv_cache" / "lesson.py", tmp_path)
    for name, cell in split_into_exercises(file.read_text()).items():
        (tmp_path / "alone.py").write_text(cell)
        assert callable(getattr(load_python_file(tmp_path / "alone.py"), name))


def test_two_dims_of_places_and_a_whole_forward_are_fine_too():
    @torch.no_grad()
    def loop(model, prompt, n, make):
        cache, made = make(prompt.shape[1] + n - 1), [prompt]
        for _ in range(n):
            T = made[-1].shape[1]
            places = (torch.arange(T) + cache.length).expand(len(prompt), T)
            hidden = model.hidden_states(made[-1], places, cache)
            cache.length += T
            made.append(model.head(hidden[:, -1:]).argmax(-1))
        return torch.cat(made[1:], 1)
    assert check.generate.report(loop).exit_code == 0


def test_what_runs_past_its_memory_is_told_so():
    def small(model, prompt, n, make):
        cache = make(prompt.shape[1])
        model.hidden_states(prompt, None, cache)
        cache.length += prompt.shape[1]
        return model.hidden_states(prompt[:, :1], torch.tensor([cache.length]), cache)
    assert "8 tokens do not fit a KV cache for 7" in check.generate.report(small).first_failure.text
