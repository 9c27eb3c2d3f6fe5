"""Let a model answer items, freely or under the constraints that the items allow, and count what that takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.request import RequestOptions
from flashmoe_mlx.research.quality.items import Answer, Item, judge
from flashmoe_mlx.research.quality.passages import thinking_refusal

_MOST_ANSWER_TOKENS = 256
_ANSWER_ROOM = 16
"""Tokens by which a free answer may exceed one and a half times the length of the expected answer."""
_THINKING_ROOM = 2048
"""Tokens of thinking before an answer, for a model whose template does not allow thinking to be switched off."""


@dataclass(frozen=True)
class Attempt:
    """A judged answer, and its cost.

    Attributes:
        answer: the answer.
        tokens: the number of generated tokens.
        forwards: the number of passes through the model, those of the prompt included.
        seconds: the wall time.
    """

    answer: Answer
    tokens: int
    forwards: int
    seconds: float


def attempt(engine: Engine, item: Item, *, constrained: bool = False) -> Attempt:
    """Let the model answer ``item`` greedily; judge the answer without preceding thinking.

    Args:
        engine: the model.
        item: a judged item.
        constrained: whether the answer follows the item's schema or, for a call, declarations of tools. It may then
            have as many tokens as any answer: where they do not suffice, a free answer is wrong in any case.
    """
    start = time.perf_counter()
    generation = engine.generate(item.messages, **_options(engine, item, constrained=constrained))
    pieces = list(generation)
    seconds = time.perf_counter() - start
    text = "".join(piece.text for piece in pieces).strip()
    judged = judge(item, text) if item.call is None else judge(item, text, engine.tool_format)
    metrics = generation.metrics
    forwards = len(metrics.prefill.steps) + len(metrics.decode.steps)
    return Attempt(judged, sum(len(piece.token_ids) for piece in pieces), forwards, seconds)


def check_constraints(engine: Engine, items: Sequence[Item]) -> None:
    """Compile the constraints of ``items``.

    Raises:
        InputError: llguidance is not installed (code "missing_package"), or it refuses the schema or the tools of an
            item, which the error names.
    """
    for item in items:
        if item.constrainable:
            try:
                engine.request(item.messages, **_options(engine, item, constrained=True))
            except InputError as error:
                asked = next((str(entry["content"]) for entry in reversed(item.messages) if entry.get("content")), "")
                raise InputError(
                    f"the item {asked!r:.80}: {error}; constraints=false answers it freely only", code=error.code
                ) from None


def _options(engine: Engine, item: Item, *, constrained: bool) -> RequestOptions:
    expected = len(engine.tokenizer.encode(item.answer))
    room = _MOST_ANSWER_TOKENS if constrained else min(_MOST_ANSWER_TOKENS, expected + expected // 2 + _ANSWER_ROOM)
    thinks = thinking_refusal(engine, item) is not None
    options: RequestOptions = {
        "tools": item.tools or None,
        "enable_thinking": None if thinks else False,
        "max_tokens": room + _THINKING_ROOM if thinks else room,
        "temperature": 0,
    }
    if constrained and item.schema is not None:
        return {**options, "schema": item.schema}
    if constrained and item.call is not None:
        return {**options, "tool_choice": "required", "parallel_tool_calls": False}
    return options
