"""A tree of conversations: segments of tokens that share their beginnings, each with what its tokens left behind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.generation.prompt_cache.positions import Kind
from flashmoe_mlx.layers.cache import Checkpoint, LayerCache

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Stored:
    """The place of a segment on disk.

    Attributes:
        file: the file of its state.
        offset: the place of its keys and values in the file of the conversation.
        size: their bytes.
        checksum: their checksum.
    """

    file: Path
    offset: int
    size: int
    checksum: str


@dataclass(eq=False, slots=True)
class Segment:
    """Consecutive tokens of one or several conversations.

    Attributes:
        parent: the segment before; None for the root, which has no tokens.
        tokens: its tokens.
        key: their text; see ``Vocabulary.key``. Empty for a model without a tokenizer.
        end: the number of tokens of the conversation up to its end.
        kind: the position of its end.
        part: its keys and values in every layer that keeps tokens; None while they are only on disk.
        state: the states after its last token; None once they were evicted.
        children: segments that continue it.
        used: the number of the request that used or made it last.
        reused: whether a later request continued this conversation.
        stored: its place on disk, if it is there.
    """

    parent: "Segment | None"
    tokens: Tokens
    key: bytes
    end: int
    kind: Kind
    part: Checkpoint | None
    state: Checkpoint | None
    used: int
    children: list["Segment"] = field(default_factory=list)
    reused: bool = False
    stored: Stored | None = None

    @property
    def part_bytes(self) -> int:
        """The size of tokens, keys and values in bytes."""
        return self.tokens.nbytes + len(self.key) + _nbytes(self.part or ())

    @property
    def state_bytes(self) -> int:
        """The size of the states in bytes."""
        return _nbytes(self.state or ())

    @property
    def has_state(self) -> bool:
        """Whether a sequence can continue after it."""
        return self.state is not None or self.stored is not None

    @property
    def loaded_bytes(self) -> int:
        """The bytes that it would free if it were only on disk."""
        return _nbytes(self.part or ()) + self.state_bytes

    def path(self) -> list["Segment"]:
        """Return the segments from the first one of the conversation to this one."""
        segments: list[Segment] = []
        segment = self
        while segment.parent is not None:
            segments.append(segment)
            segment = segment.parent
        return segments[::-1]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known beginning of a prompt.

    Attributes:
        segment: the last segment to continue from; the root if there is none.
        length: the number of tokens to continue after; within ``segment``, or 0.
        common: the number of tokens that the prompt shares with a conversation.
        diverged: the tokens of that conversation from there on, at most a few.
    """

    segment: Segment
    length: int
    common: int
    diverged: Tokens


class Tree:
    """Segments of all conversations; ``nbytes`` is their size."""

    def __init__(self) -> None:
        self.root: Segment = Segment(None, np.zeros(0, np.uint32), b"", 0, Kind.SYSTEM, [], None, 0)
        self.nbytes: int = 0

    def segments(self) -> Iterator[Segment]:
        """Yield all segments but the root."""
        waiting = list(self.root.children)
        while waiting:
            segment = waiting.pop()
            waiting += segment.children
            yield segment

    def match(self, tokens: Tokens, has_state: bool) -> Match:
        """Find the segments to continue ``tokens`` from; at least one token is left over.

        Args:
            tokens: a prompt.
            has_state: whether a sequence continues only where its states were kept.
        """
        best = Match(self.root, 0, 0, self.root.tokens)
        longest = best
        waiting = [self.root]
        while waiting:
            segment = waiting.pop()
            for child in segment.children:
                shared = _shared(child.tokens, tokens[segment.end :])
                common = segment.end + shared
                if common > longest.common:
                    longest = Match(child, 0, common, child.tokens[shared : shared + _FEW])
                if shared == len(child.tokens):
                    waiting.append(child)
                usable = min(common, len(tokens) - 1)
                if has_state and (not child.has_state or usable < child.end):
                    continue
                if usable > max(best.length, segment.end):
                    best = Match(child, usable, common, child.tokens[:0])
        return Match(best.segment, best.length, longest.common, longest.diverged)

    def match_text(self, key: bytes, has_state: bool) -> tuple[Segment, int]:
        """Find the last segment to continue a prompt from whose tokens may be other tokens for the same text.

        Args:
            key: the text of the prompt.
            has_state: whether a sequence continues only where its states were kept.

        Returns:
            The segment, or the root; and the size of the key up to its end.
        """
        best = (self.root, 0)
        waiting = [best]
        while waiting:
            segment, size = waiting.pop()
            for child in segment.children:
                end = size + len(child.key)
                if size < end < len(key) and key.startswith(child.key, size):
                    waiting.append((child, end))
                    if end > best[1] and (child.has_state or not has_state):
                        best = (child, end)
        return best

    def descend(self, tokens: Tokens) -> Segment:
        """Return the segment that ends the longest path of whole segments along ``tokens``."""
        deepest = self.root
        waiting = [self.root]
        while waiting:
            segment = waiting.pop()
            if segment.end > deepest.end:
                deepest = segment
            rest = tokens[segment.end :]
            waiting += [child for child in segment.children if _shared(child.tokens, rest) == len(child.tokens)]
        return deepest

    def add(self, segment: Segment) -> None:
        """Add a segment to its parent."""
        assert segment.parent is not None
        segment.parent.children.append(segment)
        self.nbytes += segment.part_bytes + segment.state_bytes

    def give_state(self, segment: Segment, state: Checkpoint) -> None:
        """Keep the states after ``segment`` again."""
        segment.state = state
        self.nbytes += segment.state_bytes

    def unload(self, segment: Segment) -> None:
        """Keep ``segment`` on disk only."""
        self.nbytes -= segment.loaded_bytes
        segment.part = segment.state = None

    def drop_state(self, segment: Segment) -> None:
        """Forget the states after ``segment``."""
        self.nbytes -= segment.state_bytes
        segment.state = None

    def remove(self, segment: Segment) -> None:
        """Remove a segment without children."""
        assert segment.parent is not None
        assert not segment.children
        segment.parent.children.remove(segment)
        self.nbytes -= segment.part_bytes + segment.state_bytes
        segment.part = segment.state = None  # the segment may still be known as the latest one

    def clear(self) -> None:
        """Remove all segments."""
        self.root.children.clear()
        self.nbytes = 0


_FEW = 16
"""Tokens of the other conversation that a match shows after the divergence."""


def _nbytes(layers: Sequence[LayerCache | None]) -> int:
    return sum(layer.nbytes for layer in layers if layer is not None)


def _shared(first: Tokens, second: Tokens) -> int:
    """Return the number of tokens at the beginning that both have."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(np.argmax(different)) if different.any() else length
