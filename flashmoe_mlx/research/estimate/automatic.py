"""The choice of a backend by the speed model: ``backend=auto``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.custom_kernels import choose
from flashmoe_mlx.custom_kernels.precision import activation_type
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.model_files import ModelFiles
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.research.estimate.machine_profile import MachineProfile
from flashmoe_mlx.research.estimate.prediction import Estimate, Machine, Model, estimates
from flashmoe_mlx.stores.memory import GIB
from flashmoe_mlx.stores.registry import backend_settings

_CONTEXT = 8192
"""Tokens of context for which memory is reserved."""


@dataclass(frozen=True)
class Choice:
    """A backend with its options.

    Attributes:
        settings: ``_target_``, the class of the backend, and its options.
        prefetch: the prefetch policy.
        estimate: the estimated speed of this choice.
        slower: the estimates of all other backends, the fastest first.
    """

    settings: dict[str, Any]
    prefetch: str
    estimate: Estimate
    slower: Sequence[Estimate]


def choose_backend(
    files: ModelFiles, profile: MachineProfile, memory: int, variant: str | None = None, experts_k: int | None = None
) -> Choice:
    """Choose the backend that the speed model expects to be the fastest.

    Args:
        files: the model.
        profile: measurements of this machine.
        memory: bytes that the run may use.
        variant: the variant of the pack; None for the variant with the most bits.
        experts_k: routed experts per token; None for the model's own number.

    Raises:
        InputError: the experts are not quantized (code "unsupported_layout"), or the model does not fit into memory
            ("not_enough_memory").
    """
    model = _model(files, variant, experts_k)
    found = estimates(model, Machine(profile, memory))
    if not found:
        raise _too_large(model, memory)
    best, *slower = found
    reads_directly = best.options.get("direct", best.name == "io_uring")
    prefetch = profile.faster_prefetch(model.record_bytes) if reads_directly else "none"
    return Choice(_settings(best, variant), prefetch, best, slower)


def room_for_experts(
    files: ModelFiles, memory: int, variant: str | None = None, experts_k: int | None = None
) -> tuple[int, int]:
    """Return the bytes of ``memory`` that the model in ``files`` leaves for experts, and the bytes of all experts.

    For the arguments and errors, see ``choose_backend``.
    """
    model = _model(files, variant, experts_k)
    if model.need.total >= memory:
        raise _too_large(model, memory)
    return memory - model.need.total, model.expert_bytes


def _too_large(model: Model, memory: int) -> InputError:
    return InputError(
        f"backend=auto: the model needs {model.need.total / GIB:.1f} GiB before it keeps any expert, and "
        f"{memory / GIB:.1f} GiB are usable",
        code="not_enough_memory",
    )


def _model(files: ModelFiles, variant: str | None, experts_k: int | None) -> Model:
    layout = files.variant(variant).layout
    if any(form.bits is None for own in layout.distinct for form in own.formats):
        raise InputError(
            "backend=auto: the speed model needs quantized experts; make a pack (task=pack), or choose a backend",
            code="unsupported_layout",
        )
    config, size = files.config, activation_type().size
    if not isinstance(config, ModelConfig):
        raise InputError(
            "backend=auto: the speed model knows no models that run through mlx-lm; choose a backend",
            code="unsupported_model",
        )
    scales = 2 if choose("auto").accepts_any_scale_dtype else size
    k = config.experts_per_token if experts_k is None else experts_k
    context = min(_CONTEXT, config.max_context)
    bits = round(layout.code_bits)
    return Model(config, bits, bits, k, context, size, scales, None, layout=layout)


def _settings(estimate: Estimate, variant: str | None) -> dict[str, Any]:
    settings = {**backend_settings(estimate.name), **estimate.options, "variant": variant}
    if estimate.name == "ram_hybrid":
        settings["budget_gib"] = estimate.budget / GIB
    return settings
