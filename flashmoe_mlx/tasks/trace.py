"""``task=trace``: continue a prompt and record which experts every token chose."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from flashmoe_mlx.console.output import print_notes, show
from flashmoe_mlx.engine import load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.paths import as_argument, expand_path
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.traces.recorder import recorded
from flashmoe_mlx.research.traces.routing import RoutingSummary, summarize
from flashmoe_mlx.tasks.shared.keys import TEXT, GenerationConfig
from flashmoe_mlx.tasks.shared.model import model_folder, model_identity
from flashmoe_mlx.tasks.shared.prompts import with_prompt
from flashmoe_mlx.tasks.shared.streaming import prompt_options, stream

log = logging.getLogger(__name__)


@dataclass
class Config(GenerationConfig):
    """Keys of ``task=trace``."""

    out: str | None = field(default=None, metadata=TEXT)


def run(config: Config, run_dir: Path) -> None:
    """Generate, and leave the trace in ``out``, or as ``routing.moetrace`` in ``run_dir``."""
    path = run_dir / "routing.moetrace" if config.out is None else expand_path(config.out)
    if path.exists():
        raise InputError(f"{path}: is there already; choose another out=")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    folder = model_folder(config.model, config.backend)
    config = with_prompt(config, folder)
    asked = prompt_options(config)
    write_json(run_dir / "environment.json", environment())
    with load(folder, config.backend, config.experts_k, kernels=config.kernels) as engine:
        print_notes([engine.setup["note"]])
        prompt = engine.encode(config.prompt, **asked)
        if config.temperature is None:
            config = replace(config, temperature=0.0)  # greedy, so that a trace can be repeated
        with recorded(engine) as recorder:
            stopped = stream(engine, config, asked).stopped
        model = f"{model_identity(folder)}, {engine.setup['experts']['bits'] or 16} bits"
        if stopped is not None and not engine.metrics.prefill.tokens:
            raise stopped  # no pass ended, so there is nothing to keep
        trace = recorder.trace(engine.model.config.num_experts, prompt, model, engine.store.layout.record_bytes)
    trace.save(path)
    log.info("%s: %d tokens", path, len(trace.experts))
    show()
    for line in summary_lines(summarize(trace), trace.prompt_tokens):
        show(line)
    show(f"trace: {path}\nlook at it: task=simulate {as_argument('trace', path)}")
    if stopped is not None:
        raise stopped


def summary_lines(summary: RoutingSummary, prompt_tokens: int) -> Iterator[str]:
    """Describe a trace, line by line."""
    yield (
        f"{summary.tokens} tokens, {prompt_tokens} of them prompt, chose {summary.experts_k} of {summary.num_experts} "
        f"experts in each of {summary.layers} layers"
    )
    yield (
        f"skew: the busiest tenth of the experts takes {summary.top_share:.0%} of the choices; as uneven as "
        f"{summary.effective_experts:.0f} equally likely experts"
    )
    if summary.overlap is not None:
        yield f"overlap with the token before: {summary.overlap:.0%} (by chance {summary.chance_overlap:.0%})"
    if summary.reuse is not None:
        yield (
            f"reuse: {1 - summary.first_time:.0%} of the choices were made before, half of them within "
            f"{summary.reuse[0]:.0f} tokens, nine in ten within {summary.reuse[1]:.0f}"
        )
