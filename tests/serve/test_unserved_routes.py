"""Paths that are not served say so, with what is."""
import re
from pathlib import Path

import openai
import pytest
from starlette.testclient import TestClient

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.server.fastapi_app import build_app
from nanoinfra.serve.server.http.unserved_routes import (
    UNSERVED_ENDPOINTS,
    reject_unserved_endpoint,
    suggest_served_path,
)
from tests.serve.fake import Idle

SERVED = {"models", "completions", "chat", "responses"}
CALLED = re.compile(r'"/([a-z_]+)["/]')


@pytest.fixture(scope="module")
def client():
    return TestClient(build_app(Idle(), "org/name"), base_url="http://localhost:8000")


def test_every_path_that_openais_package_calls_is_served_or_named():
    files = (Path(openai.__file__).parent / "resources").rglob("*.py")
    called = {root for file in files for root in CALLED.findall(file.read_text(encoding="utf-8"))}
    assert len(called) > 20 and called - SERVED <= UNSERVED_ENDPOINTS.keys()


@pytest.mark.parametrize("method, path, how", [
    ("POST", "/v1/embeddings", {"json": {"input": "a"}}), ("GET", "/v1/files", {}),
    ("POST", "/v1/audio/transcriptions", {"files": {"file": b"a"}}), ("DELETE", "/v1/files/a", {}),
    ("POST", "/v1/engines/davinci/completions", {"json": {"prompt": "a"}})])
def test_what_others_serve_is_refused_with_the_reason(client, method, path, how):
    """404, which clients do not try again as they do a 501; files come as forms, not as JSON."""
    got = client.request(method, path, **how)
    assert got.status_code == 404 and got.json()["error"]["code"] == "unsupported_endpoint"
    assert f"{path} is not served: this server writes text" in got.json()["error"]["message"]


def test_a_base_url_that_is_nearly_right_is_told(client):
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completions/"):
        error = client.post(path, json={}).json()["error"]
        assert "/v1/chat/completions that is served" in error["message"], path
    for path in ("/v1/embedding", "/v2/models", "/v1", "/"):
        with_all = suggest_served_path(path, ["/health", "/v1/models"])
        assert with_all == "there are /health, /v1/models"
        reject_unserved_endpoint(path)
    with pytest.raises(APIError, match="no embeddings"):
        reject_unserved_endpoint("/v1/embeddings/")


def test_a_models_name_may_have_slashes(client):
    for path in ("/v1/models/org/name", "/v1/models/org%2Fname"):
        assert client.get(path).json()["id"] == "org/name"
    for path in ("/v1/models/name", "/v1/models/org", "/v1/models/org/name/"):
        assert client.get(path).json()["error"]["code"] == "model_not_found"
