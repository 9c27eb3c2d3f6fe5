"""Rendering, sandbox, errors and files of chat templates."""

import contextlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.made_models.byte_tokenizer import write_byte_tokenizer
from flashmoe_mlx.text import chat_template as chat_template_module
from flashmoe_mlx.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def render(source: str, messages: Any = USER, **variables: Any) -> str:
    return ChatTemplate(source, {"eos_token": "<|im_end|>"}).render(messages, **variables)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(folder)
    template = ChatTemplate.load(folder)
    assert template is not None
    return template


# Features of templates


def test_block_tags_leave_no_whitespace() -> None:
    assert (
        render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n") == "hi\n"
    )


def test_variables_of_a_template_have_their_values() -> None:
    source = "{{ messages[0].role }} {{ tools }} {{ add_generation_prompt }} {{ documents }} {{ eos_token }} {{ mood }}"
    assert render(source) == "user None True None <|im_end|> "
    assert render(source, tools=[{"a": 1}], add_generation_prompt=False, documents=[], mood="good") == (
        "user [{'a': 1}] False [] <|im_end|> good"
    )


def test_options_cannot_replace_the_messages() -> None:
    template, options = ChatTemplate("", {}), {"messages": []}
    with pytest.raises(TypeError, match="multiple values for argument 'messages'"):
        template.render(USER, **options)
    assert render("{{ eos_token }}", eos_token="other") == "other"


@settings(deadline=None)
@given(json_values)
def test_tojson_is_plain_json(value: Any) -> None:
    assert render("{{ value | tojson }}", value=value) == json.dumps(value, ensure_ascii=False)


def test_tojson_arguments() -> None:
    value = {"b": "<é>&'", "a": [1]}
    assert render("{{ value | tojson }}", value=value) == '{"b": "<é>&\'", "a": [1]}'
    assert render("{{ value | tojson(ensure_ascii=true, sort_keys=true) }}", value=value) == (
        '{"a": [1], "b": "<\\u00e9>&\'"}'
    )
    assert render("{{ value | tojson(indent=2, separators=(',', ':')) }}", value=value) == json.dumps(
        value, ensure_ascii=False, indent=2, separators=(",", ":")
    )


def test_generation_tag_renders_its_body_in_a_separate_scope() -> None:
    body = "{% set x = 2 %}{{ m.content }}{{ x }}"
    source = (
        "{% for m in messages %}{% set x = 1 %}{%- generation %}" + body + "{%- endgeneration -%}{{ x }}{% endfor %}"
    )
    assert render(source) == "hi21"


def test_loop_controls() -> None:
    source = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
    )
    assert render(source + "{% endfor %}") == "02"


def test_strftime_now() -> None:
    before = datetime.now().year
    assert before <= int(render("{{ strftime_now('%Y') }}")) <= datetime.now().year


def test_dict_and_namespace() -> None:
    assert render("{{ dict([('a', 1)], b=2) }} {{ dict.fromkeys('xy', 0) }}") == "{'a': 1, 'b': 2} {'x': 0, 'y': 0}"
    assert render("{% set ns = namespace({'a': 1}, self=2) %}{% set ns.a = 3 %}{{ ns.a }}{{ ns.self }}") == "32"


def test_fields_with_the_value_none_are_left_out() -> None:
    messages = [{"role": "assistant", "content": None, "extra": [None]}]
    assert render("{{ messages[0] | tojson }}", messages) == '{"role": "assistant", "extra": [null]}'


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_available_under_all_names(name: str) -> None:
    messages = [{"role": "assistant", "content": "", name: "why"}]
    assert render("{{ messages[0].reasoning_content }} {{ messages[0].thinking }}", messages) == "why why"
    assert set(messages[0]) == {"role", "content", name}


def test_templates_receive_json_types_only() -> None:
    class Role(str):
        def write(self) -> str:
            return "written"

    assert render("{{ messages[0].role }}", [{"role": Role("user"), "content": ""}]) == "user"
    with pytest.raises(InputError) as failure:
        render("{{ messages[0].role.write() }}", [{"role": Role("user"), "content": ""}])
    assert failure.value.code == "template_failed"
    with pytest.raises(InputError) as failure:
        render("", [{"role": "user", "content": object()}])
    assert failure.value.code == "invalid_messages"
    with pytest.raises(InputError) as failure:
        render("", image=b"")
    assert failure.value.code == "invalid_messages"


