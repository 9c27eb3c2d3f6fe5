"""One answer of the model: generated, shown while it arrives, and divided into text, thinking and calls of tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashmoe_mlx.chat.interrupts import interrupts_to
from flashmoe_mlx.chat.screen import AnswerView
from flashmoe_mlx.chat.status import Status, measured
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.generation.request import RequestOptions
from flashmoe_mlx.generation.text_stream import Piece
from flashmoe_mlx.text.tool_calls import ToolCall, ToolCallReader


@dataclass
class Answer:
    """The part of an answer that arrived.

    Attributes:
        text: the answer.
        reasoning: the model's thinking.
        calls: the tools that the model calls.
        finish_reason: as in ``Piece``; None if an error ended the answer.
        thinking: whether the answer ended inside thinking.
        interrupted: whether the user interrupted it.
        error: the error that ended it.
        status: the figures at its end.
        stats: the measurements of the generation, for JSON.
    """

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    thinking: bool = False
    interrupted: bool = False
    error: FlashMoeError | None = None
    status: Status | None = None
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing arrived."""
        return not (self.text or self.reasoning or self.calls)


def generate_answer(
    engine: Engine,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: RequestOptions,
    view: AnswerView,
) -> Answer:
    """Generate the next answer of a conversation; an interrupt or an error ends it and keeps what arrived.

    Args:
        engine: the model.
        messages: the conversation.
        tools: the declarations of tools.
        options: further arguments of ``Engine.generate``.
        view: shows the answer.

    Raises:
        InputError: the request is refused before anything is generated.
    """
    max_context = engine.model.config.max_context

    def on_prefill(done: int, total: int) -> None:
        view.show_status(measured(generation.metrics, done, max_context, f"reading the prompt: {done:,} of {total:,}"))

    complete: RequestOptions = {**options, "tools": tools}
    if tools:
        complete["tool_choice"] = "auto"  # enforces names and types of arguments
    generation = engine.generate(messages, on_prefill=on_prefill, **complete)
    reader = _Reader(engine, tools)
    answer = Answer()
    tokens = len(generation.request.prompt_ids)
    with interrupts_to(generation.cancel) as interrupted:
        try:
            for piece in generation:
                tokens += len(piece.token_ids)
                reader.take(piece, answer, view)
                view.show_status(measured(generation.metrics, tokens, max_context))
        except FlashMoeError as error:
            answer.error = error
        finally:
            reader.finish(answer, view)
            view.close()
        answer.interrupted = interrupted()
    answer.thinking = generation.thinking
    answer.status = measured(generation.metrics, tokens, max_context, "")
    answer.stats = generation.stats()
    return answer


class _Reader:
    """A reader of pieces, which reads calls of tools if there are tools."""

    def __init__(self, engine: Engine, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._calls = None if tools is None else ToolCallReader(tools, tool_format=engine.tool_format)

    def take(self, piece: Piece, answer: Answer, view: AnswerView) -> None:
        """Add ``piece`` to ``answer``, and show it."""
        answer.finish_reason = piece.finish_reason
        if piece.reasoning:
            answer.reasoning += piece.reasoning
            view.think(piece.reasoning)
        self._write(piece.text if self._calls is None else self._calls.add(None, piece.text).content, answer, view)

    def finish(self, answer: Answer, view: AnswerView) -> None:
        """Add the rest that was held back."""
        if self._calls is not None:
            self._write(self._calls.finish().content, answer, view)
            answer.calls = self._calls.calls

    def _write(self, text: str, answer: Answer, view: AnswerView) -> None:
        if text:
            answer.text += text
            view.write(text)
