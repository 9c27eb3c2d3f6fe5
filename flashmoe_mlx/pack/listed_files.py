"""The files that a manifest lists, checked against the disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import PackError
from flashmoe_mlx.formats.files import regular_file_size
from flashmoe_mlx.formats.manifest import MANIFEST, file_hash

_MAX_HASHED = 64 * 2**20
"""Size in bytes up to which a file is hashed whenever a pack is opened; ``verify_pack`` hashes larger files."""

LINK_ADVICE = (
    "is a symbolic link, and links are not followed: a pack must hold its own files; copy it with cp -rL, or download "
    "it with hf download --local-dir"
)
"""The end of a message about a symbolic link in a pack."""


class ListedFiles:
    """The entries of the files of a pack in its manifest.

    Only names that the caller passes to ``check`` are touched, never names from the manifest.

    Args:
        folder: the folder of the pack.
        entries: the object ``files`` of the manifest, not yet checked.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Any]) -> None:
        self._folder = folder
        self._entries = entries
        self._checked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def check(self, name: str, nbytes: int | None = None, hashed: bool = True) -> None:
        """Check the entry of a file and the file itself.

        Args:
            name: path of the file inside the pack.
            nbytes: size of the file that the geometry of the model determines; None if the geometry does not.
            hashed: whether the manifest must hold a hash of the file; otherwise it must not.

        Raises:
            PackError: the entry is not valid (code "invalid_manifest"), or the file is missing ("missing_file"), a
                symbolic link ("symbolic_link"), of another size ("wrong_size"), or damaged ("damaged_file").
        """
        size = self._check_entry(name, nbytes, hashed)
        self._checked.add(name)
        self._check_on_disk(name, size)
        if hashed and size <= _MAX_HASHED and self._hash(name) != self._entries[name]["xxh3"]:
            raise self._refuse(
                f"{name} is damaged (its checksum differs from {MANIFEST}); delete the pack and make it again",
                code="damaged_file",
            )

    def refuse_unknown(self) -> None:
        """Raise PackError, code "invalid_manifest", if the manifest lists a file that was not checked."""
        if unknown := self._entries.keys() - self._checked:
            raise self._refuse(
                f"{MANIFEST} lists {min(unknown)!r}, which is not a file of this pack", code="invalid_manifest"
            )

    def _check_entry(self, name: str, nbytes: int | None, hashed: bool) -> int:
        """Return the size that the manifest gives for a file."""
        if name not in self._entries:
            raise self._refuse(f"{MANIFEST} does not list {name}", code="invalid_manifest")
        entry = self._entries[name]
        if not isinstance(entry, dict):
            raise self._refuse(f"{MANIFEST}: the entry of {name} is not an object", code="invalid_manifest")
        listed = entry.get("bytes")
        if type(listed) is not int or listed < 0:
            raise self._refuse(f"{MANIFEST}: the size of {name} is {listed!r}", code="invalid_manifest")
        if entry.keys() - {"bytes"} != ({"xxh3"} if hashed else set()):
            fault = "lacks its xxh3" if hashed else "has unknown keys"
            raise self._refuse(f"{MANIFEST}: the entry of {name} {fault}", code="invalid_manifest")
        if nbytes not in (None, listed):
            raise self._refuse(
                f"{name} must have {nbytes} bytes by the geometry of the model, {MANIFEST} says {listed}",
                code="invalid_manifest",
            )
        return listed

    def _check_on_disk(self, name: str, listed: int) -> None:
        path = self._folder / name
        size = regular_file_size(path)
        if path.parent != self._folder and path.parent.is_symlink():
            raise self._refuse(f"{path.parent.name} {LINK_ADVICE}", code="symbolic_link")
        if path.is_symlink():
            raise self._refuse(f"{name} {LINK_ADVICE}", code="symbolic_link")
        if size is None:
            raise self._refuse(
                f"{name} is missing or not a regular file; delete the pack and make it again", code="missing_file"
            )
        if size != listed:
            raise self._refuse(
                f"{name} has {size} bytes, {MANIFEST} says {listed}: it is truncated or from another pack; "
                "delete the pack and make it again",
                code="wrong_size",
            )

    def _hash(self, name: str) -> str:
        try:
            return file_hash(self._folder / name)
        except OSError as error:
            raise self._refuse(f"{name} cannot be read ({error.strerror})", code="cannot_read_file") from error

    def _refuse(self, fault: str, *, code: str) -> PackError:
        return PackError(f"{self._folder}: {fault}", code=code)
