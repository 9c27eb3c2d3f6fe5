"""Packing may be interrupted anywhere, and the same command finishes it or refuses in one line."""

import fcntl
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from pack_oracle import SMALL, assert_one_line, edit_json, tree
from small_filesystem import small_filesystem
from tiny_checkpoints import GEOMETRIES, Layout, write_checkpoint

from flashmoe_mlx.errors import CheckpointError, FlashMoeError, InputError, PackError
from flashmoe_mlx.formats.folders import lock_folder
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.variant import VariantWriter
from flashmoe_mlx.pack.writer import add_variants, pack_checkpoint

KILL_POINTS = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.pack.writer import add_variants, pack_checkpoint

source, out, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
copy = source.with_name("copy") / source.name

def pack():
    if mode == "add":
        add_variants(open_pack(out), [2])
    else:
        pack_checkpoint(copy, out, bits=[2], delete_source=mode == "delete")

def kill_at(point):
    calls = itertools.count(1)
    def counted(original):
        def call(*arguments, **named):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)
        return call
    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))

def in_child(do):
    child = os.fork()
    if not child:
        try:
            do()
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

os.fsync = lambda fd: None  # slow, and a killed process needs no fsync
for point in itertools.count(1):
    if point == 1 or mode == "delete":
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
    shutil.rmtree(out, ignore_errors=True)
    if mode == "add":
        assert in_child(lambda: pack_checkpoint(copy, out)) == 0
    def killed():
        kill_at(point)
        pack()
    status = in_child(killed)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    def finish():
        try:
            found = open_pack(out)
        except FlashMoeError:
            assert mode != "add"
        else:
            assert verify_pack(found) == []
        pack()
    assert in_child(finish) == 0, point
    out.rename(out.with_name(f"finished-{point}"))
