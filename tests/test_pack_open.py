"""For any content of its files, a pack opens as it was written or is refused in one line."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_oracle import SMALL, assert_one_line, edit_json
from tiny_checkpoints import write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.errors import InputError, PackError
from flashmoe_mlx.formats.manifest import file_hash
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.writer import pack_checkpoint

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    source = write_checkpoint(folder / "source", SMALL, 0, "mlx4", extras=True)
    (source / "tokenizer.json").write_text('{"a": 1}')
    return pack_checkpoint(source, folder / "pack", bits=[4, 2]).folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pack"))


def assert_refused(folder: Path, code: str, *facts: str) -> None:
    """Assert that the pack is refused with ``code`` and a line that names the folder and ``facts``."""
    with pytest.raises(InputError) as caught:
        open_pack(folder)
    assert caught.value.code == code
    assert all(fact in str(caught.value) for fact in (str(folder), *facts))
    assert_one_line(caught.value)


def test_the_original_opens(original: Path) -> None:
    pack = open_pack(original)
    assert set(pack.experts) == {"q4", "q2"}
    assert pack.experts["q2"].num_layers == SMALL.num_layers


def test_a_copy_opens_through_a_link(original: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert open_pack(tmp_path / "alias").manifest == open_pack(original).manifest


# Files


@pytest.mark.parametrize("name", ["experts-q4/layer_00.bin", "experts-q2/layer_01.bin", "resident.safetensors"])
@pytest.mark.parametrize("change", [-1, -100, -16384, -65536, +1, +16384])
def test_files_cut_short_or_extended(folder: Path, name: str, change: int) -> None:
    whole = (folder / name).stat().st_size
    os.truncate(folder / name, max(0, whole + change))
    assert_refused(folder, "wrong_size", name, f"pack.json says {whole}", "delete the pack and make it again")


FILES = [
    "config.json",
    "tokenizer.json",
    "resident.safetensors",
    "experts-q4/layer_01.bin",
    "experts-q4/checksums.xxh3",
    "experts-q2/layer_00.bin",
]


def become_directory(path: Path) -> None:
    path.mkdir()


def become_fifo(path: Path) -> None:
    os.mkfifo(path)


def become_link(path: Path) -> None:
    path.symlink_to(path.with_name("moved"))


def become_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def remain_missing(path: Path) -> None:
    assert not path.exists()


def become_endless(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "become", [remain_missing, become_directory, become_fifo, become_link, become_device, become_endless]
)
def test_missing_and_irregular_files(folder: Path, name: str, become: Callable[[Path], None]) -> None:
    (folder / name).rename((folder / name).with_name("moved"))
    become(folder / name)
    assert_refused(folder, "symbolic_link" if (folder / name).is_symlink() else "missing_file", name)


@pytest.mark.parametrize("become", [remain_missing, become_directory, become_fifo, become_link, become_device])
def test_missing_and_irregular_manifests(folder: Path, become: Callable[[Path], None]) -> None:
    (folder / "pack.json").rename(folder / "moved")
    become(folder / "pack.json")
    assert_refused(folder, "symbolic_link" if (folder / "pack.json").is_symlink() else "no_pack", "pack.json")


def test_a_linked_variant(folder: Path, tmp_path: Path) -> None:
    (folder / "experts-q4").rename(tmp_path / "elsewhere")
    (folder / "experts-q4").symlink_to(tmp_path / "elsewhere")
    assert_refused(folder, "symbolic_link", "experts-q4")


def test_a_pack_without_a_manifest_is_not_a_checkpoint(folder: Path) -> None:
    (folder / "pack.json").unlink()
    with pytest.raises(InputError) as caught:
        open_model(folder)
    assert caught.value.code == "no_pack"
    assert "without its pack.json" in str(caught.value)
    assert_one_line(caught.value)


def test_folders_that_hold_no_pack(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "no_pack", "pack.json")
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", "no_pack", "pack.json")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_refused(tmp_path / "loop", "no_pack")
    with pytest.raises(PackError) as caught:
        open_pack(Path("a\0b"))
    assert caught.value.code == "no_pack"
    assert_one_line(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "experts-q4/checksums.xxh3", "resident.safetensors"])
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_flipped_bit_in_a_small_file(folder: Path, name: str, where: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 16
    (folder / name).write_bytes(data)
    assert_refused(folder, "damaged_file", name)


# The manifest


def edit_manifest(folder: Path, edit: Callable[[Manifest], object]) -> None:
    manifest = json.loads((folder / "pack.json").read_text())
    edit(manifest)
    (folder / "pack.json").write_text(json.dumps(manifest))


def put(*path_and_value: Any) -> Callable[[Manifest], None]:
    *path, last, value = path_and_value

    def edit(manifest: Manifest) -> None:
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return edit


def drop(*path: Any) -> Callable[[Manifest], None]:
    def edit(manifest: Manifest) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return edit


LAYER = "experts-q4/layer_00.bin"
HUGE = 10**18


@pytest.mark.parametrize(
    ("edit", "code", "fact"),
    [
        (put("format", "gguf"), "invalid_manifest", "pack.json"),
        (drop("format"), "invalid_manifest", "pack.json"),
        (put("format_version", 0), "unsupported_pack_version", "format version 0 is not supported, only 1"),
        (put("format_version", 2), "unsupported_pack_version", "format version 2 is not supported"),
        (put("format_version", True), "unsupported_pack_version", "format version True"),
        (put("format_version", 1.0), "unsupported_pack_version", "format version 1.0"),
        (put("format_version", "1"), "unsupported_pack_version", "format version '1'"),
        (drop("format_version"), "unsupported_pack_version", "format version None"),
        (put("geometry", "num_layers", 3), "mixed_models", "geometry"),
        (put("geometry", "num_experts", HUGE), "mixed_models", "geometry"),
        (put("geometry", "hidden_size", 64.0), "mixed_models", "geometry"),
        (put("geometry", "expert_size", "64"), "mixed_models", "geometry"),
        (put("geometry", "rows", 1), "mixed_models", "geometry"),
        (put("geometry", None), "mixed_models", "geometry"),
        (drop("geometry"), "mixed_models", "geometry"),
        (put("variants", {}), "invalid_manifest", "variants"),
        (put("variants", []), "invalid_manifest", "variants"),
        (drop("variants"), "invalid_manifest", "variants"),
        (put("variants", "q4", None), "invalid_manifest", "variant 'q4' is not an object"),
        (put("variants", "q4", "bits", 2), "invalid_manifest", "variant 'q4' has 2 bits, which contradicts its name"),
        (put("variants", "q4", "bits", None), "invalid_manifest", "variant 'q4'"),
        (put("variants", "q4", "bits", True), "invalid_manifest", "variant 'q4'"),
        (put("variants", "q4", "bits", 4.0), "invalid_manifest", "variant 'q4'"),
        (put("variants", "q4", "group_size", 32), "invalid_manifest", "record layout"),
        (put("variants", "q4", "group_size", 0), "unsupported_layout", "group size 0"),
        (put("variants", "q4", "group_size", -64), "unsupported_layout", "group size -64"),
        (put("variants", "q4", "dtype", "F32"), "invalid_manifest", "record layout"),
        (put("variants", "q4", "dtype", "U32"), "unsupported_layout", "type U32"),
        (put("variants", "q4", "dtype", ["BF16"]), "invalid_manifest", "variant 'q4'"),
        (put("variants", "q4", "record_bytes", 2**63 - 64), "invalid_manifest", "record layout"),
        (put("variants", "q4", "record_bytes", 16384.0), "invalid_manifest", "record layout"),
        (put("variants", "q4", "components", 0, "offset", -1), "invalid_manifest", "record layout"),
        (put("variants", "q4", "components", 1, "offset", 0), "invalid_manifest", "record layout"),
        (put("variants", "q4", "components", 0, "offset", False), "invalid_manifest", "record layout"),
        (put("variants", "q4", "components", 2, "bytes", 10**30), "invalid_manifest", "record layout"),
        (put("variants", "q4", "components", []), "invalid_manifest", "record layout"),
        (put("variants", "q4", "more", 1), "invalid_manifest", "record layout"),
        (put("variants", "q7", {"bits": 7, "group_size": 64, "dtype": "BF16"}), "unsupported_layout", "7-bit"),
        (put("variants", "q8", {"bits": 8, "group_size": 64, "dtype": "BF16"}), "invalid_manifest", "record layout"),
        (
            put("variants", "..\n", {"bits": 4, "group_size": 64, "dtype": "BF16"}),
            "invalid_manifest",
            "has 4 bits, which contradicts its name",
        ),
        (put("variants", "a\nb", 1), "invalid_manifest", "is not an object"),
        (put("files", []), "invalid_manifest", "files"),
        (put("files", LAYER, None), "invalid_manifest", "is not an object"),
        (put("files", LAYER, {}), "invalid_manifest", "the size of experts-q4/layer_00.bin is None"),
        (put("files", LAYER, "bytes", -1), "invalid_manifest", "is -1"),
        (put("files", LAYER, "bytes", True), "invalid_manifest", "is True"),
        (put("files", LAYER, "bytes", 65536.0), "invalid_manifest", "is 65536.0"),
        (put("files", LAYER, "bytes", "65536"), "invalid_manifest", "is '65536'"),
        (put("files", LAYER, "bytes", "1\n2"), "invalid_manifest", "is"),
        (put("files", LAYER, "bytes", 2**63 - 64), "invalid_manifest", "must have 65536 bytes"),
        (put("files", LAYER, "bytes", 10**4000), "invalid_manifest", "must have 65536 bytes"),
        (put("files", LAYER, "xxh3", "0" * 16), "invalid_manifest", "has unknown keys"),
        (put("files", "config.json", {"bytes": 5}), "invalid_manifest", "lacks its xxh3"),
        (put("files", "config.json", "bytes", 5), "wrong_size", "bytes, pack.json says 5"),
        (put("files", "config.json", "xxh3", "0" * 16), "damaged_file", "config.json is damaged"),
        (put("files", "config.json", "xxh3", ["0"]), "damaged_file", "config.json is damaged"),
        (drop("files", "config.json"), "invalid_manifest", "does not list config.json"),
        (drop("files", "resident.safetensors"), "invalid_manifest", "does not list resident.safetensors"),
        (drop("files", LAYER), "invalid_manifest", "does not list experts-q4/layer_00.bin"),
        (drop("files", "experts-q4/checksums.xxh3"), "invalid_manifest", "does not list experts-q4/checksums.xxh3"),
        (put("files", "experts-q4/checksums.xxh3", "bytes", 8), "invalid_manifest", "must have 64 bytes"),
        (put("source", None), "invalid_manifest", "source"),
        (put("source", "name", 5), "invalid_manifest", "skipped_tensors"),
        (drop("source"), "invalid_manifest", "source"),
        (put("skipped_tensors", [1]), "invalid_manifest", "skipped_tensors"),
        (put("skipped_tensors", "a"), "invalid_manifest", "skipped_tensors"),
        (drop("skipped_tensors"), "invalid_manifest", "skipped_tensors"),
    ],
)
def test_manifests_that_are_wrong(folder: Path, edit: Callable[[Manifest], None], code: str, fact: str) -> None:
    edit_manifest(folder, edit)
    assert_refused(folder, code, fact)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "experts-q4/../../secret",
        "./config.json",
        "experts-q4//layer_00.bin",
        "experts-q4/layer_02.bin",
        "experts-q3/layer_00.bin",
        "a\\b",
        "a\0b",
        "a\nb",
        "\ud800",
        "",
        ".",
        "pack.json",
        "/dev/zero",
        "x" * 100_000,
    ],
)
def test_names_of_foreign_files(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("secret")
    edit_manifest(folder, put("files", name, {"bytes": 6, "xxh3": file_hash(folder.parent / "secret")}))
    assert_refused(folder, "invalid_manifest", repr(name))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"7", "invalid_json"),
        (b"\xff\xfe{}", "invalid_text"),
        (b'{"format": "flashmoe-pack", "format": "flashmoe-pack"}', "invalid_json"),
        (b'{"format_version": NaN}', "invalid_json"),
        (b'{"format_version": -Infinity}', "invalid_json"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b" " * (64 * 2**20 + 1), "file_too_large"),
    ],
)
def test_manifests_that_are_not_json_objects(folder: Path, text: bytes, code: str) -> None:
    (folder / "pack.json").write_bytes(text)
    assert_refused(folder, code, "pack.json")


def update_entry(folder: Path, name: str) -> None:
    """Write the size and hash of a changed file to the manifest."""
    path = folder / name
    edit_manifest(folder, put("files", name, {"bytes": path.stat().st_size, "xxh3": file_hash(path)}))


def test_a_config_of_another_model(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    for changes, code, fact in (
        ({"num_experts": 8}, "mixed_models", "config.json"),
        ({"num_hidden_layers": 2**12, "layer_types": None}, "mixed_models", "config.json"),
        ({"num_hidden_layers": 2**24, "layer_types": None}, "invalid_config", "num_hidden_layers"),
        ({"hidden_size": -64}, "invalid_config", "hidden_size is -64"),
        ({"hidden_size": 64.0}, "invalid_config", "hidden_size is 64.0"),
        ({"num_experts": 2**63}, "invalid_config", "num_experts"),
        ({"moe_intermediate_size": None}, "invalid_config", "moe_intermediate_size"),
    ):
        edit_json(folder / "config.json", text_config=text | changes)
        update_entry(folder, "config.json")
        assert_refused(folder, code, fact)
    edit_json(folder / "config.json", text_config=text, model_type="llama")
    update_entry(folder, "config.json")
    assert_refused(folder, "unsupported_model", "llama")


def test_sizes_are_bounded_before_anything_is_allocated(folder: Path) -> None:
    """A small manifest that promises thousands of layers is refused at the first missing layer."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | {"num_hidden_layers": 2**12, "layer_types": None})
    update_entry(folder, "config.json")
    edit_manifest(folder, put("geometry", "num_layers", 2**12))
    assert_refused(folder, "invalid_manifest", "experts-q4/layer_02.bin")


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[start:])


