"""Who may ask: programs on this machine, the server's own page, and the pages that --allow-origin names.

Any web page that a user opens can send requests to 127.0.0.1. Its browser says in Origin whose page asks, and
in Host under which name; a name of the page's own that was pointed at 127.0.0.1 (DNS rebinding) makes the two
agree, so a server that this machine alone reaches answers to loopback names alone. What a page may send
without a preflight (forms, text/plain) is no JSON. Fetch standard, WHATWG.
"""
import re
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.http.unserved_routes import check_path


@dataclass(frozen=True)
class Access:
    """Who may use a server; by default whoever runs a program on this machine."""
    keys: tuple[str, ...] = ()               # a client must send one of them; none: no key is asked for
    loopback: bool = True                    # it listens to this machine alone
    origins: tuple[str, ...] = ()            # whose pages may ask, beside its own; "*": everybody's
    salt_per_key: bool = False               # cached prefixes are shared under the same key alone


class AccessMiddleware:
    """Refuses, before any work, what none of those who may ask would send."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            try:
                headers = Headers(scope=scope)
                check_sender(scope["scheme"], headers, self.access)
                check_path(scope["path"])    # some of OpenAI's take forms
                check_body(scope["method"], headers)
            except Refused as why:
                app = JSONResponse(why.body(), why.status)
        await app(scope, receive, send)


def check_sender(scheme: str, headers: Headers, access: Access) -> None:
    """Raise Refused for a request that a web page of somebody else's may have sent."""
    host, origins = headers.get("host", ""), headers.getlist("origin")
    if access.loopback and not is_loopback(host):
        raise Refused(403, f"Host: {host[:80]!r} is no name of this machine, and the server listens to this "
                      "machine alone; call it 127.0.0.1 or localhost, or start it with --host 0.0.0.0")
    if not all(is_allowed(origin, scheme, host, access.origins) for origin in origins):
        raise Refused(403, f"a page of {origins[0][:80]!r} may not ask this server; start it with "
                      "--allow-origin and that origin to let it")


def check_body(method: str, headers: Headers) -> None:
    """Raise Refused for what a page may send without a preflight."""
    if method == "POST" and not is_json(headers):
        raise Refused(415, "the body must be JSON and say so; send it with Content-Type: application/json")


def is_loopback(host: str) -> bool:
    """Does a Host header, with or without a port, name this machine and nothing else?"""
    found = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+)(:\d*)?", host)
    return bool(found) and (found[1].lower().removesuffix(".") == "localhost"
                            or is_loopback_address(found[1].strip("[]").removesuffix(".")))


def is_loopback_address(text: str) -> bool:
    """127.0.0.0/8 or ::1, also as ::ffff:127.0.0.1."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_allowed(origin: str, scheme: str, host: str, named: tuple[str, ...]) -> bool:
    """Is it the origin of the server's own page, as the browser that asks knows it, or one that is named?

    "null", a page without an origin (a file, a sandboxed frame), is nobody's.
    """
    return "*" in named or origin in named or origin.lower() == f"{scheme}://{host}".lower()


def is_json(headers: Headers) -> bool:
    """Does it say that it brings JSON, or bring nothing and say nothing?"""
    kinds = headers.getlist("content-type")
    if not kinds:
        return headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    return all(kind.partition(";")[0].strip().lower() == "application/json" for kind in kinds)
