"""Access control: local programs, the server's own page, and the origins that --allow-origin names (CORS).

Any web page in a user's browser can send requests to 127.0.0.1. The browser puts the page's origin into
Origin and the server's name into Host. A foreign name that points to 127.0.0.1 (DNS rebinding) makes both
equal, so a server on loopback accepts loopback names only. Bodies must be JSON, because a page can send
forms and text/plain without a CORS preflight. Fetch standard, WHATWG.
"""
import re
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.server.http.unserved_routes import reject_unserved_endpoint


@dataclass(frozen=True)
class AccessPolicy:
    """Who may use a server. By default every program on this machine may."""
    api_keys: tuple[str, ...] = ()           # a client must send one of them; (): no key is needed
    loopback_only: bool = True               # the server listens on a loopback address
    allowed_origins: tuple[str, ...] = ()    # origins of other pages that may send requests; "*": all
    cache_salt_per_key: bool = False         # share cached prefixes only within one API key


class AccessControlMiddleware:
    """ASGI middleware that refuses requests which the policy does not allow, before any other work."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy):
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            try:
                headers = Headers(scope=scope)
                check_host_and_origin(scope["scheme"], headers, self.policy)
                reject_unserved_endpoint(scope["path"])      # first: some of OpenAI's endpoints take forms
                check_json_content_type(scope["method"], headers)
            except APIError as error:
                app = JSONResponse(error.error_body(), error.status_code)
        await app(scope, receive, send)


def check_host_and_origin(scheme: str, headers: Headers, policy: AccessPolicy) -> None:
    """Raise APIError (403) for a request that a foreign web page may have sent."""
    host, origins = headers.get("host", ""), headers.getlist("origin")
    if policy.loopback_only and not is_loopback_host(host):
        raise APIError(403, f"Host: {host[:80]!r} is no name of this machine, and the server listens to this "
                       "machine alone; call it 127.0.0.1 or localhost, or start it with --host 0.0.0.0")
    if not all(is_allowed_origin(origin, scheme, host, policy.allowed_origins) for origin in origins):
        raise APIError(403, f"a page of {origins[0][:80]!r} may not ask this server; start it with "
                       "--allow-origin and that origin to let it")


def check_json_content_type(method: str, headers: Headers) -> None:
    """Raise APIError (415) for a POST body that is not declared as JSON: it would need no preflight."""
    if method == "POST" and not has_json_content_type(headers):
        raise APIError(415, "the body must be JSON and say so; send it with Content-Type: application/json")


def is_loopback_host(host_header: str) -> bool:
    """True if a Host header, with or without a port, names the loopback interface of this machine."""
    found = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+)(:\d*)?", host_header)
    return bool(found) and (found[1].lower().removesuffix(".") == "localhost"
                            or is_loopback_address(found[1].strip("[]").removesuffix(".")))


def is_loopback_address(address: str) -> bool:
    """True for an IP address in 127.0.0.0/8, ::1, or the mapped form ::ffff:127.0.0.1."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def is_allowed_origin(origin: str, scheme: str, host: str, allowed_origins: tuple[str, ...]) -> bool:
    """True for the origin of the server's own page (`scheme`://`host`), and for the `allowed_origins`.

    "null", the origin of files and sandboxed frames, is not allowed.
    """
    if "*" in allowed_origins or origin in allowed_origins:
        return True
    return origin.lower() == f"{scheme}://{host}".lower()


def has_json_content_type(headers: Headers) -> bool:
    """True if all Content-Type headers are application/json, or if there is neither a type nor a body."""
    content_types = headers.getlist("content-type")
    if not content_types:
        return headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    return all(each.partition(";")[0].strip().lower() == "application/json" for each in content_types)
