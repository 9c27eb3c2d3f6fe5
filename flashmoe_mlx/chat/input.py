"""The input of a chat: a line editor on a terminal, or the lines of a file."""

import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import IO, Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import Completer
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from flashmoe_mlx.console.output import show
from flashmoe_mlx.errors import InputError


class Consent(Enum):
    """Answers to the question whether a tool may run."""

    ONCE = "o"
    ALWAYS = "a"
    NO = "n"


class Input(Protocol):
    """The input of a chat."""

    interactive: bool
    """Whether a person types."""

    def question(self, default: str = "") -> str:
        """Return the next question or command; ``default`` is text to edit.

        Raises:
            EOFError: the input has ended.
            KeyboardInterrupt: the user pressed Ctrl-C.
        """
        ...

    def consent(self) -> Consent:
        """Ask whether the tool whose call was shown may run.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C.
        """
        ...


class LineInput:
    """Questions from a file or a pipe, one on each line; nobody can consent to a call.

    Args:
        stream: the text.
        echo: shows each question, or None.
    """

    interactive = False

    def __init__(self, stream: IO[str], echo: Callable[[str], None] | None = None) -> None:
        self._stream = stream
        self._echo = echo

    def question(self, default: str = "") -> str:  # noqa: ARG002  # nobody can edit it
        """Return the next line.

        Raises:
            InputError: the line is not text in the encoding of stdin; code "invalid_prompt".
        """
        try:
            line = self._stream.readline()
        except UnicodeDecodeError as error:
            raise InputError(
                f"stdin: byte {error.start} of a line is not {error.encoding}", code="invalid_prompt"
            ) from None
        if not line:
            raise EOFError
        text = line.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff")
        if self._echo is not None and text.strip():
            self._echo(f"> {text}")
        return text

    def consent(self) -> Consent:
        """Refuse the call."""
        show("refused: nobody can be asked; tools.allow=[...] names tools that may run without a question")
        return Consent.NO


class TerminalInput:
    """A line editor with history and completion. Enter sends, Alt-Enter or Ctrl-J begins a new line.

    Args:
        completer: completes commands.
        history: file that keeps earlier questions; None to keep them until the chat ends.
        status: returns the line below the input, for a width in cells.
    """

    interactive = True

    def __init__(self, completer: Completer, history: Path | None, status: Callable[[int], str]) -> None:
        self._output = create_output(always_prefer_tty=True)
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            completer=completer,
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            history=_history(history),
            key_bindings=_bindings(),
            prompt_continuation="  ",
            enable_open_in_editor=True,
            bottom_toolbar=lambda: status(get_app().output.get_size().columns),
            output=self._output,
        )
        self._consent: PromptSession[str] = PromptSession(output=self._output)

    def question(self, default: str = "") -> str:
        """Let the user type."""
        return self._session.prompt("> ", default=default)

    def consent(self) -> Consent:
        """Ask until the answer is valid ("yes" means once); characters that were typed before do not count."""
        with suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
        while True:
            try:
                typed = self._consent.prompt("run it? [o]nce, [a]lways this tool, [n]o: ").strip().lower()
            except EOFError:
                return Consent.NO
            if typed in ("y", "yes"):
                return Consent.ONCE
            for consent in Consent:
                if typed and consent.name.lower().startswith(typed):
                    return consent


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            pass
    except OSError as error:
        show(f"note: {path}: cannot be written ({error.strerror}); questions are kept until the chat ends")
        return InMemoryHistory()
    return FileHistory(str(path))


def _bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


@contextmanager
def quiet_keyboard(stream: IO[str]) -> Iterator[None]:
    """Keep characters that are typed during an answer out of the output; the next prompt gets them.

    Enter stays Enter: as a line feed, in which a terminal converts it, it would begin a new line at the prompt.
    """
    try:
        descriptor = stream.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    changed = [*before]
    changed[0] &= ~termios.ICRNL
    changed[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
