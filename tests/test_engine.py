"""The Python interface: generation, its limits, its measurements."""

import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY

import flashmoe_mlx
from flashmoe_mlx import engine as engine_module
from flashmoe_mlx.custom_kernels import choose
from flashmoe_mlx.custom_kernels.dense_experts import reference as dense_experts
from flashmoe_mlx.engine import Engine, Piece
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.generation.request import ConstraintOptions, PromptOptions, RequestOptions
from flashmoe_mlx.moe.by_expert import expert_weights
from flashmoe_mlx.stores.contract import StoreClosedError
from flashmoe_mlx.stores.delivery import ExpertBatch

PROMPT = "Hello, store"


@pytest.fixture
def engine(tiny_pack: Path) -> Iterator[Engine]:
    with flashmoe_mlx.load(tiny_pack) as opened:
        yield opened


def generated(engine: Engine, **options: Any) -> tuple[str, list[int], str | None]:
    pieces = list(engine.generate(PROMPT, **{"temperature": 0, **options}))
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    tokens = [token for piece in pieces for token in piece.token_ids]
    return "".join(piece.text for piece in pieces), tokens, pieces[-1].finish_reason


def test_greedy_is_the_argmax_of_the_logits(engine: Engine) -> None:
    text, tokens, reason = generated(engine, max_tokens=12)
    assert reason == "length"
    assert len(tokens) == 12
    assert text == engine.tokenizer.decode(tokens, skip_special_tokens=True)
    sequence = engine.encode(PROMPT)
    for token in tokens:
        assert token == engine.logits(sequence)[-1].argmax()
        sequence.append(token)


