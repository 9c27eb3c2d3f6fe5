"""A sequence: one answer in progress, with its tokens, caches and measurements."""

import time
from enum import Enum, auto

from flashmoe_mlx.generation.logits import Logits
from flashmoe_mlx.generation.logprobs import TokenLogprobs, token_logprobs
from flashmoe_mlx.generation.metrics import RunMetrics
from flashmoe_mlx.generation.request import FinishReason, PrefillProgress, Request
from flashmoe_mlx.generation.sampling import Sampler
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.moe.prefetch import Guesses


class Status(Enum):
    """The states of a sequence."""

    WAITING = auto()
    """The prompt has not been processed."""
    DECODING = auto()
    """The sequence has at least one generated token, and the answer continues."""
    FINISHED = auto()
    """The answer has ended; ``finish_reason`` gives the reason."""


class Sequence:
    """One answer in progress; a ``Runner`` advances it.

    Attributes:
        request: the prompt and the options of its answer.
        cache: the state of every layer.
        token_ids: the generated tokens.
        logprobs: their log probabilities, if the request asks for them.
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
        *,
        prefetches: bool = False,
        on_prefill: PrefillProgress | None = None,
        start: float | None = None,
    ) -> None:
        """Begin a sequence without tokens.

        Args:
            request: the prompt and the options of its answer.
            cache: empty caches.
            max_context: the largest number of tokens that the model's context holds.
            prefetches: whether ``metrics`` report guesses about experts.
            on_prefill: called with the progress through the prompt, at least once per layer.
            start: the time from which the delay of the first token is measured, a value of ``time.perf_counter``; None
                for now.
        """
        self.request = request
        self.cache = cache
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.guesses = Guesses()
        self.metrics = RunMetrics(sampling=request.sampling.to_json(), guesses=self.guesses if prefetches else None)
        self.cancelled = False
        self._on_prefill = on_prefill
        self._start = time.perf_counter() if start is None else start
        self._limit = min(request.max_tokens, max_context - len(request.prompt_ids) + 1)
        self._sampler = Sampler(request.sampling.options, request.seed, request.prompt_ids, request.processors)

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
        self.finish_reason = self.metrics.finish_reason = reason

    def report(self, done: int) -> None:
        """Report that ``done`` tokens of the prompt are processed."""
        if self._on_prefill is not None:
            self._on_prefill(done, len(self.request.prompt_ids))

    def take(self, logits: Logits) -> None:
        """Choose the next token from ``logits`` [vocabulary]; this may finish the sequence.

        Raises:
            FlashMoeError: no token can be chosen; see ``checked_logits``.
        """
        token = self._sampler(logits)
        if self.request.logprobs is not None:
            self.logprobs.append(token_logprobs(logits, token, self.request.logprobs))
        self.token_ids.append(token)
        if self.metrics.time_to_first_token is None:
            self.metrics.time_to_first_token = time.perf_counter() - self._start
        if token in self.request.stop_ids:
            self.finish("stop")
        elif len(self.token_ids) == self._limit:
            self.finish("length")
