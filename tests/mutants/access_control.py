"""Known-wrong ways to let clients in: any Host, any Origin, forms, redirects, no CORS, keys misread.

`asked` sends requests to the app without a server; `found` reads a key from an environment.
"""
from fastapi import FastAPI
from starlette.testclient import TestClient

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.command_line_options import EngineOptions, ServeOptions
from nanoinfra.serve.engine.request_and_output import Request
from nanoinfra.serve.server.fastapi_app import build_app
from nanoinfra.serve.server.http import api_keys as library
from nanoinfra.serve.server.http.access_control import AccessPolicy
from tests.serve.fake import Idle

access, keys = Check("access"), Check("keys")
JSON, OWN, EVIL = {"Content-Type": "application/json"}, "http://localhost:8000", "http://evil.example"
WANTS = {"Access-Control-Request-Method": "POST",
         "Access-Control-Request-Headers": "authorization,content-type"}
RESET = "/reset_prefix_cache"


def asked(requests, **how):
    """[(status, headers) for each of `requests`: (method, path, headers, body)]."""
    client = TestClient(build_app(Idle(), "fake", AccessPolicy(**how)), base_url=OWN)
    got = [client.request(method, path, headers=headers, content=body, follow_redirects=False)
           for method, path, headers, body in requests]
    return [(each.status_code, each.headers) for each in got]


def _expect(subject, requests, status, **how):
    for request, (got, _) in zip(requests, subject(requests, **how)):
        if got != status:
            raise CriterionNotMet(f"{request} of {how} is answered {got}, want {status}")


@access.criterion("on loopback no other name is answered", "property")
def _(subject):
    _expect(subject, [("GET", "/health", {"Host": host}, b"") for host in (
        "evil.example", "localhost.evil.example", "[::2]")], 403)
    _expect(subject, [("GET", "/health", {"Host": host}, b"") for host in ("[::1]:9", "127.1.2.3")], 200)
    _expect(subject, [("GET", "/health", {"Host": "evil.example"}, b"")], 200, loopback_only=False)


@access.criterion("no page of another origin is answered", "property")
def _(subject):
    _expect(subject, [("POST", RESET, {"Origin": origin}, b"") for origin in (
        EVIL, "null", f"{OWN}.evil.example", OWN.replace("http", "https"))], 403)
    _expect(subject, [("POST", RESET, {"Origin": OWN}, b"")], 200)


@access.criterion("a body that a form can send is refused", "property")
def _(subject):
    _expect(subject, [("POST", RESET, headers, body) for headers, body in (
        ({"Content-Type": "text/plain"}, b"{}"), ({"Content-Type": "application/x-www-form-urlencoded"}, b""),
        ({"Content-Type": "text/plain; application/json"}, b"{}"), ({}, b"{}"))], 415)
    _expect(subject, [("POST", RESET, headers, b"") for headers in ({}, JSON)], 200)


@access.criterion("nobody is sent elsewhere", "property")
def _(subject):
    (status, headers), = subject([("GET", "/health/", {"Host": "evil.example"}, b"")], loopback_only=False)
    if status != 404 or "location" in headers:
        raise CriterionNotMet(f"/health/ is answered {status}, Location {headers.get('location')}")


@access.criterion("a site that is named, and no other, passes its preflight", "property")
def _(subject):
    named = "https://app.example"
    for origin, want in ((named, (200, named)), (EVIL, (403, None))):
        preflight = ("OPTIONS", "/v1/completions", {"Origin": origin} | WANTS, b"")
        (status, headers), = subject([preflight], allowed_origins=(named,))
        if (status, headers.get("access-control-allow-origin")) != want:
            raise CriterionNotMet(f"a preflight of {origin} is answered {status}, {dict(headers)}")


@access.criterion("a key is known, with Bearer in any case", "property")
def _(subject):
    for key, status in (("Bearer k", 200), ("bearer  k", 200), ("Bearer q", 401), ("Basic k", 401)):
        _expect(subject, [("POST", RESET, {"Authorization": key}, b"")], status, api_keys=("k", "l"))


