"""Refusal of prompts for their length, before they cost anything.

To tokenize all of a text that does not fit into the context may take minutes and gigabytes.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.layers.sequences import BLOCK
from flashmoe_mlx.server.conversation import Message
from flashmoe_mlx.stores.memory import check_memory

_CHARACTERS_PER_TOKEN = 4
"""Texts with fewer characters per token of the context are tokenized as a whole at once."""
LONGEST_COUNTED = 2**22
"""Characters of the longest texts whose tokens are counted exactly although they exceed the context."""
_PART = 2**16
_LOST_AT_A_CUT = 16
"""Tokens that a part of a text may have more than its share of the whole."""


def refuse_long(texts: Iterable[str], engine: Engine) -> None:
    """Refuse texts that have certainly more tokens together than the context holds.

    Raises:
        InputError: they do; code "prompt_too_long".
    """
    least, most = least_tokens(texts, engine), engine.model.config.max_context
    if least > most:
        raise InputError(f"the prompt has {least} tokens or more, but the context holds {most}", code="prompt_too_long")


def least_tokens(texts: Iterable[str], engine: Engine) -> int:
    """Return a number of tokens that the texts have at least; counting ends above the context's size."""
    given = list(texts)
    most = engine.model.config.max_context
    if sum(map(len, given)) <= _CHARACTERS_PER_TOKEN * most:
        return 0
    tokens = 0
    for part in (text[start : start + _PART] for text in given for start in range(0, len(text), _PART)):
        tokens += max(0, len(engine.tokenizer.encode(part)) - _LOST_AT_A_CUT)
        if tokens > most:
            break
    return tokens


def check_prompt_memory(tokens: int, engine: Engine) -> None:
    """Refuse a prompt whose keys, values and states do not fit into the free memory.

    Raises:
        InputError: they do not; code "not_enough_memory".
    """
    need = engine.model.prompt_memory
    kept = need.cache_per_token * tokens + need.cache_fixed
    passes = need.of(min(tokens, BLOCK))
    check_memory(f"a prompt of {tokens} tokens", kept + passes, "send a shorter one, or wait until other answers end")


def texts_of(messages: Iterable[Message]) -> Iterator[str]:
    """Yield the texts of messages that every chat template renders, which excludes earlier thinking."""
    for message in messages:
        content: Any = message.get("content")
        if isinstance(content, str):
            yield content.strip()
