"""The server as its clients meet it: openai's package unmodified, what load generators send, each error."""
import json
from pathlib import Path

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoinfra.serve.server.limits import MOST_BYTES
from tests.serve.host import metric, serving
from tests.serve.test_protocol import BODIES

JSON = {"Content-Type": "application/json"}
RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))


@pytest.fixture(scope="module")
def served():
    with serving() as (client, server):
        yield client, server


@pytest.fixture
def client(served):
    return served[0]


@pytest.fixture
def ai(client):
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0) as ai:
        yield ai


ANY = st.binary(max_size=40) | BODIES.map(lambda body: json.dumps(body).encode())


def hello(**more):
    return {"model": "fake", "prompt": "hello ", "max_tokens": 9, **more}


def test_openai_lists_the_model(ai):
    first, = ai.models.list().data
    assert (first.id, first.object, first.max_model_len) == ("fake", "model", 512)
    assert ai.models.retrieve("fake") == first
    with pytest.raises(openai.NotFoundError, match="there is 'fake'") as other:
        ai.models.retrieve("gpt/4")
    assert other.value.code == "model_not_found" and other.value.param == "model"


def test_openai_chats(ai):
    got = ai.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}], n=2,
                                     max_completion_tokens=4, seed=1, logprobs=True, top_logprobs=2)
    assert [(each.index, each.message.content, each.finish_reason) for each in got.choices] == [
        (0, "u:hi", "length"), (1, "u:hi", "length")]
    assert got.choices[0].message.role == "assistant"
    assert [each.token for each in got.choices[1].logprobs.content] == list("u:hi")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (5, 8)


def test_openai_streams_a_chat(ai):
    stream = ai.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi é"}],
                                        max_tokens=6, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content
    assert "".join(each.choices[0].delta.content for each in chunks) == "u:hi \ufffd"   # half a character
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == 6


def test_openai_completes(ai):
    got = ai.completions.create(**hello(prompt=["ab", "xyz"], echo=True, logprobs=1))
    assert [each.text for each in got.choices] == ["ab" + "ababababa", "xyz" + "xyzxyzxyz"]
    assert got.choices[0].logprobs.token_logprobs[0] is None
    assert len(got.choices[0].logprobs.tokens) == 11


def test_openai_streams_a_completion(ai):
    stream = ai.completions.create(**hello(n=2, stop=["lo h"]), stream=True)
    texts, ends = {}, {}
    for chunk in stream:
        choice, = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        ends[choice.index] = choice.finish_reason
    assert texts == {0: "hel", 1: "hel"} and ends == {0: "stop", 1: "stop"}


def test_the_model_may_end_by_itself(client):
    got = client.post("/v1/completions", json=hello(prompt="ab<end>")).json()["choices"][0]
    assert (got["text"], got["finish_reason"]) == ("ab", "stop")
    got = client.post("/v1/completions", json=hello(prompt="ab<end>", ignore_eos=True)).json()["choices"][0]
    assert (got["text"], got["finish_reason"]) == ("ababab", "length")


def test_a_prompt_alone_may_be_read(client):
    got = client.post("/v1/completions", json=hello(max_tokens=0)).json()
    assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("", "length")
    assert (got["usage"]["prompt_tokens"], got["usage"]["completion_tokens"]) == (6, 0)
    with client.stream("POST", "/v1/completions", json=hello(max_tokens=0, stream=True)) as response:
        first, done = [line for line in response.iter_lines() if line]
    assert json.loads(first[6:])["choices"][0]["finish_reason"] == "length" and done == "data: [DONE]"


def test_a_stop_string_that_is_a_special_token_stops(client):
    for more in ({"stop": "<end>"}, {"stop": ["x", "<end>"]}, {"stop_token_ids": [256]}):
        body = hello(prompt="ab<end>", ignore_eos=True, **more)
        got = client.post("/v1/completions", json=body).json()
        assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("ab", "stop")
        assert got["usage"]["completion_tokens"] == 3


def test_head_is_get_without_a_body(client):
    for path in ("/", "/health", "/metrics", "/v1/models", "/v1/models/fake", "/stats"):
        head = client.head(path)
        assert head.status_code == 200 and not head.content, path
        if path not in ("/stats", "/metrics"):               # which has no end; which changes
            assert head.headers["content-length"] == client.get(path).headers["content-length"]


def test_a_prefix_that_was_known_is_told(client):
    body = hello(prompt="a prompt that was never sent before", cache_salt="mine")

    def known():
        usage = client.post("/v1/completions", json=body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]
    assert [known(), known()] == [0, 32]
    assert client.post("/reset_prefix_cache").status_code == 200
    assert known() == 0


