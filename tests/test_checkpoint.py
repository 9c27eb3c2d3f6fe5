"""Published checkpoints are untrusted: headers, index and config are checked before use."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pack_oracle import SMALL, assert_one_line, edit_json
from tiny_checkpoints import GEOMETRIES, write_checkpoint

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.tensors import classify_tensors
from flashmoe_mlx.errors import CheckpointError, InputError
from flashmoe_mlx.formats.safetensors_header import read_header


def write(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    shape, offsets = (list(value) if isinstance(value, tuple) else value for value in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(path)
    assert_one_line(caught.value)
    assert str(path) in str(caught.value)


def test_a_good_header(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "mlx"}, "b": entry("BF16", (2, 3), (8, 20)), "a": entry()}
    header |= {"empty": entry("U8", (0, 5), (8, 8)), "scalar": entry("I64", (), (20, 28))}
    tensors, start = read_header(write(tmp_path / "x.safetensors", header, bytes(28)))
    assert start == (tmp_path / "x.safetensors").stat().st_size - 28
    assert {name: (t.dtype, t.shape, t.begin, t.nbytes) for name, t in tensors.items()} == {
        "a": ("F32", (2,), 0, 8),
        "b": ("BF16", (2, 3), 8, 12),
        "empty": ("U8", (0, 5), 8, 0),
        "scalar": ("I64", (), 20, 8),
    }
    assert {tensor.shard for tensor in tensors.values()} == {"x.safetensors"}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(dtype="F4")}, "type 'F4' is not supported"),
        ({"a": entry(dtype=["F32"])}, r"type \['F32'\] is not supported"),
        ({"a": entry(dtype={})}, "is not supported"),
        ({"a": entry(dtype=None)}, "is not supported"),
        ({"a": entry(shape=(-2,))}, "not short lists of natural numbers"),
        ({"a": entry(shape=(2.0,))}, "not short lists of natural numbers"),
        ({"a": entry(shape=(True, 2))}, "not short lists of natural numbers"),
        ({"a": entry(shape="2")}, "not short lists of natural numbers"),
        ({"a": entry(shape=None)}, "not short lists of natural numbers"),
        ({"a": entry(shape=(2**63,))}, "not short lists of natural numbers"),
        ({"a": entry(shape=(1,) * 100 + (2,))}, "not short lists of natural numbers"),
        ({"a": entry(shape=(2**62, 4), offsets=(0, 0))}, "do not hold shape"),
        ({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}, "do not hold shape"),
        ({"a": entry(offsets=(0, 8, 8))}, "not short lists of natural numbers"),
        ({"a": entry(offsets=(0,))}, "not short lists of natural numbers"),
        ({"a": entry(offsets=(-8, 0))}, "not short lists of natural numbers"),
        ({"a": entry(offsets=(8, 0))}, "do not hold shape"),
        ({"a": entry(offsets=(0, 7))}, "do not hold shape"),
        ({"a": entry(), "b": entry()}, "overlap or leave gaps"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "overlap or leave gaps"),
        ({"a": entry(offsets=(8, 16))}, "overlap or leave gaps"),
        ({"a": entry(), "b": entry(offsets=(2**62, 2**62 + 8))}, "overlap or leave gaps"),
        ({"a": 5}, "its entry is not an object"),
        ({"a": []}, "its entry is not an object"),
        ({"a": {}}, "is not supported"),
        ({"a\nb": entry()}, "characters that cannot be shown"),
        ({"\x1b[31m": entry()}, "characters that cannot be shown"),
        ({"a": entry(), "__metadata__": 7}, "__metadata__ does not map"),
        ({"a": entry(), "__metadata__": {"a": {}}}, "__metadata__ does not map"),
        ({}, "bytes long, but its header needs"),
        (b"[]", "header is damaged"),
        (b"", "header is damaged"),
        (b"{", "header is damaged"),
        (b"\xff", "header is damaged"),
        (json.dumps({"a": entry()}).encode("utf-16"), "header is damaged"),
        (b'{"a": 1, "a": 2}', "header is damaged"),
        (b'{"a": NaN}', "header is damaged"),
        (b'{"a":' * 100_000, "header is damaged"),
        (b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b"]}}", "header is damaged"),
    ],
)
def test_bad_headers(header: bytes | dict[str, Any], reason: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "x.safetensors", header, bytes(8)), reason)


@pytest.mark.parametrize("length", [1, 2**31, 100_000_001, 2**63, 2**64 - 1, 2**64 - 8])
def test_bad_header_lengths(length: int, tmp_path: Path) -> None:
    refused(write(tmp_path / "x.safetensors", {"a": entry()}, bytes(8), length), "damaged|not a complete")


def test_files_cut_short_anywhere_or_extended(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, bytes(8))
    whole = path.read_bytes()
    assert len(read_header(path)[0]) == 1
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path, "not a complete safetensors file|bytes long, but its header needs")
    path.write_bytes(whole + b"\0")
    refused(path, "bytes long, but its header needs")


@pytest.mark.parametrize("kind", ["fifo", "directory", "nothing", "device", "broken link"])
def test_missing_and_irregular_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    refused(path, "missing or not a regular file")
    if kind != "nothing":
        (tmp_path / "config.json").write_text(json.dumps(SMALL.config()))
        with pytest.raises(CheckpointError, match="missing or not a regular file; download it again"):
            Checkpoint.open(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
@example(bytes(8))
@example(struct.pack("<Q", 2) + b"{}")
def test_arbitrary_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    reads_or_refuses(path)


NUMBERS = st.integers(-1, 20) | st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, 0.5, True, None, "1"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "", 1, None]),
        "shape": st.lists(NUMBERS, max_size=4),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    }
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=3), ENTRIES | NUMBERS, max_size=4), st.binary(max_size=40))
def test_arbitrary_headers(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    reads_or_refuses(write(tmp_path / "x.safetensors", header, data))


def reads_or_refuses(path: Path) -> None:
    try:
        tensors, start = read_header(path)
    except CheckpointError as error:
        assert_one_line(error)
        return
    size = path.stat().st_size
    assert start + sum(tensor.nbytes for tensor in tensors.values()) == size
    assert all(0 <= tensor.begin <= tensor.begin + tensor.nbytes <= size - start for tensor in tensors.values())


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "mlx4", shards=3)


def opening_refused(folder: Path, reason: str, error: type[InputError] = CheckpointError) -> InputError:
    with pytest.raises(error, match=reason) as caught:
        classify_tensors(Checkpoint.open(folder))
    assert_one_line(caught.value)
    assert str(folder) in str(caught.value)
    return caught.value


def refusal_of(folder: Path) -> str:
    """Return the code of the error."""
    return opening_refused(folder, ".", InputError).code


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "x.bin",
        "",
        ".",
        "a\n.safetensors",
        "\0.safetensors",
        "\ud800.safetensors",
        5,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_that_points_elsewhere(folder: Path, shard: Any) -> None:
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {"a": shard})
    assert refusal_of(folder) == "invalid_index"


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 5])
def test_an_index_without_a_map(folder: Path, weight_map: Any) -> None:
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert refusal_of(folder) == "invalid_index"


def test_an_index_that_promises_too_much(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {"extra\nname": SHARD})
    opening_refused(folder, r"tensor 'extra\\nname' is missing, though model.safetensors.index.json names it")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}, "weight_map": {}}', "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_are_not_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert refusal_of(folder) == "invalid_json"


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    opening_refused(tmp_path / "nowhere", "no such folder")
    (folder / SHARD).unlink()
    opening_refused(folder, f"1 of 3 shards missing, the first is {SHARD}; finish the download")
    (folder / "config.json").unlink()
    opening_refused(folder, "neither a pack")
    (tmp_path / "empty").mkdir()
    shutil.copy(write_checkpoint(tmp_path / "other", SMALL, 0) / "config.json", tmp_path / "empty")
    assert refusal_of(tmp_path / "empty") == "no_weights"


def test_a_tensor_twice(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(folder / SHARD, folder / "model-again.safetensors")
    error = opening_refused(folder, "is also in model-00002-of-00003.safetensors")
    assert error.code == "duplicate_tensor"


def test_shards_may_be_links(folder: Path, tmp_path: Path) -> None:
    """The cache of the hub has links."""
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    assert classify_tensors(Checkpoint.open(folder)).experts.num_layers == 2


BESIDE = (
    "._model.safetensors",
    "._model.safetensors.index.json",
    ".DS_Store",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "consolidated.safetensors",
    "mmproj.safetensors",
    "original/consolidated.00.pth",
    "pytorch_model.bin.index.json",
)


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("index", [True, False])
def test_files_beside_the_weights_are_ignored(name: str, shards: int, index: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "mlx4", shards=shards)
    if not index:
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    before = Checkpoint.open(folder).tensors
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\0\5\x16\7" + bytes(4092))
    assert Checkpoint.open(folder).tensors == before


def test_shards_count_by_their_names_where_there_is_no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / SHARD).unlink()
    error = opening_refused(folder, f"1 of 3 shards missing, the first is {SHARD}")
    assert error.code == "missing_shards"


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "mlx4")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert classify_tensors(Checkpoint.open(folder)).experts.num_layers == 2


def test_a_shard_without_a_listed_tensor_must_be_downloaded(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {"extra": SHARD})
    error = opening_refused(folder, "download that file again")
    assert error.code == "incomplete_shard"


@pytest.mark.parametrize("metadata", [None, {}, {"format": "mlx"}])
def test_metadata_may_be_null(metadata: Any, tmp_path: Path) -> None:
    """MLX writes null; safetensors reads it as absent."""
    tensors, _ = read_header(write(tmp_path / "x.safetensors", {"__metadata__": metadata, "a": entry()}, bytes(8)))
    assert tensors.keys() == {"a"}


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
    refused(path, "git lfs pull")


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        ({"model-Q4_K_M.gguf": b"GGUF"}, "unsupported_format", "GGUF"),
        ({"adapter_config.json": b"{}"}, "no_model", "adapter"),
        ({"params.json": b"{}", "consolidated.safetensors": b""}, "no_model", "config.json"),
        ({"inner/config.json": b"{}"}, "no_model", "inner"),
        ({"snapshots/abc/model.safetensors": b""}, "no_model", "snapshots"),
    ],
)
def test_folders_of_other_kinds_are_recognized(files: dict[str, bytes], code: str, says: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    error = opening_refused(tmp_path, says)
    assert error.code == code


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    for name in ("model.gguf", "renamed.bin"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
        assert opening_refused(tmp_path / name, "GGUF").code == "unsupported_format"
    (tmp_path / "other").write_bytes(b"x")
    assert opening_refused(tmp_path / "other", "is a file").code == "not_a_folder"
    (tmp_path / "only").mkdir()
    shutil.copy(write_checkpoint(tmp_path / "source", SMALL, 0) / "config.json", tmp_path / "only")
    (tmp_path / "only" / "model.gguf").write_bytes(b"GGUF")
    assert opening_refused(tmp_path / "only", "GGUF").code == "unsupported_format"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_wrapped_names_are_read(prefix: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "fused")
    before = classify_tensors(Checkpoint.open(folder))
    edited_header(
        folder / "model.safetensors", lambda header: {f"{prefix}{name}": entry for name, entry in header.items()}
    )
    after = classify_tensors(Checkpoint.open(folder))
    assert [vector.name for vector in after.vectors] == [vector.name for vector in before.vectors]
    assert [vector.add_one for vector in after.vectors] == [vector.add_one for vector in before.vectors]


def test_a_base_model_without_its_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", GEOMETRIES["plain"], 0, "fused")

    def bare(header: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("model.language_model.", ""): entry for name, entry in header.items()}

    edited_header(folder / "model.safetensors", bare)
    assert classify_tensors(Checkpoint.open(folder)).experts.num_layers == 4
    edited_header(
        folder / "model.safetensors",
        lambda header: {name.replace("lm_head", "mtp.head"): entry for name, entry in header.items()},
    )
    error = opening_refused(folder, "base model without its head")
    assert error.code == "missing_tensor"


def edited_header(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite ``path`` with other names in its header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", None)
    write(path, {"__metadata__": metadata, **edit(header)}, data[start:])


@pytest.mark.parametrize(
    ("entry_of_gate", "code"),
    [
        ({"bits": 8}, None),
        ({"group_size": 64}, None),
        ({"bits": 8, "group_size": None}, None),
        ({}, None),
        (None, None),
        (True, None),
        (False, None),
        ({"bits": 4}, "contradicting_quantisation"),
        ({"bits": float("nan")}, "contradicting_quantisation"),
        ({"bits": "8"}, "contradicting_quantisation"),
        ({"group_size": 32}, "contradicting_quantisation"),
        ({"bits": 8, "mode": "mxfp8"}, "contradicting_quantisation"),
        ({"bits": 8, "mode": "mxfp9"}, "unsupported_format"),
    ],
)
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_entries_of_single_modules(entry_of_gate: Any, code: str | None, key: str, tmp_path: Path) -> None:
    """Missing and null values contradict nothing."""
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "mlx4")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization")
    del config["quantization_config"]
    settings["language_model.model.layers.1.mlp.gate"] = entry_of_gate
    (folder / "config.json").write_text(json.dumps(config | {key: settings}))
    if code is None:
        assert classify_tensors(Checkpoint.open(folder)).experts.layout[0].gate.bits == 4
    else:
        assert refusal_of(folder) == code


def test_experts_in_another_mode_of_mlx_are_recognized_by_their_tensors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", GEOMETRIES["plain"], 0, "mlx4")
    path = folder / "model.safetensors"
    tensors = mx.load(str(path))
    for name in [name for name in tensors if ".switch_mlp." in name and name.endswith(".weight")]:
        stem = name.removesuffix(".weight")
        dense = mx.dequantize(tensors[name], tensors[f"{stem}.scales"], tensors.pop(f"{stem}.biases"), 64, 4)
        tensors[name], tensors[f"{stem}.scales"] = mx.quantize(dense, group_size=32, bits=4, mode="mxfp4")
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    assert opening_refused(folder, "those of mxfp4").code == "contradicting_quantisation"  # config.json says affine
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"]["mode"], config["quantization_config"]["mode"]
    (folder / "config.json").write_text(json.dumps(config))
    formats = {form.mode for form in classify_tensors(Checkpoint.open(folder)).experts.layout[0].formats}
    assert formats == {"mxfp4"}


def test_gate_and_up_fused_as_mlx_vlm_keeps_them(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "mlx4")

    def fused(header: dict[str, Any]) -> dict[str, Any]:
        return {
            name.replace("switch_mlp.gate_proj", "switch_mlp.gate_up_proj"): entry for name, entry in header.items()
        }

    edited_header(folder / "model.safetensors", fused)
    error = opening_refused(folder, r"fused in switch_mlp\.gate_up_proj")
    assert error.code == "missing_tensor"
    assert "download" not in str(error)


def test_a_shard_that_was_replaced_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    experts = classify_tensors(checkpoint).experts
    other = write_checkpoint(folder.with_name("other"), replace(SMALL, vocab_size=50), 0, "mlx4", shards=3)
    for path in other.glob("*.safetensors"):
        shutil.copy(path, folder)
    for _ in range(2):  # twice: no state of the first attempt may hide the change
        with pytest.raises(CheckpointError, match="the file was replaced") as caught:
            experts.extents(0, 0)
        assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"num_experts": 5}, "wrong_shape"),
        ({"num_hidden_layers": 3, "layer_types": None}, "missing_tensor"),
        ({"num_hidden_layers": 1, "layer_types": None}, ("unknown_tensor", "missing_tensor")),
        ({"num_hidden_layers": 2**12, "layer_types": None}, "missing_tensor"),
        ({"num_hidden_layers": 2**20, "layer_types": None}, "invalid_config"),
        ({"hidden_size": 128}, "wrong_shape"),
        ({"moe_intermediate_size": 2**24}, "wrong_shape"),
        ({"vocab_size": 1}, "wrong_shape"),
        ({"num_experts": 2**25}, "invalid_config"),
        ({"num_experts": True}, "invalid_config"),
        ({"num_experts": float("nan")}, "invalid_config"),
        ({"hidden_size": "64\n"}, "invalid_config"),
        ({"rms_norm_eps": 1e999}, "invalid_config"),
        ({"rms_norm_eps": float("nan")}, "invalid_config"),
        ({"rope_parameters": []}, "invalid_config"),
        ({"rope_parameters": 5}, "invalid_config"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "invalid_config"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": float("nan")}}, "invalid_config"),
        ({"layer_types": ["linear_attention", "mamba\n"]}, "invalid_config"),
        ({"layer_types": [[], {}]}, "invalid_config"),
        ({"hidden_act": "gelu\n"}, "unsupported_arithmetic"),
        ({"new_gate\n": "on"}, "unsupported_arithmetic"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, changes: dict[str, Any], code: str | tuple[str, ...]) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | changes)
    assert refusal_of(folder) in (code if isinstance(code, tuple) else (code,))


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header[new] = header.pop(old)

    return edit


def retyped(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header[name] |= changes

    return edit


PREFIX = "language_model.model.layers.1.mlp."


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (renamed(f"{PREFIX}switch_mlp.up_proj.scales", "x"), "up_proj.scales is missing"),
        (renamed(f"{PREFIX}gate.biases", "x"), "mlp.gate.biases is missing"),
        (renamed(f"{PREFIX}gate.weight", "model.layers.1.mlp.router"), "mlp.gate.weight is missing"),
        (retyped(f"{PREFIX}switch_mlp.up_proj.scales", dtype="F16"), "has type BF16, expected F16|mixed types"),
        (retyped(f"{PREFIX}switch_mlp.up_proj.scales", dtype="I16"), "has type I16, expected BF16 or F16 or F32"),
        (retyped(f"{PREFIX}switch_mlp.up_proj.weight", dtype="I32"), "has type I32, expected U32"),
        (retyped(f"{PREFIX}switch_mlp.up_proj.biases", shape=[4, 1, 64]), "has shape"),
        (retyped(f"{PREFIX}switch_mlp.up_proj.weight", shape=[4, 32, 16]), "is not a supported quantization"),
        (retyped("language_model.model.norm.weight", shape=[1, 64]), r"has shape \[1, 64\], config.json needs \[64\]"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, edit: Callable[[dict[str, Any]], None], reason: str) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "mlx4")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    edit(header)
    write(path, header, data[start:])
    opening_refused(folder, reason, InputError)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "fused")
    write(folder / "model-more.safetensors", {"model.layers.0.adapter": entry()}, bytes(8))
    opening_refused(folder, "tensor model.layers.0.adapter is not part of this kind of model")


def test_the_same_tensor_under_two_names(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", GEOMETRIES["plain"], 0, "mlx4")
    write(folder / "model-more.safetensors", {"model.norm.weight": entry("BF16", (4,))}, bytes(8))
    assert refusal_of(folder) == "duplicate_tensor"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_the_json_files(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        write_checkpoint(folder, SMALL, 0, "mlx4", shards=2)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    original = (folder / name).read_text()
    value = json.loads(original)
    parent = value
    while True:
        key = data.draw(st.sampled_from(sorted(parent)))
        if not isinstance(parent[key], dict) or not parent[key] or data.draw(st.integers(0, 4)) == 0:
            break
        parent = parent[key]
    parent[key] = data.draw(NUMBERS | st.lists(NUMBERS, max_size=3) | st.text(max_size=5) | st.just({}))
    (folder / name).write_text(json.dumps(value))
    try:
        classify_tensors(Checkpoint.open(folder))
    except InputError as error:
        assert_one_line(error)
    finally:
        (folder / name).write_text(original)
