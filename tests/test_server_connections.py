"""Connections of a server: their number, slow clients at both ends, and bytes that are not quite HTTP."""

import contextlib
import json
import re
import socket
import time

import httpx2
import pytest
from serving import CHAT, SUM, Live, raw

from flashmoe_mlx.server import connection, middleware

BODY = json.dumps({"model": "demo", "messages": [SUM], "temperature": 0, "max_tokens": 2}).encode()
POST = (f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
GET = ("GET /health HTTP/1.1", "Host: localhost")


def open_connections(live: Live) -> int:
    """Return the number of connections besides that of the test's client."""
    live.client.get("/health", headers={"connection": "close"})
    return sum(not seen.transport.is_closing() for seen in live.connections())


def wait_for_no_connection(live: Live) -> None:
    start = time.monotonic()
    while open_connections(live):
        assert time.monotonic() < start + 5
        time.sleep(0.02)


def test_a_slow_body_and_slow_headers_end(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_SLOWEST_BODY", 0.2)
    monkeypatch.setattr(connection, "_SLOWEST_REQUEST", 0.2)
    assert b" 408 " in raw(live, *POST, "Content-Length: 100", body=b"{").partition(b"\r\n")[0]
    for begun in (b"", b"GET /health HTT"):
        with live.connect() as client:
            client.sendall(begun)
            assert client.recv(1000) == b""
    with live.connect() as client:  # the second request of a connection
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while b'{"status":"ok"}' not in client.recv(1000):
            pass
        client.sendall(b"GET /hea")
        assert client.recv(1000) == b""


@pytest.mark.parametrize("head", [("GET /health HTTP/1.1", *POST[1:]), ("POST /nowhere HTTP/1.1", *POST[1:])])
def test_a_body_that_nobody_waits_for_does_not_hold_the_connection(
    live: Live, head: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_SLOWEST_REQUEST", 0.3)
    start = time.monotonic()
    with live.connect() as client, contextlib.suppress(ConnectionError):
        client.sendall("\r\n".join([*head, "Content-Length: 100000", "", ""]).encode())
        while time.monotonic() < start + 5:
            client.sendall(b" ")
            time.sleep(0.05)
    assert time.monotonic() < start + 2


def test_a_client_that_does_not_read_is_given_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is larger than the buffers of both ends; the engine works for others meanwhile."""
    wait_for_no_connection(live)
    monkeypatch.setattr(connection, "_SLOWEST_OUTPUT", 0.5)
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "x" * 12_000_000}]}).encode()
    head = ("POST /apply-template HTTP/1.1", *POST[1:], f"Content-Length: {len(body)}", "", "")
    with live.connect() as client:
        client.sendall("\r\n".join(head).encode() + body)
        assert live.chat()["choices"][0]["finish_reason"] == "stop"
        assert open_connections(live) == 1
        wait_for_no_connection(live)


def test_a_stream_that_nobody_reads_costs_the_engine_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine goes on; the output that waits is bounded by ``max_tokens``, and the connection ends."""
    wait_for_no_connection(live)
    monkeypatch.setattr(connection, "_SLOWEST_OUTPUT", 0.2)
    fields = {
        "messages": [SUM],
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
        "max_tokens": 100,
        "model": "demo",
    }
    body = json.dumps({**fields, "logit_bias": {"2041": -100, "2039": -100}}).encode()
    with live.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        time.sleep(0.05)
        (seen,) = [seen for seen in live.connections() if not seen.transport.is_closing()]
        seen.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        before = len(live.records)
        client.sendall("\r\n".join([*POST, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        while not seen.flow.write_paused:
            time.sleep(0.01)
        assert live.chat()["choices"][0]["finish_reason"] == "stop"
        wait_for_no_connection(live)
    live.wait_idle()
    assert len(live.records) == before + 2


def test_connections_are_limited(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_no_connection(live)
    monkeypatch.setattr(connection, "_MOST_CONNECTIONS", 3)
    with contextlib.ExitStack() as held:
        first = [held.enter_context(live.connect()) for _ in range(3)]
        for client in first:  # all of them are accepted
            client.sendall("\r\n".join([*GET, "", ""]).encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        refused = raw(live, *GET)
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 5" in refused
        assert b"too_many_connections" in refused
        more = [held.enter_context(live.connect()) for _ in range(4)]
        with contextlib.suppress(ConnectionError):
            assert more[-1].recv(1) == b""  # closed at once
    wait_for_no_connection(live)
    assert live.client.get("/health").status_code == 200


def test_the_bodies_of_all_requests_are_limited(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "LARGEST_BODIES", 150_000)
    with live.connect() as client:
        client.sendall("\r\n".join([*POST, "Content-Length: 200000", "", ""]).encode() + b" " * 100_000)
        time.sleep(0.1)
        refused = httpx2.post(live.url + CHAT, content=b" " * 100_000, headers={"content-type": "application/json"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_bytes")
        assert refused.headers["retry-after"]
    assert live.chat(max_tokens=1)["choices"]
    start = time.monotonic()
    while live.held():  # what has gone is not counted any more
        assert time.monotonic() < start + 5
        time.sleep(0.02)


CHUNKED = (*POST, "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        ((*CHUNKED, f"Content-Length: {len(BODY)}"), b"0\r\n\r\n", 400),  # request smuggling
        ((*CHUNKED, "Transfer-Encoding: identity"), b"0\r\n\r\n", 400),
        ((*POST, "Transfer-Encoding: gzip, chunked"), b"0\r\n\r\n", 400),
        ((*POST, "Content-Length: 5", "Content-Length: 6"), b"", 400),
        ((*POST, "Content-Length: -5"), BODY, 400),
        ((*POST, "Content-Length: +5"), BODY, 400),
        ((*POST, f"Content-Length: {'9' * 20}"), b"", 413),
        (CHUNKED, b"zz\r\n\r\n", 400),
        (CHUNKED, b"-5\r\nhello\r\n0\r\n\r\n", 400),
        (CHUNKED, b"5\r\nhello0\r\n\r\n", 400),
        (CHUNKED, b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), 200),
        ((POST[0], "Host: localhost", "Content-Type: text/plain", POST[2]), b"", 415),
        ((POST[0], "Host: localhost", POST[2] + ", text/plain"), b"", 415),
        ((*POST, "Content-Encoding: gzip", "Content-Length: 5"), b"\x1f\x8b\x08\0\0", 415),
        ((GET[0], "Host: localhost", "Host: localhost"), b"", 400),
        ((GET[0], "Host : localhost"), b"", 400),
        ((GET[0], "Host: localhost:99999"), b"", 403),
        ((GET[0], "Host: localhost, evil.com"), b"", 403),
        ((GET[0], "Host: [::1"), b"", 403),
        ((*GET, "X-Null: a\0b"), b"", 400),
        ((*GET, "Origin: http://evil.com", "Origin: http://localhost"), b"", 403),
        (("GET /health HTTP/1.0", "Host: localhost"), b"", 200),
        (("GET /health HTTP/1.0",), b"", 400),
        (("GET /health",), b"", 400),
        (("PRI * HTTP/2.0", "", "SM"), b"", 400),
        (("CONNECT evil.com:443 HTTP/1.1", "Host: localhost"), b"", 400),
        (("OPTIONS * HTTP/1.1", "Host: localhost"), b"", 400),
        (("GET /%ff%00%0d%0aX:1 HTTP/1.1", "Host: localhost"), b"", 404),
        (("GET /h\xe9 HTTP/1.1", "Host: localhost"), b"", 400),
        (("\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",), b"", 400),
        (("", "", ""), b"", 400),
        ((*GET, "Upgrade: websocket", "Connection: Upgrade, close", "Sec-WebSocket-Key: x"), b"", 200),
    ],
)
def test_what_is_not_quite_http(live: Live, lines: tuple[str, ...], body: bytes, status: int) -> None:
    answer = raw(live, *lines, *([] if status == 400 else ["Connection: close"]), body=body)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert status == 200 or json.loads(content)["error"]["code"]


def test_requests_in_one_packet_are_answered_in_order(live: Live) -> None:
    one = "\r\n".join([*GET, "", ""])
    evil = "\r\n".join([GET[0], "Host: evil.com", "", ""])
    answer = raw(live, one + one + evil)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"403"]


def test_garbage_after_an_early_answer_only_ends_the_connection(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with live.connect() as client:
        client.sendall("\r\n".join(["POST /nowhere HTTP/1.1", *CHUNKED[1:], "", "5\r\nhello\r\n"]).encode())
        assert b" 404 " in client.recv(1000)
        client.sendall(b"zzzz\r\n")
        with contextlib.suppress(ConnectionError):
            while client.recv(1000):
                pass
    assert [record for record in caplog.records if record.name != "uvicorn.access"] == []
