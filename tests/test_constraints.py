"""Constraints: answers follow their grammars, forced tokens change nothing, and refusals are clear."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation import grammars
from flashmoe_mlx.generation.constraints import ConstrainedAnswer, Constraint
from flashmoe_mlx.generation.grammars import Grammars
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.research.quality.items import load_items, shipped_items
from flashmoe_mlx.tasks.generate import Config
from flashmoe_mlx.tasks.shared.constraints import constraint_options
from flashmoe_mlx.text.tokenizer import Tokenizer
from flashmoe_mlx.text.tool_calls import parse_tool_calls

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tall": {"type": "boolean"}},
    "required": ["name", "age", "tall"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["town", "days"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
VOCABULARY = 2048


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with flashmoe_mlx.load(request.getfixturevalue("demo_pack"), prompt_cache_gib=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def compiler(request: pytest.FixtureRequest) -> Grammars:
    return Grammars(Tokenizer.load(request.getfixturevalue("demo_pack")), VOCABULARY, "qwen_xml")


def compiled(compiler: Grammars, tools: Any = None, **options: Any) -> Constraint:
    constraint = compiler.constraint(options, tools, raw=True, thinking=None)
    assert constraint is not None
    return constraint


def walk(constraint: Constraint, seed: int, steps: int = 400) -> str:
    """Choose random tokens that the constraint allows, then those that end texts; return the text."""
    random = np.random.default_rng(seed)
    tokenizer = constraint.tokenizer
    ends = sorted(tokenizer.eos_token_ids)
    closing = [token for text in '"}],0:' for token in tokenizer.encode(text)]
    letter, newline = tokenizer.encode("k") + tokenizer.encode("\n")
    queue: list[int] = []
    answer = constraint.begin([], ends)
    tokens: list[int] = []
    while not answer.complete and len(tokens) < steps:
        allowed = answer.allowed()
        assert allowed is not None
        assert allowed.any()
        if allowed[ends].any() and (len(tokens) > 30 or allowed.sum() <= len(ends) or random.random() < 0.3):
            return tokenizer.decode(tokens)
        if len(tokens) > 30 and not queue and allowed[letter] and allowed[newline]:
            queue = tokenizer.encode("\n</parameter>\n")  # ends text without quotes
        choices = [token for token in closing if allowed[token]][:1] if len(tokens) > 30 else []
        choices = [queue.pop(0)] if queue else choices
        tokens.append(int(random.choice(choices or np.flatnonzero(allowed & ~np.isin(range(VOCABULARY), ends)))))
        answer.add(tokens[-1])
        forced = answer.forced()
        if forced:
            mask = answer.allowed()
            assert mask is not None
            assert np.flatnonzero(mask).tolist() == forced[:1]
    assert answer.complete, tokenizer.decode(tokens)
    return tokenizer.decode(tokens)


# Random grammars

SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 6},
        {"enum": ["a", "b c", 3, None]},
        {"const": "é"},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
    ]
)


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "key with space", "ä", "x1", "z", "q"])
    return st.dictionaries(names, values, max_size=7).flatmap(
        lambda properties: st.lists(st.sampled_from(sorted(properties) or ["a"]), unique=True).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": [name for name in required if name in properties],
                "additionalProperties": False,
            }
        )
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3}),
        objects(inner),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_every_answer_satisfies_its_schema(compiler: Grammars, schema: Any, seed: int) -> None:
    jsonschema.validate(json.loads(walk(compiled(compiler, schema=schema), seed)), schema)


@settings(max_examples=40, deadline=None)
@given(parameters=objects(SCALARS), seed=st.integers(0, 2**32))
def test_every_call_has_typed_arguments(compiler: Grammars, parameters: Any, seed: int) -> None:
    tools = [{"type": "function", "function": {"name": "do_it", "parameters": parameters}}]
    constraint = compiled(compiler, tools, tool_choice="required", parallel_tool_calls=False)
    text = walk(constraint, seed)
    rest, (call,) = parse_tool_calls(text, tools)
    assert (rest, call.name, call.complete) == ("", "do_it", True)
    assert set(parameters["required"]) <= call.arguments.keys() <= parameters["properties"].keys()
    for name, value in call.arguments.items():
        schema = parameters["properties"][name]
        if schema.get("type") != "string" and not any(isinstance(word, str) for word in schema.get("enum", ())):
            jsonschema.validate(value, schema)


@settings(max_examples=40, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32), more=st.integers(0, 40))
def test_an_answer_fits_into_its_tokens(compiler: Grammars, schema: Any, seed: int, more: int) -> None:
    """Random tokens, corrected by ``fitting``, are a complete answer within any number of tokens that can hold one."""
    constraint = compiled(compiler, schema=schema)
    random = np.random.default_rng(seed)
    ends = sorted(constraint.tokenizer.eos_token_ids)
    shortest = constraint.endings.find(constraint.matcher)
    assert shortest is not None
    answer, tokens, left = constraint.begin([], ends), [], len(shortest) + more
    while left and not answer.complete:
        allowed = answer.allowed()
        assert allowed is not None
        token = answer.fitting(int(random.choice(np.flatnonzero(allowed))), left)
        assert allowed[token]
        if token in ends:
            break
        answer.add(token)
        tokens.append(token)
        left -= 1
    jsonschema.validate(json.loads(constraint.tokenizer.decode(tokens)), schema)


@pytest.mark.parametrize("options", [{}, {"frequency_penalty": 0.5}, {"temperature": 1.5, "seed": 2}])
def test_a_model_that_never_ends_a_string(engine: Engine, options: dict[str, Any]) -> None:
    """The answer is complete, its end is "length", and an answer that leaves a few tokens is not changed."""
    quotes = [token for token in range(VOCABULARY) if b'"' in engine.tokenizer.token_bytes(token)]
    endless = {**options, "schema": PERSON, "logit_bias": dict.fromkeys(quotes, -60.0), "max_tokens": 50}
    text, (pieces, _) = run(engine, "Who is it?", **endless)
    jsonschema.validate(json.loads(text), PERSON)
    assert pieces[-1].finish_reason == "length"
    assert sum(len(piece.token_ids) for piece in pieces) <= 50
    question = "Bram is 45 years old and tall. Who is it?"
    whole, (pieces, _) = run(engine, question, **options, schema=PERSON, max_tokens=200)
    assert pieces[-1].finish_reason == "stop"
    count = sum(len(piece.token_ids) for piece in pieces)
    again, (pieces, _) = run(engine, question, **options, schema=PERSON, max_tokens=count + 10)
    assert (again, pieces[-1].finish_reason) == (whole, "stop")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"regex": r"[0-9]{3}-(ab|cd)+"}, r"[0-9]{3}-(ab|cd)+"),
        ({"choices": ["red", "green\n", 'qu"ote']}, 'red|green\n|qu"ote'),
        ({"grammar": 'start: "a" b*\nb: "b" | "c"'}, "a[bc]*"),
        ({"json_object": True}, r"(?s)\{.*\}"),
    ],
)
def test_other_grammars(compiler: Grammars, options: dict[str, Any], pattern: str) -> None:

    for seed in range(5):
        assert re.fullmatch(pattern, walk(compiled(compiler, **options), seed))


# The engine


def run(engine: Engine, prompt: Any, **options: Any) -> tuple[str, Any]:
    generation = engine.generate(prompt, **{"temperature": 0, "max_tokens": 56, **options})
    pieces = list(generation)
    return "".join(piece.text for piece in pieces), (pieces, generation.metrics)


@pytest.mark.thorough
def test_an_answer_that_is_valid_anyway_does_not_change(engine: Engine) -> None:
    compared = 0
    for item in load_items(shipped_items(), ["json", "tool_call"], limit=4):
        options: dict[str, Any] = {"tools": item.tools or None, "enable_thinking": False}
        text, _ = run(engine, item.messages, **options)
        if item.schema is not None:
            if text == item.answer:
                compared += 1
                assert run(engine, item.messages, schema=item.schema, **options)[0] == text
            continue
        if parse_tool_calls(text, item.tools)[1]:
            for choice in ("auto", "required"):
                compared += 1
                assert run(engine, item.messages, tool_choice=choice, parallel_tool_calls=False, **options)[0] == text
    assert compared >= 6


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize(
    "options", [{"schema": PERSON}, {"tools": TOOLS, "tool_choice": "required", "frequency_penalty": 0.1}]
)
def test_forced_tokens_change_nothing(
    engine: Engine, options: dict[str, Any], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "temperature": temperature, "seed": 3, "max_tokens": 40}
    text, (pieces, metrics) = run(engine, "How warm is it?", **options)
    monkeypatch.setattr(ConstrainedAnswer, "forced", lambda _: [])
    plain_text, (plain_pieces, plain) = run(engine, "How warm is it?", **options)
    tokens = [token for piece in pieces for token in piece.token_ids]
    assert tokens == [token for piece in plain_pieces for token in piece.token_ids]
    assert (text, pieces[-1].finish_reason) == (plain_text, plain_pieces[-1].finish_reason)
    assert metrics.forced_tokens > 0
    assert plain.forced_tokens == 0
    assert len(metrics.decode.steps) <= len(plain.decode.steps) - metrics.forced_tokens + 1


def test_the_state_after_forced_tokens_is_that_of_single_steps(engine: Engine) -> None:
    generation = engine.generate("How warm is it?", schema=PERSON, temperature=0, max_tokens=12)
    tokens = [token for piece in generation for token in piece.token_ids]
    generation = engine.generate("How warm is it?", schema=PERSON, temperature=0, max_tokens=12, logprobs=0)
    single = [entry.token_id for piece in generation for entry in piece.logprobs]
    assert tokens == single
    assert generation.metrics.forced_tokens == 0


def test_several_constraints_at_once(engine: Engine) -> None:
    requests: list[dict[str, Any]] = [
        {"schema": PERSON},
        {},
        {"choices": ["yes", "no"]},
        {"tools": TOOLS, "tool_choice": {"name": "weather"}},
        {"regex": "[0-9]{4}"},
    ]
    alone = [run(engine, "Who is it?", **options)[0] for options in requests]
    scheduler = Scheduler(engine.runner)
    sequences = [
        engine.runner.begin(engine.request("Who is it?", **{"temperature": 0, "max_tokens": 56, **options}))
        for options in requests
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    with engine.runner.exclusive():
        while scheduler.unfinished:
            scheduler.step()
    assert [engine.tokenizer.decode(sequence.token_ids, skip_special_tokens=True) for sequence in sequences] == alone


def test_choices_of_tools(engine: Engine) -> None:
    def calls(**options: Any) -> list[str]:
        text, _ = run(engine, "What time is it?", tools=TOOLS, parallel_tool_calls=False, **options)
        return [call.name for call in parse_tool_calls(text, TOOLS)[1] if call.complete]

    assert len(calls(tool_choice="required")) == 1
    assert calls(tool_choice={"type": "function", "function": {"name": "now"}}) == ["now"]
    assert calls(tool_choice="none") == []
    made = calls(tool_choice="auto", logit_bias={engine.tokenizer.added_tokens["<tool_call>"]: 50})
    assert len(made) == 1


def test_an_answer_or_calls(engine: Engine) -> None:
    text, _ = run(engine, "Who is it?", tools=TOOLS, tool_choice="auto", schema=PERSON)
    if not parse_tool_calls(text, TOOLS)[1]:
        jsonschema.validate(json.loads(text), PERSON)


def test_a_cut_answer_ends_by_length(engine: Engine) -> None:
    _, (pieces, _) = run(engine, "Who is it?", schema=PERSON, max_tokens=4)
    assert pieces[-1].finish_reason == "length"
    assert sum(len(piece.token_ids) for piece in pieces) == 4


def test_a_constraint_begins_after_thinking(compiler: Grammars) -> None:
    constraint = compiler.constraint({"schema": PERSON}, None, raw=False, thinking=True)
    assert constraint is not None
    tokenizer = constraint.tokenizer
    end = next(iter(tokenizer.eos_token_ids))
    answer = constraint.begin(tokenizer.encode("<|im_start|>assistant\n<think>\n"), [end])
    thought, newlines = tokenizer.encode("I think.\n</think>"), tokenizer.encode("\n\n")
    for token in thought:
        allowed = answer.allowed()
        assert allowed is not None
        assert allowed[token]
        assert not allowed[end]
        answer.add(token)
    for token in newlines + tokenizer.encode('{"'):
        allowed = answer.allowed()
        assert allowed is not None
        assert allowed[token]
        assert not allowed[tokenizer.encode("x")[0]]
        answer.add(token)


@pytest.mark.parametrize(("thinking", "may"), [(None, True), (True, True), (False, False)])
def test_a_model_may_open_its_thinking(compiler: Grammars, thinking: bool | None, may: bool) -> None:
    constraint = compiler.constraint({"choices": ["a"]}, None, raw=False, thinking=thinking)
    assert constraint is not None
    tokenizer = constraint.tokenizer
    think = tokenizer.added_tokens["<think>"]
    for prompt, expected in (
        ("<|im_start|>assistant\n", may),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
    ):
        answer = constraint.begin(tokenizer.encode(prompt), [])
        allowed = answer.allowed()
        assert allowed is not None
        assert allowed[think] == expected


# Refusals


def nested(depth: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"schema": {"not": {"type": "null"}}}, "unsupported_schema"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "unsupported_schema"),
        ({"schema": {"$ref": "#"}}, "unsupported_schema"),
        ({"schema": {"$ref": "https://example.com/schema.json"}}, "unsupported_schema"),
        ({"schema": {"enum": []}}, "unsupported_schema"),
        ({"schema": [1]}, "unsupported_schema"),
        ({"schema": {"const": float("nan")}}, "unsupported_schema"),
        ({"schema": {"type": object()}}, "unsupported_schema"),
        ({"schema": nested(40)}, "unsupported_schema"),
        ({"schema": nested(20000)}, "unsupported_schema"),
        ({"schema": {"enum": [f"word {number}" for number in range(10000)]}}, "unsupported_schema"),
        ({"regex": "(a"}, "unsupported_grammar"),
        ({"regex": r"(?=a)b"}, "unsupported_grammar"),
        ({"regex": "(" * 60000}, "unsupported_grammar"),
        ({"regex": 5}, "unsupported_grammar"),
        ({"grammar": "start: missing"}, "unsupported_grammar"),
        ({"choices": []}, "unsupported_grammar"),
        ({"choices": "abc"}, "unsupported_grammar"),
        ({"choices": ["a", ""]}, "unsupported_grammar"),
        ({"schema": {}, "regex": "a"}, "invalid_constraint"),
        ({"json_object": 1}, "invalid_constraint"),
        ({"regex": "a", "tools": TOOLS, "tool_choice": "auto"}, "invalid_constraint"),
        ({"tool_choice": "required"}, "invalid_tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "invalid_tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"name": "other"}}, "invalid_tool_choice"),
    ],
)
def test_what_cannot_be_enforced_is_refused(compiler: Grammars, options: dict[str, Any], code: str) -> None:
    tools = options.pop("tools", None) if "tools" in options else None
    start = time.monotonic()
    with pytest.raises(InputError) as refusal:
        compiler.constraint(options, tools, raw=True, thinking=None)
    assert refusal.value.code == code
    assert len(str(refusal.value)) < 700
    assert time.monotonic() - start < 5


def test_names_that_the_format_cannot_hold(compiler: Grammars, caplog: pytest.LogCaptureFixture) -> None:
    tools = [{"type": "function", "function": {"name": "a>b"}}]
    with pytest.raises(InputError) as refusal:
        compiler.constraint({"tool_choice": "required"}, tools, raw=True, thinking=None)
    assert refusal.value.code == "unsupported_tools"
    assert compiler.constraint({"tool_choice": "auto"}, tools, raw=True, thinking=None) is None
    assert "a>b" in caplog.text


def test_without_llguidance(compiler: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "grammars_available", lambda: False)
    with pytest.raises(InputError, match="needs the extra grammar: pip install") as refusal:
        compiler.constraint({"json_object": True}, None, raw=True, thinking=None)
    assert refusal.value.code == "missing_extra"
    assert compiler.constraint({"tool_choice": "auto"}, TOOLS, raw=True, thinking=None) is None
    assert compiler.constraint({"tool_choice": "none"}, TOOLS, raw=True, thinking=None) is None


def test_schemas_of_parameters_that_cannot_be_enforced_keep_their_types(compiler: Grammars) -> None:
    tools = [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {
                    "properties": {"n": {"$ref": "#/$defs/Odd"}},
                    "required": ["n"],
                    "$defs": {"Odd": {"type": "integer", "not": {"const": 2}}},
                },
            },
        }
    ]
    constraint = compiled(compiler, tools, tool_choice="required", parallel_tool_calls=False)
    _, (call,) = parse_tool_calls(walk(constraint, 0), tools)
    assert isinstance(call.arguments["n"], int)


def test_constraints_from_files(tmp_path: Path) -> None:
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    (tmp_path / "word.lark").write_text('start: "a" "b"+')
    config = Config(schema=str(tmp_path / "person.json"))
    assert constraint_options(config)["schema"] == PERSON
    assert constraint_options(Config(grammar=str(tmp_path / "word.lark")))["grammar"] == 'start: "a" "b"+'
    with pytest.raises(InputError, match="no such file"):
        constraint_options(Config(schema=str(tmp_path / "missing.json")))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError) as refusal:
        constraint_options(Config(schema=str(tmp_path / "list.json")))
    assert refusal.value.code == "unsupported_schema"
