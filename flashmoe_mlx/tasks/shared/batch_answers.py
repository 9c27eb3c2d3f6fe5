"""Answers of ``task=batch``: the requests of a line, and the line of their answer."""

from collections.abc import Mapping
from typing import Any, Protocol

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.batch_file import Line
from flashmoe_mlx.generation.request import Request, RequestOptions
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.generation.text_stream import TextStream
from flashmoe_mlx.server.chat_json import logprobs_writer, parse_conversation, whole_answer
from flashmoe_mlx.server.conversation import Conversation
from flashmoe_mlx.server.events import Event
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.preparing import prepare
from flashmoe_mlx.server.reading import AnswerReader

_MOST_CHOICES = 16


class BatchAnswer(Protocol):
    """The answer to a line.

    Attributes:
        requests: a request for each choice of the answer.
    """

    requests: list[Request]

    def begin(self, index: int, sequence: Sequence) -> None:
        """Read the answer to request number ``index`` from ``sequence``."""
        ...

    def take(self, index: int) -> None:
        """Take the new tokens of sequence number ``index``."""
        ...

    def line(self) -> Mapping[str, Any]:
        """Return the line of the answer, when all sequences have ended."""
        ...


def begin_answer(line: Line, engine: Engine, defaults: RequestOptions, model: str) -> BatchAnswer:
    """Return the answer to ``line``.

    Args:
        line: the line.
        engine: the model.
        defaults: options of requests that do not set them.
        model: the name of the model.

    Raises:
        InputError: the line is not a request, or an option is wrong.
    """
    if line.error is not None:
        raise line.error
    return _PlainAnswer(line, engine, defaults) if line.body is None else _ChatAnswer(line, engine, defaults, model)


class _PlainAnswer:
    """The answer to a plain line."""

    def __init__(self, line: Line, engine: Engine, defaults: RequestOptions) -> None:
        options: RequestOptions = {**defaults, **line.options}
        self.requests = [engine.request(line.prompt, **options)]
        self._line = line
        self._engine = engine
        self._text = self._reasoning = ""

    def begin(self, index: int, sequence: Sequence) -> None:  # noqa: ARG002  # there is one
        self._sequence = sequence
        self._stream = TextStream(sequence, self._engine.tokenizer)

    def take(self, index: int) -> None:  # noqa: ARG002  # there is one
        piece = self._stream.take()
        if piece is not None:
            self._text += piece.text
            self._reasoning += piece.reasoning

    def line(self) -> Mapping[str, Any]:
        counts = len(self._sequence.request.prompt_ids), len(self._sequence.token_ids)
        return self._line.answer(self._text, self._reasoning, str(self._sequence.finish_reason), counts)


class _ChatAnswer:
    """The answer to a line of the OpenAI batch API, whose body the server would answer alike."""

    def __init__(self, line: Line, engine: Engine, defaults: RequestOptions, model: str) -> None:
        assert line.body is not None
        given = Fields(dict(line.body))
        if given.flag("stream"):
            given.refuse("stream", "must be false: an answer in a file cannot be streamed")
        count = given.integer("n", 1, _MOST_CHOICES) or 1
        fields = Fields({name: value for name, value in line.body.items() if name != "n"})
        asked = parse_conversation(fields, engine)
        options = {name: value for name, value in asked.options.items() if value is not None}
        if all(line.body.get(name) is None for name in ("max_tokens", "max_completion_tokens")):
            del options["max_tokens"]
        options = {**{name: value for name, value in defaults.items() if value is not None}, **options}
        seed = options.get("seed")
        self._prepared = [
            prepare(
                Conversation(
                    asked.messages, asked.tools, options if seed is None else {**options, "seed": seed + index}
                ),
                engine,
            )
            for index in range(count)
        ]
        self.requests = [prepared.request for prepared in self._prepared]
        self._line = line
        self._engine = engine
        self._model = model
        self._logprobs = logprobs_writer(engine) if "logprobs" in options else lambda _: None
        self._readers: dict[int, AnswerReader] = {}
        self._events: list[list[Event]] = [[] for _ in self.requests]

    def begin(self, index: int, sequence: Sequence) -> None:
        engine = self._engine
        self._readers[index] = AnswerReader(
            self._prepared[index], sequence, engine.tokenizer, engine.model.config.max_context
        )

    def take(self, index: int) -> None:
        self._events[index] += self._readers[index].take()

    def line(self) -> Mapping[str, Any]:
        return self._line.response(whole_answer(self._model, self._events, self._logprobs))
