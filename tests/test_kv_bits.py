"""Narrow keys and values: the format of rows, and models that keep their caches in it."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_oracle import assert_one_line
from test_sequences import alone, begin

import flashmoe_mlx
from flashmoe_mlx.custom_kernels.kv_rows import KV_BITS, RowFormat
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.research.estimate.sizes import memory_need


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), dim=st.sampled_from([32, 64, 96, 256]), bits=st.sampled_from([8, 4]))
def test_rows_are_exact_to_a_step(seed: int, dim: int, bits: int) -> None:
    random = np.random.default_rng(seed)
    x = (random.normal(size=(3, dim)) * 10 ** random.uniform(-6, 6) + random.normal()).astype(np.float32)
    form = RowFormat(dim, bits)
    packed = form.pack(mx.array(x), mx.float32)
    assert packed.shape == (3, form.width)
    assert packed.nbytes == 3 * form.nbytes(4)
    found = np.array(form.unpack(packed, mx.float32)).reshape(3, -1, form.group_size)
    groups = x.reshape(found.shape)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    # Half a step, and the rounding of the scale and the bias to bf16.
    accepted = (high - low) / (2**bits - 1) / 2 + (high - low) * 2**-8 + np.abs(low) * 2**-8
    assert (np.abs(found - groups) <= accepted).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -7.5])
def test_rows_of_equal_values_are_exact(value: float) -> None:
    form = RowFormat(64, 4)
    rows = form.unpack(form.pack(mx.full((2, 64), value), mx.float32), mx.float32)
    np.testing.assert_array_equal(np.array(rows), value)


@pytest.mark.parametrize("kernels", ["auto", "mlx", "reference"])
@pytest.mark.parametrize("kv_bits", KV_BITS)
@pytest.mark.sampled(3)
def test_a_model_with_narrow_caches(kv_bits: int, kernels: str) -> None:
    """Logits stay near the exact ones, in a prompt and in steps, and caches are as small as the estimate says."""
    tokens = np.random.default_rng(0).integers(0, 250, 80).tolist()
    with flashmoe_mlx.load(demo_folder()) as engine:
        exact = engine.logits(tokens)
    with flashmoe_mlx.load(demo_folder(), kernels=kernels, kv_bits=kv_bits) as engine:
        assert engine.setup["kv_bits"] == kv_bits
        assert engine.setup["replaced_kernels"] == []
        cache = engine.new_cache()
        found = np.concatenate([engine.forward(part, cache) for part in (tokens[:70], *([t] for t in tokens[70:]))])
        need = memory_need(engine.model.config, 4, 4, 256, 4, 2, kv_bits=kv_bits)  # capacity grows by 256 tokens
        assert cache.nbytes == need.keys_and_values + need.state
        copy = cache.snapshot()
        cache.restore(copy)
        after = engine.forward([5], cache)
        cache.restore(copy)
        np.testing.assert_array_equal(engine.forward([5], cache), after)
    distance = np.abs(found - exact).mean() / np.abs(exact).mean()
    assert distance < {16: 0.005, 8: 0.01, 4: 0.1}[kv_bits]


def test_sequences_with_narrow_caches_run_together(demo_pack: Path) -> None:
    prompts = [[5, 17, 42], list(range(1, 40)), [7]]
    with flashmoe_mlx.load(demo_pack, kv_bits=8) as engine:
        sequences = [begin(engine, prompt, max_tokens=6) for prompt in prompts]
        with engine.runner.exclusive():
            engine.runner.prefill_part(sequences)
            for _ in range(5):
                engine.runner.decode(sequences)
        assert [one.token_ids for one in sequences] == [alone(engine, prompt, max_tokens=6) for prompt in prompts]


@pytest.mark.parametrize("kv_bits", [0, 3, 32, True, "8"])
def test_other_widths_are_refused(demo_pack: Path, kv_bits: object) -> None:
    with pytest.raises(InputError) as caught:
        flashmoe_mlx.load(demo_pack, kv_bits=kv_bits)  # type: ignore[arg-type]
    assert caught.value.code == "unknown_kv_bits"
    assert_one_line(caught.value)