@pytest.mark.parametrize("messages", [[], ["hi"], "hi", [None]])
def test_malformed_messages(messages: Any) -> None:
    with pytest.raises(InputError) as failure:
        render("", messages)
    assert failure.value.code == "invalid_messages"


def test_recursive_messages() -> None:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = message
    with pytest.raises(InputError) as failure:
        render("", [message])
    assert failure.value.code == "template_failed"


# The sandbox and its limits


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__",
        "''['__class__'].__base__.__subclasses__()",
        "('' | attr('__class__')).__mro__",
        "'{0.__class__.__mro__}'.format('')",
        "'{x.__class__.__mro__}'.format_map({'x': ''})",
        "lipsum.__globals__.os",
        "cycler.__init__.__globals__",
        "self.__init__.__globals__",
        "raise_exception.__globals__.json",
        "strftime_now.__code__.co_consts",
        "messages.append(1)",
        "messages[0].update(role='system')",
        "dict.update(messages[0], role='system')",
        "dict.__call__.__globals__",
        "namespace(__html__=1)",
        "namespace({1: 1})",
        "range(1000000)",
    ],
)
def test_escapes_from_the_sandbox_fail(expression: str) -> None:
    with pytest.raises(InputError) as failure:
        render("{{ " + expression + " }}")
    assert failure.value.code == "template_failed"


@pytest.mark.parametrize(
    "expression", ["''.__class__", "messages.__class__", "messages['__len__']", "lipsum.__globals__"]
)
def test_hidden_attributes_are_undefined(expression: str) -> None:
    assert render("{{ (" + expression + ") is defined }}") == "False"


def test_a_namespace_refuses_hidden_names() -> None:
    with pytest.raises(InputError) as failure:
        render("{% set ns = namespace() %}{% set ns.__html__ = 1 %}")
    assert failure.value.code == "template_failed"


@pytest.mark.parametrize(
    "expression",
    [
        "'a' * 10**9",
        "10**9 * 'a'",
        "[0] * 10**9",
        "(0, 1) * 10**9",
        "10**(10**10)",
        "(-7) ** (2**30)",
        "2**(2**24) * 2**(2**24)",
    ],
)
def test_large_results_of_small_expressions_are_refused(expression: str) -> None:
    with pytest.raises(InputError) as failure:
        render("{% set x = " + expression + " %}")
    assert failure.value.code == "template_failed"


def test_arithmetic_with_small_numbers() -> None:
    assert render("{{ 'ab' * 2 }} {{ 3 * [1] }} {{ 2**10 }} {{ 2**-1 }} {{ 1.5 * 2 }} {{ 'a' * -1 }}.") == (
        "abab [1, 1, 1] 1024 0.5 3.0 ."
    )


def test_output_is_limited() -> None:
    with pytest.raises(InputError) as failure:
        render("{% for i in range(100000) %}{% for j in range(100000) %}{{ 'a' * 1000000 }}{% endfor %}{% endfor %}")
    assert failure.value.code == "template_failed"


def test_output_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_module, "_LARGEST_OUTPUT", 6)
    assert render("{{ 'abc' }}{{ 'def' }}") == "abcdef"
    with pytest.raises(InputError) as failure:
        render("{{ 'abc' }}{{ 'defg' }}")
    assert failure.value.code == "template_failed"


# Errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n{% if %}", "line 2: "),
        ("{% for x in y %}", "line 1: "),
        ("{% generation %}", "line 1: "),
        ("{% include 'other' %}", "no loader"),
        ("{{ x.y }}", "'x' is undefined"),
        ("{{ raise_exception('No user\n query') }}", "chat template: No user query$"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "TypeError: "),
        ("{{ x | tojson }}", "TypeError: "),
        ("{{ messages | nothing }}", "nothing"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "RecursionError"),
        ("{{ raise_exception('x' * 10000) }}", r"x{300}\.\.\.$"),
    ],
)
def test_errors_are_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as failure:
        render(source)
    assert str(failure.value).startswith("chat template: ")
    assert "\n" not in str(failure.value)


