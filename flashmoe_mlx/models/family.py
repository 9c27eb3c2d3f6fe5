"""The protocol of a model family: everything that the engine asks of one.

A module of this package with a ``FAMILY`` is a family; ``registry.py`` finds it by its ``model_types``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flashmoe_mlx.models.config import ModelConfig

Config = TypeVar("Config", bound=ModelConfig)
"""The family's own class of configurations."""


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names of tensors in the published checkpoints of a family.

    Names of single tensors are relative to the layer's ``experts``; those of stacked and fused experts differ between
    layouts. A checkpoint that has ``stacked`` tensors is an MLX conversion, which stores norms and convolutions as the
    model uses them.

    Attributes:
        prefixes: (published, canonical) prefixes of names; the first that fits is replaced.
        skipped: matches canonical names of tensors that text does not need.
        experts: the prefix of the names of a layer's experts, with ``{layer}``.
        stacked: matrices of all experts of a layer, [experts, out, in], with ``{projection}``.
        fused: gate and up [experts, 2 * size, hidden], then down [experts, hidden, size].
        separate: a matrix of one expert, with ``{expert}`` and ``{projection}``.
        projections: the family's names of the projections gate, up and down.
    """

    prefixes: tuple[tuple[str, str], ...] = ()
    skipped: re.Pattern[str] = re.compile(r"\.rotary_emb\.inv_freq$")
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
        example: the name of a small model of it, for messages.
        config: the class of its configurations.
        parse_config: reads a ``config.json`` of one of its ``model_types``, which is untrusted input: every number is
            checked there, once, and the rest of the package relies on it. Raises CheckpointError.
        write_config: returns the ``config.json`` of a model from sizes under the names of ``config``'s fields.
        tensor_names: names in its published checkpoints.
        tool_format: the name of a module in ``text/tool_formats``: how its models write tool calls.
        published: for each hub id of a published model, the fields of ``config.json`` that determine its sizes.
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
