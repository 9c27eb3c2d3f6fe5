"""Measure the effect of page size on direct reads, and the cost of touching pages for the first time.

python tools/measure_pages.py <pack>            # reads of 1, 2 and 4 random experts at once
python tools/measure_pages.py --touch 12        # GiB of memory; touched immediately and after some seconds
"""

import argparse
import ctypes
import mmap
import random
import time
from pathlib import Path
from statistics import median

import numpy as np

from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.stores.allocation import allocate_huge_pages
from flashmoe_mlx.stores.memory import GIB
from flashmoe_mlx.stores.readers import ExpertReader
from flashmoe_mlx.stores.thread_reader import ThreadReader
from flashmoe_mlx.stores.uring_reader import UringReader

_MOST = 4
_SECONDS = 1.2
_WAITS = (0, 2, 15)


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", nargs="?", type=Path)
    parser.add_argument("--touch", type=float)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.touch:
        _touch(int(arguments.touch * GIB))
    if arguments.pack:
        _read(arguments.pack, arguments.rounds)


def _touch(nbytes: int) -> None:
    """Print the rate of touching ``nbytes`` bytes of new memory, after various pauses."""
    print("| seconds since the memory was freed | GB/s |\n|---|---|")
    for wait in ("first", *_WAITS):
        if wait != "first":
            time.sleep(float(wait))
        start = time.perf_counter()
        allocate_huge_pages(nbytes)  # freed immediately
        print(f"| {wait} | {nbytes / (time.perf_counter() - start) / 1e9:.2f} |")


def _read(pack: Path, rounds: int) -> None:
    """Print the rates of direct reads into small and large pages."""
    source = next(iter(open_pack(pack).experts.values()))
    record = source.layout.record_bytes
    size = _MOST * record
    small = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    small.madvise(mmap.MADV_NOHUGEPAGE)
    ctypes.memset(np.frombuffer(small, np.uint8).ctypes.data, 1, size)
    pages = {"small": memoryview(small), "large": allocate_huge_pages(size)}
    readers: dict[str, ExpertReader] = {"4 threads, whole records": ThreadReader(source, 4, direct=True)}
    for pieces in (None, 1, 0.5):
        title = "whole records" if pieces is None else f"pieces of {pieces} MiB"
        readers[f"io_uring, {title}"] = UringReader(source, 64, pieces, direct=True)
    rates: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(rounds):
        for title, reader in readers.items():
            for kind, memory in pages.items():
                rows = [memory[index * record : (index + 1) * record] for index in range(_MOST)]
                for count in (1, 2, _MOST):
                    rate = (
                        count
                        * record
                        / _read_seconds(reader, source.num_layers, source.num_experts, rows[:count])
                        / 1e9
                    )
                    rates.setdefault((title, kind, count), []).append(rate)
    print("| GB/s, 1 / 2 / 4 at once | small pages | large pages |\n|---|---|---|")
    for title in readers:
        cells = (" / ".join(f"{median(rates[title, kind, k]):.2f}" for k in (1, 2, _MOST)) for kind in pages)
        print(f"| {title} | {' | '.join(cells)} |")


def _read_seconds(reader: ExpertReader, layers: int, experts: int, rows: list[memoryview]) -> float:
    """Measure the median seconds to read random experts into ``rows``."""
    times = []
    end = time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < end:
        chosen = random.sample(range(experts), len(rows))
        reader.read(random.randrange(layers), list(zip(chosen, rows, strict=True)))  # noqa: S311
        times.append(time.perf_counter() - start)
    return median(times)


if __name__ == "__main__":
    main()
