"""Embeddings of n-grams, whose rows a hash of the latest tokens selects, added to the residual streams.

Source: transformers ``Qwen4ExpTextNGramEmbedding`` and ``Qwen4ExpTextPLELayer``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.layers.hyper_connections import grouped_norm
from flashmoe_mlx.layers.linear import Linear
from flashmoe_mlx.layers.recurrent_state import RecurrentState
from flashmoe_mlx.stores.rows import RowStore

Ids = npt.NDArray[np.int64]
_WORD = 2**64 - 1
_LEAST_GATE = 1e-6
"""The least magnitude of a gate before its square root."""


@dataclass(frozen=True)
class NgramHash:
    """The rows of a table for the n-grams that end at a token, for n from 2 to ``most``.

    Attributes:
        most: the tokens of the longest n-gram.
        heads: rows for each n, each of another hash.
        vocab_size: tokens of the vocabulary.
        base: rows for each hash: the least prime from ``base`` on that no earlier hash has.
        index: the index of the table among the tables of the model.
        seed: determines the multipliers.
        separator: a token that no n-gram crosses.
    """

    most: int
    heads: int
    vocab_size: int
    base: int
    index: int
    seed: int
    separator: int

    @cached_property
    def multipliers(self) -> Ids:
        """The odd factors of the latest token, the token before it, and so on; products with tokens fit 63 bits."""
        bound = max(1, (2**63 - 1) // self.vocab_size // 2)
        first = self.seed + 10007 * self.index
        words = [_splitmix((first + 0x9E3779B97F4A7C15 * (place + 1)) & _WORD) for place in range(self.most)]
        return np.array([2 * (word % bound) + 1 for word in words], np.int64)

    @cached_property
    def sizes(self) -> Ids:
        """The rows for each hash, [(most - 1) * heads]."""
        count = (self.most - 1) * self.heads
        return np.array(_primes(self.base, (self.index + 1) * count)[self.index * count :], np.int64)

    @cached_property
    def offsets(self) -> Ids:
        """The first row for each hash."""
        return np.array(list(accumulate(self.sizes[:-1].tolist(), initial=0)), np.int64)

    def rows(self, earlier: Ids, tokens: Ids) -> Ids:
        """Return the rows for ``tokens`` [T], which follow the ``most - 1`` tokens ``earlier``: [T, hashes]."""
        history = np.concatenate([earlier, tokens])
        size = self.most - 1
        shifted = [tokens]
        crossed = np.zeros(len(tokens), np.bool_)
        for distance in range(1, self.most):
            there = history[size - distance : len(history) - distance]
            crossed = crossed | (there == self.separator)
            shifted.append(np.where(crossed, self.separator, there))
        found, mixed = [], shifted[0] * self.multipliers[0]
        sizes = self.sizes.reshape(size, self.heads)
        for distance in range(1, self.most):
            mixed = mixed ^ (shifted[distance] * self.multipliers[distance])
            found.append(mixed[:, None] % sizes[distance - 1])
        return np.concatenate(found, axis=1) + self.offsets

    def nothing(self) -> Ids:
        """Return the tokens before the first token of a sequence."""
        return np.full(self.most - 1, self.separator, np.int64)


@dataclass(frozen=True, slots=True)
class NgramLayer:
    """The weights of a layer that adds embeddings of n-grams to S residual streams of ``hidden`` elements.

    Its cache is a ``RecurrentState`` with the latest inputs of its convolution and the latest tokens.

    Attributes:
        hash: selects rows.
        table: the rows.
        streams: S.
        eps: the epsilon of the norms.
        key: maps embeddings to a key for each stream.
        value: maps embeddings to a value.
        key_norm: factors of the norm of keys, [S * hidden].
        query_norm: factors of the norm of streams, [S * hidden].
        input_norm: factors of the norm of the convolution's inputs, [S * hidden].
        convolution: [S * hidden, taps, 1]; ``hash.most`` tokens lie between two taps.
    """

    hash: NgramHash
    table: RowStore
    streams: int
    eps: float
    key: Linear
    value: Linear
    key_norm: mx.array
    query_norm: mx.array
    input_norm: mx.array
    convolution: mx.array

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """The matrices that multiply every token."""
        return self.key, self.value

    def __call__(self, x: mx.array, tokens: Ids, caches: Sequence[RecurrentState], lengths: Sequence[int]) -> mx.array:
        """Add embeddings to the residual streams ``x`` [T, S * hidden] of new tokens of several sequences.

        Args:
            x: the streams, one sequence after the other.
            tokens: the new tokens, [T].
            caches: the state of each sequence.
            lengths: the number of new tokens of each sequence.

        Raises:
            FlashMoeError: a row of the table cannot be read.
        """
        ends = list(accumulate(lengths))
        own = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        earlier = [self._earlier(cache) for cache in caches]
        rows = [self.hash.rows(before, tokens[part]) for before, part in zip(earlier, own, strict=True)]
        embeddings = self.table.fetch(np.concatenate(rows).reshape(-1), x.dtype).reshape(len(x), -1)
        values = self._values(x, embeddings)
        inputs = grouped_norm(values, self.input_norm, self.streams, self.eps)
        mixed = [
            self._convolve(cache, inputs[part], before, tokens[part])
            for cache, before, part in zip(caches, earlier, own, strict=True)
        ]
        return x + values + (mixed[0] if len(mixed) == 1 else mx.concatenate(mixed))

    def _earlier(self, cache: RecurrentState) -> Ids:
        return self.hash.nothing() if cache.recurrent_state is None else np.array(cache.recurrent_state, np.int64)

    def _values(self, x: mx.array, embeddings: mx.array) -> mx.array:
        """Return the value of each token, weighted for each stream, [T, S * hidden]."""
        keys = grouped_norm(self.key(embeddings), self.key_norm, self.streams, self.eps)
        queries = grouped_norm(x, self.query_norm, self.streams, self.eps)
        products = (keys * queries).astype(mx.float32).reshape(len(x), self.streams, -1)
        scores = products.sum(axis=-1, keepdims=True) / math.sqrt(products.shape[-1])
        gate = mx.sqrt(mx.maximum(mx.abs(scores), _LEAST_GATE)) * mx.sign(scores)
        return (mx.sigmoid(gate).astype(x.dtype) * self.value(embeddings)[:, None]).reshape(x.shape)

    def _convolve(self, cache: RecurrentState, inputs: mx.array, earlier: Ids, tokens: Ids) -> mx.array:
        """Convolve ``inputs`` [T, S * hidden] of one sequence, and move its state behind ``tokens``."""
        count, taps, step = len(inputs), self.convolution.shape[1], self.hash.most
        kept = (taps - 1) * step
        before = cache.conv_state
        if before is None:
            before = mx.zeros((kept, inputs.shape[1]), inputs.dtype)
        padded, history = mx.concatenate([before, inputs]), np.concatenate([earlier, tokens])
        weights = self.convolution[..., 0].astype(mx.float32)
        parts = [padded[tap * step : tap * step + count].astype(mx.float32) * weights[:, tap] for tap in range(taps)]
        y = sum(parts[1:], parts[0])

        def state_after(end: int) -> tuple[mx.array, mx.array]:
            latest = history[end : end + self.hash.most - 1].astype(np.int32)
            return mx.contiguous(padded[end : end + kept]), mx.array(latest)

        for end in [end for end in cache.keep_at if end <= count]:
            cache.kept.append(RecurrentState(*state_after(end)))
        cache.keep_at = [end - count for end in cache.keep_at if end > count]
        cache.conv_state, cache.recurrent_state = state_after(count)
        return (y * mx.sigmoid(y)).astype(inputs.dtype)


def _splitmix(word: int) -> int:
    """Return the output of the generator SplitMix64 for the state ``word``."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _primes(least: int, count: int) -> list[int]:
    """Return the first ``count`` primes from ``least`` on."""
    found: list[int] = []
    number = max(2, least)
    while len(found) < count:
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            found.append(number)
        number += 1
    return found
