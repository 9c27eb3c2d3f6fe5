"""Tool calls in the form of the published templates, and in deviating forms reported by servers."""

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from published import ARCHIVE, published_templates

from flashmoe_mlx.made_models.byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer
from flashmoe_mlx.text.chat_template import ChatTemplate
from flashmoe_mlx.text.reasoning import ReasoningSplitter
from flashmoe_mlx.text.tokenizer import Tokenizer
from flashmoe_mlx.text.tool_calls import Output, ToolCall, ToolCallReader, parse_tool_calls

X = "<parameter=x>\n1\n</parameter>\n"
CALL = f"<tool_call>\n<function=f>\n{X}</function>\n</tool_call>"
INTEGER = {"type": "integer"}


def tools(_name: str = "f", **properties: Any) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": _name, "parameters": {"type": "object", "properties": properties}}}
    ]


F = tools(x=INTEGER, y=INTEGER, s={"type": "string"}, o={"type": "object"})


def arguments(text: str) -> list[dict[str, Any]]:
    return [call.arguments for call in parse_tool_calls(text, F)[1]]


def value(schema: Any, text: str, **definitions: Any) -> Any:
    """Return the value of a parameter with ``schema`` that a model wrote as ``text``."""
    declared = tools(x=schema)
    declared[0]["function"]["parameters"] |= definitions
    call = f"<tool_call>\n<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>\n</tool_call>"
    return parse_tool_calls(call, declared)[1][0].arguments.get("x", "left out")


def same(first: Any, second: Any) -> bool:
    """Compare JSON values, with 1, 1.0 and True all different."""
    return json.dumps(first) == json.dumps(second)


# Text and calls


