"""``task=generate``: continue a prompt, show the text as it comes, then what it cost."""

import logging
from dataclasses import asdict
from pathlib import Path

from flashmoe_mlx.config import Config
from flashmoe_mlx.engine.engine import load
from flashmoe_mlx.engine.telemetry import environment, metrics_lines, metrics_table, write_json
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.tasks.console import console, print_table
from flashmoe_mlx.tasks.model import model_folder
from flashmoe_mlx.tasks.streaming import Streamed, prompt_options, stream

log = logging.getLogger(__name__)


def run(config: Config, run_dir: Path) -> None:
    """Generate, and leave ``environment.json`` and ``metrics.json`` in ``run_dir``."""
    if (run_dir / "metrics.json").exists():
        raise InputError(f"{run_dir}: holds the record of another run; choose another hydra.run.dir")
    folder = model_folder(config.model, config.backend)
    asked = prompt_options(config)
    write_json(run_dir / "environment.json", environment())
    with load(
        folder,
        config.backend,
        config.experts_k,
        kernels=config.kernels,
        prefetch=config.prefetch,
        profile=config.profile,
    ) as engine:
        if engine.setup["note"]:
            console.print(f"note: {engine.setup['note']}", highlight=False, markup=False, soft_wrap=True)
        log.info("model %s, %s", folder, engine.setup)
        shown = stream(engine, config, asked)
        stats = engine.stats()
        record = {
            "model": {"path": str(folder), "config": asdict(engine.model.config)},
            **engine.setup,
            "interrupted": shown.stopped is not None,
            "text": shown.text,
            "reasoning": shown.reasoning,
            "ended_in_thinking": shown.thinking,
            "token_ids": shown.token_ids,
            **stats,
        }
        write_json(run_dir / "metrics.json", record)
        log.info("%d tokens, %s", len(shown.token_ids), stats["finish_reason"] or "interrupted")
    console.print()
    print_table(metrics_table(stats))
    for line in metrics_lines(stats):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if shown.thinking and shown.stopped is None:
        console.print(_unfinished_thought(shown, config.max_tokens), highlight=False, markup=False, soft_wrap=True)
    console.print(f"record: {run_dir}", highlight=False, markup=False, soft_wrap=True)
    if shown.stopped is not None:
        raise shown.stopped


def _unfinished_thought(shown: Streamed, max_tokens: int) -> str:
    """Say that there is no answer yet, and what to do."""
    if shown.finish_reason == "stop":
        return "the model ended inside its thinking, without an answer: thinking=false asks for one at once"
    limit = f"max_tokens={max_tokens}" if len(shown.token_ids) >= max_tokens else "the end of the context"
    return (
        f"{limit} came inside the model's thinking, before an answer: a larger max_tokens, such as "
        f"max_tokens={max(4096, 4 * max_tokens)}, leaves room for both; thinking=false asks for an answer at once"
    )
