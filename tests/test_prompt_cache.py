"""The prompt cache: answers that continue from kept states equal answers computed from nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from test_sequences import begin

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.logits import Logits, TokenHistory
from flashmoe_mlx.generation.prompt_cache.cache import PromptCache
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
    assert second.metrics.reused_from == "live"
    assert second.metrics.computed_tokens == 4
    run(engine, begin(engine, [5, 6, 7, 8], max_tokens=1))
    third = run(engine, begin(engine, prompt, max_tokens=8))
    assert (third.token_ids, third.metrics.reused_from) == (second.token_ids, "ram")
    assert engine.runner.prompt_cache is not None
    engine.runner.prompt_cache.clear()
    assert run(engine, begin(engine, prompt, max_tokens=8)).token_ids == second.token_ids


class Capture:
    """A logits processor that keeps the logits of the first token."""

    def __init__(self) -> None:
        self.first: Logits | None = None

    def __call__(self, logits: Logits, _: TokenHistory) -> Logits:
        if self.first is None:
            self.first = logits.copy()
        return logits


class Conversations(RuleBasedStateMachine):
    """Requests that continue, edit and branch conversations, some of them cancelled or broken."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.known: list[list[int]] = [[3, 1, 4]]
        self.budget = 2**21
        self.replace_cache()

    def replace_cache(self) -> None:
        runner = self.engine.runner
        runner.prompt_cache = PromptCache(self.budget, self.engine.model.state_bytes, None)

    @rule(
        which=st.integers(0, 50),
        cut=st.integers(0, 40),
        new=st.lists(st.integers(1, 200), min_size=1, max_size=30),
        length=st.integers(1, 4),
        chunk=st.sampled_from([5, 64]),
        cancelled_after=st.sampled_from([None, None, 0, 1, 2, 3]),
    )
    def ask(self, which: int, cut: int, new: list[int], length: int, chunk: int, cancelled_after: int | None) -> None:
        base = self.known[which % len(self.known)]
        prompt = [*base[: max(1, len(base) - cut)], *new][:180]
        capture = Capture()
        sequence = begin(self.engine, prompt, max_tokens=length, prefill_chunk=chunk, processors=(capture,))
        runner, passes = self.engine.runner, 0
        with runner.exclusive():
            while sequence.status is not Status.FINISHED:
                if passes == cancelled_after:
                    sequence.cancel()
                passes += 1
                if sequence.status is Status.WAITING:
                    runner.prefill_part([sequence])
                else:
                    runner.decode([sequence])
        assert runner.prompt_cache is not None
        assert runner.prompt_cache.nbytes <= self.budget
        if capture.first is not None:
            metrics = sequence.metrics
            assert metrics.computed_tokens + metrics.reused_tokens == len(prompt)
            expected = self.engine.logits(prompt)[-1]
            np.testing.assert_allclose(capture.first, expected, atol=1e-3)
        self.known.append([*prompt, *sequence.token_ids])

    @rule(which=st.integers(0, 50))
    def break_one(self, which: int) -> None:
        def fail(logits: Logits, _: TokenHistory) -> Logits:
            raise ZeroDivisionError

        sequence = begin(self.engine, [*self.known[which % len(self.known)], 8][:180], processors=(fail,))
        assert self.engine.runner.prompt_cache is not None
        before = self.engine.runner.prompt_cache.nbytes
        with self.engine.runner.exclusive(), pytest.raises(ZeroDivisionError):
            self.engine.runner.prefill(sequence)
        assert self.engine.runner.prompt_cache.nbytes == before

    @rule(kib=st.sampled_from([0, 100, 400, 2000]))
    def restart(self, kib: int) -> None:
        self.budget = 1024 * kib
        self.replace_cache()


def test_any_order_of_requests(engine: Engine) -> None:
    machine = type("Bound", (Conversations,), {"engine": engine})
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_narrow_keys_and_values_continue(tiny_pack: Path, kv_bits: int) -> None:
    with flashmoe_mlx.load(tiny_pack, kv_bits=kv_bits) as engine:
        first = run(engine, begin(engine, list(range(1, 60)), max_tokens=8))
        prompt = [*first.request.prompt_ids, *first.token_ids, 7, 8, 9]
        capture = Capture()
        second = run(engine, begin(engine, prompt, max_tokens=1, processors=(capture,)))
        assert second.metrics.computed_tokens == 4
        # Other passes round other sums to these few bits.
        assert capture.first is not None
        assert np.abs(capture.first - engine.logits(prompt)[-1]).max() < 0.05


def test_memory_stays_within_the_budget(engine: Engine) -> None:
    random = np.random.default_rng(1)
    cache = engine.runner.prompt_cache = PromptCache(2**20, engine.model.state_bytes)
    sizes = []
    for _ in range(60):
        sequence = begin(engine, random.integers(1, 200, 20).tolist(), max_tokens=2)
        if random.random() < 0.3:
            sequence.cancel()
        run(engine, sequence) if not sequence.cancelled else sequence.finish("cancelled")
        sizes.append(cache.nbytes)
    assert max(sizes) <= 2**20
    assert engine.runner._ended == []


@pytest.mark.parametrize("damage", ["none", "keys and values", "state", "header", "missing", "other settings"])
def test_conversations_outlast_the_process(tiny_pack: Path, tmp_path: Path, damage: str) -> None:
    def answer(prompt: list[int], **options: Any) -> tuple[Sequence, Logits]:
        capture = Capture()
        with flashmoe_mlx.load(tiny_pack, cache_dir=tmp_path / "cache", prompt_cache_gib=0.01, **options) as engine:
            sequence = run(engine, begin(engine, prompt, max_tokens=4, processors=(capture,)))
        assert capture.first is not None
        return sequence, capture.first

    first, _ = answer(list(range(1, 60)))
    prompt = [*first.request.prompt_ids, *first.token_ids, 7, 8, 9]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    states = sorted((tmp_path / "cache").glob("*/*/*.safetensors"))
    keys = next((tmp_path / "cache").glob("*/*/kv.bin"))
    if damage == "keys and values":
        data = bytearray(keys.read_bytes())
        data[10] ^= 1
        keys.write_bytes(data)
    for state in states:
        data = bytearray(state.read_bytes())
        if damage == "state":
            data[-1] ^= 1
        elif damage == "header":
            data = data[:40]
        state.write_bytes(data)
    if damage == "missing":
        keys.unlink()
    options = {"experts_k": 2} if damage == "other settings" else {}
    second, logits = answer(prompt, **options)
    assert second.metrics.reused_from == ("disk" if damage == "none" else None)
    assert (second.metrics.computed_tokens == 4) == (damage == "none")
    with flashmoe_mlx.load(tiny_pack, prompt_cache_gib=0, **options) as engine:
        np.testing.assert_allclose(logits, engine.logits(prompt)[-1], atol=1e-3)
