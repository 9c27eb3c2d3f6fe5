"""A node of a test: one node kills or stops itself in a phase of the work, and the other one must end."""

import os
import signal
import sys
import time
from typing import Any

import mlx.core as mx

import flashmoe_mlx
from flashmoe_mlx import engine
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.stores.contract import ExpertStore

TIMEOUT = 1.5
LONG = [index % 250 for index in range(40)]


def fail_in(phase: str, number: signal.Signals) -> None:
    """Send this process ``number`` when it is in ``phase``: "load", "prefill", "decode" or "idle"."""
    original: Any = engine.open_store if phase == "load" else ExpertStore.fetch
    calls = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > {"load": 0, "prefill": 2, "decode": 14, "idle": 10**9}[phase]:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    if phase == "load":
        engine.open_store = failing  # type: ignore[assignment]
    else:
        ExpertStore.fetch = failing  # type: ignore[method-assign]


def main(pack: str, phase: str, name: str, victim: str) -> int:
    """Answer a prompt on all nodes; return the exit code of the command line."""
    nodes = Nodes(timeout=TIMEOUT)
    number = signal.Signals[name]
    if nodes.rank == int(victim):
        fail_in(phase, number)
    try:
        with flashmoe_mlx.load(pack, nodes=nodes) as loaded:
            if nodes.rank:
                if phase == "idle" and victim == "1":
                    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
                    signal.setitimer(signal.ITIMER_REAL, 1.0)
                loaded.follow()
            else:
                cache = loaded.new_cache()
                loaded.forward(LONG, cache)
                if phase == "idle":
                    if victim == "0":
                        os.kill(os.getpid(), number)
                    time.sleep(30)
                while True:
                    loaded.forward([7], cache)
    except FlashMoeError as error:
        sys.stderr.write(f"flashmoe_mlx: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    status = main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)
