"""Published checkpoints are untrusted: what their headers, index and config say is checked before it is used."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pack_oracle import SMALL, assert_one_line, edit_json
from tiny_checkpoints import GEOMETRIES, write_checkpoint

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.safetensors_header import read_header
from flashmoe_mlx.checkpoint.tensors import sort_tensors
from flashmoe_mlx.errors import CheckpointError, InputError


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
def test_files_that_are_none(kind: str, tmp_path: Path) -> None:
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


def opening_refused(folder: Path, reason: str, error: type[InputError] = CheckpointError) -> None:
    with pytest.raises(error, match=reason) as caught:
        sort_tensors(Checkpoint.open(folder))
    assert_one_line(caught.value)
    assert str(folder) in str(caught.value)


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
    opening_refused(folder, "is not the name of a safetensors file in this folder")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 5])
def test_an_index_without_a_map(folder: Path, weight_map: Any) -> None:
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    opening_refused(folder, "weight_map is missing")


def test_an_index_that_promises_too_much(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {"extra\nname": SHARD})
    opening_refused(folder, r"tensor 'extra\\nname' is missing, though model.safetensors.index.json names it")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}, "weight_map": {}}', "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_are_no_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    opening_refused(folder, "not valid JSON|must hold a JSON object", InputError)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    opening_refused(tmp_path / "nowhere", "no such folder")
    (folder / SHARD).unlink()
    opening_refused(folder, f"1 of 3 shards missing, the first is {SHARD}; finish the download")
    (folder / "config.json").unlink()
    opening_refused(folder, "neither a pack")
    (tmp_path / "empty").mkdir()
    shutil.copy(write_checkpoint(tmp_path / "other", SMALL, 0) / "config.json", tmp_path / "empty")
    opening_refused(tmp_path / "empty", "no safetensors files here")


def test_a_tensor_twice(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(folder / SHARD, folder / "again.safetensors")
    opening_refused(folder, "is also in again.safetensors")


def test_shards_may_be_links(folder: Path, tmp_path: Path) -> None:
    """As in the cache of the hub."""
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    assert sort_tensors(Checkpoint.open(folder)).experts.num_layers == 2


def test_a_shard_that_was_replaced_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    experts = sort_tensors(checkpoint).experts
    other = write_checkpoint(folder.with_name("other"), replace(SMALL, vocab_size=50), 0, "mlx4", shards=3)
    for path in other.glob("*.safetensors"):
        shutil.copy(path, folder)
    for _ in range(2):  # and again: no state of the first attempt may hide it
        with pytest.raises(CheckpointError, match="the file was replaced") as caught:
            experts.extents(0, 0)
        assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts": 5}, "config.json needs|no supported quantisation"),
        ({"num_hidden_layers": 3, "layer_types": None}, "layers.2.* is missing"),
        ({"num_hidden_layers": 1, "layer_types": None}, "not part of this kind of model|is missing"),
        ({"num_hidden_layers": 2**20, "layer_types": None}, "is missing"),
        ({"hidden_size": 128}, "no supported quantisation"),
        ({"moe_intermediate_size": 2**24}, "no supported quantisation"),
        ({"vocab_size": 1}, "no supported quantisation"),
        ({"num_experts": 2**25}, "num_experts is 33554432"),
        ({"num_experts": True}, "num_experts is True"),
        ({"hidden_size": "64\n"}, "hidden_size is '64"),
        ({"rms_norm_eps": 1e999}, "Infinity is not a number"),
        ({"rope_parameters": []}, "rope_theta is missing"),
        ({"rope_parameters": 5}, "rope_parameters is not an object"),
        ({"layer_types": ["linear_attention", "mamba\n"]}, "layer type 'mamba"),
        ({"layer_types": [[], {}]}, r"layer type \[\]"),
        ({"hidden_act": "gelu\n"}, "hidden_act 'gelu"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, changes: dict[str, Any], reason: str) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | changes)
    opening_refused(folder, reason, InputError)


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
        (retyped(f"{PREFIX}switch_mlp.up_proj.weight", shape=[4, 32, 16]), "no supported quantisation"),
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


def test_a_tensor_that_no_such_model_has(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, 0, "fused")
    write(folder / "more.safetensors", {"model.layers.0.adapter": entry()}, bytes(8))
    opening_refused(folder, "tensor model.layers.0.adapter is not part of this kind of model")


def test_the_same_tensor_under_two_names(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", GEOMETRIES["plain"], 0, "mlx4")
    write(folder / "more.safetensors", {"model.norm.weight": entry("BF16", (4,))}, bytes(8))
    opening_refused(folder, "are the same tensor")


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
        sort_tensors(Checkpoint.open(folder))
    except InputError as error:
        assert_one_line(error)
    finally:
        (folder / name).write_text(original)
