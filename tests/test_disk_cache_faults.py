"""Conversations on disk under faults: operations that fail, a small file system, and writes lost with the power.

Nothing waits for the disk when a conversation is written, so a power failure may lose any part of it. Whatever is left,
answers equal those without the cache, and what the cache still has is what was written.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_filesystem import small_filesystem
from test_prompt_cache import conversation

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompt_cache.files import KEYS_AND_VALUES, SETTINGS
from flashmoe_mlx.generation.prompt_cache.folder import kept

PROMPT = list(range(1, 60))


class Turns:
    """Two turns of a conversation, and the answers to them without a cache.

    Attributes:
        folder: what the first turn leaves on disk.
        second: the prompt of the second turn.
        expected: the tokens of the answer to it.
    """

    def __init__(self, pack: Path, folder: Path) -> None:
        self.folder = folder / "first"
        first = conversation(pack, self.folder, PROMPT)
        self.second = [*PROMPT, *first.token_ids, 7, 8, 9]
        self.expected = conversation(pack, folder / "other", self.second).token_ids


@pytest.fixture(scope="module")
def turns(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Turns:
    return Turns(tiny_pack, tmp_path_factory.mktemp("turns"))


class Faults:
    """An audit hook that lets the operation number ``at`` on files below ``folder`` fail.

    Hooks stay for the life of the process; this one does nothing while ``folder`` is None.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.at = self.count = 0
        self.error = errno.EIO
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None or not event.startswith(("open", "os.", "shutil.", "tempfile.")):
            return
        if any(isinstance(value, str | Path) and str(value).startswith(self.folder) for value in arguments):
            self.count += 1
            if self.count == self.at:
                raise OSError(self.error, os.strerror(self.error))


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    hook = Faults()
    yield hook
    hook.folder = None


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("at", range(1, 40))
@pytest.mark.sampled(3)
def test_any_operation_may_fail(
    tiny_pack: Path, tmp_path: Path, turns: Turns, faults: Faults, at: int, error: int
) -> None:
    """Opening the cache may be refused in one line; after that, a failure changes no answer."""
    folder = tmp_path / "cache"
    shutil.copytree(turns.folder, folder)
    faults.folder, faults.at, faults.count, faults.error = str(folder), at, 0, error
    try:
        assert conversation(tiny_pack, folder, turns.second).token_ids == turns.expected
    except InputError as refused:
        assert refused.code == "cache_dir"  # noqa: PT017  # most operations that fail raise nothing
    finally:
        faults.folder = None
    again = conversation(tiny_pack, folder, turns.second)
    assert again.token_ids == turns.expected
    assert conversation(tiny_pack, folder, turns.second).metrics.computed_tokens == 1


LOSSES = st.sampled_from(["none", "missing", "empty", "half", "zeros", "last page"])


def lose(file: Path, loss: str) -> None:
    """Leave of ``file`` what a power failure may leave of a file whose writes did not reach the disk."""
    data = file.read_bytes()
    if loss == "missing":
        file.unlink()
    elif loss != "none":
        left = {"empty": b"", "half": data[: len(data) // 2], "zeros": bytes(len(data))}
        file.write_bytes(left.get(loss, data[:-1000] + bytes(min(1000, len(data)))))


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=LOSSES, described=LOSSES, states=st.lists(LOSSES, min_size=8, max_size=8))
def test_the_power_fails(
    tiny_pack: Path,
    tmp_path_factory: pytest.TempPathFactory,
    turns: Turns,
    keys: str,
    described: str,
    states: list[str],
) -> None:
    folder = tmp_path_factory.mktemp("power") / "cache"
    shutil.copytree(turns.folder, folder)
    for file, loss in zip(sorted(folder.glob("*/*/*.safetensors")), states, strict=False):
        lose(file, loss)
    for file in folder.glob(f"*/*/{KEYS_AND_VALUES}"):
        lose(file, keys)
    for file in folder.glob(f"*/{SETTINGS}"):
        lose(file, described)
    answer = conversation(tiny_pack, folder, turns.second)
    assert answer.token_ids == turns.expected
    if {*states, keys} == {"none"}:
        assert answer.metrics.reused_from == "disk"
    assert conversation(tiny_pack, folder, turns.second).metrics.computed_tokens == 1
    assert [model.conversations for model in kept(folder)] == [1]


def test_a_small_file_system(tiny_pack: Path, tmp_path: Path, turns: Turns) -> None:
    with small_filesystem(tmp_path / "room", "40k") as room:
        for prompt in (PROMPT, turns.second, turns.second):
            full = conversation(tiny_pack, room, prompt)
        assert full.token_ids == turns.expected
        subprocess.run(["mount", "-o", "remount,size=8m", room], check=True)
        assert conversation(tiny_pack, room, turns.second).token_ids == turns.expected
        assert conversation(tiny_pack, room, turns.second).metrics.computed_tokens == 1
