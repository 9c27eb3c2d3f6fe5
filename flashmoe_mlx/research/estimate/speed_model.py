"""Predict the speed of decoding from a probe of the machine and the number of experts that each layer must read.

The experts of a layer are known only after its router has run. Reads therefore overlap with the computation of experts,
but not with that of the rest of the layer::

    seconds = L * layer + R * weight + sum over layers of (K * e + added(m) - overlap * min(added(m), (K - m) * e))
    e = expert + W * expert_weight

with L layers, R resident weights that a token uses, K experts of W weights, and m experts that a layer reads. The four
costs are fitted to the measurements of the probe's two models with all experts in memory. ``added(m)`` is the time that
reading all of m experts adds to a layer. In the probe, it is the difference between a way of reading and memory; it is
interpolated linearly between the measured values of m and between the two record sizes. The K - m experts in memory are
computed during the reads: with an ``overlap`` of 1, a layer takes the maximum of both times in place of their sum. The
probe measures ``overlap`` with a store that keeps half of the experts. Misses are given as a distribution rather than a
mean, since the time of a layer is not linear in its number of misses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.models.config import ModelSize
from flashmoe_mlx.research.estimate.machine_profile import HALF, MEMORY, MachineProfile, Point
from flashmoe_mlx.research.estimate.sizes import expert_weights, record_bytes, touched_weights

DIRECT = ("io_uring direct", "pread direct")
"""Ways of reading past the page cache, the preferred way first."""
Distribution = npt.NDArray[np.float64]
"""The probabilities of 0, 1, 2, ... experts."""


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a token.

    Attributes:
        seconds: time of a token.
        reading: part of ``seconds`` that reading adds.
        low: ``seconds`` according to the fastest quartile of the probe.
        high: ``seconds`` according to the slowest quartile of the probe.
    """

    seconds: float
    reading: float
    low: float
    high: float


def certainly(experts: int) -> Distribution:
    """Return the distribution in which the number is always ``experts``."""
    return np.asarray(np.eye(1, experts + 1, experts)[0])


class SpeedModel:
    """Predictions of decode speed for the machine of ``profile``.

    ``faster_reads`` divides the time that reading adds, to predict the speed with a disk that is faster by this factor.
    """

    def __init__(self, profile: MachineProfile, faster_reads: float = 1.0) -> None:
        self.profile = profile
        self._faster_reads = faster_reads

    def predict(
        self,
        config: ModelSize,
        bits: int,
        experts_k: float,
        reads: Mapping[str, Distribution],
        size: int | None = None,
    ) -> Prediction:
        """Predict the time of a decoded token.

        Args:
            config: the model.
            bits: bit width of the experts; the time to compute is that of the nearest measured width.
            experts_k: experts per token, on average.
            reads: for each way of reading, the distribution of the number of experts per layer read in this way.
            size: bytes of a record; None for groups of 64 weights.

        Raises:
            ValueError: a way of reading was not measured.
        """
        size = size or record_bytes(config, bits)
        quartiles = []
        for quartile in range(3):
            costs = self._costs(bits, quartile)
            expert = costs.of_expert(expert_weights(config))
            reading = 0.0
            for way, counts in reads.items():
                added = self._added(way, size, len(counts), quartile) / self._faster_reads
                # A second way of reading serves the other experts, so that none is in memory.
                in_memory = experts_k - np.arange(len(counts)) if len(reads) == 1 else np.zeros(len(counts))
                hidden = self._overlap(quartile) * np.minimum(added, np.maximum(in_memory, 0) * expert)
                reading += float(np.dot(counts, added - hidden))
            layers = config.num_moe_layers
            computing = (
                config.num_layers * costs.layer + layers * experts_k * expert + costs.weight * touched_weights(config)
            )
            quartiles.append((computing, layers * reading))
        totals = [computing + reading for computing, reading in quartiles]
        return Prediction(totals[1], quartiles[1][1], min(totals), max(totals))

    def _points(self, way: str, bits: int | None = None) -> list[Point]:
        """Return the measurements of ``way``, of experts with ``bits`` only if given."""
        points = [point for point in self.profile.points if point.way == way and bits in (None, point.bits)]
        if not points:
            reason = self.profile.missing.get(way, "the probe has not measured it")
            raise ValueError(f"{way}: {reason}")
        return points

    def _costs(self, bits: int, quartile: int) -> "_Costs":
        """Fit the costs of computing to the measurements with all experts in memory."""
        widths = sorted({point.bits for point in self._points(MEMORY)})
        base, nearest = widths[-1], min(widths, key=lambda width: abs(width - bits))
        lines = [_Line.through(points, quartile) for points in _by_size(self._points(MEMORY, base))]
        layer, weight = _two_costs([(line.layers, line.resident_weights, line.start) for line in lines])
        expert, expert_weight = _two_costs(
            [(line.layers, line.layers * line.expert_weights, line.slope) for line in lines]
        )
        if nearest != base:
            # At least one size was measured with this width; the fixed cost of an expert does not depend on the width.
            line = _Line.through(_by_size(self._points(MEMORY, nearest))[-1], quartile)
            expert_weight = max(0.0, line.slope / line.layers - expert) / line.expert_weights
        return _Costs(layer, weight, expert, expert_weight)

    def _overlap(self, quartile: int) -> float:
        """Return the share of the time of experts in memory that reads hide, from 0 to 1; 0 if it was not measured."""
        points = [point for point in self.profile.points if point.way == HALF]
        way = next((way for way in DIRECT if way in self.profile.ways), None)
        saved = possible = 0.0
        for point in points if way else ():
            assert way is not None
            counts = math.ceil(point.misses) + 1
            added = self._added(way, point.record_bytes, counts, quartile)
            expected = float(np.interp(point.misses, np.arange(counts), added))
            expert = self._costs(point.bits, quartile).of_expert(point.expert_weights)
            saved += expected - point.added[quartile] / point.layers
            possible += min(expected, (point.experts_k - point.misses) * expert)
        return min(1.0, max(0.0, saved / possible)) if possible > 0 else 0.0

    def _added(self, way: str, size: int, counts: int, quartile: int) -> npt.NDArray[np.float64]:
        """Return the seconds that reading 0, 1, ... experts adds to a layer.

        Args:
            way: way of reading.
            size: bytes of a record.
            counts: the length of the result.
            quartile: quartile of the measurements, 0 to 2.
        """
        curves = []
        for points in _by_size(self._points(way)):
            reads = [0] + [point.experts_k for point in points]
            added = [0.0] + [max(point.added[quartile], point.fetching) / point.layers for point in points]
            numbers = np.arange(counts)
            beyond = numbers * added[-1] / reads[-1]
            per_count = np.where(numbers <= reads[-1], np.interp(numbers, reads, added), beyond)
            curves.append((points[0].record_bytes, per_count))
        return _over_size(curves, size)


