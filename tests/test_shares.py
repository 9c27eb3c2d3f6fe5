"""Packs with the share of one of several nodes: as large as their share, and of use on this node alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from tiny_checkpoints import GEOMETRIES, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.errors import InputError, PackError
from flashmoe_mlx.formats.extents import read_extents
from flashmoe_mlx.formats.shares import Share, owners, parse_shard
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.shard import copy_share
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.pack.writer import add_variants, pack_checkpoint
from flashmoe_mlx.stores.registry import create_store


def shard_packs(pack: Path, folder: Path, weights: list[float]) -> list[Path]:
    """Copy the share of each node out of ``pack``."""
    folders = [folder / f"share-{node}" for node in range(len(weights))]
    for part, out in enumerate(folders, 1):
        copy_share(open_pack(pack), out, parse_shard(f"{part}/{len(weights)}", weights))
    return folders


def test_a_share_holds_the_experts_of_its_node(tiny_pack: Path, tmp_path: Path) -> None:
    whole = open_pack(tiny_pack)
    (experts,) = whole.experts.values()
    folders = shard_packs(tiny_pack, tmp_path, [1.0, 2.0])
    for node, folder in enumerate(folders):
        share = open_pack(folder)
        assert verify_pack(share) == []
        (own,) = share.experts.values()
        for layer in range(own.num_layers):
            held = np.flatnonzero(owners((1.0, 2.0), layer, TINY.num_experts) == node).tolist()
            assert list(own.packed_in(layer)) == held
            for expert in held:
                assert read_extents(own.extents(layer, expert)) == read_extents(experts.extents(layer, expert))
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.bin")) for folder in (tiny_pack, *folders)]
    assert sizes[0] == sizes[1] + sizes[2]
    path = next((folders[0]).rglob("layer_01.bin"))
    damaged = bytearray(path.read_bytes())
    damaged[-17000] ^= 1
    path.write_bytes(damaged)
    (found,) = verify_pack(open_pack(folders[0]))
    assert f"layer 1 expert {np.flatnonzero(owners((1.0, 2.0), 1, TINY.num_experts) == 0)[-1]} " in str(found)


def test_a_share_of_another_node_is_refused(tiny_pack: Path, tmp_path: Path) -> None:
    first, _ = shard_packs(tiny_pack, tmp_path, [1.0, 2.0])
    source = open_pack(first).experts["q4"]
    settings = {"_target_": "flashmoe_mlx.backends.pread.PreadStore"}
    for share, code in (
        (None, "share_alone"),
        (Share(1, (1.0, 2.0)), "another_share"),
        (Share(0, (1.0, 1.0)), "another_share"),
        (Share(0, (1.0, 2.0, 1.0)), "another_share"),
    ):
        with pytest.raises(InputError) as caught:
            create_store(source, settings, share)
        assert caught.value.code == code
    create_store(source, settings, Share(0, (2.0, 4.0))).close()
    with pytest.raises(InputError) as caught:
        flashmoe_mlx.load(first)
    assert caught.value.code == "share_alone"
    with pytest.raises(PackError) as refused:
        copy_share(open_pack(first), tmp_path / "again", Share(0, (1.0, 2.0)))
    assert refused.value.code == "another_share"


@pytest.mark.parametrize("share", [None, {}, {"node": 2, "weights": [1, 1]}, {"node": 0, "weights": [1, 0]}, [0, 2]])
def test_the_share_in_a_manifest_is_checked(share: Any, tiny_pack: Path, tmp_path: Path) -> None:
    folder, _ = shard_packs(tiny_pack, tmp_path, [1.0, 1.0])
    manifest = json.loads((folder / "pack.json").read_text())
    (folder / "pack.json").write_text(json.dumps({**manifest, "share": share}))
    with pytest.raises(PackError) as caught:
        open_pack(folder)
    assert caught.value.code == "invalid_manifest"


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/65", "1", "a/b", "1/2/3", ""])
def test_shards_are_checked(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_shard(text)
    assert caught.value.code == "invalid_shard"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_share_is_packed_from_a_checkpoint(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", GEOMETRIES["plain"], 0, "mlx4", shards=2)
    whole = pack_checkpoint(source, tmp_path / "whole")
    copied = copy_share(whole, tmp_path / "copied", parse_shard("2/3"))
    direct = pack_checkpoint(source, tmp_path / "direct", shard="2/3")
    assert contents(direct.folder) == contents(copied.folder)
    assert copy_share(whole, tmp_path / "copied", parse_shard("2/3")).share == copied.share  # once more
    with pytest.raises(PackError) as caught:
        pack_checkpoint(source, tmp_path / "direct", shard="1/3")
    assert caught.value.code == "another_share"
    wide = add_variants(direct, (2,))
    assert contents(wide.folder) == contents(
        copy_share(add_variants(whole, (2,)), tmp_path / "wide", direct.share).folder
    )
