"""A loaded model as a part of several nodes: the comparison with node 0, and the sums of all nodes in its layers."""

import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.manifest import MANIFEST, RESIDENT
from flashmoe_mlx.models.decoder import Model
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.version import __version__

_COMPARED = ("experts_k", "experts", "activations", "kv_bits", "replaced_kernels", "prompt_cache_bytes")
"""Settings of an engine that must be equal on all nodes."""
_LOCAL = re.compile(r", \d+ threads|: \d.*")
"""Matches the parts of the names of kernels that may differ: threads, and the speeds that decided the choice."""


def join(model: RunnableModel, nodes: Nodes) -> Model:
    """Return ``model`` with the experts of all ``nodes``.

    Raises:
        InputError: the model is of another package; code "unsupported_on_nodes".
    """
    if not isinstance(model, Model):
        raise InputError("several nodes cannot run a model of another package", code="unsupported_on_nodes")
    own = all(block.whole_layer(1) is not None for block in model.mixtures)
    return model.on_nodes(nodes, in_memory=all(nodes.numbers(int(own))))


def compare(folder: Path, setup: Mapping[str, Any], store: ExpertStore, nodes: Nodes) -> None:
    """Compare this node with node 0.

    Args:
        folder: the folder of the model.
        setup: the settings of the engine.
        store: the store of this node's experts.
        nodes: the nodes.

    Raises:
        NodeMismatchError: a node differs.
    """
    source, share = store.source, nodes.share
    settings = {name: setup.get(name) for name in _COMPARED}
    kernels = {name: _LOCAL.sub("", str(used)) for name, used in setup["kernels"].items()}
    facts = {
        "flashmoe_mlx": __version__,
        "mlx": version("mlx"),
        "the model": _identity(folder),
        "nodes.weights": list(share.weights),
        "the owners of experts": share.digest(source.num_layers, source.num_experts),
    }
    named = {f"the kernel of {name}": used for name, used in kernels.items()}
    # Settings come first: they are the cause of other kernels, and a long text is cut.
    nodes.require_equal(facts | {name: _short(value) for name, value in settings.items()} | named)


def _short(value: object) -> object:
    """Return ``value``, or a short text that differs if it does."""
    text = repr(value)
    return value if len(text) < 32 else f"{text[:16]}...{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _identity(folder: Path) -> str:
    """Return a text that is equal for copies of a model, whatever share of its experts they hold."""
    if (folder / MANIFEST).exists():
        manifest = open_pack(folder).manifest
        files = manifest["files"]
        parts = [manifest["geometry"], files["config.json"], files[RESIDENT]]
    else:
        parts = sorted((file.name, file.stat().st_size) for file in folder.iterdir())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