@dataclass(frozen=True)
class _Costs:
    """Seconds of computing: for a layer, a resident weight, an expert in any case, and each of its weights."""

    layer: float
    weight: float
    expert: float
    expert_weight: float

    def of_expert(self, weights: int) -> float:
        """Return the seconds of an expert with this number of weights."""
        return self.expert + weights * self.expert_weight


@dataclass(frozen=True)
class _Line:
    """The seconds of a token as a linear function of K, and the size of the measured model."""

    start: float
    slope: float
    layers: int
    resident_weights: int
    expert_weights: int

    @classmethod
    def through(cls, points: Sequence[Point], quartile: int) -> "_Line":
        """Fit a line to ``points`` of one model, which differ in K."""
        first = points[0]
        slope, start = np.polyfit(
            [point.experts_k for point in points], [point.seconds[quartile] for point in points], 1
        )
        return cls(float(start), float(slope), first.layers, first.resident_weights, first.expert_weights)


def _by_size(points: Sequence[Point]) -> list[list[Point]]:
    """Group points by the size of the model; groups are sorted by the bytes of a record, their points by K."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.record_bytes, point.experts_k)):
        groups.setdefault(point.size, []).append(point)
    return list(groups.values())


def _two_costs(equations: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Fit costs a, b >= 0 to equations ``a * x + b * y = seconds`` by least squares of the relative error."""
    scaled = np.array([(x / seconds, y / seconds) for x, y, seconds in equations if seconds > 0])
    if not len(scaled):
        return 0.0, 0.0
    ones = np.ones(len(scaled))
    units = np.abs(scaled).max(axis=0)
    costs, *_ = np.linalg.lstsq(scaled / units, ones, rcond=None)
    if (costs >= 0).all():
        return float(costs[0] / units[0]), float(costs[1] / units[1])
    # A negative cost is impossible: set one cost to 0 and fit the other alone.
    alone = [float(column @ ones / (column @ column)) for column in scaled.T]
    errors = [float(np.square(scaled[:, index] * alone[index] - 1).sum()) for index in (0, 1)]
    return (alone[0], 0.0) if errors[0] < errors[1] else (0.0, alone[1])


def _over_size(curves: Sequence[tuple[int, npt.NDArray[np.float64]]], size: int) -> npt.NDArray[np.float64]:
    """Interpolate linearly between ``curves`` of (record bytes, seconds), and extrapolate to records of ``size`` bytes.

    For records smaller than all measured records, the seconds are at least in proportion to the size.
    """
    nearest, seconds = min(curves, key=lambda curve: abs(curve[0] - size))
    if len(curves) == 1:
        return seconds * (size / nearest)
    (small, few), (large, many) = curves[0], curves[-1]
    line = few + (many - few) * ((size - small) / (large - small))
    return np.maximum(line, seconds * (size / nearest) if size < small else few)
