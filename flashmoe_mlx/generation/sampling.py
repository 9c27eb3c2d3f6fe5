"""Choose the next token from logits: published and requested options, and the draw."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.untrusted import read_object
from flashmoe_mlx.generation.constraints import Allowed
from flashmoe_mlx.generation.device_sampling import draw
from flashmoe_mlx.generation.logits import (
    Bias,
    CountPenalty,
    Logits,
    LogitsProcessor,
    RepetitionPenalty,
    Scores,
    TokenHistory,
    checked_logits,
)

_TRANSFORMERS_TOP_K = 50
"""``top_k`` of a generation_config.json that samples and does not state it; source: transformers GenerationConfig."""
AnyScores = TypeVar("AnyScores", Logits, Scores)
_ABSENT = {"temperature": 1.0, "top_k": _TRANSFORMERS_TOP_K}


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Sampling options. Penalties come first, then temperature, top_k, top_p and min_p, as in transformers.

    Each filter applies to the tokens that the previous filter kept.

    Attributes:
        temperature: 0 for greedy decoding: the most probable token.
        top_k: the number of most probable tokens to keep; 0 for all.
        top_p: the probability that the kept tokens must reach together; 1 for all.
        min_p: the least probability of a token, relative to the most probable token; 0 for all.
        repetition_penalty: see ``RepetitionPenalty``; 1 for none.
        presence_penalty: see ``CountPenalty``; from -2 to 2, 0 for none.
        frequency_penalty: see ``CountPenalty``; from -2 to 2, 0 for none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            problem = _problem(name, value)
            if problem is not None:
                raise InputError(f"{name}={value!r}: {problem}", code="invalid_sampling")

    def stated(self) -> dict[str, float]:
        """Return the options that have an effect, in the order of their application."""
        kept = {name: value for name, value in asdict(self).items() if value != _OFF[name]}
        if self.temperature == 0:
            kept = {name: value for name, value in kept.items() if name.endswith("penalty")}
        return kept

    def processors(self) -> list[LogitsProcessor]:
        """Return the logits processors for the penalties that have an effect."""
        found: list[LogitsProcessor] = []
        if self.repetition_penalty != 1:
            found.append(RepetitionPenalty(self.repetition_penalty))
        if self.presence_penalty or self.frequency_penalty:
            found.append(CountPenalty(self.presence_penalty, self.frequency_penalty))
        return found


_OFF: Mapping[str, Any] = {item.name: item.default for item in fields(SamplingOptions)}


def _problem(name: str, value: object) -> str | None:
    """Return the fault of an option's value; None if there is no fault."""
    if name == "top_k":
        if type(value) is not int:
            return "must be a whole number"
        return None if value >= 0 else "must be 0 (off) or the number of tokens to choose from"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if name == "temperature":
        return None if 0 <= number < math.inf else "must be 0 (greedy) or a positive number"
    if name == "top_p":
        return None if 0 < number <= 1 else "must be above 0 and at most 1 (off)"
    if name == "min_p":
        return None if 0 <= number <= 1 else "must be from 0 (off) to 1"
    if name == "repetition_penalty":
        return None if 0 < number < math.inf else "must be above 0; 1 is off, and above 1 discourages repetition"
    return None if -2 <= number <= 2 else "must be from -2 to 2; 0 is off"


@dataclass(frozen=True, slots=True)
class ChosenSampling:
    """The sampling options of a generation, and which of them are the model's own."""

    options: SamplingOptions
    published: frozenset[str] = frozenset()
    """Names of the options that come from the model's generation_config.json."""

    def describe(self) -> str:
        """Return a line such as "temperature 1.0, top_k 20, top_p 0.95 (model's own)", or "greedy"."""
        stated = self.options.stated()
        parts = ["greedy"] if self.options.temperature == 0 else []
        text = ", ".join([*parts, *(f"{name} {value}" for name, value in stated.items())])
        own = [name for name in stated if name in self.published]
        if not own:
            return text
        return f"{text} (model's own)" if len(own) == len(stated) else f"{text} (model's own: {', '.join(own)})"

    def to_json(self) -> dict[str, Any]:
        """Return all options, the names of the published options, and the description."""
        return {**asdict(self.options), "published": sorted(self.published), "description": self.describe()}


