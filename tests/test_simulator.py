"""Simulated caches against live stores, Belady's optimum, predictors, and statistics of traces."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx.engine import load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.research.traces.belady import Belady
from flashmoe_mlx.research.traces.cache_design import CacheDesign, capacities
from flashmoe_mlx.research.traces.curves import curves
from flashmoe_mlx.research.traces.predictors import FixedAccuracyPredictor, PreviousTokenPredictor
from flashmoe_mlx.research.traces.random_traces import uniform_trace, zipf_trace
from flashmoe_mlx.research.traces.recorder import prompt_hash, recorded
from flashmoe_mlx.research.traces.routing import coverage, effective_experts, overlap, reuse_distances, summarize
from flashmoe_mlx.research.traces.simulator import replay, requests
from flashmoe_mlx.stores.contract import StoreStats
from flashmoe_mlx.stores.policies import POLICIES
from flashmoe_mlx.stores.registry import open_store
from flashmoe_mlx.stores.slot_cache import SlotCache

PROMPT = "It is a truth universally acknowledged"


def counters(stats: StoreStats) -> StoreStats:
    return replace(stats, fetch_seconds=0.0, overlapped_seconds=0.0)


def counters_of_groups(stats: StoreStats) -> StoreStats:
    # Groups of experts are read ahead of their computation; whether a read began in time depends on the machine.
    return replace(counters(stats), prefetched=0, bytes_wasted=0)


# Counters of live stores


@pytest.fixture(scope="module")
def recording(tiny_pack: Path) -> RoutingTrace:
    with load(tiny_pack) as engine:
        prompt = engine.encode(PROMPT)
        with recorded(engine) as recorder:
            for _ in engine.generate(PROMPT, temperature=0, max_tokens=60, prefill_chunk=16):
                pass
        return recorder.trace(engine.model.config.num_experts, prompt, "tiny", engine.store.layout.record_bytes)


@pytest.mark.parametrize(
    "slots", [2, pytest.param(4, marks=pytest.mark.thorough), 7, pytest.param(11, marks=pytest.mark.thorough), 16]
)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.sampled(4)
def test_counters_of_a_generation_equal_the_simulated_counters(
    policy: str, slots: int, recording: RoutingTrace, tiny_pack: Path, tmp_path: Path
) -> None:
    recording.save(tmp_path / "hot.moetrace")
    _, layers, _ = recording.experts.shape
    options = {"trace": str(tmp_path / "hot.moetrace")} if policy == "pinned" else {}
    budget = slots * layers * recording.record_bytes / 2**30
    with load(tiny_pack, "ram_hybrid", budget_gib=budget, policy=policy, slots=6, **options) as engine:
        for _ in engine.generate(PROMPT, temperature=0, max_tokens=60, prefill_chunk=16):
            pass
        metrics = engine.metrics
    found = replay(recording, CacheDesign(policy, slots, fetch_slots=6, prefill_chunk=16))
    assert found.prefill == counters_of_groups(metrics.prefill.store)
    # With fewer slots than K, the experts of a token are groups as well; otherwise nothing is hinted in decoding.
    decode = counters_of_groups if slots < recording.experts.shape[2] else counters
    assert found.decode == decode(metrics.decode.store)
    assert found.decode.requests > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_counters_of_a_replayed_trace_equal_the_simulated_counters(
    policy: str, tiny_pack: Path, tmp_path: Path
) -> None:
    drawn = zipf_trace(tokens=120, layers=4, num_experts=16, k=4, exponent=1.0, seed=3)
    files = open_model(tiny_pack)
    record = files.variant(None).layout.record_bytes
    trace = RoutingTrace(np.sort(drawn.experts, axis=-1), 16, 0, "drawn", "", record)
    trace.save(tmp_path / "hot.moetrace")
    options = {"trace": str(tmp_path / "hot.moetrace")} if policy == "pinned" else {}
    budget = {"budget_gib": 9 * 4 * record / 2**30}
    store, _ = open_store(files, "ram_hybrid", {"policy": policy} | budget | options)
    with store:
        for layer, experts in trace.decode_requests():
            store.fetch(layer, experts)
        live = counters(store.stats())
    assert replay(trace, CacheDesign(policy, 9)).decode == live
    assert live.evictions > 100


# Recording


def test_recording_does_not_change_the_answer_or_depend_on_chunks(recording: RoutingTrace, tiny_pack: Path) -> None:
    with load(tiny_pack) as engine:
        text = "".join(piece.text for piece in engine.generate(PROMPT, temperature=0, max_tokens=60, prefill_chunk=16))
        prompt = engine.encode(PROMPT)
        with recorded(engine) as recorder:
            again = "".join(piece.text for piece in engine.generate(PROMPT, temperature=0, max_tokens=60))
        assert engine.runner.meter.observer is None
    assert again == text
    unchunked = recorder.trace(16, prompt)
    np.testing.assert_array_equal(unchunked.experts, recording.experts)
    assert (recording.prompt_tokens, recording.prompt_xxh3) == (len(prompt), prompt_hash(prompt))
    assert recording.experts.shape == (len(prompt) + 59, 4, 4)


def test_an_interrupted_forward_pass_leaves_complete_tokens(tiny_pack: Path) -> None:
    with load(tiny_pack) as engine, recorded(engine) as recorder:
        cache = engine.new_cache()
        engine.forward([1, 2, 3], cache)
        recorder(0, np.array([[0, 1, 2, 3]], np.uint32))
        assert len(recorder.trace(16, [1, 2, 3]).experts) == 3


def test_a_model_that_has_not_run_has_no_trace(tiny_pack: Path) -> None:
    with load(tiny_pack) as engine, recorded(engine) as recorder, pytest.raises(InputError) as caught:
        recorder.trace(16, [])
    assert caught.value.code == "nothing_recorded"


def test_a_trace_keeps_record_bytes(recording: RoutingTrace, tmp_path: Path) -> None:
    recording.save(tmp_path / "a.moetrace")
    assert RoutingTrace.load(tmp_path / "a.moetrace").record_bytes == recording.record_bytes > 0


# Belady's optimum


def fewest_misses(sequence: Sequence[Sequence[int]], capacity: int) -> int:
    """Return the fewest possible misses, found by trying every choice of evicted experts."""

    @cache
    def best(position: int, resident: frozenset[int]) -> int:
        if position == len(sequence):
            return 0
        request = frozenset(sequence[position])
        missing = len(request - resident)
        union = resident | request
        excess = len(union) - capacity
        if excess <= 0:
            return missing + best(position + 1, union)
        return missing + min(
            best(position + 1, union - frozenset(evicted)) for evicted in combinations(union - request, excess)
        )

    return best(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_belady_has_the_fewest_possible_misses(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 4))
    request = st.lists(st.integers(0, 5), min_size=1, max_size=capacity, unique=True)
    sequence = data.draw(st.lists(request, min_size=1, max_size=9))
    cache_ = SlotCache(capacity, Belady(sequence))
    assert sum(len(cache_.place(experts).misses) for experts in sequence) == fewest_misses(
        tuple(map(tuple, sequence)), capacity
    )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_no_policy_beats_belady_and_one_pool_beats_separate_slots(scope: str) -> None:
    trace = zipf_trace(tokens=60, layers=3, num_experts=32, k=4, exponent=0.8, seed=1)
    for slots in (4, 9, 20):
        best = replay(trace, CacheDesign("belady", slots, scope)).decode.hits
        assert all(replay(trace, CacheDesign(policy, slots, scope)).decode.hits <= best for policy in POLICIES)
        assert replay(trace, CacheDesign("belady", slots, "global")).decode.hits >= best


def test_lru_has_no_hits_if_the_pool_is_smaller_than_a_token() -> None:
    """The layers of a token evict each other's experts, a fault found in several engines."""
    experts = np.tile(np.arange(4, dtype=np.uint16), (20, 3, 1))
    trace = RoutingTrace(experts, 8, 0, "", "")
    assert replay(trace, CacheDesign("lru", 3, "global", fetch_slots=3)).decode.hits == 0
    assert replay(trace, CacheDesign("lru", 4, "global")).hit_rate == 19 / 20
    assert replay(trace, CacheDesign("belady", 3, "global", fetch_slots=3)).decode.hits > 0


