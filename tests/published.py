"""Published chat templates and tokenizers, from an archive beside the checkout if it exists."""

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


def published_file(path: str) -> bytes | None:
    """Return one file of the archive, or None without the archive."""
    if not ARCHIVE.exists():
        return None
    with tarfile.open(ARCHIVE) as archive:
        file = archive.extractfile(f"./{path}")
        return None if file is None else file.read()
