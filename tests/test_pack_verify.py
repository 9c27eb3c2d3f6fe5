"""``verify_pack`` names every damaged record by its layer and expert."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from pack_oracle import SMALL, assert_one_line
from tiny_checkpoints import write_checkpoint

from flashmoe_mlx.cli.application import run
from flashmoe_mlx.errors import PackError
from flashmoe_mlx.pack.manifest import write_manifest
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.pack.writer import pack_checkpoint

RECORD = 16384


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    source = write_checkpoint(folder / "source", SMALL, 0, "mlx4")
    (source / "tokenizer.json").write_text('{"a": 1}')
    return pack_checkpoint(source, folder / "pack", bits=[4, 2]).folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pack"))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_an_intact_pack_has_no_damage(original: Path) -> None:
    assert verify_pack(open_pack(original)) == []


@pytest.mark.parametrize("variant", ["q4", "q2"])
@pytest.mark.parametrize("expert", [0, 3])
@pytest.mark.parametrize("component", ["gate.weight", "up.scales", "down.biases", "padding"])
def test_a_flipped_bit_in_a_record(folder: Path, variant: str, expert: int, component: str) -> None:
    pack = open_pack(folder)
    layout = pack.experts[variant].layout[1]
    offsets = {c.name: c.offset + c.nbytes // 2 for c in layout.components} | {"padding": layout.record_bytes - 1}
    path = pack.experts[variant].layer_path(1)
    flip(path, expert * layout.record_bytes + offsets[component])
    (damage,) = verify_pack(open_pack(folder))
    assert damage.path == path
    assert damage.what == (
        f"{variant} layer 1 expert {expert} (record at byte {expert * RECORD}) is damaged: its checksum differs"
    )
    assert str(damage).isprintable()


@pytest.mark.parametrize(("experts", "count"), [([1], "1 part is damaged"), ([1, 2], "2 parts are damaged")])
def test_the_task_counts_damaged_parts(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    experts: list[int],
    count: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for expert in experts:
        flip(open_pack(folder).experts["q4"].layer_path(0), expert * RECORD)
    assert run(["task=pack", "verify=true", f"out={folder}"]) == 1
    assert count in capsys.readouterr().err


def test_every_damaged_record_is_named(folder: Path) -> None:
    pack = open_pack(folder)
    for layer, expert in ((0, 1), (0, 2), (1, 0)):
        flip(pack.experts["q4"].layer_path(layer), expert * RECORD)
    found = [str(damage) for damage in verify_pack(pack)]
    assert len(found) == 3
    for text, name in zip(found, ("layer 0 expert 1", "layer 0 expert 2", "layer 1 expert 0"), strict=True):
        assert f"q4 {name} " in text


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "resident.safetensors", "experts-q4/checksums.xxh3"])
def test_a_flipped_bit_in_another_file(folder: Path, name: str) -> None:
    pack = open_pack(folder)
    flip(folder / name, (folder / name).stat().st_size - 1)
    found = [str(damage) for damage in verify_pack(pack)]
    assert f"{folder / name}: the checksum differs" in found
    # Small files are hashed whenever a pack is opened.
    with pytest.raises(PackError) as caught:
        open_pack(folder)
    assert caught.value.code == "damaged_file"
    assert name in str(caught.value)


def test_only_verification_reads_a_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe_mlx.pack.listed_files._MAX_HASHED", 1000)
    path = folder / "resident.safetensors"
    flip(path, path.stat().st_size - 1)
    assert [str(damage) for damage in verify_pack(open_pack(folder))] == [f"{path}: the checksum differs"]


@pytest.mark.parametrize("value", [0x7F80, 0x7FC0, 0xFF80])
def test_nan_with_a_right_checksum(folder: Path, value: int) -> None:
    """Another tool or an attacker may have computed the checksum."""
    pack = open_pack(folder)
    experts = pack.experts["q4"]
    up_scales = next(c for c in experts.layout[0].components if c.name == "up.scales")
    data = bytearray(experts.layer_path(1).read_bytes())
    start = 2 * RECORD + up_scales.offset
    data[start : start + 2] = value.to_bytes(2, "little")
    experts.layer_path(1).write_bytes(data)
    checksums = folder / "experts-q4" / "checksums.xxh3"
    hashes = np.fromfile(checksums, "<u8")
    hashes[SMALL.experts + 2] = xxhash.xxh3_64_intdigest(data[2 * RECORD : 3 * RECORD])
    hashes.tofile(checksums)
    layouts = {name: found.layout for name, found in pack.experts.items()}
    write_manifest(folder, pack.config, layouts, pack.manifest["source"], [])
    (damage,) = verify_pack(open_pack(folder))
    assert damage.what.endswith(
        "q4 layer 1 expert 2 (record at byte 32768) is damaged: up.scales holds NaN or infinity"
    )


def test_files_that_change_after_opening(folder: Path) -> None:
    pack = open_pack(folder)
    os.truncate(pack.experts["q4"].layer_path(0), 3 * RECORD + 10)
    pack.experts["q4"].layer_path(1).unlink()
    (folder / "tokenizer.json").unlink()
    found = [str(damage) for damage in verify_pack(pack)]
    assert len(found) == 3
    assert found[0] == f"{folder}/tokenizer.json: cannot be read (No such file or directory)"
    assert "q4 layer 0 expert 3 (record at byte 49152) is damaged: the file ends inside the record" in found[1]
    assert found[2].endswith("layer_01.bin: cannot be read (No such file or directory)")
    (folder / "experts-q4" / "checksums.xxh3").write_bytes(b"")
    with pytest.raises(PackError) as caught:
        verify_pack(pack)
    assert caught.value.code == "pack_changed"
    assert_one_line(caught.value)


def test_a_disk_that_fails(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that cannot be read are listed, and all other records are still checked."""
    pack = open_pack(original)
    read = os.preadv

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == RECORD:
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    found = [str(damage) for damage in verify_pack(pack)]
    assert len(found) == 4
    assert all("expert 1 (record at byte 16384) is damaged: cannot be read (Input/output error)" in f for f in found)


def test_the_checksums_are_xxh3(original: Path) -> None:
    manifest = json.loads((original / "pack.json").read_text())
    for name, entry in manifest["files"].items():
        if "xxh3" in entry:
            assert entry["xxh3"] == xxhash.xxh3_64_hexdigest((original / name).read_bytes())
    layers = [(original / "experts-q4" / f"layer_{layer:02d}.bin").read_bytes() for layer in range(SMALL.num_layers)]
    records = [data[start : start + RECORD] for data in layers for start in range(0, len(data), RECORD)]
    expected = b"".join(xxhash.xxh3_64_intdigest(record).to_bytes(8, "little") for record in records)
    assert (original / "experts-q4" / "checksums.xxh3").read_bytes() == expected
