"""Routes of the observatory: its state, its stream of frames, and the change of the engine."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from flashmoe_mlx.server.calls import read_fields, service_of
from flashmoe_mlx.server.observatory import SECRET, describe
from flashmoe_mlx.server.service import Service
from flashmoe_mlx.server.streaming import KEEP_ALIVE, Receive, Scope, Send, frame
from flashmoe_mlx.stores.registry import backend_names

_MOST_EXPERTS = 2**16
_LONGEST_NAME = 64


def _state(service: Service) -> dict[str, Any]:
    return {
        **describe(service.engine),
        "model": service.settings.name,
        "backends": backend_names() if service.settings.reload is not None else [],
        "watchers": service.observatory.watchers,
        "waiting": service.worker.waiting,
        "running": service.worker.running,
    }


async def state(request: Request) -> Response:
    """Return the model, its store with its counters, and the backends to which the engine may be switched."""
    return JSONResponse(_state(service_of(request)))


async def events(request: Request) -> Response:
    """Stream the state and then frames, each as the JSON of a server-sent event; see ``observed.frame``."""
    service = service_of(request)
    first = _state(service)  # refused while the model loads
    service.observatory.refuse_crowd()
    frames = _frames(service, request.headers.get(SECRET, ""), first)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return _Stream(frames, media_type="text/event-stream", headers=headers)


class _Stream(StreamingResponse):
    """A response that ends its generator when the client goes, wherever the generator is."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def _frames(service: Service, secret: str, first: dict[str, Any]) -> AsyncGenerator[bytes]:
    quiet = 0.0
    yield frame(first)
    async with aclosing(service.observatory.frames(secret)) as contents:
        async for content in contents:
            if service.stopping:
                return
            if content is not None:
                yield b"data: " + content + b"\n\n"
            quiet = 0.0 if content is not None else quiet + 1.0
            if quiet >= KEEP_ALIVE:
                quiet = 0.0
                yield b":\n\n"


async def change_engine(request: Request) -> Response:
    """Load the model with another ``backend`` or ``experts_k``; return the new state."""
    service, fields = service_of(request), await read_fields(request)
    backend = fields.text("backend", _LONGEST_NAME)
    if backend is not None and backend not in backend_names():
        fields.refuse("backend", f"must be one of {', '.join(backend_names())}", code="unknown_backend")
    await service.change_engine(backend, fields.integer("experts_k", 1, _MOST_EXPERTS))
    return JSONResponse(_state(service))
