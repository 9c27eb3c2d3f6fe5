"""MLX-LM's caches as caches of this package."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from flashmoe_mlx.layers.recurrent_state import copied


class AdaptedCache:
    """The state of one sequence in one layer, in a cache of MLX-LM.

    Attributes:
        inner: MLX-LM's cache.
        length: the number of tokens that went through it.
    """

    __slots__ = ("inner", "length")

    def __init__(self, inner: Any, length: int = 0) -> None:
        self.inner: Any = inner
        self.length: int = length

    @property
    def nbytes(self) -> int:
        """The size of its arrays in bytes."""
        return sum(array.nbytes for array in self.arrays())

    @property
    def can_trim(self) -> bool:
        """Whether the latest tokens can be removed."""
        return bool(self.inner.is_trimmable())

    def arrays(self) -> list[mx.array]:
        """Return its arrays, so that they can be evaluated."""
        return list(_arrays(self.inner))

    def snapshot(self) -> "AdaptedCache":
        """Return an independent copy."""
        return AdaptedCache(_copy(self.inner), self.length)

    def restore(self, snapshot: "AdaptedCache") -> None:
        """Return to the state of ``snapshot``, which is not changed."""
        self.inner, self.length = _copy(snapshot.inner), snapshot.length

    def trim(self, length: int) -> None:
        """Keep the first ``length`` tokens; this requires ``can_trim``."""
        self.inner.trim(self.length - length)
        self.length = length

    def mark(self) -> "AdaptedCache":
        """Return the present state, for ``rewind``: a copy, since caches of MLX-LM change in place."""
        return self.snapshot()

    def rewind(self, mark: "AdaptedCache") -> None:
        """Return to the state of ``mark``."""
        self.restore(mark)

    def must_grow(self, tokens: int) -> bool:
        """Refuse: only steps of models of this package are begun ahead."""
        raise NotImplementedError

    @property
    def keeps_tokens(self) -> bool:
        """Whether the cache keeps every token, so that a part of it is the state of these tokens."""
        return type(self.inner).__name__ == "KVCache"

    def part(self, start: int, end: int) -> "AdaptedCache":
        """Return a copy of the tokens from ``start`` to ``end``; this requires ``keeps_tokens``."""
        keys, values = (array[:, :, start:end] for array in (self.inner.keys, self.inner.values))
        return self._of([copied(keys), copied(values)], end - start)

    @classmethod
    def of_arrays(cls, arrays: Sequence[mx.array], length: int) -> "AdaptedCache":
        """Refuse: states of these models are not kept on disk."""
        raise NotImplementedError

    def assemble(self, parts: Sequence["AdaptedCache"]) -> None:
        """Replace the contents by copies of the tokens of ``parts``, or of the state that the last part is."""
        if not self.keeps_tokens:
            self.restore(parts[-1])
            return
        keys, values = ([getattr(part.inner, name) for part in parts] for name in ("keys", "values"))
        whole = self._of([mx.concatenate(keys, axis=2), mx.concatenate(values, axis=2)], sum(p.length for p in parts))
        self.inner, self.length = whole.inner, whole.length

    def _of(self, arrays: Sequence[mx.array], length: int) -> "AdaptedCache":
        inner = type(self.inner)()
        inner.keys, inner.values = arrays
        inner.offset = length
        return AdaptedCache(inner, length)


def _arrays(value: Any) -> Iterator[mx.array]:
    """Yield all arrays in a cache of MLX-LM, or in a value of one of its attributes."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))
    elif type(value).__module__.startswith("mlx_lm."):
        yield from _arrays(vars(value))


def _copy(inner: Any) -> Any:
    """Return an independent copy of a cache of MLX-LM."""
    memo: dict[int, Any] = {id(array): copied(array) if array.size else array for array in _arrays(inner)}
    return copy.deepcopy(inner, memo)
