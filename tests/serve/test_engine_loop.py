"""The engine's loop: what goes wrong with one request is said of that request, and of no other."""
import asyncio
from unittest import mock

import pytest

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine import engine as engines
from nanoinfra.serve.engine.detokenizer import StopStringDetokenizer
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
from nanoinfra.serve.engine.sampler import Sampler, gather_logprobs
from nanoinfra.serve.engine.scheduler import QueueFull
from nanoinfra.serve.processes import engine_loop
from tests.serve.failing import Failing, failing
from tests.serve.fake import Fake
from tests.serve.letters import letters
from tests.serve.test_engine import prompt
from tests.serve.test_engine_client import ids, pids, said, working
from tests.serve.test_isolation import asked, batch, made, serve


class Odd(Exception):
    """What nobody has thought of."""


class DrawFails(Sampler):
    def sample_next_token(self, *given):
        if self.params.seed == 13:
            raise Odd("a draw")
        return super().sample_next_token(*given)


class TextFails(StopStringDetokenizer):
    def push_token(self, token):
        if "boom" in self.stop_strings:
            raise Odd("a text")
        return super().push_token(token)


class LateForkFails(Sampler):
    def __init__(self, how, seed, index=0):
        super().__init__(how, seed, index)
        self.left = 3 if seed == 13 and index == 1 else 1000

    def sample_next_token(self, *given):
        self.left -= 1
        if not self.left:
            raise Odd("a draw of a fork")
        return super().sample_next_token(*given)


def scores_fail(logits, tokens, top):
    if top == 7:
        raise Odd("log-probabilities")
    return gather_logprobs(logits, tokens, top)


@pytest.mark.parametrize("target, broken, more, says", [
    ("Sampler", DrawFails, {"sampling_params": SamplingParams(seed=13)}, "Odd: a draw"),
    ("Sampler", LateForkFails, {"sampling_params": SamplingParams(seed=13), "n": 3}, "Odd: a draw of a fork"),
    ("StopStringDetokenizer", TextFails, {"stop": ("boom",)}, "Odd: a text"),
    ("gather_logprobs", scores_fail, {"logprobs": 7}, "Odd: log-probabilities"),
    ("gather_logprobs", scores_fail, {"logprobs": 7, "prompt_logprobs": True, "n": 2},
     "Odd: log-probabilities")])
def test_an_exception_with_one_request_ends_it_alone(target, broken, more, says, capsys):
    """Its blocks are given back and the books are right; the others never know. It is on stderr."""
    want, _ = serve(made("torch"), batch())
    engine = made("torch", max_num_batched_tokens=9)
    engine.tokenizer = letters()
    with mock.patch.object(engines, target, broken):
        said, failed = serve(engine, [*batch(3), asked("bad", prompt(7, 9), **more), *batch()[3:]])
    assert {name: tokens for name, tokens in said.items() if name[0] != "bad"} == want
    assert list(failed) == ["bad"] and says in failed["bad"] and says in capsys.readouterr().err


def test_an_exception_in_the_models_pass_is_everybodys():
    engine = made("torch")
    engine.add_request(batch()[0])
    engine.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()


def test_what_is_refused_or_fails_on_its_way_in_leaves_nothing():
    engine = made("torch", max_queued_requests=1)
    engine.add_request(batch()[0])
    huge = SamplingParams(seed=10 ** 5000)
    for bad, error in ((batch()[1], QueueFull), (asked("x", [1], sampling_params=huge), ValueError),
                       (asked("x", [1, None]), TypeError), (Request("x", [1], None), AttributeError)):
        with pytest.raises(error):
            engine.add_request(bad)
        assert len(engine.scheduler.waiting) == len(engine.states) == len(engine.states_of_request) == 1
    assert list(serve(engine, [])[0]) == [("r0", 0)]


def test_a_turn_tells_who_failed_from_who_is_answered():
    engine = Failing()
    for name in ("good", "bad"):
        engine.add_request(Request(name, ids(name), max_tokens=3))
    commands = [[("add", Request("odd", ids("odd")))], [], []]
    steps = [engine_loop.execute_commands_and_step(engine, each) for each in commands]
    assert steps[0].refused_requests == [("odd", 500,
                                          "the engine failed on this request: RuntimeError: it is odd")]
    assert steps[2].refused_requests == [("bad", 500, "it is bad")]
    assert [(each.request_id, each.finish_reason) for each in steps[2].outputs] == [("good", "length")]


def test_a_request_that_fails_has_a_status_and_the_engine_lives_on():
    async def run():
        async with working(failing, 2) as worker:
            before = pids(worker)
            jobs = [worker.submit_requests([Request(name, ids(name), max_tokens=9)])
                    for name in ("good", "bad", "odd")]
            for job, why in ((jobs[1], "it is bad"), (jobs[2], "RuntimeError: it is odd")):
                with pytest.raises(APIError, match=why) as refused:
                    await said(job)
                assert refused.value.status_code == 500
            assert await said(jobs[0]) == {("good", 0): "goodgoodg"}
            assert pids(worker) == before and not worker.stats["blocks_used"]
    asyncio.run(run())


class Parted:
    """Rank 1 of a team whose rank 0 has lost another request than this one in the last turn."""
    rank = 1

    def broadcast_object(self, value=None):
        return [], [("x", 500)]


def test_ranks_that_part_do_not_go_on():
    with pytest.raises(RuntimeError, match="rank 1 has ended .*, rank 0 .*'x', 500.* they have parted"):
        engine_loop.run_busy_loop(Fake(), Parted(), None)


def test_books_that_are_wrong_end_the_rank():
    """An abort that raises is nobody's request; what it leaves is unknown."""
    engine = Fake()
    engine.add_request(Request("a", ids("a")))
    engine.scheduler.waiting.clear()
    with pytest.raises(ValueError):
        engine_loop.execute_commands_and_step(engine, [("abort", "a")])