print(point - 1)
"""


@pytest.mark.parametrize(
    ("mode", "layout", "min_steps"),
    [
        pytest.param("plain", "fused", 30, marks=pytest.mark.nightly),
        pytest.param("delete", "mlx4", 30, marks=pytest.mark.thorough),
        pytest.param("add", "mlx4", 20, marks=pytest.mark.thorough),
    ],
)
def test_killed_at_every_step(mode: str, layout: Layout, min_steps: int, tmp_path: Path) -> None:
    geometry = replace(SMALL, experts=2, top_k=1)
    source = write_checkpoint(tmp_path / "source", geometry, 0, layout, shards=2)
    expected = tree(pack_checkpoint(source, tmp_path / "expected", bits=[4, 2] if mode == "add" else [2]).folder)
    done = subprocess.run(
        [sys.executable, "-c", KILL_POINTS, str(source), str(tmp_path / "out"), mode], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) >= min_steps
    finished = list(tmp_path.glob("finished-*"))
    assert len(finished) == int(done.stdout)
    for folder in finished:
        assert tree(folder) == expected, folder.name
    if mode == "delete":
        assert list((tmp_path / "copy" / "source").glob("*.safetensors")) == []


@pytest.mark.thorough
def test_killed_at_random_times(tmp_path: Path) -> None:
    geometry = GEOMETRIES["plain"]
    source = write_checkpoint(tmp_path / "source", geometry, 0, "fused", shards=3)
    start = time.perf_counter()
    expected = tree(pack_checkpoint(source, tmp_path / "expected", bits=[4, 2]).folder)
    usual = time.perf_counter() - start
    script = (
        "import sys; from pathlib import Path; from flashmoe_mlx.pack.writer import pack_checkpoint; print(flush=True);"
        "pack_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), bits=[4, 2])"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "pack")]
    delays = random.Random(0)
    for _ in range(4):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as packer:
            assert packer.stdout is not None
            packer.stdout.readline()  # all modules have been imported
            time.sleep(delays.uniform(0, usual))
            packer.send_signal(signal.SIGKILL)
    pack = pack_checkpoint(source, tmp_path / "pack", bits=[4, 2])
    assert tree(pack.folder) == expected


@contextmanager
def interrupt_before_layer(layer: int) -> Iterator[None]:
    """Interrupt packing before it writes ``layer``."""
    write = VariantWriter.write_layer

    def stop(self: VariantWriter, at: int) -> None:
        if at == layer:
            raise KeyboardInterrupt
        write(self, at)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(VariantWriter, "write_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", replace(SMALL, layer_types="LFLF"), 0, "mlx4", shards=3)


@pytest.fixture
def unfinished(source: Path, tmp_path: Path) -> Path:
    with interrupt_before_layer(2):
        pack_checkpoint(source, tmp_path / "pack")
    assert (tmp_path / "pack" / "experts-q4" / "layer_01.bin").exists()
    return tmp_path / "pack"


def assert_refused(code: str, source: Path, out: Path, *facts: str, **options: object) -> None:
    """Assert that packing is refused with ``code`` and a line that holds ``facts``, and that no file changes."""
    before = tree(out)
    with pytest.raises(PackError) as caught:
        pack_checkpoint(source, out, **options)
    assert caught.value.code == code
    assert all(fact in str(caught.value) for fact in facts)
    assert_one_line(caught.value)
    assert tree(out) == before


def test_an_unfinished_pack_does_not_open(unfinished: Path) -> None:
    with pytest.raises(PackError) as caught:
        open_pack(unfinished)
    assert caught.value.code == "no_pack"
    assert "run the same task=pack command again" in str(caught.value)
    assert_one_line(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 16384, 16384 * 4 - 1])
def test_truncated_layers_are_written_again(source: Path, unfinished: Path, keep: int) -> None:
    os.truncate(unfinished / "experts-q4" / "layer_00.bin", keep)
    assert_finishes(source, unfinished)


def assert_finishes(source: Path, out: Path) -> None:
    expected = pack_checkpoint(source, source.with_name("expected"))
    assert tree(pack_checkpoint(source, out).folder) == tree(expected.folder)


def test_damaged_parts_are_written_again(source: Path, unfinished: Path) -> None:
    kept = (unfinished / "experts-q4" / "layer_00.bin").stat().st_mtime_ns
    flip(unfinished / "experts-q4" / "layer_01.bin", 3 * 16384 + 5)
    flip(unfinished / "resident.safetensors.partial", 2000)
    assert_finishes(source, unfinished)
    assert (unfinished / "experts-q4" / "layer_00.bin").stat().st_mtime_ns == kept


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["q4-layer_00.xxh3", "q4-layer_01.xxh3"])
def test_damaged_markers_are_not_trusted(source: Path, unfinished: Path, name: str) -> None:
    marker = unfinished / ".packing" / name
    marker.write_bytes(marker.read_bytes()[:-3])
    assert_finishes(source, unfinished)


def test_damaged_resident_weights_are_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flashmoe_mlx.pack.writer.write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            pack_checkpoint(source, tmp_path / "pack")
    path = tmp_path / "pack" / "resident.safetensors"
    flip(path, path.stat().st_size - 1)
    assert_finishes(source, tmp_path / "pack")


def test_other_settings_are_refused(source: Path, unfinished: Path) -> None:
    begun = "bits=[4] group_size=64 resident_bits=4 quantiser=null"
    assert_refused("another_plan", source, unfinished, begun, bits=[2])
    assert_refused("another_plan", source, unfinished, begun, bits=[4, 2])
    assert_refused("another_plan", source, unfinished, begun, group_size=32)
    assert_refused("another_plan", source, unfinished, begun, resident_bits=None)
    assert_refused("another_plan", source, unfinished, begun, quantiser="minmax")
    assert_finishes(source, unfinished)


def test_another_source_is_refused(source: Path, unfinished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    assert_refused("another_plan", other, unfinished, f"unfinished pack of {source}")


@pytest.mark.parametrize("change", ["config", "touched", "rewritten", "replaced", "gone"])
def test_a_source_that_changed_is_refused(change: str, source: Path, unfinished: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[1]
    if change == "config":
        edit_json(source / "config.json", image_token_id=7)
    elif change == "touched":
        os.utime(shard, (1, 1))
    elif change == "rewritten":
        before = shard.stat()
        flip(shard, before.st_size - 1)
    elif change == "replaced":
        shutil.copy(min(source.glob("*.safetensors")), shard)
    else:
        shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        pack_checkpoint(source, unfinished)
    assert caught.value.code == ("invalid_checkpoint" if change == "gone" else "source_changed")
    assert str(source / "config.json" if change == "config" else shard) in str(caught.value).replace(
        ": config", "/config"
    )
    assert_one_line(caught.value)
    assert not (unfinished / "pack.json").exists()


def test_a_source_that_changes_during_packing_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = VariantWriter.write_layer

    def meddle(self: VariantWriter, layer: int) -> None:
        write(self, layer)
        if layer == 3:
            flip(min(source.glob("*.safetensors")), 5000)

    monkeypatch.setattr(VariantWriter, "write_layer", meddle)
    with pytest.raises(CheckpointError) as caught:
        pack_checkpoint(source, tmp_path / "pack")
    assert caught.value.code == "source_changed"
    assert not (tmp_path / "pack" / "pack.json").exists()


def test_a_pack_of_another_version_is_refused(source: Path, unfinished: Path) -> None:
    edit_json(unfinished / ".packing" / "plan.json", version=0)
    assert_refused("unsupported_pack_version", source, unfinished)


def test_two_packers_at_once(source: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from flashmoe_mlx.pack.variant import VariantWriter
from flashmoe_mlx.pack.writer import pack_checkpoint
write = VariantWriter.write_layer
def slow(self, layer):
    if layer == 1:
        print(flush=True)
        sys.stdin.readline()
    write(self, layer)
VariantWriter.write_layer = slow
pack_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    out = tmp_path / "pack"
    expected = pack_checkpoint(source, tmp_path / "expected")
    command = [sys.executable, "-c", script, str(source), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdout.readline()
        for attempt in (lambda: pack_checkpoint(source, out), lambda: pack_checkpoint(source, out, bits=[2])):
            with pytest.raises(PackError) as caught:
                attempt()
            assert caught.value.code == "pack_in_use"
            assert_one_line(caught.value)
        first.communicate(b"\n")
    assert first.returncode == 0
    assert tree(out) == tree(expected.folder)
    with lock_folder(out), pytest.raises(PackError) as caught:
        add_variants(open_pack(out), [2])
    assert caught.value.code == "pack_in_use"


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with lock_folder(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    with lock_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_lock_file_does_not_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        (tmp_path / ".lock").unlink()  # the holder ends between open and flock
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(PackError) as caught, lock_folder(tmp_path):
        pytest.fail("two processes would hold the lock")
    assert caught.value.code == "pack_in_use"


def test_shards_are_deleted_after_an_interruption(source: Path, tmp_path: Path) -> None:
    expected = pack_checkpoint(source, tmp_path / "expected")
    for layer in (1, 3):
        with interrupt_before_layer(layer):
            pack_checkpoint(source, tmp_path / "pack", delete_source=True)
    pack = pack_checkpoint(source, tmp_path / "pack", delete_source=True)
    assert tree(pack.folder) == tree(expected.folder)
    assert list(source.glob("*.safetensors")) == []


def test_packed_shards_may_be_missing(tmp_path: Path) -> None:
    # Each layer in a separate shard, as in large checkpoints.
    source = write_checkpoint(tmp_path / "source", replace(SMALL, layer_types="LFLF"), 0, "fused", shards=37)
    expected = pack_checkpoint(source, tmp_path / "expected")
    before = len(list(source.glob("*.safetensors")))
    with interrupt_before_layer(2):
        pack_checkpoint(source, tmp_path / "pack", delete_source=True)
    left = len(list(source.glob("*.safetensors")))
    assert 0 < left < before
    pack = pack_checkpoint(source, tmp_path / "pack", delete_source=True)
    assert tree(pack.folder) == tree(expected.folder)


def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    """A limit on the file size makes writes fail in the same way as a full disk."""
    expected = pack_checkpoint(source, tmp_path / "expected", bits=[4, 2])
    script = """
