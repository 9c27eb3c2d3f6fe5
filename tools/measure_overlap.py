"""Measure how much of the I/O of decoding is hidden behind computation, on a model larger than memory.

    python tools/measure_overlap.py <pack> --backend ram_hybrid --prefetch none,early_router \
        --options budget_gib=10,reader=io_uring,direct=true,preload=true

Modes take turns token by token, in one process and on one store, because the rate of a disk may drift within a minute.
Each mode has one sequence of random tokens in a round:

- parts: experts are applied as they arrive; this is what users run.
- blocking: the same, but a layer waits for its last expert before it computes with the first.
- compute: the store serves other records from memory, so that nothing is read. With ``--gpu``, a second engine has all
  experts in the GPU's memory.
- I/O: the misses of "parts" are read again, layer by layer, and nothing is computed.

Besides the policies of ``prefetch=`` there is "known", which hints exactly the experts that each layer will choose,
when "early_router" would hint its guesses. It shows how much of the time is due to wrong guesses. The store should read
directly (``direct=true``), or "I/O" finds its records in the page cache.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from check_speed_model import OtherProcesses

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.moe.prefetch import Likely, Prefetcher
from flashmoe_mlx.research.traces.recorder import recorded
from flashmoe_mlx.stores.contract import StoreStats
from flashmoe_mlx.stores.delivery import Delivery
from flashmoe_mlx.stores.host_slots import CopyBuffer, HostSlots

_OTHER_RECORDS = 64
_WARM_UP = 8
_HEAD = (
    "| prefetch | ms per token: parts | blocking | compute alone | I/O alone | parts / larger alone | I/O hidden | "
    "MB read per token | wasted | read ahead | other processes |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
_KNOWN = "known"


class KnownChoices(Prefetcher):
    """A prefetcher that knows the experts of the next tokens."""

    def __init__(self, pack: Path, engine: Engine) -> None:
        super().__init__(engine.store, engine.store.source.num_layers)
        self._other = flashmoe_mlx.load(pack, "pread", prompt_cache_gib=0)
        self.experts: Any = None
        """The experts of the next token, by layer."""
        runner: Any = engine.runner
        runner._prefetcher = self

    def learn(self, tokens: Sequence[int]) -> Any:
        """Return the experts [tokens, layers, K] of ``tokens``, which a new sequence begins with."""
        cache = self._other.new_cache()
        with recorded(self._other) as recorder:
            for token in tokens:
                self._other.forward([token], cache)
            return recorder.trace(int(self._store.source.num_experts), []).experts

    def _likely_now(self, layer: int, _: mx.array) -> Likely:
        return [self.experts[layer].tolist()]


Steps = Iterator[float]
"""The milliseconds of each token."""


class Bench:
    """An engine whose store can be made to wait, to read nothing, or to do nothing but read."""

    def __init__(self, engine: Engine, seed: int, known: KnownChoices | None, resident: Engine | None = None) -> None:
        self.engine = engine
        self.resident = resident
        self.known = known
        self.store: Any = engine.store  # this tool replaces private methods
        self.random = np.random.default_rng(seed)
        self.loads = self.store._load
        record = self.store.layout.record_bytes
        self.others = HostSlots(_OTHER_RECORDS, record, CopyBuffer(record))
        some = range(min(self.store.slots, _OTHER_RECORDS))
        for start in range(0, _OTHER_RECORDS, len(some)):
            rows = self.others.rows(range(start, min(start + len(some), _OTHER_RECORDS)))
            self.store._reader._reader.read(0, list(zip(some, rows, strict=False)))
        self.misses: list[tuple[int, list[int]]] = []
        """The misses of the latest token of "parts", by layer."""
        self.next = 0

    def sequences(self, count: int) -> dict[str, Steps]:
        """Return new sequences of ``count`` random tokens, by mode."""
        return {
            "parts": self._steps(count, self.engine, self._parts),
            "io": self._reads(),
            "blocking": self._steps(count, self.engine, self._blocking),
            "compute": self._steps(count, self.resident or self.engine, self._computing),
        }

    def warm_up(self) -> None:
        """Decode tokens that do not count."""
        for mode in self.sequences(_WARM_UP).values():
            for _ in range(_WARM_UP):
                next(mode)

    def _steps(self, count: int, engine: Engine, way: Callable[[], AbstractContextManager[object]]) -> Steps:
        """Decode random tokens of a new sequence in a ``way``, and yield the milliseconds of each."""
        cache, tokens = engine.new_cache(), self.random.integers(256, size=count).tolist()
        experts = self.known.learn(tokens) if self.known is not None else None
        for place, token in enumerate(tokens):
            if self.known is not None:
                self.known.experts = experts[place]
            with way():
                start = time.perf_counter()
                mx.eval(engine.forward([token], cache))
                passed = time.perf_counter() - start
            yield 1e3 * passed

    @contextmanager
    def _parts(self) -> Iterator[None]:
        """Take the path of users, and record the misses."""
        self.misses = []
        reader, name = self.store._reader, "fetch" if self.store._reader._in_place else "read"
        original: Callable[..., Any] = getattr(reader, name)

        def recorded(layer: int, experts: Sequence[int], *rest: Any) -> Any:
            self.misses.append((layer, list(experts)))
            return original(layer, experts, *rest)

        setattr(reader, name, recorded)
        try:
            yield
        finally:
            delattr(reader, name)

    def _blocking(self) -> AbstractContextManager[None]:
        """Let the store deliver all experts at the end."""
        return self._with_load(lambda layer, experts, _: self.loads(layer, experts, Delivery(None, 0)))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Let the store read nothing."""

        def load(_: int, experts: Sequence[int], __: Delivery) -> Any:
            self.next += len(experts)
            slots = [(self.next + place) % _OTHER_RECORDS for place in range(len(experts))]
            return self.others.batch(slots), StoreStats(hits=len(experts))

        self.store.prefetch = lambda *_: None
        try:
            with self._with_load(load):
                yield
        finally:
            del self.store.prefetch

    def _reads(self) -> Steps:
        """Read the misses of the latest token of "parts" alone, and yield the milliseconds."""
        while True:
            start = time.perf_counter()
            for layer, experts in self.misses:
                self.store._reader._reader.read(layer, list(zip(experts, self.others.rows(range(32)), strict=False)))
            yield 1e3 * (time.perf_counter() - start)

    @contextmanager
    def _with_load(self, load: Callable[..., Any]) -> Iterator[None]:
        self.store._load = load
        try:
            yield
        finally:
            del self.store._load