class PublishedSampling:
    """The sampling options in a model's generation_config.json, which apply where a person asks for nothing else.

    As in transformers, the model samples only if ``do_sample`` is true; a missing temperature is then 1 and a missing
    top_k 50. Without a file, decoding is greedy.
    """

    def __init__(self, values: Mapping[str, float], samples: bool) -> None:
        self._values = dict(values)
        self._samples = samples

    @classmethod
    def load(cls, folder: Path) -> "PublishedSampling":
        """Read the file in ``folder``.

        Raises:
            InputError: the file or a value in it is malformed; code "invalid_generation_config".
        """
        path = folder / "generation_config.json"
        config = read_object(path)
        samples = config.get("do_sample")
        if samples is not None and not isinstance(samples, bool):
            raise InputError(f"{path}: do_sample={samples!r}: must be true or false", code="invalid_generation_config")
        values = {name: config[name] for name in _OFF if config.get(name) is not None}
        for name, value in values.items():
            problem = _problem(name, value)
            if problem is not None:
                raise InputError(f"{path}: {name}={value!r}: {problem}", code="invalid_generation_config")
        return cls(values, bool(samples))

    def choose(self, **asked: float | None) -> ChosenSampling:
        """Combine the published options with the requested options, of which None means "as published".

        ``temperature=0`` asks for greedy decoding; published penalties do not apply then.

        Raises:
            InputError: an option is out of range; code "invalid_sampling".
        """
        explicit = {name: value for name, value in asked.items() if value is not None}
        options = replace(SamplingOptions(), **explicit)  # type: ignore[arg-type]  # checked there
        if explicit.get("temperature") == 0:
            return ChosenSampling(options)
        own = dict(self._values)
        if self._samples:
            own = {**_ABSENT, **own}
        else:
            own.pop("temperature", None)
        own = {name: value for name, value in own.items() if name not in explicit}
        return ChosenSampling(replace(options, **own), frozenset(own))  # type: ignore[arg-type]


