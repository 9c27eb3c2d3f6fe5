"""Passes over several sequences: their parts, their failures, and what they refuse."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import SupportsIndex

import mlx.core as mx

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.logprobs import add_prompt_logprobs
from flashmoe_mlx.generation.sequence import Sequence, Status
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.models.config import ModelSize
from flashmoe_mlx.nodes.errors import StoppedError


class CancelledError(Exception):
    """The end of a pass all of whose sequences were cancelled."""


@contextmanager
def ending(sequences: list[Sequence]) -> Iterator[None]:
    """Finish ``sequences`` if an enclosed pass is cancelled, and mark them as broken after an error."""
    try:
        yield
    except (CancelledError, StoppedError):
        for sequence in sequences:
            sequence.finish("cancelled")
    except BaseException:
        # Interrupts after the last layer count, too: some sequences may have chosen a token, the rest none.
        for sequence in sequences:
            sequence.ahead = []
            sequence.cache.broken = True
        raise


@contextmanager
def ending_alone(sequence: Sequence, failures: list[Exception]) -> Iterator[None]:
    """Mark ``sequence`` as broken if the choice of its token fails, and add the error to ``failures``."""
    try:
        yield
    except Exception as error:
        sequence.ahead = []
        sequence.cache.broken = True
        failures.append(error)


def not_cancelled(sequences: list[Sequence]) -> list[Sequence]:
    """Finish the cancelled ones of ``sequences``; return the unfinished sequences."""
    for sequence in sequences:
        if sequence.cancelled and sequence.finish_reason is None:
            sequence.finish("cancelled")
    return [sequence for sequence in sequences if sequence.finish_reason is None]


def can_prefill(sequences: list[Sequence]) -> list[Sequence]:
    """Return the unfinished ones of waiting ``sequences``; raise InputError as ``Runner.prefill_part`` does."""
    if any(sequence.status is not Status.WAITING for sequence in sequences):
        raise InputError("the prompt of this sequence was processed before", code="not_waiting")
    running = not_cancelled(sequences)
    refuse_broken([sequence.cache for sequence in running])
    refuse_duplicates(running)
    return running


def can_decode(sequences: list[Sequence]) -> list[Sequence]:
    """Return the unfinished ones of ``sequences``; raise InputError as ``Runner.decode`` does."""
    running = not_cancelled(sequences)
    refuse_broken([sequence.cache for sequence in running])
    if any(sequence.status is Status.WAITING for sequence in running):
        raise InputError("a sequence has no token yet: call prefill first", code="not_decoding")
    refuse_duplicates(running)
    return running


def checked_tokens(config: ModelSize, token_ids: Iterable[SupportsIndex], before: int) -> list[int]:
    """Return ``token_ids``, which follow ``before`` other tokens, as plain integers.

    Raises:
        InputError: there are none (code "empty_prompt"), one is not in the vocabulary (code "unknown_token"), or they
            exceed the context (code "prompt_too_long").
    """
    tokens = [operator.index(token) for token in token_ids]
    if not tokens:
        raise InputError("the prompt is empty: give at least one token", code="empty_prompt")
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise InputError(f"token {token} is not in the vocabulary of {config.vocab_size}", code="unknown_token")
    if before + len(tokens) > config.max_context:
        raise InputError(
            f"the prompt has {before + len(tokens)} tokens; this model's context holds {config.max_context}",
            code="prompt_too_long",
        )
    return tokens


def next_parts(sequences: list[Sequence], most_tokens: int | None) -> dict[Sequence, list[int]]:
    """Return the next tokens of the prompts, ``most_tokens`` in all; sequences without a part are left out."""
    parts: dict[Sequence, list[int]] = {}
    room = sum(len(sequence.request.prompt_ids) for sequence in sequences) if most_tokens is None else most_tokens
    for sequence in sequences:
        start = sequence.prefilled
        tokens = sequence.request.prompt_ids[start : start + min(room, sequence.prefill_chunk)]
        if tokens:
            parts[sequence] = tokens
            room -= len(tokens)
    return parts


def kept_in_part(sequence: Sequence, tokens: int) -> list[int]:
    """Return the positions in the next ``tokens`` tokens of a prompt after which states are kept."""
    start = sequence.prefilled
    return [position for position in sequence.keep_at or () if start < position <= start + tokens]


def take_states(positions: Mapping[Sequence, list[int]]) -> None:
    """Move the states that a pass kept to their sequences."""
    for sequence, kept in positions.items():
        sequence.kept |= dict(zip(kept, sequence.cache.take_states(len(kept)), strict=True))


def score_prompts(ends: Mapping[Sequence, int], hidden: mx.array, logits_of: Callable[[mx.array], mx.array]) -> None:
    """Compute the log probabilities of prompts after a pass, for the requests that ask for them.

    Args:
        ends: the ends of the sequences' rows of ``hidden``.
        hidden: the hidden states [T, hidden] of the pass.
        logits_of: computes logits.
    """
    for sequence, end in ends.items():
        count = sequence.request.prompt_logprobs
        if count is not None:
            first, last = sequence.prefilled, sequence.cache.length
            following = sequence.request.prompt_ids[first + 1 : last + 1]
            add_prompt_logprobs(sequence.prompt_logprobs, following, count, hidden[end - (last - first) :], logits_of)


def refuse_duplicates(sequences: list[Sequence]) -> None:
    if len({id(sequence.cache) for sequence in sequences}) < len(sequences):
        raise InputError("a sequence is in the list twice", code="duplicate_sequence")


def refuse_broken(caches: list[SequenceCache]) -> None:
    if any(cache.broken for cache in caches):
        raise InputError(
            "a pass over this sequence failed halfway: begin again with new_cache()", code="broken_sequence"
        )


def refuse_cancelled(sequences: list[Sequence]) -> None:
    if all(sequence.cancelled for sequence in sequences):
        raise CancelledError
