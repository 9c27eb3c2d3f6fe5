"""Checks of every request before its route: Host, Origin, API key, type and size of the body.

A request is refused unless it passes, so a new route is protected without doing anything. The only open routes are
/health and the files of the web page.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from flashmoe_mlx.server.errors import ApiError, error_body
from flashmoe_mlx.server.pages import PAGES
from flashmoe_mlx.server.streaming import Message, Receive, Scope, Send, to_json

LARGEST_BODY = 32 * 2**20
_LARGEST_HEADERS = 2**16
_SLOWEST_BODY = 60.0
"""Seconds in which the whole body must arrive."""
_OPEN = frozenset({"/health", *PAGES})
"""Paths that need no key."""
_LOCAL = ("localhost",)


@dataclass(frozen=True)
class Policy:
    """What the server accepts.

    Attributes:
        keys: the accepted API keys; none for a server without keys.
        names: further host names by which clients may address the server.
        origins: origins of web pages that may use the server, such as ``https://chat.example.org``.
    """

    keys: tuple[bytes, ...] = ()
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Guard:
    """ASGI middleware that checks every request.

    Args:
        app: the application.
        policy: the accepted hosts, origins and keys.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], policy: Policy) -> None:
        self._app = app
        self._policy = policy
        self._names = {*_LOCAL, *(name.lower() for name in policy.names)}
        self._origins = {_origin(origin) for origin in policy.origins} - {None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an error."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        allowed: str | None = None
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > _LARGEST_HEADERS:
                raise ApiError("the headers are too large", status=431, code="headers_too_large")
            headers = _headers(scope)
            host = self._check_host(scope, headers)
            allowed = self._check_origin(scope, headers, host)
            if allowed and scope["method"] == "OPTIONS":
                await _answer(send, 204, b"", _cors(allowed))
                return
            if scope["path"] not in _OPEN:
                self._check_key(headers)
            self._check_body(scope, headers)
        except ApiError as error:
            extra = {**error.headers, "connection": "close", **(_cors(allowed) if allowed else {})}
            await _answer(send, error.status, to_json(error_body(scope["path"], error)), extra)
            return
        await self._app(scope, _limited(receive), _with_headers(send, allowed))

    def _check_host(self, scope: Scope, headers: dict[str, list[str]]) -> str:
        """Refuse names that are not the server's: a web page may let its own name point at this machine."""
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not scope["path"].startswith("/"):
            raise ApiError("a request needs one Host header and a path", code="invalid_host")
        host = hosts[0].lower()
        try:
            name = urlsplit(f"//{host}").hostname or ""
            plain = not set(host) & set("/@?#\\ ") and name != ""
        except ValueError:
            plain, name = False, ""
        if not plain or not (name in self._names or _is_address(name)):
            raise ApiError(
                f"the host {host[:80]!r} is not a name of this server; server.names lists further names",
                status=403,
                code="invalid_host",
            )
        return host

    def _check_origin(self, scope: Scope, headers: dict[str, list[str]], host: str) -> str | None:
        """Refuse requests of foreign web pages; return an allowed origin."""
        origins = headers.get("origin", [])
        if not origins:
            if headers.get("sec-fetch-site", [""])[0] == "cross-site" and not _opens_page(scope, headers):
                raise ApiError("requests of other web sites are refused", status=403, code="invalid_origin")
            return None
        origin = _origin(origins[0])
        if len(origins) == 1 and origin is not None:
            if origin in self._origins:
                return origins[0]
            if origin == _origin(f"{scope['scheme']}://{host}"):
                return None
        raise ApiError(
            f"requests of web pages from {origins[0][:80]!r} are refused; server.origins lists allowed origins",
            status=403,
            code="invalid_origin",
        )

    def _check_key(self, headers: dict[str, list[str]]) -> None:
        if not self._policy.keys:
            return
        given = [value.removeprefix("Bearer ").strip() for value in headers.get("authorization", [])]
        given += headers.get("x-api-key", [])
        matches = [
            hmac.compare_digest(value.encode("latin-1", "replace"), key) for value in given for key in self._policy.keys
        ]
        if not any(matches):
            raise ApiError(
                "this server needs its API key: send it as Authorization: Bearer or as x-api-key",
                status=401,
                code="invalid_api_key",
            )

    def _check_body(self, scope: Scope, headers: dict[str, list[str]]) -> None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        kind = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("the body must have Content-Type: application/json", status=415, code="unsupported_type")
        lengths = headers.get("content-length", ["0"])
        if not lengths[0].isdigit() or int(lengths[0][:20]) > LARGEST_BODY:
            raise _too_large()


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _origin(text: str) -> tuple[str, str, int] | None:
    """Return the scheme, host and port of an origin; None if it is not exactly that."""
    try:
        parts = urlsplit(text.lower())
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        return None
    if not parts.hostname or "@" in parts.netloc or parts.path or parts.query or parts.fragment:
        return None
    return parts.scheme, parts.hostname, port


def _opens_page(scope: Scope, headers: dict[str, list[str]]) -> bool:
    """Return whether a link on another site opens the web page in a tab."""
    fetched = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return scope["method"] == "GET" and scope["path"] == "/" and fetched == (["navigate"], ["document"])


def _cors(origin: str) -> dict[str, str]:
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization, content-type, x-api-key, anthropic-version, anthropic-beta",
        "access-control-max-age": "600",
        "vary": "origin",
    }


def _too_large() -> ApiError:
    return ApiError(f"the body is larger than {LARGEST_BODY} bytes", status=413, code="body_too_large")


def _limited(receive: Receive) -> Receive:
    """Limit the size of the body and the time in which it arrives."""
    size = 0
    complete = False
    deadline = asyncio.get_running_loop().time() + _SLOWEST_BODY

    async def limited() -> Message:
        nonlocal size, complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise ApiError("the body did not arrive in time", status=408, code="body_too_slow") from None
        size += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if size > LARGEST_BODY:
            raise _too_large()
        return message

    return limited


def _with_headers(send: Send, origin: str | None) -> Send:
    """Add the headers of every response."""
    extra = {"x-content-type-options": "nosniff", **(_cors(origin) if origin else {})}
    pairs = [(name.encode(), value.encode()) for name, value in extra.items()]

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *pairs]}
        await send(message)

    return with_headers


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    pairs = [(b"content-length", str(len(body)).encode()), (b"x-content-type-options", b"nosniff")]
    if body:
        pairs.append((b"content-type", b"application/json"))
    pairs += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
