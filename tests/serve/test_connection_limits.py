"""Connections that take from others: those that send nothing, or slowly, or too much, or do not read."""
import contextlib
import re
import socket
import sys
import time

import h11
import httpx
import pytest

from nanoinfra.serve.server.fastapi_app import _MAX_STATS_STREAMS
from nanoinfra.serve.server.http.connection_limits import (
    MAX_HEADER_BYTES,
    MIN_MEAN_CHUNK_BYTES,
    ChunkLimitedH11Connection,
    ConnectionLimits,
    connection_limits_within_ulimit,
)
from tests.processes import children
from tests.serve.host import CODE, PATIENCE, serving, started, until

BODY = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = BODY + b"Transfer-Encoding: chunked\r\n\r\n"
ASKED = {"prompt": "ab", "max_tokens": 4}


@contextlib.contextmanager
def opened(client, sends=(b"",), receives=None):
    """A connection for each of `sends`, on which no more than that comes."""
    with contextlib.ExitStack() as all_of_them:
        sockets = []
        for data in sends:
            each = all_of_them.enter_context(socket.socket())
            if receives:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
            each.settimeout(60)
            each.connect((client.base_url.host, client.base_url.port))
            with contextlib.suppress(ConnectionError):       # it may be closed already
                each.sendall(data)
            sockets.append(each)
        yield sockets


def said(connection):
    """All that comes until the server closes it."""
    whole = b""
    with contextlib.suppress(ConnectionResetError):          # there was more that it did not read
        while data := connection.recv(1 << 16):
            whole += data
    return whole


def serves(client):
    """Are others answered, on connections of their own?"""
    with httpx.Client(base_url=client.base_url, timeout=PATIENCE, trust_env=False) as other:
        got = other.post("/v1/completions", json=ASKED)
        assert got.status_code == 200, got.text
        return other.get("/health").status_code == 200 and got.json()["choices"][0]["text"] == "abab"


SLOW = {"a byte": b"G", "nothing": b"", "half a head": b"GET /health HTTP/1.1\r\nHost: lo",
        "half a body": BODY + b"Content-Length: 99\r\n\r\n{", "a first chunk": CHUNKED + b"1\r\n{\r\n"}


@pytest.fixture(scope="module")
def patient():
    with serving(limits=ConnectionLimits(600, 600, 600, max_connections=60)) as both:
        yield both


@pytest.mark.parametrize("sends", SLOW.values(), ids=SLOW.keys())
def test_three_hundred_that_do_not_go_on_keep_nobody_out(patient, sends):
    """Their time is far from over: the oldest make room."""
    client, server = patient
    with opened(client, [sends] * 300) as slow:
        assert serves(client)
        until(lambda: len(server.server_state.connections) <= 60)
        assert b" 503 " in said(slow[0]).split(b"\r\n")[0] and not server.engine_client.streams
        with pytest.raises(BlockingIOError):                 # the newest are still waited for
            slow[-1].setblocking(False)
            slow[-1].recv(1)


