"""Positions of a prompt after which the states of its layers are worth keeping."""

from collections.abc import Mapping
from enum import IntEnum

INTERVAL = 8192
"""Tokens between two states inside a long prompt."""
_NEAR = 8
"""A prompt whose end is at most this far from a kept state needs no other state."""
_MOST_TURNS = 4
"""Beginnings of answers at which states are kept, counted from the end; earlier ones serve only edits."""


class Kind(IntEnum):
    """The position at which a segment ends."""

    SYSTEM = 0
    """The end of the tools and the system message, with which many conversations begin."""
    TURN = 1
    """The beginning of an answer to a user message, where the next turn diverges."""
    PROMPT = 2
    """The end of a prompt, or a position inside a long one."""
    ANSWER = 3
    """The end of an answer."""


def checkpoint_positions(
    prompt_tokens: int, known: Mapping[int, Kind], start: int = 0, most: int | None = None
) -> dict[int, Kind]:
    """Return the positions at which a pass over a prompt keeps states, in ascending order.

    Args:
        prompt_tokens: the length of the prompt.
        known: positions of boundaries in the conversation.
        start: the number of tokens that were processed before.
        most: the largest number of positions, at least 1; None for any.
    """
    last = prompt_tokens - 1  # at least one token is computed, since its logits choose the first token
    chosen = dict.fromkeys(range(INTERVAL, last - INTERVAL // 2, INTERVAL), Kind.PROMPT)
    boundaries = {min(position, last): kind for position, kind in sorted(known.items())}
    turns = [position for position, kind in boundaries.items() if kind is Kind.TURN]
    chosen |= {position: boundaries[position] for position in boundaries if position not in turns[:-_MOST_TURNS]}
    if not any(last - _NEAR <= position <= last for position in boundaries):
        chosen[last] = Kind.PROMPT
    chosen = {position: kind for position, kind in sorted(chosen.items()) if position > start}
    while most is not None and len(chosen) > most:
        inner = [position for position in list(chosen)[:-1] if chosen[position] is Kind.PROMPT] or list(chosen)[:-1]
        del chosen[inner[len(inner) // 2]]
    return chosen
