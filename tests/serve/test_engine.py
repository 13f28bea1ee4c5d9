"""Many requests at once say what each would alone; forks, seeds, logprobs; weights stay as they are."""
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.load_and_save import load_hf_model, save_hf_model
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.parallelize import parallelize_for_serving
from nanoinfra.serve.command_line_options import EngineOptions
from nanoinfra.serve.engine import packed_linear
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.load_engine import load_engine
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
from nanoinfra.serve.engine.scheduler import QueueFull
from nanoinfra.serve.generate_with_kv_cache import generate
from tests.families import VARIANTS
from tests.model.test_decoder import config
from tests.model.twins import FAMILIES, scrambled
from tests.serve.letters import letters
from tests.serve.ref_counts import check_ref_counts

GREEDY = SamplingParams(temperature=0)
VOCAB = 97


def tiny(family="llama", **changes):
    return scrambled(Decoder(replace(config(family), **changes))).double()


def prompt(seed, n):
    return random.Random(seed).choices(range(VOCAB), k=n)


def run(engine, most=3000):
    """{(request, index): its tokens} of all that is in the engine; it ends with an empty pool."""
    said = {}
    for _ in range(most):
        if not engine.has_unfinished_requests:
            break
        for event in engine.step():
            said.setdefault((event.request_id, event.index), []).extend(event.token_ids)
    assert not engine.has_unfinished_requests and not engine.states_of_request
    assert engine.block_pool.num_used_blocks == 0
    check_ref_counts(engine.block_pool, [])
    return said


def alone(model, tokens, n):
    return list(generate(model, tokens, n))


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
@pytest.mark.parametrize("budget, size, blocks", [(512, 16, 40), (5, 3, 60), (7, 4, 9), (1, 1, 30)])
def test_greedy_is_what_each_says_alone(family, budget, size, blocks):
    """Chunks, prefix hits, a pool so small that sequences are preempted, arrivals in between."""
    model = tiny(family)
    engine = Engine(model, num_blocks=blocks, block_size=size, max_num_batched_tokens=budget, max_num_seqs=5)
    asked = {f"r{i}": prompt(i % 3, 3 + 2 * i) for i in range(6)}          # three begin alike, twice
    for i, (name, tokens) in enumerate(asked.items()):
        engine.add_request(Request(name, tokens, GREEDY, max_tokens=8))
        for _ in range(i % 3):
            for event in engine.step():
                asked.setdefault(name, tokens)
                EARLY.setdefault((family, budget, event.request_id), []).extend(event.token_ids)
    said = run(engine)
    for name, tokens in asked.items():
        got = EARLY.pop((family, budget, name), []) + said.get((name, 0), [])
        assert got == alone(model, tokens, 8), name
    assert engine.stats()["generation_tokens"] == 48
    if blocks == 9:
        assert engine.stats()["preemptions"] > 0


EARLY = {}


@pytest.mark.parametrize("tp", [2, pytest.param(6, marks=pytest.mark.prove)])
def test_ranks_that_share_the_model_say_the_same(ranks, tp):
    model = tiny()
    want = [alone(model, prompt(i, 9), 6) for i in range(4)]
    for got in ranks(tp).run(sharded, model.state_dict(), tp):
        assert got[:4] == want
        assert got[4] == got[5] and len(set(got[4])) > 2                   # drawn, from one seed


