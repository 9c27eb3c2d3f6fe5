"""Responses that follow an answer: server-sent events, or one JSON document when the answer is complete.

Both cancel the answer when the client goes, and keep the connection alive while nothing happens. The engine never waits
for them. ``connection.py`` gives up on a client that does not read.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from flashmoe_mlx.server.answer import Answer
from flashmoe_mlx.server.errors import ApiError, error_body
from flashmoe_mlx.server.events import Event, Failed, joined
from flashmoe_mlx.server.service import Service

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

KEEP_ALIVE = 10.0
"""Seconds without output after which a sign of life is sent."""


class StreamFormat(Protocol):
    """The form in which an API streams an answer."""

    def opening(self) -> bytes:
        """Return what is sent at once, before the prompt is processed."""
        ...

    def frames(self, event: Event) -> bytes:
        """Return the server-sent events of ``event``; those of the last event end the stream."""
        ...

    def ping(self) -> bytes:
        """Return a sign of life."""
        ...


def to_json(content: Any) -> bytes:
    """Return ``content`` as JSON in UTF-8; half of a surrogate pair becomes an escape."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def frame(content: Any, name: str | None = None) -> bytes:
    """Return a server-sent event with the JSON of ``content``, named if ``name`` is given."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + to_json(content) + b"\n\n"


@dataclass
class _Connection:
    """The state of the connection to a client.

    Attributes:
        gone: whether the client has gone.
        delivered: whether a part of the answer was sent.
    """

    gone: bool = False
    delivered: bool = False


class Following:
    """The base of both responses.

    Args:
        service: the service.
        answers: the answers, in the order of their events.
        digest: the digest of the request.
        repeats: whether the client repeats requests after a timeout.
    """

    def __init__(self, service: Service, answers: Sequence[Answer], digest: str, *, repeats: bool) -> None:
        self._service = service
        self._answers = answers
        self._takeovers = [answer.takeovers for answer in answers]
        self._digest = digest
        self._repeats = repeats

    @asynccontextmanager
    async def _following(self, receive: Receive) -> AsyncIterator[_Connection]:
        """Watch for the end of the connection, and leave the answers afterwards."""
        connection = _Connection()
        for index, answer in enumerate(self._answers):
            answer.readers += 1
            self._service.keep(f"{self._digest}:{index}", answer)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            connection.gone = True
            for answer in self._answers:
                answer.wake()

        watcher = asyncio.create_task(watch())
        try:
            yield connection
        finally:
            watcher.cancel()
            repeats = self._repeats and connection.gone
            for index, answer in enumerate(self._answers):
                answer.readers -= 1
                if not answer.readers:
                    digest = f"{self._digest}:{index}"
                    self._service.leave(digest, answer, delivered=connection.delivered, repeats=repeats)

    async def _batches(self) -> AsyncIterator[list[Event]]:
        """Yield the events of all answers, one answer after the other; see ``Answer.batches``."""
        for answer in self._answers:
            async for batch in answer.batches(KEEP_ALIVE):
                yield batch

    def _failure(self) -> ApiError | None:
        """Return the error of the first answer that failed."""
        last = [answer.events[-1] for answer in self._answers]
        return next((event.error for event in last if isinstance(event, Failed)), None)

    @property
    def _superseded(self) -> bool:
        """Whether a repeated request has taken the answers over."""
        return [answer.takeovers for answer in self._answers] != self._takeovers


async def _write(send: Send, body: bytes) -> None:
    """Send a part of the body."""
    await send({"type": "http.response.body", "body": body, "more_body": True})


class EventStream(Following):
    """A stream of server-sent events.

    A response that ends without its last part makes the server close the connection, so that no client takes a part of
    an answer for the whole.
    """

    def __init__(
        self, service: Service, answers: Sequence[Answer], digest: str, stream_format: StreamFormat, *, repeats: bool
    ) -> None:
        super().__init__(service, answers, digest, repeats=repeats)
        self._format = stream_format
        for answer in answers:
            answer.stream()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # the signature of ASGI
        """Send the response."""
        async with self._following(receive) as connection:
            with suppress(OSError):
                await send(start_message(200, {"content-type": "text/event-stream; charset=utf-8", **_STREAM_HEADERS}))
                await _write(send, self._format.opening())
                async for batch in self._batches():
                    if connection.gone or self._superseded:
                        return
                    body = b"".join(map(self._format.frames, joined(batch))) if batch else self._format.ping()
                    if body:
                        await _write(send, body)
                        connection.delivered |= bool(batch)
                if self._failure() is not None:
                    return
                await send({"type": "http.response.body", "body": b"", "more_body": False})


class WholeAnswer(Following):
    """A JSON document, sent when the answer is complete.

    After ``KEEP_ALIVE`` seconds the headers are sent, and then a space from time to time, so that neither the client
    nor a proxy gives up. An error after that closes the connection.
    """

    def __init__(
        self,
        service: Service,
        answers: Sequence[Answer],
        digest: str,
        build: Callable[[list[list[Event]]], Mapping[str, Any]],
        *,
        repeats: bool,
    ) -> None:
        super().__init__(service, answers, digest, repeats=repeats)
        self._build = build

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        headers = {"content-type": "application/json"}
        begun = False
        async with self._following(receive) as connection:
            with suppress(OSError):
                async for batch in self._batches():
                    if connection.gone or self._superseded:
                        return
                    if not batch:
                        if not begun:
                            begun = True
                            await send(start_message(200, headers))
                        await _write(send, b" ")
                error = self._failure()
                if error is None:
                    body = to_json(self._build([answer.events for answer in self._answers]))
                elif begun:
                    return
                else:
                    body = to_json(error_body(scope["path"], error))
                if not begun:
                    status, extra = (200, {}) if error is None else (error.status, error.headers)
                    await send(start_message(status, {**headers, **extra, "content-length": str(len(body))}))
                await _write(send, body)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                connection.delivered = True


_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def start_message(status: int, headers: Mapping[str, str]) -> Message:
    """Return the message of ASGI that begins a response."""
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}
