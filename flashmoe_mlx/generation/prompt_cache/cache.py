"""The prompt cache of an engine: it begins sequences where earlier ones left off, and keeps those that end."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import replace
from threading import Lock

import numpy as np

from flashmoe_mlx.generation.prompt_cache.eviction import shrink
from flashmoe_mlx.generation.prompt_cache.positions import Kind, checkpoint_positions
from flashmoe_mlx.generation.prompt_cache.tree import Match, Segment, Tokens, Tree
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.layers.cache import Checkpoint

_log = logging.getLogger(__name__)
_SHOWN = 16
"""Tokens on either side of a divergence in the log."""


class PromptCache:
    """The conversations of one engine in memory.

    Args:
        budget: the largest size in bytes.
        state_bytes: the size of the states that do not grow with a sequence, at one position.
        decode: turns tokens into text, for the log; None for a model without a tokenizer.
    """

    def __init__(self, budget: int, state_bytes: int, decode: Callable[[list[int]], str] | None = None) -> None:
        self._budget = budget
        self._most_states = max(1, budget // 2 // state_bytes) if state_bytes else None
        self._decode = decode
        self._tree = Tree()
        self._requests = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """The size of all conversations in bytes."""
        return self._tree.nbytes

    def clear(self) -> None:
        """Forget all conversations."""
        with self._lock:
            self._tree.clear()

    def resume(self, sequence: Sequence) -> None:
        """Begin a ``sequence`` without tokens after the longest known beginning of its prompt.

        Also chooses the positions at which its passes keep states.
        """
        request, cache, empty = sequence.request, sequence.cache, sequence.cache.mark()
        tokens = np.array(request.prompt_ids, np.uint32)
        with self._lock:
            self._requests += 1
            match = self._tree.match(tokens, cache.has_state)
            if match.length:
                path = match.segment.path()
                try:
                    cache.assemble([segment.part for segment in path], match.segment.state or [], match.length)
                except Exception:
                    _log.warning("prompt cache: a prompt could not be continued", exc_info=True)
                    cache.rewind(empty)
                    match = replace(match, segment=self._tree.root, length=0)
                match.segment.used = self._requests
                for segment in path:
                    segment.reused = True
        sequence.prefilled = sequence.metrics.reused_tokens = match.length
        sequence.metrics.reused_from = "ram" if match.length else None
        sequence.keep_at = checkpoint_positions(len(tokens), request.boundaries, match.length, self._most_states)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s", self._described(tokens, match))

    def keep(self, sequence: Sequence) -> None:
        """Keep an ended ``sequence``, without the last pass if that was cancelled halfway.

        A failure leaves the sequence out and is logged.
        """
        if sequence.cache.broken and sequence.finish_reason != "cancelled":
            return
        try:
            self._keep(sequence)
        except Exception:
            _log.warning("prompt cache: a sequence could not be kept", exc_info=True)

    def _keep(self, sequence: Sequence) -> None:
        cache, request = sequence.cache, sequence.request
        tokens = np.array([*request.prompt_ids, *sequence.token_ids][: cache.length], np.uint32)
        states = {position: state for position, state in sequence.kept.items() if position <= cache.length}
        with self._lock:
            deepest = self._tree.descend(tokens)
            if not cache.broken and cache.length > len(request.prompt_ids):
                states[cache.length] = cache.state()
            for position, state in sorted(states.items()):
                kind = (sequence.keep_at or {}).get(position, Kind.ANSWER)
                deepest = self._add(deepest, tokens, position, kind, state, cache.part)
            shrink(self._tree, self._budget, deepest)

    def _add(
        self,
        deepest: Segment,
        tokens: Tokens,
        position: int,
        kind: Kind,
        state: Checkpoint,
        part: Callable[[int, int], Checkpoint],
    ) -> Segment:
        """Add the tokens from ``deepest`` to ``position``, or the ``state`` of a known position without one.

        Args:
            deepest: the segment so far.
            tokens: the tokens of the sequence.
            position: the end of the new segment.
            kind: its kind.
            state: the states after it.
            part: copies keys and values of a range of tokens.

        Returns:
            The segment that ends there, or ``deepest``.
        """
        for segment in deepest.path():
            if segment.end == position:
                segment.used = self._requests
                segment.kind = min(segment.kind, kind)
                if segment.state is None:
                    self._tree.give_state(segment, state)
                return deepest
        if position < deepest.end:
            return deepest
        start = deepest.end
        reused = deepest.reused and deepest.kind is not Kind.SYSTEM
        segment = Segment(
            deepest, tokens[start:position].copy(), position, kind, part(start, position), state, self._requests
        )
        segment.reused = reused
        self._tree.add(segment)
        return segment

    def _described(self, tokens: Tokens, match: Match) -> str:
        """Describe the beginning of a sequence for the log."""
        text = f"prompt of {len(tokens)} tokens: {match.length} reused, {match.common} shared"
        if not match.common or match.common == len(tokens):
            return text
        at = match.common
        before, known, new = (
            self._shown(part) for part in (tokens[max(0, at - _SHOWN) : at], match.diverged, tokens[at : at + _SHOWN])
        )
        return f"{text}; after {before} the cache has {known} and the prompt {new}"

    def _shown(self, tokens: Tokens) -> str:
        listed: Listed[int] = tokens.tolist()
        return repr(listed if self._decode is None else self._decode(list(listed)))