# Prefetching


def test_correct_guesses_leave_no_misses() -> None:
    trace = uniform_trace(tokens=30, layers=2, num_experts=16, k=4, seed=0)
    found = replay(trace, CacheDesign("lru", 8), FixedAccuracyPredictor(1.0, 16))
    assert found.decode.misses == 0
    assert found.correct == found.guessed == found.decode.requests
    assert found.useful == found.prefetched > 0


def test_incorrect_guesses_cost_reads() -> None:
    trace = uniform_trace(tokens=30, layers=2, num_experts=16, k=4, seed=0)
    found = replay(trace, CacheDesign("lru", 8), FixedAccuracyPredictor(0.0, 16))
    assert found.correct == found.useful == 0 < found.prefetched


def test_the_accuracy_of_guesses() -> None:
    trace = uniform_trace(tokens=300, layers=2, num_experts=64, k=8, seed=0)
    found = replay(trace, CacheDesign("lru", 16), FixedAccuracyPredictor(0.7, 64))
    assert found.correct / found.guessed == pytest.approx(0.7, abs=0.02)


def test_the_choice_of_the_previous_token_is_guessed() -> None:
    predictor = PreviousTokenPredictor()
    assert predictor.guess(0, [1, 2]) == []
    assert predictor.guess(1, [3]) == []
    assert predictor.guess(0, [5, 6]) == [1, 2]
    assert predictor.guess(0, [7]) == [5, 6]


