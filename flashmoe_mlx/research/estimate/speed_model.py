"""Predict the speed of decoding from a probe of the machine and the number of experts that each layer must read.

A layer's experts are known only after its router has run, and nothing overlaps, so a token takes::

    seconds = L * layer + R * weight + L * K * (expert + W * expert_weight) + sum over layers of added(misses)

with L layers, R resident weights that a token uses, and K experts of W weights. The four costs are fitted to the
probe's two sizes with all experts in memory. ``added(m)`` is the time that reading m experts adds to a layer: the
difference between a way of reading and memory in the probe, interpolated linearly between the probe's values of m and
between its two record sizes. Misses come from a simulated cache as a distribution rather than a mean, since the cost of
a layer depends on its own number of misses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.research.estimate.machine_profile import MEMORY, MachineProfile, Point
from flashmoe_mlx.research.estimate.sizes import GROUP_SIZE, expert_weights, record_bytes, touched_weights

Distribution = npt.NDArray[np.float64]
"""The probability of each number of experts, starting with 0."""


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a token.

    Attributes:
        seconds: the whole time.
        reading: the part of it that reading adds.
        low: ``seconds`` from the fastest quartile of the probe.
        high: ``seconds`` from the slowest quartile of the probe.
    """

    seconds: float
    reading: float
    low: float
    high: float


def certainly(experts: int) -> Distribution:
    """Return the distribution of a number that is always ``experts``."""
    return np.asarray(np.eye(1, experts + 1, experts)[0])


class SpeedModel:
    """Predictions for the machine of ``profile``.

    ``faster_reads`` divides the time that reading adds: it assumes a disk that is this many times as fast.
    """

    def __init__(self, profile: MachineProfile, faster_reads: float = 1.0) -> None:
        self.profile = profile
        self._faster_reads = faster_reads

    def predict(
        self,
        config: ModelConfig,
        bits: int,
        experts_k: int,
        reads: Mapping[str, Distribution],
        group_size: int = GROUP_SIZE,
    ) -> Prediction:
        """Predict the time of a token.

        Args:
            config: the model.
            bits: width of the experts; computing with an unmeasured width takes as long as with the nearest one.
            experts_k: experts that a layer chooses.
            reads: for each way of reading, the distribution of the number of a layer's experts read in this way.
            group_size: weights that share a scale and a bias.

        Raises:
            ValueError: the probe has not measured one of the ways.
        """
        size = record_bytes(config, bits, group_size)
        quartiles = []
        for quartile in range(3):
            computing = self._computing(config, bits, experts_k, quartile)
            reading = sum(self._added(way, size, counts, quartile) for way, counts in reads.items())
            quartiles.append((computing, config.num_layers * reading / self._faster_reads))
        totals = [sum(one) for one in quartiles]
        return Prediction(totals[1], quartiles[1][1], min(totals), max(totals))

    def _points(self, way: str, bits: int | None = None) -> list[Point]:
        found = [one for one in self.profile.points if one.way == way and bits in (None, one.bits)]
        if not found:
            reason = self.profile.missing.get(way, "the probe has not measured it")
            raise ValueError(f"{way}: {reason}")
        return found

    def _computing(self, config: ModelConfig, bits: int, experts_k: int, quartile: int) -> float:
        widths = sorted({one.bits for one in self._points(MEMORY)})
        base, nearest = widths[-1], min(widths, key=lambda width: abs(width - bits))
        lines = [_Line.through(points, quartile) for points in _by_size(self._points(MEMORY, base))]
        layer, weight = _two_costs([(one.layers, one.resident_weights, one.start) for one in lines])
        expert, expert_weight = _two_costs([(one.layers, one.layers * one.expert_weights, one.slope) for one in lines])
        if nearest != base:
            # At least one size was measured with these bits; the fixed cost of an expert does not depend on them.
            line = _Line.through(_by_size(self._points(MEMORY, nearest))[-1], quartile)
            expert_weight = max(0.0, line.slope / line.layers - expert) / line.expert_weights
        per_expert = expert + expert_weight * expert_weights(config)
        return config.num_layers * (layer + experts_k * per_expert) + weight * touched_weights(config)

    def _added(self, way: str, size: int, counts: Distribution, quartile: int) -> float:
        """Compute the expected seconds that reading adds to a layer."""
        curves = []
        for points in _by_size(self._points(way)):
            reads = [0] + [one.experts_k for one in points]
            added = [0.0] + [max(one.added[quartile], one.fetching) / one.layers for one in points]
            beyond = added[-1] / reads[-1]
            per_count = [
                float(np.interp(count, reads, added)) if count <= reads[-1] else count * beyond
                for count in range(len(counts))
            ]
            curves.append((points[0].record_bytes, float(np.dot(counts, per_count))))
        return _over_size(curves, size)


@dataclass(frozen=True)
class _Line:
    """Seconds of a token as a line over K, with the size of the model that was measured."""

    start: float
    slope: float
    layers: int
    resident_weights: int
    expert_weights: int

    @classmethod
    def through(cls, points: Sequence[Point], quartile: int) -> "_Line":
        first = points[0]
        slope, start = np.polyfit([one.experts_k for one in points], [one.seconds[quartile] for one in points], 1)
        return cls(float(start), float(slope), first.layers, first.resident_weights, first.expert_weights)


def _by_size(points: Sequence[Point]) -> list[list[Point]]:
    """Group points by size; groups are sorted by bytes of a record, their points by K."""
    groups: dict[str, list[Point]] = {}
    for one in sorted(points, key=lambda point: (point.record_bytes, point.experts_k)):
        groups.setdefault(one.size, []).append(one)
    return list(groups.values())


def _two_costs(equations: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Fit costs a, b >= 0 to equations ``a * x + b * y = seconds``, by least relative error."""
    scaled = np.array([(x / seconds, y / seconds) for x, y, seconds in equations if seconds > 0])
    if not len(scaled):
        return 0.0, 0.0
    ones = np.ones(len(scaled))
    units = np.abs(scaled).max(axis=0)
    both, *_ = np.linalg.lstsq(scaled / units, ones, rcond=None)
    if (both >= 0).all():
        return float(both[0] / units[0]), float(both[1] / units[1])
    # One cost is 0; the other one must explain everything.
    alone = [float(column @ ones / (column @ column)) for column in scaled.T]
    errors = [float(np.square(scaled[:, index] * alone[index] - 1).sum()) for index in (0, 1)]
    return (alone[0], 0.0) if errors[0] < errors[1] else (0.0, alone[1])


def _over_size(curves: Sequence[tuple[int, float]], size: int) -> float:
    """Interpolate between the measured sizes of a record and extrapolate, never below proportion to the size."""
    nearest, seconds = min(curves, key=lambda curve: abs(curve[0] - size))
    if len(curves) == 1:
        return seconds * size / nearest
    (small, few), (large, many) = curves[0], curves[-1]
    line = few + (many - few) * (size - small) / (large - small)
    return max(line, seconds * size / nearest) if size < small else max(line, few)