@pytest.mark.parametrize(
    ("text", "content", "found"),
    [
        ("", "", []),
        ("  no call \n", "  no call \n", []),
        (CALL, "", [{"x": 1}]),
        (f"I will.\n\n{CALL}\n{CALL}\n", "I will.", [{"x": 1}, {"x": 1}]),
        (f"a \n{CALL}\n b", "a\n b", [{"x": 1}]),
        (f"\n{CALL}\n\nDone.", "Done.", [{"x": 1}]),
        ("<tool_call>\n<function=f>\n</function>\n</tool_call>", "", [{}]),
        # Deviating forms.
        (f"I'll look.\n\n<function=f>\n{X}</function>\n</tool_call>", "I'll look.", [{"x": 1}]),
        (f"<function=f>\n{X}</function>\nDone.", "Done.", [{"x": 1}]),
        (f"<function=f>\n{X}</tool_call>", "", [{"x": 1}]),
        (f"<tool_call>\n<function=f>\n{X}</function>", "", [{"x": 1}]),
        (f"<tool_call>\n<function=f>\n{X}</function>\n</tool_", "", [{"x": 1}]),
        (f"<tool_call>\n<function=f>\n{X}</tool_call>", "", [{"x": 1}]),
        (f"<tool_call>\n<function=f>\n{X}</function>\n<function=f>\n{X}</function>\n</tool_call>", "", [{"x": 1}] * 2),
        (f"<tool_call>\n<function=f>\n{X}</function>\n{CALL}", "", [{"x": 1}] * 2),
        (f"<tool_call>\n<function=f>\n{X}{CALL}", "", [{"x": 1}] * 2),
        (f"<tool_call><function=f>{X.replace(chr(10), '')}</function></tool_call>", "", [{"x": 1}]),
        (f"<tool_call>\n\n<function=f>\n\n{X}\n\n</function>\n\n</tool_call>", "", [{"x": 1}]),
        ("<tool_call>\n<function= f >\n<parameter= x >\n1\n</parameter>\n</function>\n</tool_call>", "", [{"x": 1}]),
        (CALL.replace("</parameter>\n", ""), "", [{"x": 1}]),
        (CALL.replace("</parameter>\n", "<parameter=y>\n2\n</parameter>\n"), "", [{"x": 1, "y": 2}]),
        (CALL.replace("\n1\n", "\n"), "", [{}]),
        (CALL.replace("\n1\n", "\n\n"), "", [{}]),
        (CALL.replace(X, X + X.replace("1", "2")), "", [{"x": 2}]),
        (CALL.replace(X, "<parameter=\nx>\n5\n</parameter>\n" + X), "", [{"x": 1}]),
        (CALL.replace(X, "<parameter=>\n5\n</parameter>\n" + X), "", [{"x": 1}]),
        (CALL.replace(X, f"<parameter={'x' * 300}>\n5\n</parameter>\n{X}"), "", [{"x": 1}]),
        (CALL.replace(X, "<parameter=\n" + X), "", [{"x": 1}]),
        (CALL.replace(X, "<parameter=new>\n5\n</parameter>\n"), "", [{"new": "5"}]),
        (CALL.replace("x>", "first name>"), "", [{"first name": "1"}]),
        (CALL.replace("\n", "\r\n"), "", [{"x": 1}]),
        (CALL.replace("=f>", '="f">').replace("x>", "'x' >"), "", [{"x": 1}]),
        (f"<tool_call>\n{CALL}\n</tool_call>", "", [{"x": 1}]),
        (f"{CALL}</tool_call> Done.</tool_call>", "Done.</tool_call>", [{"x": 1}]),
        # Noise between parameters, and repeated closing tags.
        (CALL.replace(X, f"{X}and\n\n<parameter=y>\n2\n</parameter>\n"), "", [{"x": 1, "y": 2}]),
        (CALL.replace(X, f"{X}and that is it.\n"), "", [{"x": 1}]),
        (CALL.replace(X, f"<parameter=s>\na\n</parameter>\nand <b>\n{X}"), "", [{"s": "a", "x": 1}]),
        (CALL.replace(X, f"<parameter=s>\na\n</parameter>\nand\n{X}and\n"), "", [{"s": "a", "x": 1}]),
        (CALL.replace(X, "<parameter=s>a</parameter> and <parameter=x>1</parameter>"), "", [{"s": "a", "x": 1}]),
        (CALL.replace(X, f"{X}and <parameter=y>\n2\n</parameter>\n"), "", [{"x": 1, "y": 2}]),
        (CALL.replace(X, "<parameter=s>\na\n</parameter>\nor\n<parameter=s>\nb\n</parameter>\n"), "", [{"s": "b"}]),
        (CALL.replace(X, f"{X}</parameter>\n"), "", [{"x": 1}]),
        (CALL.replace(X, f"{X}</parameter>\n<parameter=y>\n2\n</parameter>\n"), "", [{"x": 1, "y": 2}]),
        (CALL.replace(X, f"{X}<parameter>\n{X}"), "", [{"x": 1}]),
        (f"<function=f>\n{X}and\n</function>", "", [{"x": 1}]),
        (f"{CALL} and more", " and more".strip(), [{"x": 1}]),
        # Text that is not a call.
        (f"<function=g>\n{X}</function>", f"<function=g>\n{X}</function>", []),
        (f"<function=f>\n{X}", f"<function=f>\n{X}", []),
        ("Write <function=f> so.", "Write <function=f> so.", []),
        ("Write `<tool_call>` so.", "Write `<tool_call>` so.", []),
        ("<tool_call>\n<function=f>\nhow?", "<tool_call>\n<function=f>\nhow?", []),
        ("<tool_call>\n<function=f>\n", "<tool_call>\n<function=f>\n", []),
        ("<tool_call>\n<function=>\n</function>", "<tool_call>\n<function=>\n</function>", []),
        ("<tool_call>\n{}\n</tool_call>", "<tool_call>\n{}\n</tool_call>", []),
        ("</tool_call></function></parameter>", "</tool_call></function></parameter>", []),
        (f"<function=f>\n<parameter=x>\n{CALL}", "<function=f>\n<parameter=x>", [{"x": 1}]),
        ("a <b", "a <b", []),
        (f"<function={'f' * 300}>", f"<function={'f' * 300}>", []),
    ],
)
def test_forms_of_calls(text: str, content: str, found: list[dict[str, Any]]) -> None:
    rest, calls = parse_tool_calls(text, F)
    assert [call.arguments for call in calls] == found
    assert rest == content
    assert all(call.complete for call in calls)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CALL[: CALL.index("1")], {}),
        (CALL[: CALL.index("</param")], {}),
        (CALL[: CALL.index("</function")], {"x": 1}),
        (CALL[: CALL.index("</function") + 5], {"x": 1}),
        ("<tool_call>\n<function=f>\n<parameter=s>\nhal", {"s": "hal"}),
        ("<tool_call>\n<function=f>\n<parameter=s>\nhalf\n</para", {"s": "half"}),
        ("<tool_call>\n<function=f>\n<parameter=s>\nhalf\n</parameter>", {"s": "half"}),
        ("<tool_call>\n<function=f>\n<parameter=s", {}),
        ("<tool_call>\n<function=f>\n<parameter=s>\nhalf\n</parameter>\nand", {"s": "half"}),
        (f"<tool_call>\n<function=f>\n{X}and", {"x": 1}),
    ],
)
def test_output_that_ends_inside_a_call(text: str, found: dict[str, Any]) -> None:
    rest, calls = parse_tool_calls(text, F)
    assert (rest, calls) == ("", [ToolCall("f", found, complete=False)])


