"""Names of tensors in published checkpoints, and the layout that they reveal where one is missing."""

import re
from collections.abc import Collection

from flashmoe_mlx.models.family import TensorNames

_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
"""Prefixes that torch.compile, torch's data parallelism and PEFT give every name."""
_INNER_WRAPPER = "._orig_mod."
_BARE = re.compile(r"^(?:language_model\.)?(layers\.|embed_tokens\.|norm\.weight$)")
"""Names of a text model that was saved separately."""
_PART = re.compile(r"\.shards\.(\d+)\.")
"""A part of a table, as mlx-vlm names it."""
_SHOWN = 4

_HINTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"\.(switch_mlp\.gate_up_proj|experts\.\d+\.gate_up_proj|experts\.gate_up_proj(?=\.)|experts\.w13)"),
        "gate_proj and up_proj of the experts are fused in {}",
    ),
    (re.compile(r"\.(experts\.gate_proj)"), "the experts are stacked by projection under Hugging Face's name, {}"),
    (re.compile(r"\.(experts\.(?:\d+\.)?w1)\b"), "the experts are called w1, w2 and w3 ({})"),
    (re.compile(r"\.self_attn\.(qkv_proj)"), "the projections of attention are fused in {}"),
    (re.compile(r"\.linear_attn\.(in_proj_qkvz)"), "the projections of linear attention are fused in {}"),
    (re.compile(r"\.(block_sparse_moe)\."), "the experts are under {}"),
)
"""Parts of names that only unsupported layouts have, with descriptions of these layouts."""


def canonical_name(name: str, names: TensorNames) -> str:
    """Return the name that mlx-community gives the tensor ``name``, without ``language_model.``."""
    name = name.replace(_INNER_WRAPPER, ".")
    while (wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None)) is not None:
        name = name.removeprefix(wrapper)
    name = _PART.sub(r".shard_\1.", name)
    for published, canonical in names.prefixes:
        if name.startswith(published):
            return canonical + name.removeprefix(published)
    found = _BARE.match(name)
    return name if found is None else f"model.{name[found.start(1) :]}"


def is_skipped(name: str, names: TensorNames) -> bool:
    """Return whether text does not need the tensor ``name``: it belongs to the vision tower, for example."""
    return names.skipped.search(canonical_name(name, names)) is not None


def describe_found(name: str, present: Collection[str]) -> str:
    """Return the end of the message "tensor ``name`` is missing": the layout that was found, and names beside it.

    All shards are complete where this is called, so the message does not advise another download.
    """
    if name == "lm_head.weight":
        return ": a base model without its head; use the checkpoint of the language model"
    for part, layout in _HINTS:
        found = next(filter(None, map(part.search, sorted(present))), None)
        if found is not None:
            layout = layout.format(found[1])
            return f": {layout}; this layout is not supported, use the original checkpoint or an MLX conversion"
    parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        beside = sorted(other for other in present if other.startswith(f"{parent}."))
        if beside:
            more = f" and {len(beside) - _SHOWN} more" if len(beside) > _SHOWN else ""
            return f"; there are {', '.join(beside[:_SHOWN])}{more}; config.json or names are of another layout"
    return f"; there are {', '.join(sorted(present)[:_SHOWN])}; names are of another layout" if present else ""
