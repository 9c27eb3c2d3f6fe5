"""The output of a chat, for terminals and for files."""

import sys
from typing import Protocol

from flashmoe_mlx.chat.status import Status
from flashmoe_mlx.console.output import show
from flashmoe_mlx.console.streams import neutralize, print_answer


class AnswerView(Protocol):
    """One answer on the screen while it arrives."""

    def think(self, text: str) -> None:
        """Show the next part of the model's thinking."""
        ...

    def write(self, text: str) -> None:
        """Show the next part of the answer."""
        ...

    def show_status(self, status: Status) -> None:
        """Show the current figures."""
        ...

    def close(self) -> None:
        """End the answer: print for good what is shown only for the moment."""
        ...


class Screen(Protocol):
    """The output of a chat."""

    def note(self, text: str) -> None:
        """Show a note of the program; it may have several lines."""
        ...

    def quote(self, text: str) -> None:
        """Show text from elsewhere, such as thinking or the result of a tool."""
        ...

    def answer(self, folded: bool) -> AnswerView:
        """Begin an answer; if ``folded``, thinking is reduced to one line when it ends."""
        ...


class PlainScreen:
    """Output to files and pipes: answers go to stdout, everything else to stderr."""

    def note(self, text: str) -> None:
        """Show a note of the program on stderr."""
        show(text)

    def quote(self, text: str) -> None:
        """Show text from elsewhere on stderr."""
        show(neutralize(text))

    def answer(self, folded: bool) -> "PlainAnswer":  # noqa: ARG002  # stderr shows all thinking
        """Begin an answer."""
        return PlainAnswer()


class PlainAnswer:
    """One answer on stdout; thinking goes to stderr."""

    def __init__(self) -> None:
        self._literal = sys.stdout is not None and not sys.stdout.isatty()
        self._thought = self._answered = False

    def think(self, text: str) -> None:
        """Write thinking to stderr."""
        if not self._thought:
            show("thinking:")
        self._thought = True
        sys.stderr.write(neutralize(text))

    def write(self, text: str) -> None:
        """Write a part of the answer to stdout."""
        if self._thought and not self._answered:
            show("\n")
        self._answered = True
        print_answer(text if self._literal else neutralize(text), end="")

    def show_status(self, status: Status) -> None:
        """Show nothing: a file holds no changing line."""

    def close(self) -> None:
        """End the answer with an empty line."""
        if self._answered:
            print_answer("\n")
        elif self._thought:
            show()
