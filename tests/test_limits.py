"""Real limits of the system in a separate process: descriptors and memory that run out."""

import subprocess
import sys
from pathlib import Path

import pytest
from systems import needs_linux

PRELUDE = """
import os, resource, sys
from pathlib import Path
from hydra.utils import get_class
from flashmoe_mlx.stores.registry import backend_settings, create_store
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.testing.stored_experts import write_experts

def opened(name, source, **options):
    settings = backend_settings(name) | options
    settings.pop("variant")
    return create_store(source, settings)
"""


def run(script: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(("name", "contiguous"), [("pread", True), ("mmap", True), ("checkpoint", False)])
@pytest.mark.sampled(1)
def test_descriptors_run_out(name: str, contiguous: bool, tmp_path: Path) -> None:
    """Without descriptors a fetch fails; with descriptors again it returns the right bytes."""
    lines = run(
        """
name, pieces, folder = sys.argv[1], sys.argv[2] == "True", Path(sys.argv[3])
stored = write_experts(folder, 4, pieces)
with opened(name, stored.source) as store:
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    for layer in (0, 1):
        try:
            store.fetch(layer, [3])
        except FlashMoeError as error:
            print(error.code)
    for fd in taken:
        os.close(fd)
    view = store.fetch(1, [3]).host[0]
    expected = stored.expected[1, 3]
    print(bytes(view[: len(expected)]) == expected)
""",
        name,
        contiguous,
        tmp_path,
    )
    assert lines == ["too_many_open_files", "too_many_open_files", "True"]


@needs_linux
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pread", {"slots": 60_000}),
        ("mmap", {"slots": 60_000}),
        ("checkpoint", {"slots": 60_000}),
        ("ram_hybrid", {"budget_gib": 1.0, "slots": 12}),
        ("resident", {}),
    ],
)
@pytest.mark.sampled(2)
def test_memory_runs_out(name: str, options: dict[str, float], tmp_path: Path) -> None:
    """A store is refused in one line, and MLX does not crash."""
    lines = run(
        """
name, options, folder = sys.argv[1], eval(sys.argv[2]), Path(sys.argv[3])
stored = write_experts(folder, 4, name != "checkpoint")
get_class(backend_settings(name)["_target_"])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000, used + 200_000))
try:
    opened(name, stored.source, **options)
except FlashMoeError as error:
    print(error.code)
    print(error)
""",
        name,
        options,
        tmp_path,
    )
    code, _ = lines
    assert code in ("not_enough_memory", "no_threads")
