"""The sizes and formats of a model that decide which code paths its kernels take."""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.attention.reference import AttentionWeights
from flashmoe_mlx.custom_kernels.expert_mlp.reference import ExpertWeights, Weight
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaWeights
from flashmoe_mlx.custom_kernels.routed_experts.format import ExpertFormat


@dataclass(frozen=True)
class Projection:
    """Quantised matrices that are multiplied by the same vectors in one call, with a residual added or not."""

    weights: tuple[Weight, ...]
    residual: bool = False


@dataclass(frozen=True)
class ModelShapes:
    """A model as kernels see it; of every weight only shape, format and type count, never its values.

    Attributes:
        dtype: of activations.
        hidden_size: width of a token's vector.
        attention: one layer of each distinct shape.
        delta: the same of GatedDeltaNet layers.
        projections: all calls with resident quantised matrices.
        experts: how routed experts lie in their records; None if they are dense.
        shared: the shared expert of each distinct form.
        experts_k: routed experts a token.
        num_experts: routed experts a layer.
        slots: records that a store holds at once.
    """

    dtype: mx.Dtype
    hidden_size: int
    attention: tuple[AttentionWeights, ...]
    delta: tuple[DeltaWeights, ...]
    projections: tuple[Projection, ...]
    experts: ExpertFormat | None
    shared: tuple[ExpertWeights, ...]
    experts_k: int
    num_experts: int
    slots: int

    def in_several_groups(self, most_tokens: int | None) -> bool:
        """Whether ``most_tokens`` tokens (None: any number) may choose more experts than there are slots.

        Their experts are then applied in groups.
        """
        wanted = self.num_experts if most_tokens is None else most_tokens * self.experts_k
        return self.slots < min(self.num_experts, wanted)
