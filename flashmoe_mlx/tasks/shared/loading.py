"""The engine of tasks that continue conversations."""

from pathlib import Path

from flashmoe_mlx.console.output import activity, print_notes
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.keys import PromptCacheConfig, cache_options, engine_options
from flashmoe_mlx.tasks.shared.model import model_folder


def load_engine(config: PromptCacheConfig) -> tuple[Engine, Path]:
    """Load the model of ``config``, show the notes about it, and return the engine and the folder of the model."""
    folder = model_folder(config.model, config.backend)
    backend = chosen_backend(config.backend, folder, config.model, config.experts_k, config.prompt_cache_gib)
    with activity() as announce:
        engine = load(
            folder,
            backend,
            config.experts_k,
            on_load=announce,
            **engine_options(config),
            **cache_options(config),
        )
    print_notes([engine.setup["note"]])
    return engine, folder
