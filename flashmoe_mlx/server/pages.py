"""The web page at ``/``: its files in ``web/``, and the headers that confine it.

The page is static and needs no key; each request that it makes to the APIs does. Paths are looked up among the files
read at the start, so no path leaves the folder.
"""

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from flashmoe_mlx.server.errors import ApiError

_FOLDER = Path(__file__).parent / "web"
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".html": "text/html"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'; require-trusted-types-for 'script'; trusted-types dompurify",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-dns-prefetch-control": "off",  # a browser would look up the hosts of links that a model writes
    "cache-control": "no-cache",
}
"""Headers of each file: scripts and styles come from files alone, and nothing comes from or goes to other machines."""


@dataclass(frozen=True)
class Page:
    """A file of the page.

    Attributes:
        content: its bytes.
        media_type: its type.
        etag: a quoted digest of the bytes.
    """

    content: bytes
    media_type: str
    etag: str


def _read_pages() -> dict[str, Page]:
    """Return the files by the paths of their URLs."""
    pages = {}
    for path in sorted(_FOLDER.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "text/plain"
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            pages[f"/web/{path.relative_to(_FOLDER).as_posix()}"] = Page(content, kind, etag)
    pages["/"] = pages.pop("/web/index.html")
    return pages


PAGES = _read_pages()
"""The files by the paths of their URLs."""


async def page(request: Request) -> Response:
    """Return a file of the page.

    Raises:
        ApiError: there is no such file; status 404.
    """
    found = PAGES.get(request.url.path)
    if found is None:
        raise ApiError("there is no such path", status=404, code="no_such_path")
    headers = {**HEADERS, "etag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)
