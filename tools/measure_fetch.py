"""Measure how fast records of experts reach the kernels of the default device, and what that makes of a decode step.

    python tools/measure_fetch.py --folder /tmp/fetch                  # every backend that reads, 4 and 10 experts
    python tools/measure_fetch.py --folder /tmp/fetch --decode         # and decode steps of the whole model
    python tools/measure_fetch.py --tiny                               # a check of this script on any machine

The pack has random weights and the geometry of the 397B; it is made once and is then in the page cache. A fetch asks a
store for random experts of one layer after the other. Its time ends when a kernel has read every byte of them, and the
time of a second kernel that reads the same bytes again is subtracted. ``ram_hybrid`` has few slots, so nearly every
request is a miss. The served bytes of the last fetch are compared with the file.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

import flashmoe_mlx
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.extents import ExpertSource, read_extents
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.research.estimate.probe_models import SIZES
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.delivery import ExpertBatch
from flashmoe_mlx.stores.registry import backend_settings, create_store

_TINY = replace(SIZES["large"], hidden_size=128, num_experts=16, expert_size=128, shared_expert_size=128)
_FEW_SLOTS = 12
"""Slots of each layer in ``ram_hybrid``: enough for a request, and few hits among 64 experts."""
_WARM_UP = 8


def main() -> None:
    """Make the pack if it does not exist, measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--fetches", type=int, default=60)
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    sizes = _TINY if arguments.tiny else replace(SIZES["large"], num_experts=arguments.experts)
    sizes = replace(sizes, num_layers=arguments.layers)
    with tempfile.TemporaryDirectory() as scratch:
        pack = synthetic_pack("fetch", sizes, arguments.folder or Path(scratch)).folder
        _warm(pack)
        _measure_fetches(pack, sizes, arguments)
        if arguments.decode:
            _measure_decoding(pack, sizes, arguments)


def _ways(sizes: SyntheticSizes, record_bytes: int, threads: int) -> Mapping[str, dict[str, Any]]:
    """Return the options of each backend."""
    budget = (_FEW_SLOTS + 0.5) * sizes.num_layers * record_bytes / 2**30
    return {
        "pread": {"threads": threads},
        "ram_hybrid": {"depth": threads, "budget_gib": budget},
        "io_uring": {"direct": False, "workers": True},
        "mmap": {},
    }


def _warm(pack: Path) -> None:
    """Read the pack once, so that it is in the page cache."""
    for path in sorted(pack.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**24):
                    pass


def _measure_fetches(pack: Path, sizes: SyntheticSizes, arguments: argparse.Namespace) -> None:
    opened = open_pack(pack)
    source = next(iter(opened.experts.values()))
    print("| backend | threads | experts | ms a fetch | GB/s into a kernel |\n|---|---|---|---|---|")
    for threads in arguments.threads:
        for backend, options in _ways(sizes, source.layout.record_bytes, threads).items():
            if threads != arguments.threads[0] and backend in ("io_uring", "mmap"):
                continue
            for k in arguments.k:
                settings = backend_settings(backend) | options
                settings.pop("variant")
                try:
                    store = create_store(source, settings)
                except FlashMoeError as error:
                    print(f"| {backend} | {threads} | {k} | {error} | |")
                    continue
                with store:
                    seconds, nbytes = _fetch_seconds(store, k, arguments.fetches)
                rate = f"{nbytes / seconds / 1e9:.1f}"
                print(f"| {backend} | {threads} | {k} | {1e3 * seconds:.2f} | {rate} |", flush=True)


def _fetch_seconds(store: ExpertStore, k: int, fetches: int) -> tuple[float, float]:
    """Return the median seconds of a fetch, and the mean number of bytes that it read."""
    draw = random.Random(k)  # noqa: S311
    times, read = [], []
    layer, experts = 0, [0]
    for number in range(fetches + _WARM_UP):
        layer = number % store.source.num_layers
        experts = sorted(draw.sample(range(store.source.num_experts), k))
        before = store.stats().bytes_read
        start = time.perf_counter()
        batch = store.fetch(layer, experts)
        _consume(batch)
        middle = time.perf_counter()
        _consume(batch)
        times.append(2 * middle - start - time.perf_counter())
        read.append(store.stats().bytes_read - before)
    _check(store.source, layer, experts, batch)
    return median(times[_WARM_UP:]), sum(read[_WARM_UP:]) / fetches


def _consume(batch: ExpertBatch) -> None:
    """Read every byte of ``batch`` by a kernel."""
    mx.eval([record.view(mx.uint32).max() for record in batch.records])


def _check(source: ExpertSource, layer: int, experts: list[int], batch: ExpertBatch) -> None:
    for expert, view in zip(experts, batch.host, strict=True):
        if view != read_extents(source.extents(layer, expert)):
            raise AssertionError(f"layer {layer} expert {expert}: other bytes than in the file")


def _measure_decoding(pack: Path, sizes: SyntheticSizes, arguments: argparse.Namespace) -> None:
    record_bytes = next(iter(open_pack(pack).experts.values())).layout.record_bytes
    print("\n| backend | K | prefetch | ms a token | of which waiting for the store |\n|---|---|---|---|---|")
    for backend, options in _ways(sizes, record_bytes, arguments.threads[-1]).items():
        if backend == "io_uring":
            continue
        for k, prefetch in [(k, "none") for k in arguments.k] + [(arguments.k[-1], "next_router")]:
            with flashmoe_mlx.load(
                pack, backend, experts_k=k, prefetch=prefetch, **options, prompt_cache_gib=0
            ) as engine:
                cache = engine.new_cache()
                times, io = [], []
                for token in range(_WARM_UP + 24):
                    waited = engine.runner.clock.seconds["io"]
                    start = time.perf_counter()
                    engine.forward([(37 * token + 11) % 200], cache)
                    times.append(time.perf_counter() - start)
                    io.append(engine.runner.clock.seconds["io"] - waited)
            ms, waited = (1e3 * median(values[_WARM_UP:]) for values in (times, io))
            print(f"| {backend} | {k} | {prefetch} | {ms:.2f} | {waited:.2f} |", flush=True)


if __name__ == "__main__":
    main()
