"""Probe this machine for the speed model: the cost of a layer, and the cost that reading adds, in a running engine.

The probe makes, runs and deletes two small models with random weights: the geometries of Qwen3.5-35B and 397B with four
layers. It measures whole tokens, in turns. A loop of reads would be too optimistic: in a running model the weights
between two reads push the pages out of the processor's caches.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import check_kernels, dialect, native
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.untrusted import read_object
from flashmoe_mlx.generation.logits import checked_logits
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes
from flashmoe_mlx.model_files import ModelFiles, open_model
from flashmoe_mlx.models.code_paths import model_shapes
from flashmoe_mlx.models.decoder import Model
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.estimate.sizes import expert_weights, record_bytes, touched_weights
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.page_cache import evict
from flashmoe_mlx.stores.registry import open_store

PROBE_VERSION = 1
_LARGE = SyntheticSizes(
    num_layers=4,
    hidden_size=4096,
    num_experts=64,
    experts_per_token=10,
    expert_size=1024,
    shared_expert_size=1024,
    num_heads=32,
    num_kv_heads=2,
    head_dim=256,
    linear_key_heads=16,
    linear_value_heads=64,
    linear_key_dim=128,
    linear_value_dim=128,
    max_context=4096,
    bits=4,
    seed=0,
)
_SMALL = replace(_LARGE, hidden_size=2048, expert_size=512, shared_expert_size=512, num_heads=16, linear_value_heads=32)
SIZES: Mapping[str, SyntheticSizes] = {"large": _LARGE, "small": _SMALL}
_FEW = 16
"""Experts of each layer in the models whose experts are all in memory."""
EXPERTS = (1, 4, 10)
"""Values of K that are measured; others are interpolated."""
MEMORY = "memory"
"""The name of the way without reads."""
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pread warm": ("pread", {}),
    "pread cold": ("pread", {}),
    "pread direct": ("pread", {"direct": True}),
    "io_uring direct": ("io_uring", {}),
    "mmap warm": ("mmap", {}),
}
"""Ways of reading: the backend and its options. Warm from the page cache, cold through it, direct past it."""
_LEAST_ROUNDS = 3
_COPIED = 2**27
"""Number of 32-bit words copied to measure the memory's speed."""
_IDENTITY = ("platform", "processor", "cores", "memory_bytes", "mlx_device", "kernels", "mlx")


@dataclass(frozen=True)
class Point:
    """The measured time of a decoded token for one size, width, K and way of reading.

    Attributes:
        size: a key of ``SIZES``.
        bits: width of the experts.
        experts_k: experts per token.
        way: a key of ``WAYS``, or MEMORY if nothing was read.
        layers: layers of the model.
        resident_weights: weights that a token uses besides its experts.
        expert_weights: weights of one expert.
        record_bytes: bytes of one expert.
        seconds: quartiles over the rounds.
        added: quartiles of the differences from MEMORY in each round.
        fetching: median seconds inside ``fetch``.
    """

    size: str
    bits: int
    experts_k: int
    way: str
    layers: int
    resident_weights: int
    expert_weights: int
    record_bytes: int
    seconds: tuple[float, float, float]
    added: tuple[float, float, float]
    fetching: float


@dataclass(frozen=True)
class MachineProfile:
    """Results of the probe; ``memory_gb_per_second`` is that of a copy, reads and writes counted."""

    identity: Mapping[str, Any]
    created: datetime
    memory_gb_per_second: float
    points: tuple[Point, ...]
    missing: Mapping[str, str]
    """Ways that this machine lacks, with the reason for each."""

    @property
    def ways(self) -> list[str]:
        """The ways of reading that were measured."""
        return [way for way in WAYS if any(point.way == way for point in self.points)]

    @property
    def age_days(self) -> float:
        """Days since the measurement."""
        return (datetime.now(UTC) - self.created).total_seconds() / 86400

    def to_json(self) -> dict[str, Any]:
        """Return the profile in the form of its file."""
        return {"probe_version": PROBE_VERSION, **asdict(self), "created": self.created.isoformat()}

    def save(self, path: Path) -> None:
        """Write the profile to ``path``, replacing an older one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_json(), indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read the profile in ``path``; None if there is none, it is damaged, or another version wrote it."""
        if not path.is_file():
            return None
        try:
            found = read_object(path, strict=True)
            if found["probe_version"] != PROBE_VERSION:
                return None
            points = tuple(map(_point, found["points"]))
            created = datetime.fromisoformat(found["created"])
            memory = float(found["memory_gb_per_second"])
            if created.tzinfo is None or {one.size for one in points if one.way == MEMORY} != set(SIZES):
                return None
            return cls(dict(found["identity"]), created, memory, points, dict(found["missing"]))
        except (FlashMoeError, KeyError, TypeError, ValueError):
            return None


def _point(entry: Mapping[str, Any]) -> Point:
    """Read a point of a profile's file; raises KeyError, TypeError or ValueError where it is malformed."""
    made: dict[str, Any] = {name: str(entry[name]) for name in ("size", "way")}
    counts = ("bits", "experts_k", "layers", "resident_weights", "expert_weights", "record_bytes")
    made |= {name: int(entry[name]) for name in counts}
    for name in ("seconds", "added"):
        low, median, high = map(float, entry[name])
        made[name] = (low, median, high)
    return Point(**made, fetching=float(entry["fetching"]))


def machine_identity() -> dict[str, Any]:
    """Return the properties of this machine that must be the same for a profile to hold."""
    found = environment()
    kernels = dialect() or (native.description() if native.extension() else "mlx")
    own = {"kernels": kernels, "mlx": found["packages"]["mlx"]}
    return {name: own.get(name, found.get(name)) for name in _IDENTITY}