@pytest.mark.parametrize(
    ("edit", "code", "fact"),
    [
        (put("model.norm.weight", "dtype", "I64"), "damaged_file", "bytes do not hold shape"),
        (put("model.norm.weight", "data_offsets", [0, 2**62]), "damaged_file", "bytes do not hold shape"),
        (drop("model.norm.weight"), "damaged_file", "header"),
        (
            put("new", {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}),
            "unsupported_tensor_type",
            "new has type I8",
        ),
        (put("__metadata__", {"a": 1}), "damaged_file", "__metadata__"),
        (put("__metadata__", []), "damaged_file", "__metadata__"),
    ],
)
def test_resident_weights_with_a_bad_header(
    folder: Path, edit: Callable[[Manifest], None], code: str, fact: str
) -> None:
    edit_header(folder / "resident.safetensors", edit)
    update_entry(folder, "resident.safetensors")
    assert_refused(folder, code, fact)


@pytest.mark.parametrize(("part", "dtype"), [("biases", "F16"), ("weight", "F32")])
def test_resident_matrices_of_unsupported_types(part: str, dtype: str, tiny_pack: Path, tmp_path: Path) -> None:
    """Sizes do not reveal a wrong type, and CPU kernels read scales and biases without conversion."""
    folder = Path(shutil.copytree(tiny_pack, tmp_path / "pack"))
    edit_header(folder / "resident.safetensors", put(f"lm_head.{part}", "dtype", dtype))
    update_entry(folder, "resident.safetensors")
    with pytest.raises(PackError) as caught:
        flashmoe_mlx.load(folder)
    assert caught.value.code == "wrong_types"
    assert_one_line(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**30, 16384, 64, 4, "", "..", "q4", "BF16", "config.json"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_the_manifest(folder: Path, original: Path, data: st.DataObject) -> None:
    """The manifest is refused in one line, or the pack serves the same bytes."""
    manifest = json.loads((original / "pack.json").read_text())
    mutated = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(mutated)[1:] or [("format",)]))
        action = data.draw(st.sampled_from(["put", "put", "drop", "insert"]))
        value = data.draw(JSON)
        if action == "drop":
            drop(*place)(mutated)
        elif action == "insert" and isinstance(parent(mutated, place), dict):
            put(*place[:-1], data.draw(st.text(max_size=8)), value)(mutated)
        else:
            put(*place, value)(mutated)
    (folder / "pack.json").write_text(json.dumps(mutated))
    try:
        pack = open_pack(folder)
    except InputError as error:
        assert_one_line(error)
        return
    served = {name: (experts.layout, experts.num_layers, experts.num_experts) for name, experts in pack.experts.items()}
    expected = open_pack(original)
    for name, shape in served.items():
        experts = expected.experts[name]
        assert shape == (experts.layout, experts.num_layers, experts.num_experts)
    assert pack.config == expected.config
    kept = ("format", "format_version", "geometry")
    assert {key: mutated[key] for key in kept} == {key: manifest[key] for key in kept}


def parent(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        value = value[key]
    return value


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_listed_config(folder: Path, original: Path, data: st.DataObject) -> None:
    config = json.loads((original / "config.json").read_text())
    put(*data.draw(st.sampled_from(places(config)[1:])), data.draw(JSON))(config)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(original / "pack.json", folder)
    update_entry(folder, "config.json")
    try:
        pack = open_pack(folder)
    except InputError as error:
        assert_one_line(error)
    else:
        assert pack.experts["q4"].layout == open_pack(original).experts["q4"].layout
