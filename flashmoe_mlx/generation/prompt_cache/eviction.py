"""The order in which a prompt cache forgets: old before new, one-shots before conversations, system prompts last."""

from collections.abc import Iterator

from flashmoe_mlx.generation.prompt_cache.positions import Kind
from flashmoe_mlx.generation.prompt_cache.tree import Segment, Tree

_CONVERSATION = 8
_SYSTEM = 64
"""Requests by which a conversation that was continued, or a system prompt, outlasts a one-shot."""
_SUPERSEDED = -16
"""Requests by which a one-shot outlasts the states in the middle of a conversation, which serve only edits."""


def shrink(tree: Tree, budget: int, keep: Segment) -> int:
    """Forget segments and states, the least useful first, until ``tree`` fits in ``budget`` bytes.

    The path to ``keep``, the latest segment, goes last, from its end.

    Returns:
        The number of bytes forgotten.
    """
    before = tree.nbytes
    latest = set(keep.path())
    while tree.nbytes > budget:
        candidates = sorted(_candidates(tree, latest), key=lambda pair: pair[0])
        if not candidates:
            break
        for _, segment in candidates:
            if tree.nbytes <= budget:
                break
            if segment.stored is not None:
                tree.unload(segment)
            elif segment.children:
                tree.drop_state(segment)
            else:
                tree.remove(segment)
    return before - tree.nbytes


def _candidates(tree: Tree, latest: set[Segment]) -> Iterator[tuple[tuple[bool, int, int], Segment]]:
    """Yield what can be forgotten next, with its worth: whole leaves, and states of inner segments."""
    for segment in tree.segments():
        if segment.loaded_bytes == 0 or (segment.children and segment.stored is None and segment.state_bytes == 0):
            continue
        worth = segment.used
        if segment.kind is Kind.SYSTEM or len(segment.children) > 1:
            worth += _SYSTEM
        elif segment.children and not _next_turn_needs(segment):
            worth += _SUPERSEDED
        elif segment.reused:
            worth += _CONVERSATION
        yield (segment in latest and worth >= segment.used, worth, -segment.end), segment


def _next_turn_needs(segment: Segment) -> bool:
    """Return whether the latest turn of a conversation begins after ``segment``."""
    if segment.kind is not Kind.TURN:
        return False
    later = segment.children
    while later:
        if any(child.kind is Kind.TURN for child in later):
            return False
        later = [grandchild for child in later for grandchild in child.children]
    return True
