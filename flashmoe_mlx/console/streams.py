"""Output streams of the program: stdout for the answer, stderr for everything else.

A reader that disconnects, a full disk or a closed stream must not end a run or prevent its record.
"""

import contextlib
import os
import re
import sys
from typing import TextIO

from flashmoe_mlx.errors import FlashMoeError

_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class OutputError(FlashMoeError):
    """Error for output that could not be written to stdout."""

    default_code = "output_failed"


class Notes:
    """Text stream to the current ``sys.stderr`` that ignores errors, because notes are dispensable."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Write ``text`` if possible, and return its length."""
        if sys.stderr is not None:
            try:
                sys.stderr.write(text)
            except OSError:
                _discard(sys.stderr)
        return len(text)

    def flush(self) -> None:
        """Flush stderr if possible."""
        if sys.stderr is not None:
            try:
                sys.stderr.flush()
            except OSError:
                _discard(sys.stderr)

    def isatty(self) -> bool:
        """Return whether stderr is a terminal."""
        return sys.stderr is not None and sys.stderr.isatty()

    def fileno(self) -> int:
        """Return the file descriptor of stderr."""
        return sys.stderr.fileno()


def say(line: str) -> None:
    """Print a line literally to stderr."""
    notes = Notes()
    notes.write(f"{line}\n")
    notes.flush()


def one_line(text: str) -> str:
    """Return ``text`` with control characters escaped, so that it is one line and sends no commands to a terminal."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def neutralize(text: str) -> str:
    """Replace characters by which text could send commands to a terminal, or make it show text in another order.

    Tabs and line breaks stay.
    """
    return _COMMANDS.sub("\ufffd", text)


def drop_answer() -> None:
    """Discard the buffered rest of the answer and all later output to stdout."""
    if sys.stdout is not None:
        _discard(sys.stdout)


def print_answer(text: str, end: str = "\n") -> None:
    """Print to stdout and flush. After an error, all later output to stdout is discarded.

    Raises:
        BrokenPipeError: the reader of stdout disconnected.
        OutputError: the text cannot be written for another reason.
    """
    if sys.stdout is None:
        return
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
        raise
    except OSError as error:
        _discard(sys.stdout)
        raise OutputError(
            f"stdout: {error.strerror}: the output is incomplete; free some space, or redirect it elsewhere"
        ) from error


def _discard(stream: TextIO) -> None:
    """Redirect ``stream`` to the null device, including its buffer, which Python flushes at exit."""
    with contextlib.suppress(OSError, ValueError):  # a stream in a test or notebook has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
