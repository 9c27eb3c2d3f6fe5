"""Packing from the hub, simulated by a local folder: shards are downloaded, packed and deleted one by one."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from pack_oracle import SMALL, assert_one_line, read_safetensors, tree
from tiny_checkpoints import write_checkpoint

from flashmoe_mlx.checkpoint import hub
from flashmoe_mlx.checkpoint.hub import HubCheckpoint
from flashmoe_mlx.errors import CheckpointError, FlashMoeError, PackError
from flashmoe_mlx.pack.opening import Pack, open_pack
from flashmoe_mlx.pack.variant import VariantWriter
from flashmoe_mlx.pack.writer import pack_checkpoint

NAME = "mlx-community/Tiny-4bit"


class FakeHub:
    """A hub with ``folder`` as revision ``sha``; ``model_info`` or the download of ``broken`` raises ``error``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sha = "a" * 40
        self.error: Exception | None = None
        self.broken: str | None = None
        self.downloads: list[str] = []
        self.most_shards = 0

    def model_info(self, name: str, revision: str | None = None, timeout: float | None = None) -> Any:
        assert name == NAME
        assert timeout is not None, "a network that answers nothing must not hold a person up"
        if self.error and self.broken is None:
            raise self.error
        files = [SimpleNamespace(rfilename=path.name) for path in self.folder.iterdir()]
        return SimpleNamespace(sha=revision or self.sha, siblings=files)

    def get_safetensors_metadata(self, name: str, revision: str) -> Any:
        assert (name, revision) == (NAME, self.sha)
        if self.broken == "headers":
            assert self.error is not None
            raise self.error
        files = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            end, tensors = 0, {}
            for tensor, (dtype, shape, data) in read_safetensors(path).items():
                offsets = (end, end + len(data))
                tensors[tensor] = SimpleNamespace(dtype=dtype, shape=list(shape), data_offsets=offsets)
                end += len(data)
            files[path.name] = SimpleNamespace(tensors=tensors)
        return SimpleNamespace(files_metadata=files)

    def download(self, name: str, file: str, *, revision: str, local_dir: Path) -> str:
        assert (name, revision) == (NAME, self.sha)
        if file == self.broken:
            assert self.error is not None
            raise self.error
        self.downloads.append(file)
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / file, local_dir)
        self.most_shards = max(self.most_shards, len(list(local_dir.glob("*.safetensors"))))
        return str(local_dir / file)

    @property
    def shards(self) -> list[str]:
        return [name for name in self.downloads if name.endswith(".safetensors")]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    # Tensors are in the order of layers, as in large checkpoints, so that shards can be deleted one by one.
    folder = write_checkpoint(tmp_path / "hub", SMALL, 0, "mlx4", shards=1, extras=True)
    split(folder, 4)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not needed")
    served = FakeHub(folder)
    monkeypatch.setattr(hub, "HfApi", lambda: served)
    monkeypatch.setattr(hub, "hf_hub_download", served.download)
    return served


