"""Commands of a chat: lines that begin with a slash."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import yaml
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from flashmoe_mlx.chat.clipboard import copy
from flashmoe_mlx.chat.conversation import Conversation
from flashmoe_mlx.chat.session import Chat
from flashmoe_mlx.chat.settings import EXPERTS, KEYS, parse_setting
from flashmoe_mlx.console.output import print_table, show
from flashmoe_mlx.console.tables import metrics_lines, metrics_table
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.stores.registry import AUTO, backend_names, backend_settings

_UNKNOWN = "unknown_command"
_KEYS = (
    "Enter sends; Alt-Enter or Ctrl-J begins a new line; Tab completes; Ctrl-C stops an answer; Ctrl-D ends the chat. "
    "A line that begins with // is sent with one slash."
)


class Outcome(Enum):
    """What a chat does after a command."""

    CONTINUE = auto()
    EDIT = auto()
    """Let the user edit the latest question."""
    QUIT = auto()


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        run: carries out the command, given the text after its name.
        usage: the argument, for help; empty if there is none.
        about: a description.
        values: values of the argument, for completion.
    """

    run: Callable[[Chat, str], Outcome | None]
    usage: str
    about: str
    values: Callable[[], Iterable[str]] = tuple


def run_command(chat: Chat, line: str) -> Outcome:
    """Carry out a line such as ``/set top_k=20``.

    Raises:
        InputError: there is no such command (code "unknown_command"), or its argument is wrong.
        KeyboardInterrupt: the user interrupted it.
    """
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise InputError(
            f"/{name}: no such command; /help lists the commands, and //{name} sends /{name} to the model",
            code=_UNKNOWN,
        )
    if argument.strip() and not command.usage:
        raise InputError(f"/{name} has no argument", code=_UNKNOWN)
    return command.run(chat, argument.strip()) or Outcome.CONTINUE


def _help(chat: Chat, argument: str) -> None:  # noqa: ARG001  # the signature of a command
    lines = [f"{f'/{name} {command.usage}'.rstrip()}: {command.about}" for name, command in COMMANDS.items()]
    chat.screen.note("\n".join([*lines, "", _KEYS]))


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.conversation.system = None if argument == "null" else argument
        chat.changed()
    system = chat.conversation.system
    chat.screen.note("no system message" if system is None else f"system message: {system}")


def _tools(chat: Chat, argument: str) -> None:
    if argument == "ask":
        chat.toolbox.allowed.clear()
    elif argument:
        raise InputError(f"/tools {argument}: write /tools, or /tools ask", code="invalid_value")
    tools = chat.toolbox.tools
    if not tools:
        chat.screen.note("no tools; tools=<file.py>, tools.mcp=[...] and tools.builtin=[...] offer some at the start")
    for name, tool in tools.items():
        consent = "runs without a question" if name in chat.toolbox.allowed else "asks"
        chat.screen.note(f"{name} ({tool.origin}; {consent}): {tool.about}")


def _thinking(chat: Chat, argument: str) -> None:
    choices = {"on": True, "off": False, "null": None}
    if argument:
        chat.settings.thinking = choices[_one_of("thinking", argument, choices)]
    shown = {True: "on", False: "off", None: "as the chat template decides"}
    chat.screen.note(f"thinking: {shown[chat.settings.thinking]}")


def _fold(chat: Chat, argument: str) -> None:
    if argument:
        chat.settings.folded = _one_of("fold", argument, ("on", "off")) == "on"
    chat.screen.note(f"thinking is {'reduced to one line when it ends' if chat.settings.folded else 'shown'}")


def _thoughts(chat: Chat, argument: str) -> None:  # noqa: ARG001  # the signature of a command
    answer = chat.conversation.latest_answer
    thoughts = None if answer is None else answer.get("reasoning_content")
    if thoughts:
        chat.screen.quote(thoughts)
    else:
        chat.screen.note("no thinking in the latest answer")


def _one_of(command: str, argument: str, choices: Iterable[str]) -> str:
    if argument not in choices:
        raise InputError(f"/{command} {argument}: choose from {', '.join(choices)}", code="invalid_value")
    return argument


def _set(chat: Chat, argument: str) -> None:
    engine = chat.engines.current
    if argument:
        key, value = parse_setting(argument)
        if key == EXPERTS:
            chat.engines.change_experts(None if value is None else int(value))
        else:
            changed = chat.settings.with_option(key, value)
            engine.request("a", **changed)  # refuses values out of range
            chat.settings.options = changed
    shown = {EXPERTS: chat.engines.current.setup["experts_k"], **chat.settings.options}
    chat.screen.note(" ".join(f"{key}={value}" for key, value in shown.items()))


def _backend(chat: Chat, argument: str) -> None:
    if argument:
        name, *options = argument.split()
        before = chat.engines.current.setup["backend"]
        kept = {key: before[key] for key in ("variant", "mirrors") if before.get(key) is not None}
        settings = {"_target_": AUTO} if name == AUTO else backend_settings(name)
        chat.engines.change_backend(settings | kept | dict(map(_option, options)))
    settings = chat.engines.current.setup["backend"]
    shown = [f"{key}={value}" for key, value in settings.items() if value is not None and key != "_target_"]
    chat.screen.note(f"backend: {settings['_target_'].rpartition('.')[2]} {' '.join(shown)}".rstrip())


