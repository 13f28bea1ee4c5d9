"""A NaN in one sequence, in logits, keys or values, changes no other's tokens."""
import functools
import random
from unittest import mock

import pytest
import torch

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.parallelize import parallelize_for_serving
from nanoinfra.serve.engine import cpu_decoder_block
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.load_engine import pack_weights_and_use_c_kernels
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
from tests.model.test_decoder import config
from tests.serve.ref_counts import check_ref_counts
from tests.serve.test_engine import GREEDY, prompt, tiny

CASES = {"torch": (torch.float64, False), "torch in bfloat16": (torch.bfloat16, False),
         "passes": (torch.float32, True), "passes in bfloat16": (torch.bfloat16, True)}
NEW = 10


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with mock.patch.object(cpu_decoder_block, "compile_decode_kernels",
                           functools.cache(cpu_decoder_block.compile_decode_kernels)):
        yield


def made(case, family="llama", **how):
    """An engine of torch's operations, or of the passes in C."""
    dtype, fast = CASES[case]
    engine = Engine(tiny(family).to(dtype), **{"num_blocks": 60, "block_size": 4,
                                               "max_num_batched_tokens": 24, "max_num_seqs": 8} | how)
    if fast:
        pack_weights_and_use_c_kernels(engine)
    return engine


def asked(name, tokens, new=NEW, **more):
    return Request(name, tokens, more.pop("sampling_params", GREEDY), max_tokens=new, ignore_eos=True, **more)


def serve(engine, requests, meddle=lambda step: None):
    """({(request, index): tokens}, {request: why it failed}); before each step comes `meddle(its number)`."""
    said, failed = {}, {}
    for request in requests:
        engine.add_request(request)
    for step in range(300):
        meddle(step)
        for event in engine.step() if engine.has_unfinished_requests else []:
            if event.finish_reason == "error":
                failed[event.request_id] = event.text
            else:
                said.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        check_ref_counts(engine.block_pool, [each.block_table for each in (*engine.scheduler.running,
                                                                           *engine.scheduler.waiting)])
    assert not engine.has_unfinished_requests and not engine.states_of_request
    assert not engine.block_pool.num_used_blocks
    return said, failed


def batch(n=5):
    return [asked(f"r{i}", prompt(20 + i, 5 + 3 * i)) for i in range(n)]


def table(engine, name, index=0):
    return engine.states_of_request[name][index].sequence.block_table


def poison(engine, blocks, value=float("nan"), heads=slice(None)):
    engine.kv_cache.kv_memory[:, heads, list(blocks)] = value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_was_in_a_block_before_reaches_nobody(case, value):
    """All that are free hold it, at the start and in between, when a long sequence has had them."""
    want, _ = serve(made(case), batch())
    engine = made(case)
    got = serve(engine, batch(), lambda step: poison(engine, engine.block_pool.free_blocks, value))
    assert got == (want, {})


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bloom", "opt"])
def test_nor_in_other_families(family):
    want, _ = serve(made("torch", family), batch())
    engine = made("torch", family)
    assert serve(engine, batch(), lambda step: poison(engine, engine.block_pool.free_blocks)) == (want, {})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_poisoned_block_of_one_changes_nobodys_tokens(case, what):
    """Not even its own: it is computed again from its tokens."""
    want, _ = serve(made(case), batch())
    engine = made(case)
    KV = engine.kv_cache.num_kv_heads
    which = {"keys": slice(KV), "values": slice(KV, None)}[what]
    got = serve(engine, batch(),
                lambda now: now == 4 and poison(engine, table(engine, "r2")[:1], heads=which))
    assert got == (want, {}) and engine.stats()["preemptions"] == 1


def test_ranks_decide_alike_where_one_alone_is_poisoned(ranks):
    model = tiny()
    want, _ = serve(Engine(model, num_blocks=60, block_size=4), batch())
    for got in ranks(2).run(sharded, model.state_dict()):
        assert got == (want, {}, 1)


def sharded(state):
    cfg, mesh = config("llama"), Mesh(tp=2)
    model = parallelize_for_serving(decoder_on_meta_device(cfg), mesh, lambda name, box=(): state[name][box],
                                    torch.float64)
    engine = Engine(model, num_blocks=60, block_size=4, ledger=mesh.comm_log)
    meddle = (lambda now: now == 4 and poison(engine, table(engine, "r2"))) if mesh.rank else lambda now: None
    return *serve(engine, batch(), meddle), engine.stats()["preemptions"]


def breaks(engine, token=96):
    """The token's embedding is NaN."""
    engine.model.embed.register_forward_hook(
        lambda embed, args, x: x.masked_fill(args[0][..., None] == token, float("nan")))


def heads(engine, spoil):
    """Let `spoil(logits)` see what the head makes."""
    head = engine.model.head

    class Spoiled(torch.nn.Module):
        def forward(self, x):
            spoil(y := head(x))
            return y
    engine.model.head = Spoiled()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_fail_one_request(case, value):
    want, _ = serve(made(case), batch())
    engine = made(case)

    def spoil(logits):
        for i, each in enumerate(at for at in engine.stats()["batch"] if at["computed"] == at["tokens"]):
            if each["request"] == "r3":
                logits[i] = value
    heads(engine, spoil)
    said, failed = serve(engine, batch())
    del want["r3", 0]
    assert said == want and list(failed) == ["r3"] and "not finite, computed twice" in failed["r3"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [5, 60])              # in chunks; or beside one of its length, in one call
