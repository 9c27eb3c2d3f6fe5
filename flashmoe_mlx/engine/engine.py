"""Run a model: prefill in chunks, decode token by token, text in and out."""

import operator
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import check_kernels, choose
from flashmoe_mlx.engine.backends import open_store
from flashmoe_mlx.engine.opening import open_model
from flashmoe_mlx.engine.sampling import Sampler, SamplingOptions
from flashmoe_mlx.engine.telemetry import RunMetrics
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_store import ExpertStore
from flashmoe_mlx.model.build import build_model
from flashmoe_mlx.model.cache import SequenceCache
from flashmoe_mlx.model.code_paths import model_shapes
from flashmoe_mlx.model.decoder import Model
from flashmoe_mlx.model.experts import RoutingObserver
from flashmoe_mlx.model.phases import PhaseClock
from flashmoe_mlx.model.prefetch import Guesses, Prefetcher, make_prefetcher
from flashmoe_mlx.text.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]
Messages = Sequence[Mapping[str, Any]]
PREFILL_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain and the tokens behind it; the last piece says why generation ended.

    ``finish_reason``: "stop" (the model ended its answer) or "length" (``max_tokens`` or the context limit).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None


def load(
    model: str | Path,
    backend: str | Mapping[str, Any] = "pread",
    experts_k: int | None = None,
    *,
    kernels: str = "auto",
    prefetch: str = "none",
    profile: bool = False,
    **backend_options: Any,
) -> "Engine":
    """Open a pack or a published checkpoint, ready to run.

    Args:
        model: folder of the pack or checkpoint.
        backend: name of a file in ``configs/backend/``, or a mapping with ``_target_`` for a store from elsewhere.
        experts_k: routed experts a token uses; None for the model's own number.
        kernels: "auto", "mlx" or "reference"; see ``custom_kernels.choose``.
        prefetch: "none", "previous_token", "next_router" or "early_router": which experts are read ahead while
            decoding; see ``model.prefetch``.
        profile: evaluate every phase by itself, so that the split of the time is exact; slower.
        **backend_options: options of the backend, as in its YAML.

    Raises:
        InputError: the model, the backend or an option is wrong.
    """
    try:
        chosen = choose(kernels)
    except ValueError as error:
        raise InputError(str(error)) from None
    files = open_model(Path(model).expanduser())
    k = _checked_k(experts_k, files.config.experts_per_token, files.config.num_experts)
    tokenizer = Tokenizer.load(files.folder) if (files.folder / "tokenizer.json").exists() else None
    # MLX's CPU kernels add up in the type of the activations: bf16 would lose whole digits there.
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    mx.reset_peak_memory()
    store, settings = open_store(files, backend, backend_options)
    try:
        built = build_model(files.config, files.resident, store, k, chosen, dtype)
        prefetcher = make_prefetcher(prefetch, store, built.layers)
        report = check_kernels(chosen, model_shapes(built))
    except BaseException:
        store.close()
        raise
    layout = store.layout
    setup = {
        "experts_k": k,
        "experts": {"bits": layout.bits, "group_size": layout.group_size, "dtype": layout.dtype},
        "activations": str(dtype),
        "kernels": report.names,
        "replaced_kernels": report.replaced,
        "note": report.note,
        "prefetch": prefetch,
        "backend": settings,
    }
    return Engine(built, store, tokenizer, setup, profile, prefetcher)


def _checked_k(experts_k: int | None, own: int, available: int) -> int:
    if experts_k is None:
        return own
    if type(experts_k) is not int or not 1 <= experts_k <= available:
        raise InputError(
            f"experts_k={experts_k!r}: must be from 1 to {available}, the experts of this model (its own is {own})"
        )
    return experts_k


