"""Decoding without the host: where a store holds all experts on a GPU, the router's choice and the token stay there.

Emulated GPUs run it on a CPU (``gpu_on_cpu``). Passes that wait for each layer, for an observer, are the truth.
"""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from conftest import TINY
from gpu_on_cpu import device_of_module  # noqa: F401  # a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import needs_linux

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.generation.ahead import StepsAhead
from flashmoe_mlx.generation.device_sampling import choose_each, draw
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, Sampler, SamplingOptions
from flashmoe_mlx.generation.sequence import Sequence, Status
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.prefetch import POLICIES
from flashmoe_mlx.moe.router import Router

pytestmark = needs_linux

Device = Callable[..., AbstractContextManager[object]]
PROMPT = [5, 17, 42, 8, 3, 99, 23]
WARM = SamplingOptions(temperature=1.0, top_k=20, top_p=0.95)
RECORD_BYTES = 32768
ALL_IN_SLOTS = {
    "backend": "ram_hybrid",
    "budget_gib": TINY.num_layers * TINY.num_experts * RECORD_BYTES / 2**30,
    "slots": 8,
    "preload": True,
}


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tiny_pack: Path, device: None) -> Iterator[Engine]:
    """A model in the memory of an emulated GPU: Metal, whose emulation is faster, unless a test asks for CUDA."""
    emulate: Device = getattr(gpu_on_cpu, getattr(request, "param", "metal"))
    with emulate(mx.float32), flashmoe_mlx.load(tiny_pack, backend="resident") as opened:
        yield opened


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a layer waits for the choice of its router")

    monkeypatch.setattr(Router, "route", refuse)


def begin(engine: Engine, prompt: list[int] = PROMPT, **options: Any) -> Sequence:
    sampling = ChosenSampling(options.pop("sampling", SamplingOptions()))
    return engine.runner.begin(Request(prompt, sampling, **{"max_tokens": 9, **options}))


def finish(engine: Engine, sequence: Sequence) -> list[int]:
    with engine.runner.exclusive():
        if sequence.status is Status.WAITING:
            engine.runner.prefill(sequence)
        while sequence.status is Status.DECODING:
            engine.runner.decode([sequence])
    return sequence.token_ids


def waiting(engine: Engine, **options: Any) -> Sequence:
    """Return a finished sequence each of whose layers waited for its router."""
    engine.observe_routing(lambda *_: None)
    try:
        sequence = begin(engine, **options)
        finish(engine, sequence)
        return sequence
    finally:
        engine.observe_routing(None)


def counters(sequence: Sequence) -> dict[str, int]:
    decode = sequence.metrics.decode
    kept = ("fetches", "requests", "hits", "misses", "reads", "bytes_read", "prefetched")
    return {"tokens": decode.tokens, "steps": len(decode.steps), **{key: getattr(decode.store, key) for key in kept}}


def assert_same_state(engine: Engine, one: Sequence, other: Sequence) -> None:
    """Assert that both caches hold the same tokens: all but the latest."""
    assert not one.ahead
    assert one.cache.length == other.cache.length == len(one.request.prompt_ids) + len(one.token_ids) - 1
    expected = engine.forward([7, 8], other.cache.snapshot())
    np.testing.assert_allclose(engine.forward([7, 8], one.cache.snapshot()), expected, rtol=0, atol=1e-4)


def test_the_host_offers_no_layer(tiny_pack: Path) -> None:
    """Slots for CPU kernels are outside MLX's memory."""
    with flashmoe_mlx.load(tiny_pack, backend="resident") as engine:
        if engine.model.kernels.routed_experts_cpu is not None:
            assert engine.store.in_memory(0) is None
        assert finish(engine, begin(engine, max_tokens=3))
        assert not engine.runner.ahead.ready


@pytest.mark.parametrize(
    ("engine", "sampling"),
    [
        pytest.param("metal", SamplingOptions(), id="greedy-metal"),
        pytest.param("metal", WARM, id="sampled-metal"),
        pytest.param("cuda", WARM, id="sampled-cuda"),
        pytest.param("cuda", SamplingOptions(), id="greedy-cuda", marks=pytest.mark.thorough),
    ],
    indirect=["engine"],
)
@pytest.mark.sampled(1)
def test_tokens_counters_and_state(sampling: SamplingOptions, engine: Engine) -> None:
    expected = waiting(engine, sampling=sampling, seed=3)
    sequence = begin(engine, sampling=sampling, seed=3)
    assert finish(engine, sequence) == expected.token_ids
    assert sequence.finish_reason == "length"
    assert counters(sequence) == counters(expected)
    assert_same_state(engine, sequence, expected)


def test_no_layer_waits(engine: Engine, no_waiting: None) -> None:
    sequence = begin(engine)
    finish(engine, sequence)
    engine.forward([1, 2, 3], engine.new_cache())
    assert sequence.metrics.decode.store.fetches == 8 * TINY.num_layers


