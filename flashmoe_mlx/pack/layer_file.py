"""Writing of the file of one layer, which gets its final name only when it is complete."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from flashmoe_mlx.formats.files import publish, write_exactly
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.pack.inspection import RecordReport, inspect_record


def write_layer_file(path: Path, records: Iterable[memoryview], layout: RecordLayout) -> Iterator[RecordReport]:
    """Write the records of a layer to ``path`` and yield a report on each.

    The file gets its final name when the iterator is exhausted.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for expert, record in enumerate(records):
            write_exactly(fd, record, expert * layout.record_bytes)
            yield inspect_record(record, layout)
    finally:
        os.close(fd)
    publish(partial, path)
