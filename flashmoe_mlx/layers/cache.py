"""The state of a sequence in every layer: keys and values of attention, or the state of a recurrence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import mlx.core as mx

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.layers.recurrent_state import RecurrentState
from flashmoe_mlx.layers.shared_row import SharedRow


class LayerCache(Protocol):
    """The state of one sequence in one layer.

    Kernels may update its arrays in place, so a second reference to an array is no copy; ``snapshot`` makes one.
    """

    @property
    def nbytes(self) -> int:
        """The size of its arrays in bytes."""
        ...

    @property
    def can_trim(self) -> bool:
        """Whether the latest tokens can be removed."""
        ...

    def arrays(self) -> list[mx.array]:
        """Return its arrays, so that they can be evaluated."""
        ...

    def snapshot(self) -> Self:
        """Return an independent copy."""
        ...

    def restore(self, snapshot: Self) -> None:
        """Return to the state of ``snapshot``, which is not changed."""
        ...

    def trim(self, length: int) -> None:
        """Keep the first ``length`` tokens; this requires ``can_trim``."""
        ...

    def mark(self) -> Any:
        """Return a mark for ``rewind``, without a copy."""
        ...

    def rewind(self, mark: Any) -> None:
        """Return to the state at ``mark``, provided that since then kernels only appended or returned new arrays."""
        ...

    def must_grow(self, tokens: int) -> bool:
        """Whether ``tokens`` more tokens make the cache copy what is in it."""
        ...

    @property
    def keeps_tokens(self) -> bool:
        """Whether the cache keeps every token, so that a part of it is the state of these tokens."""
        ...

    def part(self, start: int, end: int) -> Self:
        """Return a copy of the tokens from ``start`` to ``end``; this requires ``keeps_tokens``."""
        ...

    @classmethod
    def of_arrays(cls, arrays: Sequence[mx.array], length: int) -> Self:
        """Return the cache of ``length`` tokens whose ``arrays`` these are."""
        ...

    def assemble(self, parts: Sequence[Self]) -> None:
        """Replace the contents by copies of ``parts``, one after the other.

        A cache with ``keeps_tokens`` takes all parts; any other cache takes the last one, which is a snapshot.
        """
        ...


Checkpoint = list[Any]
"""For each layer, a copy of its state, or None for a layer that keeps tokens; or the other way around."""


@dataclass(frozen=True, slots=True)
class CacheMark:
    """A point to which a ``SequenceCache`` can return.

    Attributes:
        length: the number of tokens.
        layers: the mark of each layer.
        shared: the place of the contents, in place of ``layers``, if they were shared; None otherwise.
    """

    length: int
    layers: Sequence[Any]
    shared: SharedRow | None = None


class SequenceCache:
    """The caches of all layers.

    Attributes:
        length: the number of tokens that went through the layers.
        broken: whether a pass failed or was cancelled halfway: its layers have seen different numbers of tokens.
        shared: the place of the contents while the sequence decodes together with others; None if ``layers`` has them.
    """

    __slots__ = ("__weakref__", "_layers", "broken", "length", "shared")

    def __init__(self, layers: Sequence[LayerCache] = (), length: int = 0) -> None:
        self._layers: list[LayerCache] = list(layers)
        self.length: int = length
        self.broken: bool = False
        self.shared: SharedRow | None = None

    @property
    def layers(self) -> Sequence[LayerCache]:
        """The cache of each layer, with its own arrays: contents that are shared are copied now."""
        if self.shared is not None:
            own_contents([self])
        return self._layers

    def give_arrays(self, index: int) -> list[mx.array]:
        """Return the arrays of a layer, which is empty afterwards: ``shared`` is to hold its contents."""
        layer = self.layers[index]
        self._layers[index] = type(layer)()
        return layer.arrays()

    def own(self, arrays: Sequence[tuple[mx.array, mx.array]]) -> None:
        """Take the contents from both arrays of every layer, which belong to this sequence alone."""
        self._layers = [
            type(layer).of_arrays(own, self.length) for layer, own in zip(self._layers, arrays, strict=True)
        ]
        self.shared = None

    @property
    def nbytes(self) -> int:
        """The size of all layers in bytes."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def can_trim(self) -> bool:
        """Whether every layer can remove its latest tokens."""
        return all(layer.can_trim for layer in self.layers)

    def arrays(self) -> list[mx.array]:
        """Return the arrays of all layers, so that they can be evaluated together."""
        return [array for layer in self.layers for array in layer.arrays()]

    def snapshot(self) -> "SequenceCache":
        """Return an independent copy, from which the sequence can be continued in a different way.

        Raises:
            InputError: a pass over the sequence failed halfway; code "broken_sequence".
        """
        if self.broken:
            raise InputError(
                "a pass over this sequence failed halfway: it has no state to keep", code="broken_sequence"
            )
        copy = SequenceCache([layer.snapshot() for layer in self.layers], self.length)
        mx.eval(copy.arrays())
        return copy

    def restore(self, snapshot: "SequenceCache") -> None:
        """Return to the state of ``snapshot``, which is not changed; this also repairs a broken sequence."""
        self.shared = None
        for layer, kept in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(kept)
        mx.eval(self.arrays())
        self.length, self.broken = snapshot.length, False

    def mark(self) -> CacheMark:
        """Return a mark of the present state for ``rewind``, without a copy.

        Only kernels for GPUs leave the marked state as it is; anywhere else, use ``snapshot``.
        """
        if self.shared is not None:
            return CacheMark(self.length, (), self.shared)
        return CacheMark(self.length, [layer.mark() for layer in self.layers])

    def rewind(self, mark: CacheMark) -> None:
        """Return to the state at ``mark``, also from a pass that failed. No kernel may be writing to the cache."""
        if self.shared is not None and mark.shared is not None:
            self.shared = self.shared.with_states_of(mark.shared)
        else:
            layers, then = self.layers, mark.shared
            marks = mark.layers
            if then is not None:  # the contents have left the shared arrays since
                marks = [mark.length if layer.keeps_tokens else then.state(at) for at, layer in enumerate(layers)]
            for layer, kept in zip(layers, marks, strict=True):
                layer.rewind(kept)
        self.length, self.broken = mark.length, False

    def must_grow(self, tokens: int) -> bool:
        """Whether ``tokens`` more tokens make a layer copy what is in its cache."""
        return any(layer.must_grow(tokens) for layer in self.layers)

    def trim(self, length: int) -> None:
        """Keep the first ``length`` tokens.

        Raises:
            InputError: there are fewer tokens, or a layer cannot remove any; code "cannot_trim".
        """
        if not 0 <= length <= self.length or self.broken:
            state = "is broken" if self.broken else f"has {self.length} tokens"
            raise InputError(f"the sequence cannot be cut to {length} tokens: it {state}", code="cannot_trim")
        if length == self.length:
            return
        if not self.can_trim:
            raise InputError(
                "a layer of this model keeps a recurrent state, which cannot lose tokens; restore a snapshot",
                code="cannot_trim",
            )
        for layer in self.layers:
            layer.trim(length)
        self.length = length

    @property
    def has_state(self) -> bool:
        """Whether a layer keeps a state in place of tokens, so that the sequence continues only where it was kept."""
        return not all(self.layers_that_keep_tokens)

    @property
    def layers_that_keep_tokens(self) -> list[bool]:
        """Whether each layer keeps every token."""
        return [layer.keeps_tokens for layer in self._layers]

    def keep_states(self, offsets: Sequence[int]) -> None:
        """Make the next pass copy the states after each number of its tokens in ``offsets``, which ascend."""
        for layer in self.layers:
            if isinstance(layer, RecurrentState):
                layer.keep_at, layer.kept = offsets, []

    def take_states(self, count: int) -> list[Checkpoint]:
        """Return the ``count`` states that the latest pass copied, in order, and keep no more states."""
        kept = [layer.kept if isinstance(layer, RecurrentState) else None for layer in self.layers]
        self.keep_states(())
        return [[None if states is None else states[index] for states in kept] for index in range(count)]

    def state(self) -> Checkpoint:
        """Return copies of the present states."""
        return [None if layer.keeps_tokens else layer.snapshot() for layer in self.layers]

    def part(self, start: int, end: int) -> Checkpoint:
        """Return copies of the tokens from ``start`` to ``end`` of every layer that keeps tokens; None elsewhere."""
        return [layer.part(start, end) if layer.keeps_tokens else None for layer in self.layers]

    def assemble(self, parts: Sequence[Checkpoint], state: Checkpoint, length: int) -> None:
        """Replace the contents by copies, so that the sequence continues after ``length`` tokens.

        Args:
            parts: results of ``part`` for consecutive tokens, which may go beyond ``length``.
            state: the states after ``length`` tokens.
            length: the number of tokens.
        """
        self.broken = True
        for index, layer in enumerate(self.layers):
            if layer.keeps_tokens:
                layer.assemble([part[index] for part in parts])
                layer.trim(length)
            else:
                layer.assemble([state[index]])
        mx.eval(self.arrays())
        self.length, self.broken = length, False


def own_contents(caches: Sequence[SequenceCache]) -> None:
    """Copy the contents of ``caches`` out of the arrays that they share with other sequences."""
    rows = {cache: cache.shared for cache in caches if cache.shared is not None}
    if not rows:
        return
    mx.eval([row.written for row in rows.values() if row.written is not None])
    copies = {cache: row.copies(cache.length) for cache, row in rows.items()}
    mx.eval(list(copies.values()))
    for cache, own in copies.items():
        cache.own(own)
