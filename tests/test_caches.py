"""Caches of sequences: size, snapshots, trimming."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.kv_cache import KVCache
from flashmoe_mlx.layers.recurrent_state import RecurrentState
from flashmoe_mlx.stores.contract import ExpertReadError

TOKENS = [5, 17, 42, 8, 3, 99, 23, 64, 12, 7]


@pytest.fixture(scope="module")
def engine(tiny_pack: Path) -> Engine:
    with flashmoe_mlx.load(tiny_pack) as opened:
        yield opened


def continued(engine: Engine, cache: SequenceCache, tokens: list[int]) -> np.ndarray:
    return np.concatenate([engine.forward([token], cache) for token in tokens])


def test_a_snapshot_continues_as_the_sequence_does(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.forward(TOKENS[:6], cache)
    snapshot = cache.snapshot()
    expected = continued(engine, cache, TOKENS[6:])
    np.testing.assert_array_equal(continued(engine, snapshot, TOKENS[6:]), expected)


def test_restore_does_not_change_the_snapshot(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.forward(TOKENS[:6], cache)
    snapshot = cache.snapshot()
    expected = continued(engine, cache, TOKENS[6:])
    for other in ([1, 2, 3], [200], []):
        continued(engine, cache, other) if other else None
        cache.restore(snapshot)
        assert cache.length == 6
        np.testing.assert_array_equal(continued(engine, cache, TOKENS[6:]), expected)


def test_a_snapshot_of_nothing(engine: Engine) -> None:
    cache = engine.new_cache()
    snapshot = cache.snapshot()
    assert snapshot.nbytes == cache.nbytes == 0
    expected = engine.forward(TOKENS, cache)
    cache.restore(snapshot)
    assert cache.length == cache.nbytes == 0
    np.testing.assert_array_equal(engine.forward(TOKENS, cache), expected)


def test_restore_repairs_a_broken_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = engine.new_cache()
    engine.forward(TOKENS[:6], cache)
    snapshot = cache.snapshot()
    expected = engine.forward(TOKENS[6:], cache)
    cache.restore(snapshot)
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.store, "_load", lambda *_: (_ for _ in ()).throw(ExpertReadError(Path("x"), 0, 0, 0, "planted"))
        )
        with pytest.raises(ExpertReadError):
            engine.forward(TOKENS[6:], cache)
    assert cache.broken
    with pytest.raises(InputError) as raised:
        cache.snapshot()
    assert raised.value.code == "broken_sequence"
    cache.restore(snapshot)
    np.testing.assert_array_equal(engine.forward(TOKENS[6:], cache), expected)


def test_a_recurrent_state_cannot_be_cut(engine: Engine) -> None:
    cache = engine.new_cache()
    cache.trim(0)
    engine.forward(TOKENS, cache)
    cache.trim(len(TOKENS))
    for length in (len(TOKENS) - 1, len(TOKENS) + 1, -1):
        with pytest.raises(FlashMoeError) as raised:
            cache.trim(length)
        assert raised.value.code == "cannot_trim"
    assert cache.length == len(TOKENS)


def rows(tokens: int, start: int = 0) -> mx.array:
    """Return values that differ for each token, [1, 2 heads, tokens, 4]."""
    values = mx.arange(start, start + tokens, dtype=mx.float32)[None, None, :, None]
    return mx.broadcast_to(values, (1, 2, tokens, 4))


def append(cache: KVCache, tokens: int) -> None:
    """Append ``tokens`` whose values are their positions, as a kernel would."""
    keys, values = cache.reserve(tokens, 2, 4, mx.float32)
    end = cache.length + tokens
    keys[:, :, cache.length : end] = rows(tokens, cache.length)
    values[:, :, cache.length : end] = -rows(tokens, cache.length)
    cache.keys, cache.values, cache.length = keys, values, end


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["append", "trim", "snapshot", "restore"]), st.integers(0, 600)), max_size=12)
)
def test_a_kv_cache_holds_its_tokens(steps: list[tuple[str, int]]) -> None:
    cache, kept = KVCache(), KVCache()
    for step, number in steps:
        if step == "append":
            append(cache, number + 1)
        elif step == "trim":
            cache.trim(min(number, cache.length))
        elif step == "snapshot":
            kept = cache.snapshot()
        else:
            cache.restore(kept)
        if cache.length:
            assert cache.keys is not None
            assert cache.values is not None
            assert mx.array_equal(cache.keys[:, :, : cache.length], rows(cache.length))
            assert mx.array_equal(cache.values[:, :, : cache.length], -rows(cache.length))
            assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes
        assert kept.nbytes <= 2 * 4 * 2 * 4 * (kept.length + 255)


def test_snapshots_share_no_memory() -> None:
    state = RecurrentState(mx.ones((3, 8)), mx.ones((1, 2, 4, 4)))
    mx.eval(state.arrays())
    snapshot = state.snapshot()
    for array in state.arrays():
        np.array(array, copy=False)[...] = 7
    assert all(mx.array_equal(array, mx.ones_like(array)) for array in snapshot.arrays())
    assert not snapshot.can_trim
    assert RecurrentState().can_trim


def test_rewinding_to_a_mark() -> None:
    """Arrays that kernels returned later, and tokens that they appended, are forgotten; nothing is copied."""
    attention, state = KVCache(), RecurrentState(mx.zeros((3, 4)), mx.zeros((1, 1, 2, 2)))
    attention.reserve(250, 1, 4, mx.float32)
    attention.length = 250
    cache = SequenceCache([attention, state], length=250)
    old = state.arrays()
    mark = cache.mark()
    assert not cache.must_grow(6)
    assert cache.must_grow(7)
    attention.reserve(7, 1, 4, mx.float32)
    attention.length, cache.length, cache.broken = 257, 257, True
    state.conv_state, state.recurrent_state = mx.ones((3, 4)), mx.ones((1, 1, 2, 2))
    cache.rewind(mark)
    assert (cache.length, attention.length, cache.broken) == (250, 250, False)
    assert [one is other for one, other in zip(state.arrays(), old, strict=True)] == [True, True]
    assert not cache.must_grow(7), "the larger capacity stays"
    assert not KVCache().must_grow(1)
