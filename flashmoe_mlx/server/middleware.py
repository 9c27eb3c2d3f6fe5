"""Checks of every request before its route: Host, Origin, API key, type and size of the body.

A request is refused unless it passes, so a new route is protected without doing anything. The only open routes are
/health and the files of the web page.
"""

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.server.errors import ApiError, error_body
from flashmoe_mlx.server.pages import PAGES
from flashmoe_mlx.server.streaming import Message, Receive, Scope, Send, to_json

LARGEST_BODY = 32 * 2**20
LARGEST_BODIES = 8 * LARGEST_BODY
"""Bytes of the bodies of all requests in progress."""
_LARGEST_HEADERS = 2**16
_SLOWEST_BODY = 60.0
"""Seconds in which the whole body must arrive."""
_OPEN = frozenset({"/health", *PAGES})
"""Paths that need no key."""
_LOCAL = ("localhost",)
_NAMES = re.compile(r"[a-zA-Z0-9_-]{1,63}(\.[a-zA-Z0-9_-]{1,63}){0,20}")
_HEADER_NAMES = re.compile(r"[a-z0-9, -]{1,1000}")


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

    def __post_init__(self) -> None:
        for name in self.names:
            if not (_is_address(name) or _NAMES.fullmatch(name)):
                raise InputError(
                    f"server.names: {name!r:.80} is no host name; write it without scheme and port",
                    code="invalid_value",
                )
        for origin in self.origins:
            if _origin(origin) is None:
                raise InputError(
                    f"server.origins: {origin!r:.80} is no origin; write it as https://chat.example.org",
                    code="invalid_value",
                )


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
        self._origins = {_origin(origin) for origin in policy.origins}
        self._bodies = 0
        """Bytes of the bodies of all requests in progress."""

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
                await _answer(send, 204, b"", _preflight(allowed, headers))
                return
            if scope["path"] not in _OPEN:
                self._check_key(headers)
            self._check_body(scope, headers)
        except ApiError as error:
            extra = {**error.headers, "connection": "close", **(_cors(allowed) if allowed else {})}
            await _answer(send, error.status, to_json(error_body(scope["path"], error)), extra)
            return
        body = _Body(self, receive)
        try:
            await self._app(scope, body.receive, _with_headers(send, allowed, body))
        finally:
            self._bodies -= body.size

    def hold(self, size: int) -> None:
        """Count ``size`` more bytes of bodies.

        Raises:
            ApiError: the requests in progress have too many; status 503.
        """
        self._bodies += size
        if self._bodies > LARGEST_BODIES:
            raise ApiError(
                "the requests in progress are too large together", status=503, code="too_many_bytes", retry_after=5
            )

    def _check_host(self, scope: Scope, headers: dict[str, list[str]]) -> str:
        """Refuse names that are not the server's: a web page may let its own name point at this machine."""
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not scope["path"].startswith("/"):
            raise ApiError("a request needs one Host header and a path", code="invalid_host")
        host = hosts[0].lower()
        name = _host_name(host)
        if not (name in self._names or _is_address(name)):
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
                return origins[0].strip()
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
        given = [_without_scheme(value) for value in headers.get("authorization", [])]
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
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may read the other one
            raise ApiError("a body has one length: Content-Length or Transfer-Encoding", code="invalid_http")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        kinds = [kind.partition(";")[0].strip().lower() for kind in headers.get("content-type", [])]
        if kinds != ["application/json"] or headers.get("content-encoding", ["identity"]) != ["identity"]:
            raise ApiError(
                "the body must have Content-Type: application/json, and no Content-Encoding",
                status=415,
                code="unsupported_type",
            )
        length = headers.get("content-length", ["0"])[0]
        if not length.isdecimal() or len(length) > 20 or int(length) > LARGEST_BODY:
            raise _too_large()


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _without_scheme(authorization: str) -> str:
    scheme, _, key = authorization.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else authorization.strip()


def _host_name(host: str) -> str:
    """Return the name in a host with an optional port; an empty text if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname or "", parts.port
    except ValueError:
        return ""
    return "" if set(host) & set("/@?#\\ \t") else name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _origin(text: str) -> tuple[str, str, int] | None:
    """Return the scheme, host and port of an origin; None if it is not exactly that."""
    try:
        parts = urlsplit(text.strip().lower())
        usual = {"http": 80, "https": 443}[parts.scheme]
        port = usual if parts.port is None else parts.port
    except (ValueError, KeyError):
        return None
    if (
        set(text.strip()) & set(" \t*")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.path
        or parts.query
        or parts.fragment
    ):
        return None
    return parts.scheme, parts.hostname, port


def _opens_page(scope: Scope, headers: dict[str, list[str]]) -> bool:
    """Return whether a link on another site opens the web page in a tab."""
    fetched = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return scope["method"] == "GET" and scope["path"] == "/" and fetched == (["navigate"], ["document"])


def _cors(origin: str) -> dict[str, str]:
    return {"access-control-allow-origin": origin, "vary": "origin"}


def _preflight(origin: str, headers: dict[str, list[str]]) -> dict[str, str]:
    """Return the headers that let a page of an allowed origin send the request that its browser asks about."""
    wanted = headers.get("access-control-request-headers", [""])[0].lower()
    return {
        **_cors(origin),
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": wanted if _HEADER_NAMES.fullmatch(wanted) else "authorization, content-type",
        "access-control-max-age": "600",
    }


def _too_large() -> ApiError:
    return ApiError(f"the body is larger than {LARGEST_BODY} bytes", status=413, code="body_too_large")


class _Body:
    """The body of a request, with limits of its size and of the time in which it arrives.

    Args:
        guard: counts the bytes of all requests.
        receive: receives the body.
    """

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard = guard
        self._receive = receive
        self._deadline = asyncio.get_running_loop().time() + _SLOWEST_BODY
        self.size = 0
        """Bytes received."""
        self.complete = False

    async def receive(self) -> Message:
        """Receive the next part."""
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError("the body did not arrive in time", status=408, code="body_too_slow") from None
        size = len(message.get("body", b""))
        self.size += size
        self._guard.hold(size)
        self.complete = not message.get("more_body", False)
        if self.size > LARGEST_BODY:
            raise _too_large()
        return message


def _with_headers(send: Send, origin: str | None, body: _Body) -> Send:
    """Add the headers of every response; close the connection after one that does not wait for the whole body."""
    extra = {"x-content-type-options": "nosniff", **(_cors(origin) if origin else {})}
    pairs = [(name.encode(), value.encode()) for name, value in extra.items()]

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            close = [] if body.complete or not body.size else [(b"connection", b"close")]
            message = {**message, "headers": [*message.get("headers", []), *pairs, *close]}
        await send(message)

    return with_headers


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    pairs = [(b"content-length", str(len(body)).encode()), (b"x-content-type-options", b"nosniff")]
    if body:
        pairs.append((b"content-type", b"application/json"))
    pairs += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