def found(variable, salts):
    """(the keys in the environment, what is left there, {(key, a request's own salt): its salt})."""
    environment = {library.API_KEY_VARIABLE: variable}
    got = library.read_api_keys(ServeOptions(EngineOptions("m")), environment)
    made = {(key, own): library.prepend_cache_salt([Request("r", [1], cache_salt=own)],
                                                   library.cache_salt_of_key(key))[0].cache_salt
            for key, own in salts}
    return got, environment, made


@keys.criterion("the environment's key goes no further", "property")
def _(subject):
    got, environment, _ = subject("secret", [])
    if got != ("secret",) or environment:
        raise CriterionNotMet(f"the keys are {got}, and the ranks inherit {list(environment)}")


@keys.criterion("nobody names the salt of another key", "property")
def _(subject):
    pairs = [("a", "bc"), ("ab", "c"), ("a", ""), ("b", ""), ("a", "x"), ("b", "x"),
             ("b", library.cache_salt_of_key("a"))]
    *_, salts = subject("secret", pairs)
    if len(set(salts.values())) < len(pairs):
        raise CriterionNotMet(f"two share a salt: {salts}")


class Redirects(FastAPI):
    def __init__(self, **how):
        super().__init__(**how | {"redirect_slashes": True})


class AllowsNobody:                          # the site's pages may ask, but their browsers never hear so
    def __init__(self, app, **how):
        self.app = app

    async def __call__(self, *asgi):
        await self.app(*asgi)


def bearer_alone(known, header):
    return next((key for key in known if header == f"Bearer {key}"), None)


def any_key(known, header):
    return known[0] if header else None


def replaced(requests, salt):
    return [Request("r", [1], cache_salt=each.cache_salt or salt) for each in requests]


def only_looked_at(options, environment):
    return (environment[library.API_KEY_VARIABLE],)


HOST, ORIGIN, FORM, ELSEWHERE, PREFLIGHT, BEARER = (c.name for c in access.criteria)
NO_FURTHER, SALTS = (c.name for c in keys.criteria)
WHO = "nanoinfra.serve.server.http.access_control"
APP = "nanoinfra.serve.server.fastapi_app"
KEYS = "nanoinfra.serve.server.http.api_keys"
VARIANTS = [
    ("any Host will do", f"{WHO}:is_loopback_host", lambda host: True, HOST),
    ("a Host that begins as it should", f"{WHO}:is_loopback_host",
     lambda host: host.startswith(("localhost", "127.", "[::1]")), HOST),
    ("any Origin will do", f"{WHO}:is_allowed_origin", lambda *_: True, ORIGIN),
    ("an Origin that begins as its own", f"{WHO}:is_allowed_origin",
     lambda origin, scheme, host, named: origin.startswith(f"{scheme}://{host}"), ORIGIN),
    ("any body is JSON", f"{WHO}:has_json_content_type", lambda headers: True, FORM),
    ("JSON anywhere in the kind", f"{WHO}:has_json_content_type",
     lambda headers: "json" in headers.get("content-type", "json"), FORM),
    ("slashes redirect", f"{APP}:FastAPI", Redirects, ELSEWHERE),
    ("no CORS for who is named", f"{APP}:CORSMiddleware", AllowsNobody, PREFLIGHT),
    ("Bearer in one spelling", f"{APP}:find_bearer_key", bearer_alone, BEARER),
    ("any key will do", f"{APP}:find_bearer_key", any_key, BEARER),
]
MUTANTS = [
    *(Mutant(name, access, patched(asked, target, wrong), rejected_by)
      for name, target, wrong, rejected_by in VARIANTS),
    Mutant("the ranks inherit the key", keys, patched(found, f"{KEYS}:read_api_keys", only_looked_at),
           NO_FURTHER),
    Mutant("a key is its own salt", keys, patched(found, f"{KEYS}:cache_salt_of_key", str), SALTS),
    Mutant("a client's salt replaces its key's", keys, patched(found, f"{KEYS}:prepend_cache_salt", replaced),
           SALTS),
]