def test_a_call_without_tools() -> None:
    assert parse_tool_calls(CALL) == ("", [ToolCall("f", {"x": "1"})])
    assert parse_tool_calls(CALL, None) == ("", [ToolCall("f", {"x": "1"})])
    assert parse_tool_calls(CALL, F)[1] == parse_tool_calls(CALL, [F[0]["function"]])[1]


@pytest.mark.parametrize(
    "text",
    [
        "a </parameter> b",
        "</parameter>",
        "</function>",
        "</tool_call>",
        "<tool_call>",
        "<parameter=x>",
        "a\n</parameter>\nb",
        "a\n</function>\nb",
        "a\n</tool_call>\nb",
        "a\n<parameter=s>\nb",
        "a\n<parameter=unknown>\nb",
        "a\n<parameter=\nb",
        "<tool_call>\n<function=f>",
        "\n a\n",
        "    indented\n\n\n",
        "\n",
        "\n\n",
        "\t",
        "",
        "null",
        "03106",
        '"quoted"',
        "\u2028\u0085\r\n",
        "\r",
        "\r\n",
        "a\r",
        "\ra\r",
        "a\r\nb",
        "a\n</parameter>",
        "</parameter>\n</parameter>",
        "a\n</parameter>\nb\n</parameter>\n\nc",
        "a\n</parameter>\n<b> </function> c\n",
        "a\n</parameter>\nb\n<parameter=unknown>\nc",
        "😀\ud800",
    ],
)
def test_strings_are_not_changed(text: str) -> None:
    assert value({"type": "string"}, text) == text
    if "<parameter=" not in text:
        assert parse_tool_calls(CALL.replace("1", text))[1][0].arguments == {"x": text}


fragments = st.sampled_from(
    [
        "</parameter>",
        "</function>",
        "</tool_call>",
        "<tool_call>",
        "<function=f>",
        "<parameter=z>",
        *("\n" * 4),
        "\r",
        "a",
    ]
)
AMBIGUOUS = re.compile(
    r"</parameter>\s*(<parameter=|</function>|</tool_call>|<function=|<tool_call>)"
    r"|</function>\s*(</tool_call>|<function=|<tool_call>)|</tool_call>\s*<tool_call>"
)
"""Consecutive closing tags, which end a value even if they were meant as part of it."""


@settings(deadline=None, max_examples=500)
@given(st.lists(fragments, max_size=12).map("".join))
def test_strings_may_contain_tags_unless_closing_tags_are_consecutive(text: str) -> None:
    assume(not AMBIGUOUS.search(text))
    assert value({"type": "string"}, text) == text


@pytest.mark.parametrize("text", ["", "a", "a\r\nb", "\n", "\r", " a \r\n", "a\r\n</parameter>\r\nb", "\r\n\r\n"])
def test_carriage_return_and_line_feed_are_one_line_break(text: str) -> None:
    call = CALL.replace("\n", "\r\n").replace("1", text)
    assert parse_tool_calls(call) == ("", [ToolCall("f", {"x": text})])
    reader = ToolCallReader()
    pieces: list[tuple[int | None, str]] = [(None, character) for character in call]
    assert read(reader, pieces) == ("", [ToolCall("f", {"x": text})])


