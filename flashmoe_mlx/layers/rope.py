"""Rotary position embedding as a ``config.json`` describes it: the plain one, and YaRN for longer contexts.

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

_SUPPORTED = ("default", "yarn")
_KNOWN = frozenset({
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", "factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "finetuned",
})  # fmt: skip
"""Those of YaRN have no effect on the plain embedding, as in transformers."""


@dataclass(frozen=True, slots=True)
class Yarn:
    """Settings of YaRN: frequencies that turn less than ``beta_slow`` times within ``original_context`` tokens are
    divided by ``factor``, those that turn more than ``beta_fast`` times are kept, between them it blends.

    Rotated queries and keys are multiplied by ``attention_factor``. ``truncate`` rounds the bounds outwards.
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
        """Compute the angle in radians by which each of the dim / 2 pairs is turned for each position."""
        pairs = self.dim // 2
        plain = [self.theta ** (-pair / pairs) for pair in range(pairs)]
        if self.yarn is None:
            return tuple(plain)
        low, high = self._blended(self.yarn)
        stretched = []
        for pair, frequency in enumerate(plain):
            share = min(1.0, max(0.0, (pair - low) / (high - low)))
            stretched.append(frequency * (1.0 - share) + frequency / self.yarn.factor * share)
        return tuple(stretched)

    def _blended(self, yarn: Yarn) -> tuple[float, float]:
        """Bounds, as numbers of pairs, of the frequencies that are neither kept nor divided."""
        low, high = (
            self.dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (yarn.beta_fast, yarn.beta_slow)
        )
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        return low, high + 0.001 if low == high else high


def read_rope(text: Mapping[str, Any], head_dim: int, max_context: int, fraction: float) -> Rope:
    """Read the rotary settings of a text model's config: nested since transformers 5, beside the sizes before.

    Raises:
        CheckpointError: they are missing, malformed, out of range, of another kind than ``default`` and ``yarn``, or
            given twice and different.
    """
    nested = _nested(text)
    kind = _kind(nested)
    if kind not in _SUPPORTED:
        raise CheckpointError(
            f"config.json: rope type {shown(kind)} is not supported, 'default' and 'yarn' are; use mlx-lm",
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
    """Return the nested settings; of two that differ transformers takes rope_scaling, mlx-lm the other."""
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
        what = differing[0] if differing else "rope_type"
        raise CheckpointError(
            f"config.json: rope_parameters and rope_scaling differ in {shown(what)}; keep one of them",
            code="contradicting_rope",
        )
    return {**old, **new}


def _kind(nested: Mapping[str, Any]) -> Any:
    kind = nested.get("rope_type") or nested.get("type") or "default"
    return "default" if kind == "mrope" else kind  # an older name: positions of images; text has the plain ones


def _read_yarn(read: Reader, text: Mapping[str, Any], theta: float, max_context: int) -> Yarn:
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta:g}; YaRN needs more than 1", code="invalid_config")
    # As transformers: the field beside the sizes rules, and without either the context is the original one.
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
    """Return the stated factor, or the one that the paper suggests for ``factor``."""
    if read.has("attention_factor"):
        return read.number("attention_factor", None, most=LARGEST_SIZE)

    def suggested(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if read.is_on("mscale") and read.is_on("mscale_all_dim"):
        above, below = (read.number(name, None, most=LARGEST_SIZE) for name in ("mscale", "mscale_all_dim"))
        return suggested(above) / suggested(below)
    return suggested(1.0)