def test_one_step_ahead(engine: Engine) -> None:
    sequence = begin(engine)
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        engine.runner.decode([sequence])
    assert len(sequence.token_ids) == 2
    assert sequence.ahead
    assert sequence.cache.length == len(PROMPT) + 2
    sequence.settle()
    assert_same_state(engine, sequence, sequence)
    assert finish(engine, sequence) == waiting(engine).token_ids


@pytest.mark.thorough
def test_threads_take_turns_at_a_sequence(engine: Engine) -> None:
    """A step that one thread has begun is finished by another, whose stream in MLX is a different one."""
    sequence = begin(engine)

    def decode() -> None:
        with engine.runner.exclusive():
            engine.runner.decode([sequence])

    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for thread in (one, other, other, one):
            thread.submit(decode).result()
            assert sequence.ahead
    assert finish(engine, sequence) == waiting(engine).token_ids


@pytest.mark.thorough
def test_random_numbers_of_a_discarded_step_are_used_again(engine: Engine) -> None:
    sequence = begin(engine, sampling=WARM, seed=5)
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        while sequence.status is Status.DECODING:
            engine.runner.decode([sequence])
            sequence.settle()
    assert sequence.token_ids == waiting(engine, sampling=WARM, seed=5).token_ids


@pytest.mark.parametrize("place", [2, *(pytest.param(place, marks=pytest.mark.thorough) for place in (1, 5))])
def test_a_stop_token(place: int, engine: Engine) -> None:
    stop = waiting(engine).token_ids[place]
    expected = waiting(engine, stop_ids=frozenset([stop]))
    sequence = begin(engine, stop_ids=frozenset([stop]))
    assert finish(engine, sequence) == expected.token_ids
    assert sequence.finish_reason == "stop"
    assert counters(sequence) == counters(expected)
    assert_same_state(engine, sequence, expected)


def test_the_last_token_begins_no_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = StepsAhead._begin
    monkeypatch.setattr(StepsAhead, "_begin", lambda *rest: passes.append(1) or original(*rest))
    finish(engine, begin(engine, max_tokens=5))
    assert len(passes) == 4


def test_cancelled_between_steps(engine: Engine) -> None:
    sequence, expected = begin(engine), waiting(engine, max_tokens=2)
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        engine.runner.decode([sequence])
        sequence.cancel()
        engine.runner.decode([sequence])
    assert sequence.finish_reason == "cancelled"
    assert counters(sequence) == counters(expected)
    assert_same_state(engine, sequence, expected)


@pytest.mark.thorough
def test_cancelled_within_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, expected = begin(engine), waiting(engine, max_tokens=2)
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        engine.runner.decode([sequence])
        original = MixtureOfExperts.apply

        def cancel(block: MixtureOfExperts, *rest: Any) -> tuple[mx.array, mx.array]:
            if block.layer == 1:
                sequence.cancel()
            return original(block, *rest)

        monkeypatch.setattr(MixtureOfExperts, "apply", cancel)
        engine.runner.decode([sequence])
    assert sequence.finish_reason == "cancelled"
    assert sequence.token_ids == expected.token_ids
    assert_same_state(engine, sequence, expected)


def test_what_needs_logits_waits(engine: Engine) -> None:
    expected = waiting(engine).token_ids
    sequence = begin(engine, logprobs=1)
    assert finish(engine, sequence) == expected
    assert len(sequence.logprobs) == len(expected)
    seen: list[int] = []

    def process(scores: npt.NDArray[np.float64], history: object) -> npt.NDArray[np.float64]:
        seen.append(len(scores))
        return scores

    assert finish(engine, begin(engine, processors=(process,))) == expected
    assert len(seen) == len(expected)


@pytest.mark.thorough
def test_sequences_that_join_and_leave(engine: Engine) -> None:
    """A step that was begun ahead counts when its sequence then goes on together with another."""
    prompts = (PROMPT, [64, 12])
    expected = [waiting(engine, prompt=prompt, sampling=WARM, seed=9).token_ids for prompt in prompts]
    one, other = (begin(engine, prompt, sampling=WARM, seed=9) for prompt in prompts)
    runner = engine.runner
    with runner.exclusive():
        runner.prefill(one)
        runner.decode([one])
        runner.prefill(other)
        for together in ([one, other], [other], [one], [one, other], [one, other]):
            runner.decode(together)
    assert [finish(engine, one), finish(engine, other)] == expected
    assert (one.metrics.decode.tokens, other.metrics.decode.tokens) == (8, 8)


@pytest.mark.thorough
def test_an_observer_that_comes_and_goes(engine: Engine) -> None:
    expected, sequence = waiting(engine).token_ids, begin(engine)
    seen: list[int] = []
    for observer in (None, lambda layer, _: seen.append(layer), None):
        engine.observe_routing(observer)
        with engine.runner.exclusive():
            engine.runner.prefill(sequence) if not sequence.token_ids else engine.runner.decode([sequence])
            engine.runner.decode([sequence])
    assert finish(engine, sequence) == expected
    assert seen == list(range(TINY.num_layers)), "the other step had begun before the observer came"


