"""States that one pass keeps: a restored state and the rest of the prompt give the logits of a fresh pass."""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.made_models.synthetic import synthetic_pack

PROMPT = np.random.default_rng(0).integers(1, 200, 60).tolist()
KEPT = [1, 3, 17, 32, 47, 60]
TOLERANCE = {None: 2e-4, 16: 1e-2, 8: 5e-2, 4: 2e-1}
"""The largest difference, in relation to the largest logit: passes of other tokens round other sums, and these round to
other values of keys and values."""


@pytest.fixture(scope="module", params=["qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen4_exp"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[None, 16, 8, 4])
def engine(request: pytest.FixtureRequest, family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    folder = tmp_path_factory.getbasetemp() / f"states-{family}"
    pack = synthetic_pack("tiny", replace(TINY, num_layers=4), folder, family=family)
    with flashmoe_mlx.load(pack.folder, kv_bits=request.param) as opened:
        yield opened
    mx.set_default_device(before)


def test_every_kept_state_continues_the_prompt(engine: Engine) -> None:
    plain, kept = engine.new_cache(), engine.new_cache()
    expected = engine.forward(PROMPT, plain)
    kept.keep_states(KEPT)
    np.testing.assert_array_equal(engine.forward(PROMPT, kept), expected)  # keeping changes no bit
    following = engine.forward([9], plain)
    largest = np.abs(expected).max()
    for position, state in zip(KEPT, kept.take_states(len(KEPT)), strict=True):
        restored, fresh = engine.new_cache(), engine.new_cache()
        restored.assemble([kept.part(0, position)], state, position)
        engine.forward(PROMPT[:position], fresh)
        rest = [*PROMPT[position:], 9]
        found = engine.forward(rest, restored)
        if position == len(PROMPT):
            np.testing.assert_array_equal(found, following)
        accepted = TOLERANCE[engine.setup["kv_bits"]] * largest
        assert np.abs(found - engine.forward(rest, fresh)).max() <= accepted
