"""A request: everything that determines an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.logits import LogitsProcessor
from flashmoe_mlx.generation.prompting import Tools
from flashmoe_mlx.generation.sampling import ChosenSampling, PublishedSampling

FinishReason = Literal["stop", "length", "cancelled"]
PrefillProgress = Callable[[int, int], object]
"""Called with the number of prompt tokens that are done, fractions of a chunk included, and with their total."""
_LONGEST_STOP = 4096
_MOST_STOPS = 64


class PromptOptions(TypedDict, total=False):
    """The options that shape a prompt, as keyword arguments; see ``render_prompt``.

    Attributes:
        raw: send a string without the chat template, and do not separate thinking from the text.
        system: the system message.
        tools: declarations of functions, in the form of the OpenAI API.
        enable_thinking: whether the model may think first; None leaves it to the template.
        template_options: further variables of the template.
    """

    raw: bool
    system: str | None
    tools: Tools | None
    enable_thinking: bool | None
    template_options: Mapping[str, Any] | None


class RequestOptions(PromptOptions, total=False):
    """The options of an answer, as keyword arguments of ``Engine.generate`` and ``Engine.request``.

    Attributes:
        max_tokens: the largest number of tokens to generate, thinking included; 256 if it is missing.
        temperature: 0 for greedy decoding; None, here and below, for the value in the model's generation_config.json.
            See ``SamplingOptions`` for this and the next six.
        top_p: as in ``SamplingOptions``.
        top_k: as in ``SamplingOptions``.
        min_p: as in ``SamplingOptions``.
        repetition_penalty: as in ``SamplingOptions``.
        presence_penalty: as in ``SamplingOptions``.
        frequency_penalty: as in ``SamplingOptions``.
        seed: makes the draws repeatable; None for different draws each time.
        stop: texts that end the answer and are not part of it; a single text or several.
        logprobs: the number of alternatives to report for each token, with log probabilities; None for none.
        logits_processors: called with the logits f64 [vocabulary] of each step and the ``TokenHistory``; each returns
            changed logits.
        prefill_chunk: the number of prompt tokens that go through a layer together; None for as many as fit into free
            memory.
        ignore_eos: continue after the end of the answer, for benchmarks.
    """

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    logits_processors: Sequence[LogitsProcessor]
    prefill_chunk: int | None
    ignore_eos: bool


_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def prompt_options(options: RequestOptions) -> PromptOptions:
    """Return the part of ``options`` that shapes the prompt.

    Raises:
        TypeError: an option does not exist, as for a keyword argument.
    """
    if unknown := sorted(options.keys() - RequestOptions.__optional_keys__):
        known = ", ".join(sorted(RequestOptions.__optional_keys__))
        raise TypeError(f"there is no option {unknown[0]!r}; the options of a request are {known}")
    return {name: options[name] for name in PromptOptions.__optional_keys__ & options.keys()}  # type: ignore[literal-required,return-value]


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
        prefill_chunk: the number of prompt tokens that go through a layer together; None for as many as fit into free
            memory.
        split_reasoning: whether thinking is separated from the answer.
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
    prefill_chunk: int | None = None
    split_reasoning: bool = True
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


def make_request(
    prompt_ids: list[int], options: RequestOptions, published: PublishedSampling, eos_ids: frozenset[int]
) -> Request:
    """Return the request for a tokenized prompt with ``options``.

    Args:
        prompt_ids: the tokens of the prompt.
        options: the options of the answer.
        published: the model's sampling options, which apply where ``options`` have none.
        eos_ids: the tokens that end an answer.

    Raises:
        InputError: an option is out of range; see ``Request`` and ``PublishedSampling.choose``.
    """
    stop = options.get("stop", ())
    return Request(
        prompt_ids=prompt_ids,
        sampling=published.choose(**{name: options.get(name) for name in _SAMPLING}),  # type: ignore[arg-type]
        max_tokens=options.get("max_tokens", 256),
        seed=options.get("seed"),
        stop_ids=frozenset() if options.get("ignore_eos", False) else eos_ids,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=options.get("logprobs"),
        prefill_chunk=checked_chunk(options.get("prefill_chunk")),
        split_reasoning=not options.get("raw", False),
        processors=tuple(options.get("logits_processors", ())),
    )


def checked_chunk(prefill_chunk: int | None) -> int | None:
    """Return ``prefill_chunk``; None leaves the choice to the runner.

    Raises:
        InputError: it is not a positive integer; code "invalid_prefill_chunk".
    """
    if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
        raise InputError(
            f"prefill_chunk={prefill_chunk!r}: must be a whole number, at least 1 token", code="invalid_prefill_chunk"
        )
    return prefill_chunk
