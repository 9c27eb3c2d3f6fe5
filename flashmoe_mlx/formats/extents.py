"""Byte ranges of files, and the interface of whatever knows where the bytes of experts lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashmoe_mlx.formats.record import RecordLayout


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of a file."""

    path: Path
    offset: int
    nbytes: int


class ExpertSource(Protocol):
    """Where the bytes of experts lie: a variant of a pack, or a published checkpoint."""

    @property
    def layout(self) -> RecordLayout: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    def extents(self, layer: int, expert: int) -> Sequence[Extent]:
        """The expert's bytes in the order of its record: one extent in a pack, several in a checkpoint."""
        ...
