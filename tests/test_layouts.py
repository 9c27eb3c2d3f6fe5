"""Experts of several formats: packed, read from checkpoints, served by every store and computed by every kernel."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from pack_oracle import (
    assert_one_line,
    dense_experts,
    edit_json,
    layer_bytes,
    published_parts,
    quantized,
    read_checkpoint,
    read_safetensors,
)
from systems import needs_io_uring, needs_linux
from tiny_checkpoints import GEOMETRIES, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.tensors import classify_tensors
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.manifest import MIXED_FORMAT_VERSION
from flashmoe_mlx.formats.record import LayerLayouts, RecordLayout
from flashmoe_mlx.pack.least_squares import least_squares
from flashmoe_mlx.pack.manifest import write_manifest
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.pack.widths import layer_widths, parse_widths, target_layout
from flashmoe_mlx.pack.writer import add_variants, pack_checkpoint

PLAIN = GEOMETRIES["plain"]
BITS = {"gate": 3, "up": 3, "down": 4, "0": 8, "2-3": {"down": 2}}
WIDTHS = [(8, 8, 8), (3, 3, 4), (3, 3, 2), (3, 3, 2)]
TOKENS = [5, 17, 3, 5, 200, 41]
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of four layers."""
    return write_checkpoint(tmp_path_factory.mktemp("dense"), PLAIN, 0, "fused", dtype="BF16")


@pytest.fixture(scope="module")
def mixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with a width for each projection and layer."""
    return pack_checkpoint(source, tmp_path_factory.mktemp("mixed") / "pack", [BITS]).folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLX conversion in which down_proj of layers 0 and 3 has 6 bits, as by the recipe mixed_4_6."""
    folder = write_checkpoint(tmp_path_factory.mktemp("mlx"), PLAIN, 0, "mlx4")
    path = folder / "model.safetensors"
    tensors: dict[str, mx.array] = dict(mx.load(str(path)))  # type: ignore[arg-type]
    settings: dict[str, Any] = {"bits": 4, "group_size": 64}
    for layer in (0, 3):
        name = f"language_model.model.layers.{layer}.mlp.switch_mlp.down_proj"
        dense = mx.dequantize(*(tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases")), 64, 4)
        parts = mx.quantize(dense, group_size=64, bits=6)
        tensors |= {f"{name}.{part}": array for part, array in zip(("weight", "scales", "biases"), parts, strict=True)}
        settings[name] = {"bits": 6, "group_size": 64}
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    edit_json(folder / "config.json", quantization=settings)
    return folder


def logits(pack: Path, **options: Any) -> Logits:
    """Return the logits of a prompt and of each step after it."""
    with flashmoe_mlx.load(pack, **options) as engine:
        cache = engine.new_cache()
        steps = [engine.forward(list(range(40)), cache), *(engine.forward([token], cache) for token in TOKENS)]
        return np.concatenate([np.asarray(step) for step in steps])


def difference(got: Logits, expected: Logits) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def test_every_record_has_the_widths_that_were_asked_for(source: Path, mixed: Path) -> None:
    pack, tensors = open_pack(mixed), read_checkpoint(source)
    ((name, experts),) = pack.experts.items()
    assert (name, pack.manifest["format_version"]) == ("mixed-4.17", MIXED_FORMAT_VERSION)
    assert [tuple(form.bits for form in layout.formats) for layout in experts.layout] == WIDTHS
    for layer, widths in enumerate(WIDTHS):
        dense = dense_experts(tensors, PLAIN, layer, "fused")
        parts: list[mx.array] = []
        for (_, weights), bits in zip(dense.items(), widths, strict=True):
            parts += least_squares(weights, bits, 64) if bits == 2 else quantized(weights, bits, 64)
        assert experts.layer_path(layer).read_bytes() == layer_bytes(parts)
    assert verify_pack(pack) == []


def test_a_pack_of_one_width_is_what_it_was(demo_pack: Path, tmp_path: Path) -> None:
    """The demo model was packed before records had several formats."""
    folder = Path(shutil.copytree(demo_pack, tmp_path / "pack"))
    pack = open_pack(folder)
    layouts = {name: experts.layout for name, experts in pack.experts.items()}
    quantizers = {name: experts.quantizer for name, experts in pack.experts.items()}
    write_manifest(folder, pack.config, layouts, pack.manifest["source"], pack.manifest["skipped_tensors"], quantizers)
    assert (folder / "pack.json").read_bytes() == (demo_pack / "pack.json").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "pread", "slots": 5, "prefetch": "next_router"},
        {"backend": "mmap"},
        {"backend": "resident"},
        {"backend": "ram_hybrid", "budget_gib": 0.001, "prefetch": "previous_token"},
        pytest.param({"backend": "io_uring", "direct": False}, marks=needs_io_uring),
    ],
    ids=lambda options: options["backend"],
)
def test_every_store_gives_the_same_logits(options: dict[str, Any], mixed: Path, plain: Logits) -> None:
    assert difference(logits(mixed, **options), plain) < 2e-3


@pytest.fixture(scope="module")
def plain(mixed: Path) -> Logits:
    """The logits of elementary operations."""
    return logits(mixed, kernels="reference")


