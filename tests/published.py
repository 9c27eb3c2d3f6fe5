"""Published chat templates, from an archive beside the checkout if it exists."""

import tarfile
from functools import cache
from pathlib import Path

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "published.tar.xz"


@cache
def published_templates() -> dict[str, str]:
    """Return the sources of published templates by their path in the archive; empty without the archive."""
    if not ARCHIVE.exists():
        return {}
    found = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            if member.name.endswith(".jinja") and (file := archive.extractfile(member)) is not None:
                found[member.name.removeprefix("./")] = file.read().decode()
    return found
