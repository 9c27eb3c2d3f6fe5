"""Log probabilities of the tokens of a prompt, for evaluations that ask for them with ``echo``."""

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.logprobs import TokenLogprobs, token_logprobs
from flashmoe_mlx.server.answer import Answer
from flashmoe_mlx.server.events import Event, Finished, PromptScored, Started, Text, Usage

_MOST_LOGITS = 2**26
"""The largest number of logits at a time: 256 MiB in f32."""


class Scoring:
    """The pass over one prompt, a part at a time.

    A request for one greedy token is answered from the logits of the prompt, without a second pass.

    Args:
        engine: the engine.
        answer: the answer to the request.

    Attributes:
        scored: whether the whole prompt is scored.
        finished: the last event, if the answer is complete after the prompt.
    """

    def __init__(self, engine: Engine, answer: Answer) -> None:
        self._engine = engine
        self.answer = answer
        self._request = answer.prepared.request
        self._cache = engine.new_cache()
        self._done = 0
        self._logprobs: list[TokenLogprobs] = []
        self._last: TokenLogprobs | None = None
        self.scored = False
        self.finished: Finished | None = None

    def usage(self, completion: int = 0) -> Usage:
        """Return the numbers of tokens."""
        return Usage(len(self._request.prompt_ids), completion=completion)

    def advance(self) -> list[Event]:
        """Score the next part of the prompt; return the new events."""
        tokens = self._request.prompt_ids
        size = max(1, _MOST_LOGITS // self._engine.model.config.vocab_size)
        part = tokens[self._done : self._done + size]
        logits = self._engine.forward(part, self._cache)
        count = self._request.logprobs or 0
        for row, target in zip(logits, tokens[self._done + 1 : self._done + len(part) + 1], strict=False):
            self._logprobs.append(token_logprobs(row, target, count))
        events: list[Event] = [] if self._done else [Started(self.usage())]
        self._done += len(part)
        if self._done < len(tokens):
            return events
        self.scored = True
        events.append(PromptScored(tuple(self._logprobs)))
        if not self.answer.prepared.generates:
            self.finished = Finished("length", self.usage())
        elif self._request.max_tokens == 1 and self._request.sampling.options == type(self._request.sampling.options)():
            token = int(logits[-1].argmax())
            events.append(self._token(token_logprobs(logits[-1], token, count)))
            self.finished = Finished("stop" if token in self._request.stop_ids else "length", self.usage(1))
        return events

    def _token(self, entry: TokenLogprobs) -> Text:
        detokenizer = self._engine.tokenizer.detokenizer()
        stop = entry.token_id in self._request.stop_ids
        text = "" if stop else detokenizer.add(entry.token_id) + detokenizer.flush()
        return Text(text, (entry,))