@pytest.mark.parametrize(
    "inner", ["</parameter>", "</parameter></function>", "</function></tool_call>", "<parameter=y>"]
)
def test_objects_may_contain_tags(inner: str) -> None:
    assert value({"type": "object"}, json.dumps({"a": inner})) == {"a": inner}


# Types


@pytest.mark.parametrize(
    ("schema", "text", "right"),
    [
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "FALSE", False),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "boolean"}, "yes", "yes"),
        (INTEGER, "None", None),
        (INTEGER, "null", None),
        (INTEGER, " 5 ", 5),
        (INTEGER, "5.0", 5),
        (INTEGER, "5.5", 5.5),
        (INTEGER, "12345678901234567890123", 12345678901234567890123),
        (INTEGER, "2026-01-15", "2026-01-15"),
        (INTEGER, "True", "True"),
        (INTEGER, "9" * 5000, "9" * 5000),
        (INTEGER, "", "left out"),
        ({"type": "number"}, "1e-07", 1e-07),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "nan", "nan"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "-Infinity", "-Infinity"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "array"}, '["a", true, None]', ["a", True, None]),
        ({"type": "array"}, "['it\\'s', 'a \"b\"', True,]", ["it's", 'a "b"', True]),
        ({"type": "array"}, "[\"True, 'x'\"]", ["True, 'x'"]),
        ({"type": "array"}, "[nan]", "[nan]"),
        ({"type": "array"}, "[" * 10_000, "[" * 10_000),
        ({"type": "array"}, "[" * 500 + "]" * 500, "[" * 500 + "]" * 500),
        ({"type": "object"}, "{'a': {'b': None}}", {"a": {"b": None}}),
        (
            {"type": "object"},
            """{"a": True, 'b': None, "it's": 'x', "c": [false, None,],}""",
            {"a": True, "b": None, "it's": "x", "c": [False, None]},
        ),
        ({"type": "object"}, '{"a": "one\n\ttwo"}', {"a": "one\n\ttwo"}),
        (
            {"type": "object"},
            r"""{'a': '\xe9\u00e9\n\\', "b": "it\'s \x41", 'c': '\"'}""",
            {"a": "éé\n\\", "b": "it's A", "c": '"'},
        ),
        ({"type": "object"}, r"{'a': '\x4'}", r"{'a': '\x4'}"),
        ({"type": "object"}, r'{"a": "\ud83d\ude00"}', {"a": "😀"}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": "object"}, "{'a'}", "{'a'}"),
        # Several allowed types.
        ({"anyOf": [INTEGER, {"type": "null"}]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "false", False),
        ({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]}, '["a"]', ["a"]),
        ({"anyOf": [{"type": "array"}, {"type": "string"}]}, '["a"]', ["a"]),
        ({"anyOf": [{"type": "array"}, {"type": "string"}]}, "a", "a"),
        ({"type": ["string", "null"]}, "[1, 2]", "[1, 2]"),
        ({"type": ["string", "integer"]}, "03106", "03106"),
        ({"type": ["string", "integer"]}, "3.0", "3.0"),
        ({"type": ["string", "integer"]}, "", ""),
        ({"type": ["integer", "null"]}, "", "left out"),
        ({"oneOf": [{"type": "number"}]}, "2.5", 2.5),
        ({"allOf": [{"type": ["integer", "string"]}, {"type": "string"}]}, "5", "5"),
        ({"allOf": [INTEGER, {"minimum": 1}]}, "5", 5),
        ({"type": "integer", "nullable": True}, "None", None),
        ({"type": "string", "nullable": True}, "None", None),
        # Schemas without a type.
        ({"enum": [1, 2, 3]}, "3", 3),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": ["a", None]}, "None", None),
        ({"enum": [True, "auto"]}, "True", True),
        ({"enum": [1.5, 2]}, "1.5", 1.5),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"enum": ["None", None, 5]}, "None", "None"),
        ({"anyOf": [{"const": "1"}, {"const": 2}]}, "1", "1"),
        ({"anyOf": [{"const": "1"}, {"const": 2}]}, "2", 2),
        ({"anyOf": [{"const": "true"}, {"type": "boolean"}]}, "true", "true"),
        ({"anyOf": [{"const": "true"}, {"type": "boolean"}]}, "True", True),
        ({"type": "integer", "enum": ["1", 2]}, "1", 1),
        ({"const": 5}, "5", 5),
        ({"const": "5"}, "5", "5"),
        ({"minimum": 0}, "5", 5),
        ({"maxLength": 9}, "5", "5"),
        ({"items": INTEGER}, "[5]", [5]),
        ({"properties": {}}, "{}", {}),
        ({}, "5", "5"),
        ({}, '{"a": 5}', {"a": 5}),
        (True, "5", "5"),
        ({"description": "a name"}, "True", "True"),
        # Names of types in hand-written tools.
        ({"type": "int"}, "5", 5),
        ({"type": "STRING"}, "5", "5"),
        ({"type": "dict"}, "{}", {}),
    ],
)
def test_types_of_schemas_determine_values(schema: Any, text: str, right: Any) -> None:
    assert same(value(schema, text), right)


