"""``task=generate``: answer a prompt, stream the text, and show the cost."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from flashmoe_mlx.console.output import activity, print_notes, print_table, show
from flashmoe_mlx.console.tables import metrics_lines, metrics_table
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.generation.request import PromptOptions
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.tasks.shared.automatic import chosen
from flashmoe_mlx.tasks.shared.keys import GenerationConfig, NodesConfig, cache_options, engine_options
from flashmoe_mlx.tasks.shared.model import model_folder
from flashmoe_mlx.tasks.shared.nodes import follow, joined_nodes
from flashmoe_mlx.tasks.shared.prompts import with_prompt
from flashmoe_mlx.tasks.shared.streaming import Streamed, prompt_options, stream
from flashmoe_mlx.text.reasoning import ReasoningSplitter

_log = logging.getLogger(__name__)


@dataclass
class Config(GenerationConfig, NodesConfig):
    """Keys of ``task=generate``."""

    prompt_cache_gib: float | None = 0.0
    prefetch: str | None = None
    profile: bool = False


def run(config: Config, run_dir: Path) -> None:
    """Generate an answer, and write ``environment.json`` and ``metrics.json`` to ``run_dir``."""
    nodes = joined_nodes(config.nodes, run_dir)
    if nodes is not None and nodes.rank:
        follow(config, nodes, run_dir)
        return
    folder = model_folder(config.model, config.backend)
    k, cache = config.experts_k, config.prompt_cache_gib
    found = chosen(config.backend, folder, config.model, k, cache, config.prefetch)
    config = with_prompt(config, folder)
    options = prompt_options(config)
    write_json(run_dir / "environment.json", environment())
    with activity() as announce:
        loaded = load(
            folder,
            found.backend,
            config.experts_k,
            prefetch=found.prefetch,
            profile=config.profile,
            nodes=nodes,
            on_load=announce,
            **engine_options(config),
            **cache_options(config),
        )
    with loaded as engine:
        print_notes([engine.setup["note"]])
        _log.info("model %s, %s", folder, engine.setup)
        shown = stream(engine, config, options)
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
        _log.info("%d tokens, %s", len(shown.token_ids), stats["finish_reason"] or "interrupted")
    show()
    print_table(metrics_table(stats))
    for line in metrics_lines(stats):
        show(line)
    if shown.thinking and shown.stopped is None:
        show(_explain_missing_answer(engine, config, options, shown))
    show(f"record: {run_dir}")
    if shown.stopped is not None:
        raise shown.stopped


def _explain_missing_answer(engine: Engine, config: Config, options: PromptOptions, shown: Streamed) -> str:
    """Explain why thinking ended without an answer, and list the remedies that this model supports."""
    context = engine.model.config.max_context
    advice = []
    if shown.finish_reason == "stop":
        reason = "the model ended its output"
    elif len(shown.token_ids) < config.max_tokens or config.max_tokens >= context:
        reason = f"the context of {context} tokens was full"
        advice.append("a shorter prompt leaves more room")
    else:
        reason = f"max_tokens={config.max_tokens} was reached"
        advice.append(
            f"max_tokens={min(context, max(4096, 4 * config.max_tokens))} leaves room for thinking and an answer"
        )
    if _can_skip_thinking(engine, config, options):
        advice.append("thinking=false skips thinking")
    return "; ".join([f"no answer: {reason} while the model was thinking", *advice])


def _can_skip_thinking(engine: Engine, config: Config, options: PromptOptions) -> bool:
    without_thinking: PromptOptions = {**options, "enable_thinking": False}
    try:
        prompt = engine.encode(config.prompt, **without_thinking)
    except InputError:
        return False
    return not ReasoningSplitter(engine.tokenizer, prompt).open