def _option(text: str) -> tuple[str, Any]:
    key, equals, written = text.partition("=")
    try:
        return key, yaml.safe_load(written) if equals else yaml.safe_load("[")
    except yaml.YAMLError:
        raise InputError(f"/backend: {text}: give options as option=value", code="unknown_option") from None


def _retry(chat: Chat, argument: str) -> None:  # noqa: ARG001  # the signature of a command
    question = chat.conversation.latest_question
    if question is None:
        raise InputError("/retry: there is no question yet", code=_UNKNOWN)
    chat.ask_again(question)


def _edit(chat: Chat, argument: str) -> Outcome:
    if chat.conversation.latest_question is None:
        raise InputError("/edit: there is no question yet", code=_UNKNOWN)
    if not argument and chat.input.interactive:
        return Outcome.EDIT
    if not argument:
        raise InputError("/edit: write the new question after it", code=_UNKNOWN)
    chat.ask_again(argument)
    return Outcome.CONTINUE


def _save(chat: Chat, argument: str) -> None:
    if not argument:
        raise InputError("/save: write the name of a file after it", code="invalid_path")
    path = expand_path(argument)
    try:
        chat.conversation.save(path)
    except OSError as error:
        raise InputError(f"/save {argument}: {error.strerror}", code="invalid_path") from error
    chat.screen.note(f"saved {len(chat.conversation.turns)} messages to {path}")


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        raise InputError("/load: write the name of a file after it", code="invalid_path")
    chat.begin(Conversation.load(expand_path(argument)))
    for turn in chat.conversation.turns:
        if turn["role"] == "user":
            chat.screen.note(f"> {turn['content']}")
        elif turn["role"] == "assistant" and turn["content"]:
            view = chat.screen.answer(folded=True)
            view.write(turn["content"])
            view.close()
    chat.screen.note(f"loaded {len(chat.conversation.turns)} messages")


def _stats(chat: Chat, argument: str) -> None:  # noqa: ARG001  # the signature of a command
    if chat.latest is None:
        chat.screen.note("no answer yet")
        return
    stats = chat.latest.stats
    print_table(metrics_table(stats))
    for line in metrics_lines(stats):
        show(line)


def _copy(chat: Chat, argument: str) -> None:  # noqa: ARG001  # the signature of a command
    answer = chat.conversation.latest_answer
    if answer is None:
        raise InputError("/copy: there is no answer yet", code=_UNKNOWN)
    chat.screen.note(copy(answer["content"]))


def _clear(chat: Chat, argument: str) -> None:  # noqa: ARG001  # the signature of a command
    chat.begin(Conversation(chat.conversation.system))
    chat.screen.note("a new conversation begins")


def _quit(chat: Chat, argument: str) -> Outcome:  # noqa: ARG001  # the signature of a command
    return Outcome.QUIT


COMMANDS: Mapping[str, Command] = {
    "help": Command(_help, "", "list the commands"),
    "system": Command(_system, "[TEXT]", "show or set the system message; null removes it"),
    "tools": Command(_tools, "[ask]", "list the tools; ask: ask again before each call", lambda: ["ask"]),
    "thinking": Command(_thinking, "[on|off]", "let the model think before it answers", lambda: ["on", "off", "null"]),
    "fold": Command(_fold, "[on|off]", "reduce thinking to one line when it ends", lambda: ["on", "off"]),
    "thoughts": Command(_thoughts, "", "show the thinking of the latest answer"),
    "set": Command(
        _set,
        "[KEY=VALUE]",
        "show or set sampling, max_tokens or experts_k; null: the default",
        lambda: [f"{key}=" for key in (*KEYS, EXPERTS)],
    ),
    "backend": Command(
        _backend, "[NAME] [OPTION=VALUE]", "show or change the expert store", lambda: [*backend_names(), AUTO]
    ),
    "retry": Command(_retry, "", "answer the latest question again"),
    "edit": Command(_edit, "[TEXT]", "change the latest question and answer it"),
    "save": Command(_save, "FILE", "write the conversation to a file"),
    "load": Command(_load, "FILE", "continue the conversation in a file"),
    "stats": Command(_stats, "", "show the measurements of the latest answer"),
    "copy": Command(_copy, "", "copy the latest answer to the clipboard"),
    "clear": Command(_clear, "", "begin a new conversation"),
    "quit": Command(_quit, "", "end the chat"),
}


class CommandCompleter(Completer):
    """Completes names of commands and their arguments."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield the completions of the text before the cursor; only commands have any."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            yield from (Completion(found, -len(name)) for found in COMMANDS if found.startswith(name))
        elif name in ("save", "load"):
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif name in COMMANDS:
            values = (value for value in COMMANDS[name].values() if value.startswith(argument))
            yield from (Completion(value, -len(argument)) for value in values)
