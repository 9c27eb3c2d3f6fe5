"""MLX-LM, imported when a model needs it."""

import importlib
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import shown

INSTALL = "pip install 'flashmoe_mlx[mlx-lm]'"
_SWITCH = "switch_layers"
"""The module of MLX-LM with the layers of routed experts; models import it by this name."""
MODEL_TYPES = (
    "Klear", "afmoe", "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "deepseek", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v41", "deepseek_v41_text", "dots1", "ernie4_5_moe", "exaone_moe", "gemma4",
    "gemma4_text", "gemma4_unified", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe",
    "granitemoehybrid", "hunyuan", "jamba", "joyai_llm_flash", "kimi_k2", "kimi_k25", "kimi_k3", "kimi_linear",
    "kimi_vl", "laguna", "lfm2_moe", "llama4", "longcat_flash", "longcat_flash_ngram", "mellum", "mimo_v2_flash",
    "minimax", "minimax_m2", "minimax_m3_vl", "mistral3", "mistral4", "mixtral", "muse_spark", "nemotron_h", "olmoe",
    "phi-msft", "phimoe", "phixtral", "prism_hadamard_qwen35", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "qwen3_vl_moe", "solar_open", "step3p5",
)  # fmt: skip
"""Types of models with routed experts that MLX-LM 0.32.2 computes, for messages where it is not installed."""


def is_installed() -> bool:
    """Return whether MLX-LM can be imported."""
    return find_spec("mlx_lm") is not None


def mlx_lm(module: str) -> Any:
    """Import and return ``mlx_lm.<module>``.

    Raises:
        CheckpointError: MLX-LM is not installed; code "mlx_lm_missing".
    """
    if not is_installed():
        raise CheckpointError(
            f"this model runs through mlx-lm, which is not installed: {INSTALL}", code="mlx_lm_missing"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it is imported too, and not used
    with _same_limits():
        return importlib.import_module(f"mlx_lm.{module}")


@contextmanager
def _same_limits() -> Iterator[None]:
    """Prevent changes of limits: the import would allow this process 2,048 open files, often fewer than before."""
    own = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = own


def has_experts(model_type: str) -> bool:
    """Return whether the installed MLX-LM has a file with routed experts for ``model_type``."""
    if not is_installed():
        return False
    name = mlx_lm("utils").MODEL_REMAPPING.get(model_type, model_type)
    if not isinstance(name, str) or not name.isidentifier():
        return False
    seen: set[str] = set()
    return _imports_switch(Path(mlx_lm("models").__path__[0]), name, seen)


def _imports_switch(folder: Path, name: str, seen: set[str]) -> bool:
    """Return whether the model file ``name``, or one that it imports, uses layers of routed experts."""
    seen.add(name)
    file = folder / f"{name}.py"
    if not file.is_file():
        return False
    lines = [line.split() for line in file.read_text().splitlines() if line.startswith("from .")]
    imported = {module for line in lines for module in _modules(line)}
    return _SWITCH in imported or any(_imports_switch(folder, module, seen) for module in sorted(imported - seen))


def _modules(line: list[str]) -> list[str]:
    """Return the modules of the same package that a line ``from .x import y`` or ``from . import x, y`` names."""
    if line[1] != ".":
        return [line[1].removeprefix(".")]
    return [word.strip("(),") for word in line[3:]]


def model_classes(published: Mapping[str, Any]) -> tuple[type, type]:
    """Return the classes ``Model`` and ``ModelArgs`` of MLX-LM for a ``config.json``.

    Raises:
        CheckpointError: MLX-LM is missing or has no such class.
    """
    find = signature(mlx_lm("utils").load_model).parameters["get_model_classes"].default
    try:
        model, args = find(dict(published))
    except (ValueError, AttributeError, ImportError, TypeError) as error:
        raise CheckpointError(
            f"config.json: mlx-lm has no model of type {shown(published.get('model_type'))} ({first_line(error)})",
            code="unsupported_model",
        ) from None
    return model, args


def first_line(error: BaseException) -> str:
    """Return the type of ``error`` and the beginning of its message, in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
