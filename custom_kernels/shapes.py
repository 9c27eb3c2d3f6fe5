"""The sizes and formats of a model, which decide the code paths of its kernels."""

from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.weights import AttentionWeights, DeltaWeights, ExpertWeights, QuantizedWeight

__all__ = ["ModelShapes", "Projection"]


@dataclass(frozen=True)
class Projection:
    """Quantized matrices that one call multiplies by the same vectors.

    Attributes:
        weights: the matrices.
        residual: whether the call adds a residual to the product.
        one_token: whether the call may have one vector alone; a joint matrix may take its place there.
        normed: whether the call for one vector on a GPU begins with an RMS norm.
    """

    weights: tuple[QuantizedWeight, ...]
    residual: bool = False
    one_token: bool = True
    normed: bool = False


@dataclass(frozen=True)
class ModelShapes:
    """A model as kernels see it: only the shape, format and type of each weight matter, not its values.

    Attributes:
        dtype: type of activations.
        hidden_size: width of a token's vector.
        attention: a full-attention layer of each distinct shape.
        delta: a GatedDeltaNet layer of each distinct shape.
        projections: all calls with resident quantized matrices.
        experts: the different formats of routed experts; without the formats of layers with dense experts.
        shared: the shared expert of each distinct format; empty without shared experts.
        experts_k: routed experts per token.
        num_experts: routed experts per layer.
        slots: largest number of experts that one call applies.
        embedding: the quantized embedding table, or None.
        renormalized: whether the weights of a token's experts sum to 1.
        on_nodes: whether several nodes share the experts: each computes parts of sums, and one node the shared expert.
    """

    dtype: mx.Dtype
    hidden_size: int
    attention: tuple[AttentionWeights, ...]
    delta: tuple[DeltaWeights, ...]
    projections: tuple[Projection, ...]
    experts: tuple[ExpertFormat, ...]
    shared: tuple[ExpertWeights, ...]
    experts_k: int
    num_experts: int
    slots: int
    embedding: QuantizedWeight | None = None
    renormalized: bool = True
    on_nodes: bool = False

    def needs_several_groups(self, most_tokens: int | None) -> bool:
        """Return whether a call may need more experts than one call applies, and so apply them in groups.

        ``most_tokens`` is the largest number of tokens of a call; None stands for any number.
        """
        wanted = self.num_experts if most_tokens is None else most_tokens * self.experts_k
        return self.slots < min(self.num_experts, wanted)