def test_references_in_schemas_are_followed() -> None:
    definitions: dict[str, Any] = {
        "Size": {"enum": [1, 2]},
        "Maybe": {"anyOf": [{"$ref": "#/$defs/Size"}, {"type": "null"}]},
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, INTEGER]},
        "a/b~c": INTEGER,
    }
    for name in ("Size", "Maybe", "Loop", "a~1b~0c", "a~1b%7E0c"):
        assert value({"$ref": f"#/$defs/{name}"}, "2", **{"$defs": definitions}) == 2, name
    assert value({"$ref": "#/definitions/Size"}, "2", definitions=definitions) == 2
    for name in ("#/$defs/none", "#/$defs/Size/enum/7", "#/$defs/Size/enum/0/x", "https://other", "", "#/type", 5):
        assert value({"$ref": name}, "2", **{"$defs": definitions}) == "2", name


def test_parameters_in_references_and_additional_properties() -> None:
    parameters = {
        "$ref": "#/$defs/P",
        "$defs": {"P": {"properties": {"x": INTEGER}}},
        "additionalProperties": {"type": "boolean"},
    }
    text = CALL.replace(X, X + "<parameter=y>\nTrue\n</parameter>\n")
    declared = [{"function": {"name": "f", "parameters": parameters}}]
    assert parse_tool_calls(text, declared)[1] == [ToolCall("f", {"x": 1, "y": True})]


def test_repeated_references_are_read_once() -> None:
    definitions = {f"D{n}": {"anyOf": [{"$ref": f"#/$defs/D{n + 1}"}] * 2} for n in range(60)}
    value({"$ref": "#/$defs/D0"}, "2", **{"$defs": definitions})
    wide = {"enum": ["a"] * 100_000, "anyOf": [INTEGER] * 100_000}
    assert value(wide, "a") == "a"


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=1),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["function", "name", "parameters", "properties", "type", "anyOf", "allOf", "enum", "$ref", "const", "x"]
            )
            | st.none(),
            inner | st.sampled_from(["f", "string", "#", "#/properties/x", "integer"]),
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(odd, odd)
@example([{"function": {"name": "f", "parameters": {"properties": {"x": {"type": [["string"]]}}}}}], None)
@example([{"function": {"name": ["f"]}}, {"name": "f", "parameters": [1]}], None)
def test_malformed_declarations_are_ignored(declared: Any, schema: Any) -> None:
    for given_tools in (declared, tools(x=schema), [{"name": "f", "parameters": schema}]):
        rest, calls = parse_tool_calls(CALL, given_tools)
        assert (rest, len(calls)) == ("", 1)


def test_a_deeply_nested_schema() -> None:
    schema: Any = INTEGER
    for _ in range(100_000):
        schema = {"anyOf": [schema]}
    assert value(schema, "5") == "5"
    while isinstance(schema, dict) and "anyOf" in schema:  # otherwise Python frees it recursively
        schema = schema.pop("anyOf").pop()


