"""``task=trace``: continue a prompt and record which experts every token chose."""

import logging
from collections.abc import Iterator
from pathlib import Path

from flashmoe_mlx.config import Config, TraceConfig, folder_of
from flashmoe_mlx.engine.engine import load
from flashmoe_mlx.engine.telemetry import environment, write_json
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.research.recorder import recorded
from flashmoe_mlx.research.routing import RoutingSummary, summarise
from flashmoe_mlx.tasks.console import console, print_notes
from flashmoe_mlx.tasks.generate import stream
from flashmoe_mlx.tasks.model import model_folder, model_identity

log = logging.getLogger(__name__)


def run(config: Config, run_dir: Path) -> None:
    """Generate, and leave the trace in ``out``, or as ``routing.moetrace`` in ``run_dir``."""
    assert isinstance(config, TraceConfig)
    path = run_dir / "routing.moetrace" if config.out is None else folder_of(config.out)
    if path.exists():
        raise InputError(f"{path}: is there already; choose another out=")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    folder = model_folder(config.model, config.backend)
    write_json(run_dir / "environment.json", environment())
    with load(folder, config.backend, config.experts_k, kernels=config.kernels) as engine:
        print_notes([engine.setup["note"]])
        prompt = engine.encode(config.prompt, raw=config.raw)
        with recorded(engine) as recorder:
            _, _, stopped = stream(engine, config)
        model = f"{model_identity(folder)}, {engine.setup['experts']['bits'] or 16} bits"
        trace = recorder.trace(engine.model.config.num_experts, prompt, model, engine.store.layout.record_bytes)
    trace.save(path)
    log.info("%s: %d tokens", path, len(trace.experts))
    console.print()
    for line in summary_lines(summarise(trace), trace.prompt_tokens):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"trace: {path}\nlook at it: task=simulate trace={path}", highlight=False, soft_wrap=True)
    if stopped is not None:
        raise stopped


def summary_lines(summary: RoutingSummary, prompt_tokens: int) -> Iterator[str]:
    """A trace in words."""
    one = summary
    yield (
        f"{one.tokens} tokens, {prompt_tokens} of them prompt, chose {one.experts_k} of {one.num_experts} experts in "
        f"each of {one.layers} layers"
    )
    yield (
        f"skew: the busiest tenth of the experts takes {one.top_share:.0%} of the choices; as uneven as "
        f"{one.effective_experts:.0f} equally likely experts"
    )
    if one.overlap is not None:
        yield f"overlap with the token before: {one.overlap:.0%} (by chance {one.chance_overlap:.0%})"
    if one.reuse is not None:
        yield (
            f"reuse: {1 - one.first_time:.0%} of the choices were made before, half of them within {one.reuse[0]:.0f} "
            f"tokens, nine in ten within {one.reuse[1]:.0f}"
        )
