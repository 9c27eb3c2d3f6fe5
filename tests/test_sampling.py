"""The choice of a token: filters, penalties, published options, and logits from which no token can be chosen."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.generation.logits import CountPenalty, RepetitionPenalty, TokenHistory, checked_logits
from flashmoe_mlx.generation.sampling import PublishedSampling, Sampler, SamplingOptions

Logits = npt.NDArray[np.float32]


@pytest.mark.parametrize("temperature", [1e-310, 1e-3, 1.0, 50.0])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.7, "min_p": 0.1}]
)
def test_filters_keep_the_tokens_of_their_definition(temperature: float, options: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(0, 4, 50).astype(np.float32)
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    order = np.argsort(-scaled)
    probabilities = np.exp(scaled[order]) / np.exp(scaled).sum()
    # The definition, token by token.
    kept = list(zip(order.tolist(), probabilities.tolist(), strict=True))[: options.get("top_k") or None]
    kept = [(token, p / sum(p for _, p in kept)) for token, p in kept]
    if "top_p" in options:
        before = np.cumsum([0.0] + [p for _, p in kept])
        kept = [pair for pair, mass in zip(kept, before, strict=False) if mass < options["top_p"]]
    kept = [pair for pair in kept if pair[1] >= options.get("min_p", 0.0) * kept[0][1]]
    allowed = {token for token, p in kept if p > 1e-12}
    sampler = Sampler(SamplingOptions(temperature, **options), seed=0)
    drawn = {sampler(logits) for _ in range(2000)}
    assert drawn <= {token for token, _ in kept}
    assert {token for token, p in kept if p > 0.01} <= drawn
    assert allowed
    assert sampler(logits) in allowed


# Logits


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        ([0, np.nan], "NaN"),
        ([0, np.inf], "+inf"),
        ([np.inf, np.nan], "NaN"),
        ([-np.inf, -np.inf], "every token impossible"),
        ([[0, 1], [np.nan, 0]], "NaN"),
        ([[0, 1], [-np.inf, -np.inf]], "every token impossible"),
    ],
)
def test_logits_without_a_possible_token_are_refused(logits: Any, reason: str) -> None:
    array = np.array(logits, np.float32)
    calls: list[Any] = [checked_logits]
    if array.ndim == 1:
        calls += [Sampler(SamplingOptions(temperature)) for temperature in (0.0, 1.0)]
        calls += [Sampler(SamplingOptions(repetition_penalty=1.5, presence_penalty=1.0))]
    for call in calls:
        with pytest.raises(FlashMoeError, match="the model's logits .*" + reason.replace("+", r"\+")) as raised:
            call(array)
        assert raised.value.code == "bad_logits"


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.just(-math.inf), st.floats(-100, 100, width=32)), min_size=1, max_size=20),
    st.sampled_from([0.0, 1e-310, 0.5, 1.0, 1e308]),
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1e300}]),
)
def test_an_impossible_token_is_never_chosen(values: list[float], temperature: float, options: dict[str, Any]) -> None:
    logits = np.array(values, np.float32)
    if np.isneginf(logits).all():
        return
    sampler = Sampler(SamplingOptions(temperature, presence_penalty=2.0, **options), 0, [0])
    for _ in range(10):
        assert np.isfinite(logits[sampler(logits)])


# Penalties, each against its definition


floats = st.floats(-1e6, 1e6, width=32)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    logits = draw(st.lists(floats, min_size=1, max_size=12))
    tokens = st.lists(st.integers(0, len(logits) - 1), max_size=15)
    return logits, draw(tokens), draw(tokens)


def history(logits: list[float], prompt: list[int], generated: list[int]) -> TokenHistory:
    made = TokenHistory(prompt, len(logits))
    for token in generated:
        made.add(token)
    return made


@settings(deadline=None)
@given(sequences(), st.floats(0.01, 100))
def test_repetition_penalty(sequence: tuple[list[float], list[int], list[int]], penalty: float) -> None:
    """As transformers defines it: each token of the prompt and the answer is penalized once."""
    logits, prompt, generated = sequence
    expected = list(logits)
    for token in {*prompt, *generated}:
        expected[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    before = np.array(logits)
    found = RepetitionPenalty(penalty)(before, history(*sequence))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(before, logits)  # the argument is not changed


@settings(deadline=None)
@given(sequences(), st.floats(-2, 2), st.floats(-2, 2))
def test_count_penalties(sequence: tuple[list[float], list[int], list[int]], presence: float, frequency: float) -> None:
    """As vLLM defines them: logits -= frequency * count, logits -= presence * (count > 0), over generated tokens."""
    logits, _, generated = sequence
    expected = [
        value - frequency * generated.count(token) - presence * (token in generated)
        for token, value in enumerate(logits)
    ]
    before = np.array(logits)
    np.testing.assert_allclose(CountPenalty(presence, frequency)(before, history(*sequence)), expected, atol=1e-9)
    np.testing.assert_array_equal(before, logits)


@settings(deadline=None)
@given(sequences(), st.floats(0.5, 3), st.floats(-2, 2), st.floats(-2, 2), st.integers(1, 20))
def test_greedy_with_penalties(
    sequence: tuple[list[float], list[int], list[int]],
    repetition: float,
    presence: float,
    frequency: float,
    steps: int,
) -> None:
    """The sampler counts its own tokens; repetition comes first, as in transformers and vLLM."""
    logits, prompt, _ = sequence
    options = SamplingOptions(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    sampler, generated = Sampler(options, prompt=prompt), list[int]()
    for _ in range(steps):
        scores = [float(np.float32(value)) for value in logits]
        for token in {*prompt, *generated}:
            scores[token] = scores[token] * repetition if scores[token] < 0 else scores[token] / repetition
        scores = [
            value - frequency * generated.count(token) - presence * (token in generated)
            for token, value in enumerate(scores)
        ]
        chosen = sampler(np.array(logits, np.float32))
        assert scores[chosen] == pytest.approx(max(scores), abs=1e-6, rel=1e-9)
        generated.append(chosen)


# Published options


def published(folder: Path, content: object) -> PublishedSampling:
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return PublishedSampling.load(folder)


QWEN = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}


@pytest.mark.parametrize(
    ("content", "asked", "options", "description"),
    [
        ({}, {}, {}, "greedy"),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, {}, {"top_k": 20}, "greedy"),
        ({"temperature": 0.7, "top_p": 0.8}, {}, {"top_p": 0.8}, "greedy"),
        (QWEN, {}, {"temperature": 1.0, "top_k": 20, "top_p": 0.95},
         "temperature 1.0, top_k 20, top_p 0.95 (model's own)"),
        (QWEN, {"temperature": 0}, {}, "greedy"),
        (QWEN, {"temperature": 0.0, "presence_penalty": 1.5}, {"presence_penalty": 1.5},
         "greedy, presence_penalty 1.5"),
        (QWEN, {"temperature": 0.6, "top_k": 0}, {"temperature": 0.6, "top_p": 0.95},
         "temperature 0.6, top_p 0.95 (model's own: top_p)"),
        (QWEN, {"temperature": 0.6, "top_k": 5, "top_p": 1.0}, {"temperature": 0.6, "top_k": 5},
         "temperature 0.6, top_k 5"),
        ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}, "temperature 1.0, top_k 50 (model's own)"),
        ({"do_sample": True, "top_k": 0, "top_p": None}, {}, {"temperature": 1.0}, "temperature 1.0 (model's own)"),
        ({"do_sample": None, "temperature": None}, {}, {}, "greedy"),
        ({"repetition_penalty": 1.05}, {}, {"repetition_penalty": 1.05},
         "greedy, repetition_penalty 1.05 (model's own)"),
        ({"repetition_penalty": 1.05}, {"temperature": 0}, {}, "greedy"),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1}, {}, "greedy"),
        ({"top_p": 0.8, "min_p": 0.05}, {"temperature": 2}, {"temperature": 2, "top_p": 0.8, "min_p": 0.05},
         "temperature 2, top_p 0.8, min_p 0.05 (model's own: top_p, min_p)"),
        ({"frequency_penalty": 0.5, "presence_penalty": -1}, {},
         {"frequency_penalty": 0.5, "presence_penalty": -1},
         "greedy, presence_penalty -1, frequency_penalty 0.5 (model's own)"),
    ],
)  # fmt: skip
def test_published_and_requested_options(
    tmp_path: Path, content: dict[str, Any], asked: dict[str, Any], options: dict[str, Any], description: str
) -> None:
    chosen = published(tmp_path, content).choose(**asked)
    assert chosen.options == SamplingOptions(**options)
    assert chosen.describe() == description
    record = json.loads(json.dumps(chosen.to_json()))
    assert record["description"] == description
    assert record["temperature"] == chosen.options.temperature


def test_without_a_file_it_is_greedy(tmp_path: Path) -> None:
    assert PublishedSampling.load(tmp_path).choose(top_k=None).options == SamplingOptions()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", "yes"), ("do_sample", 1), ("temperature", "hot"), ("temperature", -1), ("temperature", True),
        ("temperature", [1.0]), ("temperature", 10**400), ("top_k", 20.5), ("top_k", 20.0), ("top_k", -1),
        ("top_k", "20"), ("top_k", False), ("top_p", 0), ("top_p", 1.5), ("top_p", {}), ("min_p", -0.1), ("min_p", 2),
        ("repetition_penalty", 0), ("repetition_penalty", "1.1"), ("presence_penalty", 3), ("frequency_penalty", "x"),
    ],
)  # fmt: skip
def test_malformed_values_of_a_file_are_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(InputError) as raised:
        published(tmp_path, {"do_sample": True, key: value})
    assert raised.value.code == "invalid_generation_config"
    assert str(raised.value).startswith(f"{tmp_path / 'generation_config.json'}: {key}=")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"temperature": NaN}', '{"temperature": Infinity}', '{"top_p": -Infinity}']
)
def test_files_that_hold_no_settings(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json"):
        published(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan), ("repetition_penalty", "1"), ("presence_penalty", 2.1),
        ("presence_penalty", math.nan), ("frequency_penalty", -2.1), ("frequency_penalty", True),
        ("temperature", False), ("min_p", math.nan), ("top_p", math.nan),
    ],
)  # fmt: skip
def test_options_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InputError) as raised:
        SamplingOptions(**{name: value})
    assert raised.value.code == "invalid_sampling"
    assert str(raised.value).startswith(f"{name}={value!r}: ")
