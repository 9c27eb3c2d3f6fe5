"""Whatever a pack's files hold, opening it gives the pack that was written or one line; it never hangs or crashes."""

import copy
import json
import os
import re
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


def refused(folder: Path, reason: str, error: type[InputError] = PackError) -> InputError:
    with pytest.raises(error, match=reason) as caught:
        open_pack(folder)
    assert_one_line(caught.value)
    assert str(folder) in str(caught.value)
    return caught.value


def test_the_original_opens(original: Path) -> None:
    pack = open_pack(original)
    assert set(pack.experts) == {"q4", "q2"}
    assert pack.experts["q2"].num_layers == SMALL.num_layers


def test_a_pack_may_be_moved_and_linked_to(original: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert open_pack(tmp_path / "alias").manifest == open_pack(original).manifest


# Files


@pytest.mark.parametrize("name", ["experts-q4/layer_00.bin", "experts-q2/layer_01.bin", "resident.safetensors"])
@pytest.mark.parametrize("change", [-1, -100, -16384, -65536, +1, +16384])
def test_files_cut_short_or_extended(folder: Path, name: str, change: int) -> None:
    whole = (folder / name).stat().st_size
    os.truncate(folder / name, max(0, whole + change))
    refused(
        folder, f"{name} has .* bytes, pack.json says {whole}: truncated or foreign; delete the pack and make it again"
    )


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


def become_nothing(path: Path) -> None:
    assert not path.exists()


def become_endless(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "become", [become_nothing, become_directory, become_fifo, become_link, become_device, become_endless]
)
def test_paths_that_are_not_regular_files(folder: Path, name: str, become: Callable[[Path], None]) -> None:
    (folder / name).rename((folder / name).with_name("moved"))
    become(folder / name)
    error = refused(folder, re.escape(name))
    assert error.code == ("symbolic_link" if (folder / name).is_symlink() else "missing_file")


@pytest.mark.parametrize("become", [become_nothing, become_directory, become_fifo, become_link, become_device])
def test_manifests_that_are_none(folder: Path, become: Callable[[Path], None]) -> None:
    (folder / "pack.json").rename(folder / "moved")
    become(folder / "pack.json")
    error = refused(folder, "pack.json")
    assert error.code == ("symbolic_link" if (folder / "pack.json").is_symlink() else "no_pack")


def test_a_variant_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "experts-q4").rename(tmp_path / "elsewhere")
    (folder / "experts-q4").symlink_to(tmp_path / "elsewhere")
    refused(folder, "experts-q4 is a symbolic link")