# Streams


def read(reader: ToolCallReader, pieces: Sequence[tuple[int | None, str]]) -> tuple[str, list[ToolCall]]:
    """Read ``pieces``, and check that the deltas add up to the calls."""
    outputs = [reader.add(token_id, text) for token_id, text in pieces] + [reader.finish()]
    names: dict[int, list[str]] = {}
    texts: dict[int, str] = {}
    for delta in (delta for output in outputs for delta in output.calls):
        assert delta.index == len(texts) or (delta.index == len(texts) - 1 and delta.name is None)
        names.setdefault(delta.index, []).extend([delta.name] if delta.name is not None else [])
        texts[delta.index] = texts.get(delta.index, "") + delta.arguments
    assert list(names.values()) == [[call.name] for call in reader.calls]
    for call, text in zip(reader.calls, texts.values(), strict=True):
        if call.complete:
            assert same(json.loads(text), call.arguments)
        else:
            assert any(same(_parsed(text + end), call.arguments) for end in ("}", '"}'))
    return "".join(output.content for output in outputs), reader.calls


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


markup = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<function=f>",
            "<function=",
            "</function>",
            "</parameter>",
            ">",
            "=",
            "<",
            "\n",
        ),
        *(
            "<parameter=x>",
            "<parameter=s>",
            "<parameter=y>",
            "<parameter=",
            "<parameter=>",
            " ",
            "a",
            "1",
            "True",
            CALL,
            X,
        ),
        *(
            "<parameter=s>\n",
            "\n</parameter>\n",
            "</function>\n</tool_call>",
            "<tool_call>\n<function=f>\n",
            "😀",
            "[1]",
            "\r\n",
            "\r",
            "\n</parameter>\nnoise\n",
        ),
    ]
)
outputs = st.lists(markup | st.text(max_size=3), max_size=20).map("".join)


