"""Import directions: a room imports from its own floor and below, and no two modules import each other."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("errors",),
    ("cgroups", "paths"),
    ("formats",),
    ("custom_kernels",),
    ("stores",),
    ("backends", "layers", "text"),
    ("moe",),
    ("models",),
    ("checkpoint",),
    ("pack",),
    ("made_models", "model_files"),
    ("generation",),
    ("engine",),
    ("research",),
    ("console",),
    ("tasks",),
    ("cli",),
    ("__main__",),
    ("testing",),
)
"""Rooms of the package from the ground up; rooms of one floor do not import each other."""
ALLOWED_FROM_BACKENDS = {"errors", "paths", "formats", "stores"}
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for base in ("flashmoe_mlx", "backends", "custom_kernels"):
        for path in sorted((ROOT / base).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name if base == "flashmoe_mlx" else f"flashmoe_mlx.{name}"] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Return the modules of the package that ``name`` imports, at its import or inside a function."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flashmoe_mlx":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "flashmoe_mlx")


def room(name: str) -> str:
    """Return the room of a module: the first part of its name inside the package; empty for the package itself."""
    return name.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("name", [name for name in MODULES if room(name)])
def test_a_module_imports_from_its_own_floor_and_below(name: str) -> None:
    own = room(name)
    assert own in LEVEL, f"{own} has no floor"
    above = {
        target
        for target in imports(name)
        if room(target) != own and (not room(target) or LEVEL[room(target)] >= LEVEL[own])
    }
    assert not above, f"{name} imports upward: {sorted(above)}"


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "backends"])
def test_a_backend_imports_only_formats_and_stores(name: str) -> None:
    assert {room(target) for target in imports(name)} <= ALLOWED_FROM_BACKENDS


def test_no_two_modules_import_each_other() -> None:
    graph = {name: {target for target in imports(name) if target != name} for name in MODULES if room(name)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_a_library_user_gets_no_command_line() -> None:
    program = (
        "import sys, flashmoe_mlx; flashmoe_mlx.load(sys.argv[1]).close();"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'hydra', 'omegaconf', 'rich', 'pytest'}))"
    )
    pack = ROOT / "flashmoe_mlx" / "made_models" / "demo_model"
    done = subprocess.run([sys.executable, "-c", program, str(pack)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_module_is_large() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items() if room(name) != "testing"}
    assert not {name: size for name, size in sizes.items() if size > 400}


def test_the_wheel_lists_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    assert {name for name, path in MODULES.items() if path.name == "__init__.py"} <= listed
