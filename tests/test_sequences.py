"""Several sequences in one pass: each sequence gets the same tokens as it gets alone."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.generation.logits import TokenHistory
from flashmoe_mlx.generation.logprobs import token_logprobs
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.sequence import Sequence, Status
from flashmoe_mlx.moe.prefetch import POLICIES
from flashmoe_mlx.stores.contract import ExpertReadError

PROMPTS = ([5, 17, 42, 8, 3, 99, 23], [64, 12], list(range(1, 40)), [7])


@pytest.fixture
def engine(tiny_pack: Path) -> Iterator[Engine]:
    with flashmoe_mlx.load(tiny_pack) as opened:
        yield opened


def begin(engine: Engine, prompt: list[int], **options: Any) -> Sequence:
    sampling = ChosenSampling(options.pop("sampling", SamplingOptions()))
    return engine.runner.begin(Request(prompt, sampling, **{"max_tokens": 12, **options}))


def run_together(engine: Engine, sequences: list[Sequence]) -> None:
    """Prefill each waiting sequence, then decode all unfinished sequences together, one pass per token."""
    runner = engine.runner
    with runner.exclusive():
        for sequence in sequences:
            if sequence.status is Status.WAITING:
                runner.prefill(sequence)
        while unfinished := [sequence for sequence in sequences if sequence.status is Status.DECODING]:
            runner.decode(unfinished)


def alone(engine: Engine, prompt: list[int], **options: Any) -> list[int]:
    sequence = begin(engine, prompt, **options)
    run_together(engine, [sequence])
    return sequence.token_ids


@pytest.mark.parametrize("count", [2, 3, 8, 9, 17])
@pytest.mark.sampled(3)
def test_every_number_of_sequences(engine: Engine, count: int) -> None:
    """Kernels for CPUs have a path for 2 to 8 rows and another one for more; an unchecked path would warn."""
    prompts = [[number, 5, 17] for number in range(count)]
    expected = [alone(engine, prompt, max_tokens=4) for prompt in prompts]
    sequences = [begin(engine, prompt, max_tokens=4) for prompt in prompts]
    run_together(engine, sequences)
    assert [sequence.token_ids for sequence in sequences] == expected


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_schedule(random: Random) -> None:
    """Prompts between decode steps of other sequences, steps of some of them, snapshots, every kind of sampling."""
    engine = _shared_engine()
    limit = engine.model.config.max_context
    kinds = (
        SamplingOptions(),
        SamplingOptions(temperature=1.3, top_k=40),
        SamplingOptions(repetition_penalty=1.5),
        SamplingOptions(frequency_penalty=0.7, temperature=0.8, top_p=0.9),
    )
    wanted = [
        {
            "prompt": [random.randrange(250) for _ in range(random.choice([1, 2, 30, limit - 3, limit]))],
            "sampling": random.choice(kinds),
            "seed": random.randrange(100),
            "max_tokens": random.choice([1, 2, 9]),
            "prefill_chunk": random.choice([7, 100, 1024]),
        }
        for _ in range(5)
    ]
    expected = [alone(engine, **dict(each)) for each in wanted]
    sequences = [begin(engine, **dict(each)) for each in wanted]
    waiting = list(sequences)
    with engine.runner.exclusive():
        while unfinished := [sequence for sequence in sequences if sequence.status is not Status.FINISHED]:
            running = [sequence for sequence in unfinished if sequence.status is Status.DECODING]
            if waiting and (not running or random.random() < 0.3):
                engine.runner.prefill(waiting.pop())
                continue
            greedy = [sequence for sequence in running if sequence.request.sampling.options == kinds[0]]
            chosen = random.sample(running, random.randint(1, len(running)))
            if greedy and random.random() < 0.3:
                snapshot, length = greedy[0].cache.snapshot(), len(greedy[0].token_ids)
                engine.runner.decode(chosen)
                if greedy[0].finish_reason is None:
                    greedy[0].cache.restore(snapshot)
                    del greedy[0].token_ids[length:]
            else:
                engine.runner.decode(chosen)
    assert [sequence.token_ids for sequence in sequences] == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.sampled(2)
def test_prefetch_changes_no_tokens(policy: str, tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack, prefetch=policy) as engine:
        expected = [alone(engine, prompt) for prompt in PROMPTS]
        sequences = [begin(engine, prompt) for prompt in PROMPTS]
        run_together(engine, sequences)
        assert [sequence.token_ids for sequence in sequences] == expected


@pytest.mark.parametrize("kernels", ["mlx", "reference"])
@pytest.mark.sampled(1)
def test_sequences_decode_together_with_other_kernels(kernels: str, tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack, kernels=kernels) as engine:
        expected = [alone(engine, prompt) for prompt in PROMPTS]
        sequences = [begin(engine, prompt) for prompt in PROMPTS]
        run_together(engine, sequences)
        assert [sequence.token_ids for sequence in sequences] == expected


def test_sequences_decode_together_with_few_slots(tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack, slots=3) as engine:
        expected = [alone(engine, prompt) for prompt in PROMPTS]
        sequences = [begin(engine, prompt) for prompt in PROMPTS]
        run_together(engine, sequences)
        assert [sequence.token_ids for sequence in sequences] == expected


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 250), min_size=1, max_size=20), st.integers(1, 9)), min_size=1, max_size=5
    )
)
def test_sequences_that_end_at_different_times(requests: list[tuple[list[int], int]]) -> None:
    engine = _shared_engine()
    expected = [alone(engine, prompt, max_tokens=count) for prompt, count in requests]
    sequences = [begin(engine, prompt, max_tokens=count) for prompt, count in requests]
    run_together(engine, sequences)
    assert [sequence.token_ids for sequence in sequences] == expected
    assert all(sequence.finish_reason == "length" for sequence in sequences)


_opened: list[Engine] = []


def _shared_engine() -> Engine:
    return _opened[0]


@pytest.fixture(scope="module", autouse=True)
def _open(tiny_pack: Path) -> Iterator[None]:
    with flashmoe_mlx.load(tiny_pack) as engine:
        _opened.append(engine)
        yield
    _opened.clear()


def test_each_sequence_has_its_own_sampling(engine: Engine) -> None:
    hot = SamplingOptions(temperature=1.5)
    options = [{"sampling": hot, "seed": 1}, {}, {"sampling": hot, "seed": 2}, {"sampling": hot, "seed": 1}]
    expected = [alone(engine, PROMPTS[0], **each) for each in options]
    sequences = [begin(engine, PROMPTS[0], **each) for each in options]
    run_together(engine, sequences)
    assert [sequence.token_ids for sequence in sequences] == expected
    assert expected[0] == expected[3]
    assert expected[0] != expected[2]


def test_one_fetch_a_layer_for_all(engine: Engine) -> None:
    sequences = [begin(engine, prompt) for prompt in PROMPTS]
    runner = engine.runner
    with runner.exclusive():
        for sequence in sequences:
            runner.prefill(sequence)
        before = engine.store.stats()
        runner.decode(sequences)
    done = engine.store.stats() - before
    layers, k = engine.model.config.num_layers, engine.setup["experts_k"]
    assert done.fetches == layers
    assert layers * k <= done.requests <= layers * k * len(sequences)


def test_metrics_of_each_sequence(engine: Engine) -> None:
    sequences = [begin(engine, prompt, max_tokens=count) for prompt, count in zip(PROMPTS, (3, 5, 8, 2), strict=True)]
    run_together(engine, sequences)
    for sequence, count in zip(sequences, (3, 5, 8, 2), strict=True):
        assert sequence.metrics.prefill.tokens == len(sequence.request.prompt_ids)
        assert sequence.metrics.decode.tokens == len(sequence.metrics.decode.steps) == count - 1
        assert sequence.metrics.finish_reason == "length"
        assert sequence.metrics.time_to_first_token is not None


def test_a_cancelled_sequence_does_not_affect_other_sequences(engine: Engine) -> None:
    expected = [alone(engine, prompt) for prompt in PROMPTS]
    sequences = [begin(engine, prompt) for prompt in PROMPTS]
    runner = engine.runner
    with runner.exclusive():
        for sequence in sequences:
            runner.prefill(sequence)
        runner.decode(sequences)
        sequences[1].cancel()
        while unfinished := [sequence for sequence in sequences if sequence.status is Status.DECODING]:
            runner.decode(unfinished)
    assert sequences[1].finish_reason == "cancelled"
    assert sequences[1].token_ids == expected[1][:2]
    assert [sequence.token_ids for index, sequence in enumerate(sequences) if index != 1] == [
        *expected[:1],
        *expected[2:],
    ]


def test_a_pass_ends_at_the_next_layer_if_all_are_cancelled(engine: Engine) -> None:
    sequences = [begin(engine, prompt) for prompt in PROMPTS[:2]]
    runner = engine.runner
    seen: list[int] = []

    def cancel_at(layer: int, _: object) -> None:
        seen.append(layer)
        for sequence in sequences:
            sequence.cancel()

    with runner.exclusive():
        for sequence in sequences:
            runner.prefill(sequence)
    engine.observe_routing(cancel_at)
    with runner.exclusive():
        runner.decode(sequences)
    engine.observe_routing(None)
    assert seen == [0]
    assert {sequence.finish_reason for sequence in sequences} == {"cancelled"}
    assert all(sequence.cache.broken for sequence in sequences)
    assert alone(engine, PROMPTS[0])


def test_a_failed_read_ends_every_sequence_of_the_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [begin(engine, prompt) for prompt in PROMPTS[:2]]
    runner = engine.runner
    with runner.exclusive():
        for sequence in sequences:
            runner.prefill(sequence)

    def fail(*_: object) -> None:
        raise ExpertReadError(Path("layer_00.bin"), 0, 0, 0, "planted")

    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "_load", fail)
        with runner.exclusive(), pytest.raises(ExpertReadError):
            runner.decode(sequences)
    with runner.exclusive(), pytest.raises(InputError) as raised:
        runner.decode(sequences)
    assert raised.value.code == "broken_sequence"


def test_a_finished_sequence_keeps_its_reason(engine: Engine) -> None:
    sequence = begin(engine, PROMPTS[0], max_tokens=2)
    run_together(engine, [sequence])
    sequence.cancel()
    with engine.runner.exclusive():
        engine.runner.decode([sequence])
        engine.runner.decode([])
    assert sequence.finish_reason == sequence.metrics.finish_reason == "length"
    assert len(sequence.token_ids) == 2


def test_lists_that_cannot_be_decoded_change_nothing(engine: Engine) -> None:
    expected = alone(engine, PROMPTS[0])
    runner, sequence, waiting, broken = engine.runner, *(begin(engine, PROMPTS[0]) for _ in range(3))
    broken.cache.broken = True
    with runner.exclusive():
        runner.prefill(sequence)
        for others, code in (
            ([sequence], "duplicate_sequence"),
            ([waiting], "not_decoding"),
            ([broken], "broken_sequence"),
        ):
            with pytest.raises(InputError) as raised:
                runner.decode([sequence, *others])
            assert raised.value.code == code
        with pytest.raises(InputError) as raised:
            runner.prefill(sequence)
        assert raised.value.code == "not_waiting"
    run_together(engine, [sequence])
    run_together(engine, [waiting])
    assert sequence.token_ids == waiting.token_ids == expected


@pytest.mark.parametrize(
    ("prompt", "code"),
    [([], "empty_prompt"), ([-1], "unknown_token"), ([10**6], "unknown_token"), ([1] * 10_000, "prompt_too_long")],
)
def test_prompts_are_checked_for_every_sequence(engine: Engine, prompt: list[int], code: str) -> None:
    with pytest.raises(InputError) as raised:
        begin(engine, prompt)
    assert raised.value.code == code


def failing_at(call: int) -> Any:
    """A processor whose given call fails."""
    calls = itertools.count(1)

    def fail(logits: np.ndarray, _: object) -> np.ndarray:
        if next(calls) == call:
            raise ZeroDivisionError
        return logits

    return fail


def refuse(step: Any) -> None:
    with pytest.raises(InputError) as raised:
        step()
    assert raised.value.code == "broken_sequence"


def test_a_failed_choice_in_the_prompt_ends_the_sequence(engine: Engine) -> None:
    runner, sequence = engine.runner, begin(engine, PROMPTS[0], processors=(failing_at(1),))
    with runner.exclusive():
        with pytest.raises(ZeroDivisionError):
            runner.prefill(sequence)
        refuse(lambda: runner.prefill(sequence))
    assert alone(engine, PROMPTS[0])


@pytest.mark.parametrize("failure", ["processor", "logits"])
def test_a_failed_choice_ends_that_sequence_alone(
    engine: Engine, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(engine, prompt) for prompt in PROMPTS]
    processors = (failing_at(3),) if failure == "processor" else ()
    sequences = [begin(engine, prompt, processors=processors * (i == 1)) for i, prompt in enumerate(PROMPTS)]
    runner = engine.runner
    with runner.exclusive():
        for sequence in sequences:
            runner.prefill(sequence)
        runner.decode(sequences)
        with monkeypatch.context() as patched:
            if failure == "logits":
                rows = mx.array([[0.0], [np.nan], [0.0], [0.0]])
                original = engine.model.logits
                patched.setattr(type(engine.model), "logits", lambda _, hidden: original(hidden) + rows)
            with pytest.raises(ZeroDivisionError if failure == "processor" else FlashMoeError):
                runner.decode(sequences)
        assert [sequence.cache.broken for sequence in sequences] == [False, True, False, False]
        assert [len(sequence.token_ids) for sequence in sequences] == [3, 2, 3, 3]
        refuse(lambda: runner.decode(sequences))
    del sequences[1], expected[1]
    run_together(engine, sequences)
    assert [sequence.token_ids for sequence in sequences] == expected


def test_an_interrupted_choice_ends_every_sequence_of_the_pass(engine: Engine) -> None:
    """Nobody knows which sequences had chosen a token."""

    def interrupt(logits: np.ndarray, history: TokenHistory) -> np.ndarray:
        if history.generated.any():
            raise KeyboardInterrupt
        return logits

    runner, sequences = engine.runner, [begin(engine, PROMPTS[0], processors=each) for each in ((), (interrupt,), ())]
    with runner.exclusive():
        for sequence in sequences:
            runner.prefill(sequence)
        with pytest.raises(KeyboardInterrupt):
            runner.decode(sequences)
        for sequence in sequences:
            refuse(lambda sequence=sequence: runner.decode([sequence]))


@pytest.mark.parametrize("call", range(1, 14))
@pytest.mark.sampled(6)
def test_an_error_in_the_prompt_ends_the_sequence(engine: Engine, call: int) -> None:
    """Wherever a report of progress fails, the tokens so far are never processed a second time."""
    calls = 0

    def fail(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise ZeroDivisionError

    sampling = ChosenSampling(SamplingOptions())
    sequence = engine.runner.begin(Request(PROMPTS[0], sampling, prefill_chunk=3), fail)
    with engine.runner.exclusive():
        with pytest.raises(ZeroDivisionError):
            engine.runner.prefill(sequence)
        for step in (lambda: engine.runner.prefill(sequence), lambda: engine.runner.decode([sequence])):
            with pytest.raises(InputError):
                step()


# Log probabilities


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=30), st.integers(0, 40), st.data())
def test_log_probabilities_equal_a_plain_softmax(values: list[int], count: int, data: st.DataObject) -> None:
    logits = np.array(values, np.float32) / 4
    token = data.draw(st.integers(0, len(values) - 1))
    found = token_logprobs(logits, token, count)
    expected = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    assert found.token_id == token
    assert found.logprob == pytest.approx(expected[token], abs=1e-9)
    order = sorted(range(len(values)), key=lambda index: (-expected[index], index))[: min(count, len(values))]
    assert [index for index, _ in found.top] == order
    assert [value for _, value in found.top] == pytest.approx([expected[index] for index in order], abs=1e-9)


def test_an_excluded_token_has_no_probability() -> None:
    found = token_logprobs(np.array([0, -np.inf, 0], np.float32), 1, 2)
    assert found.logprob == -np.inf
    assert found.top == ((0, pytest.approx(-np.log(2))), (2, pytest.approx(-np.log(2))))


def test_log_probabilities_of_an_answer(engine: Engine) -> None:
    pieces = list(engine.generate("Hello", max_tokens=6, temperature=0, logprobs=3))
    tokens = [token for piece in pieces for token in piece.token_ids]
    logprobs = [entry for piece in pieces for entry in piece.logprobs]
    assert [entry.token_id for entry in logprobs] == tokens
    sequence = engine.encode("Hello")
    for entry in logprobs:
        fresh = token_logprobs(engine.logits(sequence)[-1], entry.token_id, 3)
        assert entry.logprob == pytest.approx(fresh.logprob, abs=1e-4)
        assert [token for token, _ in entry.top] == [token for token, _ in fresh.top]
        assert entry.top[0] == (entry.token_id, entry.logprob)
        sequence.append(entry.token_id)


# Stop strings and processors in an answer


def test_a_stop_string_ends_the_answer(engine: Engine) -> None:
    pieces = list(engine.generate("Hello", max_tokens=24, temperature=0))
    text = "".join(piece.text for piece in pieces)
    stop = text[5:8]
    for given_stop in (stop, ["never there", stop]):
        found = list(engine.generate("Hello", max_tokens=24, temperature=0, stop=given_stop))
        assert "".join(piece.text for piece in found) == text[: text.index(stop)]
        assert (found[-1].finish_reason, found[-1].stop) == ("stop", stop)
        assert all(piece.stop is None for piece in found[:-1])
        assert found[-1].token_ids


def test_a_stop_string_that_never_occurs_changes_nothing(engine: Engine) -> None:
    plain = list(engine.generate("Hello", max_tokens=12, temperature=0))
    found = list(engine.generate("Hello", max_tokens=12, temperature=0, stop="\N{SNOWMAN}never"))
    assert "".join(piece.text for piece in found) == "".join(piece.text for piece in plain)
    assert found[-1].finish_reason == plain[-1].finish_reason == "length"
    assert [token for piece in found for token in piece.token_ids] == [t for piece in plain for t in piece.token_ids]


def test_a_logits_processor_decides(engine: Engine) -> None:
    seen: list[int] = []

    def only_seven(logits: np.ndarray, history: Any) -> np.ndarray:
        seen.append(int(history.generated.sum()))
        changed = np.full_like(logits, -np.inf)
        changed[7] = 0
        return changed

    pieces = list(engine.generate("Hello", max_tokens=4, logits_processors=[only_seven], ignore_eos=True))
    assert [token for piece in pieces for token in piece.token_ids] == [7] * 4
    assert seen == [0, 1, 2, 3]


def test_a_processor_that_leaves_nothing_is_an_error(engine: Engine) -> None:
    generation = engine.generate(
        "Hello", max_tokens=4, logits_processors=[lambda logits, _: np.full_like(logits, -np.inf)]
    )
    with pytest.raises(Exception, match="no token") as raised:
        next(generation)
    assert raised.value.code == "no_token_left"
    assert list(generation) == []


@pytest.mark.parametrize("result", [lambda logits: None, lambda logits: logits[:5], lambda logits: logits[None]])
def test_a_processor_must_return_logits(engine: Engine, result: Any) -> None:
    """A forgotten ``return`` is the most likely mistake; an array of another shape would choose another token."""
    generation = engine.generate("Hello", logits_processors=[lambda logits, _: result(logits)])
    with pytest.raises(InputError) as raised:
        next(generation)
    assert raised.value.code == "invalid_processor"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"max_tokens": 0}, "invalid_max_tokens"),
        ({"stop": ""}, "invalid_stop"),
        ({"stop": ["x", 5]}, "invalid_stop"),
        ({"stop": ["x"] * 65}, "invalid_stop"),
        ({"logprobs": -1}, "invalid_logprobs"),
        ({"logprobs": True}, "invalid_logprobs"),
        ({"prefill_chunk": 0}, "invalid_prefill_chunk"),
    ],
)
def test_bad_options(engine: Engine, options: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as raised:
        engine.generate("Hello", **options)
    assert raised.value.code == code


def test_a_single_stop_string_is_no_tuple_of_characters() -> None:
    with pytest.raises(InputError) as raised:
        Request([1], ChosenSampling(SamplingOptions()), stop="END")  # type: ignore[arg-type]
    assert raised.value.code == "invalid_stop"
