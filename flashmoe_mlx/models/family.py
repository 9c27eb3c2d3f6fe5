"""The protocol of a model family: all that the package needs to know about it.

A family is a module of this package with a ``FAMILY``; ``registry.py`` finds it. Its class of configurations
(``config.py``) composes layers from blocks (``blocks.py``).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flashmoe_mlx.models.build import build_model
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.decoder import Model

__all__ = ["Family", "TensorNames"]

Config = TypeVar("Config", bound=ModelConfig)
"""The class of a family's configurations."""


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names of tensors in the published checkpoints of a family.

    Canonical names are those of ``parameters.py``. Names of routed experts differ between three layouts: stacked, as
    in MLX conversions, which also store norms and convolutions as the model uses them; fused; and separate.

    Attributes:
        prefixes: (published, canonical) prefixes; the first published prefix of a name is replaced.
        skipped: matches canonical names of tensors that text does not need.
        kept: matches canonical names of tensors that a pack keeps as they are published, though this version does not
            use them; None for no such tensors.
        experts: the prefix of the names of a layer's experts, with ``{layer}``.
        stacked: after that prefix, a matrix of all experts [experts, out, in], with ``{projection}``.
        fused: after that prefix, gate and up [experts, 2 * size, hidden], and down [experts, hidden, size].
        separate: after that prefix, a matrix of one expert [out, in], with ``{expert}`` and ``{projection}``.
        projections: the names of the projections gate, up and down in published checkpoints.
    """

    prefixes: tuple[tuple[str, str], ...] = ()
    skipped: re.Pattern[str] = re.compile(r"\.rotary_emb\.inv_freq$")
    kept: re.Pattern[str] | None = None
    experts: str = "model.layers.{layer}.mlp."
    stacked: str = "switch_mlp.{projection}"
    fused: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    separate: str = "experts.{expert}.{projection}"
    projections: Mapping[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )


@dataclass(frozen=True, slots=True)
class Family(Generic[Config]):
    """A family of models with one architecture.

    Attributes:
        model_types: values of ``model_type`` in ``config.json``.
        series: names of its series of models, for messages.
        example: the name of a small model, for messages.
        config: the class of its configurations.
        parse_config: reads a ``config.json`` of one of its ``model_types``, which is untrusted input: every number is
            checked there, once, and the rest of the package relies on it. Raises CheckpointError.
        write_config: returns the ``config.json`` of a model from sizes under the names of ``config``'s fields.
        tensor_names: names in its published checkpoints.
        tool_format: the name of a module in ``text/tool_formats``: how its models write tool calls, unless the chat
            template of a model shows another format.
        published: for each hub id of a published model, the fields of ``config.json`` that determine its sizes.
        build: builds a model; it takes the arguments of ``build.build_model``.
    """

    model_types: tuple[str, ...]
    series: tuple[str, ...]
    example: str
    config: type[Config]
    parse_config: Callable[[Mapping[str, Any]], Config]
    write_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensor_names: TensorNames
    tool_format: str
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    build: Callable[..., Model] = build_model
