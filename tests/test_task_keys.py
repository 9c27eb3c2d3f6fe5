"""Every key of a task is read by that task: found in its source, from ``run`` on."""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from types import FunctionType, ModuleType

import pytest

from flashmoe_mlx.tasks.keys import TASK_CONFIGS, keys_of

PACKAGE = "flashmoe_mlx.tasks."
ELSEWHERE = set(keys_of("doctor"))
"""``task`` and ``debug``: read by the application, for every task."""


def read_keys(function: FunctionType, seen: set[FunctionType]) -> Iterator[str]:
    """Keys of the configuration that ``function`` reads, and the functions of tasks that it hands the whole to."""
    if function in seen:
        return
    seen.add(function)
    module = inspect.getmodule(function)
    assert isinstance(module, ModuleType)
    tree = ast.parse(inspect.getsource(function))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config":
            yield node.attr
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(isinstance(one, ast.Name) and one.id == "config" for one in given):
                called = getattr(module, node.func.id, None) if isinstance(node.func, ast.Name) else None
                called = inspect.unwrap(called) if called is not None else None
                if isinstance(called, FunctionType) and called.__module__.startswith(PACKAGE):
                    yield from read_keys(called, seen)


@pytest.mark.parametrize("task", TASK_CONFIGS)
def test_each_key_is_read_by_its_task(task: str) -> None:
    found = set(read_keys(import_module(f"{PACKAGE}{task}").run, set()))
    assert found >= set(keys_of(task)) - ELSEWHERE
    assert found <= set(keys_of(task))


@pytest.mark.parametrize("task", TASK_CONFIGS)
def test_a_task_asks_for_its_own_configuration(task: str) -> None:
    asked = inspect.get_annotations(import_module(f"{PACKAGE}{task}").run)["config"]
    assert issubclass(TASK_CONFIGS[task], asked)
    assert set(keys_of(task)) - ELSEWHERE == set(asked.__dataclass_fields__) - ELSEWHERE
