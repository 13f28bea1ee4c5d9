"""Paths that are not served: what of OpenAI's API this server has not, and what a mistyped base URL asks for.

A client that is told so can be set right; "Not Found" alone looks like a server that is broken.
"""
from collections.abc import Sequence

from nanoinfra.serve.server.errors import Refused

UNSERVED = {                                 # behind /v1/, OpenAI's and vLLM's: what they are about
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


def check_path(path: str) -> None:
    """Raise Refused for what others serve at `path`, and this server never does."""
    about = UNSERVED.get(path.removeprefix("/v1/").partition("/")[0]) if path.startswith("/v1/") else None
    if about:
        raise Refused(404, f"{path} is not served: this server writes text, and has no {about}",
                      code="unsupported_endpoint")


def where_else(path: str, served: Sequence[str]) -> str:
    """What to say of a `path` that is none of those `served`: which of them may be meant."""
    bare = "/".join(part for part in path.split("/") if part not in ("", "v1"))
    if meant := [each for each in served if bare and each in (f"/v1/{bare}", f"/{bare}")]:
        return f"it is {meant[0]} that is served; the base URL of OpenAI's clients ends in /v1"
    return f"there are {', '.join(served)}"
