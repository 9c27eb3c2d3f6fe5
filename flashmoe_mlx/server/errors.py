"""Errors of requests over HTTP, and the bodies that report them."""

import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from flashmoe_mlx.errors import FlashMoeError, InputError

_log = logging.getLogger(__name__)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
_ANTHROPIC_TYPES = {"unavailable_error": "overloaded_error", "server_error": "api_error"}
"""The names of types of errors that differ in the Anthropic API."""


class ApiError(InputError):
    """An error that is answered with an HTTP status; most are mistakes in the request.

    Args:
        message: as for every ``FlashMoeError``; clients show it to people.
        status: the HTTP status.
        code: the kind of failure, for programs.
        param: the field of the request at fault, such as ``messages[2].content``.
        retry_after: seconds after which the request may succeed; None if repeating the request cannot help.
    """

    default_code = "invalid_value"

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.param = param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """The ``type`` of the error in the OpenAI and Anthropic APIs."""
        return _TYPES.get(self.status, "server_error")

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer, which tell clients whether to send the request again."""
        if self.retry_after is not None:
            return {"retry-after": str(self.retry_after)}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def as_api_error(error: BaseException) -> ApiError:
    """Return the answer to a request that failed with ``error``; the details of internal failures go to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        if error.code == "not_enough_memory":
            return ApiError(str(error), status=503, code=error.code)
        code = "context_length_exceeded" if error.code == "prompt_too_long" else error.code
        return ApiError(str(error), code=code)
    if isinstance(error, FlashMoeError):
        _log.error("a request failed: %s", error)
        return ApiError(str(error), status=500, code=error.code)
    _log.error("a request failed", exc_info=error)
    return ApiError(
        "the server failed to answer this request; its log has the details", status=500, code="internal_error"
    )


def openai_error(error: ApiError) -> dict[str, Any]:
    """Return the body of an error in the form of the OpenAI API."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return the body of an error in the form of the Anthropic API."""
    kind = _ANTHROPIC_TYPES.get(error.kind, error.kind)
    return {
        "type": "error",
        "error": {"type": kind, "message": str(error)},
        "request_id": f"req_{uuid.uuid4().hex}",
    }


ERROR_FORMS: dict[str, Callable[[ApiError], Mapping[str, Any]]] = {"/v1/messages": anthropic_error}
"""The form of error bodies by the beginning of the path; every other path has the form of the OpenAI API."""


def error_body(path: str, error: ApiError) -> Mapping[str, Any]:
    """Return the body that reports ``error`` to a client of the API at ``path``."""
    form = next((form for prefix, form in ERROR_FORMS.items() if path.startswith(prefix)), openai_error)
    return form(error)
