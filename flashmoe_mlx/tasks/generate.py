"""``task=generate``: continue a prompt, show the text as it comes, then what it cost."""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from flashmoe_mlx.config import Config, GenerationConfig
from flashmoe_mlx.engine.engine import Engine, load
from flashmoe_mlx.engine.telemetry import environment, metrics_lines, metrics_table, write_json
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.streams import OutputError, print_answer
from flashmoe_mlx.tasks.console import console, print_table
from flashmoe_mlx.tasks.model import model_folder
from flashmoe_mlx.tasks.prompts import with_prompt

log = logging.getLogger(__name__)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters with which a model could command a person's terminal."""
_INTERRUPTED = 130


def run(config: Config, run_dir: Path) -> None:
    """Generate, and leave ``environment.json`` and ``metrics.json`` in ``run_dir``."""
    if (run_dir / "metrics.json").exists():
        raise InputError(f"{run_dir}: holds the record of another run; choose another hydra.run.dir")
    folder = model_folder(config.model, config.backend)
    config = with_prompt(config, folder)
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
            console.print(f"note: {engine.setup['note']}", highlight=False, soft_wrap=True)
        log.info("model %s, %s", folder, engine.setup)
        text, token_ids, stopped = stream(engine, config)
        stats = engine.stats()
        record = {
            "model": {"path": str(folder), "config": asdict(engine.model.config)},
            **engine.setup,
            "interrupted": stopped is not None,
            "text": text,
            "token_ids": token_ids,
            **stats,
        }
        write_json(run_dir / "metrics.json", record)
        log.info("%d tokens, %s", len(token_ids), stats["finish_reason"] or "interrupted")
    console.print()
    print_table(metrics_table(stats))
    for line in metrics_lines(stats):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"record: {run_dir}", highlight=False, soft_wrap=True)
    if stopped is not None:
        raise stopped


def stream(engine: Engine, config: GenerationConfig) -> tuple[str, list[int], BaseException | None]:
    """Print pieces as they come; the whole text, its tokens, and what stopped it before its end."""
    text, token_ids = "", list[int]()
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
    terminal = sys.stdout is not None and sys.stdout.isatty()
    try:
        with _interrupts() as interrupted:
            for piece in pieces:
                text += piece.text
                token_ids += piece.token_ids
                print_answer(_CONTROLS.sub("\ufffd", piece.text) if terminal else piece.text, end="")
                if interrupted():
                    raise KeyboardInterrupt
        print_answer("")
    except (KeyboardInterrupt, BrokenPipeError, OutputError) as stopped:
        return text, token_ids, stopped
    return text, token_ids, None


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Notice an interrupt and let the token at hand be finished; the second one ends the process at once.

    An exception could arrive anywhere, in the middle of the bookkeeping of a store from elsewhere too.
    """
    count = 0

    def notice(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the form of a handler
        nonlocal count
        count += 1
        if count > 1:
            os._exit(_INTERRUPTED)
        console.print("stopping after this token; interrupt again to stop at once")

    before = signal.signal(signal.SIGINT, notice)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)
