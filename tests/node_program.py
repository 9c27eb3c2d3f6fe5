"""A node of a test: runs cases one after the other, and saves their logits, tokens and counters."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_on_cpu
import mlx.core as mx
import numpy as np

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.nodes.group import Nodes

PROMPT = [5, 17, 42, 8, 3, 99, 23, 64, 7, 12, 200, 31]
STEPS = [9, 77, 140]
WARM = SamplingOptions(temperature=1.0, top_k=20, top_p=0.95)


def logits(engine: Engine) -> Any:
    """Compute the logits f32 [tokens, vocabulary] of a prompt and of decode steps after it."""
    cache = engine.new_cache()
    return np.concatenate([engine.forward(PROMPT, cache), *(engine.forward([token], cache) for token in STEPS)])


def answers(engine: Engine) -> list[list[int]]:
    """Answer three requests together, two of them sampled, and then continue the first one."""
    runner, scheduler = engine.runner, Scheduler(engine.runner, prefill_tokens=5)
    sequences = [
        runner.begin(Request(PROMPT[start:], ChosenSampling(sampling), max_tokens=6 + start, seed=3))
        for start, sampling in ((0, SamplingOptions()), (1, WARM), (2, WARM))
    ]
    with runner.exclusive():
        for sequence in sequences:
            scheduler.add(sequence)
        while scheduler.unfinished:
            for change in scheduler.step():
                if change.error is not None:
                    raise change.error
        longer = [*PROMPT, *sequences[0].token_ids, 50, 51]
        again = runner.begin(Request(longer, ChosenSampling(SamplingOptions()), max_tokens=4))
        runner.prefill(again)
        while again.finish_reason is None:
            runner.decode([again])
    reused = [again.metrics.reused_tokens] if engine.setup["prompt_cache_bytes"] else []
    return [*(sequence.token_ids for sequence in sequences), again.token_ids, reused]


def main(pack: str, out: str, cases: list[dict[str, Any]]) -> None:
    """Run ``cases``: arguments of ``load``, ``weights``, ``differs`` for node 1, ``pack``, and ``gpu`` emulates one."""
    for number, case in enumerate(cases):
        case = {**case}
        weights, differing = case.pop("weights", None), case.pop("differs", {})
        gpu = gpu_on_cpu.metal(mx.float32) if case.pop("gpu", False) else nullcontext()
        nodes = Nodes(None if weights is None else tuple(weights), timeout=20.0)
        case |= differing if nodes.rank else {}
        folder = case.pop("pack", pack).replace("{rank}", str(nodes.rank))
        saved: dict[str, Any] = {}
        try:
            with gpu, flashmoe_mlx.load(folder, nodes=nodes, **case) as engine:
                if nodes.rank:
                    engine.follow()
                else:
                    np.save(f"{out}/{number}.npy", logits(engine))
                    saved["tokens"] = answers(engine)
                store = engine.store.stats()
                saved |= {"bytes_read": store.bytes_read, "requests": store.requests}
        except flashmoe_mlx.errors.FlashMoeError as error:
            saved |= {"error": str(error), "code": error.code}
        nodes.close()
        Path(f"{out}/{number}.{nodes.rank}.json").write_text(json.dumps(saved))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    main(sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))
