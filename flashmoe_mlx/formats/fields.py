"""Read and check values of a published ``config.json``, and refuse fields that would change the arithmetic."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from flashmoe_mlx.errors import CheckpointError

__all__ = ["LARGEST_SIZE", "Reader", "refuse_other_arithmetic", "shown"]

LARGEST_SIZE = 2**24
"""The limit of all sizes in a config. Products of any three sizes fit into 128 bits, and a typo fails early."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "routed_scaling_factor": (1,),
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "moe_layer_freq": (1,),
    "mlp_bias": (False,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
}
"""Fields of features that this package lacks, with the values that turn them off."""

_ARITHMETIC = re.compile(
    r"act(ivation)?|gate|gated|norm|qk_norm|scal\w*|softcap\w*|cap|capping|multiplier|rout\w+|rope|rotary|bias|window"
    r"|sinks?|topk|scor\w+|index\w*|hc|hyper|residual|alpha|limit|compress\w*|ngram|ple|latent|sparse|mlp|dense|chunk"
)
"""Words in names of fields that change the arithmetic."""

_HARMLESS = re.compile(
    r"^(mtp|use_cache|output_|router_(aux|z)_loss|router_jitter|initializer|no_repeat_ngram|encoder_no_repeat|chunk_size_feed"
    r"|mlx|vision|audio|image|video)|(_token_id|_dropout|_loss_coef|_dtype)$"
)
"""Names of fields for training, other modalities, predicting further tokens (``mtp``), or a library's behavior."""

_READ_ELSEWHERE = frozenset({
    "mlp_only_layers", "partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta", "use_sliding_window",
})  # fmt: skip
_OF_WINDOWS = ("sliding_window", "max_window_layers")
"""Fields without effect where ``use_sliding_window`` is false, as in most configs of Qwen."""


class Reader:
    """Checked access to the values of a JSON object from a ``config.json``.

    Methods that return a value raise CheckpointError if it is missing, mistyped or out of range. A null value counts as
    missing.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def size(self, name: str, default: int | None = None, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """Return the integer ``name``, which must be from ``least`` to ``most``; ``default`` if it has no value."""
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise _refused(f"{name} is {shown(value)}; it must be an integer from {least} to {most}")
        return value

    def number(self, name: str, default: float | None, most: float) -> float:
        """Return the number ``name``, which must be above 0 and at most ``most``; ``default`` if it has no value."""
        value = self._get(name, default)
        # Written so that NaN fails.
        if type(value) not in (int, float) or not 0 < value <= most:
            raise _refused(f"{name} is {shown(value)}; it must be above 0 and at most {most:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return the truth value ``name``; ``default`` if it has no value."""
        value = self._get(name, default)
        if type(value) is not bool:
            raise _refused(f"{name} is {shown(value)}; it must be true or false")
        return value

    def has(self, name: str) -> bool:
        """Return whether ``name`` has a value other than null."""
        return self._values.get(name) is not None

    def is_on(self, name: str) -> bool:
        """Return whether ``name`` has a value other than 0, which disables some fields in transformers."""
        return self.has(name) and self._values[name] != 0

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise _refused(f"{name} is missing")
        return value


def refuse_other_arithmetic(
    text: Mapping[str, Any], computed: Mapping[str, tuple[Any, ...]], read: Collection[str] = ()
) -> None:
    """Refuse the config of a text model if a field asks for arithmetic that this package does not implement.

    An unknown field is refused if its name suggests arithmetic and its value does not turn the feature off; any other
    unknown field is ignored.

    Args:
        text: the text model's part of a ``config.json``.
        computed: values of fields that the model's family computes with.
        read: names of further fields that the family reads and checks.

    Raises:
        CheckpointError: the model needs other arithmetic; the message names the field.
    """
    fixed = {**computed, **{name: values for name, values in _NEUTRAL.items() if name not in read}}
    for name, supported in fixed.items():
        value = text.get(name)
        if value is not None and not any(_same(value, choice) for choice in supported):
            choices = " or ".join(shown(choice) for choice in supported)
            raise _unsupported(f"{name} is {shown(value)}; this version supports only {choices}")
    if "mlp_only_layers" not in read and not _off(text.get("mlp_only_layers")):
        raise _unsupported("mlp_only_layers: layers without experts are not supported")
    if not _off(text.get("use_sliding_window")):
        raise _unsupported("use_sliding_window: attention over a window is not supported")
    no_windows = "use_sliding_window" in text
    known = {*fixed, *read, *_READ_ELSEWHERE, *(_OF_WINDOWS if no_windows else ())}
    for name, value in text.items():
        if name in known or _off(value) or _HARMLESS.search(name):
            continue
        if any(_ARITHMETIC.fullmatch(word) for word in (name.lower(), *re.findall("[a-z0-9]+", name.lower()))):
            called = name if name.isidentifier() else shown(name)
            raise _unsupported(
                f"{called} is {shown(value)}; this version does not know that field, which may change results"
            )


def _off(value: Any) -> bool:
    """Return whether ``value`` is one with which configs turn a feature off."""
    return value is None or value is False or value in (0, "", "none") or value in ([], {})


def _same(value: Any, known: Any) -> bool:
    """Return whether two values are equal; true does not equal 1."""
    return bool(value == known) and isinstance(value, bool) == isinstance(known, bool)


def shown(value: Any) -> str:
    """Format a value from a config for a message: on one line, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _refused(problem: str) -> CheckpointError:
    return CheckpointError(f"config.json: {problem}", code="invalid_config")


def _unsupported(problem: str) -> CheckpointError:
    return CheckpointError(f"config.json: {problem}; use mlx-lm for this model", code="unsupported_arithmetic")
