"""Predict the speed of decoding from a probe of the machine and the number of experts that each layer must read.

The experts of a layer are known only after its router has run, so reading and computing do not overlap::

    seconds = L * layer + R * weight + L * K * (expert + W * expert_weight) + sum over layers of added(misses)

with L layers, R resident weights that a token uses, and K experts of W weights. The four costs are fitted to the
measurements of the probe's two models with all experts in memory. ``added(m)`` is the time that reading m experts adds
to a layer. In the probe, it is the difference between a way of reading and memory; it is interpolated linearly between
the measured values of m and between the two record sizes. Misses are given as a distribution rather than a mean, since
the time of a layer is not linear in its number of misses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.research.estimate.machine_profile import MEMORY, MachineProfile, Point
from flashmoe_mlx.research.estimate.sizes import expert_weights, record_bytes, touched_weights

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
        config: ModelConfig,
        bits: int,
        experts_k: int,
        reads: Mapping[str, Distribution],
        size: int | None = None,
    ) -> Prediction:
        """Predict the time of a decoded token.

        Args:
            config: the model.
            bits: bit width of the experts; the time to compute is that of the nearest measured width.
            experts_k: experts per token.
            reads: for each way of reading, the distribution of the number of experts per layer read in this way.
            size: bytes of a record; None for groups of 64 weights.

        Raises:
            ValueError: a way of reading was not measured.
        """
        size = size or record_bytes(config, bits)
        quartiles = []
        for quartile in range(3):
            computing = self._computing(config, bits, experts_k, quartile)
            reading = sum(self._added(way, size, counts, quartile) for way, counts in reads.items())
            quartiles.append((computing, len(config.moe_layers) * reading / self._faster_reads))
        totals = [computing + reading for computing, reading in quartiles]
        return Prediction(totals[1], quartiles[1][1], min(totals), max(totals))

    def _points(self, way: str, bits: int | None = None) -> list[Point]:
        """Return the measurements of ``way``, of experts with ``bits`` only if given."""
        points = [point for point in self.profile.points if point.way == way and bits in (None, point.bits)]
        if not points:
            reason = self.profile.missing.get(way, "the probe has not measured it")
            raise ValueError(f"{way}: {reason}")
        return points

    def _computing(self, config: ModelConfig, bits: int, experts_k: int, quartile: int) -> float:
        """Return the expected seconds of a token whose experts are all in memory."""
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
        per_expert = expert + expert_weight * expert_weights(config)
        return (
            config.num_layers * layer
            + len(config.moe_layers) * experts_k * per_expert
            + weight * touched_weights(config)
        )

    def _added(self, way: str, size: int, counts: Distribution, quartile: int) -> float:
        """Return the expected seconds that reading adds to a layer.

        Args:
            way: way of reading.
            size: bytes of a record.
            counts: distribution of the number of experts that the layer reads.
            quartile: quartile of the measurements, 0 to 2.
        """
        curves = []
        for points in _by_size(self._points(way)):
            reads = [0] + [point.experts_k for point in points]
            added = [0.0] + [max(point.added[quartile], point.fetching) / point.layers for point in points]
            per_read = added[-1] / reads[-1]
            per_count = [
                float(np.interp(count, reads, added)) if count <= reads[-1] else count * per_read
                for count in range(len(counts))
            ]
            curves.append((points[0].record_bytes, float(np.dot(counts, per_count))))
        return _over_size(curves, size)


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


def _over_size(curves: Sequence[tuple[int, float]], size: int) -> float:
    """Interpolate linearly between ``curves`` of (record bytes, seconds), and extrapolate to records of ``size`` bytes.

    For records smaller than all measured records, the seconds are at least in proportion to the size.
    """
    nearest, seconds = min(curves, key=lambda curve: abs(curve[0] - size))
    if len(curves) == 1:
        return seconds * size / nearest
    (small, few), (large, many) = curves[0], curves[-1]
    line = few + (many - few) * (size - small) / (large - small)
    return max(line, seconds * size / nearest) if size < small else max(line, few)
