"""Streaming of an answer to the terminal: progress of prefill, thinking apart from the answer, interrupts."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flashmoe_mlx.console.output import console, literal_console, show
from flashmoe_mlx.console.streams import OutputError, neutralize, print_answer
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.prompting import load_tools
from flashmoe_mlx.generation.request import PromptOptions
from flashmoe_mlx.generation.text_stream import Piece
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.tasks.shared.constraints import constraint_options
from flashmoe_mlx.tasks.shared.keys import GenerationConfig

_INTERRUPTED = 130
_BAR_DELAY = 1.0
"""Seconds before the progress of prefill is shown."""


@dataclass
class Streamed:
    """The part of an answer that was shown."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    thinking: bool = False
    """Whether the last token is part of the model's thinking."""
    stopped: BaseException | None = None
    """Interrupt or output error that ended the answer early."""

    def take(self, piece: Piece) -> None:
        """Append ``piece``."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.token_ids += piece.token_ids
        self.finish_reason = piece.finish_reason


def prompt_options(config: GenerationConfig) -> PromptOptions:
    """Return the options of the prompt.

    Raises:
        InputError: the file given by ``tools=`` does not contain valid tools.
    """
    return {
        "raw": config.raw,
        "system": config.system,
        "tools": None if config.tools is None else load_tools(expand_path(config.tools)),
        "enable_thinking": config.thinking,
        "template_options": config.template_options,
    }


def stream(engine: Engine, config: GenerationConfig, options: PromptOptions) -> Streamed:
    """Generate an answer and show each piece as soon as it is available.

    Args:
        engine: the loaded model.
        config: the prompt, and the limits and sampling options of the answer.
        options: the result of ``prompt_options``, which checks files before a model is loaded.
    """
    bar = PrefillBar()
    generation = engine.generate(
        config.prompt,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        seed=config.seed,
        prefill_chunk=config.prefill_chunk,
        on_prefill=bar,
        **constraint_options(config),
        **options,
    )
    shown = Streamed()
    printer = _Printer()
    try:
        with _interrupts(generation.cancel) as interrupted:
            try:
                for piece in generation:
                    bar.stop()
                    shown.take(piece)
                    printer.show(piece)
            finally:
                bar.stop()
            if interrupted():
                raise KeyboardInterrupt
        print_answer("")
    except (KeyboardInterrupt, BrokenPipeError, OutputError) as stopped:
        shown.stopped = stopped
    shown.thinking = generation.thinking
    return shown


class PrefillBar:
    """Progress bar of prefill on stderr, which appears after ``_BAR_DELAY`` if stderr is a terminal.

    Implements ``generation.PrefillProgress``.
    """

    def __init__(self) -> None:
        columns = (
            TextColumn("reading the prompt"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._shown_from = time.monotonic() + _BAR_DELAY

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` prompt tokens are processed."""
        if console.is_terminal and time.monotonic() >= self._shown_from:
            self._bar.start()
            self._bar.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar.live.is_started:
            self._bar.stop()


class _Printer:
    """Printer of pieces: the answer goes to stdout; thinking goes to a terminal dimmed, or else to stderr."""

    def __init__(self) -> None:
        self._terminal = sys.stdout is not None and sys.stdout.isatty()
        self._dimmed = literal_console() if self._terminal and not literal_console().is_dumb_terminal else None
        self._thought = False
        self._answered = False

    def show(self, piece: Piece) -> None:
        """Print ``piece``."""
        if piece.reasoning:
            self._show_thinking(piece.reasoning)
        if piece.text:
            if self._thought and not self._answered:
                self._end_thinking()
            self._answered = True
            text = neutralize(piece.text) if self._terminal else piece.text
            print_answer(text, end="")

    def _show_thinking(self, text: str) -> None:
        if self._dimmed is None and not self._thought:
            show("thinking:")
        screen, style = (console, None) if self._dimmed is None else (self._dimmed, "dim")
        text = neutralize(text)
        screen.print(text, style=style, end="", soft_wrap=True)
        self._thought = True

    def _end_thinking(self) -> None:
        if self._dimmed is not None:
            print_answer("\n")
        else:
            show("\n\nanswer:")


@contextmanager
def _interrupts(cancel: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Call ``cancel`` at the first interrupt, which lets the current layer finish; exit at the second.

    Yields a function that returns whether an interrupt has occurred. A handler that raises an exception instead could
    leave a store's bookkeeping half done. Ignored interrupts, as in background jobs of a shell, stay ignored.
    """
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the signature of a handler
        nonlocal count
        count += 1
        if count > 1:
            os._exit(_INTERRUPTED)
        cancel()
        with suppress(OSError, RuntimeError):  # stderr is closed, or a write to it was interrupted
            show("stopping after this layer; interrupt again to stop at once")

    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, previous)
