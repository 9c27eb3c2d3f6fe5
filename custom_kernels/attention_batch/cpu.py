"""The kernel of attention in the C++ extension, for several sequences."""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from flashmoe_mlx.custom_kernels.attention import cpu
from flashmoe_mlx.custom_kernels.attention.samples import without_codes
from flashmoe_mlx.custom_kernels.attention_batch.reference import AttentionBatch
from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.native.reduced import ACROSS_TILES
from flashmoe_mlx.custom_kernels.shapes import ModelShapes


def code_path(batch: AttentionBatch) -> CodePath | None:
    """Return the code path of ``gated_attention``; None if it does not support the inputs."""
    if not cpu.supports(batch.weights, batch.q_and_gate.dtype):
        return None
    tokens = "one token of each" if max(batch.lengths) == 1 else "several tokens"
    return tokens, batch.weights.rows.phrase, batch.weights.gate_phrase


def gated_attention(batch: AttentionBatch) -> tuple[mx.array, ...]:
    """Compute ``reference.gated_attention`` in f32; write to the caches in place.

    A single new token of each sequence gives the same bits as alone.
    """
    y = cpu.attend(
        (batch.q_and_gate, batch.k, batch.v), batch.weights, batch.keys, batch.values, batch.starts, batch.lengths
    )
    return y, *(array for caches in zip(batch.keys, batch.values, strict=True) for array in caches)


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token of each of two sequences with several spans of keys, and several tokens of one of them."""
    for lengths in ((1, 1), (ACROSS_TILES, 2)):
        for weights in model.attention[:1]:
            drawn = [
                cpu.drawn(weights, model.dtype, tokens, start) for tokens, start in zip(lengths, (300, 5), strict=True)
            ]
            first = drawn[0]
            if cpu.code_path(first) is None:
                continue
            expected = AttentionBatch(
                mx.concatenate([one.q_and_gate for one in drawn]),
                mx.concatenate([one.k for one in drawn]),
                mx.concatenate([one.v for one in drawn]),
                first.weights,
                [one.keys for one in drawn],
                [one.values for one in drawn],
                [one.start for one in drawn],
                list(lengths),
            )
            keys, values = ([cpu.copied(cache) for cache in caches] for caches in (expected.keys, expected.values))
            shown = without_codes(first.weights)
            yield Sample((replace(expected, keys=keys, values=values),), (expected,), of_both=shown)
