"""Judging answers, and scoring tokens through the decode path."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_generation import checkpoint, scripted

from flashmoe_mlx import load
from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.research.intervals import ratio_interval, share_interval
from flashmoe_mlx.research.quality.answering import check_constraints
from flashmoe_mlx.research.quality.evaluation import _Scores, _statistics, evaluate
from flashmoe_mlx.research.quality.items import Item, judge, load_items, shipped_items
from flashmoe_mlx.research.quality.passages import passage
from flashmoe_mlx.research.quality.reference import Reference
from flashmoe_mlx.text.tool_calls import ToolCall, parse_tool_calls

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lamp",
            "parameters": {
                "type": "object",
                "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}, "days": {"type": "integer"}},
            },
        },
    }
]
CALL = (
    "<tool_call>\n<function=lamp>\n<parameter=room>\n7\n</parameter>\n<parameter=on>\ntrue\n</parameter>\n</function>\n"
    "</tool_call>"
)


def test_a_tool_call_is_read_by_its_schema() -> None:
    assert parse_tool_calls(CALL, TOOLS) == ("", [ToolCall("lamp", {"room": "7", "on": True})])
    assert parse_tool_calls(CALL) == ("", [ToolCall("lamp", {"room": "7", "on": "true"})])
    two = parse_tool_calls(f"I will.\n{CALL}\n{CALL}", TOOLS)
    assert two[0] == "I will."
    assert len(two[1]) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        CALL[: CALL.index("<parameter")],
        CALL.replace("<parameter=room>", "stray <parameter=room>"),
        CALL.replace("<tool_call>", "<tool_call> so:").replace("lamp", "other"),
        CALL.replace("<function=lamp>", "<function=>"),
    ],
)
def test_incomplete_calls_stay_text(text: str) -> None:
    rest, calls = parse_tool_calls(text, TOOLS)
    assert not calls
    assert rest == text


def test_values_may_contain_lines_and_markup() -> None:
    value = "one\n<b>two</b>\n\nthree"
    text = f"<tool_call>\n<function=write>\n<parameter=text>\n{value}\n</parameter>\n</function>\n</tool_call>"
    assert parse_tool_calls(text)[1] == [ToolCall("write", {"text": value})]
    assert parse_tool_calls(CALL.replace("true", "yes"), TOOLS)[1][0].arguments["on"] == "yes"


@pytest.mark.parametrize(
    ("text", "parsed", "valid", "right"),
    [
        ('{"age": 3}', True, True, True),
        ('{"age":3}', True, True, True),
        ('{"age": 4}', True, True, False),
        ('{"age": true}', True, False, False),
        ('{"age": "3"}', True, False, False),
        ("{}", True, False, False),
        ('{"age": 3', False, False, False),
        ('{"age": 3} Done.', False, False, False),
        ("[" * 100_000, False, False, False),
    ],
)
def test_json_answers_are_judged(text: str, parsed: bool, valid: bool, right: bool) -> None:
    found = judge(Item("json", messages=({},), answer="", schema=SCHEMA, json={"age": 3}), text)
    assert (found.parsed, found.valid, found.correct) == (parsed, valid, right)


def test_tool_calls_and_exact_answers_are_judged() -> None:
    wanted = {"name": "lamp", "arguments": {"room": "7", "on": True}}
    item = Item("tool_call", messages=({},), tools=tuple(TOOLS), call=wanted)
    assert judge(item, CALL).correct
    assert not judge(item, f"{CALL}\n{CALL}").correct
    assert not judge(item, f"Here: {CALL}").correct
    assert not judge(item, CALL.replace("true", "false")).correct
    assert judge(Item("world", messages=({},), exact="In Gorsey."), "In Gorsey.").correct
    assert not judge(Item("world", messages=({},), exact="In Gorsey."), "In Gorsey").correct


def test_expected_answers_of_the_shipped_items_are_correct() -> None:
    items = load_items(shipped_items())
    kinds = {item.kind for item in items}
    assert {"text", "world", "context", "arithmetic", "recall", "json", "tool_call", "tool_result"} == kinds
    for item in items:
        if item.judged:
            assert judge(item, item.answer).correct, item
    assert len(load_items(shipped_items(), ["json"], 3)) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not an object with a kind"),
        ('{"kind": 3}', "not an object with a kind"),
        ('{"kind": "a"}', "must have either text, or messages"),
        ('{"kind": "a", "text": "b", "messages": [], "answer": ""}', "must have either text, or messages"),
        ('{"kind": "a", "messages": []}', "must have either text, or messages"),
        ('{"kind": "a", "text": 3}', "text is unknown or has the wrong type"),
        ('{"kind": "a", "text": "b", "extra": 3}', "extra is unknown"),
        ('{"kind": "a", "messages": [], "answer": "", "schema": {"type": "nosuch"}}', "schema: "),
        ("", "no items"),
    ],
)
def test_invalid_items_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError) as raised:
        load_items(path)
    assert raised.value.code == "invalid_items"
    assert message in str(raised.value)


def test_line_separators_inside_texts_do_not_end_an_item(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    text = "one\u2028two\u2029three\u0085four\x0b"
    path.write_text("\r\n".join([json.dumps({"kind": "text", "text": text}, ensure_ascii=False)] * 2))
    assert [item.text for item in load_items(path)] == [text] * 2


def test_items_without_scored_tokens(demo_pack: Path) -> None:
    empty, short = Item("text", text=""), Item("text", text="a")
    question = Item("word", messages=({"role": "user", "content": "?"},), answer="")
    with load(demo_pack) as engine:
        for items in ([empty], [short, question]):
            with pytest.raises(InputError) as raised:
                Reference.record(engine, items)
            assert raised.value.code == "nothing_to_score"
        longer = Item("text", text="Two words")
        with Reference.record(engine, [empty, longer, question]) as reference:
            found = evaluate(engine, [empty, longer, question], reference, generate=False).summary
        assert found["text"]["items"] == 1


def test_an_item_beyond_the_context_is_refused_at_once(tiny_pack: Path) -> None:
    """The item is named before a model runs over earlier items for minutes."""
    with load(tiny_pack) as engine, pytest.raises(InputError, match="kind long has 300 tokens") as raised:
        Reference.record(engine, [Item("short", text="ab"), Item("long", text="a" * 300)])
    assert raised.value.code == "prompt_too_long"


def test_a_template_that_always_thinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = Item("word", messages=({"role": "user", "content": "2 + 2?"},), answer="four", exact="four")
    with load(checkpoint(tmp_path / "model", "{{ messages[0].content }}<think>\n")) as engine:
        scripted(monkeypatch, [*engine.tokenizer.encode("Hm.\n</think>\n\nfour"), *engine.tokenizer.eos_token_ids])
        found = evaluate(engine, [item])
        assert "always lets the model think" in found.summary["thinking"]
        assert found.answers[0].correct


def test_the_package_for_schemas_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items with a schema need it; items without a schema do not."""
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(InputError) as raised:
        load_items(shipped_items())
    assert raised.value.code == "missing_extra"
    assert "pip install" in str(raised.value)
    assert "\n" not in str(raised.value)
    items = tmp_path / "items.jsonl"
    items.write_text('{"kind": "text", "text": "Some words."}')
    assert len(load_items(items)) == 1


