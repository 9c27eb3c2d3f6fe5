"""One HTTP request that the engine answers: its body, and the way from there to a response."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from flashmoe_mlx.server.answer import Answer, Prepared
from flashmoe_mlx.server.errors import ApiError
from flashmoe_mlx.server.events import Event
from flashmoe_mlx.server.fields import Fields, parse_body
from flashmoe_mlx.server.observatory import SECRET
from flashmoe_mlx.server.service import Service, digest_of
from flashmoe_mlx.server.streaming import EventStream, StreamFormat, WholeAnswer

_RETRIES = "x-stainless-retry-count"
"""A header of the SDKs of OpenAI and Anthropic: how often the request was repeated."""

_PARSED_AT_ONCE = 2**16
"""Bytes of the largest bodies that are parsed in the event loop."""


def service_of(request: Request) -> Service:
    """Return the service behind ``request``."""
    service: Service = request.app.state.service
    return service


async def read_fields(request: Request) -> Fields:
    """Return the fields of a request's body.

    Raises:
        ApiError: the body is not a JSON object.
    """
    _, fields = await _read(request)
    return fields


async def _read(request: Request) -> tuple[bytes, Fields]:
    """Return the body of a request and its fields; large ones are parsed outside the event loop."""
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ApiError("the client has gone", status=408, code="client_gone") from None
    if len(body) <= _PARSED_AT_ONCE:
        return body, Fields(parse_body(body))
    return body, Fields(await service_of(request).outside(lambda: parse_body(body)))


class Call:
    """A request for an answer.

    Attributes:
        fields: the fields of the body.
        service: the service.
    """

    def __init__(self, request: Request, body: bytes, fields: Fields) -> None:
        self.fields: Fields = fields
        self.service: Service = service_of(request)
        self._digest = digest_of(request.url.path, body)
        self._secret = request.headers.get(SECRET, "")
        retries = request.headers.get(_RETRIES)
        self._repeats = retries is not None
        self._announced = retries is not None and retries.isdecimal() and int(retries[:9]) > 0

    @classmethod
    async def read(cls, request: Request) -> "Call":
        """Read the body of ``request``.

        Raises:
            ApiError: the body is not a JSON object.
        """
        return cls(request, *await _read(request))

    async def answers(self, prepare: Sequence[Callable[[], Awaitable[Prepared]]]) -> list[Answer]:
        """Return several answers; see ``answer``. If one is refused, all are cancelled."""
        found: list[Answer] = []
        try:
            for index, make in enumerate(prepare):
                earlier = self.service.repeated(f"{self._digest}:{index}", announced=self._announced)
                found.append(earlier or self.service.submit(await make(), self._secret))
        except BaseException:
            for answer in found:
                answer.cancel()
            raise
        return found

    async def answer(self, prepare: Callable[[], Awaitable[Prepared]]) -> Answer:
        """Return the answer: one in progress to the same request, or a new one after ``prepare``.

        Raises:
            ApiError: the request is refused.
        """
        (found,) = await self.answers([prepare])
        return found

    def stream(self, answer: Answer, stream_format: StreamFormat) -> EventStream:
        """Return the response that streams ``answer``."""
        return EventStream(self.service, [answer], self._digest, stream_format, repeats=self._repeats)

    def whole(self, answers: Sequence[Answer], build: Callable[[list[list[Event]]], Mapping[str, Any]]) -> WholeAnswer:
        """Return the response with all ``answers``, which ``build`` makes from the events of each."""
        return WholeAnswer(self.service, answers, self._digest, build, repeats=self._repeats)
