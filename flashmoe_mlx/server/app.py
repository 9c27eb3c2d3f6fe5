"""The application: its routes, its checks, and its errors."""

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashmoe_mlx.server import (
    anthropic_messages,
    observatory_routes,
    openai_chat,
    openai_completions,
    openai_responses,
    pages,
    status,
)
from flashmoe_mlx.server.errors import ApiError, as_api_error, error_body
from flashmoe_mlx.server.middleware import Guard, Policy
from flashmoe_mlx.server.service import Service
from flashmoe_mlx.server.streaming import Following

Handler = Callable[[Request], Awaitable[Response | Following]]
_REASONS = {404: "there is no such path", 405: "this path does not take this method"}
ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/", pages.page),
    ("GET", "/web/{name:path}", pages.page),
    ("GET", "/health", status.health),
    ("GET", "/metrics", status.metrics),
    ("GET", "/observatory/state", observatory_routes.state),
    ("GET", "/observatory/events", observatory_routes.events),
    ("POST", "/observatory/engine", observatory_routes.change_engine),
    ("GET", "/v1/models", status.list_models),
    ("GET", "/v1/models/{name:path}", status.get_model),
    ("POST", "/v1/chat/completions", openai_chat.chat_completions),
    ("POST", "/v1/responses", openai_responses.responses),
    ("POST", "/v1/messages", anthropic_messages.messages),
    ("POST", "/v1/messages/count_tokens", anthropic_messages.count_tokens),
    ("POST", "/v1/completions", openai_completions.completions),
    ("POST", "/tokenize", status.tokenize),
    ("POST", "/detokenize", status.detokenize),
    ("GET", "/tokenizer_info", status.tokenizer_info),
    ("POST", "/apply-template", status.apply_template),
]
"""Method, path and handler of every route."""


def make_app(service: Service, policy: Policy) -> Guard:
    """Return the ASGI application of ``service``."""
    routes = [Route(path, _answering_errors(handler), methods=[method]) for method, path, handler in ROUTES]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _answer_missing})
    app.state.service = service
    return Guard(app, policy)


def _answering_errors(handler: Handler) -> Handler:
    """Return ``handler`` with its errors as responses."""

    async def endpoint(request: Request) -> Response | Following:
        try:
            return await handler(request)
        except Exception as error:
            return _response(request, as_api_error(error))

    return endpoint


async def _answer_missing(request: Request, error: Exception) -> Response:
    """Return the response for a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    reason = _REASONS.get(error.status_code, error.detail)
    return _response(request, ApiError(reason, status=error.status_code, code="no_such_path"))


def _response(request: Request, error: ApiError) -> Response:
    return JSONResponse(error_body(request.url.path, error), status_code=error.status, headers=error.headers)
