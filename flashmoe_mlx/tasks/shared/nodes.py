"""Several machines in a task: node 0 runs the task, and all other nodes run the passes that it orders."""

import logging
import signal
from pathlib import Path

from flashmoe_mlx.console.output import activity, show
from flashmoe_mlx.engine import load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.nodes.errors import NodeLostError
from flashmoe_mlx.nodes.group import Nodes, launched
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.keys import NodesConfig, NodesKeys, cache_options, engine_options
from flashmoe_mlx.tasks.shared.model import model_folder
from flashmoe_mlx.tasks.shared.run_directory import FAILURE

_log = logging.getLogger(__name__)
_TIMEOUT = (1.0, 86_400.0)


def joined_nodes(keys: NodesKeys, run_dir: Path) -> Nodes | None:
    """Return the nodes of which ``mlx.launch`` started this process as one; None if it started alone.

    Raises:
        InputError: a key is out of range (codes "out_of_range", "invalid_weights"), or this process is alone and has
            ``nodes.weights`` ("not_launched").
    """
    if not _TIMEOUT[0] <= keys.timeout <= _TIMEOUT[1]:
        raise InputError(f"nodes.timeout={keys.timeout:g}: must be from 1 to 86400", code="out_of_range")
    weights = None if keys.weights is None else tuple(keys.weights)
    if not launched():
        if weights is not None:
            raise InputError(
                "nodes.weights needs several nodes: start them with mlx.launch, see docs/several-machines.md",
                code="not_launched",
            )
        return None
    nodes = Nodes(weights, keys.timeout)

    def record(error: NodeLostError) -> None:
        write_json(run_dir / FAILURE, {"error": str(error), "code": error.code, "exit_code": error.exit_code})

    nodes.watchdog.on_lost = record
    return nodes


def follow(config: NodesConfig, nodes: Nodes, run_dir: Path) -> None:
    """Run the passes that node 0 orders, until it ends.

    Raises:
        NodeLostError: another node is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all processes, and node 0 decides
    folder = model_folder(config.model, config.backend)
    backend = chosen_backend(config.backend, folder, config.model, config.experts_k, config.prompt_cache_gib)
    write_json(run_dir / "environment.json", environment())
    with activity() as announce:
        loaded = load(
            folder,
            backend,
            config.experts_k,
            nodes=nodes,
            on_load=announce,
            **engine_options(config),
            **cache_options(config),
        )
    with loaded as engine:
        _log.info("model %s, %s", folder, engine.setup)
        engine.follow()
        stats = engine.store.stats()
        record = {"store_total": {name: getattr(stats, name) for name in stats.__dataclass_fields__}}
        write_json(run_dir / "metrics.json", {**engine.setup, **record})
    show(f"node {nodes.rank} of {nodes.size}: read {stats.bytes_read / 1e9:.3g} GB; record: {run_dir}")