def sharded(state, tp):
    cfg, mesh = config("llama"), Mesh(tp=tp)
    model = parallelize_for_serving(decoder_on_meta_device(cfg), mesh, lambda name, box=(): state[name][box],
                                    torch.float64)
    engine = Engine(model, num_blocks=12, block_size=4, max_num_batched_tokens=6, ledger=mesh.comm_log)
    assert engine.kv_cache.kv_memory.shape[1] == 2 * max(1, cfg.kv_heads // tp)
    for i in range(6):
        drawn = SamplingParams(temperature=1.0, seed=7)
        engine.add_request(Request(f"r{i}", prompt(min(i, 4), 9), GREEDY if i < 4 else drawn, max_tokens=6))
    said, calls = run(engine), 2 * cfg.layers + 2                          # of a step: layers, both ends
    assert len(mesh.comm_log.records) == calls                                  # the last step's, no more
    return [said[f"r{i}", 0] for i in range(6)]


def test_forks_of_one_prompt_share_it_and_go_their_own_ways():
    model, tokens = tiny(), prompt(0, 10)
    engine = Engine(model, num_blocks=40, block_size=4)
    engine.add_request(Request("r", tokens, SamplingParams(seed=5), max_tokens=7, n=3))
    engine.step()
    assert engine.stats()["blocks_used"] == 3 and engine.stats()["blocks_shared"] == 3
    first = run(engine)
    for index in range(3):                     # what a request of its own, drawn from the same, would say
        other = Engine(model, num_blocks=40, block_size=4)
        other.add_request(Request("r", tokens, SamplingParams(seed=5), max_tokens=7, n=index + 1))
        everything = {}
        while other.has_unfinished_requests:
            for event in other.step():
                everything.setdefault(event.index, []).extend(event.token_ids)
        assert everything[index][1:] == first["r", index]
    assert len({tuple(each) for each in first.values()}) == 3


def test_greedy_forks_are_all_the_greedy_one():
    model, tokens = tiny(), prompt(1, 11)
    for blocks in (40, 7):                     # the second preempts
        engine = Engine(model, num_blocks=blocks, block_size=4, max_num_batched_tokens=5)
        engine.add_request(Request("r", tokens, GREEDY, max_tokens=6, n=3))
        assert run(engine) == {("r", i): alone(model, tokens, 6) for i in range(3)}


def test_draws_do_not_depend_on_what_else_is_in_the_batch():
    model, tokens = tiny(), prompt(2, 6)
    asked = Request("r", tokens, SamplingParams(temperature=1.3, top_p=0.9, seed=11), max_tokens=12)
    lonely = Engine(model, num_blocks=40, block_size=4)
    lonely.add_request(asked)
    want = run(lonely)["r", 0]
    crowded = Engine(model, num_blocks=14, block_size=4, max_num_batched_tokens=9)
    for i in range(5):
        crowded.add_request(Request(f"x{i}", prompt(i, 8), SamplingParams(seed=11), max_tokens=9))
        if i == 2:
            crowded.add_request(asked)
    assert run(crowded)["r", 0] == want
    assert want == list(generate(model, tokens, 12, temperature=1.3, top_p=0.9, seed=11))


@torch.no_grad()
def test_logprobs_of_prompt_and_answer_are_the_models():
    model, tokens = tiny(), prompt(3, 9)
    for blocks, budget in ((40, 512), (40, 4), (7, 3)):
        engine = Engine(model, num_blocks=blocks, block_size=2, max_num_batched_tokens=budget)
        engine.add_request(Request("x", prompt(9, 4), GREEDY, max_tokens=4))       # takes blocks, too
        engine.add_request(Request("r", tokens, GREEDY, max_tokens=4, logprobs=2, prompt_logprobs=True))
        events = []
        while engine.has_unfinished_requests:
            events += [event for event in engine.step() if event.request_id == "r"]
        whole = tokens + [token for event in events for token in event.token_ids]
        want = model(torch.tensor([whole]))[0].log_softmax(-1)
        got = events[0].prompt_logprobs + [each for event in events for each in event.logprobs]
        assert len(events[0].prompt_logprobs) == len(tokens)
        assert not any(event.prompt_logprobs for event in events[1:])
        assert got[0].logprob is None and [each.token for each in got] == whole
        for i, each in enumerate(got[1:]):
            assert each.logprob == pytest.approx(want[i, each.token].item(), abs=1e-10)
            assert [token for token, _ in each.top_logprobs] == want[i].topk(2).indices.tolist()


def test_a_prompt_alone_may_be_scored():
    engine = Engine(tiny(), num_blocks=10, block_size=4)
    engine.add_request(Request("r", prompt(0, 5), GREEDY, max_tokens=0, logprobs=0, prompt_logprobs=True))
    [event] = engine.step()
    assert (event.finish_reason, event.token_ids, len(event.prompt_logprobs)) == ("length", [], 5)
    assert not engine.has_unfinished_requests


def test_a_prefix_that_is_known_is_not_computed_again():
    model, tokens, seen = tiny(), prompt(4, 12), []
    model.embed.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    engine = Engine(model, num_blocks=40, block_size=4)
    for name in "ab":
        engine.add_request(Request(name, tokens, GREEDY, max_tokens=1))
        [event] = engine.step()
    assert seen == [12, 4] and event.num_cached_tokens == 8
    assert engine.stats()["prefix_queries"] == 24 and engine.stats()["prefix_hits"] == 8
    engine.add_request(Request("c", tokens, GREEDY, max_tokens=1, cache_salt="mine"))
    engine.step()
    engine.reset_prefix_cache()
    engine.add_request(Request("d", tokens, GREEDY, max_tokens=1))
    engine.step()
    assert seen == [12, 4, 12, 12]


def test_an_end_of_text_stops_and_a_stop_string_too():
    model, tokens = tiny(), prompt(5, 5)
    want = alone(model, tokens, 12)
    text = letters(ends={want[6]})
    shown = text.decode(want)
    stop = shown[3:5]
    for more, said, finish in (({}, shown[:want.index(want[6])], "stop"),
                               ({"ignore_eos": True}, shown, "length"),
                               ({"stop": (stop,)}, shown[:shown.index(stop)], "stop")):
        engine = Engine(model, text, num_blocks=10, block_size=4)
        engine.add_request(Request("r", tokens, GREEDY, max_tokens=12, **more))
        events = []
        while engine.has_unfinished_requests:
            events += engine.step()
        assert "".join(event.text for event in events) == said and events[-1].finish_reason == finish
        assert all(event.finish_reason is None for event in events[:-1])


def test_the_pool_is_the_limit_of_one_that_is_alone():
    engine = Engine(tiny(), num_blocks=3, block_size=4)
    engine.add_request(Request("r", prompt(0, 9), GREEDY, max_tokens=20))
    events = []
    while engine.has_unfinished_requests:
        events += engine.step()
    assert events[-1].finish_reason == "length" and sum(len(event.token_ids) for event in events) == 4


@pytest.mark.parametrize("more, says", [
    ({"prompt_token_ids": []}, "no tokens"), ({"prompt_token_ids": [VOCAB]}, "token 97 is not"),
    ({"prompt_token_ids": [-1]}, "token -1"),
    ({"max_tokens": -1}, "at least 0"), ({"max_tokens": 99}, "ask for at most"), ({"n": 0}, "n 0"),
    ({"n": 65}, "give 1 to 64"), ({"sampling_params": SamplingParams(temperature=-1)}, "temperature -1"),
    ({"sampling_params": SamplingParams(top_p=0)}, "top_p 0"), ({"sampling_params": SamplingParams(min_p=2)},
                                                                "min_p 2"),
    ({"sampling_params": SamplingParams(logit_bias={VOCAB: 1.0})}, "logit_bias"), ({"logprobs": 999},
                                                                                   "logprobs 999"),
    ({"sampling_params": SamplingParams(temperature=math.nan)}, "temperature nan")])
def test_what_cannot_be_answered_is_refused(more, says):
    engine = Engine(tiny(), num_blocks=10, block_size=4)
    with pytest.raises(ValueError, match=says):
        engine.add_request(Request(**{"request_id": "r", "prompt_token_ids": [1, 2, 3]} | more))
    assert not engine.has_unfinished_requests


def test_one_id_is_one_request_and_what_waits_is_bounded():
    engine = Engine(tiny(), num_blocks=10, block_size=4, max_queued_requests=2)
    for name in "ab":
        engine.add_request(Request(name, [1, 2]))
    with pytest.raises(QueueFull):
        engine.add_request(Request("c", [1, 2]))
    with pytest.raises(ValueError, match="'a' is here already"):
        engine.add_request(Request("a", [1, 2]))
    for name in "abc":
        engine.abort_request(name)
    assert not engine.has_unfinished_requests and not engine.states_of_request


actions = st.lists(st.one_of(
    st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 9), st.integers(1, 3)),
    st.tuples(st.just("step")), st.tuples(st.just("step")), st.tuples(st.just("abort"), st.integers(0, 9))),
    max_size=14)
