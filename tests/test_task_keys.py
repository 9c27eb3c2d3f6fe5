"""Each task is self-contained: its ``Config``, its YAML and its ``run`` agree on its keys."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_type_hints

import pytest
import yaml

from flashmoe_mlx.cli.task_keys import config_class, keys_of, task_names, text_key
from flashmoe_mlx.tasks.shared.keys import CommonConfig

ROOT = Path(__file__).parent.parent
PACKAGE = "flashmoe_mlx.tasks."
COMMON = {field.name for field in fields(CommonConfig)}
"""``task`` and ``debug``, which the application reads for every task."""


def read_keys(function: FunctionType, seen: set[FunctionType]) -> Iterator[str]:
    """Yield the keys that ``function`` reads, directly or in functions of a task that get its configuration."""
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
            if any(isinstance(value, ast.Name) and value.id == "config" for value in given):
                called = getattr(module, node.func.id, None) if isinstance(node.func, ast.Name) else None
                called = inspect.unwrap(called) if called is not None else None
                if isinstance(called, FunctionType) and called.__module__.startswith(PACKAGE):
                    yield from read_keys(called, seen)


def composed_keys(task: str) -> set[str]:
    """Return the top-level keys that the YAML of a task, and the groups in its defaults, set."""
    text = (ROOT / "configs" / "task" / f"{task}.yaml").read_text()
    settings = yaml.safe_load(text)
    keys = set(settings) - {"defaults"}
    for entry in settings.get("defaults", []):
        if isinstance(entry, dict):
            keys |= {name.lstrip("/") for name in entry}
        elif entry.startswith("/"):
            keys |= set(yaml.safe_load((ROOT / "configs" / f"{entry[1:]}.yaml").read_text()))
    return keys | {"debug"}  # of config.yaml


def default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def test_every_module_in_tasks_is_a_task_with_a_yaml() -> None:
    modules = {path.stem for path in (ROOT / "flashmoe_mlx" / "tasks").glob("*.py")} - {"__init__"}
    assert modules == set(task_names())


@pytest.mark.parametrize("task", task_names())
def test_config_yaml_and_run_have_the_same_keys(task: str) -> None:
    module = import_module(f"{PACKAGE}{task}")
    declared = {field.name for field in fields(module.Config)}
    assert declared == composed_keys(task)
    assert set(read_keys(module.run, set())) == declared - COMMON


@pytest.mark.parametrize("task", task_names())
def test_run_takes_the_config_of_its_module(task: str) -> None:
    module = import_module(f"{PACKAGE}{task}")
    assert inspect.get_annotations(module.run)["config"] is module.Config


@pytest.mark.parametrize("task", task_names())
def test_the_command_line_compiles_the_class_that_the_task_has(task: str) -> None:
    ours, theirs = config_class(task), import_module(f"{PACKAGE}{task}").Config
    assert get_type_hints(ours) == get_type_hints(theirs)
    for compiled, imported in zip(fields(ours), fields(theirs), strict=True):
        assert (compiled.name, compiled.metadata) == (imported.name, imported.metadata)
        assert default(compiled) == default(imported)
    assert keys_of(task) == [field.name for field in fields(theirs)]


@pytest.mark.parametrize("task", task_names())
def test_a_default_in_yaml_equals_the_default_in_python(task: str) -> None:
    settings = yaml.safe_load((ROOT / "configs" / "task" / f"{task}.yaml").read_text())
    for field in fields(import_module(f"{PACKAGE}{task}").Config):
        if field.name in settings and not is_dataclass(default(field)):
            assert settings[field.name] == default(field), field.name


def test_texts_are_marked_where_they_are_declared() -> None:
    for key in ("prompt", "prompt_file", "system", "tools", "model.path", "model.cache_dir", "backend.trace"):
        assert text_key(key, ["generate"]) is not None
    for key in ("experts_k", "backend", "backend.slots", "model.synthetic", "model.synthetic.seed", "nosuch", "a.b"):
        assert text_key(key, ["generate"]) is None
    assert text_key("items", ["generate"]) is None
    assert text_key("items", None) is not None
    prompts = text_key("prompts", ["bench"])
    assert prompts is not None
    assert (prompts.listed, prompts.nullable) == (True, True)
    prompt = text_key("prompt", ["trace"])
    assert prompt is not None
    assert (prompt.listed, prompt.nullable) == (False, False)


def test_a_run_imports_only_its_task(tiny_pack: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from flashmoe_mlx.__main__ import main; code = main(sys.argv[1:]);"
        f"print(code, *sorted(name for name in sys.modules if name.startswith({PACKAGE!r}) and name.count('.') == 2))"
    )
    for arguments, shown in (
        (["task=generate", "prompt=a", "max_tokens=1"], "0 flashmoe_mlx.tasks.generate flashmoe_mlx.tasks.shared"),
        (["task=bench", "--help"], "0 flashmoe_mlx.tasks.shared"),
        (["task=bench", "max_tokens=3"], "2 flashmoe_mlx.tasks.shared"),
    ):
        command = [sys.executable, "-c", program, f"model.path={tiny_pack}", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.splitlines()[-1] == shown, done.stderr


def test_the_example_in_contributing(tmp_path: Path) -> None:
    """The task and its YAML, as docs/extend/task.md shows them, run in a copy of the package."""
    section = (ROOT / "docs" / "extend" / "task.md").read_text()
    blocks = dict(re.findall(r"^```(python|yaml)\n(.*?)^```", section, re.DOTALL | re.MULTILINE))
    package = tmp_path / "flashmoe_mlx"
    shutil.copytree(ROOT / "flashmoe_mlx", package, ignore=shutil.ignore_patterns("demo_model", "__pycache__"))
    for name in ("configs", "backends", "custom_kernels"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "tasks" / "hello.py").write_text(blocks["python"])
    (package / "configs" / "task" / "hello.yaml").write_text(blocks["yaml"])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def flashmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flashmoe_mlx", "task=hello", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    done = flashmoe("name=it's, [Ada]", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "Hello, it's, [Ada]!"
    assert (tmp_path / "run" / "hello.txt").read_text() == "it's, [Ada]"
    shown = flashmoe("--help").stdout
    assert "name=world                text             whom to greet" in shown
    assert 'python -m flashmoe_mlx task=hello name="Ada Lovelace"' in shown
    assert flashmoe("nam=x").stderr == "flashmoe_mlx: nam: no such key; did you mean name?\n"
