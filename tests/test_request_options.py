"""Options of requests, each against a plain loop over the logits of the whole sequence, alone and scheduled."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.generation.sequence import Sequence

PROMPT = "Hello, store"


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with flashmoe_mlx.load(request.getfixturevalue("tiny_pack")) as opened:
        yield opened


def plainly(engine: Engine, count: int, **options: Any) -> list[int]:
    """Decode greedily, with the definition of each option written out."""
    prompt = engine.encode(PROMPT)
    generated: list[int] = []
    stops = set(options.get("stop_token_ids", ()))
    while len(generated) < count:
        logits = engine.logits([*prompt, *generated])[-1].astype(np.float64)
        for token, bias in options.get("logit_bias", {}).items():
            logits[token] += -np.inf if bias == -100 else bias
        for token in {*prompt, *generated}:
            penalty = options.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        for token in set(generated):
            logits[token] -= options.get("presence_penalty", 0.0)
            logits[token] -= options.get("frequency_penalty", 0.0) * generated.count(token)
        if len(generated) < options.get("min_tokens", 0):
            logits[list(stops)] = -np.inf
        generated.append(int(logits.argmax()))
        if generated[-1] in stops:
            break
    return generated


def scheduled(engine: Engine, requests: list[dict[str, Any]]) -> list[Sequence]:
    scheduler = Scheduler(engine.runner, prefill_tokens=5)
    sequences = [engine.runner.begin(engine.request(PROMPT, **options)) for options in requests]
    for sequence in sequences:
        scheduler.add(sequence)
    with engine.runner.exclusive():
        while scheduler.unfinished:
            scheduler.step()
    return sequences


def test_options_equal_their_definitions_alone_and_together(engine: Engine) -> None:
    free = plainly(engine, 8)
    cases: list[dict[str, Any]] = [
        {},
        {"logit_bias": {free[0]: -100, free[1]: -2.5, 7: 1.0}},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.2, "logit_bias": {free[0]: -0.5}},
        {"stop_token_ids": [free[2]]},
        {"stop_token_ids": [free[2], free[3]], "min_tokens": 5},
        {"stop_token_ids": [free[0]], "min_tokens": 2, "frequency_penalty": 0.5},
    ]
    expected = [plainly(engine, 8, **case) for case in cases]
    requests = [{"max_tokens": 8, "temperature": 0, "ignore_eos": True, **case} for case in cases]
    alone = [
        [token for piece in engine.generate(PROMPT, **options) for token in piece.token_ids] for options in requests
    ]
    assert alone == expected
    together = scheduled(engine, requests)
    assert [sequence.token_ids for sequence in together] == expected
    assert together[5].finish_reason == "stop"


def test_ids_of_biases_may_be_text(engine: Engine) -> None:
    assert engine.request("a", logit_bias={"12": 3}).logit_bias == {12: 3.0}


def test_stop_strings_wait_for_the_least_length(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    free = "".join(piece.text for piece in engine.generate(PROMPT, **options))
    stop = [character for character in dict.fromkeys(free) if character.isprintable()][:2]
    least = list(engine.generate(PROMPT, stop=stop, min_tokens=12, **options))
    assert "".join(piece.text for piece in least).startswith(free[:-1])
    early = list(engine.generate(PROMPT, stop=stop, **options))
    assert early[-1].stop in stop


@pytest.mark.parametrize("together", [1, 3])
def test_log_probabilities_of_prompt_and_answer(engine: Engine, together: int) -> None:
    options = {"max_tokens": 3, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True}
    for sequence in scheduled(engine, [options] * together):
        tokens = [*sequence.request.prompt_ids, *sequence.token_ids]
        logits = engine.logits(tokens[:-1]).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found = [*sequence.prompt_logprobs, *sequence.logprobs]
        assert [entry.token_id for entry in found] == tokens[1:]
        for row, entry in zip(expected, found, strict=True):
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-5)
            assert entry.top[0][1] == pytest.approx(row.max(), abs=1e-5)
            assert (entry.logprob == entry.top[0][1]) == (entry.token_id == entry.top[0][0])
        assert all(entry.logprob == max(value for _, value in entry.top) for entry in sequence.logprobs)


def test_log_probabilities_of_a_prompt_do_not_depend_on_chunks_or_earlier_prompts(engine: Engine) -> None:
    found = []
    for chunk in (3, 1024):
        generation = engine.generate(PROMPT, max_tokens=1, prompt_logprobs=0, prefill_chunk=chunk)
        list(generation)
        found.append([entry.logprob for entry in generation.prompt_logprobs])
    assert len(found[0]) == len(engine.encode(PROMPT)) - 1
    assert found[0] == pytest.approx(found[1], abs=1e-4)  # kernels for few rows sum in another order


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "invalid_min_tokens"),
        ({"min_tokens": -1}, "invalid_min_tokens"),
        ({"min_tokens": True}, "invalid_min_tokens"),
        ({"stop_token_ids": "12"}, "invalid_stop"),
        ({"stop_token_ids": [-1]}, "invalid_stop"),
        ({"stop_token_ids": [1.0]}, "invalid_stop"),
        ({"stop_token_ids": list(range(99))}, "invalid_stop"),
        ({"logit_bias": [1]}, "invalid_logit_bias"),
        ({"logit_bias": {"x": 1}}, "invalid_logit_bias"),
        ({"logit_bias": {10**9: 1}}, "invalid_logit_bias"),
        ({"logit_bias": {1: 101}}, "invalid_logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "invalid_logit_bias"),
        ({"prompt_logprobs": True}, "invalid_logprobs"),
    ],
)
def test_values_out_of_range_are_refused(engine: Engine, options: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as refusal:
        engine.request("a", **options)
    assert refusal.value.code == code
