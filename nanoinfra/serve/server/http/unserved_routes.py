"""Paths that are not served: other endpoints of OpenAI's API, and paths of a mistyped base URL.

The error names the right path or the missing feature. "Not Found" alone would look like a broken server.
"""
from collections.abc import Sequence

from nanoinfra.serve.api_errors import APIError

UNSERVED_ENDPOINTS = {                       # endpoints of OpenAI and vLLM below /v1/: what they do
    "embeddings": "embeddings", "audio": "speech", "images": "pictures", "videos": "videos",
    "moderations": "moderation", "files": "files", "uploads": "files", "batches": "batches",
    "fine_tuning": "fine-tuning", "fine-tunes": "fine-tuning", "assistants": "assistants",
    "threads": "assistants", "vector_stores": "vector stores", "conversations": "stored conversations",
    "containers": "containers", "evals": "evaluations", "realtime": "speech", "live": "speech",
    "organization": "accounts", "projects": "accounts", "admin": "accounts", "skills": "skills",
    "chatkit": "ChatKit", "beta": "betas", "engines": "engines, which are called models now",
    "edits": "edits", "rerank": "ranking", "score": "ranking", "pooling": "embeddings",
    "classify": "classification", "agents": "agents", "vaults": "vaults", "safety": "moderation",
    "webhook_endpoints": "webhooks", "webhook_event_types": "webhooks", "decisions": "moderation",
    "content_provenance_checks": "checks of pictures"}


def reject_unserved_endpoint(path: str) -> None:
    """Raise APIError (404) for an endpoint of OpenAI or vLLM that this server does not have."""
    if not path.startswith("/v1/"):
        return
    if feature := UNSERVED_ENDPOINTS.get(path.removeprefix("/v1/").partition("/")[0]):
        raise APIError(404, f"{path} is not served: this server writes text, and has no {feature}",
                       code="unsupported_endpoint")


def suggest_served_path(path: str, served_paths: Sequence[str]) -> str:
    """A message for a `path` that is not served: the served path that was probably meant, or all of them."""
    bare = "/".join(part for part in path.split("/") if part not in ("", "v1"))
    if similar := [served for served in served_paths if bare and served in (f"/v1/{bare}", f"/{bare}")]:
        return f"it is {similar[0]} that is served; the base URL of OpenAI's clients ends in /v1"
    return f"there are {', '.join(served_paths)}"
