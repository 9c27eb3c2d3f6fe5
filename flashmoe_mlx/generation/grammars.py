"""Compile the constraints of requests to one model, with llguidance, which the extra ``grammar`` installs."""

import json
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe_mlx.errors import InputError, missing_extra
from flashmoe_mlx.generation.constraints import Constraint
from flashmoe_mlx.generation.endings import Endings
from flashmoe_mlx.generation.prompting import Tools
from flashmoe_mlx.generation.request import ConstraintOptions, ToolChoice
from flashmoe_mlx.text import tool_formats
from flashmoe_mlx.text.tags import END_TOOL_CALL, TOOL_CALL
from flashmoe_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_log = logging.getLogger(__name__)
_FORMS = ("schema", "json_object", "grammar", "regex", "choices")
_INVALID, _SCHEMA, _GRAMMAR = "invalid_constraint", "unsupported_schema", "unsupported_grammar"
_LARGEST = 64 * 2**10
"""Number of characters of a schema or a grammar."""
_LARGEST_TOOLS = 2**20
"""Number of characters of a grammar of tool calls; agents declare tools of 80 KB."""
_DEEPEST = 32
_LARGEST_FACTOR = 10_000
"""The least common multiple of all ``multipleOf``; compilation takes minutes for a prime number of seven digits."""
_MOST_ITEMS, _MOST_STEP_ITEMS = 200_000, 400_000
"""Limits of llguidance for the items of a row and of a step; a schema of ``_LARGEST`` stays below both."""
_JSON = {"whitespace_pattern": "[ \\t\\n\\r]{0,40}"}
"""Options of llguidance: whitespace is free, but a weak model cannot go on with it for ever."""


def grammars_available() -> bool:
    """Return whether the package that constraints need is installed."""
    return find_spec("llguidance") is not None


