"""Forward passes of one model, one at a time: the lock, the clock and the prefetcher that all sequences share."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import SupportsIndex

import mlx.core as mx
import numpy as np

from flashmoe_mlx.errors import EngineBusyError
from flashmoe_mlx.generation.ahead import StepsAhead
from flashmoe_mlx.generation.logits import Logits, checked_logits
from flashmoe_mlx.generation.orders import Orders
from flashmoe_mlx.generation.pass_meter import PassMeter
from flashmoe_mlx.generation.passes import (
    can_decode,
    can_prefill,
    checked_tokens,
    ending,
    ending_alone,
    kept_in_part,
    next_parts,
    refuse_broken,
    score_prompts,
    take_states,
)
from flashmoe_mlx.generation.prefill_chunk import choose_chunk
from flashmoe_mlx.generation.prompt_cache.cache import PromptCache
from flashmoe_mlx.generation.request import PrefillProgress, Request
from flashmoe_mlx.generation.sequence import Sequence, Status
from flashmoe_mlx.generation.together import StepsTogether, under_way_together
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.in_memory import UsedExperts
from flashmoe_mlx.moe.prefetch import Guesses, Prefetcher
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.stores.contract import ExpertStore


class Runner:
    """A model with its store, which runs passes of sequences.

    ``begin`` and ``exclusive`` may be called at any time, everything else inside ``exclusive``.
    """

    def __init__(
        self,
        model: RunnableModel,
        store: ExpertStore,
        clock: PhaseClock,
        prefetcher: Prefetcher | None,
        traces: bool = True,
        prompt_cache: PromptCache | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: the model.
            store: the store of its experts.
            clock: measures all passes.
            prefetcher: hints experts, or None.
            traces: whether MLX can trace the model's kernels, so that steps can be begun ahead; what replaces a kernel
                of routed experts cannot be traced.
            prompt_cache: keeps the sequences that end, for later prompts; None to compute every prompt.
            nodes: the nodes that share the experts; None for one machine.
        """
        self.model = model
        self.store = store
        self.clock = clock
        self._prefetcher = prefetcher
        self._traces = traces
        self.meter: PassMeter = PassMeter(store, clock)
        """Measures passes, and reports them to an observer and a watcher."""
        self.ahead: StepsAhead = StepsAhead(model, store, clock, self.meter, nodes)
        self._together = StepsTogether(self.ahead, store, clock, self.meter)
        self._lock = threading.Lock()
        self.prompt_cache = prompt_cache
        self.orders: Orders = Orders(nodes)
        """The orders of node 0, where several nodes share the experts."""
        self._in_pass = False
        self._ended: list[Sequence] = []
        """Sequences that ended in the present pass."""

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

    def close(self) -> None:
        """Close the store, and free its experts."""
        self.orders.close()
        self.ahead.close()
        self.store.close()
        if self.prompt_cache is not None and self.prompt_cache.disk is not None:
            self.prompt_cache.disk.close()

    def begin(
        self, request: Request, on_prefill: PrefillProgress | None = None, start: float | None = None
    ) -> Sequence:
        """Return a sequence for ``request``, without tokens; see ``Sequence`` for the other arguments.

        Raises:
            InputError: the prompt is refused; see ``checked_tokens``.
        """
        model, tokens, reserved = self.model, self.checked_tokens(request.prompt_ids), 0
        if self.prompt_cache is not None:
            tokens = self.prompt_cache.aligned(tokens, model.config.max_context)
            reserved = self.prompt_cache.room
        return Sequence(
            replace(request, prompt_ids=tokens),
            model.new_cache(),
            model.config.max_context,
            request.prefill_chunk or choose_chunk(model.prompt_memory, len(tokens), reserved),
            prefetches=self._prefetcher is not None,
            on_prefill=on_prefill,
            start=start,
            on_finish=self.finished,
        )

    def finished(self, sequence: Sequence) -> None:
        """Hand an ended sequence to the prompt cache, after the present pass."""
        self.orders.end(sequence)
        self._ended.append(sequence)
        if not self._in_pass:
            self._keep_ended()

    def _keep_ended(self) -> None:
        ended, self._ended = self._ended, []
        if self.prompt_cache is not None:
            for sequence in ended:
                self.prompt_cache.keep(sequence)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Keep sequences that end in the enclosed pass when it is over: their copies take time that is not its own."""
        self._in_pass = True
        try:
            yield
        finally:
            self._in_pass = False
            self._keep_ended()

    def checked_tokens(self, token_ids: Iterable[SupportsIndex], before: int = 0) -> list[int]:
        """Return ``token_ids``, which follow ``before`` other tokens, as plain integers; see ``passes``."""
        return checked_tokens(self.model.config, token_ids, before)

    def prefill(self, sequence: Sequence) -> None:
        """Process the prompt of a waiting ``sequence``, in chunks, and choose its first token.

        Raises the errors of ``prefill_part``.
        """
        self.prefill_part([sequence])
        while sequence.status is Status.WAITING:
            self.prefill_part([sequence])

    def prefill_part(self, sequences: list[Sequence], most_tokens: int | None = None) -> None:
        """Process the next part of the prompts of waiting ``sequences`` in one pass.

        A sequence whose prompt ends with its part chooses its first token. A sequence without a part, because those
        before it take all tokens of the pass, does not change. A cancelled sequence ends before the pass or, if all are
        cancelled, at the next layer.

        Args:
            sequences: at least one; the first ones are served first.
            most_tokens: the largest number of tokens of the pass, at least 1; None for a chunk of each prompt.

        Raises:
            InputError: a sequence is not waiting (code "not_waiting"), is given twice ("duplicate_sequence"), or an
                earlier pass over it failed ("broken_sequence"). No sequence has changed then.
            FlashMoeError: an expert cannot be read; none of the sequences with a part can continue afterwards. Or no
                token can be chosen for a sequence, as in ``decode``.
        """
        running = can_prefill(sequences)
        if not running:
            return
        lazy, resumes = self._used_experts() is not None, self.meter.observer is None
        with self.orders.passing("prefill", running, lazy=lazy, resumes=resumes, most_tokens=most_tokens):
            self.prefill_together(running, most_tokens, resumes=resumes)

    def prefill_together(self, running: list[Sequence], most_tokens: int | None, *, resumes: bool) -> None:
        """Run ``prefill_part`` on this node; ``resumes`` allows sequences to begin where the prompt cache ends."""
        if resumes:
            self._resume(running)
        parts = next_parts(running, most_tokens)
        if not parts:
            return
        running = list(parts)
        layers = self.model.config.num_layers
        failures: list[Exception] = []

        def reached(done: float) -> None:
            for sequence, tokens in parts.items():
                sequence.report(sequence.prefilled + int(len(tokens) * done / layers))
            self.orders.refuse_cancelled(running)

        with self._pass(), ending(running):
            with self.meter.measured({part: len(tokens) for part, tokens in parts.items()}, decoding=False):
                self._prefill_parts(parts, reached, failures)
            for sequence, tokens in parts.items():
                sequence.prefilled += len(tokens)
                if sequence.prefilled == len(sequence.request.prompt_ids):
                    sequence.report(sequence.prefilled)
        if failures:
            raise failures[0]

    def _resume(self, sequences: list[Sequence]) -> None:
        """Begin ``sequences`` where the prompt cache ends, unless that was done before."""
        if self.prompt_cache is None:
            return
        for sequence in sequences:
            if sequence.keep_at is None and sequence.request.prompt_logprobs is None:
                self.prompt_cache.resume(sequence)
                self.orders.agree_on_start(sequence, self.model.new_cache())

    def _prefill_parts(
        self, parts: Mapping[Sequence, list[int]], reached: Callable[[float], None], failures: list[Exception]
    ) -> None:
        """Process the next tokens of each sequence in one pass; errors of the choices join ``failures``."""
        used = self._used_experts()
        caches, lengths = [sequence.cache for sequence in parts], [len(tokens) for tokens in parts.values()]
        positions = {sequence: kept_in_part(sequence, len(tokens)) for sequence, tokens in parts.items()}
        for sequence, kept in positions.items():
            sequence.cache.keep_states([position - sequence.prefilled for position in kept])
        hidden = self._hidden(
            [token for tokens in parts.values() for token in tokens],
            lengths,
            caches,
            [sequence.guesses for sequence in parts],
            used,
            reached=reached,
        )
        ends = dict(zip(parts, accumulate(lengths), strict=True))
        complete = {
            sequence: end
            for sequence, end in ends.items()
            if sequence.prefilled + len(parts[sequence]) == len(sequence.request.prompt_ids)
        }
        if not complete or self.orders.follows:
            self._evaluate("experts", hidden, caches, used)
            take_states(positions)
            score_prompts(ends, hidden, self.model.logits)
            return
        rows = [hidden[end - 1 : end] for end in complete.values()]
        logits = self._unchecked_logits(rows[0] if len(rows) == 1 else mx.concatenate(rows), caches, used)
        take_states(positions)
        score_prompts(ends, hidden, self.model.logits)
        with self.clock.phase("sample"):
            for sequence, row in zip(complete, logits, strict=True):
                with ending_alone(sequence, failures):
                    sequence.take(checked_logits(row))

    def decode(self, sequences: list[Sequence]) -> None:
        """Process the latest token of each of ``sequences`` in one pass, and choose the next token of each.

        Finished sequences are left out. Other sequences change the logits of a sequence only by rounding, because
        products of more rows may sum in a different order: by 1e-6 of the largest logit in f32. A cancelled sequence
        ends before the pass or, if all are cancelled, at the next layer.

        Raises:
            InputError: a sequence is still waiting (code "not_decoding"), is given twice (code "duplicate_sequence"),
                or an earlier pass over it failed (code "broken_sequence"). No sequence has changed then.
            FlashMoeError: an expert cannot be read; none of the sequences can continue afterwards. Or no token can be
                chosen for a sequence, whose ``cache.broken`` is then true; the other sequences have their tokens and
                can continue. Errors of logits processors have the same effect. The first such error is raised.
        """
        running = can_decode(sequences)
        if not running:
            return
        ahead = len(running) == 1 and not under_way_together(running[0]) and self._can_run_ahead(running[0])
        steps = self.ahead.to_begin(running[0]) if ahead else None
        with self.orders.passing("decode", running, lazy=self._used_experts() is not None, steps=steps):
            self.decode_together(running, steps)

    def decode_together(self, running: list[Sequence], steps: int | None) -> None:
        """Run ``decode`` on this node; with ``steps``, begin as many steps of one sequence ahead."""
        failures: list[Exception] = []
        with self._pass(), ending(running):
            if steps is not None:
                self.ahead.decode(running[0], steps, lambda: self.orders.refuse_cancelled(running))
                return
            done = self._together.decode(running, self._can_run_ahead, failures)
            begun = [sequence for sequence in running if sequence.ahead and sequence not in done]
            for sequence in begun:
                with ending_alone(sequence, failures):
                    self.ahead.take(sequence)
            rest = [sequence for sequence in running if sequence not in done and sequence not in begun]
            if rest:
                self._decode_together(rest, failures)
        if failures:
            raise failures[0]

    def _can_run_ahead(self, sequence: Sequence) -> bool:
        """Return whether the next steps of ``sequence`` need nothing from the host."""
        free = sequence.can_choose_on_device and len(sequence.pending) <= 1
        return free and self._traces and self._used_experts() is not None and self.ahead.ready

    def _decode_together(self, sequences: list[Sequence], failures: list[Exception]) -> None:
        """Process the latest token of each of ``sequences`` in one pass, and choose by its logits.

        Forced tokens before the latest one are processed with it. Errors of the choices join ``failures``.
        """
        caches = [sequence.cache for sequence in sequences]
        pending = [sequence.pending for sequence in sequences]
        lengths = [len(tokens) for tokens in pending]
        with self.meter.measured(dict(zip(sequences, lengths, strict=True)), decoding=True):
            used = self._used_experts()
            hidden = self._hidden(
                [token for tokens in pending for token in tokens],
                lengths,
                caches,
                [sequence.guesses for sequence in sequences],
                used,
                decoding=max(lengths) == 1,
                reached=lambda _: self.orders.refuse_cancelled(sequences),
            )
            if self.orders.follows:
                self._evaluate("experts", hidden, caches, used)
                return
            if max(lengths) > 1:
                hidden = hidden[mx.array(list(accumulate(lengths))) - 1]
            logits = self._unchecked_logits(hidden, caches, used)
            with self.clock.phase("sample"):
                for sequence, row in zip(sequences, logits, strict=True):
                    with ending_alone(sequence, failures):
                        sequence.take(checked_logits(row))

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
        refuse_broken([cache])
        used = self._used_experts()
        with self.orders.computing_logits(token_ids, cache, lazy=used is not None, decoding=decoding):
            hidden = self._hidden(token_ids, [len(token_ids)], [cache], [guesses], used, decoding=decoding)
            return checked_logits(self._unchecked_logits(hidden, [cache], used))

    def _used_experts(self) -> UsedExperts | None:
        """Return what collects the experts of a pass, or None if each layer's choice is needed at once."""
        if self.orders.follows:
            return UsedExperts(self.store) if self.orders.lazy else None
        waits = self._prefetcher is not None or self.meter.observer is not None or self.clock.split
        return None if waits else UsedExperts(self.store)

    def _hidden(
        self,
        token_ids: list[int],
        lengths: list[int],
        caches: list[SequenceCache],
        guesses: list[Guesses],
        used: UsedExperts | None,
        *,
        decoding: bool = False,
        reached: Callable[[float], None] | None = None,
    ) -> mx.array:
        """Compute the hidden states [T, hidden] of new tokens lazily; for the arguments, see ``Model.forward``."""
        if self._prefetcher is not None:
            self._prefetcher.begin_pass(guesses, lengths, decoding)
        context = ForwardContext(self.clock, self._prefetcher, self.meter.chosen, reached, used)
        return self.model.forward(mx.array(token_ids, mx.uint32), lengths, caches, context)

    def _unchecked_logits(self, hidden: mx.array, caches: list[SequenceCache], used: UsedExperts | None) -> Logits:
        """Compute the logits f32 [T, vocabulary] of ``hidden`` [T, hidden], which finishes a pass."""
        logits = self.model.logits(hidden)
        self._evaluate("head", logits, caches, used)
        return np.array(logits)

    def _evaluate(self, phase: str, result: mx.array, caches: list[SequenceCache], used: UsedExperts | None) -> None:
        """Evaluate the ``result`` of a pass and its ``caches``, and count the experts that it used."""
        arrays = [result, *(array for cache in caches for array in cache.arrays())]
        if not used:
            self.clock.evaluate(phase, *arrays)
            return
        self.clock.evaluate(phase, used.listed, *arrays)
        used.count(np.array(used.listed), self.meter.chosen_in_memory)
