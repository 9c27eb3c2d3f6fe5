"""Folders with more than one complete set of shards: second sets, stale indexes, links, unrelated files."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from pack_oracle import SMALL, assert_one_line, edit_json, read_safetensors
from tiny_checkpoints import GEOMETRIES, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.tensors import CheckpointTensors, classify_tensors
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import read_extents
from flashmoe_mlx.pack.writer import pack_checkpoint

INDEX = "model.safetensors.index.json"
Content = list[bytes]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", SMALL, 0, "mlx4", shards=3)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "single", SMALL, 0, "mlx4")


def opened(folder: Path) -> tuple[CheckpointTensors, Content]:
    tensors = classify_tensors(Checkpoint.open(folder))
    experts = tensors.experts
    places = (experts.extents(layer, 0) for layer in range(experts.num_layers))
    return tensors, [bytes(read_extents(extents)) for extents in places]


def shards(folder: Path) -> list[str]:
    return sorted({tensor.shard for tensor in Checkpoint.open(folder).tensors.values()})


def refused(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        opened(folder)
    assert_one_line(caught.value)
    return caught.value


def numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


# Two sets of weights in one folder


def test_a_stale_index_is_ignored(sharded: Path, single: Path) -> None:
    shutil.copy(sharded / INDEX, single)
    assert shards(single) == ["model.safetensors"]
    assert opened(single)[1] == opened(sharded)[1]


def test_an_index_with_all_its_shards_is_used(sharded: Path, single: Path) -> None:
    (sharded / "model.safetensors").write_bytes(b"no longer whole")
    assert shards(sharded) == [path.name for path in numbered(sharded)]
    shutil.copy(single / "model.safetensors", sharded)
    assert shards(sharded) == [path.name for path in numbered(sharded)]


def test_a_single_file_comes_before_shards_without_an_index(sharded: Path, single: Path) -> None:
    for path in numbered(sharded)[:2]:  # a complete set, then an incomplete one
        shutil.copy(path, single)
        assert shards(single) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.fp16-00001-of-00001.safetensors"])
def test_variants_count_separately(name: str, single: Path, sharded: Path) -> None:
    for folder in (single, sharded):
        (folder / INDEX).unlink(missing_ok=True)
        before = shards(folder)
        shutil.copy(single / "model.safetensors", folder / name)
        assert shards(folder) == before
    (single / "model.safetensors").unlink()
    assert shards(single) == [name]


def test_an_incomplete_second_set_is_ignored(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    before = shards(sharded)
    shutil.copy(numbered(sharded)[0], sharded / "model-00001-of-00002.safetensors")
    assert shards(sharded) == before


def test_two_complete_sets_are_ambiguous(sharded: Path, single: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(single / "model.safetensors", sharded / "model-00001-of-00001.safetensors")
    assert refused(sharded).code == "several_sets"


def test_two_incomplete_sets_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(numbered(sharded)[0], sharded / "model-00001-of-00009.safetensors")
    numbered(sharded)[-1].unlink()
    error = refused(sharded)
    assert error.code == "missing_shards"
    assert "1 of 3" in str(error)


def test_the_index_decides_which_copy_of_a_tensor_is_read(sharded: Path) -> None:
    expected = opened(sharded)[1]
    first, second, _ = numbered(sharded)
    tensors = read_safetensors(first)
    name, (dtype, shape, content) = next(iter(read_safetensors(second).items()))
    tensors[name] = (dtype, shape, bytes(len(content)))  # stale
    write(first, tensors)
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.tensors[name].shard == second.name
    assert opened(sharded)[1] == expected


def write(path: Path, tensors: dict[str, Any]) -> None:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"total_size": 1}, {"total_size": "many", "total_parameters": float("inf")}, 5]
)
def test_the_totals_of_an_index_are_ignored(metadata: Any, sharded: Path) -> None:
    expected = opened(sharded)[1]
    edit_json(sharded / INDEX, metadata=metadata)
    assert opened(sharded)[1] == expected


# Links


@pytest.mark.parametrize("index", [True, False])
def test_links_into_the_cache_of_the_hub(index: bool, sharded: Path, tmp_path: Path) -> None:
    expected = opened(sharded)[1]
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        if index or path.name != INDEX:
            path.rename(blobs / str(number))
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert opened(snapshot)[1] == expected
    error = refused(snapshot.parents[1])
    assert error.code == "no_model"
    assert "snapshots" in str(error)
    numbered(snapshot)[1].resolve().unlink()  # a blob that was deleted
    assert refused(snapshot).code == ("missing_shards" if index else "damaged_shard")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_links_to_nothing(name: str, sharded: Path) -> None:
    (sharded / name).unlink()
    (sharded / name).symlink_to("nowhere")
    assert refused(sharded).code == "broken_link"


# Unrelated files


@pytest.mark.parametrize("name", ["Thumbs.db", "optimizer.safetensors", "training_args.bin", "optimizer.bin", "x.gguf"])
@pytest.mark.parametrize("index", [True, False])
def test_further_files_beside_the_weights(name: str, index: bool, sharded: Path) -> None:
    if not index:
        (sharded / INDEX).unlink()
    before = shards(sharded)
    (sharded / name).write_bytes(b"\0" * 64)
    assert shards(sharded) == before


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "PyTorch"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch"),
        ("weights.npz", "NumPy"),
        ("model-Q4_K_M.GGUF", "GGUF"),
    ],
)
def test_weights_in_other_formats(name: str, says: str, with_config: bool, single: Path) -> None:
    (single / "model.safetensors").unlink()
    if not with_config:
        (single / "config.json").unlink()
    (single / name).write_bytes(b"x")
    error = refused(single)
    assert error.code == "unsupported_format"
    assert says in str(error)
    assert "download" not in str(error), "which would bring the same"


def test_an_unknown_type_of_tensors_is_not_reported_as_damage(single: Path) -> None:
    path = single / "model.safetensors"
    tensors = read_safetensors(path)
    tensors["x"] = ("F4", [16], bytes(8))
    write(path, tensors)
    error = refused(single)
    assert error.code == "unsupported_tensor_type"
    assert "download" not in str(error)


def test_a_long_name_gives_a_short_message(single: Path) -> None:
    write(single / "model.safetensors", {"x" * 10_000: ("F4", [16], bytes(8))})
    assert len(str(refused(single))) < 400 + len(str(single))


@pytest.mark.parametrize("name", ["unsloth/Qwen3.5-35B-A3B-GGUF", "x/y-HQQ-Int4", "x/y-exl2", "x/y-bnb-4bit"])
def test_a_name_on_the_hub_that_states_its_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (flashmoe_mlx.load, lambda folder: pack_checkpoint(Path(folder), tmp_path / "out")):
        with pytest.raises(InputError) as caught:
            use(name)
        assert caught.value.code == "unsupported_format"
        assert_one_line(caught.value)


# JSON


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_byte_order_mark_is_ignored(name: str, sharded: Path) -> None:
    """Editors of Windows write one."""
    expected = opened(sharded)[1]
    (sharded / name).write_bytes(b"\xef\xbb\xbf" + (sharded / name).read_bytes())
    assert opened(sharded)[1] == expected


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (b'{"a": 1,}', "invalid_json"),
        (b'{"a": 1} {}', "invalid_json"),
        (b'{"a": 01}', "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b'{"a": 1, // why\n "b": 2}', "invalid_json"),
        (b'{"a": 1, "a": 1}', "invalid_json"),
        (b"NaN", "invalid_json"),
        ('{"a": 1}'.encode("utf-16"), "invalid_text"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_errors_in_json_state_their_place(name: str, broken: bytes, code: str, sharded: Path) -> None:
    (sharded / name).write_bytes(broken)
    error = refused(sharded)
    assert error.code == code
    assert name in str(error)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding(same: bool, tmp_path: Path) -> None:
    """A copy of the embedding is dropped; transformers would use another head, and mlx-lm drop it."""
    folder = write_checkpoint(tmp_path / "model", GEOMETRIES["tied"], 0, "per_expert")
    file = next(folder.glob("*.safetensors"))
    tensors: dict[str, mx.array] = dict(mx.load(str(file)))  # type: ignore[arg-type]
    embedding = next(values for name, values in tensors.items() if name.endswith("embed_tokens.weight"))
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors | {"lm_head.weight": embedding if same else embedding + 1})
    if same:
        opened(folder)
    else:
        assert refused(folder).code == "contradicting_head"