def test_missing_files_and_unknown_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        load_items(tmp_path / "none.jsonl")
    assert raised.value.code == "missing_items"
    with pytest.raises(InputError) as raised:
        load_items(shipped_items(), ["nosuch"])
    assert raised.value.code == "unknown_kind"
    assert "the kinds are arithmetic, context" in str(raised.value)


@pytest.mark.thorough
def test_scores_equal_those_of_one_forward_pass(demo_pack: Path) -> None:
    """Decoding token by token gives the same scores as one forward pass over the text."""
    items = load_items(shipped_items(), ["text", "json"], 2)
    with load(demo_pack) as engine, Reference.record(engine, items) as reference:
        found = evaluate(engine, items, reference, generate=False).summary
        loss = tokens = 0.0
        for item in items[:2]:
            tokens_of_item = passage(engine, item)
            logits = engine.logits([*tokens_of_item.given, *tokens_of_item.scored])[:-1].astype(np.float64)
            logs = (
                logits
                - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
                - logits.max(1, keepdims=True)
            )
            loss -= float(logs[np.arange(len(tokens_of_item.scored)), tokens_of_item.scored].sum())
            tokens += len(tokens_of_item.scored)
        assert found["text"]["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
        for part in ("text", "answers"):
            assert found[part]["kl"] == pytest.approx(0, abs=1e-9)
            assert found[part]["top1_agreement"] == 1
        with load(demo_pack, experts_k=1) as fewer:
            worse = evaluate(fewer, items, reference, generate=False).summary
        assert worse["text"]["kl"] > 0.05
        assert worse["text"]["top1_agreement"] < 1
        with pytest.raises(InputError) as raised:
            evaluate(engine, items[:1], reference, generate=False)
        assert raised.value.code == "another_reference"


@pytest.mark.thorough
def test_the_demo_model_answers_correctly(demo_pack: Path) -> None:
    items = load_items(shipped_items(), ["arithmetic", "json", "tool_call"], 3)
    with load(demo_pack) as engine:
        found = evaluate(engine, items).summary
    for name in ("questions", "json_parsed", "json_valid", "json_exact", "tool_calls"):
        assert found[name]["share"] == 1, found
    assert "kl" not in found["answers"]


@pytest.mark.thorough
def test_constraints_repair_the_form_of_answers(demo_pack: Path) -> None:
    """One expert writes damaged JSON and calls; constraints save passes of a model that answers correctly anyway."""
    items = load_items(shipped_items(), ["json", "tool_call", "world"], 4)
    with load(demo_pack, experts_k=1) as fewer:
        found = evaluate(fewer, items, constraints=True).summary["constraints"]
    assert found["without"]["json_valid"]["share"] < found["with"]["json_valid"]["share"] == 1
    assert found["without"]["tool_calls"]["right"] < found["with"]["tool_calls"]["right"]
    assert found["with"]["json_exact"]["share"] < 1
    assert "questions" not in found["with"]
    with load(demo_pack) as engine:
        found = evaluate(engine, items[-8:], constraints=True).summary["constraints"]
    assert found["with"]["tool_calls"] == found["without"]["tool_calls"]
    assert found["with"]["forwards"] < found["without"]["forwards"] == found["without"]["tokens"]


def test_schemas_that_cannot_be_enforced_are_refused_before_the_reference(demo_pack: Path) -> None:
    schema = {"type": "array", "uniqueItems": True}
    item = Item("json", messages=({"role": "user", "content": "A set?"},), answer="[]", schema=schema, json=[])
    with load(demo_pack) as engine, pytest.raises(InputError, match=r"A set.*constraints=false") as refusal:
        check_constraints(engine, [item])
    assert refusal.value.code == "unsupported_schema"


REFUSING = """
{%- if enable_thinking is defined and not enable_thinking %}
    {{- raise_exception("Disabling thinking is not supported.") }}
{%- endif %}
{%- for message in messages %}
    {{- raise_exception("no tools here") if message.role == "tool" }}
    {{- message.role + ": " + message.content + "\\n" }}
{%- endfor %}
{{- "<think>\\n" }}
"""


def test_a_template_that_requires_thinking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of Qwen3.8: thinking stays at the template's default, and the record states it."""
    item = Item("word", messages=({"role": "user", "content": "2 + 2?"},), answer="four", exact="four")
    with load(checkpoint(tmp_path / "model", REFUSING)) as engine:
        tokenizer = engine.tokenizer
        assert tokenizer.decode(passage(engine, item).given) == "user: 2 + 2?\n<think>\n"
        scripted(monkeypatch, [*tokenizer.encode("Hm.\n</think>\n\nfour"), *tokenizer.eos_token_ids])
        found = evaluate(engine, [item])
        assert "Disabling thinking is not supported." in found.summary["thinking"]
        assert found.answers[0].text == "four"
        assert found.answers[0].correct
        broken = Item("tool", messages=({"role": "tool", "content": "x"},), answer="y", exact="y")
        with pytest.raises(InputError) as raised:  # a refusal for a different reason
            evaluate(engine, [broken])
        assert raised.value.code == "template_refused"
        assert "no tools here" in str(raised.value)


def test_thinking_is_off_if_the_template_allows_it(demo_pack: Path) -> None:
    with load(demo_pack) as engine:
        assert evaluate(engine, load_items(shipped_items(), ["text"], 1), generate=False).summary["thinking"] == "off"


def test_statistics_of_an_impossible_token() -> None:
    """A scored token with probability 0, and a loss that overflows, give infinite perplexity."""
    scores = _Scores(loss=[math.inf], tokens=[3])
    assert _statistics(scores, compared=False)["perplexity"] == math.inf
    assert _statistics(_Scores(loss=[3000.0], tokens=[3]), compared=False)["perplexity"] == math.inf


def test_intervals() -> None:
    low, high = share_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert share_interval(10, 10)[1] == pytest.approx(1)
    assert ratio_interval([1, 2], [1, 1]) is None
    bounds = ratio_interval([1, 2, 3, 4], [1, 1, 1, 1])
    assert bounds is not None
    assert 1 <= bounds[0] < 2.5 < bounds[1] <= 4
    with pytest.raises(ValueError, match="3 successes of 2"):
        share_interval(3, 2)


def test_task_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from test_cli import flashmoe, records

    arguments = ["task=evaluate", "kinds=[text,json]", "limit=1", "variants=[q4,q2-minmax]", "experts_ks=[2,10]"]
    result = flashmoe(*arguments, "answers=false", cwd=tmp_path, cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    (folder,) = records(tmp_path)
    record: dict[str, Any] = json.loads((folder / "evaluate.json").read_text())
    cells = record["cells"]
    settings = [(cell["setup"]["backend"]["variant"], cell["setup"]["experts_k"]) for cell in cells]
    assert settings == [("q4", 2), ("q4", 10), ("q2-minmax", 2), ("q2-minmax", 10)]
    assert cells[1]["text"]["kl"] == pytest.approx(0, abs=1e-9)
    assert cells[0]["text"]["kl"] > 0.001
    assert cells[3]["text"]["kl"] > 0.001
    assert "q4" in result.stderr
    monkeypatch.chdir(tmp_path)
    for argument, message in (("limit=0", "limit=0: must be"), ("variants=[]", "variants= and experts_ks= each need")):
        assert run_command_line(["task=evaluate", argument]) == 2
        assert message in capsys.readouterr().err
