"""The operations whose speed determines the speed of a model, with a plain reference for each.

Each folder with a reference is one operation; ``operation.py`` describes its parts and how to add an operation.
Every implementation must equal the reference. ``choose`` selects implementations for an engine; ``check_kernels``
compares custom kernels with the references on every code path of a model (see ``checks.py``).
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import mlx.core as mx

from flashmoe_mlx.custom_kernels import checks, code_cache, native
from flashmoe_mlx.custom_kernels.attention.reference import AttentionInputs
from flashmoe_mlx.custom_kernels.attention_batch.reference import AttentionBatch
from flashmoe_mlx.custom_kernels.checks import CheckedKernel, KernelReport, UncheckedPathWarning
from flashmoe_mlx.custom_kernels.expert_format import ExpertFormat
from flashmoe_mlx.custom_kernels.gated_delta_net.reference import DeltaInputs
from flashmoe_mlx.custom_kernels.gated_delta_net_batch.reference import DeltaBatch
from flashmoe_mlx.custom_kernels.kernel import dialect
from flashmoe_mlx.custom_kernels.kv_rows import KV_BITS
from flashmoe_mlx.custom_kernels.native.fastest import settle
from flashmoe_mlx.custom_kernels.nvidia import gpu, launch_directly
from flashmoe_mlx.custom_kernels.operation import Operation, Target
from flashmoe_mlx.custom_kernels.quantized_matvec.instructions import contests, forms
from flashmoe_mlx.custom_kernels.quantized_matvec.products import Products, one_by_one
from flashmoe_mlx.custom_kernels.routed_experts.gpu import most_tokens
from flashmoe_mlx.custom_kernels.routed_experts.grouped import DenseExperts, RowKernels
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import AttentionWeights, DeltaWeights, ExpertWeights, QuantizedWeight
from flashmoe_mlx.errors import InputError

_log = logging.getLogger(__name__)

ChooseExperts = Callable[[mx.array, mx.array, int, bool, bool], tuple[mx.array, mx.array, mx.array]]
"""The type of ``choose_experts.reference.choose_experts``."""
NormedMatvec = Callable[..., tuple[mx.array, mx.array]]
"""The type of ``normed_matvec.reference.normed_matvec``."""
PREFERENCES = ("auto", "mlx", "reference")
"""The values of ``kernels`` in ``load`` and on the command line."""
_GPUS = ("metal", "cuda")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The implementations that a model runs.

    Attributes:
        attention: an implementation of ``attention.reference.gated_attention``.
        gated_delta_net: an implementation of ``gated_delta_net.reference.gated_delta_net``.
        expert_mlp: an implementation of ``expert_mlp.reference.expert_mlp``.
        products: products with resident matrices.
        rms_norm: x / rms(x) * weight.
        implementations: the implementation of every operation, by name.
        names: names of the implementations that run where no custom kernel does, by operation.
        attention_batch: an implementation of ``attention_batch.reference.gated_attention``; None without a kernel.
        gated_delta_net_batch: an implementation of ``gated_delta_net_batch.reference.gated_delta_net``; None without a
            kernel.
        routed_experts_cpu: an implementation of ``routed_experts.cpu.routed_experts`` for any number of tokens; None
            without the C++ extension, and where a GPU computes.
        routed_experts_gpu: an implementation of ``routed_experts.reference.routed_experts`` for a few tokens; None
            without a kernel.
        most_gpu_tokens: most tokens for which ``routed_experts_gpu`` is the best choice.
        dense_experts: an implementation of ``dense_experts.reference.dense_experts`` for more tokens; None without a
            kernel.
        row_kernels: implementations of ``gather_rows`` and ``add_rows``, for ``dense_experts``.
        embedding: an implementation of ``embedding.reference.embedding``.
        choose_experts: an implementation of ``choose_experts.reference.choose_experts``; None without a kernel.
        chosen_experts: an implementation of ``chosen_experts.reference.chosen_experts``; None without a kernel.
        normed_matvec: an implementation of ``normed_matvec.reference.normed_matvec``; None without a kernel.
        accepts_any_scale_dtype: whether ``products`` accepts scales and biases whose type is not the activations'.
        activations: type of the vectors in products of many vectors on CPUs, a member of ``native.ACTIVATIONS``.
        kv_bits: the width of cached keys and values; see ``kv_rows.RowFormat``.
        note: a message for the user about the choice, or None.
    """

    attention: Callable[[AttentionInputs], tuple[mx.array, mx.array, mx.array]]
    gated_delta_net: Callable[[DeltaInputs], tuple[mx.array, mx.array, mx.array]]
    expert_mlp: Callable[[mx.array, ExpertWeights], mx.array]
    products: Products
    rms_norm: Callable[[mx.array, mx.array, float], mx.array]
    row_kernels: RowKernels
    embedding: Callable[[QuantizedWeight, mx.array, mx.Dtype], mx.array]
    implementations: Mapping[str, Callable[..., Any]]
    names: Mapping[str, str]
    attention_batch: Callable[[AttentionBatch], tuple[mx.array, ...]] | None = None
    gated_delta_net_batch: Callable[[DeltaBatch], tuple[mx.array, ...]] | None = None
    routed_experts_cpu: Callable[..., mx.array] | None = None
    routed_experts_gpu: Callable[..., mx.array] | None = None
    most_gpu_tokens: int = 0
    dense_experts: DenseExperts | None = None
    choose_experts: ChooseExperts | None = None
    chosen_experts: Callable[..., tuple[mx.array, mx.array]] | None = None
    normed_matvec: NormedMatvec | None = None
    accepts_any_scale_dtype: bool = False
    activations: str = "f32"
    kv_bits: int | None = None
    note: str | None = None


