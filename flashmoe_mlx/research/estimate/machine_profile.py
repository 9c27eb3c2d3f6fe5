"""The results of the probe, and the file that keeps them."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from flashmoe_mlx.custom_kernels import dialect, native
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.untrusted import read_object
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.estimate.probe_models import SIZES

PROBE_VERSION = 2
MEMORY = "memory"
"""The name for points without reads: all experts are in memory."""
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pread warm": ("pread", {}),
    "pread cold": ("pread", {}),
    "pread direct": ("pread", {"direct": True}),
    "io_uring direct": ("io_uring", {}),
    "mmap warm": ("mmap", {}),
}
"""Ways of reading, each with its backend and options.

Warm reads come from the page cache, cold reads go through it, and direct reads bypass it.
"""
HALF = "half direct"
"""The name for points of a store that keeps half of the experts and reads the rest directly."""
AHEAD = {policy: f"half direct, {policy}" for policy in ("early_router", "next_router")}
"""The name for points of the same store with guesses, by prefetch policy."""
_CLEARLY = 0.97
"""The part of the time that a policy must take at most to be chosen."""
_IDENTITY = ("platform", "processor", "cores", "memory_bytes", "mlx_device", "kernels", "mlx")


@dataclass(frozen=True)
class Point:
    """The measured time of a decoded token for one size, bit width, K and way of reading.

    Attributes:
        size: key of ``SIZES``.
        bits: bit width of the experts.
        experts_k: experts per token.
        way: key of ``WAYS``, ``MEMORY``, ``HALF``, or a value of ``AHEAD``.
        layers: layers of the model.
        resident_weights: weights that a token uses besides its experts.
        expert_weights: weights of one expert.
        record_bytes: bytes of one expert.
        seconds: quartiles over the rounds.
        added: quartiles of the difference from ``MEMORY``, paired by round.
        fetching: median seconds inside ``fetch``, while nothing was computed.
        misses: mean number of experts per layer that the store did not hold.
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
    misses: float


@dataclass(frozen=True)
class MachineProfile:
    """The results of the probe on one machine.

    Attributes:
        identity: properties of the machine, as ``machine_identity`` returns them.
        created: time of the measurement.
        memory_gb_per_second: bandwidth of a copy in memory, reads and writes counted.
        points: measurements.
        missing: ways of reading that the machine does not support, with the reasons.
    """

    identity: Mapping[str, Any]
    created: datetime
    memory_gb_per_second: float
    points: tuple[Point, ...]
    missing: Mapping[str, str]

    @property
    def ways(self) -> list[str]:
        """The measured ways of reading."""
        return [way for way in WAYS if any(point.way == way for point in self.points)]

    def faster_prefetch(self, record_bytes: int) -> str:
        """Return the prefetch policy with which a store that reads records of this size was faster."""
        points = [point for point in self.points if point.way == HALF]
        if not points:
            return "none"
        size = min(points, key=lambda point: abs(point.record_bytes - record_bytes)).size

        def seconds(way: str) -> float:
            return sum(point.seconds[1] for point in self.points if (point.way, point.size) == (way, size))

        measured = {policy: seconds(way) for policy, way in AHEAD.items()}
        fastest = min((policy for policy in measured if measured[policy]), key=measured.__getitem__, default="none")
        return fastest if measured.get(fastest, math.inf) < _CLEARLY * seconds(HALF) else "none"

    @property
    def age_days(self) -> float:
        """Days since the measurement."""
        return (datetime.now(UTC) - self.created).total_seconds() / 86400

    def to_json(self) -> dict[str, Any]:
        """Return the profile in the form of its file."""
        return {"probe_version": PROBE_VERSION, **asdict(self), "created": self.created.isoformat()}

    def save(self, path: Path) -> None:
        """Write the profile to ``path``, replacing an older profile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_json(), indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read the profile in ``path``; None if it is missing or damaged, or if another version wrote it."""
        if not path.is_file():
            return None
        try:
            fields = read_object(path, strict=True)
            if fields["probe_version"] != PROBE_VERSION:
                return None
            points = tuple(map(_parse_point, fields["points"]))
            created = datetime.fromisoformat(fields["created"])
            memory = float(fields["memory_gb_per_second"])
            if created.tzinfo is None or {point.size for point in points if point.way == MEMORY} != set(SIZES):
                return None
            return cls(dict(fields["identity"]), created, memory, points, dict(fields["missing"]))
        except (FlashMoeError, KeyError, TypeError, ValueError):
            return None


def _parse_point(entry: Mapping[str, Any]) -> Point:
    """Convert an entry of a profile's file.

    Raises:
        KeyError, TypeError, ValueError: the entry is malformed.
    """
    fields: dict[str, Any] = {name: str(entry[name]) for name in ("size", "way")}
    counts = ("bits", "experts_k", "layers", "resident_weights", "expert_weights", "record_bytes")
    fields |= {name: int(entry[name]) for name in counts}
    for name in ("seconds", "added"):
        low, median, high = map(float, entry[name])
        fields[name] = (low, median, high)
    return Point(**fields, fetching=float(entry["fetching"]), misses=float(entry["misses"]))


def machine_identity() -> dict[str, Any]:
    """Return the properties of this machine and its software on which a profile depends."""
    found = environment()
    kernels = dialect() or (native.description() if native.extension() else "mlx")
    found |= {"kernels": kernels, "mlx": found["packages"]["mlx"]}
    return {name: found.get(name) for name in _IDENTITY}
