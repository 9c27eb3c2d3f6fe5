"""Commands in the documents: each one composes; each page's commands run in turn, except where a comment says why not.

A comment ``<!-- not run: reason -->`` before a block of commands excludes it from the runs. Files in
``docs/measurements`` are records of the past; their commands belong to the version that they were measured with.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from flashmoe_mlx.cli.arguments import parse
from flashmoe_mlx.cli.composition import build_config
from flashmoe_mlx.cli.normalization import normalize_argv
from flashmoe_mlx.cli.usage import help_text

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if "measurements" not in p.parts)]
PROGRAM = "python -m flashmoe_mlx"
BLOCK = re.compile(r"^(?P<comment><!-- not run: .+ -->\n+)?```sh\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r"<\w[\w .-]*>")


def blocks(page: Path) -> list[tuple[str, bool]]:
    """Return the blocks of commands on ``page``, and whether each of them can run here."""
    return [(found["code"], found["comment"] is None) for found in BLOCK.finditer(page.read_text())]


def program_calls(page: Path) -> list[str]:
    """Return the arguments of this program that blocks and the text of ``page`` show."""
    text = page.read_text()
    lines = [line for code, _ in blocks(page) for line in code.splitlines() if PROGRAM in line]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    tasks = [span for span in spans if re.match(r"task=\w", span)]
    return [found.partition(PROGRAM)[2] for found in lines + [s for s in spans if PROGRAM in s]] + tasks


def arguments_of(call: str) -> list[str]:
    """Return the arguments of a call as a shell passes them, with example values in place of ``<...>``."""
    words = shlex.split(PLACEHOLDER.sub("example", call.replace("task=<task>", "task=chat")), comments=True)
    redirected = next((i for i, word in enumerate(words) if word in ("<", ">", "|", "&&")), len(words))
    return words[:redirected]


def jobs(arguments: list[str]) -> Iterator[list[str]]:
    """Yield the overrides of every job that ``arguments`` start."""
    overrides = [argument for argument in normalize_argv(arguments) if argument not in ("-m", "--multirun")]
    if not {"-m", "--multirun"} & set(arguments):
        yield overrides
    else:
        parsed = OverridesParser.create().parse_overrides(overrides)
        yield from (job for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch)


RAY = "hydra-ray-launcher" in {found.name for found in distributions()}
"""Whether Hydra finds the launcher of the extra "cluster"."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_commands_compose(page: Path) -> None:
    with initialize_config_module("flashmoe_mlx.configs", version_base="1.3"):
        for call in program_calls(page):
            arguments = arguments_of(call)
            if "experiment=cluster" in arguments and not RAY:
                continue
            if "--help" in arguments:
                assert help_text(parse(arguments))
            elif "--version" not in arguments:
                for overrides in jobs(arguments):
                    build_config(compose("config", overrides))


def test_pages_show_commands() -> None:
    assert sum(len(program_calls(page)) for page in PAGES) > 60


@pytest.mark.thorough
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(run for _, run in blocks(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_documented_commands_run(page: Path, tmp_path: Path, demo_pack: Path) -> None:
    """Run the commands of a page in one folder, with the demo model as every pack that the page names."""
    if shutil.which("bash") is None:
        pytest.skip("the commands need bash")
    environment = tmp_path / ".venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (environment / "pip").write_text("#!/bin/sh\nexit 0\n")  # the environment of the tests has everything
    for program in environment.iterdir():
        program.chmod(0o755)
    (environment / "activate").touch()
    for name in set(re.findall(r"~/packs/([\w.-]+)", page.read_text())) - {"mixed"}:
        shutil.copytree(demo_pack, tmp_path / "packs" / name)
    (tmp_path / "questions.txt").write_text("What is 17 plus 25?\n")
    script = "".join(code for code, run in blocks(page) if run)
    # .ci/run runs the installation; servers run until they are stopped, and tests/test_server*.py start them.
    lines = [line for line in script.splitlines() if "-m venv" not in line and "task=serve" not in line]
    folders = [str(environment), str(Path(sys.executable).parent), os.environ["PATH"]]
    result = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input="\n".join(lines),
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
