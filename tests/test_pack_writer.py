"""Every byte of a pack equals that of an independent computation, for every layout of published checkpoints."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from pack_oracle import (
    SMALL,
    as_array,
    assert_one_line,
    dense_experts,
    edit_json,
    layer_bytes,
    published_parts,
    quantized,
    quantized_parts,
    raw,
    read_checkpoint,
    read_safetensors,
    tree,
)
from tiny_checkpoints import GEOMETRIES, Dtype, Geometry, Layout, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.errors import CheckpointError, FlashMoeError, InputError, PackError
from flashmoe_mlx.formats import extents
from flashmoe_mlx.formats.manifest import file_hash
from flashmoe_mlx.formats.record import MatrixFormat
from flashmoe_mlx.formats.safetensors_header import read_header
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.pack import resident
from flashmoe_mlx.pack.least_squares import least_squares
from flashmoe_mlx.pack.manifest import variant_name
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.variant import VariantWriter
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.pack.writer import add_variants, pack_checkpoint

SENSITIVE = (".mlp.gate", ".mlp.shared_expert_gate")


def read_layer(pack: Pack, variant: str, layer: int) -> bytes:
    return pack.experts[variant].layer_path(layer).read_bytes()


def layers(geometry: Geometry) -> range:
    return range(geometry.num_layers)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("name", ["plain", "wide"])
def test_published_4_bit_experts_are_copied_byte_for_byte(name: str, dtype: Dtype, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    source = write_checkpoint(tmp_path / "source", geometry, 0, "mlx4", dtype=dtype, shards=3, extras=True)
    pack = pack_checkpoint(source, tmp_path / "pack")
    tensors = read_checkpoint(source)
    assert pack.experts["q4"].layout.single_format == MatrixFormat(4, geometry.group_size, dtype)
    for layer in layers(geometry):
        assert read_layer(pack, "q4", layer) == layer_bytes(published_parts(tensors, layer))
    assert verify_pack(pack) == []


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", get_args(Dtype))
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_dense_experts_are_quantized_as_in_mlx(layout: Layout, dtype: Dtype, bits: int, tmp_path: Path) -> None:
    geometry = replace(GEOMETRIES["wide"], layer_types="LLF", experts=6)
    source = write_checkpoint(tmp_path / "source", geometry, 1, layout, dtype=dtype, shards=2)
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[bits], group_size=32, quantiser="minmax")
    name = variant_name(bits, "minmax")
    tensors = read_checkpoint(source)
    assert pack.experts[name].layout[0].gate.dtype == dtype
    for layer in layers(geometry):
        dense = dense_experts(tensors, geometry, layer, layout)
        assert read_layer(pack, name, layer) == layer_bytes(quantized_parts(dense, bits, 32))


def test_2_bits_are_made_from_dequantized_4_bits(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[2, 4])
    pack = add_variants(pack, [2], quantiser="minmax")
    tensors = read_checkpoint(source)
    assert {name: experts.quantizer for name, experts in pack.experts.items()} == {
        "q4": None,
        "q2": "least_squares",
        "q2-minmax": "minmax",
    }
    for layer in layers(SMALL):
        parts = published_parts(tensors, layer)
        dense = {
            name: mx.dequantize(*parts[3 * i : 3 * i + 3], group_size=64, bits=4)
            for i, name in enumerate(("gate", "up", "down"))
        }
        assert read_layer(pack, "q4", layer) == layer_bytes(parts)
        assert read_layer(pack, "q2-minmax", layer) == layer_bytes(quantized_parts(dense, 2, 64))
        better = [part for name in dense for part in least_squares(dense[name], 2, 64)]
        assert read_layer(pack, "q2", layer) == layer_bytes(better)


@pytest.mark.parametrize("name", ["pattern", "tied"])
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_resident_weights_of_a_dense_checkpoint(name: str, dtype: Dtype, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    source = write_checkpoint(tmp_path / "source", geometry, 0, "fused", dtype=dtype, shards=3, extras=True)
    pack = pack_checkpoint(source, tmp_path / "pack", group_size=32, resident_bits=4)
    stored = read_safetensors(pack.resident_path)
    for name_, (source_dtype, shape, data) in read_checkpoint(source).items():
        name = name_.replace("model.language_model.", "model.")
        if ".experts." in name or ".visual." in name or name.startswith("mtp."):
            assert name not in stored
            continue
        module = name.removesuffix(".weight")
        if name.endswith(("layernorm.weight", "q_norm.weight", "k_norm.weight")) or name == "model.norm.weight":
            factor = np.array(as_array(source_dtype, shape, data).astype(mx.float32)) + np.float32(1)
            assert stored.pop(name) == ("F32", shape, factor.tobytes())
        elif len(shape) == 2:
            bits = 8 if module.endswith(SENSITIVE) else 4
            made = quantized(as_array(source_dtype, shape, data), bits, 32)
            for part, dtype_, array in zip(("weight", "scales", "biases"), ("U32", dtype, dtype), made, strict=True):
                assert stored.pop(f"{module}.{part}") == (dtype_, array.shape, raw(array))
        else:
            expected = (shape[0], shape[2], shape[1]) if name.endswith("conv1d.weight") else shape
            assert stored.pop(name) == (source_dtype, expected, data)
    assert stored == {}
    assert ("lm_head.weight" in read_safetensors(pack.resident_path)) is not geometry.tied


def test_dense_resident_weights_may_be_kept(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "fused", dtype="BF16")
    pack = pack_checkpoint(source, tmp_path / "pack", resident_bits=None)
    published = read_checkpoint(source)["model.language_model.embed_tokens.weight"]
    assert read_safetensors(pack.resident_path)["model.embed_tokens.weight"] == published


def test_resident_weights_of_an_mlx_checkpoint_are_copied(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", GEOMETRIES["plain"], 0, "mlx4", shards=4, extras=True)
    pack = pack_checkpoint(source, tmp_path / "pack")
    expected = {
        name.removeprefix("language_model."): tensor
        for name, tensor in read_checkpoint(source).items()
        if "switch_mlp" not in name and "mtp." not in name and not name.startswith("vision_tower.")
    }
    assert read_safetensors(pack.resident_path) == expected


@pytest.mark.parametrize("layout", get_args(Layout))
def test_the_manifest_lists_everything(layout: Layout, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, layout, shards=2, extras=True)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("hello")
    (source / "notes.txt").write_text("not part of a model")
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[4, 2])
    manifest = json.loads((pack.folder / "pack.json").read_text())
    on_disk = {str(path.relative_to(pack.folder)) for path in pack.folder.rglob("*") if path.is_file()}
    assert on_disk == {"pack.json", *manifest["files"]}
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} < on_disk
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (pack.folder / name).stat().st_size
    assert (pack.folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert manifest["source"] == {"name": "source"}
    skipped = [name for name in read_checkpoint(source) if re.search(r"visual|vision_tower|mtp", name)]
    assert manifest["skipped_tensors"] == sorted(skipped)
    assert len(skipped) == 8


@pytest.mark.parametrize("layout", get_args(Layout))
def test_the_number_of_shards_does_not_matter(layout: Layout, tmp_path: Path) -> None:
    trees = []
    for shards in (1, 3):
        source = write_checkpoint(tmp_path / f"s{shards}" / "source", SMALL, 0, layout, shards=shards)
        trees.append(tree(pack_checkpoint(source, tmp_path / f"pack{shards}", bits=[4, 2]).folder))
    assert trees[0] == trees[1]


def test_a_copy_of_the_embedding_as_head_is_left_out(tmp_path: Path) -> None:
    tied = write_checkpoint(tmp_path / "tied" / "source", SMALL, 0, "fused")
    copied = Path(shutil.copytree(tied, tmp_path / "copied" / "source"))
    file = next(copied.glob("*.safetensors"))
    tensors: dict[str, mx.array] = dict(mx.load(str(file)))  # type: ignore[arg-type]
    mx.eval(tensors)
    embedding = next(values for name, values in tensors.items() if name.endswith("embed_tokens.weight"))
    mx.save_safetensors(str(file), tensors | {"lm_head.weight": embedding})
    packed = read_safetensors(pack_checkpoint(copied, tmp_path / "pack").resident_path)
    assert packed.keys() == read_safetensors(pack_checkpoint(tied, tmp_path / "other").resident_path).keys()


def test_no_read_is_larger_than_a_block_or_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = replace(GEOMETRIES["plain"], vocab_size=4096)
    source = write_checkpoint(tmp_path / "source", geometry, 0, "fused")
    largest = max(len(data) for _, _, data in read_checkpoint(source).values())
    expert = 3 * geometry.expert_size * geometry.hidden_size * 4
    reads: list[int] = []

    def counted(fd: int, view: memoryview, offset: int) -> int:
        reads.append(len(view))
        return read(fd, view, offset)

    read = extents.read_exactly
    monkeypatch.setattr(extents, "read_exactly", counted)
    monkeypatch.setattr(resident, "_BLOCK_BYTES", 64 * 1024)
    pack = pack_checkpoint(source, tmp_path / "pack")
    assert max(reads) <= max(64 * 1024, expert) < largest
    monkeypatch.undo()
    again = pack_checkpoint(source, tmp_path / "again")
    assert tree(pack.folder) == tree(again.folder)


MEASURE_MEMORY = """
import os, resource, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_checkpoints import GEOMETRIES, write_checkpoint
from flashmoe_mlx.pack import resident
from flashmoe_mlx.pack.writer import pack_checkpoint

