"""The refilling of slots: memory to write new records to, and a commit that makes the records valid."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np


class Rows(Protocol):
    """Memory for records, one row for each record."""

    def rows(self, places: Sequence[int]) -> Sequence[memoryview]:
        """Return the writable bytes of the rows with the indices ``places``."""
        ...


class Filling:
    """Memory for new records of some slots.

    Write each record to the row of its slot, then call ``commit``. Until then the content of these slots is undefined.

    Args:
        slots: the slots to fill, all different.
        rows: the memory for the record of each slot, in the order of ``slots``.
        complete: called by ``commit`` with ``slots``; makes the written records the content of the slots. None if the
            rows are the slots themselves.

    Raises:
        ValueError: a slot occurs twice.
    """

    copies_later: ClassVar[bool] = False
    """Whether records are read from their rows, and by ``move`` from other rows, until the next filling begins."""

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

    def arrived(self, slots: Sequence[int]) -> None:
        """Begin what can be done with the records of ``slots``, which have been written, before ``commit``."""

    def move(self, slot: int, source: Rows, place: int) -> None:
        """Move the record in row ``place`` of ``source`` to ``slot``; the content of the row is then undefined.

        A row for records of any layer may be longer than a slot for the records of one.
        """
        row = self._rows[slot]
        np.copyto(np.frombuffer(row, np.uint8), np.frombuffer(source.rows([place])[0], np.uint8)[: len(row)])

    def give_up(self) -> None:
        """Wait until nothing reads the rows or writes to the slots any more; in place of ``commit``, after an error."""

    def commit(self) -> None:
        """Make the written records the content of the slots.

        Raises:
            RuntimeError: this filling was already committed, or a later filling has taken over its memory.
        """
        if not self._open:
            raise RuntimeError("this filling was already committed")
        if self._complete is not None and self._rows:
            self._complete(tuple(self._rows))
        self._open = False
