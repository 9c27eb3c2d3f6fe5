"""Recognize formats of published weights, by config, by name, and by tensors.

Sources of the settings: mlx ``nn.layers.quantized`` and mlx_lm ``utils.load_model`` (``quantization``); transformers
``quantizers/auto.py`` (``quantization_config``); NVIDIA modelopt's ``hf_quant_config.json``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flashmoe_mlx.checkpoint.coded_formats import Codes
from flashmoe_mlx.formats.fields import shown
from flashmoe_mlx.formats.record import AFFINE, FLOAT_MODES
from flashmoe_mlx.formats.safetensors_header import TensorInfo

USE_INSTEAD = "use the original bf16 checkpoint, or an MLX conversion in affine mode"

_METHODS: Mapping[str, str] = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "autoround": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "fp8": "FP8",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "modelopt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""Usual names of the methods, by ``quant_method``."""
_AUTO_ROUND: Mapping[str, str] = {
    "auto_round:gptq": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round:awq": "awq",
    "auto_round:auto_awq": "awq",
}
"""Methods whose layout AutoRound's weights have, by ``packing_format``."""
_LEGACY = {
    "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes", "config_groups": "compressed-tensors",
    "zero_point": "AWQ", "desc_act": "GPTQ", "damp_percent": "GPTQ", "sym": "GPTQ",
}  # fmt: skip
"""Settings that reveal a method where ``quant_method`` is absent; ``load_in_*`` counts only if it is true."""
_QUOTES = "'\""
_KEYS = ("quantization", "quantization_config", "compression_config")
_NOT_TEXT = re.compile(r"(^|\.)(visual|vision_tower|vision_model|mtp|audio_tower)(\.|$)")

_IN_NAMES = re.compile(
    r"(?:^|[-_./])(GGUF|NVFP4|MXFP4|MXFP8|HQQ|EXL2|EXL3|AQLM|EETQ|VPTQ|bnb|bitsandbytes"
    r"|INT4|INT8|W[48]A(?:4|8|16)(?:KV8)?|NVFP4A16|torchao|QuIP|ONNX|CoreML|IQ\d_\w+|Q\d_(?:K(?:_[SML]|_XL)?|[01]))(?=$|[-_.\d])",
    re.IGNORECASE,
)
_DECODED_IN_NAMES = re.compile(r"(?:^|[-_./])(?:GPTQ|AWQ|AutoRound)(?:$|[-_.\d])", re.IGNORECASE)
_MLX_IN_NAMES = re.compile(r"(?:^|[-_./])mlx(?:$|[-_./])|^mlx-community/", re.IGNORECASE)

_BY_PARTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.weight_scale_inv$"), "FP8 in blocks (weight_scale_inv)"),
    (re.compile(r"\.(weight_scale_2|input_scale)$"), "modelopt FP8 or NVFP4 (weight_scale_2, input_scale)"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors (weight_packed)"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ (qweight, qzeros)"),
    (re.compile(r"\.(absmax|quant_map|nested_absmax)$|\.quant_state\."), "bitsandbytes (absmax, quant_map)"),
    (re.compile(r"\.(W_q|meta)$"), "HQQ (W_q)"),
    (re.compile(r"_blocks$"), "MXFP4 (blocks and scales)"),
    (re.compile(r"\.weight_scale$"), "FP8 or compressed-tensors (weight_scale)"),
    (re.compile(r"\.lora_(A|B|embedding_A)\b|\.base_layer\."), "a LoRA adapter that is not merged into its model"),
)
"""Names of tensors that only unreadable formats have, with descriptions of these formats."""