# Requests


def test_requests_of_a_chunked_prompt() -> None:
    experts = np.array([[[3, 1]], [[1, 2]], [[0, 5]], [[5, 4]]], np.uint16)
    trace = RoutingTrace(experts, 8, 3, "", "")
    made = [(request.layer, request.experts, request.decoding) for request in requests(trace, 2, prefill_chunk=2)]
    assert made == [
        (0, (1, 2), False),
        (0, (3,), False),
        (0, (0, 5), False),
        (0, (4, 5), True),
    ]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"policy": "fifo", "slots": 4}, "unknown_policy"),
        ({"policy": "lru", "slots": 0}, "out_of_range"),
        ({"policy": "lru", "slots": 4, "fetch_slots": 0}, "out_of_range"),
        ({"policy": "lru", "slots": 4, "prefill_chunk": -1}, "out_of_range"),
        ({"policy": "lru", "slots": 4, "scope": "token"}, "unknown_scope"),
    ],
)
def test_invalid_designs_are_refused(options: dict[str, object], code: str) -> None:
    with pytest.raises(InputError) as caught:
        CacheDesign(**options)  # type: ignore[arg-type]
    assert caught.value.code == code


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, float("nan")])
def test_invalid_accuracies_are_refused(accuracy: float) -> None:
    with pytest.raises(InputError) as caught:
        FixedAccuracyPredictor(accuracy, 8)
    assert caught.value.code == "out_of_range"


def test_contradictory_arguments_are_refused() -> None:
    trace = uniform_trace(4, 2, 8, 2, 0)
    with pytest.raises(InputError) as caught:
        replay(trace, CacheDesign("pinned", 4), hot=uniform_trace(4, 3, 8, 2, 0))
    assert caught.value.code == "trace_of_another_model"
    with pytest.raises(InputError) as caught:
        replay(trace, CacheDesign("belady", 4), PreviousTokenPredictor())
    assert caught.value.code == "contradiction"


def test_curves_rise_with_capacity() -> None:
    trace = zipf_trace(tokens=50, layers=2, num_experts=32, k=4, exponent=1.0, seed=0)
    slots = capacities(32, 4)
    assert (slots[0], slots[-1]) == (4, 32)
    for curve in curves(trace, ["lru", "belady"], slots):
        assert curve.hit_rates == sorted(curve.hit_rates)
    with pytest.raises(InputError) as caught:
        list(curves(replace(trace, prompt_tokens=50), ["lru"], slots))
    assert caught.value.code == "nothing_decoded"


# Statistics


def test_statistics_of_a_small_trace() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[0, 3]]], np.uint16)
    trace = RoutingTrace(experts, 4, 0, "", "")
    assert coverage(trace).tolist() == pytest.approx([0, 2 / 6, 4 / 6, 5 / 6, 1])
    assert overlap(trace).tolist() == [0.25]
    assert reuse_distances(trace)[:, 0].tolist() == [[0, 0], [1, 0], [2, 0]]
    shares = np.array([2, 2, 1, 1]) / 6
    assert effective_experts(trace)[0] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_statistics_of_uniform_choices() -> None:
    summary = summarize(uniform_trace(tokens=2000, layers=2, num_experts=32, k=4, seed=0))
    assert summary.effective_experts == pytest.approx(32, rel=0.01)
    assert summary.overlap == pytest.approx(summary.chance_overlap, abs=0.01)
    assert summary.reuse is not None
    assert 5 <= summary.reuse[0] <= 6  # the median of a geometric distribution with probability 1/8


def test_one_token_has_no_overlap() -> None:
    assert summarize(uniform_trace(1, 2, 8, 2, 0)).overlap is None
