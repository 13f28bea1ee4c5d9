"""API keys: read them, find the one that a client has sent, and make a cache salt of it.

Other users can read the command line of a process (ps), and child processes inherit its environment. So a
key is best read from a file, and NANOINFRA_API_KEY is removed before the engine's processes start.
"""
import hmac
import os
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from nanoinfra.serve.command_line_options import ServeOptions
from nanoinfra.serve.engine.request_and_output import Request

API_KEY_VARIABLE = "NANOINFRA_API_KEY"


def read_api_keys(options: ServeOptions,
                  environment: MutableMapping[str, str] = os.environ) -> tuple[str, ...]:
    """The API keys of the server; () if none is needed. A client must send one of them.

    Removes NANOINFRA_API_KEY from `environment`, and warns on stderr about keys that others can read.
    Raises ValueError for two sources, and for a key that no client could send.
    """
    values = {"--api-key": options.api_key, "--api-key-file": options.api_key_file,
              API_KEY_VARIABLE: environment.pop(API_KEY_VARIABLE, None)}
    sources = [name for name, value in values.items() if value is not None]
    if len(sources) > 1:
        raise ValueError(f"the key comes from {' and '.join(sources)}; give one of them")
    if options.cache_salt_per_key and not sources:
        raise ValueError("--cache-salt-per-key needs keys; give --api-key-file, with one on each line")
    if not sources:
        return ()
    source = sources[0]
    if source == "--api-key":
        print(f"nanoinfra: --api-key shows in ps; {API_KEY_VARIABLE} or --api-key-file does not",
              file=sys.stderr)
    api_keys = _read_key_file(options.api_key_file) if source == "--api-key-file" else [values[source]]
    for i, key in enumerate(api_keys, 1):
        _check_key(key, f"line {i} of {options.api_key_file}" if source == "--api-key-file" else source)
    return tuple(api_keys)


def _read_key_file(file):
    try:
        if (mode := file.stat().st_mode) & 0o077:
            print(f"nanoinfra: others may use {file}, mode {mode & 0o777:03o}; chmod 600 it", file=sys.stderr)
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ValueError(f"cannot read --api-key-file {file}: {reason}") from None
    if not lines:
        raise ValueError(f"--api-key-file {file} is empty; write a key on each line")
    return lines


def _check_key(key, where):
    """Raise ValueError for a bad key; the message says where the key stands and never shows it."""
    if not key:
        raise ValueError(f"{where} is empty; leave it out to serve whoever connects")
    if key != key.strip() or not key.isprintable():
        raise ValueError(f"{where}: a key begins and ends with a visible character, and has no control "
                         "characters")


def find_bearer_key(api_keys: Sequence[str], authorization_header: str) -> str | None:
    """The one of `api_keys` that an Authorization header (latin-1, as Starlette gives it) holds, or None.

    All keys are compared in constant time. "Bearer" may be in any case (RFC 9110).
    """
    scheme, _, token = authorization_header.encode("latin-1").partition(b" ")
    digest = sha256(token.strip()).digest()
    same = [key for key in api_keys if hmac.compare_digest(sha256(key.encode()).digest(), digest)]
    return same[0] if same and scheme.lower() == b"bearer" else None


def cache_salt_of_key(api_key: str) -> str:
    """The cache salt of an API key, 64 characters: cached prefixes are shared only under the same salt."""
    return sha256(b"cache salt of " + api_key.encode()).hexdigest()


def prepend_cache_salt(requests: Sequence[Request], cache_salt: str) -> list[Request]:
    """The requests, each with `cache_salt` in front of its own.

    Salts of keys all have one length, so no client can make up the salt of another key.
    """
    return [replace(request, cache_salt=cache_salt + request.cache_salt) for request in requests]
