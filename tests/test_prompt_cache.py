"""The prompt cache: answers that continue from kept states equal answers computed from nothing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_sequences import begin

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.sequence import Sequence, Status


@pytest.fixture
def engine(tiny_pack: Path) -> Iterator[Engine]:
    with flashmoe_mlx.load(tiny_pack, prompt_cache_gib=0.05) as opened:
        yield opened


def run(engine: Engine, sequence: Sequence) -> Sequence:
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        while sequence.status is not Status.FINISHED:
            engine.runner.decode([sequence])
    return sequence


def test_states_kept_in_a_pass_change_nothing_and_continue_it(engine: Engine) -> None:
    prompt = [int(token) for token in np.random.default_rng(0).integers(1, 200, 40)]
    whole, kept = engine.new_cache(), engine.new_cache()
    expected = engine.forward(prompt, whole)
    kept.keep_states([3, 17, 40])
    assert np.array_equal(engine.forward(prompt, kept), expected)
    states = kept.take_states(3)
    for position, state in zip((3, 17, 40), states, strict=True):
        resumed, fresh = engine.new_cache(), engine.new_cache()
        resumed.assemble([kept.part(0, 2), kept.part(2, 40)], state, position)
        engine.forward(prompt[:position], fresh)
        rest = [9, *prompt[position:]]
        logits = engine.forward(rest, resumed)
        # A pass of other tokens sums its products in another order.
        np.testing.assert_allclose(logits, engine.forward(rest, fresh), atol=2e-4)
        if position == 40:
            assert np.array_equal(logits, engine.forward(rest, whole))


def test_prompt_continues(engine: Engine) -> None:
    first = run(engine, begin(engine, list(range(1, 60)), max_tokens=8))
    assert first.metrics.reused_tokens == 0
    prompt = [*first.request.prompt_ids, *first.token_ids, 7, 8, 9]
    second = run(engine, begin(engine, prompt, max_tokens=8))
    assert second.metrics.reused_tokens == len(prompt) - 4
    assert second.metrics.reused_from == "ram"
    assert second.metrics.computed_tokens == 4
    assert engine.runner.prompt_cache is not None
    engine.runner.prompt_cache.clear()
    assert run(engine, begin(engine, prompt, max_tokens=8)).token_ids == second.token_ids
