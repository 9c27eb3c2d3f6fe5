"""Block FP8, GPTQ and AWQ: decoded as their definitions say, and requantized in packs with the error reported."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from coded_checkpoints import CODED_GEOMETRIES, FORMS, float8, integers, settings_of, write_coded
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_oracle import assert_one_line

import flashmoe_mlx
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.coded import CodedTensor
from flashmoe_mlx.checkpoint.coded_formats import Codes
from flashmoe_mlx.checkpoint.tensors import classify_tensors
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.components import dense_projection, record_views
from flashmoe_mlx.formats.safetensors_header import TensorInfo
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.writer import add_variants, pack_checkpoint
from flashmoe_mlx.tasks.pack import Config, run

TOKENS = np.random.default_rng(1).integers(0, 150, 12)


def decoded(codes: Codes, stored: dict[str, tuple[str, np.ndarray]]) -> dict[str, tuple[CodedTensor, Any]]:
    """Return the decoded tensors by name, and a function that reads the tensors of ``stored``."""
    tensors = {
        name: TensorInfo("model.safetensors", dtype, values.shape, 0, values.nbytes)
        for name, (dtype, values) in stored.items()
    }
    places = {id(tensor): np.ascontiguousarray(stored[name][1]).tobytes() for name, tensor in tensors.items()}

    def read(tensor: TensorInfo, start: int, nbytes: int) -> bytearray:
        return bytearray(places[id(tensor)][start : start + nbytes])

    found = codes.decoded(tensors, "here")
    assert all(isinstance(tensor, CodedTensor) for tensor in found.values())
    return {name: (tensor, read) for name, tensor in found.items()}


@given(
    seed=st.integers(0, 2**32),
    experts=st.sampled_from([None, 1, 3]),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    scales=st.sampled_from(["BF16", "F32"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_float8_equals_its_definition(
    seed: int, experts: int | None, rows: int, columns: int, block: tuple[int, int], scales: str, data: st.DataObject
) -> None:
    shape = (rows, columns) if experts is None else (experts, rows, columns)
    stored, dense = float8(np.random.default_rng(seed), "a.weight", shape, block, scales)
    codes = Codes("fp8", {"weight_block_size": list(block)})
    tensor, read = decoded(codes, stored)["a.weight"]
    assert (tensor.dtype, tensor.shape) == ("BF16", shape)
    np.testing.assert_array_equal(tensor.exact(read, 0, tensor.nbytes), dense.reshape(-1, columns))
    start = data.draw(st.integers(0, tensor.nbytes - 1))
    end = data.draw(st.integers(start + 1, tensor.nbytes))
    whole = bytes(memoryview(mx.array(dense).astype(mx.bfloat16)).cast("B"))
    assert tensor.read(read, start, end - start) == whole[start:end]


@given(
    seed=st.integers(0, 2**32),
    form=st.sampled_from([("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8), ("awq", 4)]),
    out=st.sampled_from([32, 64, 96]),
    groups=st.sampled_from([(64, 32), (64, 64), (128, 128), (96, 96), (96, 48), (512, 256)]),
    order=st.booleans(),
    version=st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_integers_equal_their_definition(
    seed: int, form: tuple[str, int], out: int, groups: tuple[int, int], order: bool, version: int
) -> None:
    method, bits = form
    inputs, group_size = groups
    order = order and method == "gptq"
    random = np.random.default_rng(seed)
    stored, dense = integers(random, "a", (out, inputs), method, bits, group_size, order, version)
    named = {"desc_act": order, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    found = decoded(Codes(method, named), stored)
    weight, read = found["a.weight"]
    np.testing.assert_array_equal(weight.exact(read, 0, weight.nbytes), dense)
    parts = {name.removeprefix("a."): part.read(read, 0, part.nbytes) for name, (part, _) in found.items()}
    if order or group_size % 32:
        assert found.keys() == {"a.weight"}
        assert bytes(parts["weight"]) == dense.astype(np.float16).tobytes()
        return
    size = inputs * weight.bits // 32
    words = mx.array(np.frombuffer(parts["weight"], np.uint32).reshape(out, size))
    scales, biases = (mx.array(np.frombuffer(parts[p], np.float16).reshape(out, -1)) for p in ("scales", "biases"))
    width = inputs // scales.shape[1]
    made = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=width, bits=bits)
    limit = float(np.abs(np.array(biases)).max()) * 2.0**-10
    np.testing.assert_allclose(np.array(made), dense, rtol=0, atol=limit)


@pytest.mark.oracle
@pytest.mark.parametrize("scales", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)])
def test_float8_equals_transformers(shape: tuple[int, ...], scales: str) -> None:
    torch = pytest.importorskip("torch")
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    stored, _ = float8(np.random.default_rng(0), "a.weight", shape, (128, 128), scales)
    tensor, read = decoded(Codes("fp8", {"weight_block_size": [128, 128]}), stored)["a.weight"]
    weight = torch.from_numpy(stored["a.weight"][1]).view(torch.float8_e4m3fn)
    factors = torch.from_numpy(stored["a.weight_scale_inv"][1])
    factors = factors.view(torch.bfloat16) if scales == "BF16" else factors
    theirs = finegrained.Fp8Dequantize(None)._dequantize_one(weight, factors, torch.float32)
    ours = tensor.exact(read, 0, tensor.nbytes)
    np.testing.assert_array_equal(ours, theirs.numpy().reshape(ours.shape))


@pytest.mark.oracle
def test_awq_equals_mlx_lm() -> None:
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    stored, _ = integers(np.random.default_rng(0), "a", (64, 128), "awq", 4, 64)
    words = {name: values.view(np.uint32) if dtype == "I32" else values for name, (dtype, values) in stored.items()}
    published = {name: mx.array(values) for name, values in words.items()}
    theirs, _ = mlx_lm._transform_awq_weights(published, {"bits": 4, "group_size": 64})
    for name, (tensor, read) in decoded(Codes("awq", {}), stored).items():
        expected = bytes(memoryview(mx.contiguous(theirs[name])).cast("B"))
        assert bytes(tensor.read(read, 0, tensor.nbytes)) == expected, name


@pytest.mark.parametrize("form", FORMS)
def test_packs_equal_those_of_the_decoded_weights(form: str, tmp_path: Path) -> None:
    """Requantized weights are those of a checkpoint with the decoded weights, byte for byte.

    Codes of 4 bits in groups keep their codes, so a pack of them is compared with the decoded weights.
    """
    geometry = CODED_GEOMETRIES["qwen3_moe"]
    write_coded(tmp_path / "coded", form, geometry, tmp_path / "plain", parted=form in ("fp8", "gptq"))
    bits = (4, 2) if form == "fp8" else (4,)
    resident_bits = 4 if form in ("fp8", "gptq-order") else None
    pack = pack_checkpoint(tmp_path / "coded", tmp_path / "pack", bits, group_size=32, resident_bits=resident_bits)
    errors = pack.manifest["requantization_error"]
    if form in ("fp8", "gptq-order"):
        same = pack_checkpoint(tmp_path / "plain", tmp_path / "same", bits, group_size=32)
        assert same.manifest["files"] == pack.manifest["files"] | {"config.json": same.manifest["files"]["config.json"]}
        assert "requantization_error" not in same.manifest
        assert all(0.03 < error["mean"] <= error["worst"] < 0.4 for name in errors for error in errors[name].values())
    else:
        assert all(0 < error["mean"] <= error["worst"] < 1e-3 for name in errors for error in errors[name].values())
        with flashmoe_mlx.load(tmp_path / "pack") as ours, flashmoe_mlx.load(tmp_path / "plain") as plain:
            np.testing.assert_allclose(ours.logits(TOKENS), plain.logits(TOKENS), rtol=0, atol=0.03)
    assert errors.keys() == {*pack.experts, "resident"}
    assert errors["q4"].keys() == {"gate", "up", "down"}
    assert errors["resident"].keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_errors_are_those_of_the_records(tmp_path: Path) -> None:
    write_coded(tmp_path / "coded", "fp8", CODED_GEOMETRIES["qwen3_moe"], tmp_path / "plain")
    pack = pack_checkpoint(tmp_path / "coded", tmp_path / "pack", 3, group_size=64)
    experts, layout = classify_tensors(Checkpoint.open(tmp_path / "coded")).experts, pack.experts["q3"].layout[0]
    found = []
    for layer in range(experts.num_layers):
        for expert in range(experts.num_experts):
            exact = experts.exact(layer, expert)["up"]
            record = mx.array(np.frombuffer(pack.experts["q3"].payload(layer, expert), np.uint8))
            made = np.array(dense_projection(record_views(record, layout), "up", layout).astype(mx.float32))
            found.append(np.linalg.norm(made - exact) / np.linalg.norm(exact))
    stated = pack.manifest["requantization_error"]["q3"]["up"]
    assert (stated["mean"], stated["worst"]) == pytest.approx((np.mean(found), np.max(found)), rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize("form", ["fp8", "awq"])
def test_other_families_pack_codes(family: str, form: str, tmp_path: Path) -> None:
    """A pack of FP8 equals one of the decoded weights; one of AWQ keeps codes and rounds zeros times scales."""
    write_coded(tmp_path / "coded", form, CODED_GEOMETRIES[family], tmp_path / "plain")
    bits, other = (8, tmp_path / "other") if form == "fp8" else (4, tmp_path / "plain")
    pack_checkpoint(tmp_path / "coded", tmp_path / "pack", bits, group_size=32, resident_bits=None)
    if form == "fp8":
        pack_checkpoint(tmp_path / "plain", other, bits, group_size=32, resident_bits=None)
    with flashmoe_mlx.load(tmp_path / "pack") as coded, flashmoe_mlx.load(other) as plain:
        ours, theirs = coded.logits(TOKENS), plain.logits(TOKENS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if form == "fp8" else 0.03)


def test_variants_of_a_pack_of_codes(tmp_path: Path) -> None:
    """Interrupted and extended packs keep the errors of all finished layers."""
    write_coded(tmp_path / "coded", "fp8", CODED_GEOMETRIES["qwen3_moe"])
    whole = pack_checkpoint(tmp_path / "coded", tmp_path / "whole", (4, 2), group_size=32)
    pack_checkpoint(tmp_path / "coded", tmp_path / "parts", 4, group_size=32)
    parts = pack_checkpoint(tmp_path / "coded", tmp_path / "parts", 2, group_size=32)
    assert parts.manifest["requantization_error"] == whole.manifest["requantization_error"]
    again = add_variants(open_pack(tmp_path / "parts"), 3, group_size=32)
    assert again.manifest["requantization_error"] == whole.manifest["requantization_error"]


def test_shards_are_deleted_only_when_nothing_needs_them(tmp_path: Path) -> None:
    """Weights and their scales may lie in different files."""
    write_coded(tmp_path / "coded", "fp8", CODED_GEOMETRIES["qwen3_moe"], parted=True)
    kept = pack_checkpoint(tmp_path / "coded", tmp_path / "kept", group_size=32)
    pack = pack_checkpoint(tmp_path / "coded", tmp_path / "pack", group_size=32, delete_source=True)
    assert pack.manifest["files"] == kept.manifest["files"]
    assert not list((tmp_path / "coded").glob("*.safetensors"))


def test_the_task_shows_the_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coded(tmp_path / "coded", "gptq-order", CODED_GEOMETRIES["qwen3_moe"])
    run(Config(source=str(tmp_path / "coded"), out=str(tmp_path / "pack"), group_size=32), tmp_path)
    shown = " ".join(capsys.readouterr().err.split())
    assert "relative error of q4: gate" in shown
    assert "relative error of resident weights: q_proj" in shown


def test_codes_run_from_packs_only(tmp_path: Path) -> None:
    write_coded(tmp_path / "coded", "awq", CODED_GEOMETRIES["qwen3_moe"])
    with pytest.raises(CheckpointError, match="task=pack source=") as refused:
        flashmoe_mlx.load(tmp_path / "coded")
    assert refused.value.code == "needs_pack"
    assert_one_line(refused.value)


@pytest.mark.parametrize(
    ("form", "part", "change", "code"),
    [
        ("gptq", "qzeros", None, "missing_tensor"),
        ("gptq", "scales", None, "missing_tensor"),
        ("gptq", "qweight", ("I32", np.zeros((3, 64), np.int32)), "wrong_shape"),
        ("gptq", "qzeros", ("I32", np.zeros((2, 3), np.int32)), "wrong_shape"),
        ("gptq", "qweight", ("F32", np.zeros((8, 64), np.float32)), "wrong_shape"),
        ("gptq", "g_idx", ("I32", np.zeros(5, np.int32)), "wrong_shape"),
        ("gptq", "scales", ("F16", np.zeros((3, 64), np.float16)), "wrong_shape"),
        ("awq", "qzeros", ("I32", np.zeros((2, 1), np.int32)), "wrong_shape"),
        ("fp8", "weight_scale_inv", ("F32", np.zeros((7, 1), np.float32)), "wrong_shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(form: str, part: str, change: Any, code: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    if form == "fp8":
        stored, _ = float8(random, "a.weight", (64, 64), (128, 128), "F32")
    else:
        stored, _ = integers(random, "a", (64, 64), form, 4, 32)
    stored.pop(f"a.{part}")
    if change is not None:
        stored[f"a.{part}"] = change
    with pytest.raises(CheckpointError) as refused:
        decoded(Codes(form, settings_of(form)), stored)
    assert refused.value.code == code
    assert_one_line(refused.value)


@pytest.mark.parametrize("value", [-1, 2, 1])
def test_groups_are_checked_when_they_are_read(value: int) -> None:
    """Groups beyond the scales, and an order that desc_act denies."""
    stored, _ = integers(np.random.default_rng(0), "a", (32, 64), "gptq", 4, 32)
    stored["a.g_idx"][1][0] = value
    tensor, read = decoded(Codes("gptq", {"desc_act": False}), stored)["a.weight"]
    with pytest.raises(CheckpointError, match="g_idx"):
        tensor.read(read, 0, 16)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_coded(tmp_path / "coded", "fp8", CODED_GEOMETRIES["qwen3_moe"])
    data = bytearray((tmp_path / "coded" / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin = next(e["data_offsets"][0] for n, e in header.items() if n.endswith("experts.3.up_proj.weight"))
    data[8 + length + begin] = 0x7F
    (tmp_path / "coded" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError) as refused:
        pack_checkpoint(tmp_path / "coded", tmp_path / "pack", group_size=32)
    assert refused.value.code == "not_finite"
