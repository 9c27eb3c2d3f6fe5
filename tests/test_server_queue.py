"""Queue, cancellation, repeated requests, signs of life and failures of a server."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import CHAT, SUM, Live, parse_events, serve

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.server import service, streaming

LONG = {
    "model": "demo",
    "messages": [SUM],
    "temperature": 2,
    "seed": 1,
    "max_tokens": 1200,
    "logit_bias": {"2041": -100, "2039": -100},
}
"""A request for an answer of several seconds."""


@pytest.fixture(scope="module")
def narrow(demo_pack: Path) -> Iterator[Live]:
    """Serve one answer at a time, with room for one more request."""
    with serve(demo_pack, queue=1, together=1) as running:
        yield running


@contextmanager
def begin(live: Live, **fields: Any) -> Iterator[Iterator[str]]:
    """Begin a streamed answer of several seconds, yield its lines, and leave it at the end of the block."""
    with live.client.stream("POST", CHAT, json={**LONG, "stream": True, **fields}) as answer:
        yield answer.iter_lines()


def test_a_full_queue_is_told(narrow: Live) -> None:
    with begin(narrow) as running:
        next(running)
        while not narrow.service.worker.running:
            time.sleep(0.01)
        with begin(narrow, seed=2) as waiting:
            assert next(waiting).startswith("data: ")  # the first event comes while the request waits
            refused = narrow.client.post(CHAT, json=LONG | {"seed": 3})
            assert refused.status_code == 429
            assert 0 < int(refused.headers["retry-after"]) <= 120
            assert refused.json()["error"]["code"] == "queue_full"
            assert narrow.post("/tokenize", prompt="a")["count"] == 1  # counts do not wait
            assert narrow.client.get("/health").status_code == 200
    assert narrow.wait_idle() < 2
    assert narrow.chat()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(live: Live, stream: bool) -> None:
    before = len(live.records)
    if stream:
        with begin(live) as answer:
            next(answer)
            while not live.service.worker.running:
                time.sleep(0.01)
    else:
        with httpx2.Client(base_url=live.url, timeout=0.4) as client, pytest.raises(httpx2.ReadTimeout):
            client.post(CHAT, json=LONG)
    left = time.monotonic()
    while len(live.records) == before:  # the request may still have been on its way to the engine
        assert time.monotonic() < left + 5
        time.sleep(0.01)
    assert live.wait_idle() < 1.5
    assert [record["finish_reason"] for record in live.records[before:]] == ["cancelled"]


def test_a_client_that_leaves_during_its_prompt_frees_the_engine(live: Live) -> None:
    body = {**LONG, "messages": [{"role": "user", "content": "The boat is late. " * 600}]}
    with httpx2.Client(base_url=live.url, timeout=0.15) as client, pytest.raises(httpx2.ReadTimeout):
        client.post(CHAT, json=body)
    assert live.wait_idle() < 2


def test_a_repeated_request_takes_the_work_over(live: Live) -> None:
    """SDKs count their repetitions in a header, and begin again after a timeout."""
    body = {**LONG, "max_tokens": 150}
    before = len(live.records)
    with httpx2.Client(base_url=live.url, timeout=0.3) as client, pytest.raises(httpx2.ReadTimeout):
        client.post(CHAT, json=body, headers={"x-stainless-retry-count": "0"})
    answer = live.client.post(CHAT, json=body, headers={"x-stainless-retry-count": "1"})
    assert answer.json()["usage"]["completion_tokens"] == 150
    live.wait_idle()
    assert [record["completion_tokens"] for record in live.records[before:]] == [150]


def test_a_repeated_request_replaces_the_first_one(live: Live) -> None:
    body = {**LONG, "max_tokens": 120, "seed": 5, "stream": True}
    taken = live.service.metrics.taken_over
    with live.client.stream("POST", CHAT, json=body) as first:
        lines = first.iter_lines()
        next(lines)
        while not live.service.worker.running:
            time.sleep(0.01)
        with live.client.stream("POST", CHAT, json=body, headers={"x-stainless-retry-count": "1"}) as second:
            events = [data for _, data in parse_events(second.iter_lines())]
        with pytest.raises(httpx2.RemoteProtocolError):
            list(lines)
    assert live.service.metrics.taken_over == taken + 1
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"


def test_equal_requests_of_two_clients_are_answered_apart(live: Live) -> None:
    body = {**LONG, "max_tokens": 30}
    del body["seed"]
    found: list[str] = []

    def ask() -> None:
        found.append(httpx2.post(live.url + CHAT, json=body, timeout=60).json()["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 3


def test_signs_of_life(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream gets comments; a whole answer gets headers and spaces, and is JSON all the same."""
    monkeypatch.setattr(streaming, "KEEP_ALIVE", 0.001)
    with begin(live, max_tokens=20) as answer:
        assert any(line.startswith(": ") for line in answer)
    whole = live.client.post(CHAT, json={**LONG, "max_tokens": 20})
    assert whole.text.startswith(" ")
    assert whole.json()["usage"]["completion_tokens"] == 20


def test_an_error_after_the_headers_is_an_event_and_no_clean_end(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = live.service.worker.engine
    assert engine is not None
    decode, calls = engine.runner.decode, []

    def fail(sequences: list[Any]) -> None:
        calls.append(1)
        if len(calls) == 3:
            for sequence in sequences:
                sequence.cache.broken = True
            raise FlashMoeError("an expert cannot be read", code="read_failed")
        decode(sequences)

    monkeypatch.setattr(engine.runner, "decode", fail)
    with begin(live) as answer:
        received: list[str] = []
        with pytest.raises(httpx2.RemoteProtocolError):
            received.extend(answer)
    data = [json.loads(line.removeprefix("data: ")) for line in received if line.startswith("data: ")]
    assert data[-1]["error"]["code"] == "read_failed"
    assert data[-1]["error"].keys() == {"message", "type", "param", "code"}
    calls.clear()
    failed = live.client.post(CHAT, json=LONG)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "read_failed")
    monkeypatch.undo()
    assert live.chat()["choices"][0]["finish_reason"] == "stop"


def test_a_slow_template_is_abandoned(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_LONGEST_PREPARATION", 0.1)
    engine = live.service.worker.engine
    monkeypatch.setattr(engine, "request", lambda *_, **__: time.sleep(0.5))
    assert live.chat(status=503)["error"]["code"] == "prompt_too_slow"


def test_metrics_count_requests_and_experts(live: Live) -> None:
    def values() -> dict[str, float]:
        lines = live.client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = values()
    live.chat()
    live.wait_idle()
    after = values()
    grown = {name for name in after if after[name] > before.get(name, 0)}
    for name in (
        "prompt_tokens_total",
        "completion_tokens_total",
        "expert_requests_total",
        "expert_stall_seconds_total",
    ):
        assert f'flashmoe_{name}{{backend="pread"}}' in grown
    assert 'flashmoe_requests_total{backend="pread",finish_reason="stop"}' in grown
    for name in ("queue", "time_to_first_token", "request"):
        assert f'flashmoe_{name}_seconds_count{{backend="pread"}}' in grown
