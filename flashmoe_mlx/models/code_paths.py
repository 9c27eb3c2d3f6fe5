"""The calls of kernels that a built model makes, for the check of kernels at load."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from flashmoe_mlx.custom_kernels import Kernels, check_kernels, native
from flashmoe_mlx.custom_kernels.checks import KernelReport
from flashmoe_mlx.custom_kernels.expert_format import expert_format
from flashmoe_mlx.custom_kernels.shapes import ModelShapes, Projection
from flashmoe_mlx.custom_kernels.weights import ExpertWeights
from flashmoe_mlx.formats.record import AFFINE
from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.layers.gated_delta_net import GatedDeltaNet
from flashmoe_mlx.layers.linear import Linear
from flashmoe_mlx.layers.mlp import Mlp
from flashmoe_mlx.models.decoder import Layer, Model
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.moe.groups import experts_at_once


def check_model(kernels: Kernels, model: RunnableModel, *, on_nodes: bool) -> KernelReport:
    """Check the kernels that ``model`` uses; a model of another package uses none.

    ``on_nodes`` is whether several nodes share the experts.
    """
    if not isinstance(model, Model):
        return KernelReport({"model": "mlx-lm"}, [], None)
    return check_kernels(kernels, replace(model_shapes(model), on_nodes=on_nodes))


def model_shapes(model: Model) -> ModelShapes:
    """Return the shapes of ``model`` for its kernels."""
    first, *_ = model.mixtures
    mixers = [layer.mixer for layer in model.layers]
    experts = (block.shared.weights for block in model.mixtures if block.shared is not None)
    shared = {_expert_format(expert): expert for expert in experts}
    modes = (AFFINE,) if model.kernels.routed_experts_cpu is None else native.modes()
    return ModelShapes(
        dtype=model.norm.dtype,
        hidden_size=model.config.hidden_size,
        attention=tuple(mixer.weights for mixer in mixers if isinstance(mixer, Attention))[:1],
        delta=tuple(mixer.weights for mixer in mixers if isinstance(mixer, GatedDeltaNet))[:1],
        projections=tuple(_projections(model)),
        experts=tuple(filter(None, (expert_format(layout, modes) for layout in first.store.layout.distinct))),
        shared=tuple(shared.values()),
        experts_k=first.router.experts_k,
        num_experts=model.config.num_experts,
        slots=experts_at_once(first.store),
        renormalized=first.router.renormalized,
        embedding=None if model.embedding.bits is None else model.embedding,
    )


def _projections(model: Model) -> Iterator[Projection]:
    for layer in model.layers:
        yield from _of_layer(layer)
    yield from _calls([model.head], normed=model.kernels.normed_matvec is not None)


def _of_layer(layer: Layer) -> Iterator[Projection]:
    mixer = layer.mixer
    for matrices in layer.further_matrices:
        yield from _calls(matrices)
    assert isinstance(mixer, Attention | GatedDeltaNet)
    if mixer.joint is not None:
        yield from _calls([mixer.joint], normed=True)
    apart = mixer.joint is None
    if isinstance(mixer, Attention):
        yield from _calls(mixer.projections, one_token=apart)
        yield from _calls([mixer.o_proj], residual=layer.mixer_adds_residual)
    else:
        yield from _calls([mixer.in_proj_qkv, mixer.in_proj_z, mixer.in_proj_b, mixer.in_proj_a], one_token=apart)
        yield from _calls([mixer.out_proj], residual=layer.mixer_adds_residual)
    if isinstance(layer.feed_forward, Mlp):
        yield from _calls([layer.feed_forward.gate, layer.feed_forward.up])
        yield from _calls([layer.feed_forward.down], residual=True)
        return
    router = layer.feed_forward.router
    if router.joint is not None:
        yield from _calls([router.joint], normed=True)
    yield from _calls(router.gates)  # together on CPUs, separately on GPUs and by prefetch policies
    for linear in router.gates:
        yield from _calls([linear])


def _calls(
    linears: Sequence[Linear], residual: bool = False, one_token: bool = True, normed: bool = False
) -> Iterator[Projection]:
    """Yield the calls for quantized matrices: one call for all unless a matrix is dense, else one call for each."""
    quantized = [linear for linear in linears if linear.bits is not None]
    if len(quantized) == len(linears):
        yield Projection(tuple(linears), residual, one_token, normed)
    else:
        yield from (Projection((linear,), residual, one_token, normed) for linear in quantized)


def _expert_format(expert: ExpertWeights) -> tuple[object, ...]:
    return tuple(
        (matrix.weight.shape, None if matrix.bits is None else matrix.format_name) for matrix in expert.matrices
    )
