"""Which kinds of model this package runs, and what to say of the others."""

import re
from collections.abc import Mapping
from typing import Any

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import shown

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
"""``model_type`` of the models that run, in their ``config.json``."""
RUNS = "this version runs the mixture-of-experts models of Qwen3.5, Qwen3.6 and Qwen3.8 (Qwen3.5-35B-A3B, for example)"

_NAMES: Mapping[str, str] = {
    "bailing_hybrid": "Ling 3",
    "deepseek_v3": "DeepSeek-V3, DeepSeek-R1",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "ernie4_5_moe": "Ernie 4.5",
    "gemma4": "Gemma 4",
    "glm4_moe": "GLM-4.5 to GLM-4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm5_next": "GLM-5.3-Flash",
    "glm_moe_dsa": "GLM-5",
    "gpt_oss": "gpt-oss",
    "granitemoe": "Granite 3",
    "granitemoehybrid": "Granite 4",
    "hy_v3": "Hunyuan Hy3",
    "kimi_k2": "Kimi K2",
    "kimi_k25": "Kimi K2.5",
    "kimi_k3": "Kimi K3",
    "laguna": "Laguna",
    "lfm2_moe": "LFM2",
    "llama4": "Llama 4",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minimax_m2": "MiniMax-M2",
    "minimax_m3": "MiniMax-M3",
    "mixtral": "Mixtral",
    "nemotron_h": "Nemotron 3, Nemotron-H",
    "olmoe": "OLMoE",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3_moe": "Qwen3-235B-A22B, Qwen3-30B-A3B, Qwen3-Coder",
    "qwen3_next": "Qwen3-Next, Qwen3-Coder-Next",
    "qwen3_vl_moe": "Qwen3-VL",
    "qwen4_exp": "Qwen3.8-Flash-Next",
    "step3p7": "Step-3.7-Flash",
}
"""Published mixtures of experts by their ``model_type``."""
_DENSE: Mapping[str, str] = {
    "qwen3_5": "Qwen3.5-27B, Qwen3.6-27B, Qwen3.8-27B and smaller",
    "qwen3_5_text": "Qwen3.5-27B, Qwen3.6-27B, Qwen3.8-27B and smaller",
    "qwen3": "Qwen3-32B and smaller",
}
_COUNT_OF_EXPERTS = re.compile(r"(moe_)?n(um)?_(\w+_)?experts")


def refuse_other_family(published: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless ``published``, a ``config.json``, is that of a model that this package runs."""
    if published.get("model_type") is None:
        raise CheckpointError("config.json: model_type is missing: not the config of a model", code="invalid_config")
    text = published.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if published["model_type"] in MODEL_TYPES and inner in (None, *MODEL_TYPES):
        return
    kind = published["model_type"] if published["model_type"] not in MODEL_TYPES else inner
    name = kind if isinstance(kind, str) else ""
    if name not in _NAMES and not _has_experts(published):
        models = f" ({_DENSE[name]})" if name in _DENSE else ""
        raise CheckpointError(
            f"config.json: model_type {shown(kind)}{models} is a dense model: its config names no experts, so there is "
            f"nothing to stream; use mlx-lm for it. {RUNS[0].upper()}{RUNS[1:]}",
            code="dense_model",
        )
    models = f" ({_NAMES[name]})" if name in _NAMES else ""
    raise CheckpointError(
        f"config.json: model_type {shown(kind)}{models} is not supported; {RUNS}", code="unsupported_model"
    )


def _has_experts(holder: Mapping[str, Any], depth: int = 3) -> bool:
    """Whether a config counts experts, itself or in one of its parts (text_config, llm_config, thinker_config)."""
    parts = [value for value in holder.values() if isinstance(value, Mapping)] if depth else []
    counted = any(value and _COUNT_OF_EXPERTS.fullmatch(name) for name, value in holder.items())
    return counted or any(_has_experts(part, depth - 1) for part in parts)