@needs_linux
@pytest.mark.parametrize("device", [gpu_on_cpu.metal, gpu_on_cpu.cuda], ids=["metal", "cuda"])
@pytest.mark.parametrize("backend", ["pread", "resident"])
@pytest.mark.sampled(1)
def test_kernels_for_gpus(
    device: Callable[..., AbstractContextManager[dict[str, int]]], backend: str, mixed: Path, plain: Logits
) -> None:
    with device(mx.float32), flashmoe_mlx.load(mixed, backend) as engine:
        cache = engine.new_cache()
        steps = [engine.forward(list(range(40)), cache), *(engine.forward([token], cache) for token in TOKENS)]
        assert difference(np.concatenate([np.asarray(step) for step in steps]), plain) < 2e-3
        ran = [name for name in engine.setup["kernels"] if "gate 3 bits" in name and "down 2 bits" in name]
        assert any("custom kernel" in engine.setup["kernels"][name] for name in ran)


def test_a_mixed_conversion(published: Path, tmp_path: Path) -> None:
    """Read in place, and copied by task=pack without bits=."""
    tensors = read_checkpoint(published)
    found = classify_tensors(Checkpoint.open(published)).experts.layout
    assert [layout.down.bits for layout in found] == [6, 4, 4, 6]
    pack = pack_checkpoint(published, tmp_path / "pack", None)
    assert pack_checkpoint(published, tmp_path / "pack", None).folder == pack.folder
    experts = pack.experts["mixed-4.33"]
    assert (experts.layout, experts.quantizer) == (found, None)
    for layer in range(4):
        assert experts.layer_path(layer).read_bytes() == layer_bytes(published_parts(tensors, layer))
    expected = logits(published, backend="checkpoint", kernels="reference")
    assert difference(logits(published, backend="checkpoint"), expected) < 2e-3
    assert difference(logits(pack.folder), expected) < 2e-3


def test_variants_made_from_a_mix(published: Path, tmp_path: Path) -> None:
    pack = pack_checkpoint(published, tmp_path / "pack", ["published", 4])
    assert set(pack.experts) == {"mixed-4.33", "q4"}
    assert pack.experts["q4"].quantizer == "minmax"
    added = add_variants(pack, [{"gate": 2, "up": 2, "down": 4}, {"0-3": {"gate": 2, "up": 2, "down": 3}}])
    assert set(added.experts) - set(pack.experts) == {"mixed-2.67", "mixed-2.33"}
    kept = read_safetensors(published / "model.safetensors")
    layout, record = added.experts["mixed-2.67"].layout[1], added.experts["mixed-2.67"].layer_path(1).read_bytes()
    down = next(part for part in layout.components if part.name == "down.weight")
    codes = kept["language_model.model.layers.1.mlp.switch_mlp.down_proj.weight"][2]
    assert record[down.offset : down.offset + down.nbytes] == codes[: down.nbytes]
    with pytest.raises(InputError) as caught:
        add_variants(added, [8])
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("bits", "fact"),
    [
        ([], "at least one"),
        ([7], "bits=7"),
        ([True], "bits=True"),
        ("mixed_9_9", "mixed_9_9"),
        ({"gate": 4, "up": 4}, "no width for down in layer 0"),
        ({"gate": 4, "up": 4, "down": 4, "3-9": 2}, "layer 9 does not exist"),
        ({"gate": 4, "up": 4, "down": 4, "x": 2}, "'x' is neither"),
        ({"gate": 4, "up": 4, "down": 4, "3-1": 2}, "'3-1' is neither"),
        ({"gate": {"up": 4}}, "choose from"),
        ({"0-3": {"left": 4}}, "choose from"),
    ],
)
def test_widths_that_are_wrong(bits: object, fact: str) -> None:
    with pytest.raises(InputError, match="bits") as caught:
        [layer_widths(width, 4) for width in parse_widths(bits)]
    assert fact in str(caught.value)
    assert caught.value.code == "invalid_value"
    assert_one_line(caught.value)


def test_more_bits_than_the_source_has() -> None:
    layout = LayerLayouts.uniform(RecordLayout.uniform(64, 64, 4, 64, "BF16"), 8)
    for bits in ({"gate": 4, "up": 4, "down": 6}, "mixed_4_6", 8):
        with pytest.raises(InputError, match="more would add nothing"):
            target_layout(*parse_widths(bits), layout, 64)


def test_recipes_are_those_of_mlx_lm() -> None:
    """``down_proj`` has the high width in the first and last eighth of the layers, and in every third between."""
    for layers in (4, 40, 48, 60):
        high = [i for i in range(layers) if layer_widths("mixed_3_6", layers)[i][2] == 6]
        expected = [i for i in range(layers) if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2]
        assert high == expected


def test_a_mixed_entry_that_is_wrong(mixed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "pack"))
    manifest = json.loads((folder / "pack.json").read_text())
    entry = manifest["variants"]["mixed-4.17"]
    for change in (
        {"layers": [0, 1, 2]},
        {"layers": [0, 1, 2, 9]},
        {"layers": [0, 1, 2, True]},
        {"layers": [2, 1, 0, 0]},
        {"layouts": {}},
        {"layouts": entry["layouts"][:1]},
        {"layouts": [*entry["layouts"], entry["layouts"][0]]},
        {"layouts": [*entry["layouts"][:2], entry["layouts"][2] | {"down": None}]},
        {"layouts": [*entry["layouts"][:2], entry["layouts"][2] | {"down": entry["layouts"][2]["down"] | {"bits": 7}}]},
    ):
        changed = {**manifest, "variants": {"mixed-4.17": entry | change}}
        (folder / "pack.json").write_text(json.dumps(changed))
        with pytest.raises(InputError) as caught:
            open_pack(folder)
        assert_one_line(caught.value)
