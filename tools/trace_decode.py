"""Show what a layer waits for while decoding from storage: the device, the disk, copies to a GPU, or Python.

    python tools/trace_decode.py <pack> --gpu --options budget_gib=4,reader=io_uring,depth=64,direct=true,preload=true

Each column is a part of the time of a token, summed over its layers, in the order in which a layer passes through them:

- build: Python from the end of a fetch to the request for the next router's choice.
- submit: MLX launches the operations that were built.
- choice: the wait for the router's choice. On a CPU these three are in "begin".
- begin: Python from the choice to the first read, with the wait for earlier copies.
- first, rest: reads, until the first record has arrived and until the last one has.
- arrived: the start of copies to a GPU, or the computation of a CPU with records that have arrived.
- end: Python from the last record to the end of the fetch.
- head: everything after the last fetch.

"settled" waits for the device after each fetch and before each choice, so that "end" includes the copies that were not
hidden, and "build" all computation. ``--reads`` lists ways to read a record that take turns: the size of a read in MiB
and the number of reads in flight, such as 2x4, the default. ``--profile`` prints the Python functions that take the
most time.
"""

import argparse
import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.stores import reads, thread_reader, uring_reader

PARTS = ("build", "submit", "choice", "begin", "first", "rest", "arrived", "end", "head")


class Trace:
    """Seconds of each part of a token, from marks that replaced methods of an engine make.

    Args:
        engine: the engine, whose store has a ``ReadAhead``.
        settled: whether the device is waited for after each fetch and before each choice.
    """

    def __init__(self, engine: Engine, settled: bool = False) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._engine = engine
        self._settled = settled
        self._last = 0.0
        self._device = mx.default_device()

    def mark(self, part: str) -> None:
        """Charge the time since the previous mark to ``part``."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def start(self) -> None:
        """Begin a token."""
        self.seconds.clear()
        self._last = time.perf_counter()

    def install(self) -> Callable[[], None]:
        """Replace methods by methods that make marks; return a function that undoes this."""
        store: Any = self._engine.store
        reader = store._reader._reader
        fetch, read, clock = store.fetch, reader.read, PhaseClock.read

        def traced_fetch(*arguments: Any) -> Any:
            self.mark("begin")
            batch = fetch(*arguments)
            if self._settled:
                mx.synchronize()
            self.mark("end")
            return batch

        def traced_read(layer: int, wanted: Any, arrived: Any = None, *more: Any, **options: Any) -> Any:
            first = True

            def record(experts: Sequence[int]) -> None:
                nonlocal first
                self.mark("first" if first else "rest")
                first = False
                if arrived is not None:
                    arrived(experts)
                    self.mark("arrived")

            if not wanted:
                return read(layer, wanted, arrived, *more, **options)
            self.mark("begin")
            result = read(layer, wanted, record, *more, **options)
            self.mark("rest")
            return result

        def traced_clock(clock_: PhaseClock, name: str, array: mx.array, *also: mx.array) -> Any:
            if self._settled:
                mx.eval(array, *also)
            self.mark("build")
            clock_.begin(name, array, *also)
            self.mark("submit")
            result = clock(clock_, name, array)
            self.mark("choice")
            return result

        store.fetch, reader.read = traced_fetch, traced_read
        PhaseClock.read = traced_clock  # type: ignore[method-assign]

        def undo() -> None:
            del store.fetch, reader.read
            PhaseClock.read = clock  # type: ignore[method-assign]

        return undo


def main() -> None:
    """Decode in each mode in turns, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--backend", default="ram_hybrid")
    parser.add_argument("--options", default="", help="options of the backend: name=value,name=value")
    parser.add_argument("--prefetch", default="none")
    parser.add_argument("--reads", default="2x4", help="MiB and number of reads in flight, for example 2x4,2x8,8x64")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="compute on the GPU")
    parser.add_argument("--profile", action="store_true", help="profile Python in a last round")
    arguments = parser.parse_args()
    mx.set_default_device(mx.gpu if arguments.gpu else mx.cpu)
    pairs = (option.split("=", 1) for option in filter(None, arguments.options.split(",")))
    options = {name: yaml.safe_load(value) for name, value in pairs}
    load: Any = flashmoe_mlx.load
    named = {"prefetch": arguments.prefetch, "prompt_cache_gib": 0}
    with load(arguments.pack, arguments.backend, **named, **options) as engine:
        random = np.random.default_rng(1)
        ways = [tuple(map(int, way.split("x"))) for way in arguments.reads.split(",")]
        modes = [(*way, settled) for way in ways for settled in (0, 1)]
        tokens: dict[tuple[int, ...], list[dict[str, float]]] = {mode: [] for mode in modes}
        _decode(engine, random, 8, None)
        for round_ in range(arguments.rounds):
            for mode in modes if round_ % 2 else modes[::-1]:
                size, most, settled = mode
                reads._PART = size * 2**20
                thread_reader.PARTS_AT_ONCE = uring_reader.PARTS_AT_ONCE = most
                tokens[mode] += _decode(engine, random, arguments.tokens, Trace(engine, bool(settled)))
        _print(tokens)
        if arguments.profile:
            profile = cProfile.Profile()
            profile.enable()
            _decode(engine, random, arguments.tokens, None)
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def _decode(engine: Engine, random: np.random.Generator, count: int, trace: Trace | None) -> list[dict[str, float]]:
    """Decode ``count`` random tokens of a new sequence; return the milliseconds of the parts of each."""
    cache, times = engine.new_cache(), []
    undo = trace.install() if trace is not None else None
    try:
        for token in random.integers(256, size=count).tolist():
            if trace is not None:
                trace.start()
            mx.eval(engine.forward([token], cache))
            if trace is not None:
                trace.mark("head")
                times.append({part: 1e3 * trace.seconds[part] for part in PARTS})
    finally:
        if undo is not None:
            undo()
    return times


def _print(tokens: dict[tuple[int, ...], list[dict[str, float]]]) -> None:
    print(f"| MiB x reads | token, ms (p50) | outside of reads | {' | '.join(PARTS)} |")
    print("|" + "---|" * (len(PARTS) + 3))
    for (size, most, settled), times in tokens.items():
        whole = [sum(parts.values()) for parts in times]
        outside = mean(sum(parts.values()) - parts["first"] - parts["rest"] for parts in times)
        name = f"{size}x{most}{', settled' if settled else ''}"
        columns = " | ".join(f"{mean(parts[part] for parts in times):.2f}" for part in PARTS)
        print(f"| {name} | {mean(whole):.1f} ({median(whole):.1f}) | {outside:.1f} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
