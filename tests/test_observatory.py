"""The feed of the observatory: its numbers are the engine's, its size is bounded, and nothing of it leaks."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
import pytest
from serving import SUM, Live, parse_events, serve

import flashmoe_mlx
from flashmoe_mlx.generation.pass_meter import WatchedPass
from flashmoe_mlx.server import observatory
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.observed import MOST_CHOICES, MOST_TOKENS, Shape, frame
from flashmoe_mlx.stores.contract import StoreStats

SECRET = "a secret of this page"
STREAM = "/observatory/events"


@pytest.fixture(scope="module")
def watched(tiny_pack: Path, demo_pack: Path) -> Iterator[Live]:
    """Serve the demo model from half of its experts, so that there are hits and misses."""

    def reload(backend: str | None, experts_k: int | None) -> Any:
        if experts_k == 65:
            raise ZeroDivisionError
        return flashmoe_mlx.load(demo_pack, backend or "pread", experts_k)

    options = {"backend": "ram_hybrid", "budget_gib": 0.002}
    with serve(demo_pack, engine_options=options, reload=reload) as running:
        yield running


class Watcher:
    """A client that reads the feed in a thread."""

    def __init__(self, live: Live, headers: Any = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.ended = threading.Event()
        self._live, self._headers = live, headers
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        try:
            with httpx2.stream("GET", self._live.url + STREAM, headers=self._headers, timeout=20) as answer:
                self._answer = answer
                for _, data in parse_events(answer.iter_lines()):
                    self.events.append(data)
        except httpx2.HTTPError:
            pass
        finally:
            self.ended.set()

    @property
    def frames(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == "frame"]

    def until(self, condition: Any, seconds: float = 10.0) -> None:
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < seconds
            time.sleep(0.01)


@contextmanager
def watching(live: Live, headers: Any = None) -> Iterator[Watcher]:
    """Read the feed until the block ends."""
    watcher = Watcher(live, headers)
    others = live.service.observatory.watchers
    watcher._thread.start()
    watcher.until(lambda: watcher.events or watcher.ended.is_set())
    try:
        yield watcher
    finally:
        if not watcher.ended.is_set():
            close(watcher)
        watcher._thread.join(10)
        assert not watcher._thread.is_alive()
        watcher.until(lambda: live.service.observatory.watchers == others)


def close(watcher: Watcher) -> None:
    """Leave in the middle of the stream."""
    stream = watcher._answer.extensions["network_stream"]
    stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def settle(live: Live, watcher: Watcher) -> None:
    """Wait until the engine is idle and its last frame has come."""
    live.wait_idle()
    total = live.service.worker.engine.store.stats().requests
    watcher.until(lambda: watcher.frames and watcher.frames[-1]["totals"]["requests"] == total)


def decoded(event: dict[str, Any], state: dict[str, Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the listed choices of a frame and whether each was read, both [tokens, layers, K]."""
    shape = len(event["positions"]), state["layers"], state["experts_k"]
    kind = np.uint8 if state["num_experts"] <= 256 else np.dtype("<u2")
    experts = np.frombuffer(base64.b64decode(event["experts"]), kind).reshape(shape)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(event["missed"]), np.uint8), bitorder="little")
    return experts, bits[: experts.size].reshape(shape)


def table(text: str, state: dict[str, Any]) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), "<u2").reshape(state["layers"], state["num_experts"])


def metrics(live: Live) -> dict[str, float]:
    lines = live.client.get("/metrics").text.splitlines()
    split = (line.rpartition(" ") for line in lines if line.startswith("flashmoe_expert_"))
    return {name.partition("{")[0].removeprefix("flashmoe_expert_"): float(value) for name, _, value in split}


