"""A fuzzer of the server: `python -m tests.serve.fuzz HOST:PORT CONTEXT VOCAB N SEED`.

It sends N hostile requests, at least 200 of each kind where N allows it, in random order, over 16 connections
at once, and prints as JSON {"statuses": {kind: {status: how many}}, "bad": [what must not be]}. Bad is an
answer of 5xx, or none within a minute. hostile.py has the kinds of bodies; those of connections are here.
"""
import asyncio
import json
import os
import random
import sys
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.serve import hostile

WORKERS, PATIENCE, LEAST = 16, 60.0, 200
EVIL = ["http://evil.example", "null", "https://127.0.0.1.evil.example", "http://localhost.evil.example:8000"]
PLACES = ["//", "/v1/..", "/%00", "/v1/models/../../x", "*", "http://evil.example/", "/v1/models/"]


@dataclass(frozen=True)
class Target:
    """A server, and what any client can know of its model."""
    host: str
    port: str
    context: int
    vocab: int


def http(target, path=hostile.COMPLETIONS, body=b"", method="POST", **headers) -> bytes:
    """A request; a header that is None is left out, and _ in its name stands for -."""
    usual = {"Host": f"{target.host}:{target.port}", "Content-Type": "application/json",
             "Content-Length": len(body), "Connection": "close"}
    named = usual | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in named.items() if v is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def page(draws, target):
    """What a web page can make a browser send: from other origins, under other hosts, as forms."""
    path = draws.choice([hostile.COMPLETIONS, hostile.CHATS, "/reset_prefix_cache", "/v1/models/", "/health"])
    evil = draws.choice(EVIL)
    tricks = [{"Content_Type": kind} for kind in ("text/plain", "application/x-www-form-urlencoded", None)]
    tricks += [{"Origin": evil}, {"Host": "evil.example"}, {"Host": None}, {"Host": draws.choice(PLACES)}]
    tricks += [{"Origin": evil, "Access_Control_Request_Method": "POST", "method": "OPTIONS"}]
    return http(target, path, hostile.body(), **draws.choice(tricks))


def keys(draws, target):
    """A key of any form, where none is needed."""
    long = "Bearer " + "k" * draws.randrange(30_000)
    given = ["Bearer ", "bearer x", "Basic eDp5", long, "\xff\xfe", "Bearer\tx"]
    return http(target, body=hostile.body(), Authorization=draws.choice(given))


def salts(draws, target):
    """Salts of the prefix cache: of any length and type."""
    given = ["", "a", "b" * 10 ** draws.randint(0, 5), "\ud800", "\0", 5, None, []]
    return http(target, body=hostile.body(prompt="one two one two", cache_salt=draws.choice(given)))


def heads(draws, target):
    """Heads that are none or too long, lengths that lie, pieces that are none, odd paths and methods."""
    good = http(target, body=hostile.body())
    at = draws.randrange(len(good))
    lies = ["-1", "1e3", "99999999999999999999", "2, 3", "0x10", ""]
    return draws.choice([
        good[:at] + draws.randbytes(draws.randint(1, 9)) + good[at:], draws.randbytes(300), good[:at],
        b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"a" * draws.randrange(200_000) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * draws.randrange(20_000) + b"\r\n",
        http(target, body=b"{}", Content_Length=draws.choice(lies)),
        http(target, body=b"zz\r\n", Content_Length=None, Transfer_Encoding="chunked"),
        http(target, draws.choice(PLACES), method="GET"),
        http(target, method=draws.choice(["PUT", "DELETE", "HEAD", "TRACE", "FOO", "CONNECT"]))])


@asynccontextmanager
async def connection(target):
    """(reader, writer); its end is no error, whoever closes first."""
    reader, writer = await asyncio.open_connection(target.host, int(target.port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def say(target, data, last=False) -> int:
    """The status of the answer to `data`, 0 where there is none. `last`: nothing more comes."""
    async with connection(target) as (reader, writer):
        try:
            writer.write(data)
            if last:
                writer.write_eof()
            head = await reader.readline()
            while await reader.read(1 << 16):
                pass                         # to the end
        except OSError:                      # reset, or closed before all was sent
            return 0
        return int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else 0


async def idle(target, draws) -> int:
    """A connection with a byte or a piece of a request, on which nothing more comes for a while."""
    pieces = [b"", b"P", b"POST /v1/completions HTTP/1.1\r\nHost: ", http(target, body=hostile.body())[:-1]]
    async with connection(target) as (reader, writer):
        writer.write(draws.choice(pieces))
        try:
            async with asyncio.timeout(draws.uniform(0, 3)):
                await reader.read()
        except (TimeoutError, ConnectionResetError):
            return 0                         # it leaves, or is thrown out
    return 0


async def leave(target, draws) -> int:
    """A stream whose client goes away after some bytes."""
    body = hostile.body(stream=True, max_tokens=target.context // 2, prompt="one two")
    async with connection(target) as (reader, writer):
        writer.write(http(target, body=body))
        try:
            head = (await reader.read(draws.randint(16, 2000))).split()
        except ConnectionResetError:
            return 0
    return int(head[1]) if len(head) > 1 else 0


async def hostile_request(kind, target, draws) -> int:
    """Send one of `kind`; its status, 0 where the connection was closed without one."""
    if kind in hostile.KINDS:
        path, headers, body = hostile.draw(kind, draws, target.context, target.vocab)
        return await say(target, http(target, path, body, **headers))
    if kind in ("idle", "leave"):
        return await {"idle": idle, "leave": leave}[kind](target, draws)
    data = {"page": page, "keys": keys, "salts": salts, "heads": heads}[kind](draws, target)
    return await say(target, data, last=kind == "heads")


KINDS = [*hostile.KINDS, "page", "keys", "salts", "heads", "idle", "leave"]


def order(n, draws):
    """`n` kinds: each at least LEAST times, or equally often."""
    kinds = KINDS * min(LEAST, n // len(KINDS))
    kinds += draws.choices(KINDS, k=n - len(kinds))
    draws.shuffle(kinds)
    return kinds


async def fuzz(target, n, seed):
    """Send `n` requests: (statuses, what is bad)."""
    statuses, bad = defaultdict(Counter), []
    left = iter(enumerate(order(n, random.Random(seed))))

    async def work():
        for i, kind in left:
            try:
                async with asyncio.timeout(PATIENCE):
                    status = await hostile_request(kind, target, random.Random(f"{seed} {i}"))
            except TimeoutError:
                status = "no answer"
            statuses[kind][status] += 1
            if status == "no answer" or status >= 500:
                bad.append(f"request {i} of seed {seed}, {kind}: {status}")
    await asyncio.gather(*(work() for _ in range(WORKERS)))
    return statuses, bad


def main(where, context, vocab, n, seed):
    os.nice(10)
    host, _, port = where.rpartition(":")
    statuses, bad = asyncio.run(fuzz(Target(host, port, int(context), int(vocab)), int(n), seed))
    print(json.dumps({"statuses": statuses, "bad": bad}))


if __name__ == "__main__":
    main(*sys.argv[1:])
