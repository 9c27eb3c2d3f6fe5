"""Estimate memory and speed from the sizes of a model, a simulated cache and the speed model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import LayerLayouts
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.models.config import ModelConfig, ModelSize
from flashmoe_mlx.research.estimate.machine_profile import MachineProfile
from flashmoe_mlx.research.estimate.several_nodes import SUM_SECONDS, most_on_a_node
from flashmoe_mlx.research.estimate.sizes import GROUP_SIZE, MemoryNeed, memory_need, record_bytes
from flashmoe_mlx.research.estimate.speed_model import DIRECT, Distribution, Prediction, SpeedModel, certainly
from flashmoe_mlx.research.traces.cache_design import CacheDesign
from flashmoe_mlx.research.traces.random_traces import zipf_trace
from flashmoe_mlx.research.traces.simulator import Replay
from flashmoe_mlx.research.traces.simulator import replay as replayed

ASSUMED: Mapping[str, float] = {"even": 0.0, "middle": 0.7, "skewed": 1.0}
"""Exponents of Zipf's law for a model without a trace.

Published hit rates of similar engines lie between "even" and "skewed", most of them near "middle".
"""


def tolerance(backend: str) -> float:
    """Return the relative error of the speed model, without the uncertainty of routing (2026-11-24-speed-model.md)."""
    return 0.3 if backend == "resident" else 0.15


_LAYERS = 4
"""Layers of a drawn trace, in place of all layers of the model."""


@dataclass(frozen=True)
class Machine:
    """A machine: its measurements, and ``memory`` in bytes for everything.

    ``faster_reads`` is the factor by which a hypothetical disk is faster.
    """

    profile: MachineProfile
    memory: int
    faster_reads: float = 1.0


@dataclass(frozen=True)
class Model:
    """A model and its settings.

    Attributes:
        config: the geometry.
        bits: the width of routed experts; the mean width if ``layout`` has several.
        resident_bits: the width of resident matrices.
        experts_k: routed experts of a token in each layer.
        context: the length of the sequence in tokens.
        activation_bytes: the bytes of an activation.
        scale_bytes: the bytes of a scale or bias of resident matrices.
        trace: a recording of its routing; None without one.
        group_size: the number of weights that share a scale and a bias.
        kv_bits: the width of cached keys and values; None for that of activations.
        prompt_cache: bytes for the states of earlier prompts and answers.
        layout: the layout of experts of several formats; None where ``bits`` and ``group_size`` determine it.
        nodes: the number of machines that share the experts equally.
    """

    config: ModelSize
    bits: int
    resident_bits: int
    experts_k: int
    context: int
    activation_bytes: int
    scale_bytes: int
    trace: RoutingTrace | None = None
    group_size: int = GROUP_SIZE
    kv_bits: int | None = None
    prompt_cache: int = 0
    layout: LayerLayouts | None = None
    nodes: int = 1

    @property
    def need(self) -> MemoryNeed:
        """The memory that the model needs before it keeps any expert."""
        sizes = self.activation_bytes, self.scale_bytes
        need = memory_need(
            self.config,
            self.resident_bits,
            self.bits,
            self.context,
            *sizes,
            self.group_size,
            self.kv_bits,
            None if self.layout is None else self.layout.record_bytes,
        )
        return replace(need, prompt_cache=self.prompt_cache)

    @property
    def expert_bytes(self) -> int:
        """The bytes of all experts on disk."""
        if self.layout is not None:
            return self.config.num_experts * self.layout.bytes_in_all_layers
        return self.config.num_moe_layers * self.config.num_experts * self.record_bytes

    @property
    def node_bytes(self) -> int:
        """The bytes of the experts of one machine on disk."""
        return -(-self.expert_bytes // self.nodes)

    @property
    def experts_on_a_node(self) -> float:
        """The expected largest number of a token's experts on a machine."""
        most = most_on_a_node(certainly(self.experts_k), self.nodes)
        return float(np.dot(most, np.arange(len(most))))

    @property
    def sums(self) -> float:
        """The seconds of all sums of a token over several machines."""
        return self.config.num_moe_layers * SUM_SECONDS if self.nodes > 1 else 0.0

    @property
    def record_bytes(self) -> int:
        """The bytes of one expert on disk, on average over the layers."""
        if self.layout is not None:
            return round(self.layout.mean_record_bytes)
        return record_bytes(self.config, self.bits, self.group_size)


@dataclass(frozen=True)
class Estimate:
    """The estimated speed of one backend.

    Attributes:
        name: the name of the backend.
        options: its options, except for a budget.
        tokens_per_second: the expected value.
        low: the low end of its range.
        high: the high end of its range.
        reading: the share of the time that reading adds.
        hit_rates: the hit rates at the low end, in the middle and at the high end.
        budget: the bytes of slots or of the page cache.
    """

    name: str
    options: Mapping[str, Any]
    tokens_per_second: float
    low: float
    high: float
    reading: float
    hit_rates: tuple[float, float, float]
    budget: int

    @property
    def backend(self) -> str:
        """The backend with its options, as on the command line."""
        shown = (f"{key}={str(value).lower()}" for key, value in self.options.items())
        return " ".join([self.name, *shown])


def estimates(model: Model, machine: Machine) -> list[Estimate]:
    """Estimate every backend that can run the model on ``machine``, the fastest first; none if it does not fit."""
    room = machine.memory - model.need.total
    if room <= 0:
        return []
    return sorted(_each(model, machine, room), key=lambda estimate: -estimate.tokens_per_second)