def test_the_numbers_are_those_of_the_metrics_and_of_the_engine(watched: Live) -> None:
    with watching(watched) as watcher:
        before = watched.service.worker.engine.store.stats()
        records = len(watched.records)
        usage = watched.chat(max_tokens=24)["usage"]
        settle(watched, watcher)
        state = watcher.events[0]
        totals, counted = watcher.frames[-1]["totals"], metrics(watched)
    assert state["type"] == "state"
    assert (state["layers"], state["num_experts"], state["experts_k"]) == (8, 64, state["own_experts_k"])
    for name in ("requests", "hits", "misses", "evictions", "reads", "bytes_read", "prefetched", "bytes_wasted"):
        assert totals[name] == counted[f"{name}_total"], name
    assert totals["fetch_seconds"] == pytest.approx(counted["stall_seconds_total"], abs=1e-5)
    grown = watched.service.worker.engine.store.stats() - before
    decode = watched.records[records]["decode"]
    listed = {name: sum(sum(event["passes"][name]) for event in watcher.frames) for name in state_columns(watcher)}
    rests = [event["rest"] for event in watcher.frames if event["rest"]]
    rest = {name: sum(part[name] for part in rests) for name in ("prompt", "decoded", *listed)}
    assert listed["tokens"] + rest["decoded"] == decode["tokens"] == usage["completion_tokens"] - 1
    assert rest["prompt"] == usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    for name in ("requests", "misses", "bytes_read"):
        assert listed[name] + rest[name] == getattr(grown, name)
    assert 0 < grown.hits < grown.requests
    assert listed["seconds"] + sum(part["seconds"] for part in rests if not part["prompt"]) == pytest.approx(
        decode["seconds"], rel=1e-4
    )
    for event in watcher.frames:
        assert event["lost"] == 0
        experts, missed = decoded(event, state)
        assert missed.sum() == sum(event["passes"]["misses"])
        assert experts.size == sum(event["passes"]["requests"])  # one answer: every pass has one token
        if event["rest"]:
            assert table(event["rest"]["read"], state).sum() == event["rest"]["misses"]
            used = table(event["rest"]["used"], state)
            assert used.sum() == event["rest"]["tokens"] * state["layers"] * state["experts_k"]


def state_columns(watcher: Watcher) -> tuple[str, ...]:
    return tuple(watcher.frames[0]["passes"])


def test_experts_and_positions_are_those_of_the_routers(watched: Live) -> None:
    engine = watched.service.worker.engine
    seen: list[WatchedPass] = []
    with watching(watched) as watcher:
        receive = watched.service.observatory._receive
        engine.watch(lambda passed: (seen.append(passed), receive(passed)))
        watched.chat(max_tokens=12)
        settle(watched, watcher)
    state = watcher.events[0]
    tokens = {}
    for event in watcher.frames:
        experts, _ = decoded(event, state)
        tokens |= dict(zip(event["positions"], experts.tolist(), strict=True))
    decoding = [passed for passed in seen if passed.decoding]
    assert tokens == {
        position: [experts.ravel().tolist() for _, experts in passed.choices]
        for passed in decoding
        for position in passed.positions.values()
    }


def test_texts_are_only_for_their_own_watcher(watched: Live) -> None:
    body = {"model": "demo", "messages": [SUM], "temperature": 0, "max_tokens": 12}
    with (
        watching(watched, {observatory.SECRET: SECRET}) as own,
        watching(watched, {observatory.SECRET: SECRET[:-1] + "!"}) as other,
        watching(watched) as anonymous,
    ):
        mine = watched.post(headers={observatory.SECRET: SECRET}, **body)
        watched.post(headers={observatory.SECRET: ""}, **body)
        watched.post(**body)
        for watcher in (own, other, anonymous):
            settle(watched, watcher)
    texts: dict[int, str] = {}
    for event in own.frames:
        for answer, text in zip(event["answers"], event["texts"], strict=True):
            if text is not None:
                texts[answer] = texts.get(answer, "") + text
    message = mine["choices"][0]["message"]
    said = message.get("reasoning_content") or message["content"]
    assert len(texts) == 1
    assert said[:4] in texts.popitem()[1]
    assert len({answer for event in own.frames for answer in event["answers"]}) == 3
    for watcher in (other, anonymous):
        assert not [text for event in watcher.frames for text in event["texts"] if text is not None]
        sent = json.dumps(watcher.events)
        assert said[:4] not in sent
        assert "token" not in sent.replace('"tokens"', "").replace("own_experts", "")


def test_nothing_is_watched_without_a_watcher(watched: Live) -> None:
    meter = watched.service.worker.engine.runner.meter
    assert meter.watcher is None
    with watching(watched):
        assert meter.watcher is not None
        with watching(watched):
            pass
        assert meter.watcher is not None
    assert meter.watcher is None
    watched.chat(max_tokens=4)
    assert not watched.service.observatory._passes