class Sampler:
    """A source of the tokens that follow ``prompt``; equal seeds and logits give equal tokens.

    ``bias`` is added to the logits before the penalties of ``options``, as in vLLM. ``processors`` change the logits
    after them and before the temperature, as in transformers.
    """

    def __init__(
        self,
        options: SamplingOptions,
        seed: int | None = None,
        prompt: Sequence[int] = (),
        processors: Sequence[LogitsProcessor] = (),
        bias: Mapping[int, float] | None = None,
    ) -> None:
        if seed is not None and (type(seed) is not int or seed < 0):
            raise InputError(
                f"seed={seed!r}: must be a whole number, at least 0, or null for a different draw each time",
                code="invalid_sampling",
            )
        self._options = options
        self._random = np.random.default_rng(seed)
        self._returned: list[float] = []
        biases: list[LogitsProcessor] = [Bias(bias)] if bias else []
        self._processors = [*biases, *options.processors(), *processors]
        self._prompt = prompt
        self._history: TokenHistory | None = None

    def __call__(self, logits: Logits, allowed: Allowed | None = None) -> int:
        """Return the next token for ``logits`` [vocabulary], and count it as generated.

        ``allowed`` bool [vocabulary] excludes tokens after all processors; None allows all.

        Raises:
            FlashMoeError: no token can be chosen; see ``checked_logits``. Code "no_token_left" if the logits
                processors exclude every token.
            InputError: a processor does not return logits [vocabulary]; code "invalid_processor".
        """
        logits = checked_logits(logits)
        if not self._processors:
            return self._drawn(logits if allowed is None else _only(allowed, logits))
        scores: Scores = logits.astype(np.float64)
        if self._history is None:
            self._history = TokenHistory(self._prompt, len(logits))
        for process in self._processors:
            scores = process(scores, self._history)
            if np.shape(scores) != logits.shape:
                raise InputError(
                    f"a logits processor returned an array of shape {np.shape(scores)}; it must return the changed "
                    f"logits, {logits.shape}",
                    code="invalid_processor",
                )
        token = self._drawn(_only(allowed, scores))
        self._history.add(token)
        return token

    def count(self, token: int) -> None:
        """Count ``token``, which a constraint forces, as generated; the next draw is that after a call."""
        if self._processors and self._history is not None:
            self._history.add(token)
        if self._options.temperature != 0:
            self._uniform()

    def correct(self, chosen: int, token: int) -> None:
        """Count ``token`` in place of ``chosen``, the result of the latest call."""
        if self._history is not None:
            self._history.replace(chosen, token)

    @property
    def can_choose_on_device(self) -> bool:
        """Whether ``choose_on_device`` does what a call does."""
        return not self._processors

    def choose_on_device(self, logits: mx.array) -> tuple[mx.array, float | None]:
        """Choose the next token lazily, as a call does but for rounding.

        Args:
            logits: f32 [vocabulary], which ``checked_logits`` accepts.

        Returns:
            The token, uint32 [1], and the random number that chose it, or None for greedy decoding.
        """
        if self._options.temperature == 0:
            return mx.argmax(logits, keepdims=True), None
        number = self._uniform()
        return draw(logits[None], self._options, [self._options.temperature], [number]), number

    def take_number(self) -> tuple[SamplingOptions, float | None]:
        """Return the options and the random number by which the next token is to be chosen, None for greedy decoding.

        For ``choose_each``, which does what ``choose_on_device`` does.
        """
        return self._options, None if self._options.temperature == 0 else self._uniform()

    def return_number(self, number: float | None) -> None:
        """Use ``number``, the latest random number, again: the token that it chose is discarded."""
        if number is not None:
            self._returned.append(number)

    def _uniform(self) -> float:
        return self._returned.pop() if self._returned else float(self._random.random())

    def _drawn(self, scores: Logits | Scores) -> int:
        if self._options.temperature == 0:
            return int(scores.argmax())
        scores = scores.astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature makes low scores -inf, which is correct
            scaled = (scores - scores.max()) / self._options.temperature
        tokens = self._kept(scaled)
        cumulative = np.cumsum(_probabilities(scaled[tokens]))
        return int(tokens[np.searchsorted(cumulative / cumulative[-1], self._uniform(), side="right")])

    def _kept(self, scaled: Scores) -> npt.NDArray[np.intp]:
        """Return the tokens that pass the filters, the likeliest first if there are filters by rank.

        A vocabulary is large, so nothing is sorted without need. Of equally likely tokens the first in the vocabulary
        comes first.
        """
        options = self._options
        tokens = np.arange(len(scaled))
        if 0 < options.top_k < len(tokens):
            tokens = np.sort(np.argpartition(-scaled, options.top_k - 1)[: options.top_k])
        if options.top_k > 0 or options.top_p < 1:
            tokens = tokens[np.argsort(-scaled[tokens], kind="stable")]
        if options.top_p < 1:
            # The token that crosses the threshold is kept, so at least one token remains.
            tokens = tokens[: int(np.searchsorted(np.cumsum(_probabilities(scaled[tokens])), options.top_p)) + 1]
        if options.min_p > 0:
            tokens = tokens[scaled[tokens] >= np.log(options.min_p)]
        return tokens


def _only(allowed: Allowed | None, scores: AnyScores) -> AnyScores:
    """Return the scores of the ``allowed`` tokens, and -inf for the rest.

    Raises:
        FlashMoeError: no token is left; code "no_token_left".
    """
    if allowed is not None:
        scores = np.where(allowed, scores, scores.dtype.type(-np.inf))
    if not np.isfinite(scores.max()):
        raise FlashMoeError("the logits processors and constraints leave no token to choose", code="no_token_left")
    return scores


def _probabilities(scaled: Scores) -> Scores:
    """Compute the softmax of scores of which none is above 0."""
    weights = np.exp(scaled)
    probabilities: Scores = weights / weights.sum()
    return probabilities