def replay(client, name):
    """(the recorded request, the objects that come back, each with the time it came)."""
    recorded = json.loads((Path(__file__).parent / "recorded" / f"{name}.json").read_text())
    with client.stream("POST", recorded["path"], json=recorded["body"]) as response:
        assert response.status_code == 200, response.read()
        if not recorded["body"].get("stream"):
            return recorded["body"], [json.loads(response.read())]
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return recorded["body"], [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("name", [path.stem for path in RECORDED if "bench" in path.stem])
def test_vllm_bench_reads_its_answer(client, name):
    """It takes a chunk with choices for a token's time, and usage from chunks without choices alone."""
    body, chunks = replay(client, name)
    times = [each for each in chunks if each.get("choices")]
    usage = [each["usage"] for each in chunks if not each.get("choices")]
    said = [each["choices"][0].get("text") or each["choices"][0]["delta"].get("content") for each in times]
    assert all(said) and len(said) == 12 == usage[-1]["completion_tokens"]
    assert "".join(said) in ("one two thre", "u:one two th")


@pytest.mark.parametrize("name", [path.stem for path in RECORDED if "guidellm" in path.stem])
def test_guidellm_reads_its_answer(client, name):
    """It wants usage in every chunk, and takes the last."""
    _, chunks = replay(client, name)
    counts = [each["usage"]["completion_tokens"] for each in chunks]
    assert counts == sorted(counts) and counts[-1] == 12 and chunks[-1]["usage"]["prompt_tokens"] > 0
    assert {each["id"] for each in chunks} == {chunks[0]["id"]}


def test_lm_eval_reads_log_likelihoods(client):
    """It sums the log-probabilities of the prompt's end, without that of the token it had to ask for."""
    body, (got,) = replay(client, "lm_eval_loglikelihood")
    for prompt, choice in zip(body["prompt"], sorted(got["choices"], key=lambda each: each["index"])):
        said = choice["logprobs"]
        assert len(said["token_logprobs"]) == len(prompt) + 1 and said["token_logprobs"][0] is None
        likelihood = said["token_logprobs"][2:-1]
        assert sum(likelihood) == -0.25 * (len(prompt) - 2)
        assert all(got == max(top.values()) for got, top in zip(likelihood, said["top_logprobs"][2:-1]))


def test_lm_eval_reads_what_was_generated(client):
    _, (got,) = replay(client, "lm_eval_generate")
    assert [each["text"] for each in got["choices"]] == ["one two", "four fivefour fivefour f"]
    _, (got,) = replay(client, "lm_eval_chat")
    assert got["choices"][0]["message"]["content"] == "u:one "


ERRORS = {
    "no JSON": (400, {"content": b"{"}, "Invalid JSON"),
    "no UTF-8": (400, {"content": b"\xff\xfe"}, "Invalid JSON"),
    "nothing": (400, {"content": b""}, "Invalid JSON"),
    "a wrong value": (400, {"json": hello(n="many")}, "n:"),
    "a value that cannot be": (400, {"json": hello(temperature=-1)}, "temperature"),
    "more than the context": (400, {"json": hello(max_tokens=4096)}, "context of 512"),
    "more than the engine's seats": (400, {"json": hello(n=65)}, "64"),
    "an unknown model": (404, {"json": hello(model="gpt-4")}, "'fake'"),
    "a body too large": (413, {"content": b" " * (MOST_BYTES + 1)}, "larger than")}


@pytest.mark.parametrize("status, sent, says", ERRORS.values(), ids=ERRORS.keys())
def test_an_error_has_a_status_and_a_reason(client, status, sent, says):
    got = client.post("/v1/completions", headers=JSON, **sent)
    assert got.status_code == status
    assert got.json()["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(got.json()["error"]["code"], str | None)           # clients compare it with words
    assert says in got.json()["error"]["message"]


def test_other_paths_and_methods_have_openais_errors(client):
    for got, status in ((client.get("/v1/nothing"), 404), (client.get("/v1/completions"), 405)):
        assert got.status_code == status and got.json()["error"]["message"]


def test_openai_raises_its_own_errors(ai):
    with pytest.raises(openai.NotFoundError):
        ai.completions.create(**hello(model="gpt-4"))
    with pytest.raises(openai.BadRequestError, match="is not supported"):
        ai.chat.completions.create(model="fake", messages=[], response_format={"type": "json_object"})


@given(ANY, st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_a_client_sends_is_a_500(client, body, path):
    assert client.post(path, content=body, headers=JSON).status_code in (200, 400, 404)


@pytest.mark.prove
@given(ANY, st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_many_clients_send_is_a_500(client, body, path):
    assert client.post(path, content=body, headers=JSON).status_code in (200, 400, 404)


def test_metrics_have_vllms_names(client):
    client.post("/v1/completions", json=hello(n=2))
    names = {line.split("{")[0] for line in client.get("/metrics").text.splitlines() if line[0] != "#"}
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
            "vllm:cache_config_info", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
            "vllm:request_success_total", "vllm:num_preemptions_total", "vllm:prefix_cache_queries_total",
            "vllm:prefix_cache_hits_total", *(f"vllm:{name}_bucket" for name in (
                "time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
                "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
                "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
                "request_generation_tokens", "request_max_num_generation_tokens", "request_params_n",
                "request_params_max_tokens", "iteration_tokens_total"))} <= names


def test_metrics_count_what_was_done(client):
    before = metric(client, "generation_tokens_total"), metric(client, "request_params_n_sum")
    unsaid = (metric(client, "e2e_request_latency_seconds_count")        # of prompts that were read alone
              - metric(client, "time_to_first_token_seconds_count"))
    client.post("/v1/completions", json=hello(n=3))
    assert metric(client, "generation_tokens_total") - before[0] == 27
    assert metric(client, "request_params_n_sum") - before[1] == 3
    assert metric(client, "num_requests_running") == 0
    ended = metric(client, "e2e_request_latency_seconds_count")
    assert metric(client, "time_to_first_token_seconds_count") == ended - unsaid


def test_the_scheduler_is_shown_live(client):
    with client.stream("GET", "/stats") as response:
        line = next(line for line in response.iter_lines() if line)
    said = json.loads(line.removeprefix("data: "))
    assert said["model"] == "fake" and said["state"] == "ready"


def test_a_key_is_asked_for():
    with serving(key="sésame") as (client, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sésame".encode()}):
            got = client.post("/v1/completions", json=hello(), headers=headers)
            assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models").status_code == 401
        key = {"Authorization": "Bearer sésame".encode()}
        assert client.post("/v1/completions", json=hello(), headers=key).status_code == 200
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