def test_logits_that_are_no_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = begin(engine)
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        original = type(engine.model).logits
        monkeypatch.setattr(type(engine.model), "logits", lambda *rest: original(*rest) * float("nan"))
        with pytest.raises(FlashMoeError) as caught:
            engine.runner.decode([sequence])
    assert caught.value.code == "bad_logits"


@pytest.mark.thorough
def test_a_cache_grows_while_a_step_is_under_way(engine: Engine) -> None:
    prompt = (PROMPT * 40)[:248]
    assert finish(engine, begin(engine, prompt, max_tokens=9)) == waiting(engine, prompt=prompt).token_ids


@pytest.mark.parametrize("kind", ["metal", pytest.param("cuda", marks=pytest.mark.thorough)])
@pytest.mark.thorough
def test_stores_and_policies(kind: str, tiny_pack: Path) -> None:
    with getattr(gpu_on_cpu, kind)(mx.float32):
        with flashmoe_mlx.load(tiny_pack, slots=8) as engine:
            expected = begin(engine, max_tokens=4)
            finish(engine, expected)
        policies = [{"backend": "resident", "prefetch": policy} for policy in POLICIES]
        for options in (*policies, ALL_IN_SLOTS, {"backend": "resident", "profile": True}):
            with flashmoe_mlx.load(tiny_pack, **options) as engine:
                sequence = begin(engine, max_tokens=4)
                assert finish(engine, sequence) == expected.token_ids, options
                assert counters(sequence)["hits"] == counters(expected)["misses"]
                in_memory = options.get("prefetch", "none") == "none" and "profile" not in options
                assert engine.runner._can_run_ahead(sequence) == in_memory


def test_slots_that_fill_up(tiny_pack: Path) -> None:
    """A layer whose experts have all come to slots no longer waits; until then every layer does."""
    with gpu_on_cpu.cuda(mx.float32), flashmoe_mlx.load(tiny_pack, **{**ALL_IN_SLOTS, "preload": False}) as engine:
        assert engine.store.in_memory(0) is None
        expected = finish(engine, begin(engine, max_tokens=4))
        for layer in range(TINY.num_layers):
            for start in (0, 8):
                engine.store.fetch(layer, range(start, start + 8))
        before = engine.store.stats()
        assert finish(engine, begin(engine, max_tokens=4)) == expected
        assert engine.runner.ahead.ready
        assert (engine.store.stats() - before).misses == 0


def test_a_closed_engine_frees_the_experts(tiny_pack: Path) -> None:
    with gpu_on_cpu.cuda(mx.float32):
        opened = flashmoe_mlx.load(tiny_pack, backend="resident")
        finish(opened, begin(opened, max_tokens=4))
        assert opened.runner.ahead.ready
        gc.collect()
        before = mx.get_active_memory()
        opened.close()
        gc.collect()
        assert before - mx.get_active_memory() >= TINY.num_layers * TINY.num_experts * RECORD_BYTES


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32),
    st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        top_k=st.sampled_from([0, 1, 2, 7, 50, 100]),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        min_p=st.sampled_from([0.0, 0.1, 1.0]),
    ),
    st.integers(1, 60),
)
def test_draws_on_the_device_are_those_of_the_host(seed: int, options: SamplingOptions, size: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    if seed % 3 == 0:
        logits[: size // 2] = -np.inf
    host, device = Sampler(options, seed), Sampler(options, seed)
    for _ in range(5):
        token, _ = device.choose_on_device(mx.array(logits))
        assert token.shape == (1,)
        assert token.item() == host(logits)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_largest_random_number_draws_a_possible_token(top_p: float) -> None:
    logits = mx.array([0.0, 1.0, 2.0, -float("inf")])
    drawn = draw(mx.stack([logits, logits]), SamplingOptions(top_p=top_p), [1.0, 0.1], [1 - 2.0**-53] * 2)
    assert max(drawn.tolist()) < 3


def test_rows_are_chosen_with_their_own_options() -> None:
    random = np.random.default_rng(1)
    logits = mx.array(random.normal(0, 3, (6, 50)), mx.float32)
    options = [SamplingOptions(), WARM, SamplingOptions(temperature=2.0), replace(WARM, temperature=0.3), WARM]
    numbers = [None, *random.random(4).tolist()]
    chosen = choose_each(logits, dict(enumerate(zip(options, numbers, strict=True))))
    for row, (own, number) in enumerate([*zip(options, numbers, strict=True), (options[0], None)]):
        alone = logits[row : row + 1]
        expected = mx.argmax(alone, axis=-1) if number is None else draw(alone, own, [own.temperature], [number])
        assert chosen[row].item() == expected.item()
