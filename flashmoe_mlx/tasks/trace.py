"""``task=trace``: answer a prompt and record the experts that each token chose."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from flashmoe_mlx.console.output import activity, print_notes, show
from flashmoe_mlx.engine import load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.paths import as_argument, expand_path
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.traces.recorder import recorded
from flashmoe_mlx.research.traces.routing import summarize
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.keys import TEXT, GenerationConfig, engine_options
from flashmoe_mlx.tasks.shared.model import model_folder, model_identity
from flashmoe_mlx.tasks.shared.prompts import with_prompt
from flashmoe_mlx.tasks.shared.routing_lines import routing_lines
from flashmoe_mlx.tasks.shared.streaming import prompt_options, stream

_log = logging.getLogger(__name__)


@dataclass
class Config(GenerationConfig):
    """Keys of ``task=trace``."""

    out: str | None = field(default=None, metadata=TEXT)


def run(config: Config, run_dir: Path) -> None:
    """Generate an answer, and write the trace to ``out``, or to ``routing.moetrace`` in ``run_dir``."""
    path = run_dir / "routing.moetrace" if config.out is None else expand_path(config.out)
    if path.exists():
        raise InputError(f"{path}: already exists; choose another out=")
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder: {path.parent}")
    folder = model_folder(config.model, config.backend)
    backend = chosen_backend(config.backend, folder, config.model, config.experts_k)
    config = with_prompt(config, folder)
    options = prompt_options(config)
    write_json(run_dir / "environment.json", environment())
    with activity() as announce:
        loaded = load(
            folder,
            backend,
            config.experts_k,
            prompt_cache_gib=0,
            on_load=announce,
            **engine_options(config),
        )
    with loaded as engine:
        print_notes([engine.setup["note"]])
        prompt = engine.encode(config.prompt, **options)
        if config.temperature is None:
            config = replace(config, temperature=0.0)  # greedy, so that the trace is reproducible
        with recorded(engine) as recorder:
            stopped = stream(engine, config, options).stopped
        model = f"{model_identity(folder)}, {engine.setup['experts']['bits'] or 16} bits"
        if stopped is not None and not engine.metrics.prefill.tokens:
            raise stopped  # no forward pass was completed, so the trace is empty
        trace = recorder.trace(
            engine.model.config.num_experts, prompt, model, round(engine.store.layout.mean_record_bytes)
        )
    trace.save(path)
    _log.info("%s: %d tokens", path, len(trace.experts))
    show()
    for line in routing_lines(summarize(trace), trace.prompt_tokens):
        show(line)
    show(f"trace: {path}\nto analyze it: task=simulate {as_argument('trace', path)}")
    if stopped is not None:
        raise stopped