def operations() -> dict[str, Operation[..., Any]]:
    """Find the operations: all folders whose ``__init__.py`` defines ``OPERATION``, by the operation's name.

    Raises:
        ValueError: two operations have one name.
    """
    folders = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__) if module.ispkg)
    found: dict[str, Operation[..., Any]] = {}
    for operation in (folder.OPERATION for folder in folders if hasattr(folder, "OPERATION")):
        if operation.name in found:
            raise ValueError(f"{__name__}: two operations are named {operation.name}")
        found[operation.name] = operation
    return found


def choose(preference: str, activations: str = "auto", kv_bits: int | None = None) -> Kernels:
    """Choose an implementation of every operation.

    Args:
        preference: "auto" for custom kernels, and the fastest of MLX's operations where there is none; "mlx" for MLX's
            fused operations; "reference" for elementary operations.
        activations: a member of ``native.ACTIVATIONS`` to which kernels for CPUs round the vectors of products of many
            vectors; "auto" for exact vectors.
        kv_bits: the width of cached keys and values, a member of ``KV_BITS``; None for the type of activations.

    Returns:
        Implementations. Custom kernels run only after ``check_kernels`` has checked them.

    Raises:
        InputError: ``preference``, ``activations`` or ``kv_bits`` is unknown (codes "unknown_kernels",
            "unknown_activations", "unknown_kv_bits") or has no effect here (code "activations_without_effect"), or an
            environment variable requests instructions that the extension does not have or an invalid number of
            threads.
    """
    if preference not in PREFERENCES:
        raise InputError(f"kernels={preference!r}: choose from {', '.join(PREFERENCES)}", code="unknown_kernels")
    if kv_bits is not None and (type(kv_bits) is not int or kv_bits not in KV_BITS):
        choices = ", ".join(map(str, KV_BITS))
        raise InputError(
            f"kv_bits={kv_bits!r}: choose from {choices}, or leave it out for keys and values in the type of "
            "activations",
            code="unknown_kv_bits",
        )
    target = _target(preference)
    rounding = _checked_activations(activations, target)
    if dialect() == "cuda":
        launch_directly()
        code_cache.keep_modules_of_mlx(gpu().architecture)
    found = operations()
    chosen = {name: operation.on(target, rounding) for name, operation in found.items()}
    note = native.MISSING if target == "fallback" else None
    if note is not None:
        _log.warning("%s", note)
    on_cpu, on_gpu = target == "cpu", target in _GPUS
    return Kernels(
        attention=chosen["attention"],
        gated_delta_net=chosen["gated_delta_net"],
        expert_mlp=chosen["expert_mlp"],
        products=chosen["quantized_matvec"] if on_cpu else one_by_one(chosen["quantized_matvec"]),
        rms_norm=chosen["rms_norm"],
        row_kernels=RowKernels(chosen["gather_rows"], chosen["add_rows"]),
        embedding=chosen["embedding"],
        implementations=chosen,
        names={name: runs for operation in found.values() for name, runs in operation.names(target).items()},
        attention_batch=chosen["attention_batch"] if on_cpu else None,
        gated_delta_net_batch=chosen["gated_delta_net_batch"] if on_cpu else None,
        routed_experts_cpu=chosen["routed_experts"] if on_cpu else None,
        routed_experts_gpu=chosen["routed_experts"] if on_gpu else None,
        most_gpu_tokens=most_tokens() if on_gpu else 0,
        dense_experts=chosen["dense_experts"] if isinstance(chosen["dense_experts"], CheckedKernel) else None,
        choose_experts=chosen["choose_experts"] if on_gpu else None,
        chosen_experts=chosen["chosen_experts"] if on_gpu else None,
        normed_matvec=chosen["normed_matvec"] if on_gpu else None,
        accepts_any_scale_dtype=on_cpu,
        activations=rounding,
        kv_bits=kv_bits,
        note=note,
    )


