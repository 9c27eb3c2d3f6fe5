"""Measure how decoding on a CPU scales with threads, on a model with random weights and the geometry of the 397B.

    python tools/measure_threads.py --folder /tmp/threads           # 1, 2, 4, 8 and 16 threads, as far as cores go
    python tools/measure_threads.py --folder /tmp/threads --layers 8 --threads 1,16

One process loads the model (4 layers of 64 experts: 2 GB) with all experts in memory, then decodes ``--tokens`` random
tokens with each number of threads, A B C ... C B A in each round. The last column is the speed of memory: as many
threads add up the bytes of 256 MiB.
"""

import argparse
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.estimate.probe_models import SIZES

_WARM_UP = 5
_EXPERTS_PER_TOKEN = 4
_READ_BYTES = 2**28


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is written")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--threads", default="1,2,4,8,16")
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    extension = native.extension()
    if extension is None:
        sys.exit(native.MISSING)
    cores = native.usable_cores()
    counts = [count for count in map(int, arguments.threads.split(",")) if count <= cores]
    sizes = replace(
        SIZES["large"], num_layers=arguments.layers, num_experts=arguments.experts, experts_per_token=_EXPERTS_PER_TOKEN
    )
    pack = synthetic_pack("threads", sizes, arguments.folder).folder
    numbers = iter(random.Random(0).randrange(256) for _ in iter(int, 1))  # noqa: S311
    times: dict[int, list[float]] = {count: [] for count in counts}
    with flashmoe_mlx.load(pack, "resident", prompt_cache_gib=0) as engine:
        for _ in range(arguments.rounds):
            for count in (*counts, *reversed(counts)):
                extension.use_threads(count)
                cache = engine.new_cache()
                for number in range(_WARM_UP + arguments.tokens):
                    start = time.perf_counter()
                    engine.forward([next(numbers)], cache)
                    if number >= _WARM_UP:
                        times[count].append(1e3 * (time.perf_counter() - start))
    print(f"{environment()['processor']}, {cores} cores, {', '.join(extension.instruction_sets_in_use())}\n")
    print("| threads | ms per token: p5 / p50 / p95 | times one | plain read, GB/s |\n|---|---|---|---|")
    words = np.ones(_READ_BYTES // 8, np.uint64)
    for count in counts:
        ordered = sorted(times[count])
        low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95))
        ratio = median(times[counts[0]]) / middle
        print(f"| {count} | {low:.1f} / {middle:.1f} / {high:.1f} | {ratio:.2f} | {_plain_read(words, count):.1f} |")


def _plain_read(words: "np.ndarray[tuple[int], np.dtype[np.uint64]]", threads: int) -> float:
    """Return the GB/s of the fastest of several sums over ``words`` by ``threads`` threads."""
    shares = np.array_split(words, threads)
    shortest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, shares))
            shortest = min(shortest, time.perf_counter() - start)
    return words.nbytes / shortest / 1e9


if __name__ == "__main__":
    main()
