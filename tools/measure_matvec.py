"""Measure quantized products with one vector on this CPU; compare them with MLX's and with a plain read of the bytes.

    python tools/measure_matvec.py                  # four shapes, four widths of codes
    python tools/measure_matvec.py --one-thread     # every instruction set of this machine, in cache and out of it

The calls rotate through sets of weights that exceed the cache several times, so every call reads its weights from
memory, where they lie as a model keeps them: from a cache line on, in large pages. All programs alternate, A B C ... C
B A, each for all sets; the figure of a round is the time of one call. The plain read sums the bytes of all sets as
64-bit words on as many threads as the kernel uses, which synchronize once at the end: it measures the speed of memory.
"In cache" repeats the call for the first rows of a matrix, which stay in the second-level caches: it measures the
instructions. Both include the time of a call for one row, "empty".
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from types import ModuleType

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.quantized_matvec.cpu import quantized_matvec
from flashmoe_mlx.research.intervals import median_interval
from flashmoe_mlx.stores.allocation import align_to_cache_line

_SETS_BYTES = 300e6
_SHAPES = ((4096, 4096), (4096, 1024), (1024, 4096), (12288, 4096))
_CACHED_BYTES = 2**19
"""Bytes of the rows of a matrix that fit into the second-level cache of one core."""
_GROUP = 64


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of A B C ... C B A")
    parser.add_argument("--bits", type=lambda text: list(map(int, text.split(","))), default=native.BITS)
    parser.add_argument("--one-thread", action="store_true", help="ours alone, by instruction set")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    extension = native.extension()
    if extension is None:
        sys.exit(native.MISSING)
    if arguments.one_thread:
        _by_instructions(extension, arguments.rounds)
        return
    threads = native.usable_cores()
    print(f"{native.description()}; medians of {2 * arguments.rounds} rounds, 95 % bootstrap intervals; bf16 scales\n")
    print("| rows x columns, bits | ours, us | GB/s | of a plain read | in cache, GB/s | empty, us | MLX, us | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(threads) as pool:
        for bits in arguments.bits:
            for rows, columns in _SHAPES:
                print(_row(rows, columns, bits, arguments.rounds, pool, threads), flush=True)


def _by_instructions(extension: ModuleType, rounds: int) -> None:
    """Measure 200 rows, which fit into the second-level cache, and sets of 4096 rows, which do not."""
    extension.use_threads(1)
    random = np.random.default_rng(0)
    print(f"GB/s of codes and scales by one thread, medians of {rounds} rounds\n")
    print("| | " + " | ".join(f"{bits} bit, {where}" for where in ("cache", "memory") for bits in native.BITS) + " |")
    print("|---|" + "---|" * (2 * len(native.BITS)))
    sets = {}
    for bits in native.BITS:
        nbytes = 4096 * 4096 * bits // 8
        sets[bits, "cache"] = [_matrix(random, 200, 4096, bits)] * 20
        sets[bits, "memory"] = [_matrix(random, 4096, 4096, bits) for _ in range(int(_SETS_BYTES // nbytes))]
    x = mx.array(random.standard_normal((1, 4096), np.float32))
    for name in extension.instruction_sets():
        extension.use_instruction_set(name)
        cells = []
        for where in ("cache", "memory"):
            for bits in native.BITS:
                matrices, speeds = sets[bits, where], []
                nbytes = sum(part.nbytes for matrix in matrices for part in matrix)
                for _ in range(rounds):
                    start = time.perf_counter()
                    for matrix in matrices:
                        quantized_matvec(x, *matrix, bits, _GROUP)
                    speeds.append(nbytes / (time.perf_counter() - start) / 1e9)
                cells.append(f"{median(speeds):.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _row(rows: int, columns: int, bits: int, rounds: int, pool: ThreadPoolExecutor, threads: int) -> str:
    random = np.random.default_rng(0)
    nbytes = rows * columns * bits // 8 + rows * columns // _GROUP * 4
    count = int(_SETS_BYTES // nbytes) + 1
    sets = [_matrix(random, rows, columns, bits) for _ in range(count)]
    # MLX needs scales in the type of the vector; they are converted here. It gets fewer sets, since it is slow.
    wide = [(w, s.astype(mx.float32), b.astype(mx.float32)) for w, s, b in sets[:4]]
    x = mx.array(random.standard_normal((1, columns), np.float32))
    mx.eval(x, wide)
    shares = [[part for matrix in sets for part in _share(matrix, number, threads)] for number in range(threads)]

    def ours() -> int:
        for weight, scales, biases in sets:
            quantized_matvec(x, weight, scales, biases, bits, _GROUP)
        return count

    def plain() -> int:
        list(pool.map(_summed, shares))
        return count

    def by_mlx() -> int:
        for weight, scales, biases in wide:
            mx.eval(mx.quantized_matmul(x, weight, scales, biases, True, _GROUP, bits))
        return len(wide)

    few = int(_CACHED_BYTES * threads * rows // nbytes)
    cached, empty = ([part[:count] for part in sets[0]] for count in (min(few, rows), 1))
    mx.eval(cached, empty)

    def in_cache(matrix: Sequence[mx.array] = cached) -> int:
        for _ in range(count):
            quantized_matvec(x, matrix[0], matrix[1], matrix[2], bits, _GROUP)
        return count

    sides: dict[str, Callable[[], int]] = {"ours": ours, "plain": plain, "mlx": by_mlx, "in cache": in_cache}
    sides["empty"] = lambda: in_cache(empty)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for name in sides:
        sides[name]()
    for _ in range(rounds):
        for name in (*sides, *reversed(sides)):
            start = time.perf_counter()
            calls = sides[name]()
            found[name].append((time.perf_counter() - start) / calls)
    share = [plain_time / own_time for own_time, plain_time in zip(found["ours"], found["plain"], strict=True)]
    ratio = [mlx_time / own_time for own_time, mlx_time in zip(found["ours"], found["mlx"], strict=True)]
    microseconds = [1e6 * seconds for seconds in found["ours"]]
    cells = (
        f"{rows}x{columns}, {bits}",
        _shown(microseconds, ".0f"),
        f"{nbytes / median(microseconds) / 1e3:.1f}",
        _shown(share, ".2f"),
        f"{sum(part.nbytes for part in cached) / median(found['in cache']) / 1e9:.1f}",
        f"{1e6 * median(found['empty']):.0f}",
        f"{1e6 * median(found['mlx']):.0f}",
        _shown(ratio, ".0f"),
    )
    return f"| {' | '.join(cells)} |"


def _matrix(random: np.random.Generator, rows: int, columns: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    codes = mx.array(random.integers(0, 2**32, (rows, columns * bits // 32), np.uint32))
    factors = (mx.array(random.standard_normal((rows, columns // _GROUP), np.float32)) for _ in range(2))
    scales, biases = (align_to_cache_line(part.astype(mx.bfloat16)) for part in factors)
    return align_to_cache_line(codes), scales, biases


def _share(matrix: Sequence[mx.array], number: int, of: int) -> list[npt.NDArray[np.uint64]]:
    """Return the part of the matrix of one thread as words, without the last few bytes."""
    words = []
    for array in matrix:
        whole = memoryview(array).cast("B")  # type: ignore[arg-type]  # arrays have the buffer protocol
        every = np.frombuffer(whole[: len(whole) // 8 * 8], np.uint64)
        words.append(every[len(every) * number // of : len(every) * (number + 1) // of])
    return words


def _summed(parts: list[npt.NDArray[np.uint64]]) -> int:
    return sum(int(part.sum()) for part in parts)


def _shown(values: Sequence[float], form: str) -> str:
    interval = median_interval(values)
    text = format(median(values), form)
    return text if interval is None else f"{text} [{interval[0]:{form}}, {interval[1]:{form}}]"


if __name__ == "__main__":
    main()