def _each(model: Model, machine: Machine, room: int) -> Iterator[Estimate]:
    speed = SpeedModel(machine.profile, machine.faster_reads)
    if model.node_bytes <= room:
        in_memory = _prediction(speed, model, {})
        yield _estimate("resident", {}, [in_memory] * 3, (1.0, 1.0, 1.0), model.node_bytes)
        return
    record = model.record_bytes
    slots = room * model.nodes // (record * model.config.num_moe_layers)
    direct = next((way for way in DIRECT if way in machine.profile.ways), None)
    if direct is not None:
        ring = direct.startswith("io_uring")
        if slots >= 1:
            replays = _replays(model, slots, "layer")
            reads = [{direct: _misses(replay)} for replay in replays]
            reader = {"reader": "io_uring", "depth": 64} if ring else {}
            budget = slots * record * model.config.num_moe_layers // model.nodes
            yield _predicted(speed, model, "ram_hybrid", {**reader, "direct": True}, replays, reads, budget)
        else:
            reads_all = {direct: certainly(model.experts_k)}
            all_read = _prediction(speed, model, reads_all)
            name, options = ("io_uring", {}) if ring else ("pread", {"direct": True})
            yield _estimate(name, options, [all_read] * 3, (0.0, 0.0, 0.0), 0)
    if slots >= 1 and {"pread warm", "pread cold"} <= set(machine.profile.ways):
        replays = _replays(model, slots, "global")
        reads = [{"pread cold": _misses(replay), "pread warm": _hits(replay, model.experts_k)} for replay in replays]
        yield _predicted(speed, model, "pread", {}, replays, reads, room)


def _predicted(
    speed: SpeedModel,
    model: Model,
    name: str,
    options: Mapping[str, Any],
    replays: list[Replay],
    reads: list[dict[str, Distribution]],
    budget: int,
) -> Estimate:
    predictions = [_prediction(speed, model, way) for way in reads]
    rates = [replay.hit_rate or 0.0 for replay in replays]
    return _estimate(name, options, predictions, (rates[0], rates[1], rates[2]), budget)


def _prediction(speed: SpeedModel, model: Model, reads: Mapping[str, Distribution]) -> Prediction:
    """Predict the time of a token; of several machines, the slowest one of each layer decides."""
    slowest = {way: most_on_a_node(counts, model.nodes) for way, counts in reads.items()}
    alone = speed.predict(model.config, model.bits, model.experts_on_a_node, slowest, model.record_bytes)
    sums = model.sums
    return replace(alone, seconds=alone.seconds + sums, low=alone.low + sums, high=alone.high + sums)


def _estimate(
    name: str,
    options: Mapping[str, Any],
    predictions: list[Prediction],
    hit_rates: tuple[float, float, float],
    budget: int,
) -> Estimate:
    worst, middle, best = predictions
    return Estimate(
        name,
        options,
        1 / middle.seconds,
        (1 - tolerance(name)) / worst.high,
        (1 + tolerance(name)) / best.low,
        middle.reading / middle.seconds,
        hit_rates,
        budget,
    )


def _replays(model: Model, slots: int, scope: str) -> list[Replay]:
    """Simulate an LRU cache for the worst, the middle and the best routing."""
    config, k = model.config, model.experts_k
    design = CacheDesign("lru", min(slots, config.num_experts), scope, fetch_slots=max(16, k), prefill_chunk=1)
    if model.trace is not None:
        return [replayed(_settled(model.trace), design)] * 3
    # Every slot is filled within the first half, which is not counted.
    tokens = 2 * (50 + 4 * config.num_experts // k)
    traces = [zipf_trace(tokens, _LAYERS, config.num_experts, k, exponent, seed=0) for exponent in ASSUMED.values()]
    return [replayed(_settled(trace), design) for trace in traces]


def _settled(trace: RoutingTrace) -> RoutingTrace:
    """Return ``trace`` with its first half as a prompt, since an empty cache is not representative."""
    return replace(trace, prompt_tokens=max(trace.prompt_tokens, len(trace.experts) // 2))


def _misses(replay: Replay) -> Distribution:
    return np.asarray(replay.misses / replay.misses.sum())


def _hits(replay: Replay, k: int) -> Distribution:
    misses = np.zeros(k + 1)
    misses[: len(replay.misses)] = replay.misses
    return np.asarray(misses[::-1] / misses.sum())


def check_trace(trace: RoutingTrace, config: ModelSize, name: str) -> None:
    """Raise InputError if ``trace`` and ``config`` differ in the number of layers or experts."""
    _, layers, _ = trace.experts.shape
    if (layers, trace.num_experts) != (config.num_moe_layers, config.num_experts):
        raise InputError(
            f"{name}: recorded with {layers} layers of {trace.num_experts} experts; this model has "
            f"{config.num_moe_layers} of {config.num_experts}",
            code="trace_of_another_model",
        )


def what_ifs(model: Model, machine: Machine) -> Iterator[tuple[str, Model, Machine]]:
    """Yield single changes that may make the model faster: (name, changed model, changed machine)."""
    if model.bits > 2 and isinstance(model.config, ModelConfig):
        yield "bits=[2]", replace(model, bits=2, layout=None), machine
    for k in (4, 2):
        if k < model.experts_k and model.trace is None:
            yield f"experts_k={k}", replace(model, experts_k=k), machine
    yield "twice the memory", model, replace(machine, memory=2 * machine.memory)
    if model.nodes == 1:
        yield "nodes=2", replace(model, nodes=2), machine
    yield "a disk twice as fast", model, replace(machine, faster_reads=2 * machine.faster_reads)
