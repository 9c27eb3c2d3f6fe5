"""Probe this machine for the speed model: the time of a layer, and the time that reading adds to it.

The probe makes two small models with random weights, decodes tokens with them, and deletes them. Ways of reading that
are compared with each other are interleaved. Whole tokens are measured, because a loop of reads would be too
optimistic: in a running model, the weights used between two reads evict the pages from the processor's caches.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import check_kernels
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.generation.logits import checked_logits
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes
from flashmoe_mlx.model_files import ModelFiles, open_model
from flashmoe_mlx.models.code_paths import model_shapes
from flashmoe_mlx.models.decoder import Model
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.prefetch import Guesses, Prefetcher, make_prefetcher
from flashmoe_mlx.research.bench.files import expert_files
from flashmoe_mlx.research.estimate.machine_profile import (
    AHEAD,
    HALF,
    MEMORY,
    WAYS,
    MachineProfile,
    Point,
    machine_identity,
)
from flashmoe_mlx.research.estimate.probe_models import SIZES
from flashmoe_mlx.research.estimate.sizes import expert_weights, record_bytes, touched_weights
from flashmoe_mlx.research.intervals import percentiles
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.memory import GIB
from flashmoe_mlx.stores.page_cache import evict
from flashmoe_mlx.stores.registry import open_store

_FEW = 16
"""Experts per layer in the models whose experts are all in memory."""
EXPERTS = (1, 4, 10)
"""Measured values of K; the speed model interpolates between them."""
_LEAST_ROUNDS = 3
_TIMED = 2
"""Timed tokens of each decoder in a round."""
_COPIED = 2**27
"""Number of 32-bit words to copy when measuring the bandwidth of memory."""


def probe(folder: Path, seconds: float, announce: Callable[[str], object]) -> MachineProfile:
    """Measure this machine and the disk under ``folder``.

    Args:
        folder: directory for temporary models, which take 3 GB.
        seconds: approximate duration of the measurement, without the time to make the models.
        announce: called with a description of each step before it begins.

    Raises:
        FlashMoeError: the models cannot be made or run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(prefix="probe-", dir=folder))
    points: list[Point] = []
    missing: dict[str, str] = {}
    try:
        for size, share in (("large", 0.7), ("small", 0.3)):
            announce(f"probe: making a {size} model")
            with _SizeProbe(size, work, missing) as size_probe:
                points += size_probe.measure(share * seconds, announce)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    announce("probe: memory")
    return MachineProfile(machine_identity(), datetime.now(UTC), _memory_bandwidth(), tuple(points), missing)


