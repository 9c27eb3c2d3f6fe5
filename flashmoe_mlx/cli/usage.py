"""The text of ``--help``: the keys of one task, with defaults and descriptions from the YAML under ``configs/``."""

import re
from collections.abc import Iterator
from importlib.resources import files as package_files
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from flashmoe_mlx.cli.command_line import CommandLine
from flashmoe_mlx.cli.composition import unread_key
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.tasks.keys import TASK_CONFIGS, keys_of

_KEY = re.compile(r"^(?P<key>\w+): *(?P<default>\[.*?\]|.*?)(?: +# (?P<about>.*))?$", re.MULTILINE)
_TYPES = {
    int: "int",
    float: "number",
    bool: "true|false",
    str: "text",
    list: "list",
    dict: "{NAME:VALUE}",
    NoneType: "null",
}
_EXAMPLES = {
    "generate": (
        "+backend=pread +experts_k=4",
        'prompt="Why is the sky blue?"',
        "prompt_file=question.txt",
        "model.path=~/packs/qwen35-397b",
        "-m backend=pread experts_k=2,4,8",
        "-m prompt=\"'Hello','Who are you?'\"",
    ),
    "bench": (
        "task=bench backends=[pread,mmap,{name:pread,direct:true}] experts_ks=[2,4,8]",
        "experiment=compare_backends rounds=3",
    ),
    "bench_io": ("task=bench_io backends=[pread,io_uring] requests=zipf",),
    "doctor": ("task=doctor",),
    "estimate": ("task=estimate model=Qwen/Qwen3.5-397B-A17B bits=[2] memory_gib=32",),
    "evaluate": ("task=evaluate variants=[q4,q2] limit=20",),
    "pack": (
        "task=pack source=mlx-community/Qwen3.5-397B-A17B-4bit out=~/packs/qwen35-397b bits=[4,2]",
        "task=pack verify=true out=~/packs/qwen35-397b",
    ),
    "simulate": ("task=simulate trace=chat.moetrace policies=[lru,belady]",),
    "trace": ('task=trace prompt="Tell me a story." out=chat.moetrace',),
}
_GENERAL = """\
Everywhere
  debug=true                show full tracebacks
  --cfg job                 show the configuration without running
  -m                        run once for each of several values: experts_k=2,4; quote texts: prompt="'A','B'"
  hydra.run.dir=DIR         directory for the record of the run; with -m: hydra.sweep.dir=DIR
  --version, --hydra-help"""


def help_text(line: CommandLine) -> str:
    """Return the help for the task that ``line`` asks for.

    Raises:
        InputError: there is no such task.
    """
    tasks = line.tasks()
    if tasks is None or len(tasks) != 1:
        raise InputError(f"task={line.value('task')}: --help is about one of {', '.join(TASK_CONFIGS)}")
    (task,) = tasks
    return "\n".join(_lines(task, line.value("backend")))


def _lines(task: str, backend: str | None) -> Iterator[str]:
    yield "flashmoe_mlx: run Mixture-of-Experts models larger than memory\n"
    yield "  python -m flashmoe_mlx [task=NAME] [key=value ...]       key=value and +key=value mean the same\n"
    yield f"task={task}: {_about('task', task)}"
    described = _described("", "generation.yaml") | _described("task", f"{task}.yaml")
    hints = get_type_hints(TASK_CONFIGS[task])
    keys = keys_of(task)
    for key in (key for key in keys if key in described):
        default, about = described[key]
        yield _row(f"{key}={default}", _type_name(hints[key]), about)
    yield ""
    if "model" in keys:
        yield from _group("model", "demo")
        yield _row("model.path=DIR", "", "a pack or checkpoint, such as model.path=~/packs/qwen35-397b")
        yield _row(
            "model.cache_dir=DIR",
            "",
            "where generated models are kept; null: $FLASHMOE_CACHE, or the user's cache folder",
        )
        yield ""
    if "backend" in keys:
        yield from _group("backend", "pread")
        name = backend or "pread"
        options = _described("backend", f"{name}.yaml")
        yield f"\nbackend={name}: {_about('backend', name)}"
        for option, (default, about) in options.items():
            if option != "_target_":
                yield _row(f"backend.{option}={default}", "", about)
        yield ""
    elif backend is not None:
        raise unread_key("backend", [task])
    yield "Examples"
    for example in _EXAMPLES[task]:
        yield f"  python -m flashmoe_mlx {example}"
    yield "\nTasks: task=NAME --help shows the keys of each"
    for name in TASK_CONFIGS:
        yield _row(f"task={name}", "", _about("task", name))
    yield "\nStudies: experiment=NAME; every key can still be overridden"
    for name in _names("experiment"):
        yield _row(f"experiment={name}", "", _about("experiment", name))
    yield f"\n{_GENERAL}"


def _row(left: str, kind: str, about: str) -> str:
    """Return a line of three columns; a long key takes a line by itself."""
    start = f"  {left}\n{'':28}" if len(left) > 25 else f"  {left:<26}"
    return f"{start}{kind:<12}{about}".rstrip() if kind else f"{start}{about}".rstrip()


def _type_name(hint: object) -> str:
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return "|".join(_TYPES[get_origin(option) or option] for option in options)


def _group(group: str, default: str) -> Iterator[str]:
    for name in _names(group):
        yield _row(f"{group}={name}", "", f"{_about(group, name)}{' (the default)' if name == default else ''}")


def _names(group: str) -> list[str]:
    folder = package_files("flashmoe_mlx.configs").joinpath(group)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _about(group: str, name: str) -> str:
    """Return the first comment of a YAML that is no directive to Hydra."""
    lines = _text(group, f"{name}.yaml").splitlines()
    return next(line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @"))


def _described(group: str, file: str) -> dict[str, tuple[str, str]]:
    """Return default and comment of each key at the top level of a YAML."""
    found = _KEY.finditer(_text(group, file))
    return {
        match["key"]: (match["default"], match["about"] or "")
        for match in found
        if match["key"] not in ("defaults", "task")
    }


def _text(group: str, file: str) -> str:
    name = file.removesuffix(".yaml")
    if group and name not in _names(group):
        raise InputError(f"{group}={name}: no such {group}; there are {', '.join(_names(group))}", code="unknown_name")
    path = package_files("flashmoe_mlx.configs").joinpath(*filter(None, (group, file)))
    return path.read_text(encoding="utf-8")
