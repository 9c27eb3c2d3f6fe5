"""One connection: HTTP/1.1 with limits of number and time, which uvicorn lacks."""

import asyncio
import resource
from collections.abc import Awaitable, Callable

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashmoe_mlx.server.errors import ApiError, openai_error
from flashmoe_mlx.server.streaming import Receive, Scope, Send, start_message, to_json

_MOST_CONNECTIONS = 256
_SLOWEST_REQUEST = 20.0
"""Seconds between the end of a response, or the beginning of the connection, and the last header of a request."""
_SLOWEST_OUTPUT = 60.0
"""Seconds for which a client may leave its output unread."""
_CROWDED = ApiError("too many connections are open", status=503, code="too_many_connections", retry_after=5)
_MALFORMED = ApiError("the request is not valid HTTP/1.1", code="invalid_http")


def most_connections() -> int:
    """Return the number of connections that are served at once, so that three in four descriptors remain for files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if limit == resource.RLIM_INFINITY else min(_MOST_CONNECTIONS, limit // 4)


class Connection(H11Protocol):
    """A connection that ends if its client neither sends requests nor reads responses in time."""

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    _request_timer: asyncio.TimerHandle | None = None
    _output_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Limit the number of connections: above it, requests are refused, and above its double, connections."""
        super().connection_made(transport)
        most = most_connections()
        if len(self.connections) > 2 * most:
            transport.abort()
            return
        self._served = _refuse if len(self.connections) > most else self.app
        self.app = self._answer
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch_request()

    def pause_writing(self) -> None:
        """Wait until the client reads."""
        super().pause_writing()
        self._watch_output()

    def resume_writing(self) -> None:
        """Go on after the client has read."""
        super().resume_writing()
        _cancel(self._output_timer)
        self._output_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything that belongs to the connection."""
        super().connection_lost(exc)
        _cancel(self._request_timer)
        _cancel(self._output_timer)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's message says less
        """Answer bytes that are not HTTP, unless another answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = to_json(openai_error(_MALFORMED))
            headers = [
                ("content-type", "application/json"),
                ("connection", "close"),
                ("content-length", str(len(body))),
            ]
            response = h11.Response(status_code=400, headers=headers, reason="Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._served(scope, receive, send)
        finally:
            self.loop.call_soon(self._watch_end)

    def _watch_request(self) -> None:
        """Limit the time until the next request, while none is in progress."""
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._request_timer)
            self._request_timer = None
        elif self._request_timer is None and not self.transport.is_closing():
            self._request_timer = self.loop.call_later(_SLOWEST_REQUEST, self._close)

    def _watch_output(self) -> None:
        if self._output_timer is None:
            self._output_timer = self.loop.call_later(_SLOWEST_OUTPUT, self.transport.abort)

    def _watch_end(self) -> None:
        """Limit the time in which the client reads the end of a connection that closes."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch_output()

    def _close(self) -> None:
        self._request_timer = None
        self.transport.close()
        self._watch_end()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001  # the signature of ASGI
    body = to_json(openai_error(_CROWDED))
    headers = {"content-type": "application/json", "connection": "close", "content-length": str(len(body))}
    await send(start_message(_CROWDED.status, {**headers, **_CROWDED.headers}))
    await send({"type": "http.response.body", "body": body})


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