def split(folder: Path, shards: int) -> None:
    """Split the only shard of a checkpoint into consecutive shards."""
    tensors = list(read_safetensors(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    size = -(-len(tensors) // shards)
    weight_map = {}
    for number in range(shards):
        header, data = {}, b""
        for name, (dtype, shape, content) in tensors[number * size : (number + 1) * size]:
            offsets = [len(data), len(data) + len(content)]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            data += content
            weight_map[name] = f"model-{number:05d}.safetensors"
        text = json.dumps(header).encode()
        path = folder / f"model-{number:05d}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def pack(out: Path, bits: tuple[int, ...] = (4,), revision: str | None = None) -> Pack:
    source = HubCheckpoint.open_remote(NAME, revision, out / ".download")
    return pack_checkpoint(source, out, bits, delete_source=True)


def content(folder: Path) -> dict[str, str]:
    """Return all files but the manifest, which names the source."""
    return {name: digest for name, digest in tree(folder).items() if name != "pack.json"}


def test_a_pack_from_the_hub_equals_a_pack_from_its_folder(fake: FakeHub, tmp_path: Path) -> None:
    made = pack(tmp_path / "pack", (4, 2))
    expected = pack_checkpoint(fake.folder, tmp_path / "expected", (4, 2))
    assert content(made.folder) == content(expected.folder)
    assert made.manifest["source"] == {"name": NAME, "revision": fake.sha}
    assert made.manifest["skipped_tensors"] == expected.manifest["skipped_tensors"]
    assert len(set(fake.shards)) == len(fake.shards) == 4  # each once
    assert fake.most_shards < 4  # not all at a time
    assert not (made.folder / ".download").exists()
    assert "README.md" not in fake.downloads


def test_the_same_command_again_downloads_no_shard(fake: FakeHub, tmp_path: Path) -> None:
    first = tree(pack(tmp_path / "pack").folder)
    fake.downloads.clear()
    assert tree(pack(tmp_path / "pack").folder) == first
    assert fake.shards == []


def test_a_variant_is_added_from_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    both = tree(pack(tmp_path / "both", (4, 2)).folder)
    pack(tmp_path / "pack")
    assert tree(pack(tmp_path / "pack", (4, 2)).folder) == both


@pytest.fixture
def unfinished(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write = VariantWriter.write_layer

    def stop(self: VariantWriter, layer: int) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        write(self, layer)

    with monkeypatch.context() as patched:
        patched.setattr(VariantWriter, "write_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path / "pack")
    assert fake.shards
    return tmp_path / "pack"


def test_only_missing_shards_are_downloaded_again(fake: FakeHub, unfinished: Path, tmp_path: Path) -> None:
    part = unfinished / ".download" / ".cache" / "model-00003.incomplete"
    part.write_text("the begun download of another shard")
    kept = {path.name for path in (unfinished / ".download").glob("*.safetensors")}
    gone = set(fake.shards) - kept
    assert gone
    fake.downloads.clear()
    discarded = HubCheckpoint.discard

    def noted(self: HubCheckpoint, shard: str) -> None:
        discarded(self, shard)
        assert part.exists()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HubCheckpoint, "discard", noted)
        made = pack(unfinished)
    assert not gone & set(fake.shards)
    assert not kept & set(fake.shards)
    assert content(made.folder) == content(pack_checkpoint(fake.folder, tmp_path / "expected").folder)


def test_another_revision_is_refused(fake: FakeHub, unfinished: Path) -> None:
    old, fake.sha = fake.sha, "b" * 40
    with pytest.raises(PackError, match=f"begun from {NAME} at {old}, not {NAME} at {fake.sha}") as caught:
        pack(unfinished)
    assert_one_line(caught.value)
    fake.sha = old
    finished = pack(unfinished)
    fake.sha = "b" * 40
    with pytest.raises(PackError, match="pack of another model"):
        pack(finished.folder)
    assert open_pack(finished.folder).manifest["source"]["revision"] == old


def test_the_requested_revision_is_packed(fake: FakeHub, tmp_path: Path) -> None:
    fake.sha = "c" * 40
    assert pack(tmp_path / "pack", revision="c" * 40).manifest["source"]["revision"] == "c" * 40


def http_error(kind: type[HfHubHTTPError], message: str, server_message: str | None = None) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None)
    return kind(message, response=response, server_message=server_message)


class ClientError(Exception):
    """An error of an HTTP client, whose errors derive from Exception only."""


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (OfflineModeIsEnabled("Cannot reach it:\noffline mode is enabled"), FlashMoeError, "hub cannot be reached"),
        (ConnectionError("refused"), FlashMoeError, r"hub cannot be reached \(refused\)"),
        (ClientError("[Errno 111] Connection refused"), FlashMoeError, "hub cannot be reached"),
        (ClientError(), FlashMoeError, r"hub cannot be reached \(ClientError\)"),
        (TimeoutError("timed\nout"), FlashMoeError, r"hub cannot be reached \(timed out\)"),
        (LocalEntryNotFoundError("not in the cache\nand offline"), FlashMoeError, "hub cannot be reached"),
        (HFValidationError("Repo id must\nbe"), CheckpointError, "not a hub id: Repo id must be"),
        (http_error(RepositoryNotFoundError, "404\nClient Error"), CheckpointError, "404 Client Error .*hf auth login"),
        (http_error(GatedRepoError, "403", "Access\nis restricted"), CheckpointError, "Access is restricted"),
        (NotASafetensorsRepoError("'x' is not a\nsafetensors repo"), CheckpointError, "is not a safetensors repo"),
        (SafetensorsParsingError("Failed to parse"), CheckpointError, "Failed to parse"),
    ],
)
@pytest.mark.parametrize("where", [None, "tokenizer.json", "headers", "model-00001.safetensors"])
@pytest.mark.sampled(20)
def test_errors_of_the_hub_have_one_line(
    error: Exception, kind: type[FlashMoeError], reason: str, where: str | None, fake: FakeHub, tmp_path: Path
) -> None:
    fake.error, fake.broken = error, where
    with pytest.raises(FlashMoeError, match=reason) as caught:
        pack(tmp_path / "pack")
    assert type(caught.value) is kind
    assert_one_line(caught.value)
    assert str(caught.value).startswith(f"source={NAME}: ")
    fake.error = fake.broken = None
    assert pack(tmp_path / "pack").manifest["source"]["name"] == NAME


@pytest.mark.parametrize("where", ["tokenizer.json", "model-00001.safetensors"])
def test_a_full_disk_is_not_reported_as_an_error_of_the_hub(where: str, fake: FakeHub, tmp_path: Path) -> None:
    fake.error, fake.broken = OSError(errno.ENOSPC, "No space left on device"), where
    with pytest.raises(FlashMoeError, match=r"no space left .*make room and run the same command again") as caught:
        pack(tmp_path / "pack")
    assert_one_line(caught.value)


def test_a_hub_without_a_config(fake: FakeHub, tmp_path: Path) -> None:
    (fake.folder / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        pack(tmp_path / "pack")
    assert caught.value.code == "no_model"
    assert_one_line(caught.value)


def test_a_model_of_another_kind_is_refused_before_any_shard(fake: FakeHub, tmp_path: Path) -> None:
    (fake.folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError) as caught:
        pack(tmp_path / "pack")
    assert caught.value.code == "dense_model"
    assert_one_line(caught.value)
    assert fake.downloads == ["config.json"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FP8", {"quant_method": "fp8", "fmt": "e5m2"}),
        ("NVFP4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        ("compressed-tensors", {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    ],
)
def test_a_format_that_cannot_be_read_is_refused_before_anything_else_is_fetched(
    name: str, settings: dict[str, Any], fake: FakeHub, tmp_path: Path
) -> None:
    config = json.loads((fake.folder / "config.json").read_text())
    del config["quantization"]
    (fake.folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=name) as caught:
        pack(tmp_path / "pack")
    assert caught.value.code == "unsupported_format"
    assert_one_line(caught.value)
    assert fake.downloads == ["config.json"]


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3.5-35B-A3B-INT4", "unsloth/Qwen3.5-397B-A17B-GGUF", "x/y-bnb-4bit", "a/b.nvfp4"]
)
def test_a_name_that_states_the_format_is_refused_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("nothing may be asked"))
    with pytest.raises(CheckpointError) as caught:
        HubCheckpoint.open_remote(name, None, tmp_path)
    assert caught.value.code == "unsupported_format"
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("name", "code"), [("model-Q4_K_M.gguf", "unsupported_format"), ("pytorch_model.bin", "no_weights")]
)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_repository_without_safetensors(
    name: str, code: str, with_config: bool, fake: FakeHub, tmp_path: Path
) -> None:
    for path in fake.folder.glob("*.safetensors"):
        path.unlink()
    if not with_config:
        (fake.folder / "config.json").unlink()
    (fake.folder / name).touch()
    for ask in (lambda: pack(tmp_path / "pack"), lambda: hub.remote_config(NAME, "model")):
        with pytest.raises(CheckpointError) as caught:
            ask()
        assert caught.value.code == code
        assert_one_line(caught.value)
    assert fake.downloads == []


