"""``task=generate``: continue a prompt, show the text as it comes, then what it cost."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmoe_mlx.console.output import print_notes, print_table, show
from flashmoe_mlx.console.tables import metrics_lines, metrics_table
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.tasks.shared.keys import GenerationConfig
from flashmoe_mlx.tasks.shared.model import model_folder
from flashmoe_mlx.tasks.shared.prompts import with_prompt
from flashmoe_mlx.tasks.shared.streaming import Streamed, prompt_options, stream
from flashmoe_mlx.text.reasoning import ReasoningSplitter

log = logging.getLogger(__name__)


@dataclass
class Config(GenerationConfig):
    """Keys of ``task=generate``."""

    prefetch: str = "none"
    profile: bool = False


def run(config: Config, run_dir: Path) -> None:
    """Generate, and leave ``environment.json`` and ``metrics.json`` in ``run_dir``."""
    folder = model_folder(config.model, config.backend)
    config = with_prompt(config, folder)
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
        print_notes([engine.setup["note"]])
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
    show()
    print_table(metrics_table(stats))
    for line in metrics_lines(stats):
        show(line)
    if shown.thinking and shown.stopped is None:
        show(_unfinished_thought(engine, config, asked, shown))
    show(f"record: {run_dir}")
    if shown.stopped is not None:
        raise shown.stopped


def _unfinished_thought(engine: Engine, config: Config, asked: Mapping[str, Any], shown: Streamed) -> str:
    """Say that there is no answer yet, and what to do; only what helps with this model."""
    context = engine.model.config.max_context
    advice = []
    if shown.finish_reason == "stop":
        what = "the model ended its output"
    elif len(shown.token_ids) < config.max_tokens or config.max_tokens >= context:
        what = f"the context of {context} tokens ended"
        advice.append("a shorter prompt leaves more room")
    else:
        what = f"max_tokens={config.max_tokens} ended"
        advice.append(f"max_tokens={min(context, max(4096, 4 * config.max_tokens))} leaves room for both")
    if _can_be_off(engine, config, asked):
        advice.append("thinking=false asks for an answer at once")
    return f"{what} inside the model's thinking, before an answer" + "".join(f"; {line}" for line in advice)


def _can_be_off(engine: Engine, config: Config, asked: Mapping[str, Any]) -> bool:
    try:
        prompt = engine.encode(config.prompt, **{**asked, "enable_thinking": False})
    except InputError:
        return False
    return not ReasoningSplitter(engine.tokenizer, prompt).open