def test_a_seed_repeats_and_another_differs(engine: Engine) -> None:
    options = {"temperature": 1.5, "max_tokens": 24}
    first, again, other = (generated(engine, seed=seed, **options)[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_filters_that_leave_one_token_are_greedy(engine: Engine) -> None:
    greedy = generated(engine, max_tokens=8)
    for only in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert generated(engine, temperature=2.0, seed=3, max_tokens=8, **only) == greedy


def test_stop_token_ends_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokens, _ = generated(engine, max_tokens=8)
    stop = tokens[5]
    monkeypatch.setattr(engine.tokenizer, "eos_token_ids", frozenset([stop]))
    text, stopped, reason = generated(engine, max_tokens=8)
    assert reason == "stop"
    assert stopped == tokens[: tokens.index(stop) + 1]
    assert text == engine.tokenizer.decode(stopped[:-1], skip_special_tokens=True)


def test_messages_and_raw_prompts(engine: Engine) -> None:
    chat = engine.encode(PROMPT)
    assert chat == engine.encode([{"role": "user", "content": PROMPT}])
    assert engine.encode(PROMPT, raw=True) == list(PROMPT.encode())
    assert len(chat) > len(PROMPT)


def test_chunks_give_the_same_answer(engine: Engine) -> None:
    answers = {tuple(generated(engine, max_tokens=8, prefill_chunk=chunk)[1]) for chunk in (None, 1, 7, 64)}
    assert len(answers) == 1


def test_slots_fewer_than_experts_give_the_same_logits(tiny_pack: Path) -> None:
    tokens = list(range(5, 45))
    with flashmoe_mlx.load(tiny_pack) as wide, flashmoe_mlx.load(tiny_pack, slots=3) as narrow:
        np.testing.assert_array_equal(narrow.logits(tokens), wide.logits(tokens))
        assert narrow.stats()["store_total"]["fetches"] > wide.stats()["store_total"]["fetches"]


def test_kernels_agree_with_the_reference(tiny_pack: Path) -> None:
    tokens = list(range(5, 45))
    with flashmoe_mlx.load(tiny_pack) as fast, flashmoe_mlx.load(tiny_pack, kernels="reference") as plain:
        np.testing.assert_allclose(fast.logits(tokens), plain.logits(tokens), rtol=0, atol=1e-4)
        assert set(plain.setup["kernels"].values()) == {"reference"}


def test_profile_changes_only_times(tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack, profile=True) as split, flashmoe_mlx.load(tiny_pack) as whole:
        assert generated(split, max_tokens=6) == generated(whole, max_tokens=6)
        phases = split.stats()["decode"]["phase_seconds"]
    assert {"attention", "router_wait", "io", "experts", "head", "sample", "other"} == set(phases)
    assert min(phases.values()) >= 0


def test_a_decode_step_evaluates_once_a_layer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = engine.new_cache()
    engine.forward(engine.encode(PROMPT), cache)
    engine.forward([7], cache)  # kernels are compared with their references during loading
    calls = 0
    evaluate = mx.eval

    def counted(*arrays: mx.array) -> None:
        nonlocal calls
        calls += 1
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", counted)
    engine.forward([7], cache)
    assert calls == TINY.num_layers + 1  # and one for the logits


def test_experts_are_fetched_once_a_chunk(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[int, list[int]]] = []
    fetch = engine.store.fetch

    def recorded(layer: int, experts: list[int]) -> ExpertBatch:
        fetched.append((layer, list(experts)))
        return fetch(layer, experts)

    monkeypatch.setattr(engine.store, "fetch", recorded)
    engine.logits(list(range(100)))
    for layer in range(TINY.num_layers):
        asked = list(itertools.chain.from_iterable(experts for of, experts in fetched if of == layer))
        assert len(asked) == len(set(asked))


def test_counters_add_up(engine: Engine) -> None:
    generated(engine, max_tokens=10)
    stats = json.loads(json.dumps(engine.stats()))
    prefill, decode, total = stats["prefill"], stats["decode"], stats["store_total"]
    assert prefill["tokens"] == len(engine.encode(PROMPT))
    assert decode["tokens"] == 9  # the first token comes from the prompt
    assert decode["experts_requested"] == 9 * TINY.num_layers * TINY.experts_per_token
    record = engine.store.layout.record_bytes
    for stage in (prefill, decode):
        assert stage["bytes_read"] == stage["experts_requested"] * record
        assert stage["bytes_per_token"] == pytest.approx(stage["bytes_read"] / stage["tokens"])
        assert sum(stage["phase_seconds"].values()) == pytest.approx(stage["seconds"])
        assert stage["hits"] == 0
    assert total["bytes_read"] == prefill["bytes_read"] + decode["bytes_read"]
    assert stats["time_to_first_token"] > 0
    assert stats["finish_reason"] == "length"


def test_context_limit_ends_generation(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "eos_token_ids", frozenset())
    room = TINY.max_context - len(engine.encode(PROMPT))
    _, tokens, reason = generated(engine, max_tokens=10_000)
    assert reason == "length"
    assert len(tokens) == room + 1  # the last one is not fed back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: must be a whole number"),
        ({"max_tokens": "4"}, "max_tokens='4': must be a whole number"),
        ({"temperature": "hot"}, "temperature='hot': must be a number"),
        ({"top_k": 2.5}, "top_k=2.5: must be a whole number"),
        ({"seed": "x"}, "seed='x': must be a whole number"),
        ({"temperature": -0.1}, "temperature=-0.1: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan: must be 0"),
        ({"temperature": float("inf")}, "temperature=inf: must be 0"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"top_p": 1.1}, "top_p=1.1: must be above 0"),
        ({"top_k": -1}, "top_k=-1: must be 0"),
        ({"min_p": 2.0}, "min_p=2.0: must be from 0"),
        ({"seed": -1}, "seed=-1: must be a whole number"),
        ({"prefill_chunk": 0}, "prefill_chunk=0: must be a whole number"),
    ],
)
def test_options_are_checked_before_the_first_piece(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        engine.generate(PROMPT, **options)
    assert str(raised.value).startswith(message)


def test_prompt_longer_than_the_context(engine: Engine) -> None:
    with pytest.raises(InputError) as raised:
        engine.generate("x" * 300, raw=True)
    assert raised.value.code == "prompt_too_long"
    assert "300 tokens" in str(raised.value)


@pytest.mark.parametrize(("tokens", "code"), [([], "empty_prompt"), ([9999], "unknown_token"), ([-1], "unknown_token")])
def test_tokens_are_checked(engine: Engine, tokens: list[int], code: str) -> None:
    with pytest.raises(InputError) as raised:
        engine.logits(tokens)
    assert raised.value.code == code


@pytest.mark.parametrize("k", [0, -1, 17, 2.0, "4", True])
def test_experts_k_is_checked(tiny_pack: Path, k: Any) -> None:
    with pytest.raises(InputError, match="must be from 1 to 16"):
        flashmoe_mlx.load(tiny_pack, experts_k=k)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("nosuch", {}, "backend=nosuch: no such backend; there are checkpoint, io_uring"),
        (
            "pread",
            {"thread": 4},
            "backend.thread: no such option; did you mean backend.threads?",
        ),
        ("pread", {"threads": "4"}, "backend.threads='4': must be an integer from 1 to 1024"),
        ("pread", {"threads": 0}, "threads=0"),
        ("pread", {"slots": 0}, "backend.slots=0: must be an integer"),
        ("pread", {"variant": "q2"}, "no variant 'q2'; it has q4"),
        ({"_target_": "no.such.Store"}, {}, "backend: cannot import no.such.Store"),
        ({"_target_": "pathlib.Path"}, {}, "backend: pathlib.Path is not a subclass of ExpertStore"),
        ({}, {}, "backend: _target_ must name"),
    ],
)
def test_backends_are_checked(tiny_pack: Path, backend: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlashMoeError) as raised:
        flashmoe_mlx.load(tiny_pack, backend, **options)
    assert message in str(raised.value)