def test_those_that_wait_for_an_answer_are_not_closed_for_others():
    limits = ConnectionLimits(max_connections=20)
    with serving(limits=limits, pause=0.02) as (client, _), client.stream("POST", "/v1/completions", json={
            "prompt": "ab", "max_tokens": 120, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        with opened(client, [b"G"] * 60):
            assert serves(client)
        assert "data: [DONE]" in list(lines)


@pytest.fixture(scope="module")
def hasty():
    with serving(limits=ConnectionLimits(1.5, 1.5, 0.5, 1.5)) as both:
        yield both


def test_what_does_not_come_in_time_is_not_waited_for(hasty):
    """Who had begun is told so; who only was connected, before a request or after one, is not."""
    client, server = hasty
    with opened(client, [*SLOW.values(), b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"]) as slow:
        *answers, after = map(said, slow)
        for name, answer in zip(SLOW, answers):
            assert (answer == b"") == (name == "nothing"), name
            assert not answer or answer.startswith(b"HTTP/1.1 408 ") and b"was not complete after" in answer
        assert after.startswith(b"HTTP/1.1 200 ") and after.count(b"HTTP/1.1") == 1
    until(lambda: not server.server_state.tasks and not server.engine_client.streams)


def test_between_two_requests_there_is_more_time_than_for_one(patient):
    """As pools of clients and proxies on the way expect; a byte of the next request ends it."""
    assert ConnectionLimits().keepalive_timeout == 75.0
    with serving(limits=ConnectionLimits(600)) as (client, server), opened(client) as (one,):
        assert server.config.timeout_keep_alive == 75.0
        def found():
            port, every = one.getsockname()[1], list(server.server_state.connections)
            return next((each for each in every if each.client and each.client[1] == port), None)
        until(found)
        connection = found()
        assert (connection.is_idle_keepalive, connection._timeout()) == (False, 600)
        for end in (b"\r\n\r\n", b"\r\n\r\n"):
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost" + end)
            assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")
            until(lambda: connection.is_idle_keepalive)
            assert connection._timeout() == 75.0 and connection in connection.awaiting_request
        since = connection.state_since
        one.sendall(b"G")
        until(lambda: not connection.is_idle_keepalive)
        assert connection._timeout() == 600 and connection.state_since > since
        connection.close_if_timed_out(connection.state_since + 599)
        assert not connection.transport.is_closing()


def test_a_byte_now_and_then_buys_no_time(hasty):
    with opened(hasty[0]) as (slow,), pytest.raises(OSError):             # closed, with what we send unread
        for byte in BODY * 1000:
            slow.sendall(bytes([byte]))
            time.sleep(0.05)


def test_a_body_that_comes_slowly_but_comes_is_read(hasty):
    """20 kB buy 20 seconds more than the 1.5; it takes three."""
    data = b'{"prompt": "ab", "max_tokens": 4}' + b" " * 20_000
    with opened(hasty[0], [BODY + b"Content-Length: %d\r\n\r\n" % (len(data) + 6) + data]) as (slow,):
        for _ in range(6):
            time.sleep(0.5)
            slow.sendall(b" ")
        assert slow.recv(12) == b"HTTP/1.1 200"


def test_who_does_not_read_is_dropped(hasty):
    """More is sent than the system takes for it."""
    client, server = hasty
    for listener in server.servers[0].sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)   # of connections from now on
    with opened(client, [b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40], receives=4096):
        until(lambda: any(each.write_blocked_since for each in server.server_state.connections))
        until(lambda: not server.server_state.connections and not server.server_state.tasks)


def test_few_may_watch_so_that_all_may_ask(patient):
    client, server = patient
    with opened(client, [b"GET /stats HTTP/1.1\r\nHost: localhost\r\n\r\n"] * _MAX_STATS_STREAMS) as watchers:
        until(lambda: server.app_state.num_stats_streams == _MAX_STATS_STREAMS)
        got = client.get("/stats")
        assert got.status_code == 503 and str(_MAX_STATS_STREAMS) in got.text and serves(client)
        watchers.pop().close()
        until(lambda: server.app_state.num_stats_streams < _MAX_STATS_STREAMS)
    until(lambda: not server.app_state.num_stats_streams)


def chunks(size, count):
    return (b"%x\r\n" % size + b" " * size + b"\r\n") * count


def events(data):
    """How many h11 finds, fed in pieces as the server feeds them."""
    connection, found = ChunkLimitedH11Connection(h11.SERVER, MAX_HEADER_BYTES), 0
    for begin in range(0, len(data), MAX_HEADER_BYTES):
        connection.receive_data(data[begin:begin + MAX_HEADER_BYTES])
        while connection.next_event() is not h11.NEED_DATA:
            found += 1
    return found


def test_many_small_chunks_are_an_error():
    """One took 15 us; 43,000 in what is received at a time held everybody up for 0.8 s."""
    assert events(CHUNKED + chunks(1, MIN_MEAN_CHUNK_BYTES)) == 1 + MIN_MEAN_CHUNK_BYTES
    assert events(CHUNKED + chunks(1000, 9000)) > 9000
    for size, count in ((1, MIN_MEAN_CHUNK_BYTES + 10), (100, 600)):
        with pytest.raises(h11.RemoteProtocolError, match="too small"):
            events(CHUNKED + chunks(size, count))


def test_a_request_after_another_has_chunks_of_its_own(patient):
    text = b'{"prompt":"ab","max_tokens":1}'
    whole = CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in text) + chunks(1, 200) + b"0\r\n\r\n"
    with opened(patient[0], [whole * 3 + whole.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)]) as (one,):
        assert said(one).count(b"HTTP/1.1 200") == 4


@pytest.mark.parametrize("size, status",
                         [(15_000, b"200"), (2 * MAX_HEADER_BYTES, b"400"), (200_000, b"400")])
def test_a_head_has_a_size_whether_it_comes_at_once_or_not(patient, size, status):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    with opened(patient[0], [head + b"x: y\r\n" * (size // 6) + b"\r\n"]) as (one,):
        assert said(one)[9:12] in (status, b"")              # b"": closed while it was still sending
        assert serves(patient[0])


ODD = {"HEAD": b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
       "after a refusal": CHUNKED.replace(b"localhost", b"evil.example") + b"1\r\n{\r\nzz\r\n",
       "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00", "a chunk that is none": CHUNKED + b"zz\r\n",
       "an upgrade": b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
                     b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"}


@pytest.mark.parametrize("sends", ODD.values(), ids=ODD.keys())
def test_a_refusal_does_not_fail_itself(patient, sends, caplog):
    client, _ = patient
    with opened(client, [sends]) as (first,):
        first_answer = said(first)
    with opened(client, [sends[:-4]]) as (second,):          # in two, the rest when there was time to answer
        time.sleep(0.1)
        with contextlib.suppress(ConnectionError):
            second.sendall(sends[-4:])
        said(second)
    assert re.match(rb"HTTP/1.1 (200|400|403) ", first_answer)
    assert first_answer.count(b"x-request-id: ") == first_answer.count(b"HTTP/1.1 ")
    assert not [each for each in caplog.records if each.exc_info or each.name == "asyncio"]


def test_few_descriptors_are_enough():
    """`ulimit -n 128`, and 200 that sent a little: little is logged, and SIGTERM does not wait for them."""
    program = [sys.executable, "-c", CODE.format(tp=1, drain=20, factory="fake", engine={})]
    sends = [b"G"] * 150 + [b"no HTTP\r\n\r\n"] * 50 + [BODY + b"Content-Length: 9\r\n\r\n"] * 8
    with started(["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", *program]) as (process, client), \
            opened(client, sends):
        assert serves(client)
        ranks = children(process.pid)
        process.terminate()
        assert process.wait(30) == 0 and ranks
        log = process.stderr.read()
        assert "connections are open" in log and "Invalid HTTP request received. (32 times" in log
        assert log.count("\n") < 30
        assert "Traceback" not in log and "Cancel" not in log


def test_a_process_takes_the_descriptors_that_it_may(monkeypatch):
    import resource
    for soft, hard, most, raised in ((1024, 4096, 2048, 2144), (256, 512, 416, 512), (9999, 9999, 2048, None),
                                     (1024, resource.RLIM_INFINITY, 2048, 2144), (-1, -1, 2048, None)):
        now = []
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=(soft, hard): limits)
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits, now=now: now.append(limits))
        assert connection_limits_within_ulimit().max_connections == most
        assert now == ([] if raised is None else [(raised, hard)])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(ValueError, match="ulimit -n 112"):
        connection_limits_within_ulimit()
