"""Who may ask: what a web page of somebody else's sends is refused before any work, all else is served."""
import socket

import httpx
import pytest
from starlette.testclient import TestClient

from nanoinfra.serve.server.fastapi_app import build_app
from nanoinfra.serve.server.http.access_control import AccessPolicy, is_loopback_host
from tests.serve.host import metric, serving

PATHS = {"/": "GET", "/health": "GET", "/metrics": "GET", "/stats": "GET", "/v1/models": "GET",
         "/v1/completions": "POST", "/v1/chat/completions": "POST", "/reset_prefix_cache": "POST"}
APP, JSON = "https://app.example", {"Content-Type": "application/json"}


class Untouched:
    """A worker that nobody may ask, except for a reset, which it counts."""
    state, state_reason, engine_ready, stats, streams, resets = "ready", "", None, {}, {}, 0

    def reset_prefix_cache(self):
        self.resets += 1

    def submit_requests(self, requests):
        raise AssertionError("the engine is asked")


def app(**how):
    """(client, worker) of an app without a server or an engine."""
    worker = Untouched()
    return TestClient(build_app(worker, "fake", AccessPolicy(**how)),
                      base_url="http://localhost:8000"), worker


@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.0.0.1:8000", "127.8.9.1:1", "localhost", "LocalHost.:8000", "127.0.0.1.:80", "[::1]",
    "[::1]:8000", "[0:0::1]:8000", "[::ffff:127.0.0.1]:8000", "localhost:"])
def test_these_hosts_name_this_machine(host):
    assert is_loopback_host(host)


@pytest.mark.parametrize("host", [
    "", "evil.example", "evil.example:8000", "localhost.evil.example", "evil.localhost.example", ":8000",
    "127.0.0.1.nip.io", "127.0.0.1@evil.example", "evil.example#localhost", "localhost:8000:evil", "[::1",
    "[::2]", "::1", "[localhost", "[]", "0.0.0.0:8000", "192.168.0.1", "[::ffff:192.168.0.1]", "\xff",
    "localhost evil", "localhost, evil.example"])
def test_these_do_not(host):
    assert not is_loopback_host(host)


@pytest.fixture(scope="module")
def served():
    with serving() as (client, _):
        yield client


@pytest.mark.parametrize("origin", ["none", "its own"])
def test_a_name_that_was_rebound_to_this_machine_reaches_nothing(served, origin):
    """To its browser the page is of the same origin as the server: Host is all that tells."""
    host = f"evil.example:{served.base_url.port}"
    headers = {"Host": host, **JSON, **({} if origin == "none" else {"Origin": f"http://{host}"})}
    for path, method in PATHS.items():
        got = served.request(method, path, headers=headers, content=b'{"prompt": "ab"}')
        assert got.status_code == 403 and "evil.example" in got.json()["error"]["message"], path
    assert metric(served, "prompt_tokens_total") == 0


@pytest.mark.parametrize("origin", [
    "http://evil.example", "null", "http://localhost:3000", "https://{host}", "http://{host}.evil.example",
    "http://{host} http://evil.example", "http://evil.example/{host}", "", "file://"])
def test_the_page_of_another_origin_gets_nothing(served, origin):
    headers = {"Origin": origin.format(host=served.base_url.netloc.decode()), **JSON}
    for path, method in PATHS.items():
        assert served.request(method, path, headers=headers).status_code == 403, path
        preflight = headers | {"Access-Control-Request-Method": method}
        got = served.options(path, headers=preflight)
        assert got.status_code == 403 and "access-control-allow-origin" not in got.headers
    two = [("Origin", str(served.base_url)), ("Origin", "http://evil.example")]
    assert served.get("/health", headers=two).status_code == 403


def test_its_own_page_may_ask(served):
    own = {"Origin": f"http://{served.base_url.netloc.decode()}"}
    assert served.post("/v1/completions", json={"prompt": "ab"}, headers=own).status_code == 200
    assert served.post("/reset_prefix_cache", headers=own).status_code == 200


FORMS = ["text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "",
         "application/jsonx", "multipart/form-data; boundary=x", "text/plain; application/json",
         "text/plain, application/json", "application/json-patch+json"]


@pytest.mark.parametrize("kind", FORMS)
def test_what_a_form_can_send_is_no_request(kind):
    client, worker = app()
    for path in ("/v1/completions", "/v1/chat/completions", "/reset_prefix_cache"):
        for content in (b'{"prompt": "ab"}', b""):
            got = client.post(path, content=content, headers={"Content-Type": kind})
            assert got.status_code == 415 and "application/json" in got.json()["error"]["message"]
    assert not worker.resets