def probe(folder: Path, seconds: float, announce: Callable[[str], object]) -> MachineProfile:
    """Measure this machine and the disk under ``folder`` for about ``seconds``; uses 3 GB there meanwhile.

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
            with _Bench(size, work, missing) as bench:
                points += bench.measure(share * seconds, announce)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    announce("probe: memory")
    return MachineProfile(machine_identity(), datetime.now(UTC), _memory_rate(), tuple(points), missing)


class _Bench:
    """Two engines of one size, one with all experts in memory and one that reads them all, and their runs."""

    def __init__(self, size: str, folder: Path, missing: dict[str, str]) -> None:
        self._size = size
        self._folder = folder
        self._missing = missing
        self._stack = ExitStack()
        self._runs: dict[tuple[int, int, str], _Run] = {}

    def __enter__(self) -> Self:
        sizes = SIZES[self._size]
        with self._stack:
            for bits in (2, 4) if self._size == "large" else (4,):
                few = self._made("few", replace(sizes, num_experts=_FEW, bits=bits))
                in_memory = self._loaded(few, "resident")
                self._add(bits, MEMORY, in_memory, in_memory.store)
            many = self._made("many", sizes)
            reading = self._loaded(many, "pread")
            for way, (backend, options) in WAYS.items():
                # Cold runs have a model to themselves: dropping the shared files would leave no way warm.
                cold = _files(few) if way.endswith("cold") else []
                try:
                    evict(cold)
                    store, _ = open_store(few if cold else many, backend, options)
                except FlashMoeError as error:
                    self._missing[way] = str(error)
                    continue
                self._stack.enter_context(store)
                self._add(bits, way, in_memory if cold else reading, store, cold)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _made(self, name: str, sizes: SyntheticSizes) -> ModelFiles:
        return open_model(synthetic_pack(name, sizes, self._folder).folder)

    def _loaded(self, files: ModelFiles, backend: str) -> Engine:
        """An engine whose kernels are checked for every K that is measured: loading checks them for the model's own."""
        engine = self._stack.enter_context(load(files.folder, backend))
        for k in set(EXPERTS) - {files.config.experts_per_token}:
            check_kernels(engine.model.kernels, model_shapes(with_experts(engine.model, engine.store, k)))
        return engine

    def _add(self, bits: int, way: str, engine: Engine, store: ExpertStore, cold: Sequence[Path] = ()) -> None:
        for k in EXPERTS:
            self._runs[bits, k, way] = _Run(with_experts(engine.model, store, k), store, cold)

    def measure(self, seconds: float, announce: Callable[[str], object]) -> Iterator[Point]:
        """Measure in rounds, every other one backwards, until the time is over."""
        end = time.perf_counter() + seconds
        number = 0
        # Runs that are compared with each other follow each other.
        turns = sorted(self._runs, key=lambda run: run[:2])
        while number < _LEAST_ROUNDS or time.perf_counter() < end:
            for bits, k, way in turns[:: 1 if number % 2 == 0 else -1]:
                announce(f"probe: {self._size} model, round {number + 1}, {bits} bits, {k} experts, {way}")
                self._runs[bits, k, way].step()
            number += 1
        for (bits, k, way), run in self._runs.items():
            config = run.config
            yield Point(
                self._size,
                bits,
                k,
                way,
                config.num_layers,
                touched_weights(config),
                expert_weights(config),
                record_bytes(config, bits),
                _quartiles(run.seconds),
                _quartiles(np.subtract(run.seconds, self._runs[bits, k, MEMORY].seconds)),
                float(np.median(run.fetching)),
            )


class _Run:
    """A sequence decoded with one store and K; before each token, ``cold`` files are dropped from the page cache."""

    def __init__(self, model: Model, store: ExpertStore, cold: Sequence[Path]) -> None:
        self._model, self._store, self._cold = model, store, cold
        self._cache = model.new_cache()
        self._context = ForwardContext(PhaseClock())
        self._random = np.random.default_rng(0)
        self.config = model.config
        self.seconds: list[float] = []
        self.fetching: list[float] = []
        self.step()
        self.seconds.clear()  # it began the sequence
        self.fetching.clear()

    def step(self) -> None:
        """Decode one more token."""
        if self._cold:
            evict(self._cold)
        token = int(self._random.integers(self._model.config.vocab_size))
        before = self._store.stats().fetch_seconds
        start = time.perf_counter()
        hidden = self._model.forward([[token]], [self._cache], self._context)
        logits = self._model.logits(hidden)
        mx.eval(logits, *self._cache.arrays())
        self.seconds.append(time.perf_counter() - start)
        checked_logits(np.array(logits))
        self.fetching.append(self._store.stats().fetch_seconds - before)


def _quartiles(values: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, float, float]:
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return low, median, high


def _files(files: ModelFiles) -> list[Path]:
    source = files.variant(None)
    return sorted({extent.path for layer in range(source.num_layers) for extent in source.extents(layer, 0)})


def _memory_rate() -> float:
    """Measure GB/s of a copy in the memory that MLX computes in, reads and writes counted; the best of a few."""
    words = mx.zeros(_COPIED, mx.uint32)
    mx.eval(words)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(words + 1)
        rates.append(2 * words.nbytes / (time.perf_counter() - start) / 1e9)
    return max(rates)


def with_experts(model: Model, store: ExpertStore, experts_k: int) -> Model:
    """Return ``model`` with routed experts from ``store``, ``experts_k`` a token; weights are shared."""
    layers = [replace(layer, experts=layer.experts.with_store(store, experts_k)) for layer in model.layers]
    return replace(model, layers=layers)
