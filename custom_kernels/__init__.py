"""The operations whose speed this project is about, each with a plain reference beside it.

One folder per operation: ``reference.py`` in elementary MLX operations is the truth, and every other implementation
must equal it. ``choose`` selects the implementations of an engine, and ``check_kernels`` compares them with the
references on every code path that a model takes (see ``operation.py``); the record of a run names them. ``dialects/``
lets one body of source be a Metal and a CUDA kernel (see ``kernel.py``).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flashmoe_mlx.custom_kernels import (
    attention,
    expert_mlp,
    gated_delta_net,
    gpu,
    native,
    quantised_matvec,
    routed_experts,
)
from flashmoe_mlx.custom_kernels.attention import AttentionWeights
from flashmoe_mlx.custom_kernels.expert_mlp import ExpertWeights
from flashmoe_mlx.custom_kernels.gated_delta_net import DeltaWeights
from flashmoe_mlx.custom_kernels.kernel import dialect
from flashmoe_mlx.custom_kernels.native import operations as native_operations
from flashmoe_mlx.custom_kernels.operation import KernelReport, Operation, UncheckedPathWarning, check_operations
from flashmoe_mlx.custom_kernels.quantised_matvec import Products, one_by_one
from flashmoe_mlx.custom_kernels.routed_experts import ExpertFormat
from flashmoe_mlx.custom_kernels.routed_experts.grouped import DenseExperts
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.errors import InputError

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
    """The implementations that a model runs.

    Attributes:
        attention: as ``attention.reference.gated_attention``.
        gated_delta_net: as ``gated_delta_net.reference.gated_delta_net``.
        expert_mlp: as ``expert_mlp.reference.expert_mlp``.
        products: products with resident matrices.
        names: what runs where no custom kernel does, by operation; ``check_kernels`` reports the kernels.
        routed_experts_cpu: as ``native.routed_experts``, for any number of tokens; None except among the extension's
            kernels for CPUs, which read weights where the CPU has them.
        routed_experts_gpu: as ``routed_experts.reference.routed_experts``, for a few tokens; None where there is no
            kernel.
        most_gpu_tokens: most tokens for which ``routed_experts_gpu`` is the best choice.
        dense_experts: as ``dense_experts.reference.dense_experts``, for more tokens; None where there is no kernel.
        accepts_any_scale_dtype: whether ``products`` accepts scales and biases whose dtype is not that of activations.
        rms_norm: x / rms(x) * weight.
        operations: those of the above that have a custom kernel.
        note: what a person should know of the choice.
    """

    attention: Callable[..., tuple[mx.array, mx.array, mx.array]]
    gated_delta_net: Callable[..., tuple[mx.array, mx.array, mx.array]]
    expert_mlp: Callable[[mx.array, ExpertWeights], mx.array]
    products: Products
    names: Mapping[str, str]
    routed_experts_cpu: Callable[..., mx.array] | None = None
    routed_experts_gpu: Callable[..., mx.array] | None = None
    most_gpu_tokens: int = 0
    dense_experts: DenseExperts | None = None
    accepts_any_scale_dtype: bool = False
    rms_norm: Callable[[mx.array, mx.array, float], mx.array] = mx.fast.rms_norm
    operations: tuple[Operation[Any, Any], ...] = ()
    note: str | None = None


def choose(preference: str) -> Kernels:
    """Choose implementations of every operation.

    Args:
        preference: "auto" for our own kernels, and MLX's fused operations where there is none; prompts go through
            GatedDeltaNet in chunks, or on a CPU through our kernel. "mlx" for MLX's fused operations alone.
            "reference" for elementary ones.

    Returns:
        Kernels whose operations run MLX's implementations until ``check_kernels`` has checked them.

    Raises:
        InputError: ``preference`` is another word (code "unknown_kernels"), or an environment variable asks the
            extension for a number of threads or instructions that it does not have.
    """
    if preference not in PREFERENCES:
        raise InputError(f"kernels={preference!r}: choose from {', '.join(PREFERENCES)}", code="unknown_kernels")
    if preference == "reference":
        return Kernels(
            attention=attention.reference.gated_attention,
            gated_delta_net=gated_delta_net.reference.gated_delta_net,
            expert_mlp=expert_mlp.reference.expert_mlp,
            products=one_by_one(quantised_matvec.reference.quantised_matvec),
            names=dict.fromkeys(_MLX, "reference"),
        )
    if preference == "mlx":
        return _by_mlx(in_chunks=False)
    device = dialect()
    if device is not None:
        return _for_gpu(device)
    if native.extension() is not None:
        return _for_cpu()
    _log.warning("%s", native.MISSING)
    return _by_mlx(in_chunks=True, note=native.MISSING)


def check_kernels(kernels: Kernels, model: ModelShapes) -> KernelReport:
    """Compare every custom kernel with its reference on every code path that ``model`` takes.

    A kernel that fails on a path is replaced there by MLX's operation, with a warning in the log. Inputs and weights
    are random, so the values of a model's own weights decide nothing.
    """
    return check_operations(kernels.operations, model, kernels.names.items(), kernels.note)


def _by_mlx(in_chunks: bool, note: str | None = None) -> Kernels:
    return Kernels(
        attention=attention.gated_attention,
        gated_delta_net=gated_delta_net.in_chunks if in_chunks else gated_delta_net.gated_delta_net,
        expert_mlp=expert_mlp.expert_mlp,
        products=one_by_one(quantised_matvec.by_mlx),
        names=_MLX | ({"gated_delta_net of prompts": gated_delta_net.rule_of_prompts()} if in_chunks else {}),
        note=note,
    )


def _for_gpu(device: str) -> Kernels:
    made = gpu.operations()
    on_cuda = device == "cuda"
    if not on_cuda:
        del made["dense_experts"]  # not measured on a Mac
    names = {name: runs for name, runs in _MLX.items() if not (on_cuda and name == "gated_delta_net of prompts")}
    if on_cuda:
        names["routed_experts of prompts"] = "dense_experts"
    else:
        names["gated_delta_net of prompts"] = gated_delta_net.rule_of_prompts()
    return Kernels(
        attention=made["attention"],
        gated_delta_net=made["gated_delta_net"],
        expert_mlp=expert_mlp.expert_mlp,
        routed_experts_gpu=made["routed_experts"],
        most_gpu_tokens=routed_experts.MOST_TOKENS[device],
        products=one_by_one(made["quantised_matvec"]),
        names=names,
        dense_experts=made.get("dense_experts"),
        operations=tuple(made.values()),
    )


def _for_cpu() -> Kernels:
    made = native_operations.operations()
    of_prompts = ("gated_delta_net of prompts", "routed_experts of prompts")  # one kernel serves both
    return Kernels(
        attention=made["attention"],
        gated_delta_net=made["gated_delta_net"],
        expert_mlp=expert_mlp.expert_mlp,
        products=made["quantised_matvec"],
        names={name: runs for name, runs in _MLX.items() if name not in of_prompts} | {"rms_norm": "mx.fast.rms_norm"},
        routed_experts_cpu=made["routed_experts"],
        accepts_any_scale_dtype=True,
        rms_norm=made["rms_norm"],
        operations=tuple(made.values()),
    )


__all__ = [
    "PREFERENCES",
    "AttentionWeights",
    "DeltaWeights",
    "ExpertFormat",
    "ExpertWeights",
    "KernelReport",
    "Kernels",
    "ModelShapes",
    "UncheckedPathWarning",
    "check_kernels",
    "choose",
    "dialect",
]
