"""Conversion of messages from the form of clients to the form of templates."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published import ARCHIVE, published_templates

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.made_models.byte_tokenizer import CHAT_TEMPLATE
from flashmoe_mlx.text.chat_template import ChatTemplate

USER = {"role": "user", "content": "?"}
PARTS = [{"type": "text", "text": "Who "}, {"type": "input_text", "text": "are"}, {"text": " you?"}, "!"]
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
JSON_ONLY = "{{ messages | tojson }}"
TEXT_ONLY = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"


@cache
def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, {})


def render(source: str, messages: Any, **options: Any) -> str:
    return compiled(source).render(messages, **options)


def conversation(arguments: Any, nested: bool = True) -> list[dict[str, Any]]:
    call = {"name": "f", "arguments": arguments}
    tool_call = {"id": "1", "type": "function", "function": call} if nested else call
    assistant = {"role": "assistant", "content": None, "tool_calls": [tool_call]}
    return [USER, assistant, {"role": "tool", "tool_call_id": "1", "content": "20"}]


# Arguments of tool calls


def family() -> list[str]:
    """Return the template of the demo model and the published templates in the archive, if there is one."""
    return [CHAT_TEMPLATE, *(source for source in published_templates().values() if "<parameter=" in source)]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"city": "Zürich", "x": [1.0, None, True, {"a": "\n"}]}])
def test_arguments_as_json_text_and_as_objects_render_alike(arguments: dict[str, Any], nested: bool) -> None:
    for source in family():
        objects = render(source, conversation(arguments, nested))
        for text in (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False, indent=1)):
            assert render(source, conversation(text, nested)) == objects


@pytest.mark.parametrize("nothing", ["", " \n", None])
def test_missing_arguments_are_an_empty_object(nothing: object) -> None:
    for source in family():
        assert render(source, conversation(nothing)) == render(source, conversation({}))


def test_the_order_of_keys_is_kept() -> None:
    assert '{"b": 1, "a": 2}' in render(JSON_ONLY, conversation('{"b": 1, "a": 2}'))


def test_json_text_is_kept_for_templates_that_expect_it() -> None:
    source = "{% set c = messages[1].tool_calls[0].function.arguments %}{{ c if c is string else c | tojson }}"
    assert render(source, conversation('{"a":1}')) == '{"a": 1}'
    distinguishing = (
        "{% set arguments = messages[1].tool_calls[0].function.arguments %}{{ 'text' if arguments is string }}"
    )
    assert render(distinguishing, conversation('{"a":1}')) == "text"
    assert render(distinguishing, conversation("")) == ""


def test_messages_are_not_changed() -> None:
    messages = [*conversation('{"a": 1}'), {"role": "user", "content": PARTS}]
    original = copy.deepcopy(messages)
    render(CHAT_TEMPLATE, messages)
    assert messages == original


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": 1e999}', "1e999 is not a number"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ("[1]", "not of an array"),
        ("5", "not of a number"),
        ("true", "not of a boolean"),
        ("null", "not of null"),
        ('"{}"', "not of a string"),
        ([1], "must be a JSON object"),
        (5, "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_invalid_arguments_are_refused(arguments: Any, reason: str, nested: bool) -> None:
    with pytest.raises(InputError) as failure:
        render(CHAT_TEMPLATE, conversation(arguments, nested))
    assert reason in str(failure.value)
    place = "messages[1].tool_calls[0].function.arguments" if nested else "messages[1].tool_calls[0].arguments"
    assert str(failure.value).startswith(place + " ")
    assert "\n" not in str(failure.value)
    assert failure.value.code == "invalid_messages"


# Contents as lists of parts


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_text_parts_are_joined(role: str) -> None:
    plain, parts = ([{"role": role, "content": content}, USER] for content in ("Who are you?!", PARTS))
    typed = [{"role": role, "content": [{"type": "text", "text": "Who are you?!"}]}, USER]
    assert render(TEXT_ONLY, parts) == render(TEXT_ONLY, plain)
    assert render(CHAT_TEMPLATE, typed) == render(CHAT_TEMPLATE, plain)
    assert render(CHAT_TEMPLATE, parts) == render(CHAT_TEMPLATE, plain)


def test_an_empty_list_is_empty_text() -> None:
    for source in (TEXT_ONLY, CHAT_TEMPLATE):
        empty, text = ([{"role": "user", "content": content}] for content in ([], ""))
        assert render(source, empty) == render(source, text)


def test_templates_that_accept_parts_receive_them() -> None:
    source = "{% for part in messages[0].content %}[{{ part.type }}]{% endfor %}"
    assert render(source, [{"role": "user", "content": [PARTS[0], IMAGE]}]) == "[text][image_url]"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ([PARTS[0], IMAGE], "messages[1].content[1] is a part of type 'image_url'"),
        ([{"type": "text"}], "messages[1].content[0] is a part of type 'text'"),
        ([{"type": "text", "text": None}], "messages[1].content[0] is "),
        ([5], "messages[1].content[0] is not a part"),
        ([["x"]], "messages[1].content[0] is not a part"),
        (5, "messages[1].content is neither text nor a list of parts"),
        ({"text": "x"}, "messages[1].content is neither text nor a list of parts"),
    ],
)
def test_errors_name_unsupported_contents(content: Any, place: str) -> None:
    for source in (TEXT_ONLY, CHAT_TEMPLATE):
        with pytest.raises(InputError) as failure:
            render(source, [USER, {"role": "user", "content": content}])
        assert place in str(failure.value)
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("role", "reason"),
    [("developer", "messages[1].role is 'developer'; "), ("User", "messages[1].role is 'User'; "), ("tool", "")],
)
def test_errors_name_a_refused_role(role: str, reason: str) -> None:
    source = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
    )
    for content in ("x", PARTS):
        with pytest.raises(InputError) as failure:
            render(source, [USER, {"role": role, "content": content}])
        assert str(failure.value) == f"{reason}chat template: unknown role"
        assert failure.value.code == "template_refused"
    with pytest.raises(InputError) as failure:
        render("{{ raise_exception('no tools') }}", [{"role": "developer", "content": "x"}])
    assert str(failure.value) == "chat template: no tools"


# Malformed messages


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "no messages"),
        (5, "messages must be a list, not int"),
        (None, "messages must be a list"),
        ([USER, "hi"], "messages[1] must be an object"),
        ([{"role": "user", "content": object()}], "messages[0].content "),
        ([{"role": "user", "content": {("a",): 1}}], "messages[0].content "),
        ([USER, {"role": "user", "content": [b"x"]}], "messages[1].content "),
        ([{"content": "x"}], "messages[0].role must be text"),
        ([{"role": 5, "content": "x"}], "messages[0].role must be text"),
        ([{"role": "", "content": "x"}], "messages[0].role must be text"),
        (
            [USER, {"role": "assistant", "tool_calls": {"function": {"name": "f"}}}],
            "messages[1].tool_calls must be a list",
        ),
        ([USER, {"role": "assistant", "tool_calls": "x"}], "messages[1].tool_calls must be a list"),
        ([USER, {"role": "assistant", "tool_calls": ["x"]}], "messages[1].tool_calls[0] must be an object"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": 5}]}], "messages[1].tool_calls[0].function must be"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
            "messages[1].tool_calls[0].function.name must be a text",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": 5, "arguments": "{}"}]}],
            "messages[0].tool_calls[0].name must",
        ),
        (
            [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}],
            "messages[0].function_call is not supported",
        ),
    ],
)
def test_errors_name_malformed_messages(messages: Any, place: str) -> None:
    with pytest.raises(InputError) as failure:
        render(JSON_ONLY, messages)
    assert place in str(failure.value)
    assert failure.value.code == "invalid_messages"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=1),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "type", "text"]),
            inner | st.sampled_from(["user", "assistant", "tool", "text", "{}"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.lists(anything, max_size=3) | anything)
@example([{"role": "assistant", "tool_calls": {"function": 1}}])
@example([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}])
def test_any_messages_render_or_are_refused_in_one_line(messages: Any) -> None:
    for source in (CHAT_TEMPLATE, JSON_ONLY, TEXT_ONLY):
        try:
            assert isinstance(render(source, messages), str)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017


# Options


def test_a_refusal_contains_the_reason_of_the_template() -> None:
    with pytest.raises(InputError) as failure:
        render("{{ raise_exception('Disabling thinking is not supported.') }}", [USER], enable_thinking=False)
    assert str(failure.value) == "chat template: Disabling thinking is not supported."
    assert failure.value.code == "template_refused"


def test_codes_of_template_errors() -> None:
    with pytest.raises(InputError) as failure:
        render("{{ 1 / 0 }}", [USER])
    assert failure.value.code == "template_failed"
    with pytest.raises(InputError) as failure:
        render("{% if %}", [USER])
    assert failure.value.code == "invalid_template"


def test_unknown_options_are_allowed() -> None:
    assert render("{{ self }}{{ mood }}", [USER], mood="good", nothing=[1]).endswith("good")


def test_options_of_a_template() -> None:
    source = (
        "{% set x = 1 %}{% macro f(a) %}{{ a }}{{ depth }}{% endmacro %}{{ f(x) }}{% for m in messages %}{{ m }}"
        "{% endfor %}{% if enable_thinking is defined %}{{ bos_token }}{% endif %}{{ namespace() and range(1) }}"
        "{{ reasoning_effort | default('high') }}{{ tools }}{{ documents }}{{ strftime_now('%Y') }}{{ image_token }}"
    )
    template = ChatTemplate(source, {"image_token": "<i>"}, "{{ tool_choice }}")
    assert template.variables == {"depth", "enable_thinking", "reasoning_effort", "tool_choice"}
    assert ChatTemplate(CHAT_TEMPLATE, {}).variables == {"enable_thinking"}


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("Qwen3.5-397B-A17B", {"enable_thinking", "add_vision_id"}),
        ("Qwen3.8-2.4T-A95B", {"enable_thinking", "reasoning_effort", "preserve_thinking"}),
    ],
)
def test_options_of_published_templates(name: str, variables: set[str]) -> None:
    source = published_templates().get(f"{name}/chat_template.jinja")
    if source is None:
        pytest.skip(f"{ARCHIVE} does not exist")
    template = ChatTemplate(source, {})
    assert template.variables == variables
    if name == "Qwen3.8-2.4T-A95B":
        for options in ({"enable_thinking": False}, {"reasoning_effort": "high"}):
            with pytest.raises(InputError) as failure:
                template.render([USER], **options)  # type: ignore[arg-type]
            assert failure.value.code == "template_refused"


# Files with templates


def loaded(folder: Path, **options: Any) -> str:
    template = ChatTemplate.load(folder)
    assert template is not None
    return template.render([USER], **options)


def test_precedence_of_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one", "eos_token": "<e>"}')
    assert loaded(tmp_path) == "one"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "two{{ eos_token }}"}')
    assert loaded(tmp_path) == "two<e>"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert loaded(tmp_path) == "three"


@pytest.mark.parametrize("file", ["chat_template.json", "tokenizer_config.json"])
def test_a_list_of_named_templates(tmp_path: Path, file: str) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / file).write_text(json.dumps({"chat_template": named}))
    assert loaded(tmp_path) == "plain"
    assert loaded(tmp_path, tools=[]) == "tools"
    (tmp_path / file).write_text(json.dumps({"chat_template": named[1:]}))
    with pytest.raises(InputError) as raised:
        loaded(tmp_path)
    assert raised.value.code == "invalid_template"
    assert file in str(raised.value)


def test_additional_templates(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{% not read")
    assert loaded(tmp_path, tools=[]) == "plain"
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert loaded(tmp_path) == "plain"
    assert loaded(tmp_path, tools=[]) == "tools"


@pytest.mark.parametrize("text", ["[]", "{", '{"chat_template": 5}', '{"chat_template": ["x"]}'])
def test_malformed_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat_template.json").write_text(text)
    with pytest.raises(InputError) as failure:
        ChatTemplate.load(tmp_path)
    assert "chat_template.json" in str(failure.value)


def test_files_without_a_template_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text("{}")
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one"}')
    assert loaded(tmp_path) == "one"
