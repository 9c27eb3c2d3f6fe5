"""One answer in progress: prefill in chunks, decode token by token, split into thinking and answer."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.metrics import RunMetrics
from flashmoe_mlx.generation.runner import Runner
from flashmoe_mlx.generation.sampling import ChosenSampling, Sampler
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.moe.prefetch import Guesses
from flashmoe_mlx.text.reasoning import ReasoningSplitter
from flashmoe_mlx.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]
PrefillProgress = Callable[[int, int], object]
"""Called with the tokens of the prompt that are done, fractions of a chunk included, and with all of them."""
PREFILL_CHUNK = 1024
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain and the tokens behind it; the last piece says why generation ended.

    Attributes:
        text: the next part of the answer.
        token_ids: the tokens of ``text`` and ``reasoning``, tokens without text included.
        finish_reason: "stop" (the model ended its answer), "length" (``max_tokens`` or the context limit) or
            "cancelled" (``Generation.cancel``); None in all pieces but the last.
        reasoning: the next part of the model's thinking, which precedes its answer; always empty for a model that does
            not think, and for raw prompts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Request:
    """Everything that determines an answer; checked by ``Engine.generate``."""

    token_ids: Sequence[int]
    max_tokens: int
    sampling: ChosenSampling
    seed: int | None
    prefill_chunk: int
    eos_token_ids: frozenset[int]
    split_reasoning: bool


class _CancelledError(Exception):
    pass


class Generation(Iterator[Piece]):
    """An iterator over the pieces of an answer, with its own measurements; ``cancel`` ends it early.

    Several generations of one engine may be interleaved. A call of ``next`` while another thread is inside the engine
    raises ``EngineBusyError`` and changes nothing: the same call can be made again.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, request: Request, on_prefill: PrefillProgress | None, start: float
    ) -> None:
        self.request = request
        self.metrics = RunMetrics(sampling=request.sampling.to_json(), guesses=Guesses() if runner.prefetches else None)
        self._runner = runner
        self._start = start
        self._on_prefill = on_prefill
        self._cancelled = False
        self._cache = SequenceCache.empty(runner.model.config)
        self._guesses = self.metrics.guesses or Guesses()
        self._sampler = Sampler(request.sampling.options, request.seed, request.token_ids)
        self._detokenizer = tokenizer.detokenizer()
        self._splitter = ReasoningSplitter(tokenizer, request.token_ids) if request.split_reasoning else None
        self._waiting: list[int] = []
        self._pieces: Iterator[Piece] = self._run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        with self._runner.exclusive():
            return next(self._pieces)

    @property
    def thinking(self) -> bool:
        """Whether the tokens so far end inside the model's thinking."""
        return self._splitter is not None and self._splitter.open

    def cancel(self) -> None:
        """End the generation: at the next layer, if a forward pass is running. May be called from any thread.

        The next piece is then the last one, with ``finish_reason`` "cancelled".
        """
        self._cancelled = True

    def close(self) -> None:
        """Cancel the generation without a last piece."""
        self.cancel()
        self._pieces = iter(())

    def stats(self) -> dict[str, Any]:
        """Return the measurements so far, in the form of ``metrics.json``."""
        return self.metrics.to_json(self._runner.model.touched_bytes, self._runner.store.layout.record_bytes)

    def _run(self) -> Iterator[Piece]:
        try:
            yield from self._answer()
        except _CancelledError:
            yield self._last(_NO_TOKEN, "", "cancelled")

    def _answer(self) -> Iterator[Piece]:
        request = self.request
        token = self._prefill()
        self.metrics.time_to_first_token = time.perf_counter() - self._start
        limit = min(request.max_tokens, self._runner.model.config.max_context - len(request.token_ids) + 1)
        for count in range(1, limit + 1):
            self._check()
            self._waiting.append(token)
            if token in request.eos_token_ids:
                yield self._last(token, "", "stop")
                return
            text = self._detokenizer.add(token)
            if count == limit:
                yield self._last(token, text, "length")
                return
            reasoning, content = self._split(token, text)
            if reasoning or content:
                yield Piece(content, tuple(self._waiting), reasoning=reasoning)
                self._waiting.clear()
            token = self._decode(token)

    def _last(self, token: int, text: str, reason: FinishReason) -> Piece:
        """Make the last piece, of ``text``, which ``token`` made certain, and all that was held back."""
        self.metrics.finish_reason = reason
        reasoning, content = self._split(token, text + self._detokenizer.flush())
        if self._splitter is not None:
            rest = self._splitter.finish()
            reasoning, content = reasoning + rest[0], content + rest[1]
        return Piece(content, tuple(self._waiting), reason, reasoning)

    def _split(self, token: int, text: str) -> tuple[str, str]:
        return ("", text) if self._splitter is None else self._splitter.add(token, text)

    def _prefill(self) -> int:
        """Process the prompt; returns the token after it."""
        tokens, size = self.request.token_ids, self.request.prefill_chunk
        layers = self._runner.model.config.num_layers
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]

            def before_layer(layer: int, start: int = start, length: int = len(chunk)) -> None:
                self._report(start + length * layer // layers)
                self._check()

            with self.metrics.prefill.step(len(chunk), self._runner.store, self._runner.clock):
                hidden = self._runner.hidden(
                    chunk, self._cache, self._guesses, decoding=False, before_layer=before_layer
                )
                if start + size < len(tokens):
                    self._runner.evaluate(hidden, self._cache)
                    continue
                logits = self._runner.logits(hidden[-1:], self._cache)[0]
                with self._runner.clock.phase("sample"):
                    token = self._sampler(logits)
        self._report(len(tokens))
        return token

    def _decode(self, token: int) -> int:
        """Process ``token``; returns the token after it."""
        with self.metrics.decode.step(1, self._runner.store, self._runner.clock):
            hidden = self._runner.hidden(
                [token], self._cache, self._guesses, decoding=True, before_layer=lambda _: self._check()
            )
            logits = self._runner.logits(hidden, self._cache)[0]
            with self._runner.clock.phase("sample"):
                return self._sampler(logits)

    def _check(self) -> None:
        if self._cancelled:
            raise _CancelledError

    def _report(self, done: int) -> None:
        if self._on_prefill is not None:
            self._on_prefill(done, len(self.request.token_ids))


def checked_max_tokens(max_tokens: int) -> int:
    """Return ``max_tokens`` if it is a positive integer, or raise InputError."""
    if type(max_tokens) is not int or max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens!r}: must be a whole number, at least 1", code="invalid_max_tokens")
    return max_tokens


def checked_chunk(prefill_chunk: int | None) -> int:
    """Return the tokens of a chunk, for None the default, or raise InputError."""
    if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
        raise InputError(
            f"prefill_chunk={prefill_chunk!r}: must be a whole number, at least 1 token", code="invalid_prefill_chunk"
        )
    return prefill_chunk or PREFILL_CHUNK