def test_a_closed_engine_raises_an_error(tiny_pack: Path) -> None:
    engine = flashmoe_mlx.load(tiny_pack)
    engine.close()
    engine.close()
    with pytest.raises(StoreClosedError):
        engine.logits([1, 2])


def test_an_abandoned_generation_does_not_affect_the_next(engine: Engine) -> None:
    whole = generated(engine, max_tokens=6)
    pieces = engine.generate(PROMPT, max_tokens=6)
    assert isinstance(next(pieces), Piece)
    pieces.close()
    assert generated(engine, max_tokens=6) == whole


def test_missing_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        flashmoe_mlx.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"neither a pack \(pack.json\) nor a checkpoint"):
        flashmoe_mlx.load(tmp_path)
    (tmp_path / ".packing").mkdir()
    with pytest.raises(InputError, match="packing did not finish"):
        flashmoe_mlx.load(tmp_path)


def test_records_are_read_in_place(engine: Engine) -> None:
    batch = engine.store.fetch(0, [3, 5])
    weights = expert_weights(batch.slab[1:2].reshape(-1), engine.store.layout[0])
    mx.eval(weights.down.weight)
    slab, inside = np.asarray(batch.slab), np.asarray(weights.down.weight)
    offset = inside.__array_interface__["data"][0] - slab.__array_interface__["data"][0]
    record = engine.store.layout.record_bytes
    assert record < offset < 2 * record


@pytest.mark.parametrize("slots", [3, 16])
def test_experts_of_a_prompt_by_dense_matrices(slots: int, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(40))
    with flashmoe_mlx.load(tiny_pack, slots=slots) as engine:
        expected = engine.logits(tokens)
    made_of: list[int] = []

    def dense(slab: mx.array, rows: mx.array, *rest: object) -> tuple[mx.array, mx.array, mx.array]:
        made_of.append(len(rows))
        return dense_experts.dense_experts(slab, rows, *rest)

    monkeypatch.setattr(engine_module, "choose", lambda *_: replace(choose("mlx"), dense_experts=dense))
    with flashmoe_mlx.load(tiny_pack, slots=slots) as engine:
        np.testing.assert_allclose(engine.logits(tokens), expected, atol=1e-4)
    assert 0 < max(made_of) <= slots


def test_threads_may_share_an_engine_in_turn(tiny_pack: Path) -> None:
    with ThreadPoolExecutor(1) as worker:
        engine = worker.submit(flashmoe_mlx.load, tiny_pack).result()
        tokens = list(range(20))
        here = engine.logits(tokens)
        np.testing.assert_array_equal(worker.submit(engine.logits, tokens).result(), here)
        engine.close()


def test_a_failed_pass_breaks_only_its_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = engine.encode(PROMPT)
    expected = engine.logits(tokens)
    cache = engine.new_cache()
    with monkeypatch.context() as patched:
        patched.setattr(engine.store, "fetch", lambda layer, experts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.forward(tokens, cache)
    with pytest.raises(InputError, match=r"failed halfway: begin again with new_cache\(\)"):
        engine.forward(tokens, cache)
    np.testing.assert_array_equal(engine.logits(tokens), expected)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("metal", marks=pytest.mark.metal),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)
def test_logits_on_a_gpu_equal_logits_on_a_cpu(tiny_pack: Path, where: str) -> None:
    tokens = list(range(5, 45))
    with flashmoe_mlx.load(tiny_pack) as engine:
        assert engine.setup["activations"] == "mlx.core.bfloat16"
        got = engine.logits(tokens)
    mx.set_default_device(mx.cpu)
    with flashmoe_mlx.load(tiny_pack) as engine:
        expected = engine.logits(tokens)
    # bf16 may turn a close choice of the router; most tokens must still be close.
    close = np.abs(got - expected).max(-1) < 0.1 * np.abs(expected).max()
    assert close.mean() > 0.9


def test_unknown_options_are_refused(engine: Engine) -> None:
    with pytest.raises(TypeError, match=r"'max_token'; the options of a request are .*max_tokens"):
        engine.generate("a", max_token=3)  # type: ignore[call-arg]


def test_every_option_is_documented() -> None:
    text = f"{PromptOptions.__doc__}{ConstraintOptions.__doc__}{RequestOptions.__doc__}"
    assert set(re.findall(r"^ {8}(\w+):", text, re.MULTILINE)) == set(RequestOptions.__annotations__)