def test_json_says_so_in_several_ways_and_nothing_needs_no_kind():
    client, worker = app()
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON ;charset=utf8"):
        got = client.post("/reset_prefix_cache", content=b"{}", headers={"Content-Type": kind})
        assert got.status_code == 200
    assert client.post("/reset_prefix_cache").status_code == 200 and worker.resets == 4
    assert client.post("/reset_prefix_cache", content=b"{}").status_code == 415
    assert client.post("/reset_prefix_cache", content=iter([b"{}"])).status_code == 415


def test_curls_post_without_a_body_resets(served):
    with socket.create_connection((served.base_url.host, served.base_url.port)) as curl:
        curl.sendall(b"POST /reset_prefix_cache HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n")
        assert curl.makefile("rb").readline().startswith(b"HTTP/1.1 200 ")


def test_no_answer_sends_a_client_elsewhere():
    for client, _ in (app(), app(loopback_only=False)):
        for path in ("/v1/models/", "/v1/completions/", "//evil.example", "/stats/", "/health?/"):
            got = client.get(path, headers={"Host": "localhost"}, follow_redirects=False)
            assert got.status_code in (200, 404) and "location" not in got.headers


def test_other_methods_are_refused_in_json():
    client, _ = app()
    for method in ("OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"):
        for path, right in PATHS.items():
            got = client.request(method, path)
            options = method == "OPTIONS"                    # which are told, to a page too, but not allowed
            right = "GET, HEAD" if right == "GET" else right
            assert got.status_code == (204 if options else 405), (method, path)
            assert got.headers["allow"] == right + ", OPTIONS" * options
            assert "access-control-allow-origin" not in got.headers
    got = client.head("/v1/completions")
    assert got.status_code == 405 and got.headers["allow"] == "POST"


def test_a_site_that_is_named_may_ask_with_preflight():
    client, worker = app(allowed_origins=(APP,), api_keys=("k",))
    asks = {"Origin": APP, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    got = client.options("/v1/completions", headers=asks)
    allowed = got.headers["access-control-allow-headers"].lower()
    assert got.status_code == 200 and got.headers["access-control-allow-origin"] == APP
    assert "authorization" in allowed and "content-type" in allowed and "Origin" in got.headers["vary"]
    assert "POST" in got.headers["access-control-allow-methods"]
    key = {"Origin": APP, "Authorization": "Bearer k"}
    for headers, status in ((key, 200), ({"Origin": APP}, 401)):         # it can read a refusal too
        got = client.post("/reset_prefix_cache", headers=headers)
        assert (got.status_code, got.headers["access-control-allow-origin"]) == (status, APP)
        assert "Origin" in got.headers["vary"]
        assert "access-control-allow-credentials" not in got.headers
    for other in ("http://app.example", "https://app.example:444", f"{APP}.evil.example", "null"):
        assert client.options("/v1/completions", headers=asks | {"Origin": other}).status_code == 403
        assert client.post("/reset_prefix_cache", headers=key | {"Origin": other}).status_code == 403
    assert client.get("/health", headers={"Origin": APP, "Host": "evil.example"}).status_code == 403
    assert worker.resets == 1


def test_all_sites_may_ask_where_that_is_said():
    client, _ = app(allowed_origins=("*",))
    for origin in (APP, "null"):
        got = client.get("/health", headers={"Origin": origin})
        assert got.status_code == 200 and got.headers["access-control-allow-origin"] == "*"
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("host", ["gpu7.example:8000", "[", "[::1", "a b", "", "//x", "\xff"])
def test_a_server_for_all_is_called_anything(host):
    client, _ = app(loopback_only=False)
    headers = {"Host": host.encode("latin-1")}
    assert client.get("/health", headers=headers).status_code == 200
    assert client.get("/nothing", headers=headers).status_code == 404    # not 500, for a Host that is none
    assert client.get("/v1/models/", headers=headers).status_code == 404
    assert client.get("/health", headers=headers | {"Origin": APP}).status_code == 403


def test_the_page_is_in_no_frame(served):
    assert "frame-ancestors 'none'" in served.get("/").headers["content-security-policy"]


def test_http_1_0_says_who_it_means(served):
    with socket.create_connection((served.base_url.host, served.base_url.port)) as old:
        old.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert old.makefile("rb").readline().startswith(b"HTTP/1.1 403 ")
    assert httpx.get(f"http://localhost:{served.base_url.port}/health", trust_env=False).status_code == 200
