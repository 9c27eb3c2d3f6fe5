"""Options that the APIs of OpenAI share, as arguments of ``Engine.request``."""

import json
from collections.abc import Mapping
from typing import Any

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.server.conversation import MOST_TOOLS
from flashmoe_mlx.server.events import EndReason, Usage
from flashmoe_mlx.server.fields import Fields, refuse

_MOST_MESSAGES = 10_000
_MOST_TOKENS = 2**31 - 1
_MOST_CHOICES = 128
_MOST_STOPS = 16
_MOST_BIASES = 1024
_LARGEST_SCHEMA = 64 * 2**10
"""The largest JSON schema, in characters of its JSON."""
_LARGEST_TEMPLATE_VALUE = 4096
_LEAST_TOP_P = 1e-9
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
FINISH_REASONS: Mapping[EndReason, str] = {
    "stop": "stop",
    "stop_string": "stop",
    "length": "length",
    "context": "length",
    "tool_calls": "tool_calls",
}
"""The names of the ends of an answer in the chat and completions APIs."""


def sampling_options(fields: Fields, engine: Engine) -> dict[str, Any]:
    """Return the options of sampling, of the length and of stop strings.

    ``max_tokens`` is what the context holds if the request does not limit it; more than that is no error.
    """
    options: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 10),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
    }
    if options["top_p"] is not None:
        options["top_p"] = max(options["top_p"], _LEAST_TOP_P)
    top_k = fields.integer("top_k", -1, _MOST_TOKENS)
    options["top_k"] = 0 if top_k == -1 else top_k
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    options["seed"] = None if seed is None else seed % 2**64
    options["stop"] = stop_strings(fields, "stop")
    options["stop_token_ids"] = token_ids(fields, "stop_token_ids", engine, _MOST_STOPS)
    options["min_tokens"] = fields.integer("min_tokens", 0, _MOST_TOKENS)
    bias = fields.object("logit_bias")
    if bias is not None:
        if len(bias.content) > _MOST_BIASES:
            fields.refuse("logit_bias", f"must have at most {_MOST_BIASES} tokens")
        options["logit_bias"] = {token: bias.number(token, -100, 100) or 0.0 for token in bias.content}
    for name in ("n", "best_of"):
        if fields.integer(name, 1, _MOST_CHOICES) not in (None, 1):
            fields.refuse(name, "must be 1: a request has one answer", code="unsupported")
    limit = fields.integer("max_tokens", 1, _MOST_TOKENS)
    limit = fields.integer("max_completion_tokens", 1, _MOST_TOKENS) or limit
    options["max_tokens"] = min(limit or _MOST_TOKENS, engine.model.config.max_context)
    return {name: value for name, value in options.items() if value is not None}


def token_ids(fields: Fields, name: str, engine: Engine, most: int) -> list[int] | None:
    """Return a list of at most ``most`` ids of tokens in the model's vocabulary."""
    tokens = fields.items(name, most)
    size = engine.model.config.vocab_size
    if not all(type(token) is int and 0 <= token < size for token in tokens or []):
        fields.refuse(name, f"must hold token ids from 0 to {size - 1}", code="unknown_token")
    return tokens


def stop_strings(fields: Fields, name: str) -> list[str]:
    """Return stop strings: one text, or a list of texts; empty ones are dropped."""
    given = fields.any(name)
    texts = [given] if isinstance(given, str) else fields.items(name, _MOST_STOPS) or []
    for text in texts:
        if not isinstance(text, str) or len(text) > 4096:
            fields.refuse(name, "must be a string or a list of strings, of at most 4096 characters each")
    return [text for text in texts if text]


def template_options(fields: Fields, engine: Engine) -> dict[str, Any]:
    """Return the options of the chat template; an option that the model's template does not read is refused."""
    template = engine.tokenizer.chat_template
    known = frozenset() if template is None else template.variables
    given: dict[str, Any] = {}
    kwargs = fields.object("chat_template_kwargs")
    for name, value in (kwargs.content if kwargs else {}).items():
        if name not in known and name != "enable_thinking":
            shown = ", ".join(sorted(known)) or "none"
            refuse(
                f"chat_template_kwargs.{name}"[:120],
                f"is not an option of this model's chat template; its options are {shown}",
                code="unread_template_option",
            )
        if len(json.dumps(value)) > _LARGEST_TEMPLATE_VALUE:
            refuse(f"chat_template_kwargs.{name}", f"must have at most {_LARGEST_TEMPLATE_VALUE} characters")
        given[name] = value
    reasoning = fields.object("reasoning")
    effort = fields.choice("reasoning_effort", *_EFFORTS)
    effort = effort or (reasoning.choice("effort", *_EFFORTS) if reasoning else None)
    if "enable_thinking" in fields:
        given.setdefault("enable_thinking", fields.flag("enable_thinking"))
    can_switch = "enable_thinking" in known
    if effort is not None and can_switch:
        given.setdefault("enable_thinking", effort != "none")
    if effort is not None and "reasoning_effort" in known and not (effort == "none" and can_switch):
        given.setdefault("reasoning_effort", effort)
    thinking = given.pop("enable_thinking", None)
    if not isinstance(thinking, bool | None):
        refuse("chat_template_kwargs.enable_thinking", "must be true or false")
    return {"enable_thinking": thinking, "template_options": given}


def given_messages(fields: Fields) -> list[Fields]:
    """Return the messages of a request, at least one.

    Raises:
        ApiError: there are none, or too many.
    """
    given = fields.objects("messages", _MOST_MESSAGES)
    if not given:
        fields.refuse("messages", "is required: a list with at least one message", code="missing_field")
    return given


def declared_tools(fields: Fields) -> list[dict[str, Any]]:
    """Return the declarations of functions; ``Engine.request`` checks their form."""
    tools = [dict(tool.content) for tool in fields.objects("tools", MOST_TOOLS) or []]
    for index, tool in enumerate(tools):
        check_size(tool, f"tools[{index}]")
    return tools


def check_size(schema: Any, place: str) -> None:
    """Refuse a schema, or a tool with its schema, that is too large."""
    if len(json.dumps(schema)) > _LARGEST_SCHEMA:
        refuse(place, f"must have at most {_LARGEST_SCHEMA} characters of JSON", code="schema_too_large")


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return the numbers of tokens in the form of the chat and completions APIs."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
