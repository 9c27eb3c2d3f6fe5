"""``task=cache``: list or delete the conversations in a folder, or add the beginning of one."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from flashmoe_mlx.console.output import counted, print_table, show
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.formats.untrusted import parse_object, read_text
from flashmoe_mlx.generation.prompt_cache.folder import clear, kept
from flashmoe_mlx.generation.prompting import load_tools
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.stores.memory import GIB
from flashmoe_mlx.tasks.shared.keys import TEXT, WORDS, PromptCacheConfig
from flashmoe_mlx.tasks.shared.loading import load_engine
from flashmoe_mlx.tasks.shared.streaming import PrefillBar

_LARGEST_PROMPT = 64 * 2**20


@dataclass
class Config(PromptCacheConfig):
    """Keys of ``task=cache``."""

    action: str = field(default="list", metadata={**TEXT, **WORDS})
    prompt: str | None = field(default=None, metadata=TEXT)
    system: str | None = field(default=None, metadata=TEXT)
    tools: str | None = field(default=None, metadata=TEXT)
    thinking: bool | None = None
    prefill_chunk: int | None = None


def run(config: Config, run_dir: Path) -> None:
    """List, delete or add conversations in ``cache_dir``."""
    if config.cache_dir is None:
        raise InputError("task=cache needs cache_dir=<folder of conversations>", code="cache_dir")
    folder = expand_path(config.cache_dir)
    actions = {"list": _list, "clear": _clear}
    try:
        if config.action == "warm":
            _warm(config, run_dir)
        elif config.action in actions:
            actions[config.action](folder)
        else:
            raise InputError(f"action={config.action}: choose list, clear or warm", code="unknown_choice")
    except OSError as error:
        raise InputError(f"cache_dir={folder}: {error.strerror}", code="cache_dir") from error


def _list(folder: Path) -> None:
    """Show the conversations of each model."""
    found = list(kept(folder))
    if not found:
        show(f"{folder}: no conversations")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "K", "KV", "conversations", "states", "tokens", "GiB", "last used"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for entry in found:
        table.add_row(
            entry.model,
            str(entry.experts_k),
            "-" if entry.kv_bits is None else f"{entry.kv_bits} bits",
            str(entry.conversations),
            str(entry.states),
            f"{entry.tokens:,}",
            f"{entry.nbytes / GIB:.3f}",
            "-" if entry.used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
        )
    print_table(table)


def _clear(folder: Path) -> None:
    """Delete all conversations that no process is writing."""
    deleted, busy = clear(folder)
    count, size = sum(entry.conversations for entry in deleted), sum(entry.nbytes for entry in deleted)
    show(f"{counted(count, 'conversation')} deleted, {size / GIB:.3f} GiB")
    if busy:
        raise FlashMoeError(
            f"{busy[0].folder}: a process is writing there; end it, then clear again", code="cache_dir_busy"
        )


def _warm(config: Config, run_dir: Path) -> None:
    """Compute a prompt and keep its states, from which conversations with the same beginning continue."""
    if config.prompt is None:
        raise InputError("task=cache warm needs prompt=<file>: text, or a request with messages", code="invalid_prompt")
    messages, tools = _conversation(config, expand_path(config.prompt))
    loaded, _ = load_engine(config)
    with loaded as engine:
        bar = PrefillBar()
        generation = engine.generate(
            messages,
            tools=tools,
            enable_thinking=config.thinking,
            prefill_chunk=config.prefill_chunk,
            max_tokens=1,
            on_prefill=bar,
        )
        try:
            for _ in generation:
                pass
        finally:
            bar.stop()
        write_json(run_dir / "metrics.json", {**engine.setup, **engine.stats()})
        metrics = generation.metrics
    seconds = metrics.time_to_first_token or 0.0
    known = f", {metrics.reused_tokens:,} were known" if metrics.reused_tokens else ""
    show(f"{metrics.computed_tokens:,} tokens computed in {seconds:.3g} s{known}; record: {run_dir}")


def _conversation(config: Config, path: Path) -> tuple[list[Mapping[str, Any]], Any]:
    """Return the messages and the tools of a file: a user's message as text, or a request in JSON.

    Raises:
        InputError: the file is missing, is not UTF-8, or holds other JSON than a request.
    """
    text = read_text(path, _LARGEST_PROMPT)
    if not text:
        raise InputError(f"prompt={path}: no such file, or it is empty", code="invalid_prompt")
    tools = None if config.tools is None else load_tools(expand_path(config.tools))
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    try:
        request = parse_object(text)
    except ValueError:
        return [*system, {"role": "user", "content": text.removesuffix("\n")}], tools
    if not isinstance(request.get("messages"), list):
        raise InputError(f"prompt={path}: JSON without a list of messages", code="invalid_prompt")
    return [*system, *request["messages"]], tools or request.get("tools")