class Engine:
    """A loaded model; close it, or use it as a context manager. One thread at a time."""

    def __init__(
        self,
        model: Model,
        store: ExpertStore,
        tokenizer: Tokenizer | None,
        setup: Mapping[str, Any],
        profile: bool = False,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.setup = setup
        """What runs: experts a token, their format, kernels, prefetch, backend with its options; fit for JSON."""
        self.metrics = RunMetrics()
        """Measurements of the latest generation."""
        self._tokenizer = tokenizer
        self._clock = PhaseClock(profile)
        self._prefetcher = prefetcher

    def __repr__(self) -> str:
        config = self.model.config
        return f"<Engine: {config.num_layers} layers, {config.num_experts} experts, {self.setup['experts_k']} a token>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the store; may be called again."""
        self.store.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InputError: the model came without one.
        """
        if self._tokenizer is None:
            raise InputError(
                "this model has no tokenizer.json: only logits() and forward(), which take token ids, can run it"
            )
        return self._tokenizer

    def observe_routing(self, observer: RoutingObserver | None) -> None:
        """Tell ``observer`` of every routing decision from now on; None ends that."""
        layers = [replace(one, experts=replace(one.experts, observer=observer)) for one in self.model.layers]
        self.model = replace(self.model, layers=layers)

    def stats(self) -> dict[str, Any]:
        """Measurements of the latest generation, as in ``metrics.json``, and the store's counters since opening."""
        store = self.store.stats()
        return {
            **self.metrics.to_json(self.model.touched_bytes, self.store.layout.record_bytes),
            "store_total": {name: getattr(store, name) for name in store.__dataclass_fields__},
        }

    def new_cache(self) -> SequenceCache:
        """The state of a sequence that has not begun."""
        return SequenceCache.empty(self.model.config)

    def forward(self, token_ids: Sequence[SupportsIndex], cache: SequenceCache) -> Logits:
        """Logits f32 [T, vocabulary] of ``token_ids`` after the tokens in ``cache``, which they join.

        Raises:
            InputError: no token, one that is not in the vocabulary, or more than the context holds.
        """
        if cache.broken:
            raise InputError("a pass over this sequence failed half-way: begin again with new_cache()")
        tokens = self._checked_tokens(token_ids, cache.length)
        return self._evaluated(
            self.model.logits(self.model.forward(tokens, cache, self._clock, self._prefetcher)), cache
        )

    def logits(self, token_ids: Sequence[SupportsIndex], prefill_chunk: int | None = None) -> Logits:
        """Logits f32 [T, vocabulary] after each of ``token_ids``; memory grows by one vocabulary a token."""
        tokens = self._checked_tokens(token_ids, 0)
        cache = self.new_cache()
        return np.concatenate([self.forward(chunk, cache) for chunk in _chunks(tokens, prefill_chunk)])

    def generate(
        self,
        prompt: str | Messages,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        prefill_chunk: int | None = None,
        raw: bool = False,
        ignore_eos: bool = False,
    ) -> Iterator[Piece]:
        """Continue ``prompt`` and yield the text as it comes.

        A string becomes a user's message if the model has a chat template and ``raw`` is false; messages are dicts with
        "role" and "content". With ``ignore_eos`` an end of the answer does not end the generation, as benchmarks want
        it. Everything is checked before the first piece.

        Raises:
            InputError: an option is out of range, or the prompt does not fit.
        """
        start = time.perf_counter()
        if type(max_tokens) is not int or max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens!r}: must be a whole number, at least 1")
        sampler = Sampler(SamplingOptions(temperature, top_k, top_p, min_p), seed)
        token_ids = self._checked_tokens(self.encode(prompt, raw=raw), 0)
        _checked_chunk(prefill_chunk)
        ends = frozenset[int]() if ignore_eos else self.tokenizer.eos_token_ids
        return self._generate(token_ids, max_tokens, sampler, prefill_chunk, ends, start)

    def encode(self, prompt: str | Messages, *, raw: bool = False) -> list[int]:
        """The tokens of a prompt as ``generate`` would send them."""
        template = self.tokenizer.chat_template
        if not isinstance(prompt, str | Sequence):
            raise InputError(f"the prompt is of type {type(prompt).__name__}; give text or a list of messages")
        if isinstance(prompt, str):
            if raw or template is None:
                return self.tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        elif raw or template is None:
            raise InputError("messages need a chat template: give the prompt as one string")
        return self.tokenizer.encode(template.render(prompt))

    def _generate(
        self,
        token_ids: Sequence[int],
        max_tokens: int,
        sampler: Sampler,
        prefill_chunk: int | None,
        ends: Collection[int],
        start: float,
    ) -> Iterator[Piece]:
        self.metrics = metrics = RunMetrics()
        if self._prefetcher is not None:
            self._prefetcher.guesses = metrics.guesses = Guesses()
        cache = self.new_cache()
        token = self._prefill(token_ids, cache, prefill_chunk, sampler)
        metrics.time_to_first_token = time.perf_counter() - start
        detokenizer = self.tokenizer.detokenizer()
        limit = min(max_tokens, self.model.config.max_context - len(token_ids) + 1)
        waiting: list[int] = []
        for count in range(1, limit + 1):
            waiting.append(token)
            if token in ends:
                metrics.finish_reason = "stop"
                break
            text = detokenizer.add(token)
            if count == limit:
                metrics.finish_reason = "length"
                yield Piece(text + detokenizer.flush(), tuple(waiting), "length")
                return
            if text:
                yield Piece(text, tuple(waiting))
                waiting.clear()
            with metrics.decode.step(1, self.store, self._clock):
                token = self._next(self.model.forward([token], cache, self._clock, self._prefetcher), cache, sampler)
        yield Piece(detokenizer.flush(), tuple(waiting), "stop")

    def _prefill(
        self, token_ids: Sequence[int], cache: SequenceCache, prefill_chunk: int | None, sampler: Sampler
    ) -> int:
        """The token after ``token_ids``."""
        chunks = list(_chunks(token_ids, prefill_chunk))
        for chunk in chunks[:-1]:
            with self.metrics.prefill.step(len(chunk), self.store, self._clock):
                hidden = self.model.forward(chunk, cache, self._clock, self._prefetcher)
                self._clock.evaluate("experts", hidden, *cache.arrays())
        with self.metrics.prefill.step(len(chunks[-1]), self.store, self._clock):
            return self._next(self.model.forward(chunks[-1], cache, self._clock, self._prefetcher), cache, sampler)

    def _next(self, hidden: mx.array, cache: SequenceCache, sampler: Sampler) -> int:
        """Sample what follows the last of ``hidden`` [T, hidden]."""
        logits = self._evaluated(self.model.logits(hidden[-1:]), cache)[0]
        with self._clock.phase("sample"):
            return sampler(logits)

    def _evaluated(self, logits: mx.array, cache: SequenceCache) -> Logits:
        self._clock.evaluate("head", logits, *cache.arrays())
        return np.array(logits)

    def _checked_tokens(self, token_ids: Sequence[SupportsIndex], before: int) -> list[int]:
        config = self.model.config
        tokens = [operator.index(token) for token in token_ids]
        if not tokens:
            raise InputError("the prompt is empty: give at least one token")
        for token in tokens:
            if not 0 <= token < config.vocab_size:
                raise InputError(f"token {token} is not in the vocabulary of {config.vocab_size}")
        if before + len(tokens) > config.max_context:
            raise InputError(
                f"the prompt has {before + len(tokens)} tokens; this model's context holds {config.max_context}"
            )
        return tokens


def _checked_chunk(prefill_chunk: int | None) -> int:
    if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
        raise InputError(f"prefill_chunk={prefill_chunk!r}: must be a whole number, at least 1 token")
    return prefill_chunk or PREFILL_CHUNK


def _chunks(token_ids: Sequence[int], prefill_chunk: int | None) -> Iterator[Sequence[int]]:
    size = _checked_chunk(prefill_chunk)
    for start in range(0, len(token_ids), size):
        yield token_ids[start : start + size]
