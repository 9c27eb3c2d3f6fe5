"""A sequence: one answer in progress, with its tokens, caches and measurements."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import mlx.core as mx

from flashmoe_mlx.generation.constraints import ConstrainedAnswer
from flashmoe_mlx.generation.logits import Exclusion, Logits
from flashmoe_mlx.generation.logprobs import TokenLogprobs, token_logprobs
from flashmoe_mlx.generation.metrics import RunMetrics
from flashmoe_mlx.generation.prompt_cache.positions import Kind
from flashmoe_mlx.generation.request import FinishReason, PrefillProgress, Request
from flashmoe_mlx.generation.sampling import Sampler, SamplingOptions
from flashmoe_mlx.layers.cache import CacheMark, Checkpoint, SequenceCache
from flashmoe_mlx.moe.prefetch import Guesses


class Status(Enum):
    """The states of a sequence."""

    WAITING = auto()
    """The prompt has not been processed."""
    DECODING = auto()
    """The sequence has at least one generated token, and the answer continues."""
    FINISHED = auto()
    """The answer has ended; ``finish_reason`` gives the reason."""


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step of a sequence under way on the device, which chooses a token.

    Attributes:
        report: the last result of the step.
        mark: the state of the sequence before the step.
        number: the random number that chooses the token, or None.
    """

    report: mx.array
    mark: CacheMark
    number: float | None