resident._BLOCK_BYTES = 2 * 2**20

def peak():
    if sys.platform == "linux":  # where getrusage includes the memory before exec
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small = replace(GEOMETRIES["pattern"], layer_types="LF")
large = replace(small, vocab_size=80_000, experts=150)
if not os.fork():  # keeps the memory of this process small
    write_checkpoint(Path("large"), large, 0, "fused")
    os._exit(0)
os.wait()
write_checkpoint(Path("small"), small, 0, "fused")
for name in ("small", "large"):
    pack_checkpoint(Path(name), Path(name + "-pack"), group_size=32)
    print(peak())
print(Path("large/model.safetensors").stat().st_size)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE_MEMORY, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    small, large, checkpoint = map(int, done.stdout.split())
    assert checkpoint > 130e6
    assert large - small < 40e6


def test_shards_are_deleted_once_they_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4", shards=4, extras=True)
    expected = tree(pack_checkpoint(source, tmp_path / "expected" / "pack", bits=[4, 2]).folder)
    before = sorted(path.name for path in source.glob("*.safetensors"))
    discarded: list[str] = []
    discard = Checkpoint.discard

    def noted(self: Checkpoint, shard: str) -> None:
        discarded.append(shard)
        discard(self, shard)

    monkeypatch.setattr(Checkpoint, "discard", noted)
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[4, 2], delete_source=True)
    assert sorted(discarded) == before  # each shard once
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "model.safetensors.index.json"]
    assert tree(pack.folder) == expected
    # The same command again finds its work done.
    again = pack_checkpoint(source, tmp_path / "pack", bits=[4, 2], delete_source=True)
    assert tree(again.folder) == expected


