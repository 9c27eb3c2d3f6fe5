"""docs/errors.md lists exactly the error codes of the program, with their exit codes."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmoe_mlx.console.streams import OutputError
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.stores.contract import ExpertStoreError

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("flashmoe_mlx", "backends", "custom_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "testing" not in path.parts
]
FOREIGN = {"system_error": 1, "internal_error": 1}
"""Codes that ``error_reports`` gives to exceptions of other packages."""
ROW = re.compile(r"^\| `(.*?)` \| (\d) \| (.*) \|$", re.MULTILINE)


def documented() -> list[tuple[str, int, str]]:
    rows = ROW.findall((ROOT / "docs" / "errors.md").read_text())
    return [(code, int(exit_code), meaning) for code, exit_code, meaning in rows]


def subclasses(kind: type[FlashMoeError]) -> Iterator[type[FlashMoeError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


CLASSES = {kind.__name__: kind for kind in subclasses(FlashMoeError) if kind.__module__.startswith("flashmoe_mlx.")}


def texts(node: ast.expr, constants: dict[str, ast.expr]) -> set[str]:
    """Return the string values that ``node`` may have, as far as they are literals."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, ast.IfExp):
        return texts(node.body, constants) | texts(node.orelse, constants)
    if isinstance(node, ast.Dict):
        return {text for value in node.values for text in texts(value, constants)}
    if isinstance(node, ast.Name) and node.id in constants:
        return texts(constants[node.id], {})
    return set()


def named(target: ast.expr, value: ast.expr) -> dict[str, ast.expr]:
    """Return the values of the names in an assignment, for instance ``A, B = "a", "b"``."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts, strict=True)
        return {name.id: part for name, part in pairs if isinstance(name, ast.Name)}
    return {target.id: value} if isinstance(target, ast.Name) else {}


def codes_in(source: str) -> Iterator[tuple[str, str | None]]:
    """Yield each code in the source of a module, with the name of the called class or function, or None."""
    tree = ast.parse(source)
    constants = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                constants |= named(target, statement.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", None))
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            for value in given:
                for code in texts(value, constants):
                    yield code, called
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value and any(re.fullmatch(r"code|\w+_CODES", getattr(target, "id", "")) for target in targets):
                for code in texts(node.value, constants):
                    yield code, None
        elif isinstance(node, ast.arguments):
            defaults = zip(reversed(node.posonlyargs + node.args), reversed(node.defaults), strict=False)
            for argument, default in [*defaults, *zip(node.kwonlyargs, node.kw_defaults, strict=True)]:
                if argument.arg == "code" and default is not None:
                    for code in texts(default, constants):
                        yield code, None


def used() -> dict[str, set[int]]:
    """Return every code in the sources, with the exit codes of the classes that are raised with it."""
    found: dict[str, set[int]] = defaultdict(set)
    for path in SOURCES:
        for code, called in codes_in(path.read_text()):
            found[code] |= {CLASSES[called].exit_code} if called in CLASSES else set()
    for kind in CLASSES.values():
        found[kind.default_code].add(kind.exit_code)
    return found | {code: {exit_code} for code, exit_code in FOREIGN.items()}


def test_all_codes_are_found() -> None:
    assert {"unknown_backend", "template_refused", "too_many_open_files", "symbolic_link"} <= used().keys()
    source = (
        "A, D = 'of_a', 'of_d'\n"
        "raise InputError('', code=A if x == 'no_code' else 'of_b')\n"
        "raise InputError('', code=D)\n"
        "def f(*, code: str = 'of_c'): ...\n"
    )
    assert {code for code, _ in codes_in(source)} == {"of_a", "of_b", "of_c", "of_d"}


@pytest.mark.parametrize("code", sorted(used()))
def test_codes_are_snake_case(code: str) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)


def test_each_code_has_one_meaning() -> None:
    rows = documented()
    codes, meanings = Counter(code for code, _, _ in rows), Counter(meaning for _, _, meaning in rows)
    assert [code for code, count in codes.items() if count > 1] == []
    assert [meaning for meaning, count in meanings.items() if count > 1] == []


def test_documented_codes_equal_the_codes_of_the_program() -> None:
    listed, found = {code for code, _, _ in documented()}, used().keys()
    assert found - listed == set(), "add these codes to docs/errors.md"
    assert listed - found == set(), "docs/errors.md lists codes that nothing raises"


def test_documented_exit_codes_equal_the_exit_codes_of_the_program() -> None:
    found = used()
    assert {code: found[code] for code, exit_code, _ in documented() if found[code] - {exit_code}} == {}


def test_errors_have_a_code_and_a_message() -> None:
    assert InputError("that", code="this").code == "this"
    assert (InputError("that").code, str(InputError("that"))) == ("invalid_input", "that")
    assert {OutputError, ExpertStoreError} < set(CLASSES.values())