def test_a_pack_without_its_manifest_is_no_checkpoint(folder: Path) -> None:
    (folder / "pack.json").unlink()
    with pytest.raises(InputError, match=r"a pack without its pack\.json") as caught:
        open_model(folder)
    assert_one_line(caught.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no pack.json here")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "no pack.json here")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "loop")
    with pytest.raises(PackError, match="null byte") as caught:
        open_pack(Path("a\0b"))
    assert_one_line(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "experts-q4/checksums.xxh3", "resident.safetensors"])
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_flipped_bit_in_a_small_file(folder: Path, name: str, where: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 16
    (folder / name).write_bytes(data)
    refused(folder, f"{name} is damaged")


# The manifest


def edited(folder: Path, edit: Callable[[Manifest], object]) -> None:
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
    ("edit", "reason"),
    [
        (put("format", "gguf"), "not the manifest of a pack"),
        (drop("format"), "not the manifest of a pack"),
        (put("format_version", 0), "format version 0 is not supported, only 1"),
        (put("format_version", 2), "format version 2 is not supported"),
        (put("format_version", True), "format version True"),
        (put("format_version", 1.0), r"format version 1\.0"),
        (put("format_version", "1"), "format version '1'"),
        (drop("format_version"), "format version None"),
        (put("geometry", "num_layers", 3), "the geometry in pack.json is not that of config.json"),
        (put("geometry", "num_experts", HUGE), "the geometry"),
        (put("geometry", "hidden_size", 64.0), "the geometry"),
        (put("geometry", "expert_size", "64"), "the geometry"),
        (put("geometry", "rows", 1), "the geometry"),
        (put("geometry", None), "the geometry"),
        (drop("geometry"), "the geometry"),
        (put("variants", {}), "lists no variants"),
        (put("variants", []), "variants is not an object"),
        (drop("variants"), "variants is not an object"),
        (put("variants", "q4", None), "variant 'q4' is not an object"),
        (put("variants", "q4", "bits", 2), "variant 'q4' says that it has 2 bits"),
        (put("variants", "q4", "bits", None), "variant 'q4' lacks bits"),
        (put("variants", "q4", "bits", True), "variant 'q4' lacks bits"),
        (put("variants", "q4", "bits", 4.0), "variant 'q4' lacks bits"),
        (put("variants", "q4", "group_size", 32), "record layout of variant q4"),
        (put("variants", "q4", "group_size", 0), "group size 0"),
        (put("variants", "q4", "group_size", -64), "group size -64"),
        (put("variants", "q4", "dtype", "F32"), "record layout of variant q4"),
        (put("variants", "q4", "dtype", "U32"), "type U32"),
        (put("variants", "q4", "dtype", ["BF16"]), "variant 'q4' lacks"),
        (put("variants", "q4", "record_bytes", 2**63 - 64), "record layout"),
        (put("variants", "q4", "record_bytes", 16384.0), "record layout"),
        (put("variants", "q4", "components", 0, "offset", -1), "record layout"),
        (put("variants", "q4", "components", 1, "offset", 0), "record layout"),
        (put("variants", "q4", "components", 0, "offset", False), "record layout"),
        (put("variants", "q4", "components", 2, "bytes", 10**30), "record layout"),
        (put("variants", "q4", "components", []), "record layout"),
        (put("variants", "q4", "more", 1), "record layout"),
        (put("variants", "q7", {"bits": 7, "group_size": 64, "dtype": "BF16"}), "7-bit"),
        (put("variants", "q8", {"bits": 8, "group_size": 64, "dtype": "BF16"}), "record layout"),
        (put("variants", "..\n", {"bits": 4, "group_size": 64, "dtype": "BF16"}), "says that it has 4 bits"),
        (put("variants", "a\nb", 1), "is not an object"),
        (put("files", []), "files is not an object"),
        (put("files", LAYER, None), "is not an object"),
        (put("files", LAYER, {}), "the size of experts-q4/layer_00.bin is None"),
        (put("files", LAYER, "bytes", -1), "the size of .* is -1"),
        (put("files", LAYER, "bytes", True), "the size of .* is True"),
        (put("files", LAYER, "bytes", 65536.0), r"the size of .* is 65536\.0"),
        (put("files", LAYER, "bytes", "65536"), "the size of .* is '65536'"),
        (put("files", LAYER, "bytes", "1\n2"), "the size of .* is"),
        (put("files", LAYER, "bytes", 2**63 - 64), "must have 65536 bytes by the model's geometry"),
        (put("files", LAYER, "bytes", 10**4000), "must have 65536 bytes by the model's geometry"),
        (put("files", LAYER, "xxh3", "0" * 16), "has foreign keys"),
        (put("files", "config.json", {"bytes": 5}), "lacks its xxh3"),
        (put("files", "config.json", "bytes", 5), "config.json has .* bytes, pack.json says 5"),
        (put("files", "config.json", "xxh3", "0" * 16), "config.json is damaged"),
        (put("files", "config.json", "xxh3", ["0"]), "config.json is damaged"),
        (drop("files", "config.json"), "does not list config.json"),
        (drop("files", "resident.safetensors"), "does not list resident.safetensors"),
        (drop("files", LAYER), "does not list experts-q4/layer_00.bin"),
        (drop("files", "experts-q4/checksums.xxh3"), "does not list experts-q4/checksums.xxh3"),
        (put("files", "experts-q4/checksums.xxh3", "bytes", 8), "must have 64 bytes"),
        (put("source", None), "source is not an object"),
        (put("source", "name", 5), "does not hold texts"),
        (drop("source"), "source is not an object"),
        (put("skipped_tensors", [1]), "does not hold texts"),
        (put("skipped_tensors", "a"), "does not hold texts"),
        (drop("skipped_tensors"), "does not hold texts"),
    ],
)
def test_manifests_that_are_wrong(folder: Path, edit: Callable[[Manifest], None], reason: str) -> None:
    edited(folder, edit)
    refused(folder, reason)


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
def test_names_of_other_files(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("secret")
    edited(folder, put("files", name, {"bytes": 6, "xxh3": file_hash(folder.parent / "secret")}))
    refused(folder, "which is no part of such a pack")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must hold a JSON object, not list"),
        (b"7", "must hold a JSON object, not int"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"format": "flashmoe-pack", "format": "flashmoe-pack"}', "a key occurs twice"),
        (b'{"format_version": NaN}', "NaN is not a number"),
        (b'{"format_version": -Infinity}', "-Infinity is not a number"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b" " * (64 * 2**20 + 1), "is larger than"),
    ],
)
def test_manifests_that_are_no_object(folder: Path, text: bytes, reason: str) -> None:
    (folder / "pack.json").write_bytes(text)
    refused(folder, reason, InputError)