class _SizeProbe:
    """The measurements of one size, with an engine that has all experts in memory and an engine that reads them all.

    Ways of reading that do not work on this machine are added to ``missing``, with the reasons.
    """

    def __init__(self, size: str, folder: Path, missing: dict[str, str]) -> None:
        self._size = size
        self._folder = folder
        self._missing = missing
        self._stack = ExitStack()
        self._decoders: dict[tuple[int, int, str], _Decoder] = {}

    def __enter__(self) -> Self:
        sizes = SIZES[self._size]
        with self._stack:
            for bits in (2, 4) if self._size == "large" else (4,):
                few = self._make("few", replace(sizes, num_experts=_FEW, bits=bits))
                in_memory = self._load(few, "resident")
                self._add(bits, MEMORY, in_memory, in_memory.store)
            many = self._make("many", sizes)
            reading = self._load(many, "pread")
            for way, (backend, options) in WAYS.items():
                # Cold reads use a separate model, because evicting shared files would leave no way warm.
                cold = expert_files(few.variant(None)) if way.endswith("cold") else []
                try:
                    evict(cold)
                    store, _ = open_store(few if cold else many, backend, options)
                except FlashMoeError as error:
                    self._missing[way] = str(error)
                    continue
                self._stack.enter_context(store)
                self._add(bits, way, in_memory if cold else reading, store, cold)
            for way in (HALF, *AHEAD.values()):
                self._add(bits, way, reading, self._half(many))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make(self, name: str, sizes: SyntheticSizes) -> ModelFiles:
        return open_model(synthetic_pack(name, sizes, self._folder).folder)

    def _load(self, files: ModelFiles, backend: str) -> Engine:
        """Load an engine and check its kernels for every measured K; ``load`` checks them for the model's own K."""
        engine = self._stack.enter_context(load(files.folder, backend, prompt_cache_gib=0))
        for k in set(EXPERTS) - {files.config.experts_per_token}:
            model = with_experts(engine.model, engine.store, k)
            check_kernels(model.kernels, model_shapes(model))
        return engine

    def _half(self, files: ModelFiles) -> ExpertStore:
        """Open a store that keeps half of the experts."""
        column = files.variant(None).layout.bytes_in_all_layers
        options = {"budget_gib": files.config.num_experts // 2 * column / GIB, "direct": True, "preload": True}
        ring = {} if "io_uring direct" in self._missing else {"reader": "io_uring", "depth": 64}
        return self._stack.enter_context(open_store(files, "ram_hybrid", options | ring)[0])

    def _add(self, bits: int, way: str, engine: Engine, store: ExpertStore, cold: Sequence[Path] = ()) -> None:
        for k in EXPERTS:
            model = with_experts(engine.model, store, k)
            policy = next((policy for policy, name in AHEAD.items() if name == way), "none")
            self._decoders[bits, k, way] = _Decoder(model, store, cold, make_prefetcher(policy, store, model.routers))

    def measure(self, seconds: float, announce: Callable[[str], object]) -> Iterator[Point]:
        """Decode in rounds until ``seconds`` have passed, in reverse order in every second round."""
        end = time.perf_counter() + seconds
        number = 0
        # Ways of reading that are compared with each other run one after the other.
        order = sorted(self._decoders, key=lambda key: key[:2])
        while number < _LEAST_ROUNDS or time.perf_counter() < end:
            for bits, k, way in order[:: 1 if number % 2 == 0 else -1]:
                announce(f"probe: {self._size} model, round {number + 1}, {bits} bits, {k} experts, {way}")
                self._decoders[bits, k, way].step()
            number += 1
        for (bits, k, way), decoder in self._decoders.items():
            config = decoder.config
            added = np.subtract(decoder.seconds, self._decoders[bits, k, MEMORY].seconds)
            yield Point(
                size=self._size,
                bits=bits,
                experts_k=k,
                way=way,
                layers=config.num_layers,
                resident_weights=touched_weights(config),
                expert_weights=expert_weights(config),
                record_bytes=record_bytes(config, bits),
                seconds=percentiles(decoder.seconds, (25, 50, 75)),
                added=percentiles(added.tolist(), (25, 50, 75)),
                fetching=float(np.median(decoder.fetching)),
                misses=decoder.misses / len(decoder.seconds) / config.num_layers,
            )


class _Decoder:
    """A sequence decoded with one store and K; ``cold`` files are evicted from the page cache before each token."""

    def __init__(self, model: Model, store: ExpertStore, cold: Sequence[Path], prefetcher: Prefetcher | None) -> None:
        self._model, self._store, self._cold = model, store, cold
        self._cache = model.new_cache()
        self._prefetcher = prefetcher
        self._context = ForwardContext(PhaseClock(), prefetcher)
        self._random = np.random.default_rng(0)
        self.config = model.config
        self.seconds: list[float] = []
        self.fetching: list[float] = []
        self.misses = 0
        self._decode()  # the first token of a sequence is not representative

    def step(self) -> None:
        """Decode further tokens, chosen at random, and time all but the first, which follows another decoder's."""
        self._decode()
        for _ in range(_TIMED):
            before = self._store.stats()
            self.seconds.append(self._decode())
            done = self._store.stats() - before
            self.fetching.append(done.fetch_seconds)
            self.misses += done.misses

    def _decode(self) -> float:
        """Decode a token and return the seconds."""
        if self._cold:
            evict(self._cold)
        token = int(self._random.integers(self._model.config.vocab_size))
        start = time.perf_counter()
        if self._prefetcher is not None:
            self._prefetcher.begin_pass([Guesses()], [1], decoding=True)
        hidden = self._model.forward(mx.array([token], mx.uint32), [1], [self._cache], self._context)
        logits = self._model.logits(hidden)
        mx.eval(logits, *self._cache.arrays())
        seconds = time.perf_counter() - start
        checked_logits(np.array(logits))
        return seconds


def _memory_bandwidth() -> float:
    """Measure a copy in the memory of MLX's device, in GB/s of reads and writes together; return the best of 5."""
    words = mx.zeros(_COPIED, mx.uint32)
    mx.eval(words)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(words + 1)
        rates.append(2 * words.nbytes / (time.perf_counter() - start) / 1e9)
    return max(rates)


def with_experts(model: RunnableModel, store: ExpertStore, experts_k: int) -> Model:
    """Return a copy of ``model`` that uses ``experts_k`` routed experts per token from ``store``; it shares weights."""
    assert isinstance(model, Model)
    layers = [
        replace(layer, feed_forward=layer.feed_forward.with_store(store, experts_k))
        if isinstance(layer.feed_forward, MixtureOfExperts)
        else layer
        for layer in model.layers
    ]
    return replace(model, layers=layers)