MODEL = tiny()


@settings(max_examples=60, deadline=None)
@given(actions, st.integers(6, 16), st.integers(1, 4), st.integers(1, 9))
def test_any_interleaving_says_what_each_says_alone(todo, blocks, size, budget):
    engine = Engine(MODEL, num_blocks=blocks, block_size=size, max_num_batched_tokens=budget)
    asked, said = {}, {}

    def step():
        for event in engine.step():
            said.setdefault((event.request_id, event.index), []).extend(event.token_ids)
    for i, (what, *more) in enumerate(todo):
        if what == "add":
            seed, length, n = more
            try:
                engine.add_request(Request(f"r{i}", tokens := prompt(seed, length), GREEDY, max_tokens=4,
                                           n=n))
                asked[f"r{i}"] = tokens, n
            except ValueError as error:
                assert "KV memory" in str(error)
        elif what == "step":
            step()
        elif engine.states_of_request:
            name = sorted(engine.states_of_request)[more[0] % len(engine.states_of_request)]
            engine.abort_request(name)
            del asked[name]
    while engine.has_unfinished_requests:
        step()
    assert engine.block_pool.num_used_blocks == 0
    for name, (tokens, n) in asked.items():
        want = alone(MODEL, tokens, 4)
        for index in range(n):
            got = said[name, index]
            assert got == want[:len(got)] and (len(got) == 4 or len(tokens) + len(got) > blocks * size)


