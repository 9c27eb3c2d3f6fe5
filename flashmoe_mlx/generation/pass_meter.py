"""The measurement of forward passes, for the metrics of their sequences and for a watcher."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.moe.context import RoutingObserver
from flashmoe_mlx.stores.contract import ExpertStore, StoreStats


@dataclass(slots=True, eq=False)
class WatchedPass:
    """One forward pass, complete when a watcher receives it.

    Attributes:
        decoding: whether the pass decodes; otherwise it processes parts of prompts.
        parts: the number of new tokens of each sequence, in the order of the rows of ``choices``.
        positions: the position of the first of these tokens in its sequence.
        choices: layers with the experts of their T tokens, [T, K] or flat, in the order of their reports.
        misses: layers with experts that one fetch had to read.
        seconds: the wall time of the pass.
        phases: seconds by phase; the rest of ``seconds`` belongs to no phase.
        store: the store's counters over the pass.
    """

    decoding: bool
    parts: dict[Sequence, int]
    positions: dict[Sequence, int]
    choices: list[tuple[int, npt.NDArray[np.integer]]] = field(default_factory=list)
    misses: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    store: StoreStats = field(default_factory=StoreStats)

    def chose(self, layer: int, experts: npt.NDArray[np.integer]) -> None:
        """Note the choice of a router."""
        self.choices.append((layer, experts))

    def missed(self, layer: int, experts: tuple[int, ...]) -> None:
        """Note experts that were not in memory."""
        self.misses.append((layer, experts))


Watcher = Callable[[WatchedPass], object]
"""Receives each pass that has succeeded, in the thread of the engine, which waits for it."""


class PassMeter:
    """Measures passes, one at a time.

    Args:
        store: the store whose counters are read.
        clock: the clock whose phases are read.

    Attributes:
        watcher: receives every pass; may be set at any time and by any thread, and counts from the next pass.
        observer: receives every routing decision at once, so that each layer waits for its router.
    """

    def __init__(self, store: ExpertStore, clock: PhaseClock) -> None:
        self._store = store
        self._clock = clock
        self.watcher: Watcher | None = None
        self.observer: RoutingObserver | None = None
        self._watched: WatchedPass | None = None

    @contextmanager
    def measured(self, parts: Mapping[Sequence, int], *, decoding: bool) -> Iterator[None]:
        """Count the enclosed code as one forward pass; a failed pass is not counted.

        The time and the store's counters of a pass that several sequences share count in full for each of them.

        Args:
            parts: the number of new tokens of each sequence.
            decoding: whether the pass decodes; otherwise it processes parts of prompts.
        """
        store, clock, watcher = self._store, self._clock, self.watcher
        watched = None if watcher is None else _watched(parts, decoding)
        self._watched, store.on_misses = watched, None if watched is None else watched.missed
        before, phases, start = store.stats(), dict(clock.seconds), perf_counter()
        try:
            yield
        finally:
            self._watched = store.on_misses = None
        seconds = perf_counter() - start
        delta = store.stats() - before
        spent = {name: total - phases.get(name, 0.0) for name, total in clock.seconds.items()}
        for sequence, tokens in parts.items():
            stage = sequence.metrics.decode if decoding else sequence.metrics.prefill
            stage.tokens += tokens
            stage.seconds += seconds
            stage.steps.append(seconds)
            stage.store += delta
            for name, passed in spent.items():
                stage.phases[name] += passed
        if watched is not None and watcher is not None:
            watched.seconds, watched.phases, watched.store = seconds, spent, delta
            watcher(watched)

    @property
    def chosen(self) -> RoutingObserver | None:
        """The function that takes the choices of the routers in the present pass; None if nobody wants them."""
        observer, watched = self.observer, self._watched
        if observer is None or watched is None:
            return observer if watched is None else watched.chose

        def both(layer: int, experts: npt.NDArray[np.uint32]) -> None:
            observer(layer, experts)
            watched.chose(layer, experts)

        return both

    @property
    def chosen_in_memory(self) -> Callable[[int, npt.NDArray[np.integer]], object] | None:
        """The function that takes, after the pass, choices for which no layer has waited; None if nobody wants them."""
        return None if self._watched is None else self._watched.chose


def _watched(parts: Mapping[Sequence, int], decoding: bool) -> WatchedPass:
    """Return the pass that is about to begin."""
    if decoding:
        ends = {sequence: len(sequence.request.prompt_ids) + len(sequence.token_ids) for sequence in parts}
        positions = {sequence: end - parts[sequence] for sequence, end in ends.items()}
    else:
        positions = {sequence: sequence.prefilled for sequence in parts}
    return WatchedPass(decoding, dict(parts), positions)