import resource, sys
from pathlib import Path
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.pack.writer import pack_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    pack_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), bits=[4, 2])
except FlashMoeError as error:
    print(error)
"""
    out = tmp_path / "pack"
    for limit in (0, 5_000, 16_384, 40_000, 60_000):
        command = [sys.executable, "-c", script, str(source), str(out), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stderr == ""
        assert done.stdout == (
            f"{out}: no space left (File too large); make room and run the same command again to resume\n"
        )
    assert tree(pack_checkpoint(source, out, bits=[4, 2]).folder) == tree(expected.folder)


def test_a_full_disk_under_a_synthetic_pack(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from conftest import TINY
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.made_models.synthetic import synthetic_pack
for limit in (0, 70_000, 200_000, resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        print(synthetic_pack("tiny", TINY, Path("cache")).experts["q4"].num_layers)
    except FlashMoeError as error:
        print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    *failures, layers = done.stdout.splitlines()
    assert layers == "4"
    assert len(failures) == 3
    assert all("no space left (File too large); make room" in failure for failure in failures)


def test_a_small_filesystem(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_filesystem(tmp_path / "room", "200k") as room:
        expected = pack_checkpoint(source, tmp_path / "expected")
        with pytest.raises(PackError) as refused:
            pack_checkpoint(source, room)
        assert refused.value.code == "no_space"
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # another process fills the disk meanwhile
        with pytest.raises(FlashMoeError) as caught:
            pack_checkpoint(source, room)
        assert caught.value.code == "disk_full"
        assert_one_line(caught.value)
        subprocess.run(["mount", "-o", "remount,size=8m", room], check=True)
        assert tree(pack_checkpoint(source, room).folder) == tree(expected.folder)


def test_every_write_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", replace(SMALL, experts=2, top_k=1), 0, "mlx4", shards=2)
    expected = pack_checkpoint(source, tmp_path / "expected")

    def failing(original: Callable[..., object], step: int, error: int) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if next(calls) % step == 0:
                raise OSError(error, os.strerror(error))
            return original(*arguments, **named)

        return call

    calls = itertools.count(1)
    for step, error in ((1, 28), (3, 5), (7, 122), (20, 28), (33, 5)):
        with monkeypatch.context() as patched:
            for name in ("pwrite", "fsync", "replace"):
                patched.setattr(os, name, failing(getattr(os, name), step, error))
            with pytest.raises(FlashMoeError) as caught:
                pack_checkpoint(source, tmp_path / "pack")
        assert_one_line(caught.value)
        assert os.strerror(error) in str(caught.value)
        assert not isinstance(caught.value, InputError)
    assert tree(pack_checkpoint(source, tmp_path / "pack").folder) == tree(expected.folder)