def test_training_beside_an_engine_is_bitwise_training_alone():
    def train(with_engine):
        torch.manual_seed(0)
        model = tiny()
        sgd, engine = torch.optim.SGD(model.parameters(), lr=0.1), Engine(model, num_blocks=20, block_size=4)
        for step in range(4):
            x = torch.tensor([prompt(step, 12)])
            if with_engine:
                engine.add_request(Request(f"r{step}", prompt(step, 6), SamplingParams(seed=1), max_tokens=4))
                run(engine)
            loss = torch.nn.functional.cross_entropy(model(x)[0, :-1], x[0, 1:])
            loss.backward()
            sgd.step()
            sgd.zero_grad()
            engine.reset_prefix_cache()
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(train(True), train(False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", packed_linear.PACKED_LINEAR_DTYPES)
@torch.no_grad()
def test_packed_weights_make_the_same_logits(family, dtype):
    model, x = tiny(family).to(dtype), torch.tensor([prompt(0, 9), prompt(1, 9)])
    want = model(x)
    packed_linear.pack_linears(model)
    assert model.blocks[0].attn.q.weight is None and model.embed.weight is not None
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_an_engine_of_a_folder_has_the_blocks_that_its_memory_holds(tmp_path):
    save_hf_model(tiny().float(), tmp_path)
    options = EngineOptions(str(tmp_path), block_size=4, kv_memory=20_000)
    engine, c = load_engine(options, Mesh()), config("llama")
    each = 4 * 2 * c.layers * c.kv_heads * c.head_dim * 4
    assert engine.static_info()["blocks"] == 20_000 // each and engine.kv_cache.kv_memory.nbytes <= 20_000
    engine.add_request(Request("r", prompt(0, 5), GREEDY, max_tokens=3))
    assert run(engine)["r", 0] == alone(load_hf_model(tmp_path), prompt(0, 5), 3)
    with pytest.raises(ValueError, match=f"holds 1 blocks of 4 tokens, {each} bytes each on a rank"):
        load_engine(replace(options, kv_memory=each), Mesh())
