"""``task=chat``: talk to a model in the terminal."""

import logging
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from flashmoe_mlx.chat.commands import CommandCompleter
from flashmoe_mlx.chat.conversation import Conversation
from flashmoe_mlx.chat.engines import Backend, Engines
from flashmoe_mlx.chat.input import Input, LineInput, TerminalInput
from flashmoe_mlx.chat.loop import run_chat
from flashmoe_mlx.chat.record import Record
from flashmoe_mlx.chat.screen import PlainScreen, Screen
from flashmoe_mlx.chat.session import Chat
from flashmoe_mlx.chat.settings import KEYS, Settings
from flashmoe_mlx.chat.terminal import TerminalScreen
from flashmoe_mlx.chat.tools.builtin import BuiltinTools
from flashmoe_mlx.chat.tools.mcp_servers import McpServer
from flashmoe_mlx.chat.tools.python_file import PythonTools
from flashmoe_mlx.chat.tools.toolbox import Toolbox
from flashmoe_mlx.console.output import activity, literal_console, print_notes, show
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.generation.request import RequestOptions
from flashmoe_mlx.paths import expand_path, user_cache
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.stores.registry import backend_settings
from flashmoe_mlx.tasks.shared.automatic import chosen
from flashmoe_mlx.tasks.shared.keys import (
    SHORT_FOR_FILE,
    TEXT,
    AnswerConfig,
    PromptCacheConfig,
    ToolChoice,
    cache_options,
    engine_options,
)
from flashmoe_mlx.tasks.shared.model import model_folder

_log = logging.getLogger(__name__)


@dataclass
class Config(AnswerConfig, PromptCacheConfig):
    """Keys of ``task=chat``."""

    prefetch: str | None = None
    history: str | None = field(default=None, metadata=TEXT)
    tools: ToolChoice = field(default_factory=ToolChoice, metadata=SHORT_FOR_FILE)


def run(config: Config, run_dir: Path) -> None:
    """Chat until the input ends; write the conversations and ``metrics.json`` to ``run_dir``."""
    if sys.stdin is None:
        raise InputError("task=chat reads questions from stdin, which is closed", code="invalid_prompt")
    write_json(run_dir / "environment.json", environment())

    def opener(backend: Backend, experts_k: int | None) -> Engine:
        return _open_engine(config, backend, experts_k)

    with (
        _toolbox(config.tools, run_dir) as toolbox,
        closing(Engines(opener, config.backend, config.experts_k)) as engines,
    ):
        engine = engines.current
        settings = _settings(config)
        engine.request("a", **settings.arguments())  # refuses options that would make every answer fail
        screen = _screen()
        chat = Chat(
            engines=engines,
            conversation=Conversation(config.system),
            settings=settings,
            toolbox=toolbox,
            most_calls=config.tools.most_calls,
            screen=screen,
            input=_input(config.history, screen, lambda width: _status_line(chat, width)),
            on_change=Record(run_dir).save,
        )
        try:
            if chat.input.interactive:
                screen.note("/help lists the commands; Ctrl-D ends the chat")
            run_chat(chat)
        finally:
            setup = None if not engines.loaded else engines.current.setup
            write_json(run_dir / "metrics.json", {"setup": setup, "answers": chat.answers})
            show(f"record: {run_dir}")


def _status_line(chat: Chat, width: int) -> str:
    """Return the line below the input."""
    if chat.status is not None:
        return chat.status.line(width)
    return "/help lists the commands"[:width]


def _open_engine(config: Config, backend: Backend, experts_k: int | None) -> Engine:
    """Load the model with ``backend`` and ``experts_k``; make a variant of the demo model if it is missing."""
    settings = backend_settings(backend) if isinstance(backend, str) else dict(backend)
    folder = model_folder(config.model, settings)
    found = chosen(settings, folder, config.model, experts_k, config.prompt_cache_gib, config.prefetch)
    with activity() as announce:
        engine = load(
            folder,
            found.backend,
            experts_k,
            prefetch=found.prefetch,
            on_load=announce,
            **engine_options(config),
            **cache_options(config),
        )
    print_notes([engine.setup["note"]])
    _log.info("model %s, %s", folder, engine.setup)
    return engine


def _settings(config: Config) -> Settings:
    """Return the settings of the answers; values of null leave the model's defaults."""
    given: RequestOptions = {
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "presence_penalty": config.presence_penalty,
        "frequency_penalty": config.frequency_penalty,
        "seed": config.seed,
        "prefill_chunk": config.prefill_chunk,
    }
    assert given.keys() == KEYS.keys()
    options = {key: value for key, value in given.items() if value is not None}
    return Settings(cast(RequestOptions, options), config.thinking, config.template_options)


def _toolbox(choice: ToolChoice, run_dir: Path) -> Toolbox:
    """Start the chosen tools.

    Raises:
        InputError: a tool cannot be started, or a key is out of range.
    """
    if choice.timeout <= 0:
        raise InputError(f"tools.timeout={choice.timeout:g}: must be more than 0 seconds", code="out_of_range")
    if choice.most_calls < 1:
        raise InputError(f"tools.most_calls={choice.most_calls}: must be at least 1", code="out_of_range")
    toolbox = Toolbox(choice.allow)
    try:
        if choice.file is not None:
            path = expand_path(choice.file)
            show(f"tools: running {path} to offer its functions to the model")
            toolbox.add(PythonTools(path, choice.timeout))
        for command in choice.mcp:
            show(f"tools: starting the MCP server {command}")
            toolbox.add(McpServer(command, choice.timeout, run_dir / "mcp.log"))
        toolbox.add(BuiltinTools(choice.builtin, expand_path(choice.folder), choice.timeout))
        toolbox.check_allowed()
    except BaseException:
        toolbox.close()
        raise
    return toolbox


def _screen() -> Screen:
    console = literal_console()
    return TerminalScreen(console) if console.is_terminal and not console.is_dumb_terminal else PlainScreen()


def _input(history: str | None, screen: Screen, status: Callable[[int], str]) -> Input:
    """Return the input: a line editor if stdin is a terminal, otherwise its lines."""
    if not sys.stdin.isatty():
        return LineInput(sys.stdin, screen.note if isinstance(screen, TerminalScreen) else None)
    if history is not None:
        return TerminalInput(CommandCompleter(), expand_path(history), status)
    try:
        return TerminalInput(CommandCompleter(), user_cache() / "chat_history", status)
    except InputError:  # no home folder
        return TerminalInput(CommandCompleter(), None, status)
