"""The public names: listed on the pages of the API, documented, and sufficient for every example."""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from flashmoe_mlx.deprecation import deprecated

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "api" / f"{grade}.md" for grade in ("stable", "provisional")]
MODULES = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def documented_assignments(module: ModuleType) -> set[str]:
    """Return the names that are followed by a docstring at the top level of ``module``."""
    body = list(_statements(ast.parse(inspect.getsource(module)).body))
    found: set[str] = set()
    names: list[str] = []
    for statement in body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            found |= set(names)
        elif isinstance(statement, ast.Assign):
            targets = [node for target in statement.targets for node in ast.walk(target)]
            names = [*names, *(node.id for node in targets if isinstance(node, ast.Name))]
            continue
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names = [*names, statement.target.id]
            continue
        names = []
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of ``body``, including the branches of ``try`` statements."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.Try):
            yield from _statements([*statement.body, *(s for handler in statement.handlers for s in handler.body)])


def without_documentation(module: ModuleType, name: str) -> Iterator[str]:
    """Yield the parts of a public name that have no docstring."""
    value = getattr(module, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        home = next((m for m in (module, *_imported_from(module, name)) if name in documented_assignments(m)), None)
        if home is None and not isinstance(value, ModuleType):
            yield name
        return
    text = value.__doc__ or ""
    if not text or (is_dataclass(value) and text.startswith(f"{value.__name__}(")):
        yield name
    if inspect.isclass(value):
        for member, function in vars(value).items():
            wrapped = function.fget if isinstance(function, property) else getattr(function, "__func__", function)
            named = getattr(wrapped, "__name__", "").isidentifier()  # a default value may be a lambda
            public = inspect.isfunction(wrapped) and named and not member.startswith(("_", "test_"))
            if public and not inspect.getdoc(getattr(value, member)):
                yield f"{name}.{member}"


def _imported_from(module: ModuleType, name: str) -> Iterator[ModuleType]:
    """Yield the module from which ``module`` imports ``name``."""
    for statement in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(statement, ast.ImportFrom) and name in (alias.name for alias in statement.names):
            yield import_module(str(statement.module))


@pytest.mark.parametrize("module", [import_module(name) for name in MODULES], ids=MODULES)
def test_public_names_are_documented(module: ModuleType) -> None:
    assert (module.__doc__ or "").strip()
    assert module.__all__
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert [part for name in module.__all__ for part in without_documentation(module, name)] == []


def test_a_module_has_one_grade() -> None:
    assert len(MODULES) > 30
    assert len(set(MODULES)) == len(MODULES)


def test_the_package_declares_its_types() -> None:
    assert (Path(import_module("flashmoe_mlx").__path__[0]) / "py.typed").exists()


def examples() -> Iterator[str]:
    """Yield the Python code in the documents and in the notebooks."""
    fence = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        yield from (textwrap.dedent(code) for _, code in fence.findall(path.read_text()))
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = (cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
        yield from ("".join(line for line in cell["source"] if line[0] not in "%!") for cell in cells)


def test_examples_import_public_names_only() -> None:
    statements = (node for code in examples() for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom))
    imports = [(str(s.module), alias.name) for s in statements for alias in s.names if "flashmoe_mlx" in str(s.module)]
    assert len(imports) > 40
    private = [(module, name) for module, name in imports if name not in getattr(import_module(module), "__all__", ())]
    assert private == []
    assert {module for module, _ in imports} <= set(MODULES)


def test_a_deprecated_name_warns_and_works() -> None:
    @deprecated("use int", removal="0.3")
    def old(text: str, base: int = 10) -> int:
        """Return a number."""
        return int(text, base)

    with pytest.warns(
        DeprecationWarning, match=r"old is deprecated and will be removed in version 0\.3; use int"
    ) as found:
        assert old("11", base=2) == 3
    assert found[0].filename == __file__
    assert old.__doc__ == "Return a number."
