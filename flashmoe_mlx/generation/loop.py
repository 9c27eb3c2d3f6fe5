"""Generate one answer: prefill, then decode token by token, as pieces of text."""

from collections.abc import Iterator
from typing import Any, Self

from flashmoe_mlx.generation.logprobs import TokenLogprobs
from flashmoe_mlx.generation.metrics import RunMetrics
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.runner import Runner
from flashmoe_mlx.generation.sequence import Sequence, Status
from flashmoe_mlx.generation.text_stream import Piece, TextStream
from flashmoe_mlx.text.tokenizer import Tokenizer


class Generation(Iterator[Piece]):
    """An iterator over the pieces of an answer, with its measurements; ``cancel`` ends it early.

    Several generations of one engine may be interleaved. A call of ``next`` while another thread is inside the engine
    raises ``EngineBusyError`` and changes nothing, so it can be repeated.
    """

    def __init__(self, runner: Runner, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self._runner = runner
        self._sequence = sequence
        self._text = TextStream(sequence, tokenizer)
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        with self._runner.exclusive():
            try:
                while not self._ended:
                    self._advance()
                    piece = self._text.take()
                    if piece is not None:
                        if piece.finish_reason is not None:
                            self._ended = True
                        return piece
            except BaseException:
                self._ended = True  # the pass may have ended between two layers
                raise
        raise StopIteration

    @property
    def request(self) -> Request:
        """The request that is being answered."""
        return self._sequence.request

    @property
    def metrics(self) -> RunMetrics:
        """The measurements of this generation."""
        return self._sequence.metrics

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """The log probabilities of the prompt's tokens from the second on, if the request asks for them.

        They are complete when the first piece is.
        """
        return self._sequence.prompt_logprobs

    @property
    def thinking(self) -> bool:
        """Whether the tokens so far end inside the model's thinking."""
        return self._text.thinking

    def cancel(self) -> None:
        """End the generation: at the next layer, if a forward pass is running. May be called from any thread.

        The next piece is then the last one, with ``finish_reason`` "cancelled".
        """
        self._sequence.cancel()

    def close(self) -> None:
        """Cancel the generation without a last piece."""
        self.cancel()
        self._ended = True

    def stats(self) -> dict[str, Any]:
        """Return the measurements so far, in the form of ``metrics.json``."""
        return self.metrics.to_json(self._runner.model.touched_bytes, self._runner.store.layout.mean_record_bytes)

    def _advance(self) -> None:
        """Run one pass, or none if the sequence was cancelled."""
        sequence = self._sequence
        if not sequence.cancelled:
            if sequence.status is Status.WAITING:
                self._runner.prefill(sequence)
            else:
                self._runner.decode([sequence])
        if sequence.cancelled and sequence.status is not Status.FINISHED:
            sequence.finish("cancelled")
