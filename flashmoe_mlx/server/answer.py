"""An answer in progress: the events that the engine's thread adds and that responses read."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sequence import Sequence as GeneratedSequence
from flashmoe_mlx.server.events import Event, Failed, Finished
from flashmoe_mlx.text.tool_calls import ToolCallReader


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

    Everything but ``cancelled`` and ``sequence`` belongs to the thread of the event loop.

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

    def publish(self, events: Sequence[Event]) -> None:
        """Add events and wake the readers."""
        self.events += events
        self.wake()

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
