"""A program in a pseudo-terminal, and the screen that a person would see."""

import os
import re
import time
from pathlib import Path

import pexpect
import pyte

_TIMEOUT = 60.0
_LINE_BELOW = r"\n[ \n]*(?:[\d,]+/[\d,]+ tokens|/help)[^\n]*"
_INPUT = re.compile(
    rf"(?:^|\n)>(?:(?: [^\n]*)?(?:\n  [^\n]*)*{_LINE_BELOW})?$"
    r"|\nrun it\? [^\n]*\[n\]o:$"
)
"""The end of the screen while the program reads the keyboard: a prompt with the line below it, or a question."""


class _Screen(pyte.HistoryScreen):
    """A screen that answers the program's questions about the cursor."""

    def __init__(self, columns: int, lines: int, program: "pexpect.spawn[str]") -> None:
        super().__init__(columns, lines, history=10_000, ratio=0.5)
        self._program = program

    def write_process_input(self, data: str) -> None:
        self._program.send(data)


class Terminal:
    """A program that runs in a terminal of ``columns`` and ``lines``."""

    def __init__(self, command: list[str], folder: Path, columns: int = 80, lines: int = 24, **variables: str) -> None:
        environment = {**os.environ, "TERM": "xterm-256color", **variables}
        environment.pop("COLUMNS", None)
        self.program: pexpect.spawn[str] = pexpect.spawn(
            command[0],
            command[1:],
            cwd=folder,
            env=environment,  # type: ignore[arg-type]
            dimensions=(lines, columns),
            encoding="utf-8",
            timeout=_TIMEOUT,
        )
        self.program.delaybeforesend = None
        self.screen = _Screen(columns, lines, self.program)
        self.stream = pyte.Stream(self.screen)
        self.output = ""
        """Everything that the program wrote, with its control sequences."""

    def read(self, seconds: float = 0.0) -> None:
        """Show what the program writes for ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                data = self.program.read_nonblocking(65536, timeout=0.02)
            except pexpect.TIMEOUT:
                if time.monotonic() >= deadline:
                    return
                continue
            except pexpect.EOF:
                return
            self.output += data
            self.stream.feed(data)

    @property
    def text(self) -> str:
        """All lines, those that scrolled away included."""
        before = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*before, *self.screen.display])

    def wait(self, text: str, since: int = 0, seconds: float = _TIMEOUT) -> None:
        """Wait until ``text`` is on the screen, in the output after ``since`` characters.

        Time in which this process does not run does not count.
        """
        waited = 0.0
        while text not in self.text[since:]:
            assert waited < seconds, f"no {text!r} in:\n{self.text[since:]}"
            waited += 0.02
            assert self.program.isalive() or text in self.text, self.text
            self.read(0.02)

    def wait_for_input(self, seconds: float = _TIMEOUT) -> None:
        """Wait until the program reads the keyboard."""
        waited = 0.0
        while not _INPUT.search(self.text.rstrip()):
            assert waited < seconds, f"no prompt in:\n{self.text[-2000:]}"
            assert self.program.isalive(), self.text
            self.read(0.02)
            waited += 0.02

    def type(self, text: str, *expected: str, key: str = "\r") -> str:
        """Type ``text`` and a key; wait for each of the ``expected`` texts; return the text since the prompt."""
        self.wait_for_input()
        since = max(0, self.text.rfind("\n> "), self.text.rfind("\n>\n"))
        self.program.send(text + key)
        for wanted in expected:
            self.wait(wanted, since)
        return self.text[since:]

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.program.send("\x03")

    def resize(self, columns: int, lines: int) -> None:
        """Change the size of the window."""
        self.read()
        self.program.setwinsize(lines, columns)
        self.screen.resize(lines, columns)

    def close(self) -> None:
        """End the program."""
        self.program.close(force=True)
