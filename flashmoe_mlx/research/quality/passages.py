"""Items as tokens of a model, and the log-probabilities that the model gives them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompting import render_prompt
from flashmoe_mlx.research.quality.items import Item

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Passage:
    """The tokens of an item: ``given`` are prefilled, ``scored`` are decoded one by one."""

    given: list[int]
    scored: list[int]


def passage(engine: Engine, item: Item) -> Passage:
    """Tokenize ``item`` for the model of ``engine``.

    The first token of a text is given, since nothing predicts it.

    Raises:
        InputError: the item needs a chat template and the model has none (code "no_chat_template").
    """
    tokenizer = engine.tokenizer
    if item.text is not None:
        ids = tokenizer.encode(item.text)
        return Passage(ids[:1], ids[1:])
    # The token that ends the turn is not scored: the template determines it rather than the model.
    return Passage(tokenizer.encode(_prompt(engine, item)), tokenizer.encode(item.answer))


def _prompt(engine: Engine, item: Item) -> str:
    """Render the messages of ``item`` without thinking, unless the template does not allow that."""
    template = engine.tokenizer.chat_template
    if template is None:
        raise InputError(
            "this model has no chat template, so only items with a text can be scored (kinds=[text])",
            code="no_chat_template",
        )
    thinking = None if thinking_refusal(engine, item) else False
    return render_prompt(item.messages, template, tools=item.tools or None, enable_thinking=thinking)


def thinking_refusal(engine: Engine, item: Item) -> str | None:
    """Return the template's reason for refusing to render ``item`` with thinking off; None if it does not refuse.

    The template of Qwen3.8, for example, raises "Disabling thinking is not supported."

    Raises:
        InputError: the template refuses the item with thinking as well.
    """
    template = engine.tokenizer.chat_template
    if template is None or not item.messages:
        return None
    try:
        render_prompt(item.messages, template, tools=item.tools or None, enable_thinking=False)
    except InputError as error:
        render_prompt(item.messages, template, tools=item.tools or None)  # raises if thinking is not the reason
        return str(error)
    return None


def log_probabilities(engine: Engine, tokens: Passage) -> Iterator[Floats]:
    """Yield the log-probabilities [vocabulary] at the position of each scored token, in order.

    The first come from the prefill of the given tokens, the rest from decode steps. A passage without scored tokens
    yields nothing.

    Raises:
        FlashMoeError: the logits contain NaN or +inf (code "bad_logits").
    """
    if not tokens.scored:
        return
    cache = engine.new_cache()
    logits = engine.forward(tokens.given, cache)[-1]
    for index, token in enumerate(tokens.scored):
        yield _log_softmax(logits)
        if index + 1 < len(tokens.scored):
            logits = engine.forward([token], cache)[-1]


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    result: Floats = shifted - np.log(np.exp(shifted).sum())
    return result
