"""Decoding without the host on a real GPU, where MLX traces the layers; ``test_in_memory.py`` emulates the rest."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.sequence import Sequence, Status

GPUS = [pytest.param(None, marks=pytest.mark.cuda, id="cuda"), pytest.param(None, marks=pytest.mark.metal, id="metal")]
pytestmark = pytest.mark.parametrize("gpu", GPUS)


@pytest.fixture
def engine(tiny_pack: Path, device: None) -> Iterator[Engine]:
    with flashmoe_mlx.load(tiny_pack, backend="resident") as opened:
        yield opened


def answered(engine: Engine, sampling: SamplingOptions, prompt: list[int], steps: int, waits: bool) -> Sequence:
    engine.observe_routing((lambda *_: None) if waits else None)
    sequence = engine.runner.begin(Request(prompt, ChosenSampling(sampling), max_tokens=steps, seed=4))
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        while sequence.status is Status.DECODING:
            engine.runner.decode([sequence])
    return sequence


@pytest.mark.parametrize(
    "sampling", [SamplingOptions(), SamplingOptions(temperature=1.0, top_k=20, top_p=0.95)], ids=["greedy", "sampled"]
)
def test_tokens_and_counters(sampling: SamplingOptions, engine: Engine, gpu: None) -> None:
    assert engine.setup["replaced_kernels"] == []
    for prompt in ([5, 17, 42, 8], [5, 17, 42] * 72):  # the second grows its cache
        waited = answered(engine, sampling, prompt, 40, waits=True)
        ahead = answered(engine, sampling, prompt, 40, waits=False)
        assert ahead.token_ids == waited.token_ids
        assert ahead.cache.length == waited.cache.length
        for name in ("fetches", "requests", "hits", "misses"):
            ours, theirs = (getattr(sequence.metrics.decode.store, name) for sequence in (ahead, waited))
            assert ours == theirs
