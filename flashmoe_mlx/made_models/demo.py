"""The demo model of the package, and its further variants, which are made in the user's cache."""

import hashlib
import re
from importlib.resources import files as package_files
from pathlib import Path

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.folders import explain_write_errors, lock_folder
from flashmoe_mlx.formats.manifest import MANIFEST
from flashmoe_mlx.pack.manifest import variant_name
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.progress import Progress
from flashmoe_mlx.pack.quantize import QUANTIZERS
from flashmoe_mlx.pack.writer import add_variants

__all__ = ["demo_folder", "demo_has", "demo_with_variants"]

_VARIANT = re.compile(r"q(\d)(?:-(\w+))?")


def demo_folder() -> Path:
    """Return the pack inside the installed package, which has only 4-bit experts and is never written to."""
    return Path(str(package_files("flashmoe_mlx.made_models").joinpath("demo_model")))


def demo_has(variants: set[str]) -> bool:
    """Return whether the pack inside the package has all of ``variants``."""
    return variants <= set(open_pack(demo_folder()).experts)


def demo_with_variants(variants: set[str], cache_dir: Path, progress: Progress | None = None) -> Path:
    """Return a pack of the demo model with ``variants``: the pack in the package, or a copy under ``cache_dir``.

    Missing variants are made from the 4-bit experts, as by ``task=pack bits=``.

    Args:
        variants: names of variants, ``q2`` for example.
        cache_dir: holds the copy.
        progress: shows the progress.

    Raises:
        InputError: no variant of that name can be made.
        PackError: there is no space, or another process is making the pack.
    """
    shipped = open_pack(demo_folder())
    if variants <= set(shipped.experts):
        return shipped.folder
    wanted = {name: _recipe(name) for name in sorted(variants)}
    digest = hashlib.sha256((shipped.folder / MANIFEST).read_bytes()).hexdigest()[:8]
    folder = cache_dir / f"demo-{digest}"
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_whole(folder):
            with lock_folder(folder):
                if not _is_whole(folder):  # another process may have made it in the meantime
                    _copy(shipped.folder, folder)
    (group_size,) = {form.group_size for variant in shipped.experts.values() for form in variant.layout[0].formats}
    assert group_size is not None
    for name, (bits, quantiser) in wanted.items():
        pack = open_pack(folder)
        if name not in pack.experts:
            add_variants(pack, [bits], group_size=group_size, quantiser=quantiser, progress=progress)
    return folder


def _is_whole(folder: Path) -> bool:
    """Return whether ``folder`` holds a complete pack, not an interrupted copy."""
    try:
        open_pack(folder)
    except InputError:
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a pack; the manifest, which makes it a pack, comes last, and every file appears complete."""
    (target / MANIFEST).unlink(missing_ok=True)
    for path in sorted(source.rglob("*"), key=lambda path: path.name == MANIFEST):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            write_atomically(copy, path.read_bytes())


def _recipe(variant: str) -> tuple[int, str | None]:
    """Return the width and the quantizer of a variant; raise InputError if it cannot be made."""
    match = _VARIANT.fullmatch(variant)
    if not match or (match[2] is not None and match[2] not in QUANTIZERS):
        raise InputError(
            f"variant {variant!r} cannot be made; choose q2, q3 or q2-minmax, for example",
            code="unknown_variant",
        )
    bits, quantiser = int(match[1]), match[2]
    name = variant_name(bits, quantiser)
    if name != variant:
        raise InputError(f"variant {variant!r} is called {name}", code="unknown_variant")
    return bits, quantiser
