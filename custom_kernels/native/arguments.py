"""What a check at first use must know of the arguments of each kernel for CPUs: whether it takes them, which code path
they lead to, and which of them are enough to compare it with its reference.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.attention.reference import AttentionWeights
from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, Weight
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaWeights
from flashmoe_mlx.custom_kernels.native import LANES, joins, takes_matrix, takes_weight
from flashmoe_mlx.custom_kernels.routed_experts.format import ExpertFormat

_TOKENS = 9
"""Of a check: more than go through the kernels for a few."""
_ROWS = 512


class Norm:
    """Arguments of ``rms_norm``."""

    @staticmethod
    def takes(x: mx.array, weight: mx.array, eps: float) -> bool:  # noqa: ARG004
        return x.ndim == 2 and x.dtype == weight.dtype == mx.float32

    @staticmethod
    def kind(*_: Any) -> Hashable:
        return None

    @staticmethod
    def sample(x: mx.array, weight: mx.array, eps: float) -> tuple[Any, ...]:
        return x[:_TOKENS], weight, eps


class Products:
    """Arguments of ``quantised_products``."""

    @staticmethod
    def takes(x: mx.array, weights: Sequence[Weight], before: mx.array | None = None) -> bool:  # noqa: ARG004
        return x.dtype == mx.float32 and all(takes_weight(one) for one in weights)

    @staticmethod
    def kind(x: mx.array, weights: Sequence[Weight], before: mx.array | None = None) -> Hashable:
        forms = tuple((one.bits, one.group_size, None if one.scales is None else one.scales.dtype) for one in weights)
        return forms, before is None, len(x) > 1, len(x) >= _TOKENS

    @staticmethod
    def sample(x: mx.array, weights: Sequence[Weight], before: mx.array | None = None) -> tuple[Any, ...]:
        first = [
            replace(one, **{part: getattr(one, part)[:_ROWS] for part in ("weight", "scales", "biases")})
            for one in weights
        ]
        return x[:_TOKENS], first, None if before is None else before[:_TOKENS, :_ROWS]


class Experts:
    """Arguments of ``routed_experts``."""

    @staticmethod
    def takes(
        x: mx.array,
        records: Sequence[memoryview],  # noqa: ARG004
        rows: mx.array,  # noqa: ARG004
        shares: mx.array,  # noqa: ARG004
        form: ExpertFormat,
        shared: ExpertWeights | None = None,
        before: mx.array | None = None,  # noqa: ARG004
    ) -> bool:
        own = takes_matrix(form.bits, form.group_size, form.dtype)
        return x.dtype == mx.float32 and own and (shared is None or joins(shared))

    @staticmethod
    def kind(
        x: mx.array,
        records: Sequence[memoryview],  # noqa: ARG004
        rows: mx.array,  # noqa: ARG004
        shares: mx.array,  # noqa: ARG004
        form: ExpertFormat,
        shared: ExpertWeights | None = None,
        before: mx.array | None = None,  # noqa: ARG004
    ) -> Hashable:
        return form.bits, shared is None, len(x) > 1

    @staticmethod
    def sample(
        x: mx.array,
        records: Sequence[memoryview],
        rows: mx.array,
        shares: mx.array,
        form: ExpertFormat,
        shared: ExpertWeights | None = None,
        before: mx.array | None = None,
    ) -> tuple[Any, ...]:
        if len(x) > 1:  # one choice of each is enough: the reference dequantises an expert for every choice
            shares = mx.concatenate([shares[:, :1], shares[:, rows.shape[1] :]], axis=1)[:_TOKENS]
            x, rows, before = x[:_TOKENS], rows[:_TOKENS, :1], None if before is None else before[:_TOKENS]
        return x, records, rows, shares, form, shared, before

    @staticmethod
    def on_slab(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """``function``, made for a slab, with the arguments of ``native.routed_experts``; copies the records."""

        def adapted(
            x: mx.array,
            records: Sequence[memoryview],
            rows: mx.array,
            shares: mx.array,
            form: ExpertFormat,
            shared: ExpertWeights | None = None,
            before: mx.array | None = None,
        ) -> mx.array:
            slab = mx.array(np.stack([np.frombuffer(record, np.uint8) for record in records]))
            y = function(x, slab, rows, shares, form, shared)
            return y if before is None else before + y

        return adapted


class Delta:
    """Arguments of ``gated_delta_net``."""

    @staticmethod
    def takes(
        qkv: mx.array,
        z: mx.array,  # noqa: ARG004
        b: mx.array,  # noqa: ARG004
        a: mx.array,  # noqa: ARG004
        weights: DeltaWeights,
        past: mx.array,  # noqa: ARG004
        state: mx.array,  # noqa: ARG004
    ) -> bool:
        return qkv.dtype == mx.float32 and weights.key_dim % LANES == 0 and weights.value_dim % LANES == 0

    @staticmethod
    def kind(qkv: mx.array, *_: Any) -> Hashable:
        return len(qkv) > 1

    @staticmethod
    def sample(
        qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: DeltaWeights, past: mx.array, state: mx.array
    ) -> tuple[Any, ...]:
        tokens = (part[:_TOKENS] for part in (qkv, z, b, a))
        return (*tokens, weights, *(mx.array(np.array(part)) for part in (past, state)))


class Attention:
    """Arguments of ``gated_attention``."""

    @staticmethod
    def takes(q_and_gate: mx.array, k: mx.array, v: mx.array, weights: AttentionWeights, *_: Any) -> bool:  # noqa: ARG004
        # The extension works out powers of theta itself and takes no other frequencies.
        plain = weights.frequencies is None
        return q_and_gate.dtype == mx.float32 and weights.head_dim % LANES == 0 and plain

    @staticmethod
    def kind(q_and_gate: mx.array, *_: Any) -> Hashable:
        return len(q_and_gate) > 1

    @staticmethod
    def sample(q_and_gate: mx.array, k: mx.array, v: mx.array, *rest: Any) -> tuple[Any, ...]:
        return (q_and_gate[:_TOKENS], k[:_TOKENS], v[:_TOKENS], *rest)
