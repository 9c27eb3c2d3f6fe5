"""A node of a test: the group loses a node in a request, is started again, and continues from the disk."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

import flashmoe_mlx
from flashmoe_mlx.generation.following import Follower
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.nodes.errors import NodeLostError
from flashmoe_mlx.nodes.group import Nodes

PROMPT = [5, 17, 42, 8, 3, 99, 23, 64, 7, 12, 200, 31]
MORE = [50, 51]


def answer(engine: flashmoe_mlx.Engine, prompt: list[int]) -> tuple[list[int], int]:
    """Return the tokens of an answer, and the number of tokens of the prompt that were in the prompt cache."""
    sequence = engine.runner.begin(Request(prompt, ChosenSampling(SamplingOptions()), max_tokens=6))
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        while sequence.finish_reason is None:
            engine.runner.decode([sequence])
    return sequence.token_ids, sequence.metrics.reused_tokens


def die_in_the_second_request() -> None:
    """Kill this process when it is told about a second request."""
    begin, told = Follower._begin, [0]

    def counted(follower: Follower, new: Any) -> None:
        told[0] += 1
        if told[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        begin(follower, new)

    Follower._begin = counted  # type: ignore[method-assign]


def main(pack: str, out: str, loses: bool) -> int:
    """Answer on all nodes; with ``loses``, node 1 dies in a request after the first answer."""
    nodes = Nodes(timeout=20.0)
    cache = f"{out}/cache-{nodes.rank}"
    with flashmoe_mlx.load(pack, nodes=nodes, cache_dir=cache, prompt_cache_gib=0.01) as engine:
        if nodes.rank:
            if loses:
                die_in_the_second_request()
            engine.follow()
            return 0
        saved: dict[str, Any] = {}
        if loses:
            saved["first"], _ = answer(engine, PROMPT)
            try:
                answer(engine, PROMPT[::-1])
            except NodeLostError as error:
                saved["code"] = error.code
        else:
            first = json.loads(Path(out, "lost.json").read_text())["first"]
            saved["again"], saved["reused"] = answer(engine, [*PROMPT, *first, *MORE])
            saved["requests"] = engine.store.stats().requests
    Path(out, "lost.json" if loses else "restarted.json").write_text(json.dumps(saved))
    return 0


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    status = main(sys.argv[1], sys.argv[2], sys.argv[3] == "loses")
    os._exit(status)
