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
from flashmoe_mlx.generation.sequence import Sequence, Step
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.models.decoder import Model
from flashmoe_mlx.models.steps import TracedSteps
from flashmoe_mlx.moe.context import ForwardContext, RoutingObserver
from flashmoe_mlx.moe.in_memory import UsedExperts
from flashmoe_mlx.moe.prefetch import Guesses, Prefetcher
from flashmoe_mlx.stores.contract import ExpertStore


class _CancelledError(Exception):
    pass


class Runner:
    """A model with its store, which runs passes of sequences.

    ``begin`` and ``exclusive`` may be called at any time, everything else inside ``exclusive``.
    """

    def __init__(
        self,
        model: Model,
        store: ExpertStore,
        clock: PhaseClock,
        prefetcher: Prefetcher | None,
        traces: bool = True,
    ) -> None:
        """Wrap a model.

        Args:
            model: the model.
            store: the store of its experts.
            clock: measures all passes.
            prefetcher: hints experts, or None.
            traces: whether MLX can trace the model's kernels, so that steps can be begun before they are needed; it
                cannot trace what replaces a kernel of routed experts.
        """
        self.model = model
        self.store = store
        self.clock = clock
        self.observer: RoutingObserver | None = None
        """Told of every routing decision."""
        self._prefetcher = prefetcher
        self._traces = traces
        self._steps: TracedSteps | None = None
        """Known once the store holds all layers in memory."""
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
                "with a lock of yours around each step, or load an engine for each thread"
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
            FlashMoeError: an expert cannot be read, or no token can be chosen. The sequence cannot go on then.
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
                    used = self._used_experts()
                    new = _tokens(chunk)
                    hidden = self._hidden(new, [len(chunk)], [sequence.cache], [sequence.guesses], used, before_layer)
                    if start + size < len(tokens):
                        self._evaluate("experts", hidden, [sequence.cache], used)
                        continue
                    (logits,) = self._logits(hidden[-1:], [sequence.cache], used)
                    with self.clock.phase("sample"):
                        sequence.take(logits)
            except _CancelledError:
                sequence.finish("cancelled")
                return
        sequence.report(len(tokens))

    def decode(self, sequences: list[Sequence]) -> None:
        """Process the latest token of each of ``sequences`` in one pass, and choose the next token of each.

        All of them must be decoding. The tokens of a sequence do not depend on its company. A cancelled sequence ends
        before the pass or, if all are cancelled, at the next layer.

        Raises:
            FlashMoeError: an expert cannot be read, or no token can be chosen. None of the sequences can go on then.
        """
        for sequence in sequences:
            if sequence.cancelled:
                sequence.finish("cancelled")
        running = [sequence for sequence in sequences if sequence.finish_reason is None]
        try:
            if len(running) == 1 and self._can_run_ahead(running[0]):
                self._decode_ahead(running[0])
                return
            ahead = [sequence for sequence in running if sequence.ahead is not None]
            for sequence in ahead:
                self._take_ahead(sequence)
            behind = [sequence for sequence in running if sequence not in ahead]
            if behind:
                self._decode_now(behind)
        except _CancelledError:
            for sequence in running:
                sequence.finish("cancelled")

    def _decode_now(self, sequences: list[Sequence]) -> None:
        """Compute one decode step of ``sequences`` and wait for its logits."""
        caches = [sequence.cache for sequence in sequences]
        with measured_pass([(sequence.metrics.decode, 1) for sequence in sequences], self.store, self.clock):
            used = self._used_experts()
            hidden = self._hidden(
                _tokens([sequence.token_ids[-1] for sequence in sequences]),
                [1] * len(sequences),
                caches,
                [sequence.guesses for sequence in sequences],
                used,
                lambda _: _refuse_cancelled(sequences),
                decoding=True,
            )
            logits = self._logits(hidden, caches, used)
            with self.clock.phase("sample"):
                for sequence, row in zip(sequences, logits, strict=True):
                    sequence.take(row)

    def _can_run_ahead(self, sequence: Sequence) -> bool:
        """Whether the next steps of ``sequence`` need nothing from the host."""
        if not self._traces or self._used_experts() is None or not sequence.can_choose_on_device:
            return False
        if self._steps is None:  # a store keeps the layers that it has offered
            self._steps = TracedSteps.of(self.model)
        return self._steps is not None

    def _decode_ahead(self, sequence: Sequence) -> None:
        """Finish the step under way, or begin one; the step after it is begun first, so that the device never waits."""
        with measured_pass([(sequence.metrics.decode, 1)], self.store, self.clock):
            step = sequence.ahead or self._begin(sequence, _tokens(sequence.token_ids[-1:]))
            sequence.ahead = step
            following = None
            if not sequence.one_token_left:
                if sequence.cache.must_grow(1):
                    self.clock.evaluate("head", step.report)  # the copy must not be made while the step writes
                following = self._begin(sequence, step.token)
            sequence.ahead = following
            self._take(sequence, step)

    def _take_ahead(self, sequence: Sequence) -> None:
        """Finish the step that was begun ahead, without beginning another."""
        assert sequence.ahead is not None
        with measured_pass([(sequence.metrics.decode, 1)], self.store, self.clock):
            step, sequence.ahead = sequence.ahead, None
            self._take(sequence, step)

    def _begin(self, sequence: Sequence, tokens: mx.array) -> Step:
        """Begin a decode step with ``tokens`` uint32 [1], the latest token of ``sequence``; nothing waits for it.

        If this fails, ``sequence`` is as it was.
        """
        mark = sequence.cache.mark()
        used = UsedExperts(self.store)
        context = ForwardContext(self.clock, before_layer=lambda _: _refuse_cancelled([sequence]), used=used)
        assert self._steps is not None
        try:
            with self.clock.computing("head"):
                hidden = self._steps.hidden(tokens, sequence.cache, context)
                logits = self.model.logits(hidden)[0]
                token, number = sequence.choose_on_device(logits)
                finite = mx.isfinite(logits).all(keepdims=True)
                report = mx.concatenate([token.astype(mx.int32), finite.astype(mx.int32), used.indices()])
                mx.async_eval(report, token, *sequence.cache.arrays())  # type: ignore[no-untyped-call]
        except BaseException:
            sequence.cache.rewind(mark)
            raise
        return Step(token, logits, report, used, mark, number)

    def _take(self, sequence: Sequence, step: Step) -> None:
        """Wait for ``step`` and append its token to ``sequence``."""
        with self.clock.computing("head"):
            token, finite, *_ = report = np.array(step.report)
        step.used.count(report[2:])
        with self.clock.phase("sample"):
            if not finite:
                checked_logits(np.array(step.logits))  # -inf is not finite either, and excludes a token
            sequence.accept(int(token))

    def logits(self, token_ids: list[int], cache: SequenceCache, guesses: Guesses, *, decoding: bool) -> Logits:
        """Compute the logits f32 [T, vocabulary] after each of ``token_ids``, which join the tokens in ``cache``.

        Args:
            token_ids: T tokens.
            cache: the state of the sequence.
            guesses: the prefetcher's guesses about the sequence.
            decoding: whether the pass counts as a decode step.

        Raises:
            InputError: an earlier pass over this sequence failed; code "broken_sequence".
            FlashMoeError: an expert cannot be read, or the logits are no numbers (code "bad_logits").
        """
        used = self._used_experts()
        hidden = self._hidden(_tokens(token_ids), [len(token_ids)], [cache], [guesses], used, decoding=decoding)
        return self._logits(hidden, [cache], used)

    def _used_experts(self) -> UsedExperts | None:
        """Return what collects the experts of a pass, or None if each layer's choice is needed at once."""
        if self._prefetcher is not None or self.observer is not None or self.clock.split:
            return None
        return UsedExperts(self.store)

    def _hidden(
        self,
        tokens: mx.array,
        lengths: list[int],
        caches: list[SequenceCache],
        guesses: list[Guesses],
        used: UsedExperts | None,
        before_layer: Callable[[int], None] | None = None,
        *,
        decoding: bool = False,
    ) -> mx.array:
        """Compute the hidden states [T, hidden] of new tokens lazily; for the arguments, see ``Model.forward``."""
        if any(cache.broken for cache in caches):
            raise InputError(
                "a pass over this sequence failed half-way: begin again with new_cache()", code="broken_sequence"
            )
        if self._prefetcher is not None:
            self._prefetcher.begin_pass(guesses, decoding)
        context = ForwardContext(self.clock, self._prefetcher, self.observer, before_layer, used)
        return self.model.forward(tokens, lengths, caches, context)

    def _logits(self, hidden: mx.array, caches: list[SequenceCache], used: UsedExperts | None) -> Logits:
        """Compute the logits f32 [T, vocabulary] of ``hidden`` [T, hidden], which finishes a pass."""
        logits = self.model.logits(hidden)
        self._evaluate("head", logits, caches, used)
        return checked_logits(np.array(logits))

    def _evaluate(self, phase: str, result: mx.array, caches: list[SequenceCache], used: UsedExperts | None) -> None:
        """Evaluate the ``result`` of a pass and its ``caches``, and count the experts that it used."""
        indices = used.indices() if used else mx.zeros(0)
        self.clock.evaluate(phase, result, indices, *(array for cache in caches for array in cache.arrays()))
        if used:
            used.count(np.array(indices))


def _tokens(token_ids: list[int]) -> mx.array:
    return mx.array(token_ids, mx.uint32)


def _refuse_cancelled(sequences: list[Sequence]) -> None:
    if all(sequence.cancelled for sequence in sequences):
        raise _CancelledError