def test_only_the_config_is_fetched(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, revision: str(fake.folder / file))
    assert hub.remote_config(NAME, "model") == json.loads((fake.folder / "config.json").read_text())


def test_without_a_network_the_config_in_the_cache_counts(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake.error = ConnectionError("no network")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(FlashMoeError) as caught:
        hub.remote_config(NAME, "model")
    assert caught.value.code == "hub_unreachable"
    assert_one_line(caught.value)
    assert fake.downloads == []
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: str(fake.folder / file))
    assert hub.remote_config(NAME, "model")["model_type"] == "qwen3_5_moe"


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "x\n.safetensors", "/x.safetensors"])
def test_shards_of_other_folders(name: str, fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = fake.get_safetensors_metadata(NAME, fake.sha)
    metadata.files_metadata[name] = metadata.files_metadata.pop("model-00003.safetensors")
    monkeypatch.setattr(fake, "get_safetensors_metadata", lambda *_, **__: metadata)
    with pytest.raises(CheckpointError, match="is not the name of a safetensors file") as caught:
        pack(tmp_path / "pack")
    assert_one_line(caught.value)


def test_a_tensor_in_two_shards(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = fake.get_safetensors_metadata(NAME, fake.sha)
    metadata.files_metadata["x.safetensors"] = metadata.files_metadata["model-00003.safetensors"]
    monkeypatch.setattr(fake, "get_safetensors_metadata", lambda *_, **__: metadata)
    with pytest.raises(CheckpointError, match=r"is in model-00003.safetensors and x.safetensors"):
        pack(tmp_path / "pack")


def test_a_shard_that_differs_from_its_remote_header(fake: FakeHub, tmp_path: Path) -> None:
    source = HubCheckpoint.open_remote(NAME, None, tmp_path / "pack" / ".download")
    shutil.copy(fake.folder / "model-00000.safetensors", fake.folder / "model-00001.safetensors")
    with pytest.raises(CheckpointError, match="the file was replaced") as caught:
        pack_checkpoint(source, tmp_path / "pack")
    assert_one_line(caught.value)
