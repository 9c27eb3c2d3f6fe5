"""``task=generate``: continue a prompt, show the text as it comes, then what it cost."""

import logging
import re
import sys
from dataclasses import asdict
from pathlib import Path

from flashmoe_mlx.config import Config
from flashmoe_mlx.engine.engine import Engine, load
from flashmoe_mlx.engine.telemetry import environment, metrics_table, split_line, write_json
from flashmoe_mlx.tasks.console import console
from flashmoe_mlx.tasks.model import model_folder

log = logging.getLogger(__name__)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters with which a model could command a person's terminal."""


def run(config: Config, run_dir: Path) -> None:
    """Generate, and leave ``environment.json`` and ``metrics.json`` in ``run_dir``."""
    folder = model_folder(config.model)
    write_json(run_dir / "environment.json", environment())
    with load(folder, config.backend, config.experts_k, kernels=config.kernels, profile=config.profile) as engine:
        log.info("model %s, %s", folder, engine.setup)
        text, token_ids, interrupted = _stream(engine, config)
        stats = engine.stats()
        write_json(
            run_dir / "metrics.json",
            {
                "model": {"path": str(folder), "config": asdict(engine.model.config)},
                **engine.setup,
                "interrupted": interrupted,
                "text": text,
                "token_ids": token_ids,
                **stats,
            },
        )
    console.print()
    console.print(metrics_table(stats))
    console.print(split_line(stats), highlight=False)
    console.print(f"record: {run_dir}", highlight=False, soft_wrap=True)
    if interrupted:
        raise KeyboardInterrupt


def _stream(engine: Engine, config: Config) -> tuple[str, list[int], bool]:
    """Print pieces as they come; the whole text, its tokens, and whether the person stopped it."""
    text, token_ids, interrupted = "", list[int](), False
    pieces = engine.generate(
        config.prompt,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        seed=config.seed,
        prefill_chunk=config.prefill_chunk,
        raw=config.raw,
    )
    terminal = sys.stdout.isatty()
    try:
        for piece in pieces:
            print(_CONTROLS.sub("\ufffd", piece.text) if terminal else piece.text, end="", flush=True)
            text += piece.text
            token_ids += piece.token_ids
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    return text, token_ids, interrupted
