"""Copy the experts of a pack to another disk, so that both disks serve them together."""

from collections.abc import Iterator
from pathlib import Path

from flashmoe_mlx.errors import PackError
from flashmoe_mlx.formats.files import publish, regular_file_size, write_atomically
from flashmoe_mlx.formats.folders import check_free_space, explain_write_errors, lock_folder
from flashmoe_mlx.formats.manifest import CHECKSUMS, PackedExperts
from flashmoe_mlx.pack.opening import Pack
from flashmoe_mlx.pack.progress import Progress, Silent

_BLOCK = 16 * 2**20


def mirror_pack(pack: Pack, folder: Path, progress: Progress | None = None) -> None:
    """Copy the layer files and checksums of all variants of ``pack`` to ``folder``; files copied before are kept.

    An interrupted copy is continued by the next call.

    Raises:
        PackError: ``folder`` is the folder of the pack (code "no_mirror"), holds other experts ("another_model"), or
            has too little space ("no_space").
        FlashMoeError: a file cannot be read or written.
    """
    progress = progress or Silent()
    if folder.resolve() == pack.folder:
        raise PackError(
            f"mirror={folder}: is the folder of the pack itself; choose one on another disk", code="no_mirror"
        )
    copies = [(experts, _copy_of(experts, folder)) for experts in pack.experts.values()]
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):
            missing = [pair for experts, copy in copies for pair in _missing(experts, copy)]
            size = sum(source.stat().st_size for source, _ in missing)
            check_free_space(folder, size, "make room or choose another mirror=")
            for experts, copy in copies:
                copy.directory.mkdir(exist_ok=True)
                write_atomically(copy.directory / CHECKSUMS, (experts.directory / CHECKSUMS).read_bytes())
            progress.stage(f"copying to {folder}", size)
            for source, target in missing:
                _copy(source, target, progress)


def _copy_of(experts: PackedExperts, folder: Path) -> PackedExperts:
    """Return the copy of ``experts`` in ``folder``; it need not exist yet.

    Raises:
        PackError: ``folder`` holds other experts (code "another_model").
    """
    copy = experts.copy_in(folder)
    try:
        known = (copy.directory / CHECKSUMS).read_bytes()
    except FileNotFoundError:
        return copy
    if known != (experts.directory / CHECKSUMS).read_bytes():
        raise PackError(f"{copy.directory}: holds other experts; choose another mirror=", code="another_model")
    return copy


def _missing(experts: PackedExperts, copy: PackedExperts) -> Iterator[tuple[Path, Path]]:
    """Yield the layer files that must be copied, and their targets."""
    for layer in range(experts.num_layers):
        target = copy.layer_path(layer)
        if regular_file_size(target) != experts.layer_bytes(layer):
            yield experts.layer_path(layer), target


def _copy(source: Path, target: Path, progress: Progress) -> None:
    partial = target.with_name(target.name + ".partial")
    with source.open("rb") as reading, partial.open("wb") as writing:
        while block := reading.read(_BLOCK):
            writing.write(block)
            progress.advance(len(block))
    publish(partial, target)
