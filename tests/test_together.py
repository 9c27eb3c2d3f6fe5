"""Several sequences whose caches share arrays: a step submits as many kernels for many sequences as for two.

Emulated GPUs run it on a CPU (``gpu_on_cpu``). Each sequence alone is the truth.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY
from gpu_on_cpu import device_of_module  # noqa: F401  # a fixture
from systems import needs_linux

import flashmoe_mlx
from flashmoe_mlx.custom_kernels.kernel import Kernel
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.generation.pass_meter import WatchedPass
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.runner import Runner
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.sequence import Sequence, Status
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.research.decode_probe import count_dispatches

pytestmark = needs_linux

PROMPTS = [[5, 17, 42, 8, 3, 99, 23], [64, 12], [9], [77, 1, 2, 3], [30, 40, 50]]
WARM = SamplingOptions(temperature=1.0, top_k=20, top_p=0.95)
GREEDY = SamplingOptions()


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tiny_pack: Path, device: None) -> Iterator[Engine]:
    kind, options = getattr(request, "param", ("metal", {}))
    with (
        getattr(gpu_on_cpu, kind)(mx.float32),
        flashmoe_mlx.load(tiny_pack, backend="resident", **options) as opened,
    ):
        yield opened


def begun(engine: Engine, prompt: list[int], max_tokens: int = 6, **options: Any) -> Sequence:
    sampling = ChosenSampling(options.pop("sampling", GREEDY))
    sequence = engine.runner.begin(Request(prompt, sampling, max_tokens, seed=7, **options))
    engine.runner.prefill(sequence)
    return sequence


def decoded(runner: Runner, sequences: list[Sequence]) -> list[list[int]]:
    while running := [sequence for sequence in sequences if sequence.status is Status.DECODING]:
        runner.decode(running)
    return [sequence.token_ids for sequence in sequences]


def assert_same_states(engine: Engine, found: list[Sequence], expected: list[Sequence]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert not one.ahead
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.cache.length == other.cache.length == len(one.request.prompt_ids) + len(one.token_ids) - 1
        for layer, same in zip(one.cache.snapshot().layers, other.cache.snapshot().layers, strict=True):
            length = one.cache.length if layer.keeps_tokens else None
            for array, exact in zip(layer.arrays(), same.arrays(), strict=True):
                got, wanted = (np.array(each[:, :, :length] if length else each) for each in (array, exact))
                np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a layer waits for the choice of its router")

    monkeypatch.setattr(Router, "route", refuse)


def test_a_step_submits_as_many_kernels_for_many_sequences_as_for_two(
    engine: Engine, no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulation of the speed on a GPU, where the host submits kernels for longer than they run."""
    runner, counts = engine.runner, []
    calls: list[str] = []
    run = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda kernel, *rest: calls.append(kernel.name) or run(kernel, *rest))
    evaluated: list[int] = []
    begin_evaluation = mx.async_eval

    def counted(*arrays: mx.array) -> None:
        evaluated.append(count_dispatches(*arrays))
        begin_evaluation(*arrays)

    monkeypatch.setattr(mx, "async_eval", counted)
    with runner.exclusive():
        for count in (2, 5):
            sequences = [begun(engine, prompt) for prompt in PROMPTS[:count]]
            runner.decode(sequences)
            calls.clear()
            evaluated.clear()
            waits = runner.clock.waits
            runner.decode(sequences)
            counts.append((list(calls), list(evaluated), runner.clock.waits - waits))
    assert counts[0] == counts[1]
    assert counts[0][2] == 1
    attention = sum(layer.keeps_tokens for layer in engine.new_cache().layers)
    assert counts[0][0].count("attention_decode") == attention
    assert counts[0][0].count("gated_delta_net_step") == TINY.num_layers - attention


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_every_sequence_has_the_tokens_and_states_of_it_alone(engine: Engine, sampling: SamplingOptions) -> None:
    """Sequences of different lengths end one after the other: by their numbers of tokens, and one by a stop token."""
    with engine.runner.exclusive():
        alone = [begun(engine, prompt, 3 + at, sampling=sampling) for at, prompt in enumerate(PROMPTS[:3])]
        for sequence in alone:
            decoded(engine.runner, [sequence])
        stop = frozenset(alone[2].token_ids[1:2])
        stopped = begun(engine, PROMPTS[2], 5, sampling=sampling, stop_ids=stop)
        decoded(engine.runner, [stopped])
        expected = [*alone, stopped]
        together = [begun(engine, prompt, 3 + at, sampling=sampling) for at, prompt in enumerate(PROMPTS[:3])]
        together.append(begun(engine, PROMPTS[2], 5, sampling=sampling, stop_ids=stop))
        decoded(engine.runner, together)
        assert together[0].cache.shared is None, "a row would keep the arrays of all sequences in memory"
        assert_same_states(engine, together, expected)
    steps = together[2].metrics.decode
    assert (steps.tokens, steps.store.fetches) == (4, 4 * TINY.num_layers)


