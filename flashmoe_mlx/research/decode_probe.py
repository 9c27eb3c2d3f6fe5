"""Decode steps of the demo model with all experts in memory: their time, waits, and dispatches."""

import io
import re
import time
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from flashmoe_mlx.engine import load
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.runner import Runner
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.sequence import Status
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.models.steps import TracedSteps
from flashmoe_mlx.moe.in_memory import UsedExperts

_PROMPT = [5, 17, 42, 8]
_TOKENS = 96
_SKIPPED = 16
"""First tokens, in which functions are traced and memory is allocated."""
_VIEWS = frozenset(
    {
        "AsStrided",
        "Broadcast",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unflatten",
    }
)
"""Operations of MLX that compute nothing."""


@dataclass(frozen=True)
class DecodeFinding:
    """Measurements of decode steps.

    Attributes:
        milliseconds: median wall time of a token.
        waits: mean number of times that the host waited for the device, for each token.
        dispatches: operations in the graph of a token, without views; None where a token is not one graph, because the
            host takes part in every layer.
    """

    milliseconds: float
    waits: float
    dispatches: int | None


def measure_decoding() -> DecodeFinding:
    """Decode greedily with the demo model on the default device."""
    with load(demo_folder(), "resident", prompt_cache_gib=0) as engine:
        runner = engine.runner
        with runner.exclusive():
            sequence = runner.begin(Request(_PROMPT, ChosenSampling(SamplingOptions()), max_tokens=_TOKENS))
            runner.prefill(sequence)
            seconds, waits = [], []
            while sequence.status is Status.DECODING:
                start, before = time.perf_counter(), runner.clock.waits
                runner.decode([sequence])
                seconds.append(time.perf_counter() - start)
                waits.append(runner.clock.waits - before)
            dispatches = _count_token(runner, sequence.cache)
    counted = waits[_SKIPPED:]
    return DecodeFinding(1e3 * median(seconds[_SKIPPED:]), sum(counted) / len(counted), dispatches)


def _count_token(runner: Runner, cache: SequenceCache) -> int | None:
    """Count the operations of a further token, which is not computed."""
    steps = TracedSteps.of(runner.model)
    if steps is None:
        return None
    mx.eval(cache.arrays())
    logits, finite = steps.logits(mx.array(_PROMPT[:1], mx.uint32), cache, UsedExperts(runner.store))
    return count_dispatches(logits, finite, *cache.arrays())


def count_dispatches(*results: mx.array) -> int:
    """Return the number of operations, without views, in the graph that computes ``results``, which are lazy."""
    text = io.StringIO()
    mx.export_to_dot(text, *results)
    names = re.findall(r'label ?= ?"([A-Za-z]+)', text.getvalue())
    return sum(name not in _VIEWS for name in names)
