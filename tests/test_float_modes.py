"""MLX's modes mxfp4, nvfp4 and mxfp8: read as they are, and computed exactly as MLX computes them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from pack_oracle import edit_json
from tiny_checkpoints import GEOMETRIES, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.tensors import classify_tensors
from flashmoe_mlx.custom_kernels.expert_mlp import mlx as by_mlx
from flashmoe_mlx.custom_kernels.expert_mlp import reference
from flashmoe_mlx.custom_kernels.weights import ExpertWeights, QuantizedWeight
from flashmoe_mlx.errors import PackError
from flashmoe_mlx.formats.record import FLOAT_MODES, MatrixFormat
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.resident import without_floats
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.pack.writer import pack_checkpoint

Logits = npt.NDArray[np.float32]
TOKENS = [5, 17, 3, 5, 200, 41]


def write(folder: Path, mode: str) -> tuple[Path, Path]:
    """Write a conversion in ``mode``, and the same values as a dense conversion in f32; return both folders."""
    source = write_checkpoint(folder / "affine", GEOMETRIES["plain"], 0, "mlx4")
    stored: dict[str, mx.array] = dict(mx.load(str(source / "model.safetensors")))  # type: ignore[arg-type]
    bits, group_size = FLOAT_MODES[mode]
    floats, dense = dict(stored), dict(stored)
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "mode": mode}
    for name in [key.removesuffix(".scales") for key in stored if key.endswith(".scales")]:
        parts = [stored[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        if name.endswith(("mlp.gate", "shared_expert_gate")):
            settings[name] = {"bits": 8, "group_size": 64, "mode": "affine"}
            continue
        values = mx.dequantize(*parts, group_size=64, bits=4).astype(mx.float32)
        weight, scales = mx.quantize(values, group_size=group_size, bits=bits, mode=mode)
        floats |= {f"{name}.weight": weight, f"{name}.scales": scales}
        exact = mx.dequantize(weight, scales, None, group_size, bits, mode, dtype=mx.float32)
        dense[f"{name}.weight"] = exact
        for tensors, gone in ((floats, ("biases",)), (dense, ("scales", "biases"))):
            for part in gone:
                del tensors[f"{name}.{part}"]
    folders = []
    for kind, tensors in (("floats", floats), ("dense", dense)):
        made = folder / kind
        made.mkdir()
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                (made / path.name).write_bytes(path.read_bytes())
        mx.eval(tensors)
        mx.save_safetensors(str(made / "model.safetensors"), tensors, {"format": "mlx"})
        folders.append(made)
    edit_json(folders[0] / "config.json", quantization=settings)
    return folders[0], folders[1]


def logits(model: Path, **options: Any) -> Logits:
    with flashmoe_mlx.load(model, **options) as engine:
        cache = engine.new_cache()
        steps = [engine.forward(list(range(20)), cache), *(engine.forward([token], cache) for token in TOKENS)]
        return np.concatenate([np.asarray(step) for step in steps])


@pytest.mark.parametrize("mode", FLOAT_MODES)
@pytest.mark.sampled(1)
def test_a_conversion(mode: str, tmp_path: Path) -> None:
    """The oracle is the same model with the values that ``mx.dequantize`` gives."""
    floats, dense = write(tmp_path, mode)
    expected = logits(dense, backend="checkpoint", kernels="reference")
    pack = pack_checkpoint(floats, tmp_path / "pack", None)
    assert {name: experts.quantizer for name, experts in pack.experts.items()} == {mode: None}
    assert pack.experts[mode].layout.single_format == MatrixFormat(*FLOAT_MODES[mode], "U8", mode)
    assert verify_pack(pack) == []
    for model, options in (
        (floats, {"backend": "checkpoint"}),
        (floats, {"backend": "checkpoint", "kernels": "reference"}),
        (pack.folder, {"backend": "pread", "slots": 5}),
        (pack.folder, {"backend": "ram_hybrid", "budget_gib": 0.001}),
        (pack.folder, {"backend": "resident"}),
    ):
        got = logits(model, **options)
        assert np.abs(got - expected).max() < 2e-3 * max(1.0, np.abs(expected).max())
        assert (got.argmax(-1) == expected.argmax(-1)).all()
    with flashmoe_mlx.load(pack.folder) as engine:
        assert engine.setup["experts"]["mode"] == mode
        note = engine.setup["note"] or ""
        assert (f"experts in {mode} are computed by MLX" in note) == (mode != "mxfp4")
        assert engine.setup["replaced_kernels"] == []


def test_a_variant_of_four_bits_from_mxfp4(tmp_path: Path) -> None:
    floats, _ = write(tmp_path, "mxfp4")
    pack = pack_checkpoint(floats, tmp_path / "pack", ["published", 4])
    assert set(open_pack(pack.folder).experts) == {"mxfp4", "q4"}
    assert pack.experts["q4"].layout.single_format == MatrixFormat(4, 64, "BF16")


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_resident_matrices_keep_their_values(mode: str, tmp_path: Path) -> None:
    floats, _ = write(tmp_path, mode)
    checkpoint = Checkpoint.open(floats)
    matrix = next(matrix for matrix in classify_tensors(checkpoint).matrices if matrix.mode == mode)
    stored: dict[str, mx.array] = dict(mx.load(str(floats / "model.safetensors")))  # type: ignore[arg-type]
    parts = [stored[f"language_model.{matrix.name}.{part}"] for part in ("weight", "scales")]
    bits, group_size = FLOAT_MODES[mode]
    expected = mx.dequantize(*parts, None, group_size, bits, mode, dtype=mx.float32)
    made = without_floats(checkpoint, matrix)
    if mode == "mxfp4":
        weight = QuantizedWeight(*(made[f"{matrix.name}.{part}"] for part in ("weight", "scales", "biases")), 8, 32)
    else:
        weight = QuantizedWeight(made[f"{matrix.name}.weight"])
    assert np.array_equal(np.array(weight.dense()), np.array(expected))


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_the_mlp_of_an_expert(mode: str) -> None:
    bits, group_size = FLOAT_MODES[mode]
    shapes = ((64, 128), (64, 128), (128, 64))
    parts = [mx.quantize(mx.random.normal(shape), group_size=group_size, bits=bits, mode=mode) for shape in shapes]
    expert = ExpertWeights(*(QuantizedWeight(*own, None, bits, group_size, mode=mode) for own in parts))
    x = mx.random.normal((3, 128))
    got, expected = (np.array(mlp(x, expert)) for mlp in (by_mlx.expert_mlp, reference.expert_mlp))
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype", "mode"), [(4, 64, "U8", "mxfp4"), (4, 32, "BF16", "mxfp4"), (4, 32, "U8", "mxfp5")]
)
def test_formats_that_do_not_exist(bits: int, group_size: int, dtype: str, mode: str) -> None:
    with pytest.raises(PackError) as caught:
        MatrixFormat(bits, group_size, dtype, mode)
    assert caught.value.code == "unsupported_layout"
