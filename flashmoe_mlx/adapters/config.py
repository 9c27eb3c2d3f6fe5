"""The sizes of a model of MLX-LM, found by constructing its modules without weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlx.utils import tree_flatten

from flashmoe_mlx.adapters.library import first_line, model_classes
from flashmoe_mlx.adapters.switches import Switch, find_switches
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import LARGEST_SIZE, shown
from flashmoe_mlx.models.config import MOST_EXPERTS, MOST_LAYERS, ModelSize

_CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts", "n_activated_experts", "top_k",
)  # fmt: skip
"""Names of the number of experts that a token chooses."""
_CONTEXT = ("max_position_embeddings", "model_max_length", "max_seq_len", "max_sequence_length", "n_positions")
_VOCABULARY = ("vocab_size", "num_vocab", "padded_vocab_size")
_HIDDEN = ("hidden_size", "model_dim", "n_embd", "dim")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
_CONTEXT_UNKNOWN = 32_768
_LIMITS = (
    ("size", LARGEST_SIZE), ("dim", LARGEST_SIZE), ("per_tok", MOST_EXPERTS), ("layer", MOST_LAYERS),
    ("expert", MOST_EXPERTS), ("head", LARGEST_SIZE), ("block", MOST_LAYERS),
)  # fmt: skip
"""The largest numbers in fields whose names contain a word; the first word decides."""


@dataclass(frozen=True, slots=True)
class AdaptedConfig(ModelSize):
    """The sizes of a model that MLX-LM's own class computes.

    Attributes:
        model_type: the type of the model in ``config.json``.
        module: the name of MLX-LM's module with its class.
        resident_weights: the weights that are not in routed experts.
        expert_weights: the weights of a routed expert, on average over the layers.
        cache_width: the elements that all layers keep for a token of a sequence, at most.
    """

    model_type: str
    module: str
    resident_weights: int
    expert_weights: int
    cache_width: int


def parse_config(published: Mapping[str, Any]) -> AdaptedConfig:
    """Construct the modules of a model of MLX-LM without weights, and measure them.

    Raises:
        CheckpointError: MLX-LM is missing, has no class for this ``config.json``, or refuses it; or no layer has routed
            experts.
    """
    return _parsed(json.dumps(published, sort_keys=True))


@lru_cache(maxsize=8)
def _parsed(published: str) -> AdaptedConfig:
    config = json.loads(published)
    if config.get("model_file") is not None:
        raise CheckpointError(
            "config.json: model_file names code in the checkpoint, which is never run", code="unsupported_model"
        )
    _refuse_extreme_sizes(config)
    model_class, args_class = model_classes(config)
    try:
        args = args_class.from_dict(config)  # type: ignore[attr-defined]
        model = model_class(args)
        switches = find_switches(model)
    except Exception as error:  # the code of another package meets untrusted input
        raise CheckpointError(
            f"config.json: mlx-lm cannot construct this model ({first_line(error)})", code="unsupported_model"
        ) from None
    if not switches:
        raise CheckpointError(
            f"config.json: this model of type {shown(config.get('model_type'))} has no layer with routed experts, so "
            "there is nothing to stream; use mlx-lm for it",
            code="dense_model",
        )
    sizes = [array.size for switch in switches for array in switch.parameters().values()]
    experts = max(_experts(switch) for switch in switches)
    whole = sum(array.size for array in dict(tree_flatten(model.parameters())).values())
    return AdaptedConfig(
        num_layers=len(switches),
        hidden_size=_size(args, _HIDDEN) or _inputs(switches[0]),
        vocab_size=_size(args, _VOCABULARY) or LARGEST_SIZE,
        max_context=_size(args, _CONTEXT) or _CONTEXT_UNKNOWN,
        num_experts=experts,
        experts_per_token=chosen_field(args)[1],
        expert_size=_outputs(switches[0]),
        model_type=str(config["model_type"]),
        module=model_class.__module__.rpartition(".")[2],
        resident_weights=whole - sum(sizes),
        expert_weights=sum(sizes) // (experts * len(switches)),
        cache_width=(_size(args, _LAYERS) or len(switches)) * _kept_by_layer(args),
    )


def chosen_field(args: Any) -> tuple[tuple[str, ...], int]:
    """Return the place of the number of experts that a token chooses in the arguments of a model, and the number."""
    for place, value in _fields(args):
        if place[-1] in _CHOSEN:
            number = max((item for item in value if type(item) is int), default=0) if isinstance(value, list) else value
            if type(number) is int and number > 0:
                return place, number
    return (), 1


def _kept_by_layer(args: Any) -> int:
    """Return the elements that a layer keeps for a token: keys and values, or a latent vector."""
    latent = _size(args, ("kv_lora_rank",))
    if latent is not None:
        return latent + (_size(args, ("qk_rope_head_dim",)) or 0)
    heads = _size(args, ("num_attention_heads", "num_heads")) or 1
    width = _size(args, ("head_dim",)) or (_size(args, _HIDDEN) or 0) // heads
    return 2 * width * (_size(args, ("num_key_value_heads", "num_attention_groups")) or heads)


def _size(args: Any, names: tuple[str, ...]) -> int | None:
    fields = {place: value for place, value in _fields(args) if type(value) is int and value > 0}
    for name in names:
        for place, value in fields.items():
            if place[-1] == name and "vision_config" not in place:
                return int(value)
    return None


def _fields(args: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the fields of the arguments of a model, its text part first; nested ones may be objects or mappings."""
    inside = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    nested = {name: value for name, value in inside.items() if name in ("text_config", "llm_config")}
    for name, value in nested.items():
        yield from _fields(value, (*place, name))
    for name, value in inside.items():
        yield (*place, name), value


def _experts(switch: Switch) -> int:
    return max(int(linear.num_experts) for linear in switch.linears().values())


def _inputs(switch: Switch) -> int:
    return int(next(iter(switch.linears().values())).input_dims)


def _outputs(switch: Switch) -> int:
    return int(next(iter(switch.linears().values())).output_dims)


def _refuse_extreme_sizes(value: Any, name: str = "") -> None:
    """Raise CheckpointError if a number would make Python construct modules without end."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_extreme_sizes(item, str(key))
    elif isinstance(value, list):
        for item in value:
            _refuse_extreme_sizes(item, name)
    elif type(value) is int:
        most = next((limit for word, limit in _LIMITS if word in name), None)
        if most is not None and abs(value) > most:
            raise CheckpointError(
                f"config.json: {name} is {shown(value)}, at most {most} is possible", code="invalid_config"
            )
