"""Let agents read a file through a live server, and report which of them answer with its content.

    mkdir agents && npm --prefix agents install @anthropic-ai/claude-code @openai/codex opencode-ai \
        @qwen-code/qwen-code node@22                                           # 1.3 GB
    python tools/agents/run.py agents/node_modules/.bin [--only claude codex]  # installs nothing itself

The server is ``scripted.py``: its logits are scripted, but templates, parsers, caches, and streams are real. Each agent
gets the lines of docs/serve.md, a new home, and a folder with the file. Codex runs without its sandbox, which
containers often lack. Nothing keeps the agents from the network.
"""

import argparse
import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from documented import documented
from scripted import scripted_server

_QUESTION = "Read the file {path} and tell me the password in it."
_PASSWORD = "heron-4711"  # noqa: S105  # not a secret
_SECONDS = 150
_NAME = "scripted"


def command(agent: str, base: str, question: str, home: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command line and variables of an agent, after writing its configuration to ``home``."""
    match agent:
        case "claude":
            line, variables = _split(documented("Claude Code", "sh", base, _NAME))
            return [*line, "-p", question, "--allowedTools", "Read"], variables
        case "codex":
            _write(home / ".codex" / "config.toml", documented("Codex", "toml", base, _NAME))
            sandbox = "--dangerously-bypass-approvals-and-sandbox"  # containers often have no sandbox
            return [agent, "exec", "--skip-git-repo-check", sandbox, question], {}
        case "opencode":
            config = documented("opencode", "json", base, _NAME)
            _write(home / ".config" / "opencode" / "opencode.json", config)
            return [agent, "run", "-m", f"local/{_NAME}", question], {}
        case "qwen":
            line, variables = _split(documented("Qwen Code", "sh", base, _NAME))
            return [*line[:-1], question], variables
        case _:
            raise ValueError(agent)


def _split(code: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the variables before it in a line for a shell."""
    words = shlex.split(code)
    variables = dict(word.split("=", 1) for word in words if word.split("=")[0].isupper())
    return words[len(variables) :], variables


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


def run_agent(
    agent: str, programs: Path, port: int, path: Path, records: list[dict[str, Any]], home: Path
) -> dict[str, Any]:
    """Run one agent; return its version, whether it gave the password, and figures of its requests."""
    line, variables = command(agent, f"http://127.0.0.1:{port}", _QUESTION.format(path=path), home)
    environment = {"HOME": str(home), "PATH": f"{programs.resolve()}:{os.environ['PATH']}", **variables}
    version = _output([agent, "--version"], environment, path.parent)
    before, start = len(records), time.monotonic()
    output = _output(line, environment, path.parent)
    requests = records[before:]
    return {
        "agent": agent,
        "version": version.strip().splitlines()[-1] if version.strip() else None,
        "passed": _PASSWORD in output,
        "seconds": round(time.monotonic() - start, 1),
        "requests": [
            {name: request[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "finish_reason")}
            for request in requests
        ],
        "output": output[-600:],
    }


def _output(line: list[str], environment: Mapping[str, str], folder: Path) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            line,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            check=False,
        )
        return done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as expired:
        return f"{(expired.stdout or b'').decode(errors='replace')}\n(no end after {_SECONDS} seconds)"


def main() -> None:
    """Run the agents and print one JSON object for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path, help="folder with the programs of the agents")
    parser.add_argument("--only", nargs="+", default=["claude", "codex", "opencode", "qwen"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "project" / "note.txt"
        _write(path, f"The password is {_PASSWORD}.\n")
        results = []
        with scripted_server(folder / "model", path) as (port, records):
            for agent in arguments.only:
                home = folder / agent
                home.mkdir()
                results.append(run_agent(agent, arguments.programs, port, path, records, home))
                print(json.dumps(results[-1], indent=1), flush=True)
    raise SystemExit(0 if all(result["passed"] for result in results) else 1)


if __name__ == "__main__":
    main()
