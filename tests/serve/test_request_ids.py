"""x-request-id: in every answer, whoever refuses, and in the log where the server is at fault."""
import pytest
from starlette.testclient import TestClient

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.server.fastapi_app import build_app
from nanoinfra.serve.server.http.request_ids import get_or_create_request_id
from tests.serve.fake import Idle

JSON = {"Content-Type": "application/json"}
ANSWERS = {"an answer": ("GET", "/health", {}, 200), "no such path": ("GET", "/nothing", {}, 404),
           "no such method": ("PUT", "/health", {}, 405),
           "another's page": ("GET", "/", {"Origin": "x"}, 403),
           "no JSON": ("POST", "/v1/completions", {"Content-Type": "text/plain"}, 415),
           "a wrong body": ("POST", "/v1/completions", JSON, 400),
           "not served here": ("GET", "/v1/files", {}, 404), "which methods": ("OPTIONS", "/health", {}, 204)}


class Broken(Idle):
    state_reason = "no"

    def reset_prefix_cache(self):
        raise APIError(500, "the engine failed") if self.state_reason == "told" else RuntimeError("of ours")


def client(worker):
    return TestClient(build_app(worker, "fake"), base_url="http://localhost:8000",
                      raise_server_exceptions=False)


@pytest.mark.parametrize("method, path, headers, status", ANSWERS.values(), ids=ANSWERS.keys())
def test_every_answer_has_the_clients_name_for_it_or_a_new_one(method, path, headers, status):
    http, content = client(Idle()), b"{" if method == "POST" else None
    got = http.request(method, path, headers=headers | {"X-Request-Id": "mine-7"}, content=content)
    assert (got.status_code, got.headers.get_list("x-request-id")) == (status, ["mine-7"])
    new = {http.request(method, path, headers=headers, content=content).headers["x-request-id"] for _ in "ab"}
    assert len(new) == 2 and all(len(each) == 32 for each in new)


@pytest.mark.parametrize("why", ["told", "no"])
def test_what_is_the_servers_fault_is_in_the_log_under_its_name(why, caplog):
    worker = Broken()
    worker.state_reason = why
    got = client(worker).post("/reset_prefix_cache", headers={"X-Request-Id": "mine-7"})
    assert got.status_code == 500 and got.headers["x-request-id"] == "mine-7"
    assert "POST /reset_prefix_cache: 500" in caplog.text and "x-request-id mine-7" in caplog.text


@pytest.mark.parametrize("odd", [b"", b"a b", b"a" * 129, b"\xe9", b"a\x00", b"a\r\nx: y"])
def test_a_name_that_is_none_is_replaced(odd):
    assert len(get_or_create_request_id([(b"x-request-id", odd)])) == 32
    assert get_or_create_request_id([(b"host", b"h"), (b"x-request-id", b"a" * 128)]) == "a" * 128
