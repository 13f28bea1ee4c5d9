"""API keys: where they come from, which of them a client has sent, and what its key keeps apart.

The command line and the environment of a process can be read by others (ps, the processes that it starts): a
key comes best from a file, and the environment's is taken out before the engine's processes inherit it.
"""
import hmac
import os
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from nanoinfra.serve.engine.requests import Request
from nanoinfra.serve.options import ServeOptions

VARIABLE = "NANOINFRA_API_KEY"


def read_keys(options: ServeOptions, environment: MutableMapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of which a client must send one; () where none is asked for.

    Takes the variable out of `environment`, and warns on stderr of what others can see. Raises ValueError for
    two sources, and for a key that no client could send.
    """
    given = {"--api-key": options.api_key, "--api-key-file": options.api_key_file,
             VARIABLE: environment.pop(VARIABLE, None)}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) > 1:
        raise ValueError(f"the key comes from {' and '.join(sources)}; give one of them")
    if options.cache_salt_per_key and not sources:
        raise ValueError("--cache-salt-per-key needs keys; give --api-key-file, with one on each line")
    if not sources:
        return ()
    source = sources[0]
    if source == "--api-key":
        print(f"nanoinfra: --api-key shows in ps; {VARIABLE} or --api-key-file does not", file=sys.stderr)
    keys = _lines(options.api_key_file) if source == "--api-key-file" else [given[source]]
    for i, key in enumerate(keys, 1):
        _check_key(key, f"line {i} of {options.api_key_file}" if source == "--api-key-file" else source)
    return tuple(keys)


def _lines(file):
    try:
        if (mode := file.stat().st_mode) & 0o077:
            print(f"nanoinfra: others may use {file}, mode {mode & 0o777:03o}; chmod 600 it", file=sys.stderr)
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ValueError(f"cannot read --api-key-file {file}: {why}") from None
    if not lines:
        raise ValueError(f"--api-key-file {file} is empty; write a key on each line")
    return lines


def _check_key(key, where):
    """An error says where a key stands, never what it is."""
    if not key:
        raise ValueError(f"{where} is empty; leave it out to serve whoever connects")
    if key != key.strip() or not key.isprintable():
        raise ValueError(f"{where}: a key begins and ends with a visible character, and has no control "
                         "characters")


def key_of(keys: Sequence[str], authorization: str) -> str | None:
    """The key that an Authorization header holds, in latin-1 as Starlette gives it; None without one.

    All of `keys` are compared, in a time that tells nothing of them. "Bearer" may be in any case (RFC 9110).
    """
    scheme, _, given = authorization.encode("latin-1").partition(b" ")
    given = sha256(given.strip()).digest()
    same = [key for key in keys if hmac.compare_digest(sha256(key.encode()).digest(), given)]
    return same[0] if same and scheme.lower() == b"bearer" else None


def salt_of(key: str) -> str:
    """What keeps the cached prefixes of this key's requests from others. Always of 64 characters."""
    return sha256(b"cache salt of " + key.encode()).hexdigest()


def salted(requests: Sequence[Request], salt: str) -> list[Request]:
    """The requests, whose own salts hold within `salt`: of one length, so nobody can name another's."""
    return [replace(request, salt=salt + request.salt) for request in requests]