def test_frames_come_at_most_five_times_a_second(watched: Live) -> None:
    with watching(watched) as watcher:
        start = time.monotonic()
        watched.chat(max_tokens=200, ignore_eos=True)
        settle(watched, watcher)
        seconds = time.monotonic() - start
    assert 1 <= len(watcher.frames) <= seconds / observatory.INTERVAL + 2


def test_watchers_are_limited(watched: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observatory, "_MOST_WATCHERS", 1)
    with watching(watched):
        refused = watched.client.get(STREAM)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_watchers")


def test_a_watcher_that_falls_behind_is_dropped(watched: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observatory, "_MOST_FRAMES", 0)
    with watching(watched) as watcher:
        watched.chat(max_tokens=4)
        assert watcher.ended.wait(10)
    assert not watcher.frames


def test_a_watcher_needs_the_key(demo_pack: Path) -> None:
    with serve(demo_pack, Policy((b"secret",))) as guarded:
        for path in ("/observatory/state", STREAM):
            assert guarded.client.get(path).status_code == 401
            assert guarded.client.get(path, headers={"host": "evil.com"}).status_code == 403
        with watching(guarded, {"authorization": "Bearer secret"}) as watcher:
            assert watcher.events[0]["backends"] == []
            refused = guarded.post("/observatory/engine", status=403, headers={"x-api-key": "secret"}, experts_k=1)
            assert refused["error"]["code"] == "no_switch"
            guarded.service.stopping = True
            assert watcher.ended.wait(10), "the stream of a server that stops goes on"


def test_the_engine_is_switched(watched: Live) -> None:
    with watching(watched) as watcher:
        first = watched.service.worker.engine
        changed = watched.post("/observatory/engine", experts_k=2, backend="mmap")
        assert (changed["experts_k"], changed["backend"]) == (2, "mmap")
        watched.chat(max_tokens=4)
        settle(watched, watcher)
        assert [event["experts_k"] for event in watcher.events if event["type"] == "state"] == [10, 2]
        assert all(len(decoded(event, changed)[0].shape) == 3 for event in watcher.frames)
        assert first.store._closed
        assert 'backend="mmap"' in watched.client.get("/metrics").text
        for fields, status in (({"experts_k": 65}, 500), ({"experts_k": 0}, 400), ({"backend": "tape"}, 400)):
            watched.post("/observatory/engine", status=status, **fields)
        assert watched.chat(max_tokens=4)["usage"]["completion_tokens"]


@pytest.mark.parametrize("decoding", [True, False])
def test_a_frame_is_bounded(decoding: bool) -> None:
    shape, random = Shape(60, 512, 10), np.random.default_rng(1)
    assert shape.room == MOST_CHOICES // 600 < MOST_TOKENS

    def one(number: int) -> WatchedPass:
        chosen = [(layer, random.permutation(512)[None, :10]) for layer in range(60)]
        misses = [(layer, tuple(experts[0, :3].tolist())) for layer, experts in chosen]
        sequence: Any = object()
        store = StoreStats(requests=600, hits=420, misses=180, bytes_read=180)
        return WatchedPass(decoding, {sequence: 1}, {sequence: number}, chosen, misses, 0.5, {"io": 0.25}, store)

    passes = [one(number) for number in range(200)]
    content, tokens = frame(passes, shape)
    listed = shape.room if decoding else 0
    assert [position for _, position in tokens] == list(range(200 - listed, 200))
    assert len(json.dumps(content)) < 2**18
    rest = content["rest"]
    assert (rest["decoded"], rest["prompt"]) == ((200 - listed, 0) if decoding else (0, 200))
    assert rest["misses"] + sum(content["passes"]["misses"]) == 200 * 180
    state = {"layers": 60, "num_experts": 512, "experts_k": 10}
    experts, missed = decoded(content, state)
    for place, passed in enumerate(passes[200 - listed :]):
        np.testing.assert_array_equal(experts[place], np.concatenate([chosen for _, chosen in passed.choices]))
        assert [set(row[bits > 0].tolist()) for row, bits in zip(experts[place], missed[place], strict=True)] == [
            set(found) for _, found in passed.misses
        ]
