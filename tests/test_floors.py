"""Import directions: a room imports from its own floor and below, and no two modules import each other."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("deprecation", "errors", "version"),
    ("cgroups", "paths", "progress"),
    ("formats",),
    ("custom_kernels",),
    ("nodes",),
    ("stores",),
    ("backends", "layers", "text"),
    ("moe",),
    ("models",),
    ("adapters",),
    ("checkpoint",),
    ("pack",),
    ("made_models", "model_files"),
    ("generation",),
    ("engine",),
    ("server",),
    ("research",),
    ("console",),
    ("chat",),
    ("tasks",),
    ("cli",),
    ("__main__",),
    ("testing",),
)
"""Rooms of the package, the lowest floor first; rooms of one floor do not import each other."""
ALLOWED_FROM_BACKENDS = {"errors", "paths", "progress", "formats", "stores"}
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
    """Yield the modules of the package that ``name`` imports, at its import or inside a function.

    This includes imports for type checkers, relative imports, and calls of ``import_module`` that name a module.
    """
    yield from imports_of(MODULES[name].read_text(), name, is_package=MODULES[name].name == "__init__.py")


def imports_of(source: str, name: str, *, is_package: bool = False) -> Iterator[str]:
    """Yield the modules of the package that ``source``, the text of the module ``name``, imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            above = name.split(".")[: (1 if is_package else 0) - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if base.split(".")[0] == "flashmoe_mlx":
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield full if full in MODULES else base
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "flashmoe_mlx")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            named = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            if str(named).split(".")[0] == "flashmoe_mlx":
                yield named


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


def test_only_adapters_import_mlx_lm() -> None:
    importing = re.compile(r"(import|from) mlx_lm|import_module\(f?.mlx_lm")
    assert {room(name) for name, path in MODULES.items() if importing.search(path.read_text())} == {"adapters"}


def test_no_two_modules_import_each_other() -> None:
    graph = {name: {target for target in imports(name) if target != name} for name in MODULES if room(name)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "source",
    [
        "import flashmoe_mlx.engine",
        "from flashmoe_mlx import engine",
        "from flashmoe_mlx.engine import load",
        "from .. import engine",
        "from ..engine import load",
        "from importlib import import_module; import_module('flashmoe_mlx.engine')",
        "import importlib; importlib.import_module('flashmoe_mlx.engine')",
        "def late():\n    import flashmoe_mlx.engine",
        "if TYPE_CHECKING:\n    from flashmoe_mlx.engine import Engine",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    assert set(imports_of(source, "flashmoe_mlx.layers.linear")) == {"flashmoe_mlx.engine"}
    assert set(imports_of("from . import linear, rope", "flashmoe_mlx.layers", is_package=True)) == {
        "flashmoe_mlx.layers.linear",
        "flashmoe_mlx.layers.rope",
    }


def test_folders_of_the_checkout_are_imported_under_the_name_of_the_package() -> None:
    """``import backends`` works only in the folder of a checkout."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module or ""]
            assert not {part.split(".")[0] for part in named} & {"backends", "custom_kernels", "configs"}, name


def test_a_library_user_needs_no_command_line() -> None:
    """A model is loaded and answers where Hydra, OmegaConf, rich and pytest cannot be imported."""
    program = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hydra", "omegaconf", "antlr4", "rich", "pytest", "_pytest"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
import flashmoe_mlx
with flashmoe_mlx.load(sys.argv[1], prefetch="next_router") as engine:
    print(sum(len(piece.token_ids) for piece in engine.generate("Hello", max_tokens=3, ignore_eos=True)))
"""
    pack = ROOT / "flashmoe_mlx" / "made_models" / "demo_model"
    done = subprocess.run([sys.executable, "-c", program, str(pack)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


def test_no_module_is_large() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items() if room(name) != "testing"}
    assert not {name: size for name, size in sizes.items() if size > 400}


def test_the_wheel_lists_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    assert {name for name, path in MODULES.items() if path.name == "__init__.py"} <= listed


def test_the_version_of_the_package_has_one_source() -> None:
    """A checkout that is not installed has no metadata; ``flashmoe_mlx.__version__`` knows that."""
    asking = [name for name, path in MODULES.items() if re.search(r'version\("flashmoe', path.read_text())]
    assert asking == ["flashmoe_mlx.version"]
