"""Forward passes of one model, one at a time: the lock, the clock and the prefetcher that all sequences share."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import mlx.core as mx
import numpy as np

from flashmoe_mlx.errors import EngineBusyError, InputError
from flashmoe_mlx.generation.logits import Logits, checked_logits
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.models.decoder import Model
from flashmoe_mlx.moe.context import ForwardContext, RoutingObserver
from flashmoe_mlx.moe.prefetch import Guesses, Prefetcher
from flashmoe_mlx.stores.contract import ExpertStore


class Runner:
    """A model with its store. Everything but ``exclusive`` must be called inside ``exclusive``."""

    def __init__(self, model: Model, store: ExpertStore, clock: PhaseClock, prefetcher: Prefetcher | None) -> None:
        self.model = model
        self.store = store
        self.clock = clock
        self.observer: RoutingObserver | None = None
        """Receives the routing of every pass."""
        self._prefetcher = prefetcher
        self._lock = threading.Lock()

    @property
    def prefetches(self) -> bool:
        """Whether experts are read ahead by guesses."""
        return self._prefetcher is not None

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context that keeps other callers out: a batch of experts is valid only until the next fetch.

        The context is the lock itself: unlike a context manager in Python, its entry cannot be interrupted between
        taking the lock and promising to release it.

        Raises:
            EngineBusyError: another call is inside. Two calls that arrive at the same instant may wait for each other.
        """
        if self._lock.locked():
            raise EngineBusyError(
                "the engine is busy with another call: it runs one forward pass at a time. Let threads take turns, "
                "with a lock of yours around each step, or load an engine for each thread"
            )
        return self._lock

    def hidden(
        self,
        token_ids: Sequence[int],
        cache: SequenceCache,
        guesses: Guesses,
        *,
        decoding: bool,
        before_layer: Callable[[int], None] | None = None,
    ) -> mx.array:
        """Compute the hidden states [T, hidden] of ``token_ids`` after the tokens in ``cache``; the end stays lazy.

        Raises:
            InputError: an earlier pass over this sequence failed; code "broken_sequence".
        """
        if cache.broken:
            raise InputError(
                "a pass over this sequence failed half-way: begin again with new_cache()", code="broken_sequence"
            )
        if self._prefetcher is not None:
            self._prefetcher.begin_pass((guesses,), decoding)
        context = ForwardContext(self.clock, self._prefetcher, self.observer, before_layer)
        return self.model.forward(token_ids, cache, context)

    def evaluate(self, hidden: mx.array, cache: SequenceCache) -> None:
        """Finish a pass whose logits nobody wants."""
        self.clock.evaluate("experts", hidden, *cache.arrays())

    def logits(self, hidden: mx.array, cache: SequenceCache) -> Logits:
        """Compute the logits f32 [T, vocabulary] of ``hidden`` [T, hidden], which finishes a pass.

        Raises:
            FlashMoeError: no token can be chosen by them; see ``checked_logits``.
        """
        logits = self.model.logits(hidden)
        self.clock.evaluate("head", logits, *cache.arrays())
        return checked_logits(np.array(logits))