def test_sequences_join_leave_and_need_the_host(engine: Engine) -> None:
    """One sequence needs its logits on the host, one is cancelled, one decodes alone in between, one joins late."""
    runner = engine.runner
    with runner.exclusive():
        expected = [decoded(runner, [begun(engine, prompt, 8)])[0] for prompt in PROMPTS]
        one, other, third, late = (begun(engine, prompt, 8) for prompt in PROMPTS[:4])
        watched = begun(engine, PROMPTS[4], 8, logprobs=1)
        runner.decode([one, other, third, watched])
        assert one.cache.shared is not None
        assert watched.cache.shared is None
        other.cancel()
        runner.decode([one, other, third, watched])
        runner.decode([one])
        runner.decode([one, late])
        snapshot = third.cache.snapshot()
        assert third.ahead
        assert snapshot.length == len(PROMPTS[2]) + len(third.token_ids)
        found = decoded(runner, [one, third, watched, late])
        assert found == [expected[0], expected[2], expected[4], expected[3]]
        assert other.finish_reason == "cancelled"
        assert other.token_ids == expected[1][: len(other.token_ids)]


def test_a_watcher_receives_the_experts_of_every_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of rows differs from the order of the sequences in a pass, and one of three sequences ends early."""
    seen: dict[tuple[int, int], list[list[int]]] = {}

    def watch(watched: WatchedPass) -> None:
        for at, sequence in enumerate(watched.parts if watched.decoding else ()):
            own = [np.reshape(experts, (len(watched.parts), -1))[at].tolist() for _, experts in watched.choices]
            key = sequence.request.prompt_ids[0], watched.positions[sequence]
            assert seen.setdefault(key, own) == own

    monkeypatch.setattr(engine.runner.meter, "watcher", watch)
    with engine.runner.exclusive():
        for at, prompt in enumerate(PROMPTS[:3]):
            decoded(engine.runner, [begun(engine, prompt, 3 + at)])
        count = len(seen)
        decoded(engine.runner, [begun(engine, prompt, 3 + at) for at, prompt in enumerate(PROMPTS[:3])])
    assert len(seen) == count == 2 + 3 + 4


def test_logits_that_are_no_numbers_end_one_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine.runner
    with runner.exclusive():
        expected = decoded(runner, [begun(engine, PROMPTS[1])])[0]
        bad, good = begun(engine, PROMPTS[0]), begun(engine, PROMPTS[1])
        compute = type(engine.model).logits
        factors = mx.array([[1.0], [float("nan")]])  # the first row is that of the shorter sequence
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.model), "logits", lambda *rest: compute(*rest) * factors)
            with pytest.raises(FlashMoeError) as caught:
                runner.decode([bad, good])
        assert caught.value.code == "bad_logits"
        assert bad.cache.broken
        assert not good.cache.broken
        assert decoded(runner, [good])[0] == expected


ENGINES = [
    pytest.param(("metal", {"kv_bits": 8}), id="8-bit", marks=pytest.mark.thorough),
    pytest.param(("cuda", {}), id="cuda", marks=pytest.mark.thorough),
    pytest.param(("cuda", {"kv_bits": 4}), id="cuda-4-bit", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_rows_grow_on_every_device_and_at_every_width(engine: Engine) -> None:
    """The rows of a long and of short sequences get more room, while a step is under way."""
    prompts = [(PROMPTS[0] * 40)[:250], (PROMPTS[3] * 40)[:200], PROMPTS[2]]
    with engine.runner.exclusive():
        expected = [decoded(engine.runner, [begun(engine, prompt, 6)])[0] for prompt in prompts]
        assert decoded(engine.runner, [begun(engine, prompt, 6) for prompt in prompts]) == expected


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(0, marks=pytest.mark.thorough),
        *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2, 3)),
    ],
)
def test_any_order_of_passes(seed: int, engine: Engine) -> None:
    """Random subsets decode; sequences are settled, cancelled, kept and restored in between."""
    random, runner = np.random.default_rng(seed), engine.runner
    options = [WARM if number % 2 else GREEDY for number in range(len(PROMPTS))]
    with runner.exclusive():
        expected = [
            decoded(runner, [begun(engine, prompt, 12, sampling=own)])[0]
            for prompt, own in zip(PROMPTS, options, strict=True)
        ]
        sequences = [begun(engine, prompt, 12, sampling=own) for prompt, own in zip(PROMPTS, options, strict=True)]
        while running := [sequence for sequence in sequences if sequence.status is Status.DECODING]:
            chosen = [sequence for sequence in running if random.random() < 0.8] or running[:1]
            match random.integers(8):
                case 0:
                    chosen[0].settle()
                case 1:
                    chosen[-1].cache.snapshot()
                case 2 if len(running) == 4:
                    chosen[0].cancel()
                case _:
                    runner.decode(chosen)
        for sequence, tokens in zip(sequences, expected, strict=True):
            assert sequence.token_ids == tokens[: len(sequence.token_ids)]
            assert sequence.cancelled or sequence.token_ids == tokens
