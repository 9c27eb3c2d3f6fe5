"""Start several processes that MLX connects in a ring on this machine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

PROGRAM = Path(__file__).with_name("node_program.py")


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(count: int, command: Sequence[str], folder: Path, **variables: str) -> list[subprocess.Popen[str]]:
    """Start ``command`` as ``count`` nodes; "{rank}" in an argument stands for the number of the node."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_ENABLE_TF32": "0", **variables}
    return [
        subprocess.Popen(
            [sys.executable, *(argument.replace("{rank}", str(rank)) for argument in command)],
            env={**environment, "MLX_RANK": str(rank)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(nodes: Sequence[subprocess.Popen[str]], seconds: float = 60.0) -> list[tuple[int, str, str]]:
    """Wait for all nodes; return the exit code, stdout and stderr of each. Kill nodes that do not end."""
    results = []
    try:
        for node in nodes:
            out, errors = node.communicate(timeout=seconds)
            results.append((node.returncode, out, errors))
    finally:
        for node in nodes:
            if node.poll() is None:
                node.kill()
                node.communicate()
    return results


def run(count: int, command: Sequence[str], folder: Path, **variables: str) -> list[tuple[int, str, str]]:
    """Run ``command`` as ``count`` nodes; see ``start`` and ``finish``."""
    return finish(start(count, command, folder, **variables))
