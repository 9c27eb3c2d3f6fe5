"""A request: everything that determines an answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.logits import LogitsProcessor
from flashmoe_mlx.generation.prompt_cache.positions import Kind
from flashmoe_mlx.generation.sampling import ChosenSampling

FinishReason = Literal["stop", "length", "cancelled"]
PrefillProgress = Callable[[int, int], object]
"""Called with the number of prompt tokens that are done, fractions of a chunk included, and with their total."""
PREFILL_CHUNK = 1024
"""The default number of prompt tokens that go through the model together."""
_LONGEST_STOP = 4096
_MOST_STOPS = 64


@dataclass(frozen=True, slots=True)
class Request:
    """A tokenized prompt, and the options of its answer.

    Attributes:
        prompt_ids: the tokens of the prompt, at least one; ``Runner.begin`` checks them.
        sampling: the sampling options.
        max_tokens: the largest number of tokens to generate, thinking included.
        seed: makes the draws repeatable; None for different draws each time.
        stop_ids: tokens that end the answer, such as the model's end of text.
        stop: texts that end the answer and are not part of it. They are looked for in the answer, not in thinking.
        logprobs: the number of alternatives to report for each token; None for no log probabilities at all.
        prefill_chunk: the number of prompt tokens that go through the model together.
        split_reasoning: whether thinking is separated from the answer.
        boundaries: positions in ``prompt_ids`` at which other prompts may diverge, for the prompt cache.
        processors: change the logits in this order, after the penalties of ``sampling`` and before its temperature.

    Raises:
        InputError: an attribute is out of range; codes "invalid_max_tokens", "invalid_stop", "invalid_logprobs" and
            "invalid_prefill_chunk".
    """

    prompt_ids: list[int]
    sampling: ChosenSampling
    max_tokens: int = 256
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prefill_chunk: int = PREFILL_CHUNK
    split_reasoning: bool = True
    boundaries: Mapping[int, Kind] = field(default_factory=dict)
    processors: tuple[LogitsProcessor, ...] = ()

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise InputError(
                f"max_tokens={self.max_tokens!r}: must be a whole number, at least 1", code="invalid_max_tokens"
            )
        checked_chunk(self.prefill_chunk)
        if self.logprobs is not None and (type(self.logprobs) is not int or self.logprobs < 0):
            raise InputError(
                f"logprobs={self.logprobs!r}: must be a whole number (0 for only the chosen token) or None",
                code="invalid_logprobs",
            )
        if type(self.stop) is not tuple:
            raise InputError(f"stop={self.stop!r:.60}: must be a tuple of texts", code="invalid_stop")
        if len(self.stop) > _MOST_STOPS:
            raise InputError(f"stop: {len(self.stop)} texts; at most {_MOST_STOPS} are allowed", code="invalid_stop")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_STOP:
                raise InputError(
                    f"stop={text!r:.60}: must be text of 1 to {_LONGEST_STOP} characters", code="invalid_stop"
                )


def checked_chunk(prefill_chunk: int | None) -> int:
    """Return the number of tokens in a chunk; None stands for the default.

    Raises:
        InputError: it is not a positive integer; code "invalid_prefill_chunk".
    """
    if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
        raise InputError(
            f"prefill_chunk={prefill_chunk!r}: must be a whole number, at least 1 token", code="invalid_prefill_chunk"
        )
    return prefill_chunk or PREFILL_CHUNK
