"""Names of published models by their ``model_type``, for messages about models that no family runs."""

from collections.abc import Mapping

MIXTURES: Mapping[str, str] = {
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
    "qwen3_vl_moe": "Qwen3-VL",
    "step3p7": "Step-3.7-Flash",
}
"""Mixtures of experts."""
DENSE: Mapping[str, str] = {
    "qwen3_5": "Qwen3.5-27B, Qwen3.6-27B, Qwen3.8-27B and smaller",
    "qwen3_5_text": "Qwen3.5-27B, Qwen3.6-27B, Qwen3.8-27B and smaller",
    "qwen3": "Qwen3-32B and smaller",
}
"""Models without experts."""
