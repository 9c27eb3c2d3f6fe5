"""The two streams of the program: stdout holds the answer, stderr everything else.

A reader that goes away, a full disk behind a stream or a closed stream must end neither a run nor its record.
"""

import contextlib
import os
import re
import sys
from typing import TextIO

from flashmoe_mlx.errors import FlashMoeError

_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


class OutputError(FlashMoeError):
    """A part of the answer that could not be written to stdout."""

    default_code = "output_failed"


class Notes:
    """A text stream that is whatever ``sys.stderr`` is at the time, and never fails: notes are dispensable."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Write ``text`` if that is possible; returns its length."""
        if sys.stderr is not None:
            try:
                sys.stderr.write(text)
            except OSError:
                _discard(sys.stderr)
        return len(text)

    def flush(self) -> None:
        """Send what is buffered."""
        if sys.stderr is not None:
            try:
                sys.stderr.flush()
            except OSError:
                _discard(sys.stderr)

    def isatty(self) -> bool:
        """Whether a person reads this in a terminal."""
        return sys.stderr is not None and sys.stderr.isatty()

    def fileno(self) -> int:
        """Return the descriptor of stderr."""
        return sys.stderr.fileno()


def say(line: str) -> None:
    """Print a line for a person on stderr, as it stands."""
    notes = Notes()
    notes.write(f"{line}\n")
    notes.flush()


def one_line(text: str) -> str:
    """Return ``text`` with control characters written as escapes, so that it is one line and commands no terminal."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def drop_answer() -> None:
    """Send what is left of the answer, and everything that follows, nowhere."""
    if sys.stdout is not None:
        _discard(sys.stdout)


def print_answer(text: str, end: str = "\n") -> None:
    """Print to stdout at once.

    Raises:
        BrokenPipeError: the reader went away; everything printed from now on is dropped.
        OutputError: the text cannot be written; likewise.
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
            f"stdout: {error.strerror}: the output ends early there; make room, or send it elsewhere"
        ) from error


def _discard(stream: TextIO) -> None:
    """Send what is left in the buffer of ``stream``, and all that follows, nowhere: Python flushes it at exit."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test or a notebook has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
