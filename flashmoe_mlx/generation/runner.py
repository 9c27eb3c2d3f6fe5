"""Forward passes of one model, one at a time: the lock, the clock and the prefetcher that all sequences share."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import mlx.core as mx
import numpy as np

from flashmoe_mlx.errors import EngineBusyError, InputError
from flashmoe_mlx.generation.logits import Logits, checked_logits
from flashmoe_mlx.generation.metrics import measured_pass
from flashmoe_mlx.generation.request import PrefillProgress, Request
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.models.decoder import Model
from flashmoe_mlx.moe.context import ForwardContext, RoutingObserver
from flashmoe_mlx.moe.prefetch import Guesses, Prefetcher
from flashmoe_mlx.stores.contract import ExpertStore


class _CancelledError(Exception):
    pass


class Runner:
    """A model with its store, which runs passes of sequences.

    ``begin`` and ``exclusive`` may be called at any time, everything else inside ``exclusive``.
    """

    def __init__(self, model: Model, store: ExpertStore, clock: PhaseClock, prefetcher: Prefetcher | None) -> None:
        self.model = model
        self.store = store
        self.clock = clock
        self.observer: RoutingObserver | None = None
        """Told of every routing decision."""
        self._prefetcher = prefetcher
        self._lock = threading.Lock()

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context that keeps other callers out: a batch of experts is valid only until the next fetch.

        The context is the lock itself: unlike a context manager in Python, its entry cannot be interrupted between
        taking the lock and promising to release it.

        Raises:
            EngineBusyError: another call is inside. Of two calls at the same instant, the second may wait instead.
        """
        if self._lock.locked():
            raise EngineBusyError(
                "the engine is busy with another call: it runs one forward pass at a time. Let threads take turns, "
                "with your own lock around each step, or load an engine for each thread"
            )
        return self._lock

    def begin(
        self, request: Request, on_prefill: PrefillProgress | None = None, start: float | None = None
    ) -> Sequence:
        """Return a sequence for ``request``, without tokens; see ``Sequence`` for the other arguments."""
        return Sequence(
            request,
            self.model.new_cache(),
            self.model.config.max_context,
            prefetches=self._prefetcher is not None,
            on_prefill=on_prefill,
            start=start,
        )

    def prefill(self, sequence: Sequence) -> None:
        """Process the prompt of a waiting ``sequence``, in chunks, and choose its first token.

        Raises:
            FlashMoeError: an expert cannot be read, or no token can be chosen. The sequence cannot continue afterwards.
        """
        tokens, size = sequence.request.prompt_ids, sequence.request.prefill_chunk
        layers = self.model.config.num_layers
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]

            def before_layer(layer: int, start: int = start, length: int = len(chunk)) -> None:
                sequence.report(start + length * layer // layers)
                _refuse_cancelled([sequence])

            try:
                with measured_pass([(sequence.metrics.prefill, len(chunk))], self.store, self.clock):
                    hidden = self._hidden([chunk], [sequence.cache], [sequence.guesses], False, before_layer)
                    if start + size < len(tokens):
                        self.clock.evaluate("experts", hidden, *sequence.cache.arrays())
                        continue
                    (logits,) = self._logits(hidden[-1:], [sequence.cache])
                    with self.clock.phase("sample"):
                        sequence.take(logits)
            except _CancelledError:
                sequence.finish("cancelled")
                return
        sequence.report(len(tokens))

    def decode(self, sequences: list[Sequence]) -> None:
        """Process the latest token of each of ``sequences`` in one pass, and choose the next token of each.

        All sequences must be decoding. The tokens of a sequence do not depend on the other sequences. A cancelled
        sequence ends before the pass or, if all are cancelled, at the next layer.

        Raises:
            FlashMoeError: an expert cannot be read, or no token can be chosen. None of the sequences can continue
                afterwards.
        """
        for sequence in sequences:
            if sequence.cancelled:
                sequence.finish("cancelled")
        running = [sequence for sequence in sequences if sequence.finish_reason is None]
        if not running:
            return
        caches = [sequence.cache for sequence in running]
        try:
            with measured_pass([(sequence.metrics.decode, 1) for sequence in running], self.store, self.clock):
                hidden = self._hidden(
                    [sequence.token_ids[-1:] for sequence in running],
                    caches,
                    [sequence.guesses for sequence in running],
                    True,
                    lambda _: _refuse_cancelled(running),
                )
                logits = self._logits(hidden, caches)
                with self.clock.phase("sample"):
                    for sequence, row in zip(running, logits, strict=True):
                        sequence.take(row)
        except _CancelledError:
            for sequence in running:
                sequence.finish("cancelled")

    def logits(self, token_ids: list[int], cache: SequenceCache, guesses: Guesses, *, decoding: bool) -> Logits:
        """Compute the logits f32 [T, vocabulary] after each of ``token_ids``, which join the tokens in ``cache``.

        Args:
            token_ids: T tokens.
            cache: the state of the sequence.
            guesses: the prefetcher's guesses about the sequence.
            decoding: whether the pass counts as a decode step.

        Raises:
            InputError: an earlier pass over this sequence failed; code "broken_sequence".
            FlashMoeError: an expert cannot be read, or a logit is NaN or +inf (code "bad_logits").
        """
        return self._logits(self._hidden([token_ids], [cache], [guesses], decoding), [cache])

    def _hidden(
        self,
        token_ids: list[list[int]],
        caches: list[SequenceCache],
        guesses: list[Guesses],
        decoding: bool,
        before_layer: Callable[[int], None] | None = None,
    ) -> mx.array:
        """Compute the hidden states [T, hidden] of the new tokens of each sequence; the last operations stay lazy."""
        if any(cache.broken for cache in caches):
            raise InputError(
                "a pass over this sequence failed halfway: begin again with new_cache()", code="broken_sequence"
            )
        if self._prefetcher is not None:
            self._prefetcher.begin_pass(guesses, decoding)
        context = ForwardContext(self.clock, self._prefetcher, self.observer, before_layer)
        return self.model.forward(token_ids, caches, context)

    def _logits(self, hidden: mx.array, caches: list[SequenceCache]) -> Logits:
        """Compute the logits f32 [T, vocabulary] of ``hidden`` [T, hidden], which finishes a pass."""
        logits = self.model.logits(hidden)
        self.clock.evaluate("head", logits, *(array for cache in caches for array in cache.arrays()))
        return checked_logits(np.array(logits))


def _refuse_cancelled(sequences: list[Sequence]) -> None:
    if all(sequence.cancelled for sequence in sequences):
        raise _CancelledError
