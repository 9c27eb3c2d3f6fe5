"""Hyper-connections: several residual streams, which each block reads mixed and extends with separate weights.

Source: transformers ``Qwen4ExpTextGatedResidual``.
"""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class HyperConnection:
    """The connection of a block to S residual streams of ``hidden`` elements.

    Attributes:
        streams: S.
        norm: factors of the RMS norm of each stream, [S * hidden].
        eps: the epsilon of the norm.
        down: maps normalized streams to a low rank.
        up: maps the low rank to logits of the weight of every element.
        inject: logits of the weight with which each stream takes the output of the block; None behind the last layer.
    """

    streams: int
    norm: mx.array
    eps: float
    down: Linear
    up: Linear
    inject: Linear | None = None

    def read(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Mix the streams.

        Args:
            x: the residual streams, [T, S * hidden].

        Returns:
            The input of the block, [T, hidden], and the normalized streams, [T, S * hidden].
        """
        normed = grouped_norm(x, self.norm, self.streams, self.eps)
        low = self.down(normed) / self.streams
        weights = mx.sigmoid(self.up(low * mx.sigmoid(low)))
        return (weights * normed).reshape(len(x), self.streams, -1).mean(axis=1), normed

    def write(self, x: mx.array, y: mx.array, normed: mx.array) -> mx.array:
        """Add the output of the block, ``y`` [T, hidden], to the streams ``x``; ``normed`` is a result of ``read``."""
        assert self.inject is not None
        weights = 2 * mx.sigmoid(self.inject(normed) / self.streams)
        return x + (y[:, None] * weights[:, :, None]).reshape(x.shape)

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """The matrices that multiply every token."""
        return (self.down, self.up) if self.inject is None else (self.down, self.up, self.inject)


def grouped_norm(x: mx.array, weight: mx.array, groups: int, eps: float) -> mx.array:
    """Normalize each of ``groups`` equal parts of the rows of ``x`` [T, width]; multiply by ``weight`` [width]."""
    parts = x.reshape(len(x), groups, -1)
    return mx.fast.rms_norm(parts, None, eps).reshape(x.shape) * weight
