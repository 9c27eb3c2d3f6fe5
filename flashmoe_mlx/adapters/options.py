"""Options of an engine that MLX-LM's models cannot have."""

from collections.abc import Mapping
from typing import Any

from flashmoe_mlx.adapters.model import AdaptedModel
from flashmoe_mlx.errors import InputError

NO_PROMPT_CACHE = (
    "prompts are computed whole: this model keeps states that cannot be cut back in mlx-lm, so no states of earlier "
    "prompts are kept"
)
_POSSIBLE: Mapping[str, tuple[Any, ...]] = {
    "kernels": ("auto", "mlx"),
    "activations": ("auto",),
    "kv_bits": (None,),
    "prefetch": ("none", "previous_token"),
    "cache_dir": (None,),
}
"""The values that each option may have."""


def refuse_options(given: Mapping[str, Any]) -> None:
    """Raise InputError, code "not_for_mlx_lm", if an option of ``given`` has no effect on a model of MLX-LM."""
    for name, possible in _POSSIBLE.items():
        if given[name] not in possible:
            values = " or ".join("null" if value is None else str(value) for value in possible)
            raise InputError(
                f"{name}={given[name]}: this model runs through mlx-lm, which needs {name}={values}",
                code="not_for_mlx_lm",
            )


def keeps_prompts(model: object) -> bool:
    """Return whether states of earlier prompts of ``model`` can be kept."""
    return not (isinstance(model, AdaptedModel) and model.new_cache().has_state)
