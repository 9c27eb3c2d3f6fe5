"""The kernels for GPUs: one dispatch for one token on NVIDIA GPUs from Hopper on; two or three for everything else."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.checks import CodePath, Sample
from flashmoe_mlx.custom_kernels.choose_experts import gpu as choose
from flashmoe_mlx.custom_kernels.choose_experts.reference import choose_experts
from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts import gpu as routed
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import ExpertWeights


def code_path(
    x: mx.array,
    residual: mx.array,
    slab: mx.array,
    scores: mx.array,
    table: mx.array,
    earlier: mx.array,  # noqa: ARG001  # the signature of the operation
    k: int,
    form: ExpertFormat,
    shared: ExpertWeights | None,
    renormalized: bool = True,
) -> CodePath | None:
    """Return the code path of ``chosen_experts``; None if it does not support the arguments."""
    weights = mx.zeros((len(x), k + (shared is not None)))
    path = routed.code_path(x, slab, weights, weights, form, shared, residual)
    if path is None:
        return None
    how = "" if choose.code_path(scores, table, k, shared is not None) else "chosen by elementary operations"
    return *path, how, "" if renormalized else "not renormalized"


def chosen_experts(
    x: mx.array,
    residual: mx.array,
    slab: mx.array,
    scores: mx.array,
    table: mx.array,
    earlier: mx.array,
    k: int,
    form: ExpertFormat,
    shared: ExpertWeights | None,
    renormalized: bool = True,
) -> tuple[mx.array, mx.array]:
    """Compute ``reference.chosen_experts`` for arguments with a ``code_path``."""
    with_shared = shared is not None
    if choose.code_path(scores, table, k, with_shared) is None:
        few, rows, weights = choose_experts(scores, table, k, with_shared, renormalized)
        listed = mx.concatenate([earlier, few.reshape(-1)])
        return routed.routed_experts(x, slab, rows, weights, form, shared, residual), listed
    plan = routed.plan_of(form, x.dtype, len(x), k + with_shared)
    if plan is not None and scores.dtype == mx.bfloat16:
        inputs = [x, residual, slab, scores, table, earlier]
        y, chosen = routed.run_fused(
            plan, inputs, form, k + with_shared, shared, experts=len(table), renormalized=renormalized
        )
        return y, chosen
    chosen, rows, weights = choose.list_experts(scores, table, k, earlier, with_shared, renormalized)
    return routed.routed_experts(x, slab, rows, weights, form, shared, residual), chosen


def samples(model: ModelShapes) -> Iterator[Sample]:
    """Yield one token and several tokens, with true sizes, and with a shared expert if it joins the kernels.

    Of several nodes, only one computes the shared expert.
    """
    for form in model.experts:
        if routed.supports(form, model.dtype):
            yield from _samples_of(form, model)


def _samples_of(form: ExpertFormat, model: ModelShapes) -> Iterator[Sample]:
    inputs, k = RandomInputs(model.dtype, 0), model.experts_k
    slab = inputs.slab(form, 3)
    table = mx.array(np.arange(model.num_experts) % 3, mx.int32)
    fused = [shared for shared in model.shared if routed.can_fuse_shared_expert(shared, form)]
    drawn = [inputs.expert_like(shared) for shared in fused[:1]]
    for shared in [*drawn, None] if model.on_nodes else drawn if model.shared else [None]:
        for tokens in (1, min(routed.most_tokens(), 5)):
            scores = choose.different_scores(tokens, model.num_experts, model.dtype)
            x, residual = (inputs.normal(tokens, form.hidden_size) for _ in range(2))
            residual = residual.astype(mx.float32 if model.on_nodes else model.dtype)
            arguments = (
                x,
                residual,
                slab,
                scores,
                table,
                mx.array([7] * 5, mx.int32),
                k,
                form,
                shared,
                model.renormalized,
            )
            if code_path(*arguments) is not None:
                yield Sample(arguments)