def relisted(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    path = folder / name
    edited(folder, put("files", name, {"bytes": path.stat().st_size, "xxh3": file_hash(path)}))


def test_the_config_of_another_model(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    for changes, reason in (
        ({"num_experts": 8}, "files of different models are mixed"),
        ({"num_hidden_layers": 2**12, "layer_types": None}, "files of different models are mixed"),
        ({"num_hidden_layers": 2**24, "layer_types": None}, "num_hidden_layers is"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": 64.0}, r"hidden_size is 64\.0"),
        ({"num_experts": 2**63}, "num_experts is"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
    ):
        edit_json(folder / "config.json", text_config=text | changes)
        relisted(folder, "config.json")
        refused(folder, reason)
    edit_json(folder / "config.json", text_config=text, model_type="llama")
    relisted(folder, "config.json")
    refused(folder, "model_type 'llama'")


def test_sizes_are_bounded_before_anything_is_allocated(folder: Path) -> None:
    """A manifest of a kilobyte that promises thousands of layers is refused at the first one that is not there."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | {"num_hidden_layers": 2**12, "layer_types": None})
    relisted(folder, "config.json")
    edited(folder, put("geometry", "num_layers", 2**12))
    refused(folder, "does not list experts-q4/layer_02.bin")


def with_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[start:])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (put("model.norm.weight", "dtype", "I64"), "bytes do not hold shape"),
        (put("model.norm.weight", "data_offsets", [0, 2**62]), "bytes do not hold shape"),
        (drop("model.norm.weight"), "overlap or leave gaps|its header needs"),
        (put("new", {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}), "new has type I8"),
        (put("__metadata__", {"a": 1}), "__metadata__ does not map"),
        (put("__metadata__", []), "__metadata__ does not map"),
    ],
)
def test_resident_weights_with_a_bad_header(folder: Path, edit: Callable[[Manifest], None], reason: str) -> None:
    with_header(folder / "resident.safetensors", edit)
    relisted(folder, "resident.safetensors")
    refused(folder, reason)


@pytest.mark.parametrize(("part", "dtype"), [("biases", "F16"), ("weight", "F32")])
def test_resident_codes_scales_and_biases_of_types_that_no_kernel_reads(
    part: str, dtype: str, tiny_pack: Path, tmp_path: Path
) -> None:
    """Sizes do not show it, and kernels for CPUs take scales and biases as they lie in the file."""
    folder = Path(shutil.copytree(tiny_pack, tmp_path / "pack"))
    with_header(folder / "resident.safetensors", put(f"lm_head.{part}", "dtype", dtype))
    relisted(folder, "resident.safetensors")
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
    """Either a line, or a pack that serves the same bytes."""
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
    relisted(folder, "config.json")
    try:
        pack = open_pack(folder)
    except InputError as error:
        assert_one_line(error)
    else:
        assert pack.experts["q4"].layout == open_pack(original).experts["q4"].layout
