"""Inspection of records: their hashes, and values that are NaN or infinite."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from flashmoe_mlx.formats.extents import read_exactly
from flashmoe_mlx.formats.record import RecordLayout

_READERS = 4
_EXPONENT_BITS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""For each float type, its word and the bits of the exponent, which are all set only in NaN and infinity."""


@dataclass(frozen=True, slots=True)
class RecordReport:
    """The result of an inspection.

    Attributes:
        digest: 64-bit XXH3 of the record; -1 if the record could not be read.
        fault: description of the fault; None for a record without a fault.
    """

    digest: int
    fault: str | None


def inspect_record(record: memoryview, layout: RecordLayout) -> RecordReport:
    """Hash a record and search it for NaN and infinity."""
    return RecordReport(xxhash.xxh3_64_intdigest(record), find_nonfinite(record, layout))


def inspect_layer(path: Path, layout: RecordLayout, num_experts: int) -> Iterator[RecordReport]:
    """Yield a report on each record of a layer file in order, while a few threads read the next records.

    Raises:
        OSError: the file cannot be opened.
    """
    size = layout.record_bytes
    fd = os.open(path, os.O_RDONLY)

    def inspect(expert: int) -> RecordReport:
        record = memoryview(bytearray(size))
        try:
            read_exactly(fd, record, expert * size)
        except EOFError:
            return RecordReport(-1, "the file ends inside the record")
        except OSError as error:
            return RecordReport(-1, f"cannot be read ({error.strerror})")
        return inspect_record(record, layout)

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, num_experts, _READERS):
                yield from pool.map(inspect, range(start, min(start + _READERS, num_experts)))
    finally:
        os.close(fd)


def find_nonfinite(payload: bytearray | memoryview, layout: RecordLayout) -> str | None:
    """Describe the first component of a record that holds NaN or infinity; return None if no component does."""
    for component in layout.components:
        data = memoryview(payload)[component.offset : component.offset + component.nbytes]
        if not all_finite(data, component.dtype):
            return f"{component.name} holds NaN or infinity"
    return None


def all_finite(data: bytes | bytearray | memoryview, dtype: str) -> bool:
    """Return whether no value in ``data`` is NaN or infinite.

    ``dtype`` is a safetensors name; integers are always finite.
    """
    if dtype not in _EXPONENT_BITS:
        return True
    word, mask = _EXPONENT_BITS[dtype]
    return not bool(((np.frombuffer(data, word) & mask) == mask).any())
