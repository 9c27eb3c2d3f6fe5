"""``task=serve``: serve a model over HTTP to chat programs, agents and SDKs."""

import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashmoe_mlx.console.output import print_notes, show
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import InputError, missing_extra
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.formats.untrusted import read_text
from flashmoe_mlx.nodes.errors import NodeLostError
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.stores.registry import backend_settings
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.client_lines import client_lines
from flashmoe_mlx.tasks.shared.keys import NodesConfig, ServerConfig, cache_options, engine_options
from flashmoe_mlx.tasks.shared.model import model_folder, model_identity
from flashmoe_mlx.tasks.shared.nodes import follow, joined_nodes

_log = logging.getLogger(__name__)
_KEY_VARIABLE = "FLASHMOE_API_KEY"
_LARGEST_KEY_FILE = 2**16
_SENDING = 0.5
"""Seconds to send errors to clients before the process ends."""
_RANGES = {"port": (0, 65_535), "queue": (1, 10_000), "together": (1, 256), "stop_seconds": (0, 86_400)}
"""The smallest and the largest value of every number in ``ServerConfig``."""


@dataclass
class Config(NodesConfig):
    """Keys of ``task=serve``."""

    server: ServerConfig = field(default_factory=ServerConfig)


def run(config: Config, run_dir: Path) -> None:
    """Serve until interrupted; write ``environment.json`` and the measurements of every request to ``run_dir``."""
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise missing_extra("task=serve", "server")
    from flashmoe_mlx.server.listen import HttpServer, check_exposure, is_local, listening_socket
    from flashmoe_mlx.server.middleware import Policy
    from flashmoe_mlx.server.observatory import backend_name
    from flashmoe_mlx.server.service import Service, Settings

    options = config.server
    _check_ranges(options)
    keys = _keys(options.api_key_file)
    check_exposure(options.host, has_key=bool(keys), insecure=options.insecure)
    nodes = joined_nodes(config.nodes, run_dir)
    if nodes is not None and nodes.rank:
        follow(config, nodes, run_dir)
        return
    folder = model_folder(config.model, config.backend)
    backend = chosen_backend(config.backend, folder, config.model, config.experts_k, config.prompt_cache_gib)
    write_json(run_dir / "environment.json", environment())
    name = options.name or model_identity(folder).rpartition("/")[2].partition("@")[0] or "model"

    switch = is_local(options.host) if options.switch is None else options.switch
    if nodes is not None:
        switch = False  # the other nodes keep their models

    def load_engine() -> Engine:
        return reload_engine(None, None)

    def reload_engine(name: str | None, experts_k: int | None) -> Engine:
        nonlocal backend
        chosen = backend if name is None or name == backend_name(backend) else backend_settings(name)
        k = config.experts_k if experts_k is None else experts_k
        engine = load(folder, chosen, k, nodes=nodes, **engine_options(config), **cache_options(config))
        backend, config.experts_k = chosen, k
        print_notes([engine.setup["note"]])
        _log.info("model %s, %s", folder, engine.setup)
        return engine

    with (run_dir / "requests.jsonl").open("a") as file:
        lock = threading.Lock()

        def record(measured: dict[str, Any]) -> None:
            with lock:
                file.write(json.dumps(measured) + "\n")
                file.flush()

        settings = Settings(
            name,
            tuple(options.aliases),
            any_model=options.any_model,
            queue=options.queue,
            together=options.together,
            reload=reload_engine if switch else None,
            record=record,
        )
        policy = Policy(tuple(keys), (*options.names, options.host), tuple(options.origins))
        listener = listening_socket(options.host, options.port)
        host, port = listener.getsockname()[:2]

        def ready() -> None:
            for line in client_lines(host, port, name, needs_key=bool(keys)):
                show(line)

        show(f"loading {name}; listening on http://{f'[{host}]' if ':' in host else host}:{port}")
        service = Service(load_engine, settings)
        if nodes is not None:
            record_loss = nodes.watchdog.on_lost

            def lost(error: NodeLostError) -> None:
                record_loss(error)
                service.worker.fail(error)
                time.sleep(_SENDING)

            nodes.watchdog.on_lost = lost
        HttpServer(service, policy, options.stop_seconds).run(listener, ready)
    show(f"record: {run_dir}")


def _check_ranges(options: ServerConfig) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(options, name)
        if not low <= value <= high:  # which NaN fails, too
            raise InputError(f"server.{name}={value}: must be from {low} to {high}", code="out_of_range")


def _keys(path: str | None) -> list[bytes]:
    """Return the accepted API keys: the lines of a file, and the value of an environment variable.

    Raises:
        InputError: the file is missing or holds no key; code "invalid_api_key_file".
    """
    given = os.environ.get(_KEY_VARIABLE, "").strip()
    keys = [given] if given else []
    if path is not None:
        text = read_text(expand_path(path), _LARGEST_KEY_FILE)
        found = [line.strip() for line in (text or "").splitlines() if line.strip()]
        if not found:
            raise InputError(
                f"server.api_key_file={path}: there is no key in it; write one key on each line",
                code="invalid_api_key_file",
            )
        keys += found
    return [key.encode() for key in keys]