@pytest.mark.parametrize(
    ("part", "layout"),
    [
        ("language_model.model.layers.1.mlp.switch_mlp.up_proj.scales", "mlx4"),
        ("language_model.model.layers.0.mlp.switch_mlp.down_proj.biases", "mlx4"),
        ("language_model.model.embed_tokens.scales", "mlx4"),
        ("language_model.model.layers.0.linear_attn.dt_bias", "mlx4"),
        ("model.language_model.layers.1.mlp.experts.down_proj", "fused"),
        ("model.language_model.layers.1.self_attn.q_proj.weight", "fused"),
        ("model.language_model.norm.weight", "fused"),
    ],
)
@pytest.mark.parametrize("value", [0x7F80, 0xFFC1])
def test_nan_and_infinity_are_refused(part: str, layout: Layout, value: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, layout, dtype="BF16")
    poison(source / "model.safetensors", part, value)
    for bits in (4, 2):
        with pytest.raises(CheckpointError) as caught:
            pack_checkpoint(source, tmp_path / f"pack{bits}", bits=[bits])
        assert caught.value.code == "not_finite"
        assert_one_line(caught.value)
        expert = re.search(r"layer (\d) expert (\d)", str(caught.value))
        assert (expert is not None) is ("switch_mlp" in part or "experts" in part)
        if expert:
            assert f"layers.{expert[1]}." in part
            assert expert[2] == "3"
        with pytest.raises(PackError) as unfinished:
            open_pack(tmp_path / f"pack{bits}")
        assert unfinished.value.code == "no_pack"


