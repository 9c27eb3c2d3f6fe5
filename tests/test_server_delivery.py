"""The way of events from the engine's thread to the responses: in order, and never later than promised."""

import heapq
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import SUM, Live

from flashmoe_mlx.server import answer
from flashmoe_mlx.server.answer import TOGETHER, Answer
from flashmoe_mlx.server.events import (
    CallArguments,
    CallEnded,
    CallStarted,
    Event,
    Finished,
    Prefilled,
    Reasoning,
    Started,
    Text,
    Usage,
    joined,
)

START, PREFILLED, END = Started(Usage(1)), Prefilled(1, 2), Finished("stop", Usage(1))
DELAYS = st.sampled_from([0.0, TOGETHER / 8, TOGETHER / 2, TOGETHER, 2 * TOGETHER])


class Loop:
    """An event loop with a clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wakes = 0
        self._timers: list[tuple[float, int, Any, Callable[[], object]]] = []
        self._number = count()

    def call_soon(self, work: Callable[[], object]) -> None:
        self.call_later(0, work)

    def call_soon_threadsafe(self, work: Callable[[], object]) -> None:
        self.wakes += 1
        self.call_later(0, work)

    def call_later(self, seconds: float, work: Callable[[], object]) -> Any:
        timer = Timer()
        heapq.heappush(self._timers, (self.now + seconds, next(self._number), timer, work))
        return timer

    def run_until(self, end: float) -> None:
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer, work = heapq.heappop(self._timers)
            if not timer.cancelled:
                work()
        self.now = end


class Timer:
    """A timer of ``Loop``."""

    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Delivered(Answer):
    """An answer that notes the time of each delivery."""

    def __init__(self, loop: Loop) -> None:
        unused: Any = None
        super().__init__(unused, loop)  # type: ignore[arg-type]
        self.clock = loop
        self.times: list[float] = []
        self.stream()

    def wake(self) -> None:
        self.times += [self.clock.now] * (len(self.events) - len(self.times))


@given(st.lists(st.tuples(DELAYS, st.booleans()), max_size=20), st.integers(0, 3))
def test_no_event_waits_longer_than_promised(outputs: list[tuple[float, bool]], reports: int) -> None:
    """``outputs``: the delay before each text, and whether the event loop runs before the next event."""
    loop = Loop()
    answer = Delivered(loop)
    posted: list[tuple[float, Event]] = []

    def post(event: Event, *, runs: bool = True) -> None:
        posted.append((loop.now, event))
        answer.post([event])
        if runs:
            loop.run_until(loop.now)

    for event in (START, *[PREFILLED] * reports):
        post(event)
    for number, (delay, runs) in enumerate(outputs):
        loop.run_until(loop.now + delay)
        post(Text(str(number)), runs=runs)
    post(END)
    waits = [later - earlier for later, (earlier, _) in zip(answer.times, posted, strict=True)]
    assert answer.events == [event for _, event in posted]
    assert answer.complete
    assert max(waits) <= TOGETHER + 1e-9
    assert waits[: 1 + reports] == [0.0] * (1 + reports)
    assert waits[-1] == 0
    for index in range(1 + reports, len(waits) - 1):
        slow = posted[index][0] - posted[index - 1][0] >= TOGETHER
        if index == 1 + reports or (slow and posted[index - 1][0] == answer.times[index - 1]):
            assert waits[index] < 1e-9


def test_slow_tokens_arrive_at_once_and_fast_ones_together() -> None:
    for step, tokens, most_wakes in ((2 * TOGETHER, 20, 22), (TOGETHER / 10, 100, 3)):
        loop = Loop()
        answer = Delivered(loop)
        answer.post([START])
        loop.run_until(1.0)
        for number in range(tokens):
            answer.post([Text(str(number))])
            loop.run_until(loop.now + step)
        answer.post([END])
        loop.run_until(loop.now)
        assert loop.wakes <= most_wakes
        assert len(set(answer.times)) == (22 if step > TOGETHER else pytest.approx(2 + tokens / 10, abs=2))


def test_an_answer_that_nobody_streams_wakes_the_loop_once() -> None:
    loop = Loop()
    unused: Any = None
    waiting = Answer(unused, loop)  # type: ignore[arg-type]
    posted = [START, PREFILLED, *(Text(str(number)) for number in range(100)), END]
    for event in posted:
        waiting.post([event])
        loop.run_until(loop.now + TOGETHER)
    assert (loop.wakes, waiting.events) == (1, posted)


@given(st.integers(0, 3))
def test_a_stream_that_begins_late_has_all_events(before: int) -> None:
    loop = Loop()
    unused: Any = None
    waiting = Answer(unused, loop)  # type: ignore[arg-type]
    posted = [START, Text("a"), Text("b"), END]
    for event in posted[:before]:
        waiting.post([event])
    waiting.stream()
    assert waiting.events == posted[:before]
    for event in posted[before:]:
        waiting.post([event])
    loop.run_until(TOGETHER)
    assert waiting.events == posted


def test_a_stream_of_a_live_server_holds_nothing_back(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an endless collection, the first token and the end come all the same, and nothing is lost."""
    monkeypatch.setattr(answer, "TOGETHER", 1000.0)
    whole = live.chat(max_tokens=30)["choices"][0]["message"]
    deltas = [event["choices"][0]["delta"] for event in live.stream(messages=[SUM], max_tokens=30)[:-1]]
    parts = [delta for delta in deltas if delta.keys() & {"content", "reasoning_content"} and "role" not in delta]
    for field in ("content", "reasoning_content"):
        assert "".join(delta.get(field, "") for delta in parts) == whole.get(field, "")
    assert len(parts) <= 2  # the first output, and the rest


TEXTS = st.text("ab", max_size=2)
EVENTS = st.one_of(
    st.builds(Text, TEXTS),
    st.builds(Reasoning, TEXTS),
    st.builds(CallStarted, st.integers(0, 1), st.just("id"), st.just("name")),
    st.builds(CallArguments, st.integers(0, 1), TEXTS),
    st.builds(CallEnded, st.integers(0, 1)),
)


@given(st.lists(EVENTS, max_size=12))
def test_joined_events_say_the_same(events: list[Event]) -> None:
    """Split into single characters, both lists are equal; neighbors in the result differ in kind or call."""

    def split(listed: list[Event]) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for event in listed:
            match event:
                case Text(text) | Reasoning(text):
                    found += [(type(event), letter) for letter in text]
                case CallArguments(index, text):
                    found += [(index, letter) for letter in text]
                case _:
                    found.append((event,))
        return found

    result = joined(events)
    assert split(result) == split(events)
    for first, second in pairwise(result):
        if type(first) is type(second) and not isinstance(first, CallStarted | CallEnded):
            assert isinstance(first, CallArguments)
            assert isinstance(second, CallArguments)
            assert first.index != second.index
