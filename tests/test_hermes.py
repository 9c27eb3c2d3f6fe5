"""Tool calls as JSON between tags, and the format that a template asks for."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import ARCHIVE, published_templates

from flashmoe_mlx.text.chat_template import ChatTemplate
from flashmoe_mlx.text.tool_calls import ToolCall, ToolCallReader
from flashmoe_mlx.text.tool_formats.by_template import format_of_template
from flashmoe_mlx.text.tool_formats.hermes import call_grammar

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def read(text: str, step: int = 2**20) -> tuple[str, list[ToolCall], dict[int, str]]:
    """Return the text, the calls, and the concatenated arguments of each call's pieces."""
    reader = ToolCallReader(tool_format="hermes")
    outputs = [reader.add(None, text[start : start + step]) for start in range(0, len(text), step)]
    outputs.append(reader.finish())
    pieces: dict[int, str] = {}
    for delta in (delta for output in outputs for delta in output.calls):
        pieces[delta.index] = pieces.get(delta.index, "") + delta.arguments
    return "".join(output.content for output in outputs), reader.calls, pieces


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.integers(1, 30), st.booleans())
def test_what_a_template_writes_is_read(arguments: dict[str, Any], step: int, escaped: bool) -> None:
    body = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=escaped)
    content, calls, pieces = read(f"Here:\n<tool_call>\n{body}\n</tool_call>\n{CALL}", step)
    assert content == "Here:"
    assert calls == [ToolCall("f", arguments), ToolCall("f", {"x": 1})]
    assert [json.loads(pieces[index]) for index in (0, 1)] == [arguments, {"x": 1}]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"name": "f", "parameters": {"x": 1}}', [{"x": 1}]),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', [{"x": 1}]),
        ('{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}', [{"x": 1}]),
        ("{'name': 'f', 'arguments': {'x': True, 'y': None}}", [{"x": True, "y": None}]),
        ('{"name": "f", "arguments": {}}\n{"name": "f", "arguments": {"x": 2}}', [{}, {"x": 2}]),
        ('[{"name": "f", "arguments": {"x": 1}}, {"name": "f"}]', [{"x": 1}, {}]),
        ('{"name": "f", "arguments": null}', [{}]),
    ],
)
def test_forms_that_models_write(body: str, expected: list[dict[str, Any]]) -> None:
    content, calls, pieces = read(f"<tool_call>{body}</tool_call>")
    assert content == ""
    assert [call.arguments for call in calls] == expected
    assert [json.loads(piece) for piece in pieces.values()] == expected


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n', {"x": 1}),
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_', {"x": 1}),
        ('<tool_call>\n{"name": "f", "arguments": {"x": "one", "y": "tw', {"x": "one"}),
        ('<tool_call>\n{"name": "f", "arguments": {"x": 12', {}),
        ('<tool_call>\n{"name": "f", "arguments": {', {}),
    ],
)
def test_an_answer_that_ends_in_a_call(text: str, arguments: dict[str, Any]) -> None:
    content, calls, pieces = read(text)
    assert (content, [call.arguments for call in calls]) == ("", [arguments])
    assert calls[0].complete == ("}}" in text)
    assert json.dumps(arguments).startswith(pieces[0])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>nothing</tool_call>",
        f"<tool_call>{'-' * 60_000}1</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f"',
        "</tool_call> and <tool",
        f"<tool_call>{'[' * 100_000}</tool_call>",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert read(text)[:2] == (text, [])


def test_long_answers_take_linear_time() -> None:
    start = time.perf_counter()
    for text in (
        "<tool_call>" * 20_000,
        "<tool_call>" + '{"name": "f"} ' * 20_000 + "</tool_call>",
        '<tool_call>{"name": "f", "arguments": {' + '"a": 1, ' * 40_000,
        '<tool_call>{"name": "' + "</tool_call>" * 20_000,
    ):
        read(text)
    assert time.perf_counter() - start < 5


FORMATS = {
    "Qwen3-30B-A3B/chat_template.jinja": "hermes",
    "Qwen3-Coder-480B-A35B/chat_template.jinja": "qwen_xml",
    "Qwen3.5-397B-A17B/chat_template.jinja": "qwen_xml",
    "Qwen3.8-2.4T-A95B/chat_template.jinja": "qwen_xml",
    "GLM-4.6/chat_template.jinja": None,
    "Kimi-K2-Instruct/chat_template.jinja": None,
    "gpt-oss-120b/chat_template.jinja": None,
    "DeepSeek-V3.2/chat_template.jinja": None,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_published_templates(name: str) -> None:
    if name not in published_templates():
        pytest.skip(f"{ARCHIVE} does not contain {name}")
    source = published_templates()[name]
    assert format_of_template(source) == FORMATS[name]
    if FORMATS[name] == "hermes":
        function = {"name": "f", "arguments": {"x": [1, "</tool_call>", None]}}
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        ]
        text = ChatTemplate(source, {}).render(messages)
        answer = text.split("<|im_start|>assistant\n")[1].partition("<|im_end|>")[0]
        assert read(answer)[1] == [ToolCall("f", function["arguments"])]


def test_grammar_accepts_calls_alone() -> None:
    llguidance = pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("f", 'g"')]
    grammar = "start: body\n" + call_grammar(tools, lambda schema: True, '"</tool_call>"')
    refused, problems = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    assert not refused, problems
