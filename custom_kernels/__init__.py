"""The operations whose speed this project is about, each with a plain reference beside it.

One folder an operation: ``reference.py`` in elementary MLX operations is the truth, and whatever else is offered must
equal it. ``choose`` picks once; the record of a run says what was picked. ``dialects/`` lets one body of source be a
Metal and a CUDA kernel (see ``kernel.py``).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import (
    attention,
    dense_experts,
    expert_mlp,
    gated_delta_net,
    native,
    quantised_matvec,
    routed_experts,
)
from flashmoe_mlx.custom_kernels.attention import AttentionWeights
from flashmoe_mlx.custom_kernels.expert_mlp import ExpertWeights
from flashmoe_mlx.custom_kernels.first_use import CheckedKernel
from flashmoe_mlx.custom_kernels.gated_delta_net import DeltaWeights
from flashmoe_mlx.custom_kernels.kernel import dialect
from flashmoe_mlx.custom_kernels.native import arguments
from flashmoe_mlx.custom_kernels.quantised_matvec import Products, one_by_one
from flashmoe_mlx.custom_kernels.routed_experts import ExpertFormat
from flashmoe_mlx.custom_kernels.routed_experts.grouped import DenseExperts

_log = logging.getLogger(__name__)

PREFERENCES = ("auto", "mlx", "reference")

_MLX = {
    "attention": "mx.fast.scaled_dot_product_attention",
    "gated_delta_net": "mx.fast.gated_delta_update",
    "gated_delta_net of prompts": "mx.fast.gated_delta_update",
    "expert_mlp": "mx.quantized_matmul or, of dense records, matmul",
    "routed_experts": "expert_mlp",
    "routed_experts of prompts": "expert_mlp",
    "quantised_matvec": "mx.quantized_matmul",
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """The implementations that a model runs; ``names`` says which, by operation, once they have run.

    ``takes_routed`` says whether ``routed_experts`` takes these experts. Where it does not, the model makes experts
    dense and applies several at a time (``dense_experts``), or, where that is None, applies ``expert_mlp`` to each.
    ``on_host`` stands in for both, for any number of tokens, where experts are best read where the CPU sees them: see
    ``native.routed_experts``. ``products`` are those with resident matrices; ``any_scales``: they take scales and
    biases in any type. ``note`` is what a person should know of the choice.
    """

    attention: Callable[..., tuple[mx.array, mx.array, mx.array]]
    gated_delta_net: Callable[..., tuple[mx.array, mx.array, mx.array]]
    expert_mlp: Callable[[mx.array, ExpertWeights], mx.array]
    routed_experts: Callable[..., mx.array]
    takes_routed: Callable[[int, ExpertFormat | None, mx.Dtype], bool]
    products: Products
    names: Mapping[str, str]
    dense_experts: DenseExperts | None = None
    on_host: Callable[..., mx.array] | None = None
    any_scales: bool = False
    rms_norm: Callable[[mx.array, mx.array, float], mx.array] = mx.fast.rms_norm
    note: str | None = None


def choose(preference: str) -> Kernels:
    """Implementations of every operation.

    "auto": our own kernels, each compared with its reference at its first use, and MLX's fused operations where there
    is none; prompts go through GatedDeltaNet in chunks, or on a CPU through our kernel. "mlx": MLX's fused operations
    alone. "reference": elementary ones.

    Raises:
        ValueError: another word.
    """
    if preference not in PREFERENCES:
        raise ValueError(f"kernels={preference!r}: choose from {', '.join(PREFERENCES)}")
    if preference == "reference":
        return Kernels(
            attention.reference.gated_attention,
            gated_delta_net.reference.gated_delta_net,
            expert_mlp.reference.expert_mlp,
            routed_experts.reference.routed_experts,
            _never,
            one_by_one(quantised_matvec.reference.quantised_matvec),
            dict.fromkeys(_MLX, "reference"),
        )
    device = dialect()
    if preference == "auto" and device is not None:
        return _custom(device)
    in_chunks = preference == "auto"
    note = None
    if preference == "auto":
        if native.extension() is not None:
            return _for_cpu()
        note = native.MISSING
        _log.warning("%s", note)
    return Kernels(
        attention.gated_attention,
        gated_delta_net.in_chunks if in_chunks else gated_delta_net.gated_delta_net,
        expert_mlp.expert_mlp,
        routed_experts.reference.routed_experts,
        _never,
        one_by_one(quantised_matvec.by_mlx),
        _MLX | ({"gated_delta_net of prompts": gated_delta_net.rule_of_prompts()} if in_chunks else {}),
        note=note,
    )


_SAMPLE = 8
"""Tokens of a check, whose references take one after the other."""


def _custom(device: str) -> Kernels:
    names = _MLX | {"gated_delta_net of prompts": gated_delta_net.rule_of_prompts()}

    def reports(*operations: str) -> Callable[[str], None]:
        return lambda what: names.update(dict.fromkeys(operations, what))

    checked_routed = CheckedKernel(
        name="routed_experts",
        custom=routed_experts.routed_experts,
        standard=routed_experts.by_expert,
        reference=routed_experts.reference.routed_experts,
        takes=routed_experts.takes,
        kind=routed_experts.code_path,
        report=reports("routed_experts"),
        sample=_few_choices,
    )
    dense = CheckedKernel(
        name="dense_experts",
        custom=dense_experts.dense_experts,
        standard=dense_experts.reference.dense_experts,
        reference=dense_experts.reference.dense_experts,
        takes=lambda slab, rows, form, dtype: dense_experts.fits(form, dtype),  # noqa: ARG005
        kind=lambda slab, rows, form, dtype: (form.bits, form.group_size),  # noqa: ARG005
        report=reports("routed_experts of prompts"),
        sample=lambda slab, rows, form, dtype: (slab, rows[:2], form, dtype),
    )
    return Kernels(
        CheckedKernel(
            name="attention",
            custom=attention.fused_gated_attention,
            standard=attention.gated_attention,
            reference=attention.reference_on_copies,
            takes=lambda q_and_gate, k, v, weights, *_: attention.fits(weights, q_and_gate.dtype),  # noqa: ARG005
            kind=lambda q_and_gate, *_: len(q_and_gate) > 1,
            report=reports("attention"),
        ),
        CheckedKernel(
            name="gated_delta_net",
            custom=gated_delta_net.step,
            standard=gated_delta_net.in_chunks,
            reference=gated_delta_net.reference.gated_delta_net,
            takes=gated_delta_net.takes,
            kind=lambda qkv, *_: len(qkv) > 1,
            report=reports("gated_delta_net", *(["gated_delta_net of prompts"] if device == "cuda" else [])),
            sample=lambda qkv, z, b, a, *rest: (*(part[:_SAMPLE] for part in (qkv, z, b, a)), *rest),
        ),
        expert_mlp.expert_mlp,
        checked_routed,
        lambda tokens, form, dtype: (
            form is not None and tokens <= routed_experts.MOST_TOKENS[device] and routed_experts.fits(form, dtype)
        ),
        one_by_one(
            CheckedKernel(
                name="quantised_matvec",
                custom=quantised_matvec.quantised_matvec,
                standard=quantised_matvec.by_mlx,
                reference=quantised_matvec.reference.quantised_matvec,
                takes=quantised_matvec.takes,
                kind=lambda x, weight, scales, biases, bits, group_size: (bits, group_size, len(x) > 1),  # noqa: ARG005
                report=reports("quantised_matvec"),
            )
        ),
        names,
        dense_experts=dense if device == "cuda" else None,  # not measured on a Mac
    )


def _for_cpu() -> Kernels:
    names = _MLX | {"rms_norm": "mx.fast.rms_norm"}
    maker, built_for = "native kernel", native.description()

    def reports(*operations: str) -> Callable[[str], None]:
        return lambda what: names.update(dict.fromkeys(operations, f"{what} ({built_for})"))

    return Kernels(
        CheckedKernel(
            name="attention",
            custom=native.gated_attention,
            standard=attention.gated_attention,
            reference=attention.reference_on_copies,
            takes=arguments.Attention.takes,
            kind=arguments.Attention.kind,
            report=reports("attention"),
            sample=arguments.Attention.sample,
            maker=maker,
        ),
        CheckedKernel(
            name="gated_delta_net",
            custom=native.gated_delta_net,
            standard=gated_delta_net.in_chunks,
            reference=gated_delta_net.reference.gated_delta_net,
            takes=arguments.Delta.takes,
            kind=arguments.Delta.kind,
            report=reports("gated_delta_net", "gated_delta_net of prompts"),
            sample=arguments.Delta.sample,
            maker=maker,
        ),
        expert_mlp.expert_mlp,
        routed_experts.reference.routed_experts,
        _never,
        CheckedKernel(
            name="quantised_matvec",
            custom=native.quantised_products,
            standard=one_by_one(quantised_matvec.by_mlx),
            reference=one_by_one(quantised_matvec.reference.quantised_matvec),
            takes=arguments.Products.takes,
            kind=arguments.Products.kind,
            report=reports("quantised_matvec"),
            sample=arguments.Products.sample,
            maker=maker,
        ),
        names,
        on_host=CheckedKernel(
            name="routed_experts",
            custom=native.routed_experts,
            standard=arguments.Experts.on_slab(routed_experts.by_expert),
            reference=arguments.Experts.on_slab(routed_experts.reference.routed_experts),
            takes=arguments.Experts.takes,
            kind=arguments.Experts.kind,
            report=reports("routed_experts"),
            sample=arguments.Experts.sample,
            maker=maker,
        ),
        any_scales=True,
        rms_norm=CheckedKernel(
            name="rms_norm",
            custom=native.rms_norm,
            standard=mx.fast.rms_norm,
            reference=mx.fast.rms_norm,
            takes=arguments.Norm.takes,
            kind=arguments.Norm.kind,
            report=reports("rms_norm"),
            sample=arguments.Norm.sample,
            maker=maker,
        ),
    )


def _few_choices(
    x: mx.array,
    slab: mx.array,
    rows: mx.array,
    shares: mx.array,
    form: ExpertFormat,
    shared: ExpertWeights | None = None,
) -> tuple[Any, ...]:
    """The arguments of ``routed_experts`` with few tokens, such that have experts in the slab."""
    tokens = mx.array(np.flatnonzero((np.array(rows) >= 0).any(axis=1))[:_SAMPLE])
    return x[tokens], slab, rows[tokens], shares[tokens], form, shared


def _never(tokens: int, form: ExpertFormat | None, dtype: mx.Dtype) -> bool:  # noqa: ARG001
    return False


__all__ = [
    "PREFERENCES",
    "AttentionWeights",
    "DeltaWeights",
    "ExpertFormat",
    "ExpertWeights",
    "Kernels",
    "choose",
    "dialect",
]
