"""The scheduler: requests join and leave between tokens, and every answer equals that of the request alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequences import alone, begin

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.generation import concurrency
from flashmoe_mlx.generation.concurrency import Concurrency, run_all
from flashmoe_mlx.generation.scheduler import Progress, Scheduler
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.generation.together import tokens_of_rows
from flashmoe_mlx.stores.contract import ExpertReadError


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with flashmoe_mlx.load(request.getfixturevalue("tiny_pack"), prompt_cache_gib=0) as opened:
        yield opened


def run(engine: Engine, scheduler: Scheduler) -> list[Progress]:
    """Step until every sequence has ended."""
    changes = []
    with engine.runner.exclusive():
        while scheduler.unfinished:
            changes += scheduler.step()
    return changes


def test_answers_equal_those_of_each_request_alone(engine: Engine) -> None:
    prompts = [[5, 17, 42], list(range(1, 40)), [7], [64, 12], list(range(30, 90)), [9, 9]]
    scheduler = Scheduler(engine.runner, together=3, prefill_tokens=7)
    sequences = [begin(engine, prompt, max_tokens=4 + 3 * number) for number, prompt in enumerate(prompts)]
    for sequence in sequences:
        scheduler.add(sequence)
    changes = run(engine, scheduler)
    expected = [alone(engine, prompt, max_tokens=4 + 3 * number) for number, prompt in enumerate(prompts)]
    assert [sequence.token_ids for sequence in sequences] == expected
    # Every token was reported once, when it came.
    assert [sum(done.sequence is sequence for done in changes) for sequence in sequences] == list(map(len, expected))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_order_of_arrivals_and_cancellations(engine: Engine, seed: int) -> None:
    random = Random(seed)
    together = random.randint(1, 5)
    scheduler = Scheduler(engine.runner, together, random.randint(1, 30))
    planned = [
        (random.choices(range(1, 200), k=random.randint(1, 25)), random.randint(1, 6), random.random() < 0.3)
        for _ in range(random.randint(1, 7))
    ]
    started: list[tuple[Sequence, bool]] = []
    with engine.runner.exclusive():
        while scheduler.unfinished or len(started) < len(planned):
            if len(started) < len(planned) and random.random() < 0.5:
                prompt, most, cancelled = planned[len(started)]
                sequence = begin(engine, prompt, max_tokens=most, prefill_chunk=random.choice([3, 1024]))
                scheduler.add(sequence)
                started.append((sequence, cancelled))
            victims = [sequence for sequence, cancelled in started if cancelled]
            if victims and random.random() < 0.3:
                random.choice(victims).cancel()
            scheduler.step()
            assert scheduler.unfinished <= len(started)
    for (sequence, cancelled), (prompt, most, _) in zip(started, planned, strict=True):
        expected = alone(engine, prompt, max_tokens=most)
        if cancelled:
            assert sequence.finish_reason in ("cancelled", "length")
            assert expected[: len(sequence.token_ids)] == sequence.token_ids
        else:
            assert (sequence.token_ids, sequence.finish_reason) == (expected, "length")


def test_a_long_prompt_does_not_stop_the_answers_in_progress(engine: Engine) -> None:
    scheduler = Scheduler(engine.runner, prefill_tokens=10)
    short, long = begin(engine, [5, 17], max_tokens=30), begin(engine, list(range(1, 101)), max_tokens=2)
    with engine.runner.exclusive():
        scheduler.add(short)
        scheduler.step()
        scheduler.add(long)
        before = len(short.token_ids)
        for part in range(1, 10):
            scheduler.step()
            assert (long.prefilled, len(short.token_ids)) == (10 * part, before + part)
        scheduler.step()
        assert len(long.token_ids) == 1


def test_waiting_requests_are_admitted_in_their_order(engine: Engine) -> None:
    scheduler = Scheduler(engine.runner, together=2)
    sequences = [begin(engine, [number], max_tokens=3) for number in range(1, 6)]
    for sequence in sequences:
        scheduler.add(sequence)
    ended = [done.sequence for done in run(engine, scheduler) if done.sequence.finish_reason == "length"]
    finished = list(dict.fromkeys(ended))
    assert [sequences.index(sequence) for sequence in finished] == [0, 1, 2, 3, 4]


def test_a_failing_processor_ends_only_its_sequence(engine: Engine) -> None:
    def fail(logits: Any, history: Any) -> Any:
        if history.generated.sum() == 2:
            raise ZeroDivisionError
        return logits

    scheduler = Scheduler(engine.runner)
    good, bad = begin(engine, [5, 17], max_tokens=6), begin(engine, [7], max_tokens=6, processors=(fail,))
    for sequence in (good, bad):
        scheduler.add(sequence)
    failed = [done for done in run(engine, scheduler) if done.error is not None]
    assert [done.sequence for done in failed] == [bad]
    assert isinstance(failed[0].error, ZeroDivisionError)
    assert good.token_ids == alone(engine, [5, 17], max_tokens=6)


def test_a_failed_read_ends_the_sequences_of_its_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(engine.runner)
    first, second = begin(engine, [5, 17], max_tokens=4), begin(engine, [7], max_tokens=4)
    with engine.runner.exclusive():
        scheduler.add(first)
        scheduler.step()
        load_experts = engine.store._load  # a disk that fails once

        def fail(layer: int, experts: Any, _: object) -> Any:
            monkeypatch.setattr(engine.store, "_load", load_experts)
            raise ExpertReadError(Path("disk"), layer, experts[0], 0, "gone")

        monkeypatch.setattr(engine.store, "_load", fail)
        (done,) = scheduler.step()
        assert done.sequence is first
        assert isinstance(done.error, FlashMoeError)
    scheduler.add(second)
    run(engine, scheduler)
    assert second.token_ids == alone(engine, [7], max_tokens=4)


@pytest.mark.parametrize("options", [{"together": 0}, {"prefill_tokens": 0}, {"together": 1.5}])
def test_limits_are_checked(engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        Scheduler(engine.runner, **options)
    assert caught.value.code == "out_of_range"


def runner_of(engine: Engine, *, reads: bool, shares: bool = False) -> Any:
    """Return what ``Concurrency`` reads of a runner.

    Its store reads experts from storage if ``reads``; its sequences share arrays if ``shares``.
    """
    store, ahead = SimpleNamespace(reads=reads), SimpleNamespace(most_sequences=128 if shares else 1)
    return SimpleNamespace(model=engine.model, prompt_cache=None, store=store, ahead=ahead)


def measured(number: Concurrency, rate: Callable[[int], float]) -> None:
    """Report full steps of ``rate`` tokens a second until the number of sequences is settled."""
    for _ in range(200):
        number.measured(number.limit, number.limit / rate(number.limit))


@pytest.mark.parametrize(
    ("rate", "limit"),
    [
        (lambda count: 100.0 * count, 128),
        (lambda count: 100.0 * count**0.2, 128),
        (lambda count: 100.0 * min(count, 8), 8),
        (lambda count: 100.0 / count, 1),
    ],
)
def test_sequences_run_together_while_that_is_faster(engine: Engine, rate: Any, limit: int) -> None:
    number = Concurrency(runner_of(engine, reads=True))
    assert number.limit == 1
    measured(number, rate)
    assert number.limit == limit


@pytest.mark.parametrize("together", [None, 3])
def test_answers_in_any_number_equal_those_of_each_alone(engine: Engine, together: int | None) -> None:
    prompts = [[number + 1, 5 + number % 7] for number in range(24)]
    sequences = [begin(engine, prompt, max_tokens=6 + number % 9) for number, prompt in enumerate(prompts)]
    number_at_once = Concurrency(engine.runner, together)
    ended = [
        change.sequence
        for change in run_all(engine.runner, iter(sequences), number_at_once)
        if change.sequence.finish_reason is not None
    ]
    assert set(ended) == set(sequences)
    for number, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        assert sequence.token_ids == alone(engine, prompt, max_tokens=6 + number % 9)
    assert number_at_once.most == 3 if together else number_at_once.most > 1


def test_sequences_wait_for_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    need = engine.model.prompt_memory
    monkeypatch.setattr(concurrency, "available_memory", lambda: 5 * (need.cache_fixed + 40 * need.cache_per_token))
    bounded = Concurrency(runner_of(engine, reads=False))
    sequences = [begin(engine, [5, 6], max_tokens=38) for _ in range(6)]
    assert bounded.admits(sequences[0], set())
    assert bounded.admits(sequences[1], set(sequences[:1]))
    assert not bounded.admits(sequences[2], set(sequences[:2]))
    assert bounded.admits(begin(engine, [5] * 150, max_tokens=200), set())


def test_rows_of_shared_arrays_need_memory_for_the_longest_sequence(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States exist three times, and every row has room for the longest sequence and for further tokens."""
    need = engine.model.prompt_memory
    short, long = begin(engine, [5, 6], max_tokens=38), begin(engine, [5] * 150, max_tokens=200)
    room = 2 * 3 * need.cache_fixed + 2 * 512 * need.cache_per_token
    for available, fits in ((2 * room, True), (2 * room - 2, False)):
        monkeypatch.setattr(concurrency, "available_memory", lambda available=available: available)
        assert Concurrency(runner_of(engine, reads=False, shares=True)).admits(long, {short}) == fits
    assert tokens_of_rows([40, 350]) == 2 * 512
    assert tokens_of_rows([40] * 9) == 16 * 256  # of 8 or more rows, a multiple of 8
    assert tokens_of_rows([40, 40, 40, 9000]) < 4 * 9000


def test_a_number_of_sequences_below_one_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError) as refusal:
        Concurrency(engine.runner, 0)
    assert refusal.value.code == "out_of_range"