def _checked_activations(activations: str, target: Target) -> str:
    if activations == "auto":
        return "f32"
    choices = native.ACTIVATIONS[1:]
    if activations not in choices:
        raise InputError(
            f"activations={activations!r}: choose from auto, {', '.join(choices)}", code="unknown_activations"
        )
    if target != "cpu" or not native.has_activations(activations):
        why = "only kernels=auto on a CPU rounds" if target != "cpu" else "this CPU has no faster instructions for it"
        raise InputError(
            f"activations={activations}: no effect here, because {why}; leave it out", code="activations_without_effect"
        )
    return activations


def rounding_note(activations: str, names: Iterable[str]) -> str | None:
    """Return what the user should know about ``activations``; None for "f32".

    Args:
        activations: a member of ``native.ACTIVATIONS``.
        names: code paths of a model, from the report of ``check_kernels``.

    Raises:
        InputError: no code path rounds vectors; code "activations_without_effect".
    """
    if activations == "f32":
        return None
    if not any(native.rounded_phrase(activations) in name for name in names):
        raise InputError(
            f"activations={activations}: no effect on this model, which has no quantized matrices; leave it out",
            code="activations_without_effect",
        )
    few = native.few_tokens()
    return f"activations={activations}: products of more than {few} tokens round their inputs to 8 bits of precision"


def check_kernels(kernels: Kernels, model: ModelShapes) -> KernelReport:
    """Compare every custom kernel with its reference on every code path that ``model`` takes.

    On a CPU the fastest instruction sets are chosen first; see ``native.fastest``. MLX's implementation replaces a
    kernel on a path where it fails, with a warning in the log. Inputs and weights are random; the values of a model's
    weights do not matter.

    Raises:
        InputError: activations are to be rounded, but no code path does; code "activations_without_effect".
    """
    custom = [kernel for kernel in kernels.implementations.values() if isinstance(kernel, CheckedKernel)]
    chosen = settle(contests(forms(model), kernels.activations)) if kernels.routed_experts_cpu is not None else []
    names = {**kernels.names, **{choice.contest: str(choice) for choice in chosen}}
    report = checks.check_kernels(custom, model, names, kernels.note)
    rounding = rounding_note(kernels.activations, report.names)
    return replace(report, note="; ".join(filter(None, (report.note, rounding))) or None)


def _target(preference: str) -> Target:
    if preference == "reference":
        return "reference"
    if preference == "mlx":
        return "mlx"
    return dialect() or ("fallback" if native.extension() is None else "cpu")


__all__ = [
    "PREFERENCES",
    "AttentionBatch",
    "AttentionInputs",
    "AttentionWeights",
    "ChooseExperts",
    "DeltaBatch",
    "DeltaInputs",
    "DeltaWeights",
    "ExpertFormat",
    "ExpertWeights",
    "KernelReport",
    "Kernels",
    "ModelShapes",
    "NormedMatvec",
    "QuantizedWeight",
    "UncheckedPathWarning",
    "check_kernels",
    "choose",
    "dialect",
    "operations",
    "rounding_note",
]