def mlx_settings(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization settings of an MLX conversion; empty for any other checkpoint.

    As in mlx-lm, ``quantization`` takes precedence over ``quantization_config``. Both may be in the text part of the
    config.
    """
    _, settings = next(_settings(published), ("", None))
    return settings if isinstance(settings, Mapping) and _method(settings) is None else {}


def coded_weights(published: Mapping[str, Any]) -> Codes | None:
    """Return the format of weights that are decoded when they are packed; None for all other checkpoints."""
    _, settings = next(_settings(published), ("", None))
    return _codes(settings) if isinstance(settings, Mapping) else None


def unreadable_format(published: Mapping[str, Any]) -> str | None:
    """Return the reason, in one line, why the weights of this ``config.json`` cannot be read; None if they can."""
    for key, settings in _settings(published):
        if not isinstance(settings, Mapping):
            return f"{key} is {shown(settings)}, which is not a known quantization; {USE_INSTEAD}"
        if (codes := _codes(settings)) is not None:
            variant = codes.unreadable()
            return None if variant is None else f"weights quantized with {variant} are not supported; {USE_INSTEAD}"
        if (named := _method(settings)) is not None:
            return f"weights quantized with {named} are not supported; {USE_INSTEAD}"
        for module, entry in settings.items():
            mode = entry.get("mode") if isinstance(entry, Mapping) and not _NOT_TEXT.search(module) else None
            if mode not in (None, AFFINE, *FLOAT_MODES):
                return (
                    f"{shown(module)} is quantized in MLX's mode {shown(mode)}, which is not supported; {USE_INSTEAD}"
                )
        if key == "quantization":
            return None  # in a conversion, the remaining keys describe its original
    return None


def format_in_name(name: str) -> str | None:
    """Return the unreadable format that the name of a repository on the hub states, or None.

    Names of MLX conversions count as readable: such a name may state a mode of MLX or the format of the original.
    """
    decoded = _DECODED_IN_NAMES.search(name)
    for match in _IN_NAMES.finditer(name):
        if decoded and match[1].upper() in ("INT4", "INT8"):
            continue
        if not _MLX_IN_NAMES.search(name):
            return match[1]
    return None


def format_of_tensors(tensors: Iterable[tuple[str, str]]) -> str | None:
    """Return the unreadable format that the names and types of ``tensors`` reveal, or None."""
    names, float8 = [], False
    for name, dtype in tensors:
        names.append(name)
        float8 |= dtype in ("F8_E4M3", "F8_E5M2") and name.endswith(".weight")
    for pattern, description in _BY_PARTS:
        if any(pattern.search(name) for name in names):
            return description
    return "FP8" if float8 else None


def mlx_mode(dense_columns: int, weight: TensorInfo, scales: TensorInfo) -> str | None:
    """Return the mode of MLX in which a weight with scales of one byte was quantized, by its shapes, or None."""
    if scales.dtype != "U8" or weight.dtype != "U32" or not scales.shape or not weight.shape or not scales.shape[-1]:
        return None
    modes = {sizes: mode for mode, sizes in FLOAT_MODES.items()}
    bits, rest = divmod(weight.shape[-1] * 32, dense_columns)
    return None if rest else modes.get((bits, dense_columns // scales.shape[-1]))


def _settings(published: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (key, settings) of a config and of its text part, in the order of precedence."""
    text = published.get("text_config")
    for key in _KEYS:
        for holder in (published, text if isinstance(text, Mapping) else {}):
            if holder.get(key) not in (None, False, {}):
                yield key, holder[key]


def _codes(settings: Mapping[str, Any]) -> Codes | None:
    """Return the format of ``settings`` if it is one that can be decoded, or a variant of one."""
    method = settings.get("quant_method")
    if method is None and _method(settings) in ("AWQ", "GPTQ"):
        method = str(_method(settings))
    method = method.lower() if isinstance(method, str) else None
    if method in ("auto-round", "autoround") and isinstance(packing := settings.get("packing_format"), str):
        method, settings = _AUTO_ROUND.get(packing), {**settings, "checkpoint_format": "gptq"}
    return Codes(method, settings) if method in ("fp8", "gptq", "awq") else None


def _method(settings: Mapping[str, Any]) -> str | None:
    """Return the name of the method of ``settings``; None for MLX's affine mode."""
    method = settings.get("quant_method")
    keys = ("quant_algo", "packing_format", "format", "fmt")
    algorithm = next((settings[key] for key in keys if settings.get(key)), None)
    detail = f" ({shown(algorithm).strip(_QUOTES)})" if algorithm else ""
    if method is None:
        mode = settings.get("mode")
        if mode not in (None, AFFINE, *FLOAT_MODES):
            return f"MLX's mode {shown(mode)}"
        if settings.get("quant_algo") is not None:
            return f"modelopt{detail}"
        found = (
            name for key, name in _LEGACY.items() if settings.get(key) or (key in settings and "load_in" not in key)
        )
        return next(found, None)
    if method in ("affine", "mlx"):
        return None
    known = _METHODS.get(method.lower()) if isinstance(method, str) else None
    return f"{known or shown(method)}{detail}"
