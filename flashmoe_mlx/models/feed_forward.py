"""The blocks of decoder layers after the mixer: mixtures of experts, and MLPs."""

from collections.abc import Iterator
from dataclasses import dataclass

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.custom_kernels.weights import ExpertWeights
from flashmoe_mlx.layers.mlp import Mlp
from flashmoe_mlx.models.parameters import ROUTER_BITS, Kind, Parameter
from flashmoe_mlx.models.weights import ResidentWeights
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.on_host import ExpertsOnHost
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.moe.shared_expert import SharedExpert
from flashmoe_mlx.moe.strategies import choose_in_memory, choose_strategy
from flashmoe_mlx.stores.contract import ExpertStore

__all__ = ["FeedForwardBlock", "MlpBlock", "MoeBlock"]


@dataclass(frozen=True, slots=True)
class MoeBlock:
    """A mixture of experts behind a norm: softmax router, in some models a shared expert with a sigmoid gate.

    Attributes:
        hidden_size: the width of a token's vector.
        num_experts: routed experts.
        shared_expert_size: the inner width of the shared expert; 0 without one.
        eps: the epsilon of the norm.
        norm: the form in which checkpoints store the norm.
        renormalized: whether the weights of a token's experts sum to 1.
        normed: whether the block has a norm and adds its output to its input; otherwise the layer does both.
    """

    hidden_size: int
    num_experts: int
    shared_expert_size: int
    eps: float
    norm: Kind
    renormalized: bool = True
    normed: bool = True

    def parameters(self, prefix: str) -> Iterator[Parameter]:
        """Yield the resident parameters in the order in which a token meets them."""
        hidden, size = self.hidden_size, self.shared_expert_size
        if self.normed:
            yield Parameter(f"{prefix}post_attention_layernorm.weight", self.norm, (hidden,))
        # Random logits of a router must differ enough for its choices to be clear.
        yield Parameter(f"{prefix}mlp.gate", Kind.MATRIX, (self.num_experts, hidden), ROUTER_BITS, gain=2.0)
        if not size:
            return
        yield Parameter(f"{prefix}mlp.shared_expert.gate_proj", Kind.MATRIX, (size, hidden))
        yield Parameter(f"{prefix}mlp.shared_expert.up_proj", Kind.MATRIX, (size, hidden))
        yield Parameter(f"{prefix}mlp.shared_expert.down_proj", Kind.MATRIX, (hidden, size))
        yield Parameter(f"{prefix}mlp.shared_expert_gate", Kind.MATRIX, (1, hidden), ROUTER_BITS)

    def build(
        self,
        layer: int,
        place: int,
        prefix: str,
        weights: ResidentWeights,
        kernels: Kernels,
        store: ExpertStore,
        experts_k: int,
    ) -> MixtureOfExperts:
        """Make the block from its weights.

        Args:
            layer: the index of the layer in ``store``.
            place: the index of the layer in the model.
            prefix: the prefix of the layer, ``model.layers.0.`` for example.
            weights: the resident weights.
            kernels: the kernels to compute with.
            store: serves the routed experts.
            experts_k: routed experts of a token.
        """
        shared = own = None
        gates = [f"{prefix}mlp.gate"]
        if self.shared_expert_size:
            projections = (weights.linear(f"{prefix}mlp.shared_expert.{part}_proj") for part in ("gate", "up", "down"))
            own = ExpertWeights(*projections)
            shared = SharedExpert(own, kernels.expert_mlp)
            gates.append(f"{prefix}mlp.shared_expert_gate")
        strategy = choose_strategy(kernels, store.layout[layer], weights.dtype, own)
        joint = weights.join(*gates) if kernels.choose_experts is not None and self.normed else None
        norm = weights.vector(f"{prefix}post_attention_layernorm.weight") if self.normed else None
        router = Router(
            weights.linear(gates[0]),
            norm,
            self.eps,
            experts_k,
            weights.linear(gates[1]) if self.shared_expert_size else None,
            kernels.rms_norm,
            joint,
            kernels.choose_experts,
            kernels.normed_matvec,
            by_numpy=isinstance(strategy, ExpertsOnHost),
            renormalized=self.renormalized,
        )
        in_memory = choose_in_memory(kernels, store.layout[layer], weights.dtype, own) if self.normed else None
        return MixtureOfExperts(layer, place, store, router, shared, strategy, in_memory)


@dataclass(frozen=True, slots=True)
class MlpBlock:
    """An MLP behind a norm, in a layer without routed experts.

    Attributes:
        hidden_size: the width of a token's vector.
        inner_size: the inner width.
        eps: the epsilon of the norm.
        norm: the form in which checkpoints store the norm.
    """

    hidden_size: int
    inner_size: int
    eps: float
    norm: Kind

    def parameters(self, prefix: str) -> Iterator[Parameter]:
        """Yield the parameters in the order in which a token meets them."""
        hidden, size = self.hidden_size, self.inner_size
        yield Parameter(f"{prefix}post_attention_layernorm.weight", self.norm, (hidden,))
        yield Parameter(f"{prefix}mlp.gate_proj", Kind.MATRIX, (size, hidden))
        yield Parameter(f"{prefix}mlp.up_proj", Kind.MATRIX, (size, hidden))
        yield Parameter(f"{prefix}mlp.down_proj", Kind.MATRIX, (hidden, size))

    def build(self, prefix: str, weights: ResidentWeights, kernels: Kernels) -> Mlp:
        """Make the block from its weights."""
        norm = weights.vector(f"{prefix}post_attention_layernorm.weight")
        projections = (weights.linear(f"{prefix}mlp.{part}_proj") for part in ("gate", "up", "down"))
        return Mlp(kernels, norm, self.eps, *projections)


FeedForwardBlock = MoeBlock | MlpBlock
"""The part of a layer after its mixer."""
