"""The files of the web page: paths, headers, vendored files."""

import hashlib
import json

import pytest
from serving import Live

from flashmoe_mlx.server import pages

VENDOR = pages._FOLDER / "vendor"


def test_every_file_has_its_type_and_the_headers_that_confine_it(live: Live) -> None:
    kinds = {"js": "text/javascript", "mjs": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    for path in pages.PAGES:
        answer = live.client.get(path)
        assert answer.status_code == 200
        expected = kinds.get(path.rpartition(".")[2], "text/html" if path == "/" else None)
        assert expected is None or answer.headers["content-type"].startswith(expected)
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'"
        assert policy["img-src"] == "'self' data:"
        assert policy["frame-ancestors"] == "'none'"
        assert not any("unsafe" in sources or "http" in sources for sources in policy.values())
        again = live.client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/web/", "/web/none.js", "/web/../pages.py", "/web/%2e%2e/pages.py", "/web//chat.js"])
def test_only_files_of_the_page_are_served(live: Live, path: str) -> None:
    assert live.client.get(path).status_code == 404


def test_a_link_on_another_site_opens_the_page_and_nothing_else(live: Live) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert live.client.get("/", headers=link).status_code == 200
    assert live.client.get("/v1/models", headers=link).status_code == 403
    assert live.client.get("/web/chat.js", headers=link).status_code == 403
    for changed in ({"sec-fetch-dest": "iframe"}, {"sec-fetch-mode": "no-cors"}):
        assert live.client.get("/", headers=link | changed).status_code == 403


def test_vendored_files_are_the_released_ones_with_their_licenses() -> None:
    packages = json.loads((VENDOR / "vendored.json").read_text())
    known = {"vendored.json"}
    for package in packages.values():
        known |= {*package["files"], *package["license_files"]}
        for name, entry in package["files"].items():
            assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == entry["sha256"]
        assert all((VENDOR / name).stat().st_size > 500 for name in package["license_files"])
    assert {path.name for path in VENDOR.iterdir()} == known