class Grammars:
    """A compiler of constraints for one model, whose tokenizer is prepared when it is first needed.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: the number of logits, which may exceed the number of tokens.
        tool_format: the name of a module in ``text/tool_formats``; None if no request may declare tools.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, tool_format: str | None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tool_format = tool_format
        self._prepared: LLTokenizer | None = None
        self._endings = Endings(tokenizer, vocab_size)
        self._lock = threading.Lock()

    def constraint(
        self, options: ConstraintOptions, tools: Tools | None, raw: bool, thinking: bool | None
    ) -> Constraint | None:
        """Compile the constraint that a request asks for; None if it asks for none.

        Args:
            options: the options of the request.
            tools: the declared tools.
            raw: whether the prompt is raw, so that thinking is not separated.
            thinking: whether the model may think first; None for the default of the template.

        Raises:
            InputError: the options contradict each other (code "invalid_constraint"), a schema or a grammar is refused
                ("unsupported_schema", "unsupported_grammar"), or llguidance is not installed ("missing_extra").
        """
        asked = [name for name in _FORMS if options.get(name) not in (None, False)]
        for name in ("json_object", "parallel_tool_calls"):
            if not isinstance(options.get(name), bool | None):
                raise InputError(f"{name}={options.get(name)!r:.60}: must be true or false", code=_INVALID)
        if len(asked) > 1:
            raise InputError(f"{asked[0]} and {asked[1]} cannot both constrain an answer", code=_INVALID)
        choice = _checked_choice(options, tools)
        calls = bool(tools) and choice not in (None, "none")
        lazily = calls and choice == "auto" and not asked
        if not asked and (not calls or (lazily and not grammars_available())):
            return None
        if calls and asked and asked[0] not in ("schema", "json_object"):
            raise InputError(
                f"{asked[0]} cannot be combined with tools: leave them out, or tool_choice='none'", code=_INVALID
            )
        _require_llguidance()
        form = _answer(options, asked[0]) if asked else None
        if calls:
            try:
                form, code = self._with_calls(form, tools or (), choice or "auto", options), "unsupported_tools"
            except ValueError as error:
                if not lazily:
                    raise InputError(f"tools: {error}", code="unsupported_tools") from None
                _log.warning("tools: %s, so calls are not constrained", error)
                return None
        else:
            code = _SCHEMA if asked[0] in ("schema", "json_object") else _GRAMMAR
            form = self._whole(form or "", asked[0])
        matcher = self._compiled(form, asked[0] if asked else "tools", code)
        return Constraint(
            matcher,
            self._tokenizer,
            self._vocab_size,
            self._endings,
            may_think=thinking is not False,
            splits=not raw,
            each_call=lazily,
            one_call=options.get("parallel_tool_calls") is False,
        )

    def _whole(self, answer: str, form: str) -> str:
        """Return a grammar of the ``answer`` alone."""
        if form == "grammar":
            return answer
        if form == "regex":
            return str(self._library().LLMatcher.grammar_from_regex(answer))
        return f"start: {answer}"

    def _with_calls(self, answer: str | None, tools: Tools, choice: ToolChoice, options: ConstraintOptions) -> str:
        """Return a grammar of tool calls, or of ``answer`` or calls if there is an answer and the model may choose.

        Raises:
            ValueError: a name cannot be written in the model's format.
        """
        if not isinstance(choice, str):
            tools = [tool for tool in tools if tool.get("function", tool)["name"] == _named(choice)]
        module = import_module(f"{tool_formats.__name__}.{self._tool_format}")
        rules = [module.GRAMMAR(tools, self._fits, self._tag(END_TOOL_CALL))]
        if choice == "auto" and answer is None:
            start = "start: body"
        else:
            more = "" if options.get("parallel_tool_calls") is False else ' ("\\n" call)*'
            rules.append(f"call: {self._tag(TOOL_CALL)} body\ncalls: call{more}")
            start = "start: calls"
            if answer is not None and choice == "auto":
                start += f" | answer\nanswer: {answer}"
        text = "\n".join([start, *rules])
        if len(text) > _LARGEST_TOOLS:
            raise InputError(f"tools: larger than {_LARGEST_TOOLS:,} characters", code="unsupported_tools")
        return text

    def _fits(self, schema: Mapping[str, Any]) -> bool:
        """Tell whether the grammar of a parameter's ``schema`` compiles."""
        try:
            problem = self._problem(f"start: {_json_rule(schema)}")
        except InputError as error:
            problem = str(error)
        if problem:
            _log.warning("tools: the schema of a parameter is not enforced, only its type: %s", problem)
        return not problem

    def _problem(self, grammar: str) -> str:
        check = self._library().LLMatcher.validate_grammar_with_warnings
        refused, texts = check(grammar, self._tokens(), limits=self._limits())
        return "; ".join(texts) if refused else ""

    def _compiled(self, grammar: str, what: str, code: str) -> "LLMatcher":
        """Compile a grammar in Lark.

        Raises:
            InputError: llguidance refuses it, or no text satisfies it; ``what`` names the option, ``code`` the error.
        """
        matcher: LLMatcher = self._library().LLMatcher(self._tokens(), grammar, log_level=0, limits=self._limits())
        if not matcher.is_error():
            words = np.zeros(-(-self._vocab_size // 32), np.int32)
            begun = matcher.deep_copy()
            begun.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if words.any() and not begun.is_error():
                return matcher
        reason = " ".join(matcher.get_error().split()) or "no text satisfies it"
        raise InputError(f"{what}: {reason[:500]}", code=code)

    def _tokens(self) -> "LLTokenizer":
        """Return the tokenizer of llguidance, which is built once: a second for a vocabulary of 200,000 tokens."""
        with self._lock:
            if self._prepared is None:
                eos = sorted(self._tokenizer.eos_token_ids)  # llguidance would guess it, and wrongly for some models
                self._prepared = self._library().LLTokenizer(
                    self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=eos or None
                )
            return self._prepared

    def _limits(self) -> Any:
        """Return limits by which an accepted schema does not become too complex in the middle of an answer."""
        return self._library().LLParserLimits(max_items_in_row=_MOST_ITEMS, step_max_items=_MOST_STEP_ITEMS)

    def _library(self) -> Any:
        return import_module("llguidance")

    def _tag(self, tag: str) -> str:
        """Return the symbol of a tag: its token, or its text if the tokenizer has no token for it."""
        token = self._tokenizer.added_tokens.get(tag)
        return json.dumps(tag) if token is None else f"<[{token}]>"


def _require_llguidance() -> None:
    if not grammars_available():
        raise missing_extra("a constrained answer", "grammar")


def _checked_choice(options: ConstraintOptions, tools: Tools | None) -> ToolChoice | None:
    """Return ``tool_choice``.

    Raises:
        InputError: it is malformed, or it asks for a function that is not declared; code "invalid_tool_choice".
    """
    choice = options.get("tool_choice")
    if choice is None or choice in ("auto", "none"):
        return choice
    names = [tool.get("function", tool).get("name") for tool in tools or ()]
    if choice == "required" and not names:
        raise InputError("tool_choice='required': no tools are declared", code="invalid_tool_choice")
    if choice == "required":
        return choice
    name = _named(choice)
    if name is None:
        raise InputError(
            f'tool_choice={choice!r:.100}: must be "auto", "none", "required" or {{"name": ...}}',
            code="invalid_tool_choice",
        )
    if name not in names:
        raise InputError(f"tool_choice: no tool is named {name!r:.100}", code="invalid_tool_choice")
    return choice


def _named(choice: object) -> str | None:
    """Return the name in ``{"name": ...}`` or ``{"type": "function", "function": {"name": ...}}``."""
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _answer(options: ConstraintOptions, form: str) -> str:
    """Return the expression or, for ``grammar``, the whole grammar in Lark that an option describes."""
    if form == "schema":
        return _json_rule(options["schema"])
    if form == "json_object":
        return _json_rule({"type": "object"})
    if form == "choices":
        choices = options["choices"]
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise InputError(f"choices={choices!r:.60}: must be a list of texts", code=_GRAMMAR)
        if any(not isinstance(choice, str) or not choice for choice in choices):
            raise InputError("choices: each must be text that is not empty", code=_GRAMMAR)
        return _bounded(" | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices), form, _GRAMMAR)
    text = options["regex"] if form == "regex" else options["grammar"]
    if not isinstance(text, str) or not text:
        raise InputError(f"{form}={text!r:.60}: must be text", code=_GRAMMAR)
    return _bounded(text, form, _GRAMMAR)


def _json_rule(schema: object) -> str:
    """Return the expression of JSON that satisfies ``schema``."""
    if not isinstance(schema, Mapping):
        raise InputError(f"schema={schema!r:.60}: must be a JSON schema, which is an object", code=_SCHEMA)
    try:
        text = json.dumps({**schema, "x-guidance": _JSON}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"schema: is not JSON ({error})", code=_SCHEMA) from None
    if _depth(schema) > _DEEPEST:
        raise InputError(f"schema: nested more than {_DEEPEST} levels deep", code=_SCHEMA)
    if math.lcm(*_factors(schema)) > _LARGEST_FACTOR:
        raise InputError(
            f"schema: the numbers of multipleOf have a common multiple over {_LARGEST_FACTOR:,}", code=_SCHEMA
        )
    return f"%json {_bounded(text, 'schema', _SCHEMA)}"


def _factors(schema: object) -> Iterator[int]:
    """Yield the numerators of all numbers of ``multipleOf``, without trailing zeros."""
    if isinstance(schema, Mapping):
        number = schema.get("multipleOf")
        if isinstance(number, int | float) and not isinstance(number, bool):
            digits = Decimal(repr(number)).normalize().as_tuple().digits
            yield int("".join(map(str, digits))) or 1
        yield from _factors(list(schema.values()))
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from _factors(part)


def _depth(value: object) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list | tuple) else 0


def _bounded(text: str, form: str, code: str) -> str:
    if len(text) > _LARGEST:
        raise InputError(f"{form}: {len(text):,} characters; at most {_LARGEST:,} are allowed", code=code)
    return text
