"""The prompt cache of an engine: new sequences reuse the states of earlier sequences with the same beginning."""

import contextlib
import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from threading import Lock

import numpy as np

from flashmoe_mlx.generation.metrics import ReusedFrom
from flashmoe_mlx.generation.prompt_cache.answers import AnswerMemory
from flashmoe_mlx.generation.prompt_cache.disk import DamagedError, Disk
from flashmoe_mlx.generation.prompt_cache.eviction import shrink
from flashmoe_mlx.generation.prompt_cache.positions import Kind, checkpoint_positions
from flashmoe_mlx.generation.prompt_cache.tree import Match, Segment, Tokens, Tree
from flashmoe_mlx.generation.prompt_cache.vocabulary import Vocabulary
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.layers.cache import Checkpoint
from flashmoe_mlx.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_LEAST_ON_DISK = 4
"""States of a sequence that are kept in memory until they are on disk: of the system message, of turns, of the end."""
_SHOWN = 16
"""Tokens on either side of a divergence in the log."""


class PromptCache:
    """The conversations of one engine in memory.

    Args:
        budget: the largest size in bytes.
        state_bytes: the size of the states that do not grow with a sequence, at one position.
        tokenizer: the model's tokenizer, if it has one. With it, other tokens for the same text and other forms of
            the model's answers continue known conversations, too.
        disk: conversations on disk; None for none.
    """

    def __init__(
        self, budget: int, state_bytes: int, tokenizer: Tokenizer | None = None, disk: Disk | None = None
    ) -> None:
        self._budget = budget
        # With a disk, a sequence keeps the states that its next turn needs, even if they exceed the budget.
        least = 1 if disk is None else _LEAST_ON_DISK
        self._most_states = max(least, budget // 2 // state_bytes) if state_bytes else None
        self._has_state = state_bytes > 0
        self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self._answers = None if self._vocabulary is None else AnswerMemory(self._vocabulary)
        self._tree = Tree()
        self._latest = self._tree.root
        self._requests = 0
        self._lock = Lock()
        self.disk = disk
        self._recall()

    @property
    def nbytes(self) -> int:
        """The size of all conversations in bytes."""
        return self._tree.nbytes

    @property
    def room(self) -> int:
        """The bytes by which it may grow."""
        return max(0, self._budget - self.nbytes)

    def clear(self) -> None:
        """Forget all conversations."""
        with self._lock:
            self._tree.clear()
            self._latest = self._tree.root
            if self.disk is not None:
                self.disk.clear()
            if self._answers is not None:
                self._answers.clear()

    def _recall(self) -> None:
        """Find the conversations and answers on disk."""
        if self.disk is None:
            return
        for segment in self.disk.load(self._tree, self._key):
            if segment.kind is Kind.ANSWER and self._answers is not None and self._vocabulary is not None:
                tokens = [token for part in segment.path() for token in part.tokens.tolist()]
                answers = self._vocabulary.answers(tokens)
                if answers:
                    self._answers.remember(tokens[: answers[-1][0]], tokens[answers[-1][0] :])

    def _key(self, token_ids: list[int]) -> bytes:
        return b"" if self._vocabulary is None else self._vocabulary.key(token_ids)

    def _load(self, match: Match, loaded: list[Segment]) -> None:
        """Read what is on disk only of the segments of ``match``, and add each segment that was read to ``loaded``.

        Raises:
            DamagedError: one cannot be read. It is forgotten then, with all that follows it.
        """
        for segment in match.segment.path():
            needs_state = segment is match.segment and self._has_state and segment.state is None
            if segment.part is not None and not needs_state:
                continue
            assert self.disk is not None
            before = segment.loaded_bytes
            try:
                self.disk.read(segment, with_state=needs_state)
            except DamagedError as error:
                _log.warning("prompt cache: %s; it is computed again", error)
                self._forget(segment)
                raise
            self._tree.nbytes += segment.loaded_bytes - before
            loaded.append(segment)
        if loaded and self.disk is not None:
            self.disk.touch(match.segment)

    def _remove_deleted(self, segments: list[Segment]) -> None:
        """Remove those of ``segments``, which are no longer on disk, whose contents are not in memory."""
        for segment in segments:
            if segment.part is None and segment.parent is not None and segment in segment.parent.children:
                self._forget(segment)

    def _forget(self, segment: Segment) -> None:
        """Remove a segment and all segments after it, from the disk, too."""
        for child in list(segment.children):
            self._forget(child)
        if self.disk is not None:
            self.disk.discard(segment)
        self._tree.remove(segment)

    def aligned(self, prompt_ids: list[int], most: int) -> list[int]:
        """Return the tokens of a known conversation for the part of a prompt that means the same.

        Args:
            prompt_ids: the prompt.
            most: the largest length of the result; ``prompt_ids`` are returned if it would be longer.
        """
        vocabulary, answers = self._vocabulary, self._answers
        if vocabulary is None or answers is None:
            return prompt_ids
        with self._lock:
            result = answers.restored(prompt_ids)
            segment, size = self._tree.match_text(vocabulary.key(result), self._has_state)
            exact = self._tree.match(np.array(result, np.uint32), self._has_state)
            if size > len(vocabulary.key(result[: exact.length])):
                known = [token for part in segment.path() for token in part.tokens.tolist()]
                rest = _after(result, size, vocabulary)
                result = result if rest is None else known + rest
        return result if len(result) <= most else prompt_ids

    def resume(self, sequence: Sequence) -> None:
        """Begin a ``sequence`` without tokens after the longest known beginning of its prompt.

        Also chooses the positions at which its passes keep states.
        """
        request, cache, empty = sequence.request, sequence.cache, sequence.cache.mark()
        tokens = np.array(request.prompt_ids, np.uint32)
        with self._lock:
            self._requests += 1
            match, source = self._found(tokens)
            if match.length:
                path = match.segment.path()
                try:
                    cache.assemble([segment.part or [] for segment in path], match.segment.state or [], match.length)
                except Exception:
                    _log.warning("prompt cache: a prompt could not be continued", exc_info=True)
                    cache.rewind(empty)
                    match = replace(match, segment=self._tree.root, length=0)
                match.segment.used = self._requests
                for segment in path:
                    segment.reused = True
            if self.disk is not None:  # segments before a damaged one were read, too
                shrink(self._tree, self._budget, match.segment)
        boundaries = {} if self._vocabulary is None else self._vocabulary.boundaries(request.prompt_ids)
        sequence.prefilled = sequence.metrics.reused_tokens = match.length
        sequence.metrics.reused_from = source if match.length else None
        sequence.keep_at = checkpoint_positions(len(tokens), boundaries, match.length, self._most_states)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s", self._described(tokens, match))

    def _found(self, tokens: Tokens) -> tuple[Match, ReusedFrom]:
        """Return what ``tokens`` continue, in memory, and where it was."""
        loaded: list[Segment] = []
        while True:
            match = self._tree.match(tokens, self._has_state)
            with contextlib.suppress(DamagedError):
                self._load(match, loaded)
                path = match.segment.path()
                if any(segment in loaded for segment in path):
                    return match, "disk"
                return match, "live" if match.segment in self._latest.path() else "ram"

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
            if self._answers is not None and sequence.finish_reason != "cancelled":
                self._answers.remember(request.prompt_ids, sequence.token_ids)
            if self.disk is not None:
                for segment in deepest.path():
                    if segment.stored is None:
                        self._remove_deleted(self.disk.write(segment))
            shrink(self._tree, self._budget, deepest)
            self._latest = deepest

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
        added = tokens[start:position].copy()
        key = self._key(added.tolist())
        segment = Segment(deepest, added, key, position, kind, part(start, position), state, self._requests)
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
        listed = tokens.tolist()
        return repr(listed if self._vocabulary is None else self._vocabulary.tokenizer.decode(listed))


def _after(token_ids: list[int], size: int, vocabulary: Vocabulary) -> list[int] | None:
    """Return tokens for the text of ``token_ids`` after the first ``size`` bytes of its key.

    None if it begins inside a character or an added token.
    """
    ends = list(accumulate(map(vocabulary.key_size, token_ids), initial=0))
    position = bisect_left(ends, size)
    end = ends[position]
    if end == size:
        return token_ids[position:]
    cut = vocabulary.encode_key(vocabulary.key([token_ids[position - 1]])[size - end :])
    return None if cut is None else cut + token_ids[position:]
