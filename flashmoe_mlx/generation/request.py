"""A request: everything that determines an answer."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.constraints import Constraint
from flashmoe_mlx.generation.logits import Exclusion, LogitsProcessor
from flashmoe_mlx.generation.prompting import Tools
from flashmoe_mlx.generation.sampling import ChosenSampling, PublishedSampling
from flashmoe_mlx.text.tags import TOOL_CALL
from flashmoe_mlx.text.tokenizer import Tokenizer

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


ToolChoice = Literal["auto", "none", "required"] | Mapping[str, Any]


class ConstraintOptions(TypedDict, total=False):
    """The options that constrain an answer, as keyword arguments; they need the extra ``grammar``.

    At most one of the first five is allowed. A constraint begins after the model's thinking. Where the last tokens of
    ``max_tokens`` come near, the answer is completed in few tokens, and its finish reason is "length". Only if even
    that does not fit, or for an unusual grammar, does the answer end without satisfying its constraint.

    Attributes:
        schema: a JSON schema that the answer satisfies. Keywords that cannot be enforced are refused. Properties come
            in the order of the schema.
        json_object: whether the answer is any JSON object.
        grammar: a grammar in the dialect of Lark that llguidance reads; the answer is its ``start``.
        regex: a regular expression that the whole answer matches.
        choices: texts of which the answer is one.
        tool_choice: "none" forbids calls of the ``tools``; "required" asks for at least one, and ``{"name": ...}`` for
            that function; the answer is then nothing but calls. "auto" leaves the choice to the model. Names and types
            of arguments are enforced in all calls, with "auto" only where the extra ``grammar`` is installed. None
            enforces nothing.
        parallel_tool_calls: False for at most one call, with a ``tool_choice``.
    """

    schema: Mapping[str, Any] | None
    json_object: bool
    grammar: str | None
    regex: str | None
    choices: Sequence[str] | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool | None


class RequestOptions(PromptOptions, ConstraintOptions, total=False):
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
        stop_token_ids: tokens that end the answer, in addition to the model's own.
        min_tokens: the number of tokens, thinking included, before which no token and no text may end the answer.
        logit_bias: a number from -100 to 100 for each token id, added to its logit before the penalties. Ids may be
            text, as in JSON. -100 excludes a token.
        logprobs: the number of alternatives to report for each token, with log probabilities; None for none.
        prompt_logprobs: the same for the tokens of the prompt; see ``Generation.prompt_logprobs``.
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
    stop_token_ids: Sequence[int]
    min_tokens: int
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    logprobs: int | None
    prompt_logprobs: int | None
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
        min_tokens: the number of tokens before which neither ``stop_ids`` nor ``stop`` end the answer.
        logit_bias: numbers that are added to the logits of tokens.
        logprobs: the number of alternatives to report for each token; None for no log probabilities at all.
        prompt_logprobs: the same for each token of the prompt but the first.
        prefill_chunk: the number of prompt tokens that go through a layer together; None for as many as fit into free
            memory.
        split_reasoning: whether thinking is separated from the answer.
        processors: change the logits in this order, after the penalties of ``sampling`` and before its temperature.
        constraint: the grammar that the answer follows; None for a free answer.

    Raises:
        InputError: an attribute is out of range; codes "invalid_max_tokens", "invalid_min_tokens", "invalid_stop",
            "invalid_logprobs", "invalid_logit_bias" and "invalid_prefill_chunk".
    """

    prompt_ids: list[int]
    sampling: ChosenSampling
    max_tokens: int = 256
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prefill_chunk: int | None = None
    split_reasoning: bool = True
    processors: tuple[LogitsProcessor, ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise InputError(
                f"max_tokens={self.max_tokens!r}: must be a whole number, at least 1", code="invalid_max_tokens"
            )
        if type(self.min_tokens) is not int or not 0 <= self.min_tokens <= self.max_tokens:
            raise InputError(
                f"min_tokens={self.min_tokens!r}: must be a whole number, at most max_tokens={self.max_tokens}",
                code="invalid_min_tokens",
            )
        checked_chunk(self.prefill_chunk)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and (type(count) is not int or count < 0):
                raise InputError(
                    f"{name}={count!r}: must be a whole number (0 for only the chosen token) or None",
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
    prompt_ids: list[int],
    options: RequestOptions,
    published: PublishedSampling,
    tokenizer: Tokenizer,
    constraint: Constraint | None = None,
) -> Request:
    """Return the request for a tokenized prompt with ``options``.

    Args:
        prompt_ids: the tokens of the prompt.
        options: the options of the answer.
        published: the model's sampling options, which apply where ``options`` have none.
        tokenizer: the model's tokenizer.
        constraint: the compiled constraint of ``options``.

    Raises:
        InputError: an option is out of range; see ``Request`` and ``PublishedSampling.choose``.
    """
    stop = options.get("stop", ())
    stop_ids = _checked_ids(options.get("stop_token_ids", ()))
    if not options.get("ignore_eos", False):
        stop_ids |= tokenizer.eos_token_ids
    processors = tuple(options.get("logits_processors", ()))
    call = tokenizer.added_tokens.get(TOOL_CALL)
    if options.get("tool_choice") == "none" and call is not None:
        processors += (Exclusion([call]),)
    return Request(
        prompt_ids=prompt_ids,
        sampling=published.choose(**{name: options.get(name) for name in _SAMPLING}),  # type: ignore[arg-type]
        max_tokens=options.get("max_tokens", 256),
        seed=options.get("seed"),
        stop_ids=stop_ids,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        min_tokens=options.get("min_tokens", 0),
        logit_bias=_checked_bias(options.get("logit_bias") or {}, tokenizer.vocab_size),
        logprobs=options.get("logprobs"),
        prompt_logprobs=options.get("prompt_logprobs"),
        prefill_chunk=checked_chunk(options.get("prefill_chunk")),
        split_reasoning=not options.get("raw", False),
        processors=processors,
        constraint=constraint,
    )


def _checked_ids(ids: object) -> frozenset[int]:
    """Return ``stop_token_ids``.

    Raises:
        InputError: they are not a list of token ids; code "invalid_stop".
    """
    if isinstance(ids, str) or not isinstance(ids, Sequence | frozenset | set) or len(ids) > _MOST_STOPS:
        raise InputError(
            f"stop_token_ids={ids!r:.60}: must be a list of at most {_MOST_STOPS} ids", code="invalid_stop"
        )
    if any(type(token) is not int or token < 0 for token in ids):
        raise InputError(
            f"stop_token_ids={ids!r:.60}: must hold token ids, which are whole numbers", code="invalid_stop"
        )
    return frozenset(ids)


def _checked_bias(bias: Mapping[int, float] | Mapping[str, float], vocab_size: int) -> dict[int, float]:
    """Return ``logit_bias`` with integers for ids.

    Raises:
        InputError: it is malformed; code "invalid_logit_bias".
    """
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias={bias!r:.60}: must be an object of ids and numbers", code="invalid_logit_bias")
    checked = {}
    for key, value in bias.items():
        token = int(key) if isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,10}", key) else key
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InputError(f"logit_bias: {key!r:.60} is not the id of a token", code="invalid_logit_bias")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise InputError(f"logit_bias[{token}]={value!r:.60}: must be from -100 to 100", code="invalid_logit_bias")
        checked[token] = float(value)
    return checked


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