@settings(deadline=None)
@given(outputs, st.lists(st.integers(0, 200), max_size=10), st.booleans())
@example("<tool_call>\n<function=f>\n<parameter=s>\n\n</function> </parameter>\nnoise", [], True)
def test_results_do_not_depend_on_the_split(text: str, cuts: list[int], by_character: bool) -> None:
    ends = range(1, len(text) + 1) if by_character else sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [(None, text[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    assert repr(read(ToolCallReader(F), pieces)) == repr(parse_tool_calls(text, F))


@settings(deadline=None)
@given(outputs)
def test_only_markup_is_lost(text: str) -> None:
    content, calls = parse_tool_calls(text, F)
    if not calls:
        assert content == text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def demo() -> ChatTemplate:
    return ChatTemplate(CHAT_TEMPLATE, {})


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[ToolCall]]:
    detokenizer = tokenizer.detokenizer()
    pieces: list[tuple[int | None, str]] = [(token_id, detokenizer.add(token_id)) for token_id in ids]
    return read(ToolCallReader(F, tokenizer.added_tokens), [*pieces, (None, detokenizer.flush())])


@settings(deadline=None)
@given(outputs)
def test_tokens_and_their_text_give_the_same_calls(tokenizer: Tokenizer, text: str) -> None:
    assert repr(streamed(tokenizer, tokenizer.encode(text))) == repr(parse_tool_calls(text, F))


@pytest.mark.parametrize("quoted", [CALL, f"See:\n{CALL}\n", f"<tool_call> {CALL[12:]}"])
def test_a_quoted_call_is_text_if_the_tags_are_tokens(tokenizer: Tokenizer, quoted: str) -> None:
    assert streamed(tokenizer, list(quoted.encode())) == (quoted, [])
    assert len(streamed(tokenizer, [*quoted.encode(), *tokenizer.encode(CALL)])[1]) == 1


def test_content_is_held_back_only_while_it_may_be_markup() -> None:
    reader = ToolCallReader(F)
    steps = [
        ("Hello", "Hello"),
        (" ", ""),
        ("world<", " world"),
        ("b>", "<b>"),
        ("<tool_call>", ""),
        ("\n", ""),
        ("x", "<tool_call>\nx"),
        ("<function=g>", "<function=g>"),
        ("<function=f>\nx", "<function=f>\nx"),
    ]
    assert [reader.add(None, text).content for text, _ in steps] == [content for _, content in steps]


def test_long_strings_are_streamed() -> None:
    reader = ToolCallReader(F)
    reader.add(None, "<tool_call>\n<function=f>\n<parameter=s>\n")
    pieces = [
        "".join(delta.arguments for delta in reader.add(None, text).calls)
        for text in ('say "', "é\n", "\n", "</para", "meter>", "\n", "</function>")
    ]
    assert pieces == ['say \\"', "é", "\\n", "", "", "", '"}']
    assert reader.calls == [ToolCall("f", {"s": 'say "é\n'})]
    assert reader.finish() == Output()


def test_indexes_and_names() -> None:
    reader = ToolCallReader(F)
    deltas = [*reader.add(None, f"{CALL}\n{CALL}").calls, *reader.finish().calls]
    assert [(delta.index, delta.name) for delta in deltas if delta.name] == [(0, "f"), (1, "f")]


def test_deltas_can_be_encoded_as_utf8() -> None:
    reader = ToolCallReader(F)
    deltas = reader.add(None, CALL.replace("x>\n1", 'o>\n["\\ud800"]').replace("[", '{"a": ').replace("]", "}")).calls
    "".join(delta.arguments for delta in deltas).encode()
    assert reader.calls[0].arguments == {"o": {"a": "\ud800"}}


@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call><function=a>",
        "<tool_call>\n<function=f>\n",
        f"<tool_call>\n<function=f>\n{X}",
        "<function=f>\n<parameter=x>\n",
        "<function=f>\n<parameter=x>\n</parameter>\n",
        "<tool_call>\n<function=f>\n<parameter=s>\n</parameter>\n",
        "</parameter>\n",
        "</function>",
        "<parameter=",
        "<",
        "\n",
        "<function=",
        "'",
        '\\"',
        "{",
        "<function=f>\n<parameter=s>\n" + "</parameter>\n" * 9,
    ],
)
@pytest.mark.parametrize("start", ["", f"<tool_call>\n<function=f>\n{X}<parameter=o>\n["])
def test_time_is_linear(unit: str, start: str) -> None:
    def seconds(size: int) -> float:
        text = start + unit * (size // len(unit))
        start_time = time.process_time()
        parse_tool_calls(text, F)
        reader = ToolCallReader(F)
        for position in range(0, len(text), 19):
            reader.add(None, text[position : position + 19])
        reader.finish()
        return time.process_time() - start_time

    small, large = (
        min(seconds(size) for _ in range(3)) for size in (2_000, 24_000)
    )  # the minimum excludes interruptions
    assert large < 48 * small + 0.02  # 12 if linear, 144 if quadratic
    assert large < 3


# Round trips through templates


def _schema_of(found: Any) -> dict[str, Any]:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(found, kind):
            return {"type": name}
    return {"type": "null" if found is None else "object"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text(st.characters(codec="utf-8", categories=["L", "N"], include_characters="_-."), min_size=1, max_size=8)


def check_round_trip(render: Callable[..., str], given_arguments: dict[str, Any], variant: int) -> None:
    schemas = {name: _schema_of(found) for name, found in given_arguments.items()}
    if variant == 1:  # the form in which pydantic writes Optional
        schemas = {
            name: {"anyOf": [schema, {"type": "null"}]} if schema["type"] != "string" else schema
            for name, schema in schemas.items()
        }
    if variant == 2:  # strings may be undeclared
        schemas = {name: schema for name, schema in schemas.items() if schema["type"] != "string"}
    declared = tools("get", **schemas)
    call = {"type": "function", "function": {"name": "get", "arguments": given_arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ok", "tool_calls": [call, call]}]
    text = render(messages, declared, False).partition("<|im_start|>assistant\n")[2]
    if text.startswith("<think>"):
        text = text.partition("</think>")[2]
    rest, calls = parse_tool_calls(text.rpartition("<|im_end|>")[0], declared)
    assert rest.strip() == "ok"
    assert [call.name for call in calls] == ["get", "get"]
    for found in calls:
        assert same(found.arguments, given_arguments)


@settings(deadline=None)
@given(st.dictionaries(names, json_values, max_size=4), st.integers(0, 2))
@example({"flag": True, "days": 3, "limit": None, "tags": ["a", True]}, 0)
@example({"0": {"</think>": None}, "1": "assistant\n"}, 0)
@example({"text": "\n</parameter>\n", "more": "a\n</function>\nb", "object": {"a": "</parameter></function>"}}, 1)
def test_the_demo_template_round_trips(demo: ChatTemplate, found: dict[str, Any], variant: int) -> None:
    check_round_trip(demo.render, found, variant)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3-Coder-480B-A35B/chat_template.jinja",
        "Qwen3.5-25B-REAP-A3B-Coding/chat_template.jinja",
        "Qwen3.5-397B-A17B/chat_template.jinja",
        "Qwen3.8-2.4T-A95B/chat_template.jinja",
        "Qwen3.8-27B/chat_template.jinja",
        "Nemotron-3-Nano-30B-A3B/chat_template.jinja",
    ],
)
def test_published_templates_round_trip(name: str) -> None:
    if name not in published_templates():
        pytest.skip(f"{ARCHIVE} does not contain {name}")
    template = ChatTemplate(published_templates()[name], {})

    @settings(deadline=None)
    @given(st.dictionaries(names, json_values, max_size=4), st.integers(0, 2))
    @example({"flag": True, "days": 3, "limit": None, "tags": ["a", True]}, 0)
    @example({"0": {"</think>": None}, "1": "assistant\n"}, 0)
    @example({"text": "\n</parameter>\n", "more": "a\n</function>\nb", "object": {"a": "</parameter></function>"}}, 1)
    def check(found: dict[str, Any], variant: int) -> None:
        check_round_trip(template.render, found, variant)

    check()


def test_every_published_template_with_this_format_is_tested() -> None:
    if not published_templates():
        pytest.skip(f"{ARCHIVE} does not exist")
    with_format = {name for name, source in published_templates().items() if "<parameter=" in source}
    twins = {"Qwen3.5-35B-A3B-mlx-8bit-g32/chat_template.jinja", "Qwen3.8-27B/chat_template.ollama.jinja"}
    tested = test_published_templates_round_trip.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert with_format == twins | set(tested)


# Calls and reasoning


@pytest.mark.parametrize(
    ("output", "reasoning", "content", "found"),
    [
        (f"why\n</think>\n\n{CALL}", "why", "", 1),
        (f"draft:\n{CALL}\nyes\n</think>\n\n{CALL}", f"draft:\n{CALL}\nyes", "", 1),
        (f"why\n\n{CALL}", "why", "", 1),
        (f"why\n\n{CALL}\n{CALL}\n", "why", "", 2),
        (f"`<tool_call>`\n</think>\n\nok\n{CALL}", "`<tool_call>`", "ok", 1),
        (f"why\n</think>\n\n<function=f>\n{X}</function>", "why", "", 1),
        ("why\n</think>\n\n<think> and </think>", "why and ", "", 0),
    ],
)
def test_calls_in_and_after_reasoning(
    tokenizer: Tokenizer, output: str, reasoning: str, content: str, found: int
) -> None:
    splitter = ReasoningSplitter(tokenizer, tokenizer.encode("<|im_start|>assistant\n<think>\n"))
    reader, detokenizer = ToolCallReader(F, tokenizer.added_tokens), tokenizer.detokenizer()
    thoughts, texts = [], []
    for token_id in tokenizer.encode(output):
        thought, segments = splitter.split(token_id, detokenizer.add(token_id))
        thoughts.append(thought)
        texts.append(reader.add_segments(segments).content)
    thought, segments = splitter.split_rest()
    texts += [reader.add_segments(segments).content, reader.finish().content]
    assert "".join([*thoughts, thought]) == reasoning
    assert "".join(texts) == content
    assert [call.arguments for call in reader.calls] == [{"x": 1}] * found