def test_a_token_whose_embedding_is_broken_fails_who_uses_it(case, budget):
    """Its blocks are free afterwards, and taken by others; those that begin as it does are not its like."""
    shared = prompt(1, 12)
    good = [asked("alike", prompt(5, 12)), asked("a", [*shared, 1]), asked("b", [*shared, 2, 3])]
    want, _ = serve(made(case), good)
    engine = made(case, num_blocks=14, max_num_batched_tokens=budget)
    breaks(engine)
    bad = asked("x", [*shared[:8], 96, *shared[9:]], n=2)
    said, failed = serve(engine, [bad, *good])
    assert said == want and list(failed) == ["x"]


@pytest.mark.parametrize("case", CASES)
def test_a_known_prefix_that_is_poisoned_is_shared_with_nobody(case):
    shared = prompt(1, 12)
    requests = [asked(name, [*shared, i]) for i, name in enumerate("abc")]
    want, _ = serve(made(case), requests)
    engine = made(case)
    serve(engine, [asked("first", shared)])
    poison(engine, engine.block_pool.hash_to_block.values())
    assert serve(engine, requests) == (want, {})
    assert serve(engine, [asked("a", requests[0].prompt_token_ids)])[0] == {("a", 0): want["a", 0]}
    assert engine.stats()["prefix_hits"] == 4 * 12 and engine.stats()["preemptions"] == 3


def test_a_part_of_a_prompt_is_enough_to_know():
    """Given up before it has logits, it leaves no block that a later one would share."""
    engine = made("torch", max_num_batched_tokens=4)
    breaks(engine)
    engine.add_request(asked("x", [*prompt(1, 4), 96, *prompt(2, 20)]))
    for _ in range(4):
        engine.step()
    engine.abort_request("x")
    assert engine.block_pool.num_used_blocks == 0 and len(engine.block_pool.hash_to_block) <= 1


@pytest.mark.parametrize("case", ["torch", "passes in bfloat16"])
def test_forks_and_scored_prompts_too(case):
    def requests():
        return [asked("forks", prompt(1, 9), n=3), asked("scored", prompt(2, 9), prompt_logprobs=True,
                                                         logprobs=2),
                asked("plain", prompt(3, 9))]
    want, _ = serve(made(case), requests())
    for name, index in (("forks", 1), ("scored", 0), ("plain", 0)):
        engine = made(case, max_num_batched_tokens=6)
        got = serve(engine, requests(),
                    lambda now: now == 6 and poison(engine, table(engine, name, index)))  # noqa: B023
        assert got == (want, {}) and engine.stats()["preemptions"] >= 1
    engine = made(case)
    breaks(engine)
    bad = asked("bad", [*prompt(2, 5), 96, 3], prompt_logprobs=True, logprobs=2)
    assert serve(engine, [bad, *requests()])[0] == want


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", [0, 50, 96])
def test_the_likeliest_of_a_row_with_nan_is_in_range_and_the_other_rows_are_right(case, place):
    engine = made(case)
    rows = torch.randn(4, 97, generator=torch.Generator().manual_seed(0)).to(CASES[case][0])
    want = rows.float().argmax(-1).tolist()
    rows[1, place], rows[3] = float("nan"), float("nan")
    got = engine.argmax(rows)
    assert [got[0], got[2]] == [want[0], want[2]] and all(0 <= each < 97 for each in got)


def extreme(draw):
    """Sampling at the ends of what is taken."""
    def pick(*values):
        return draw.choice(values)
    ids = draw.sample(range(97), pick(0, 1, 97))
    return SamplingParams(pick(0.0, 1e-40, 5e-324, 1e-5, 1.0, 100.0), pick(0, 1, 97), pick(1e-9, 0.5, 1.0),
                          pick(0.0, 1e-300, 1.0), pick(-2, 0, 2), pick(-2, 0, 2), pick(1e-9, 1.0, 100.0),
                          {token: pick(-100, 100, 1e-300) for token in ids},
                          pick(None, -2 ** 63, 2 ** 63 - 1))


@pytest.mark.parametrize("case", ["torch", "passes in bfloat16"])
def test_no_sampling_that_is_taken_fails_or_is_felt_by_others(case):
    want, _ = serve(made(case), batch(3))
    draw = random.Random(0)
    odd = [asked(f"x{i}", prompt(i, 1 + i % 20), new=1 + i % 4, sampling_params=extreme(draw),
                 n=draw.choice([1, 3]),
                 logprobs=draw.choice([None, 97]), prompt_logprobs=i % 5 == 0) for i in range(60)]
    said, failed = serve(made(case), [*odd[:30], *batch(3), *odd[30:]])
    assert not failed and all(said[name] == tokens for name, tokens in want.items())
    assert {name for name, _ in said} >= {each.request_id for each in odd}
