"""Rotary position embedding as described by a ``config.json``: plain, or with YaRN for longer contexts.

Sources: transformers ``modeling_rope_utils.py`` (``_compute_yarn_parameters``, ``standardize_rope_params``); YaRN:
https://arxiv.org/abs/2309.00071.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import LARGEST_SIZE, Reader, shown
from flashmoe_mlx.formats.untrusted import same_json

__all__ = ["Rope", "Yarn", "read_rope"]

_SUPPORTED = ("default", "yarn")
_KNOWN = frozenset({
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", "factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "finetuned",
})  # fmt: skip
"""Known settings; the settings of YaRN have no effect on the plain embedding, as in transformers."""


@dataclass(frozen=True, slots=True)
class Yarn:
    """Settings of YaRN, which divides low frequencies by ``factor``, keeps high frequencies, and blends between them.

    Attributes:
        factor: the divisor.
        original_context: the context in tokens before the extension.
        attention_factor: the factor of rotated queries and keys.
        beta_fast: rotations within the original context above which a frequency is kept.
        beta_slow: rotations within the original context below which a frequency is divided.
        truncate: whether the bounds of blending are rounded outwards to whole pairs.
    """

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of the first ``dim`` dimensions of each head with base ``theta``."""

    dim: int
    theta: float
    yarn: Yarn | None = None

    def frequencies(self) -> tuple[float, ...]:
        """Compute the angles in radians by which the dim / 2 pairs are rotated for each position."""
        pairs = self.dim // 2
        plain = [self.theta ** (-pair / pairs) for pair in range(pairs)]
        if self.yarn is None:
            return tuple(plain)
        low, high = self._blended(self.yarn)
        scaled = []
        for pair, frequency in enumerate(plain):
            divided = min(1.0, max(0.0, (pair - low) / (high - low)))
            scaled.append(frequency * (1.0 - divided) + frequency / self.yarn.factor * divided)
        return tuple(scaled)

    def _blended(self, yarn: Yarn) -> tuple[float, float]:
        """Return the bounds of the blended frequencies, as numbers of pairs."""
        low, high = (
            self.dim * math.log(yarn.original_context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))
            for rotations in (yarn.beta_fast, yarn.beta_slow)
        )
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        return low, high + 0.001 if low == high else high


def read_rope(text: Mapping[str, Any], head_dim: int, max_context: int, fraction: float) -> Rope:
    """Read the rotary settings of a text model.

    They are nested since transformers 5, and lie beside the sizes in older configs.

    Args:
        text: the text model's part of a ``config.json``.
        head_dim: the width of a head.
        max_context: the context in tokens.
        fraction: the rotated part of a head if the config does not state it.

    Raises:
        CheckpointError: settings are missing, malformed, out of range or contradictory, or the kind is neither
            ``default`` nor ``yarn``.
    """
    nested = _nested(text)
    kind = _kind(nested)
    if kind not in _SUPPORTED:
        raise CheckpointError(
            f"config.json: rope type {shown(kind)} is not supported; supported: 'default' and 'yarn'; use mlx-lm",
            code="unsupported_arithmetic",
        )
    unknown = sorted(name for name in nested.keys() - _KNOWN if nested[name])
    if unknown:
        raise CheckpointError(
            f"config.json: rope_parameters holds {shown(unknown[0])}, which this version does not know and which may "
            "change results",
            code="unsupported_arithmetic",
        )
    flat = {name: text[name] for name in ("rope_theta", "partial_rotary_factor") if text.get(name) is not None}
    read = Reader({**flat, **{name: value for name, value in nested.items() if value is not None}})
    dim = int(head_dim * read.number("partial_rotary_factor", fraction, most=1.0))
    if dim < 2 or dim % 2:
        raise CheckpointError(
            f"config.json: {dim} rotary dimensions of {head_dim}; they must be even, 2 or more", code="invalid_config"
        )
    theta = read.number("rope_theta", None, most=1e12)
    return Rope(dim, theta, _read_yarn(read, text, theta, max_context) if kind == "yarn" else None)


def _nested(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the nested settings; refuse two that differ, since transformers and mlx-lm disagree about them."""
    given = {name: text[name] for name in ("rope_parameters", "rope_scaling") if text.get(name)}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {name} is not an object", code="invalid_config")
    if len(given) < 2:
        return next(iter(given.values()), {})
    new, old = given.values()
    differing = sorted(
        name for name in new.keys() & old.keys() - {"rope_type", "type"} if not same_json(new[name], old[name])
    )
    if _kind(new) != _kind(old) or differing:
        name = differing[0] if differing else "rope_type"
        raise CheckpointError(
            f"config.json: rope_parameters and rope_scaling differ in {shown(name)}; remove one of them",
            code="contradicting_rope",
        )
    return {**old, **new}


def _kind(nested: Mapping[str, Any]) -> Any:
    kind = nested.get("rope_type") or nested.get("type") or "default"
    return "default" if kind == "mrope" else kind  # an older name, for positions of images; text has plain positions


def _read_yarn(read: Reader, text: Mapping[str, Any], theta: float, max_context: int) -> Yarn:
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta:g}; YaRN needs more than 1", code="invalid_config")
    # As in transformers, the field beside the sizes takes precedence; without both, the context is the original one.
    holder = Reader(text) if text.get("original_max_position_embeddings") is not None else read
    original = holder.size("original_max_position_embeddings", max_context)
    factor = read.number("factor", max_context / original, most=LARGEST_SIZE)
    if factor < 1:
        raise CheckpointError(f"config.json: factor is {factor:g}; YaRN needs 1 or more", code="invalid_config")
    fast = read.number("beta_fast", 32.0, most=LARGEST_SIZE) if read.is_on("beta_fast") else 32.0
    slow = read.number("beta_slow", 1.0, most=LARGEST_SIZE) if read.is_on("beta_slow") else 1.0
    if fast < slow:
        raise CheckpointError(
            f"config.json: beta_fast is {fast:g}, below beta_slow, which is {slow:g}", code="invalid_config"
        )
    return Yarn(factor, original, _attention_factor(read, factor), fast, slow, read.flag("truncate", True))


def _attention_factor(read: Reader, factor: float) -> float:
    """Return the stated attention factor, or the one that the paper suggests for ``factor``."""
    if read.has("attention_factor"):
        return read.number("attention_factor", None, most=LARGEST_SIZE)

    def suggested(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if read.is_on("mscale") and read.is_on("mscale_all_dim"):
        above, below = (read.number(name, None, most=LARGEST_SIZE) for name in ("mscale", "mscale_all_dim"))
        return suggested(above) / suggested(below)
    return suggested(1.0)
