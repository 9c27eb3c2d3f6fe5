"""The kernel of GatedDeltaNet in the C++ extension, for several sequences."""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.gated_delta_net import cpu
from flashmoe_mlx.custom_kernels.gated_delta_net_batch.reference import DeltaBatch
from flashmoe_mlx.custom_kernels.native.reduced import ACROSS_TILES
from flashmoe_mlx.custom_kernels.shapes import ModelShapes


def code_path(batch: DeltaBatch) -> CodePath | None:
    """Return the code path of ``gated_delta_net``; None if it does not support the inputs."""
    if not cpu.supports(batch.weights, batch.qkv.dtype):
        return None
    return ("one token of each" if max(batch.lengths) == 1 else "several tokens",)


def gated_delta_net(batch: DeltaBatch) -> tuple[mx.array, ...]:
    """Compute ``reference.gated_delta_net`` in f32; write to the states in place.

    A single new token of each sequence gives the same bits as alone.
    """
    projected = batch.qkv, batch.z, batch.b, batch.a
    y = cpu.recur(projected, batch.weights, batch.conv_states, batch.recurrent_states, batch.lengths)
    return y, *(array for states in zip(batch.conv_states, batch.recurrent_states, strict=True) for array in states)


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token of each of two sequences, and several tokens of one of them."""
    for lengths in ((1, 1), (ACROSS_TILES, 2)):
        for weights in model.delta[:1]:
            drawn = [cpu.drawn(weights, model.dtype, tokens) for tokens in lengths]
            first = drawn[0]
            if cpu.code_path(first) is None:
                continue
            expected = DeltaBatch(
                mx.concatenate([one.qkv for one in drawn]),
                mx.concatenate([one.z for one in drawn]),
                mx.concatenate([one.b for one in drawn]),
                mx.concatenate([one.a for one in drawn]),
                first.weights,
                [one.conv_state for one in drawn],
                [one.recurrent_state for one in drawn],
                list(lengths),
            )
            conv_states, recurrent_states = (
                [mx.array(np.array(state)) for state in states]
                for states in (expected.conv_states, expected.recurrent_states)
            )
            yield Sample((replace(expected, conv_states=conv_states, recurrent_states=recurrent_states),), (expected,))
