"""An answer in progress: the events that the engine's thread adds and that responses read."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sequence import Sequence as GeneratedSequence
from flashmoe_mlx.server.events import Event, Failed, Finished, Prefilled, Started
from flashmoe_mlx.text.tool_calls import ToolCallReader

TOGETHER = 0.05
"""Seconds for which the events of a fast model are collected before the event loop wakes again."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is ready for the engine.

    Attributes:
        request: the tokens and options.
        tool_reader: reads calls in the answer; None leaves the text as it is.
        generates: whether tokens follow the prompt; false if only the log probabilities of the prompt are wanted.
    """

    request: Request
    tool_reader: ToolCallReader | None = None
    generates: bool = True


class Answer:
    """The events of one answer, kept until the answer is complete, so that a repeated request can take it over.

    Everything but ``post``, ``cancelled`` and ``sequence`` belongs to the thread of the event loop.

    Args:
        prepared: the request.
        loop: the event loop of the responses.
        secret: what the request shares with a watcher of the observatory, or nothing.
        now: a monotonic clock.
    """

    def __init__(
        self,
        prepared: Prepared,
        loop: asyncio.AbstractEventLoop,
        secret: str = "",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.prepared = prepared
        self.secret = secret
        self.loop = loop
        self.events: list[Event] = []
        self.created: float = now()
        self.cancelled: bool = False
        """Whether nobody waits for the answer any more."""
        self.sequence: GeneratedSequence | None = None
        """The sequence, from the queue's end to the answer's end: it holds the keys, values and states."""
        self.readers = 0
        """The number of responses that read the events."""
        self.takeovers = 0
        """The number of repeated requests that took over the answer."""
        self._waiters: list[asyncio.Future[None]] = []
        self._posted: deque[Event] = deque()
        """Events that the event loop has not taken yet."""
        self._streamed = False
        """Whether a response sends events before the answer is complete."""
        self._wakes = True
        """Whether the next event of a streamed answer wakes the event loop."""
        self._timer: asyncio.TimerHandle | None = None
        """The next time at which the event loop looks for events without being woken."""

    @property
    def complete(self) -> bool:
        """Whether the last event has come."""
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)

    def cancel(self) -> None:
        """End the answer at the next layer."""
        self.cancelled = True
        sequence = self.sequence
        if sequence is not None:
            sequence.cancel()

    def stream(self) -> None:
        """Deliver events as they come from now on, not only at the end of the answer."""
        self._streamed = True
        self._take()

    def post(self, events: Sequence[Event]) -> None:
        """Add events, in the engine's thread.

        Events of a streamed answer reach the event loop at once, except that output of a fast model is collected for
        ``TOGETHER`` seconds after the latest delivery of output. Each delivery costs the engine time, because the event
        loop then takes the interpreter's lock and a processor. The first output and the last event never wait. An
        answer that nobody streams is delivered at its end.
        """
        self._posted.extend(events)
        if (self._streamed and self._wakes) or isinstance(events[-1], Finished | Failed):
            self._wakes = False
            self.loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        """Deliver the posted events; look again after ``TOGETHER`` seconds if there was output."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        taken = [self._posted.popleft() for _ in range(len(self._posted))]
        if taken:
            self.events += taken
            self.wake()
        if self.complete:
            return
        if all(isinstance(event, Started | Prefilled) for event in taken):
            self._wakes = True
            if self._posted:  # by the engine's thread, before it could see that
                self.loop.call_soon(self._take)
        else:
            self._timer = self.loop.call_later(TOGETHER, self._take)

    def wake(self) -> None:
        """Let readers look for events, or for the end of their connection."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def batches(self, interval: float) -> AsyncIterator[list[Event]]:
        """Yield the events in batches, from the first event; an empty list after ``interval`` seconds without one."""
        given = 0
        while True:
            if given < len(self.events):
                batch = self.events[given:]
                given += len(batch)
                yield batch
                if self.complete and given == len(self.events):
                    return
            else:
                await self._wait(interval)
                if given == len(self.events):
                    yield []

    async def _wait(self, seconds: float) -> None:
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._waiters.append(waiter)
        timer = self.loop.call_later(seconds, _set, waiter)
        try:
            await waiter
        finally:
            timer.cancel()


def _set(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
