"""Render a prompt, with the options of the chat template, as the text that the model gets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.untrusted import read_text
from flashmoe_mlx.text.chat_template import ChatTemplate
from flashmoe_mlx.text.messages import find_non_text_part
from flashmoe_mlx.text.quoting import Quoting
from flashmoe_mlx.text.tags import THINK
from flashmoe_mlx.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
_LARGEST_TOOLS = 16 * 2**20
_THINKING = "enable_thinking"
_UNREAD, _INVALID = "unread_template_option", "invalid_template_option"
_RESERVED = {
    "messages": "give messages as the prompt",
    "tools": "use tools=",
    "add_generation_prompt": "it is always true",
    "self": "Jinja uses the name",
}


def encode_prompt(
    prompt: str | Messages,
    tokenizer: Tokenizer,
    *,
    raw: bool = False,
    system: str | None = None,
    tools: Tools | None = None,
    enable_thinking: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Render ``prompt`` like ``render_prompt``, and return its tokens.

    Names of special tokens in messages and tools are text; in a ``raw`` prompt they are tokens.
    """
    template = tokenizer.chat_template
    quoting = Quoting(tokenizer, *(() if raw or template is None else (prompt, system, tools)))
    text = render_prompt(
        quoting.mark(prompt),
        template,
        raw=raw,
        system=quoting.mark(system),
        tools=quoting.mark(tools),
        enable_thinking=enable_thinking,
        template_options=template_options,
    )
    return quoting.encode(text)


def render_prompt(
    prompt: str | Messages,
    template: ChatTemplate | None,
    *,
    raw: bool = False,
    system: str | None = None,
    tools: Tools | None = None,
    enable_thinking: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """Render ``prompt`` with ``template``; return a ``raw`` string, or a string without a template, unchanged.

    Args:
        prompt: the user's message, or messages with "role" and "content".
        template: the model's chat template; None for a model without a template.
        raw: whether to skip the template.
        system: the system message.
        tools: declarations of functions, in the form of the OpenAI API.
        enable_thinking: whether the model may think before it answers; None leaves it to the template. False is also
            accepted for a model that never thinks.
        template_options: further variables of the template, such as ``{"reasoning_effort": "low"}``.

    Raises:
        InputError: an argument is of the wrong kind, or the template refuses it or does not read it (code
            "unread_template_option"); a message holds images or other media (code "unsupported_content").
    """
    if not isinstance(prompt, str) and (isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence)):
        raise InputError(
            f"the prompt is of type {type(prompt).__name__}; give text or a list of messages", code="invalid_prompt"
        )
    options = _options(enable_thinking, template_options)
    if raw or template is None:
        given = {
            "system": system is not None,
            "tools": tools is not None,
            "enable_thinking or template_options": options,
        }
        unused = [name for name, value in given.items() if value]
        why = "raw=true disables the chat template" if raw else "this model has no chat template"
        if unused:
            raise InputError(f"{unused[0]} needs a chat template, and {why}", code="no_chat_template")
        if not isinstance(prompt, str):
            raise InputError(
                f"messages need a chat template, and {why}: give the prompt as a string", code="no_chat_template"
            )
        return prompt
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        if not isinstance(system, str):
            raise InputError(f"system is of type {type(system).__name__}; give text", code="invalid_system")
        if any(isinstance(message, Mapping) and message.get("role") == "system" for message in messages):
            raise InputError("the messages already contain a system message: leave out system=", code="invalid_system")
        messages = [{"role": "system", "content": system}, *messages]
    _check_text_only(messages)
    declared = None if tools is None else checked_tools(tools)
    try:
        text = template.render(messages, declared, **options)
    except InputError as error:
        if not options or error.code != "template_refused":
            raise
        asked = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise InputError(f"{error} (it was asked for {asked})", code=error.code) from error
    _check_read(options, template)
    if options.get(_THINKING) is not None and not template.reads(_THINKING):
        _check_thinking(bool(options[_THINKING]), text)
    return text


