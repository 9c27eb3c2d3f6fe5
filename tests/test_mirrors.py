"""Copies of a pack's experts on several disks are read as one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_oracle import assert_one_line

from flashmoe_mlx import load
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.extents import ExpertSource, read_extents
from flashmoe_mlx.formats.manifest import CHECKSUMS, PackedExperts, layer_file
from flashmoe_mlx.formats.record import LayerLayouts, RecordLayout
from flashmoe_mlx.pack.mirror import mirror_pack
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_mirror
from flashmoe_mlx.stores.mirrors import MirroredExperts, open_mirrors
from flashmoe_mlx.stores.registry import backend_settings, create_store
from flashmoe_mlx.testing.store_tests import check
from flashmoe_mlx.testing.stored_experts import EXPERTS, LAYERS, StoredExperts, write_experts


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    """Experts in a folder ``experts-q4``, with the same experts in ``second`` and the last two layers in ``third``."""
    top = tmp_path_factory.mktemp("mirrors")
    folder = top / "pack" / "experts-q4"
    folder.mkdir(parents=True)
    made = write_experts(folder, 4, contiguous=True)
    (folder / CHECKSUMS).write_bytes(b"hashes of these experts")
    shutil.copytree(folder, top / "second" / folder.name)
    shutil.copytree(folder, top / "third" / folder.name)
    for layer in range(LAYERS - 2):
        (top / "third" / folder.name / layer_file(layer)).unlink()
    return made


def mirrored(stored: StoredExperts, *names: str) -> ExpertSource:
    """Return the experts of ``stored`` with the mirrors ``names``."""
    assert isinstance(stored.source, PackedExperts)
    return open_mirrors(stored.source, [str(stored.source.directory.parent.parent / name) for name in names])


@given(
    rates=st.lists(st.floats(1e6, 1e11), min_size=1, max_size=5),
    layers=st.lists(st.booleans(), min_size=5, max_size=5),
    size=st.sampled_from((128, 256, 1024)),
)
def test_pieces_cover_each_record_in_proportion_to_the_rates(rates: list[float], layers: list[bool], size: int) -> None:
    layout = RecordLayout.uniform(size, size, 4, 64, "BF16")
    folders = [Path(f"/{number}") for number in range(len(rates))]
    held = {folder: [0, 1] if full else [1] for folder, full in zip(folders, layers, strict=False)}
    held[folders[0]] = [0, 1]
    layers_of = LayerLayouts.uniform(layout, 2)
    source = MirroredExperts(folders[0], layers_of, 3, None, None, held, dict(zip(folders, rates, strict=True)))
    for layer in (0, 1):
        holders = [folder for folder in folders if layer in held[folder]]
        total = sum(source.rates[folder] for folder in holders)
        for expert in range(3):
            extents = source.extents(layer, expert)
            done = expert * layout.record_bytes
            for extent in extents:
                assert extent.offset == done
                assert extent.offset % 4096 == extent.nbytes % 4096 == 0
                share = source.rates[extent.path.parent] / total
                assert abs(extent.nbytes - share * layout.record_bytes) <= 4096
                done += extent.nbytes
            assert done == (expert + 1) * layout.record_bytes
            assert {extent.path.parent for extent in extents} <= set(holders)
            assert {extent.path.name for extent in extents} == {layer_file(layer)}


@pytest.mark.parametrize("backend", ["pread", "io_uring", "ram_hybrid", "resident"])
@pytest.mark.parametrize("names", [("second",), ("third",), ("third", "second")])
@pytest.mark.sampled(6)
def test_backends_serve_the_same_bytes_from_several_folders(
    stored: StoredExperts, backend: str, names: tuple[str, ...]
) -> None:
    settings = {key: value for key, value in backend_settings(backend).items() if key != "variant"}
    settings |= {"direct": False} if "direct" in settings else {}
    source = mirrored(stored, *names)
    assert len(source.extents(LAYERS - 1, 0)) > 1
    with create_store(source, settings) as store:
        for layer in range(LAYERS):
            store.prefetch(layer, [2, 3])
            check(store.fetch(layer, [1, 3, EXPERTS - 1]), layer, [1, 3, EXPERTS - 1], stored)
            check(store.fetch(layer, [3, 2]), layer, [3, 2], stored)


def test_every_folder_is_read(stored: StoredExperts) -> None:
    source = mirrored(stored, "second")
    assert isinstance(source, MirroredExperts)
    assert len({extent.path for extent in source.extents(0, 0)}) == 2
    assert read_extents(source.extents(2, 5)) == stored.expected[2, 5]
    assert all(rate > 0 for rate in source.rates.values())


def test_no_mirrors_leave_the_source_alone(stored: StoredExperts) -> None:
    assert open_mirrors(stored.source, []) is stored.source
    assert open_mirrors(stored.source, None) is stored.source


def other_experts(folder: Path) -> None:
    (folder / CHECKSUMS).write_bytes(b"other")


def short_layer(folder: Path) -> None:
    (folder / layer_file(1)).write_bytes(bytes(100))


def no_layers(folder: Path) -> None:
    for layer in range(LAYERS):
        (folder / layer_file(layer)).unlink()


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "code"),
    [(other_experts, "another_model"), (short_layer, "wrong_size"), (no_layers, "no_mirror"), (nothing, "no_mirror")],
)
def test_a_folder_that_is_no_mirror_is_refused(
    stored: StoredExperts, tmp_path: Path, damage: Callable[[Path], None], code: str
) -> None:
    assert isinstance(stored.source, PackedExperts)
    shutil.copytree(stored.source.directory, tmp_path / "copy" / "experts-q4")
    damage(tmp_path / "copy" / "experts-q4")
    with pytest.raises(FlashMoeError) as caught:
        open_mirrors(stored.source, [str(tmp_path / "copy")])
    assert caught.value.code == code
    assert_one_line(caught.value)


@pytest.mark.parametrize("mirrors", ["/second", 5, [5], {"a": 1}])
def test_mirrors_that_are_no_list_of_folders_are_refused(stored: StoredExperts, mirrors: Any) -> None:
    with pytest.raises(FlashMoeError) as caught:
        open_mirrors(stored.source, mirrors)
    assert caught.value.code == "option_of_another_type"


def test_what_cannot_have_mirrors_is_refused(stored: StoredExperts, tmp_path: Path) -> None:
    """The pack itself is no mirror of itself, a checkpoint has none, and mmap reads one folder."""
    with pytest.raises(FlashMoeError) as caught:
        mirrored(stored, "pack")
    assert caught.value.code == "no_mirror"
    with pytest.raises(FlashMoeError) as caught:
        open_mirrors(write_experts(tmp_path, 4, contiguous=False).source, [str(tmp_path)])
    assert caught.value.code == "not_a_pack"
    with pytest.raises(FlashMoeError) as caught:
        create_store(mirrored(stored, "second"), {"_target_": "flashmoe_mlx.backends.mmap.MmapStore"})
    assert caught.value.code == "contradiction"


def test_a_pack_is_mirrored_verified_and_run(demo_pack: Path, tmp_path: Path) -> None:
    pack, mirror = open_pack(demo_pack), tmp_path / "disk" / "mirror"
    mirror_pack(pack, mirror)
    assert verify_mirror(pack, mirror) == []
    damaged = mirror / "experts-q4" / layer_file(3)
    before = {path: path.stat().st_mtime_ns for path in damaged.parent.glob("*.bin")}
    damaged.unlink()
    mirror_pack(pack, mirror)  # copies only the missing layer
    after = {path: path.stat().st_mtime_ns for path in damaged.parent.glob("*.bin")}
    assert {path for path in before if before[path] != after[path]} == {damaged}
    with load(demo_pack, backend="pread", experts_k=4) as plain:
        expected = "".join(piece.text for piece in plain.generate("What is 17 plus 25?"))
    with load(demo_pack, backend="pread", experts_k=4, mirrors=[str(mirror)]) as engine:
        assert "".join(piece.text for piece in engine.generate("What is 17 plus 25?")) == expected
    with damaged.open("r+b") as file:
        file.seek(pack.experts["q4"].layout.record_bytes * 7)
        file.write(b"\x55")
    (found,) = verify_mirror(pack, mirror)
    assert found.path == damaged
    assert "expert 7" in str(found)


def test_a_mirror_of_another_pack_is_not_overwritten(demo_pack: Path, tmp_path: Path) -> None:
    pack = open_pack(demo_pack)
    mirror_pack(pack, tmp_path)
    (tmp_path / "experts-q4" / CHECKSUMS).write_bytes(b"another pack")
    for folder, code in ((tmp_path, "another_model"), (pack.folder, "no_mirror")):
        with pytest.raises(FlashMoeError) as caught:
            mirror_pack(pack, folder)
        assert caught.value.code == code
        assert_one_line(caught.value)
    with pytest.raises(FlashMoeError) as caught:
        verify_mirror(pack, tmp_path / "empty")
    assert caught.value.code == "no_mirror"
