"""One request to fill slots: the memory of its records, and the moment when they become valid."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np


class Rows(Protocol):
    """Memory for records, one row each."""

    def rows(self, places: Sequence[int]) -> Sequence[memoryview]:
        """Return the writable bytes of each of ``places``."""
        ...


class Filling:
    """Memory for the records of some slots, handed out once for all of them.

    ``rows`` has the writable bytes of each slot, by slot and never by position. The records become valid with
    ``commit``, which completes exactly these slots; without it their content is undefined.

    Args:
        slots: distinct slots.
        rows: the memory of each of ``slots``, in the same order.
        complete: called by ``commit``, with the slots in that order; makes what was written the content of the slots.

    Raises:
        ValueError: a slot occurs twice.
    """

    def __init__(
        self,
        slots: Sequence[int],
        rows: Sequence[memoryview],
        complete: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self._rows = dict(zip(slots, rows, strict=True))
        if len(self._rows) != len(slots):
            raise ValueError(f"a slot occurs twice in {list(slots)}")
        self._complete = complete
        self._open = True

    @property
    def rows(self) -> Mapping[int, memoryview]:
        """The writable bytes of each slot, by slot."""
        return self._rows

    def move(self, slot: int, source: Rows, place: int) -> None:
        """Move the record in row ``place`` of ``source`` to ``slot``; the row is undefined afterwards."""
        np.copyto(np.frombuffer(self._rows[slot], np.uint8), np.frombuffer(source.rows([place])[0], np.uint8))

    def commit(self) -> None:
        """Make the written records the content of the slots.

        Raises:
            RuntimeError: this filling was committed before, or its memory was handed out again since.
        """
        if not self._open:
            raise RuntimeError("these slots were committed before")
        if self._complete is not None and self._rows:
            self._complete(tuple(self._rows))
        self._open = False
