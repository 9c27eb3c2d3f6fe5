"""Convert generated tokens to pieces of text: detokenize, separate thinking from the answer, find stop strings."""

from dataclasses import dataclass

from flashmoe_mlx.generation.logprobs import TokenLogprobs
from flashmoe_mlx.generation.request import FinishReason
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.generation.stopping import StopStrings
from flashmoe_mlx.text.reasoning import ReasoningSplitter
from flashmoe_mlx.text.tokenizer import Tokenizer

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
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    stop: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class TextStream:
    """A conversion of the tokens of one sequence to pieces while they are generated."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        request = sequence.request
        self._sequence = sequence
        self._detokenizer = tokenizer.detokenizer()
        self._splitter = ReasoningSplitter(tokenizer, request.prompt_ids) if request.split_reasoning else None
        self._stop = StopStrings(request.stop)
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
        for token in sequence.token_ids[self._read :]:
            text = "" if token in sequence.request.stop_ids else self._detokenizer.add(token)
            thought, answer = self._split(token, text)
            reasoning += thought
            self._read += 1
            content += answer if self._read < sequence.request.min_tokens else self._stop.add(answer)
        if sequence.finish_reason is not None and self._stop.found is None:
            thought, answer = self._rest()
            reasoning += thought
            content += self._stop.add(answer) + self._stop.finish()
        if self._stop.found is not None:
            sequence.finish("stop")
        if not (reasoning or content) and sequence.finish_reason is None:
            return None
        tokens = sequence.token_ids[self._given : self._read]
        logprobs = sequence.logprobs[self._given : self._read]
        self._given = self._read
        return Piece(content, tuple(tokens), sequence.finish_reason, reasoning, self._stop.found, tuple(logprobs))

    def _split(self, token: int, text: str) -> tuple[str, str]:
        return ("", text) if self._splitter is None else self._splitter.add(token, text)

    def _rest(self) -> tuple[str, str]:
        """Return the parts of the reasoning and of the answer that were held back."""
        reasoning, content = self._split(_NO_TOKEN, self._detokenizer.flush())
        if self._splitter is None:
            return reasoning, content
        rest = self._splitter.finish()
        return reasoning + rest[0], content + rest[1]
