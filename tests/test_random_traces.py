"""Traces drawn at random are reproducible and have the distribution that they promise."""

import itertools
import math

import numpy as np
import pytest
from pack_oracle import assert_one_line

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces import random_traces
from flashmoe_mlx.research.traces.random_traces import uniform_trace, zipf_trace


def assert_same(first: RoutingTrace, second: RoutingTrace) -> None:
    np.testing.assert_array_equal(first.experts, second.experts)
    assert (first.num_experts, first.model) == (second.num_experts, second.model)


@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (8, 8), (64, 10), (512, 10)])
def test_experts_are_distinct_and_in_range(num_experts: int, k: int) -> None:
    for trace in (uniform_trace(30, 3, num_experts, k, seed=1), zipf_trace(30, 3, num_experts, k, 1.5, seed=1)):
        assert trace.experts.shape == (30, 3, k)
        assert (trace.num_experts, trace.prompt_tokens, trace.prompt_xxh3) == (num_experts, 0, "")
        assert all(len(set(row)) == k for row in trace.experts.reshape(-1, k).tolist())
        assert trace.experts.max() < num_experts
        assert len(list(trace.decode_requests())) == 90


def test_equal_seeds_give_equal_beginnings() -> None:
    first = zipf_trace(40, 4, 32, 4, 1.0, seed=5)
    assert_same(first, zipf_trace(40, 4, 32, 4, 1.0, seed=5))
    np.testing.assert_array_equal(first.experts[:7], zipf_trace(7, 4, 32, 4, 1.0, seed=5).experts)
    assert (first.experts != zipf_trace(40, 4, 32, 4, 1.0, seed=6).experts).any()
    assert first.model == "zipf exponent=1.0 seed=5"
    assert uniform_trace(1, 1, 2, 1, seed=3).model == "uniform seed=3"


def test_the_block_size_does_not_change_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uniform_trace(40, 4, 32, 4, seed=5)
    monkeypatch.setattr(random_traces, "_BLOCK", 4 * 32 * 3)
    assert_same(whole, uniform_trace(40, 4, 32, 4, seed=5))


def test_uniform_traces_are_uniform() -> None:
    tokens, num_experts, k = 20_000, 16, 4
    trace = uniform_trace(tokens, 2, num_experts, k, seed=0)
    share = k / num_experts
    tolerance = 5 * math.sqrt(tokens * share * (1 - share))
    for layer in range(2):
        counts = np.bincount(trace.experts[:, layer].ravel(), minlength=num_experts)
        assert abs(counts - tokens * share).max() < tolerance
        for place in range(k):
            counts = np.bincount(trace.experts[:, layer, place], minlength=num_experts)
            assert abs(counts - tokens / num_experts).max() < 5 * math.sqrt(tokens / num_experts)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 2.0])
def test_zipf_traces_follow_the_law_without_replacement(exponent: float) -> None:
    """Every ordered pair of experts occurs as often as two draws without replacement predict."""
    tokens, num_experts = 60_000, 5
    trace = zipf_trace(tokens, 1, num_experts, 2, exponent, seed=2)
    weights = np.arange(1, num_experts + 1) ** -exponent
    weights /= weights.sum()
    by_rank = np.argsort(-np.bincount(trace.experts[:, 0, 0], minlength=num_experts))
    rank = np.argsort(by_rank)
    pairs = np.zeros((num_experts, num_experts))
    np.add.at(pairs, tuple(rank[trace.experts[:, 0]].T), 1)
    for first, second in itertools.permutations(range(num_experts), 2):
        share = weights[first] * weights[second] / (1 - weights[first])
        assert abs(pairs[first, second] - tokens * share) < 5 * math.sqrt(tokens * share * (1 - share))


def test_layers_have_different_hot_experts() -> None:
    trace = zipf_trace(500, 4, 64, 4, 1.5, seed=0)
    assert len({trace.hot_experts(layer)[0] for layer in range(4)}) > 1
    assert len({tuple(trace.hot_experts(layer)[:4]) for layer in range(4)}) == 4


def test_a_large_exponent_is_exact() -> None:
    trace = zipf_trace(50, 2, 512, 3, 500.0, seed=0)
    assert (trace.experts == trace.experts[0]).all()


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 1, 4, 1, 0),
        (1, 0, 4, 1, 0),
        (1, 1, 4, 0, 0),
        (1, 1, 4, 5, 0),
        (1, 1, 0, 0, 0),
        (1, 1, 2**16 + 1, 1, 0),
        (-1, -1, 4, 1, 0),
        (1, 1, 4, 1, -1),
        (10**12, 60, 512, 10, 0),
        (1, 10**9, 512, 10, 0),
    ],
)
def test_invalid_sizes_are_refused(sizes: tuple[int, int, int, int, int]) -> None:
    *shape, seed = sizes
    tokens, layers, num_experts, k = shape
    with pytest.raises(InputError) as caught:
        uniform_trace(tokens, layers, num_experts, k, seed)
    assert_one_line(caught.value)
    code = "trace_too_large" if max(sizes) > 2**20 else "out_of_range"
    assert caught.value.code == code
    with pytest.raises(InputError) as caught:
        zipf_trace(tokens, layers, num_experts, k, 1.0, seed)
    assert caught.value.code == code


@pytest.mark.parametrize("exponent", [-0.1, math.inf, -math.inf, math.nan])
def test_invalid_exponents_are_refused(exponent: float) -> None:
    with pytest.raises(InputError) as caught:
        zipf_trace(1, 1, 4, 1, exponent, 0)
    assert caught.value.code == "out_of_range"
    assert_one_line(caught.value)