def poison(path: Path, name: str, value: int) -> None:
    """Replace the bits of the last element of a bfloat16 tensor by ``value``."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[name]
    assert entry["dtype"] == "BF16"
    end = start + entry["data_offsets"][1]
    data[end - 2 : end] = value.to_bytes(2, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("options", "code", "fact"),
    [
        ({"bits": [7]}, "invalid_value", "bits="),
        ({"bits": []}, "invalid_value", "bits="),
        ({"bits": [4], "group_size": 48}, "invalid_value", "group_size=48"),
        ({"bits": [4], "resident_bits": 1}, "invalid_value", "resident_bits=1"),
        ({"bits": [8]}, "invalid_value", "bits=8"),
        ({"bits": [2], "quantiser": "best"}, "invalid_value", "choose from least_squares, minmax, or null"),
        ({"bits": [4], "quantiser": "least_squares"}, "contradiction", "quantiser=least_squares"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, object], code: str, fact: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    with pytest.raises(InputError) as caught:
        pack_checkpoint(source, tmp_path / "pack", **options)
    assert caught.value.code == code
    assert fact in str(caught.value)
    assert_one_line(caught.value)


def test_out_may_not_be_the_source(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    before = tree(source)
    for out in (source, tmp_path / "source" / ".." / "source", link(tmp_path / "alias", source)):
        with pytest.raises(PackError) as caught:
            pack_checkpoint(source, out)
        assert caught.value.code == "contradiction"
    assert tree(source) == before


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def test_unusable_output_folders(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("the only copy")
    for out, code in (
        (foreign, "folder_not_empty"),
        (source / "config.json", "cannot_write_pack"),
        (source / "config.json" / "below", "cannot_write_pack"),
        (tmp_path / ("x" * 300), "cannot_write_pack"),
    ):
        with pytest.raises(PackError) as caught:
            pack_checkpoint(source, out)
        assert caught.value.code == code
        assert_one_line(caught.value)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_too_little_space_is_reported_before_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4", shards=2)
    needed = sum(entry.stat().st_size for entry in pack_checkpoint(source, tmp_path / "a").folder.rglob("*.bin"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    with pytest.raises(PackError) as caught:
        pack_checkpoint(source, tmp_path / "pack")
    assert caught.value.code == "no_space"
    assert_one_line(caught.value)
    assert list((tmp_path / "pack").rglob("*.bin")) == []
    pack = open_pack(tmp_path / "a")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PackError) as caught:
        add_variants(pack, [2])
    assert caught.value.code == "no_space"
    monkeypatch.undo()
    assert tree(pack_checkpoint(source, tmp_path / "pack", bits=[4, 2]).folder) == tree(add_variants(pack, [2]).folder)


# Folders of flash-moe


def write_packed_experts(folder: Path, source: Path, geometry: Geometry) -> Path:
    folder.mkdir()
    tensors = read_checkpoint(source)
    for layer in layers(geometry):
        (folder / f"layer_{layer:02d}.bin").write_bytes(layer_bytes(published_parts(tensors, layer)))
    return folder


def test_a_folder_of_flash_moe_is_linked(tmp_path: Path) -> None:
    geometry = GEOMETRIES["plain"]
    source = write_checkpoint(tmp_path / "source", geometry, 0, "mlx4", shards=2)
    theirs = write_packed_experts(tmp_path / "packed_experts", source, geometry)
    copied = pack_checkpoint(source, tmp_path / "copied", bits=[4, 2])
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[4, 2], packed_experts=theirs)
    for layer in layers(geometry):
        linked = pack.experts["q4"].layer_path(layer).stat()
        assert linked.st_ino == (theirs / f"layer_{layer:02d}.bin").stat().st_ino
    assert tree(pack.folder) == tree(copied.folder)
    assert verify_pack(pack) == []
    tokens = np.arange(12, dtype=np.int32)
    with flashmoe_mlx.load(pack.folder) as ours, flashmoe_mlx.load(copied.folder) as other:
        np.testing.assert_array_equal(ours.logits(tokens), other.logits(tokens))


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        ("missing", "missing"),
        ("short", "65535 bytes"),
        ("link", "missing"),
        ("foreign", "expert 2"),
        ("padding", "expert 2"),
    ],
)
def test_damaged_folders_of_flash_moe_are_refused(damage: str, fact: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    theirs = write_packed_experts(tmp_path / "packed_experts", source, SMALL)
    path = theirs / "layer_01.bin"
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "link":
        path.symlink_to(theirs / "layer_00.bin")
    elif damage == "foreign":
        path.write_bytes(data[: 2 * 16384] + bytes(100) + data[2 * 16384 + 100 :])
    elif damage == "padding":
        data[3 * 16384 - 1] = 1
        path.write_bytes(data)
    with pytest.raises(PackError) as caught:
        pack_checkpoint(source, tmp_path / "pack", packed_experts=theirs)
    assert caught.value.code == "invalid_packed_experts"
    assert f"{path}: " in str(caught.value)
    assert fact in str(caught.value)
    assert_one_line(caught.value)
    assert not (tmp_path / "pack" / "experts-q4" / "layer_01.bin").exists()


def test_a_folder_of_flash_moe_needs_the_same_width(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    theirs = write_packed_experts(tmp_path / "packed_experts", source, SMALL)
    with pytest.raises(InputError) as caught:
        pack_checkpoint(source, tmp_path / "pack", bits=[2], packed_experts=theirs)
    assert caught.value.code == "contradiction"
    dense = write_checkpoint(tmp_path / "dense", SMALL, 0, "fused")
    with pytest.raises(InputError) as caught:
        pack_checkpoint(dense, tmp_path / "pack2", packed_experts=theirs)
    assert caught.value.code == "contradiction"


def test_a_folder_of_flash_moe_on_another_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    theirs = write_packed_experts(tmp_path / "packed_experts", source, SMALL)

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PackError) as caught:
        pack_checkpoint(source, tmp_path / "pack", packed_experts=theirs)
    assert caught.value.code == "cannot_link"
    assert_one_line(caught.value)


# Further variants


def test_a_variant_is_added_to_a_pack(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    expected = pack_checkpoint(source, tmp_path / "both" / "pack", bits=[4, 2])
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[4])
    extended = add_variants(pack, [2, 4])
    assert tree(extended.folder) == tree(expected.folder)
    assert list(extended.experts) == ["q4", "q2"]
    assert tree(add_variants(pack, [2]).folder) == tree(expected.folder)  # although the object is outdated
    for bits in ([8], [5, 9]):
        with pytest.raises(InputError) as caught:
            add_variants(extended, bits)
        assert caught.value.code == "invalid_value"
    assert tree(open_pack(pack.folder).folder) == tree(expected.folder)


def test_a_variant_is_not_copied_from_another_quantizer(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "fused")
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[4], quantiser="least_squares")
    with pytest.raises(InputError) as caught:
        add_variants(pack, [4])
    assert caught.value.code == "source_needed"
    assert_one_line(caught.value)
    both = pack_checkpoint(source, pack.folder, bits=[4])
    assert read_layer(both, "q4", 0) != read_layer(both, "q4-least_squares", 0)
    assert open_model(both.folder).variant(None) == both.experts["q4"]


def test_a_variant_is_added_from_the_checkpoint(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "fused", shards=2)
    both = pack_checkpoint(source, tmp_path / "both", bits=[4, 8])
    pack_checkpoint(source, tmp_path / "pack", bits=[4])
    assert tree(pack_checkpoint(source, tmp_path / "pack", bits=[4, 8]).folder) == tree(both.folder)
    other = write_checkpoint(tmp_path / "other", replace(SMALL, vocab_size=99), 0, "fused")
    with pytest.raises(PackError) as caught:
        pack_checkpoint(other, tmp_path / "pack", bits=[4])
    assert caught.value.code == "another_model"


def test_an_interrupted_addition_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = replace(SMALL, layer_types="LFLF")
    source = write_checkpoint(tmp_path / "source", geometry, 0, "mlx4")
    expected = tree(pack_checkpoint(source, tmp_path / "both" / "pack", bits=[4, 2]).folder)
    pack = pack_checkpoint(source, tmp_path / "pack")
    # The same size as with group_size=64, because records are padded.
    interrupt_at_layer(monkeypatch, 2, lambda: add_variants(pack, [2], group_size=32))
    assert list(open_pack(pack.folder).experts) == ["q4"]
    assert verify_pack(open_pack(pack.folder)) == []
    interrupt_at_layer(monkeypatch, 2, lambda: add_variants(pack, [2]))
    done = (pack.folder / "experts-q2" / "layer_00.bin").stat().st_mtime_ns
    assert tree(add_variants(pack, [2]).folder) == expected
    assert (pack.folder / "experts-q2" / "layer_00.bin").stat().st_mtime_ns == done  # not written again


def interrupt_at_layer(monkeypatch: pytest.MonkeyPatch, layer: int, do: Callable[[], Pack]) -> None:
    write = VariantWriter.write_layer

    def stop(self: VariantWriter, at: int) -> None:
        if at == layer:
            raise KeyboardInterrupt
        write(self, at)

    with monkeypatch.context() as patched:
        patched.setattr(VariantWriter, "write_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            do()


def test_stages_of_progress_are_complete(tmp_path: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.stages: list[list[int]] = []

        def stage(self, description: str, total: int) -> None:
            assert description.isprintable()
            self.stages.append([total, 0])

        def advance(self, nbytes: int) -> None:
            self.stages[-1][1] += nbytes

    progress = Counting()
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "fused", shards=2)
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[4, 2], progress=progress)
    assert len(progress.stages) == 2 + 2 * SMALL.num_layers
    assert verify_pack(pack, progress) == []
    assert all(done == total > 0 for total, done in progress.stages)


def test_a_source_whose_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    read = os.preadv

    def failing_at(call: int) -> Callable[[int, list[memoryview], int], int]:
        calls = itertools.count(1)

        def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            if next(calls) == call:
                raise OSError(5, "Input/output error")
            return read(fd, buffers, offset)

        return preadv

    for call in (1, 5, 60):
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", failing_at(call))
            with pytest.raises(FlashMoeError) as caught:
                pack_checkpoint(source, tmp_path / "pack")
        assert str(source) in str(caught.value)
        assert "Input/output error" in str(caught.value)
        assert_one_line(caught.value)
    assert verify_pack(pack_checkpoint(source, tmp_path / "pack")) == []


def test_a_config_that_contradicts_the_tensors(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL, 0, "mlx4")
    name = "language_model.model.layers.0.mlp.gate"
    edit_json(source / "config.json", quantization={"mode": "affine", name: {"bits": "4\n", "group_size": 64}})
    with pytest.raises(CheckpointError) as caught:
        pack_checkpoint(source, tmp_path / "pack")
    assert caught.value.code == "contradicting_quantisation"
    assert name in str(caught.value)
    assert_one_line(caught.value)
    edit_json(source / "config.json", quantization={"mode": "mxfp4"}, quantization_config=None)
    with pytest.raises(CheckpointError) as caught:
        pack_checkpoint(source, tmp_path / "pack")
    assert caught.value.code == "contradicting_quantisation"
    assert "mxfp4" in str(caught.value)


def test_experts_of_another_model_are_not_added(tmp_path: Path) -> None:
    geometry = GEOMETRIES["plain"]
    first, second = (write_checkpoint(tmp_path / str(seed), geometry, seed=seed) for seed in (0, 1))
    pack = pack_checkpoint(first, tmp_path / "pack", bits=(4,))
    with pytest.raises(PackError) as caught:
        pack_checkpoint(second, tmp_path / "pack", bits=(8,))
    assert caught.value.code == "another_model"
    assert set(open_pack(pack.folder).experts) == {"q4"}
    assert set(pack_checkpoint(first, tmp_path / "pack", bits=(8,)).experts) == {"q4", "q8"}


@pytest.mark.parametrize("name", [".DS_Store", "._x", ".Spotlight-V100/x", "lost+found/x", "Thumbs.db"])
def test_files_of_the_operating_system_are_ignored(name: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "mlx4")
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).touch()
    assert verify_pack(pack_checkpoint(checkpoint, tmp_path / "out")) == []
    assert (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("layout", ["fused", "mlx4"])
def test_the_safetensors_library_reads_resident_weights(layout: Layout, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, layout, dtype="BF16")
    pack = pack_checkpoint(checkpoint, tmp_path / "pack")
    ours, _ = read_header(pack.resident_path)
    with safetensors.safe_open(pack.resident_path, framework="numpy") as theirs:
        assert set(theirs.keys()) == ours.keys()
        for name, tensor in ours.items():
            part = theirs.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (tensor.dtype, tensor.shape)


def test_a_config_with_nan_is_packed_resumed_and_extended(tmp_path: Path) -> None:
    """NaN differs from itself, and packing must not take that for another model."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "fused")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"for_others": [float("nan"), float("inf")]}))
    assert set(pack_checkpoint(checkpoint, tmp_path / "pack").experts) == {"q4"}
    assert set(pack_checkpoint(checkpoint, tmp_path / "pack", bits=[2]).experts) == {"q4", "q2"}
    assert set(open_pack(tmp_path / "pack").experts) == {"q4", "q2"}


def test_a_pack_of_the_first_release_opens(demo_pack: Path) -> None:
    """The demo pack was written by the first release, and every later release must open it."""
    pack = open_pack(demo_pack)
    assert pack.manifest["format_version"] == 1
    assert verify_pack(pack) == []
    assert file_hash(pack.resident_path) == pack.manifest["files"]["resident.safetensors"]["xxh3"]