def _check_text_only(messages: Sequence[Message]) -> None:
    """Refuse images and other media: templates replace them with marks that mean nothing without the media."""
    for index, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, Mapping) else None
        found = find_non_text_part(parts, f"messages[{index}].content") if isinstance(parts, list | tuple) else ""
        if found:
            raise InputError(f"{found}: this engine takes text only", code="unsupported_content")


def _check_read(options: Mapping[str, Any], template: ChatTemplate) -> None:
    """Refuse options that the template does not read."""
    for name in options:
        if name != _THINKING and not template.reads(name):
            known = ", ".join(sorted(template.variables)) or "none"
            raise InputError(
                f"template_options.{name}: this model's chat template does not read it; its options are {known}",
                code=_UNREAD,
            )


def _check_thinking(asked: bool, text: str) -> None:
    """Refuse ``asked`` unless ``text``, the output of a template without the option, happens to satisfy it."""
    thinks = text.rstrip().endswith(THINK)
    if asked != thinks:
        why = "always lets the model think" if thinks else "has no thinking to switch on"
        raise InputError(
            f"enable_thinking={asked} (thinking={json.dumps(asked)} on the command line): this model's chat template "
            f"{why}; leave it out",
            code=_UNREAD,
        )


def _options(enable_thinking: bool | None, template_options: Mapping[str, Any] | None) -> dict[str, Any]:
    if template_options is not None and not isinstance(template_options, Mapping):
        raise InputError(
            f"template_options is of type {type(template_options).__name__}; give names and values", code=_INVALID
        )
    options = dict(template_options or {})
    for name in options:
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"template_options: {name!r} is not the name of a variable", code=_INVALID)
        if name in _RESERVED:
            raise InputError(f"template_options.{name} cannot be set: {_RESERVED[name]}", code=_INVALID)
    for value in (enable_thinking, options.get(_THINKING)):
        if not isinstance(value, bool | None):  # templates compare with true and false, and "no" equals neither of them
            raise InputError(f"enable_thinking={value!r}: must be true, false or null", code=_INVALID)
    if enable_thinking is None:
        return options
    if options.get(_THINKING, enable_thinking) != enable_thinking:
        raise InputError("enable_thinking and template_options.enable_thinking contradict each other", code=_INVALID)
    return {**options, _THINKING: enable_thinking}


def checked_tools(tools: Tools, where: str = "tools") -> list[dict[str, Any]]:
    """Return ``tools`` if they are declarations of functions in the form of the OpenAI API.

    Raises:
        InputError: a declaration is malformed; code "invalid_tools". ``where`` names the place in the message.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InputError(f"{where} must be a list of tools", code="invalid_tools")
    checked = []
    names = set()
    for index, tool in enumerate(tools):
        problem = _tool_problem(tool)
        if problem is not None:
            raise InputError(f"{where}[{index}]{problem}", code="invalid_tools")
        name = tool.get("function", tool)["name"]
        if name in names:
            raise InputError(f"{where}[{index}]: a second function named {name!r}", code="invalid_tools")
        names.add(name)
        checked.append(dict(tool))
    return checked


def _tool_problem(tool: object) -> str | None:
    """Return the fault of a declaration, beginning with its place in the declaration; None if there is no fault."""
    form = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
    if not isinstance(tool, Mapping):
        return f" must be an object such as {form}"
    if tool.get("type", "function") != "function":
        return f".type: {tool['type']!r} is not supported, only 'function'"
    place, function = (".function", tool["function"]) if "function" in tool else ("", tool)
    if not isinstance(function, Mapping):
        return f"{place} must be an object such as {form}"
    name = function.get("name")
    if not isinstance(name, str) or not name:
        return f"{place}.name must be text that is not empty"
    if not isinstance(function.get("description"), str | None):
        return f"{place}.description must be text"
    if not isinstance(function.get("parameters"), Mapping | None):
        return f"{place}.parameters must be a JSON schema, which is an object"
    return None


def load_tools(path: Path) -> list[dict[str, Any]]:
    """Read a JSON file with a list of tools.

    Raises:
        InputError: the file is missing, is not JSON, or does not hold tools.
    """
    text = read_text(path, _LARGEST_TOOLS)
    if text is None:
        raise InputError(f"{path}: no such file")
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}", code="invalid_tools") from error
    return checked_tools(tools, f"{path}: tools")