class Sequence:
    """One answer in progress; a ``Runner`` advances it.

    Attributes:
        request: the prompt and the options of its answer.
        cache: the state of every layer, after all tokens but the latest, and further by the steps of ``ahead``.
        ahead: steps that the runner has begun before it is asked for, in order; ``settle`` discards them.
        prefilled: the number of prompt tokens in ``cache``.
        prefill_chunk: the number of prompt tokens that go through a layer together.
        keep_at: the positions in the prompt at which passes keep states for the prompt cache; None before the cache
            was asked, which may set ``prefilled``.
        kept: the states that passes kept, by their positions.
        token_ids: the generated tokens.
        logprobs: their log probabilities, if the request asks for them.
        prompt_logprobs: those of the tokens of the prompt, from the second on, if the request asks for them.
        finish_reason: "stop" (a stop token or a stop string), "length" (``max_tokens`` or the context limit) or
            "cancelled"; None while the answer continues.
        metrics: the measurements of this sequence.
        guesses: the prefetcher's guesses about this sequence.
        cancelled: whether ``cancel`` was called.
    """

    def __init__(
        self,
        request: Request,
        cache: SequenceCache,
        max_context: int,
        prefill_chunk: int,
        *,
        prefetches: bool = False,
        on_prefill: PrefillProgress | None = None,
        start: float | None = None,
        on_finish: Callable[["Sequence"], object] = lambda _: None,
    ) -> None:
        """Begin a sequence without tokens.

        Args:
            request: the prompt and the options of its answer.
            cache: empty caches.
            max_context: the largest number of tokens that the model's context holds.
            prefill_chunk: the number of prompt tokens that go through a layer together.
            prefetches: whether ``metrics`` report guesses about experts.
            on_prefill: called with the progress through the prompt, at least once per layer.
            start: the time from which the delay of the first token is measured, a value of ``time.perf_counter``; None
                for now.
            on_finish: called once, when the sequence ends without an error.
        """
        self.request = request
        self.cache: SequenceCache = cache
        self.ahead: list[Step] = []
        self.prefilled: int = 0
        self.prefill_chunk = prefill_chunk
        self.keep_at: dict[int, Kind] | None = None
        self.kept: dict[int, Checkpoint] = {}
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.guesses: Guesses = Guesses()
        self.metrics: RunMetrics = RunMetrics(
            prefill_chunk,
            sampling=request.sampling.to_json(),
            guesses=self.guesses if prefetches else None,
            prompt_tokens=len(request.prompt_ids),
        )
        self.cancelled: bool = False
        self._on_prefill = on_prefill
        self._on_finish = on_finish
        self._start = time.perf_counter() if start is None else start
        self._limit = min(request.max_tokens, max_context - len(request.prompt_ids) + 1)
        processors = [*request.processors]
        if request.min_tokens:
            processors.append(Exclusion(request.stop_ids, request.min_tokens))
        self._sampler = Sampler(
            request.sampling.options, request.seed, request.prompt_ids, processors, request.logit_bias
        )
        self._constrained: ConstrainedAnswer | None = None
        if request.constraint is not None:
            self._constrained = request.constraint.begin(request.prompt_ids, request.stop_ids)
        self._skips_forced = request.logprobs is None and not request.processors
        """Whether nobody needs the logits of forced tokens."""

    @property
    def status(self) -> Status:
        """The state of the sequence."""
        if self.finish_reason is not None:
            return Status.FINISHED
        return Status.DECODING if self.token_ids else Status.WAITING

    def cancel(self) -> None:
        """End the sequence at the next layer, or before its next pass. May be called from any thread."""
        self.cancelled = True

    def finish(self, reason: FinishReason) -> None:
        """End the sequence."""
        self.settle()
        ended, self.finish_reason, self.metrics.finish_reason = self.finish_reason is not None, reason, reason
        if not ended:
            self._on_finish(self)

    def report(self, done: int) -> None:
        """Report that ``done`` tokens of the prompt are processed."""
        if self._on_prefill is not None:
            self._on_prefill(done, len(self.request.prompt_ids))

    def take(self, logits: Logits) -> None:
        """Choose the next token from ``logits`` [vocabulary]; this may finish the sequence.

        Raises:
            FlashMoeError: no token can be chosen; see ``checked_logits``.
        """
        constrained = self._constrained
        token = self._sampler(logits, None if constrained is None else constrained.allowed())
        if constrained is not None:
            chosen, token = token, constrained.fitting(token, self._limit - len(self.token_ids))
            if token != chosen:
                self._sampler.correct(chosen, token)
        if self.request.logprobs is not None:
            self.logprobs.append(token_logprobs(logits, token, self.request.logprobs))
        self.accept(token)

    @property
    def can_choose_on_device(self) -> bool:
        """Whether the next tokens can be chosen without their logits on the host."""
        free = self._constrained is None or not self._constrained.restricts
        return free and self.request.logprobs is None and self._sampler.can_choose_on_device

    @property
    def pending(self) -> list[int]:
        """The generated tokens that are not in ``cache``: the latest one, and forced ones before it."""
        return self.token_ids[max(0, self.cache.length - len(self.request.prompt_ids)) :]

    @property
    def tokens_left(self) -> int:
        """The largest number of further tokens."""
        return self._limit - len(self.token_ids)

    def choose_on_device(self, logits: mx.array) -> tuple[mx.array, float | None]:
        """Choose the next token lazily by ``logits`` f32 [vocabulary]; see ``Sampler.choose_on_device``."""
        return self._sampler.choose_on_device(logits)

    def take_number(self) -> tuple[SamplingOptions, float | None]:
        """Return what chooses the next token; see ``Sampler.take_number``."""
        return self._sampler.take_number()

    def begin_again(self, cache: SequenceCache) -> None:
        """Begin the prompt with an empty ``cache``, not where the prompt cache ends."""
        self.cache, self.prefilled = cache, 0
        self.metrics.reused_tokens, self.metrics.reused_from = 0, None

    def settle(self) -> None:
        """Discard all steps that were begun ahead; ``cache`` then holds all tokens but the latest.

        Waits for the device, which may be writing to the cache.
        """
        if self.ahead:
            steps, self.ahead = self.ahead, []
            mx.eval(steps[-1].report)
            self.cache.rewind(steps[0].mark)
            for step in reversed(steps):
                self._sampler.return_number(step.number)

    def accept(self, token: int) -> None:
        """Append the chosen ``token`` and the tokens that it forces, which may finish the sequence."""
        self._append(token)
        constrained = self._constrained
        if constrained is None:
            return
        forced: list[int] = []
        while self.finish_reason is None:
            constrained.add(token)
            if constrained.complete:
                self.finish("length" if constrained.shortened else "stop")
                return
            forced = forced or (constrained.forced() if self._skips_forced else [])
            if not forced:
                break
            token = forced.pop(0)
            self._sampler.count(token)
            self.metrics.forced_tokens += 1
            self._append(token)
        if constrained.restricts:
            self.settle()  # steps ahead chose from all tokens

    def _append(self, token: int) -> None:
        """Append ``token``, which may be the last one."""
        self.token_ids.append(token)
        if self.metrics.time_to_first_token is None:
            self.metrics.time_to_first_token = time.perf_counter() - self._start
        if token in self.request.stop_ids:
            self.finish("stop")
        elif len(self.token_ids) == self._limit:
            self.finish("length")