FRAGMENTS = (
    "{{ }} {% %} {%- -%} {# #} if else endif for in endfor x messages tools . [ ] ( ) '' 'a' 0 1 | + * ** ~ , = set "
    "macro endmacro call endcall generation endgeneration block endblock tojson loop break namespace dict is not "
    "filter endfilter import raise_exception __class__ \n"
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS.split(" ")), max_size=30).map(" ".join))
def test_any_template_renders_or_is_refused(source: str) -> None:
    for template in (source, "{{ " + source + " }}", "{% set x = " + source + " %}{{ x }}"):
        with contextlib.suppress(InputError):
            assert isinstance(render(template), str)


# Files


def test_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert ChatTemplate.load(tmp_path) is None


def test_files_with_a_template(tmp_path: Path) -> None:
    def loaded(chat_template: object) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        return template.render(USER)

    assert loaded("one") == "one"
    assert loaded([{"name": "rag", "template": "two"}, {"name": "default", "template": "three"}]) == "three"
    (tmp_path / "chat_template.jinja").write_text("fouré\n")
    assert loaded("one") == "fouré"


@pytest.mark.parametrize(
    "value", [1, {"default": "x"}, ["x"], [{"name": "default"}], [{"name": "rag", "template": "x"}], []]
)
def test_a_malformed_template_entry_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(InputError) as failure:
        ChatTemplate.load(tmp_path)
    assert failure.value.code == "invalid_template"
    assert "tokenizer_config.json" in str(failure.value)


def test_an_oversized_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("a" * 2**20)
    assert ChatTemplate.load(tmp_path) is not None
    (tmp_path / "chat_template.jinja").write_text("a" * (2**20 + 1))
    with pytest.raises(InputError) as failure:
        ChatTemplate.load(tmp_path)
    assert failure.value.code == "file_too_large"
    assert "chat_template.jinja" in str(failure.value)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "é" * (2**19 + 1)}))
    with pytest.raises(InputError) as failure:
        ChatTemplate.load(tmp_path)
    assert failure.value.code == "invalid_template"


def test_special_tokens_come_from_the_tokenizer_config(tmp_path: Path) -> None:
    config = {
        "bos_token": None,
        "eos_token": {"__type": "AddedToken", "content": "<e>", "special": True},
        "pad_token": "<p>",
        "add_bos_token": True,
        "vision_token": "<v>",
        "extra_special_tokens": {"image_token": "<i>"},
        "chat_template": "{{ [bos_token, eos_token, pad_token, add_bos_token, vision_token, image_token] | join }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(USER) == "<e><p><v><i>"


def test_a_malformed_special_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": 5, "chat_template": ""}')
    with pytest.raises(InputError) as failure:
        ChatTemplate.load(tmp_path)
    assert failure.value.code == "invalid_tokenizer"


# The template of synthetic models


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), min_size=1), st.booleans())
def test_turns_are_rendered_as_chatml(qwen: ChatTemplate, turns: list[tuple[str, str]], prompted: bool) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    prompt = "<|im_start|>assistant\n<think>\n\n</think>\n\n" if prompted else ""
    assert qwen.render(messages, add_generation_prompt=prompted) == expected + prompt


def test_thinking_can_be_switched_on(qwen: ChatTemplate) -> None:
    assert qwen.render(USER, enable_thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert qwen.render(USER, enable_thinking=True).endswith("<|im_start|>assistant\n<think>\n")


def test_a_conversation_with_tools(qwen: ChatTemplate) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "reasoning_content": "look it up", "tool_calls": [call, call]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ]
    tool = {"type": "function", "function": {"name": "weather", "description": "<é>"}}
    system, _, rest = qwen.render(messages, tools=[tool]).partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\n# Tools\n")
    assert f"<tools>\n{json.dumps(tool, ensure_ascii=False)}\n</tools>" in system
    assert system.endswith("\n\nBe brief.")
    rendered_call = (
        "<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    assert rest == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nlook it up\n</think>\n\n{rendered_call}\n{rendered_call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([*USER, {"role": "system", "content": ""}], "the system message must be the first"),
        ([{"role": "judge", "content": ""}], "unknown role: judge"),
    ],
)
def test_refused_conversations(qwen: ChatTemplate, messages: Any, reason: str) -> None:
    with pytest.raises(InputError) as failure:
        qwen.render(messages)
    assert failure.value.code == "template_refused"
    assert str(failure.value) == f"chat template: {reason}"
