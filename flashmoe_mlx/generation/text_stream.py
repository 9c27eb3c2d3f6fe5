"""Convert generated tokens to pieces: detokenize, separate thinking and tool calls from the text, find stop strings."""

from dataclasses import dataclass

from flashmoe_mlx.generation.logprobs import TokenLogprobs
from flashmoe_mlx.generation.request import FinishReason
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.generation.stopping import StopStrings
from flashmoe_mlx.text.reasoning import ReasoningSplitter
from flashmoe_mlx.text.tags import Segment
from flashmoe_mlx.text.tokenizer import Tokenizer
from flashmoe_mlx.text.tool_calls import CallDelta, ToolCallReader

_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: text that became certain, and the tokens behind it.

    Attributes:
        text: the next part of the answer.
        token_ids: the tokens of ``text`` and ``reasoning``, tokens without text included.
        finish_reason: "stop" (the model ended its answer, or a stop string came), "length" (``max_tokens`` or the
            context limit) or "cancelled" (``Generation.cancel``); None in all pieces but the last.
        reasoning: the next part of the model's thinking, which precedes its answer; always empty for a model that does
            not think, and for raw prompts.
        stop: the stop string that ended the answer, in the last piece.
        logprobs: the log probabilities of ``token_ids``, if the request asked for them.
        calls: the next parts of tool calls, if a reader of tool calls was given.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    stop: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    calls: tuple[CallDelta, ...] = ()


class TextStream:
    """A conversion of the tokens of one sequence to pieces while they are generated.

    Args:
        sequence: the sequence.
        tokenizer: the tokenizer of its model.
        tool_reader: separates tool calls from the text; None leaves them in the text.

    Attributes:
        reasoning_tokens: the number of tokens that belong to thinking so far.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, tool_reader: ToolCallReader | None = None) -> None:
        request = sequence.request
        self._sequence = sequence
        self._detokenizer = tokenizer.detokenizer()
        self._splitter = ReasoningSplitter(tokenizer, request.prompt_ids) if request.split_reasoning else None
        self._tools = tool_reader
        self._stop = StopStrings(request.stop)
        self.reasoning_tokens: int = 0
        self._given = 0
        """The number of tokens that pieces have returned."""
        self._read = 0
        """The number of tokens that were detokenized."""

    @property
    def thinking(self) -> bool:
        """Whether the tokens so far end inside the model's thinking."""
        return self._splitter is not None and self._splitter.open

    def take(self) -> Piece | None:
        """Return the text that new tokens of the sequence made certain; None if there is none.

        A stop string finishes the sequence. The piece of a finished sequence is its last one.
        """
        sequence = self._sequence
        reasoning = content = ""
        calls: list[CallDelta] = []
        for token in sequence.token_ids[self._read :]:
            text = "" if token in sequence.request.stop_ids else self._detokenizer.add(token)
            thought, segments = self._split(token, text)
            self.reasoning_tokens += self.thinking or bool(thought)
            reasoning += thought
            self._read += 1
            answer = self._without_calls(segments, calls)
            content += answer if self._read < sequence.request.min_tokens else self._stop.add(answer)
        if sequence.finish_reason is not None and self._stop.found is None:
            thought, segments = self._rest()
            reasoning += thought
            content += self._stop.add(self._without_calls(segments, calls, ended=True)) + self._stop.finish()
        if self._stop.found is not None:
            sequence.finish("stop")
        if not (reasoning or content or calls) and sequence.finish_reason is None:
            return None
        tokens = tuple(sequence.token_ids[self._given : self._read])
        logprobs = tuple(sequence.logprobs[self._given : self._read])
        self._given = self._read
        return Piece(content, tokens, sequence.finish_reason, reasoning, self._stop.found, logprobs, tuple(calls))

    def _split(self, token: int, text: str) -> tuple[str, list[Segment]]:
        return ("", [Segment(text)]) if self._splitter is None else self._splitter.split(token, text)

    def _rest(self) -> tuple[str, list[Segment]]:
        """Return the parts of the reasoning and of the answer that were held back."""
        reasoning, segments = self._split(_NO_TOKEN, self._detokenizer.flush())
        if self._splitter is None:
            return reasoning, segments
        rest = self._splitter.split_rest()
        return reasoning + rest[0], segments + rest[1]

    def _without_calls(self, segments: list[Segment], calls: list[CallDelta], *, ended: bool = False) -> str:
        """Return the text of ``segments``; move parts of tool calls to ``calls``."""
        if self._tools is None:
            return "".join(segment.text for segment in segments)
        outputs = [self._tools.add_segments(segments), *([self._tools.finish()] if ended else [])]
        calls += (delta for output in outputs for delta in output.calls)
        return "".join(output.content for output in outputs)