def main() -> None:
    """Measure every prefetch policy and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--backend", default="ram_hybrid")
    parser.add_argument("--options", default="", help="options of the backend: name=value,name=value")
    parser.add_argument("--prefetch", default="none")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--gpu", action="store_true", help="compute on the GPU, whose memory holds the model")
    arguments = parser.parse_args()
    mx.set_default_device(mx.gpu if arguments.gpu else mx.cpu)
    options = dict(option.split("=", 1) for option in filter(None, arguments.options.split(",")))
    parsed = {name: yaml.safe_load(value) for name, value in options.items()}
    print(_HEAD)
    with ExitStack() as stack:
        resident = None
        if arguments.gpu:
            resident = stack.enter_context(flashmoe_mlx.load(arguments.pack, "resident", prompt_cache_gib=0))
        for policy in arguments.prefetch.split(","):
            _measure(arguments, policy, parsed, resident)


def _measure(arguments: argparse.Namespace, policy: str, options: dict[str, Any], resident: Engine | None) -> None:
    """Measure one policy and print its row."""
    named = "early_router" if policy == _KNOWN else policy
    with flashmoe_mlx.load(arguments.pack, arguments.backend, prefetch=named, prompt_cache_gib=0, **options) as engine:
        bench = Bench(engine, 1, KnownChoices(arguments.pack, engine) if policy == _KNOWN else None, resident)
        bench.warm_up()
        times: dict[str, list[float]] = {"parts": [], "blocking": [], "compute": [], "io": []}
        done, others = StoreStats(), OtherProcesses()
        for _ in range(arguments.rounds):
            modes = bench.sequences(arguments.tokens)
            for token in range(arguments.tokens):
                for mode in (
                    ("parts", "io", "blocking", "compute") if token % 2 else ("compute", "blocking", "parts", "io")
                ):
                    before = engine.store.stats()
                    times[mode].append(next(modes[mode]))
                    if mode == "parts":
                        done += engine.store.stats() - before
        _print_row(policy, times, done, others.share())


def _print_row(policy: str, times: dict[str, list[float]], done: StoreStats, others: float) -> None:
    parts, blocking, compute, io = (mean(times[mode]) for mode in ("parts", "blocking", "compute", "io"))
    tokens = len(times["parts"])
    shown = " | ".join(f"{mean(ms):.1f} (p50 {median(ms):.1f})" for ms in times.values())
    print(
        f"| {policy} | {shown} | {parts / max(compute, io):.2f} | {1 - (parts - compute) / io:.0%} "
        f"(blocking {1 - (blocking - compute) / io:.0%}) | {done.bytes_read / tokens / 1e6:.0f} | "
        f"{done.bytes_wasted / tokens / 1e6:.0f} | {done.prefetched / max(1, done.misses):.0%} | {others:.0%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
