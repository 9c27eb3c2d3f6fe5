"""Events of an answer, in the order in which they happen; every API is a translation of them.

The order is: ``Started``; any number of ``Prefilled``; ``PromptScored`` if asked for; then ``Reasoning``, ``Text`` and
calls in the order of the model's output; at last one ``Finished`` or one ``Failed``. A call is one ``CallStarted``, any
number of ``CallArguments``, and one ``CallEnded``, unless the output ended inside the call. Nothing comes between the
events of one call.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flashmoe_mlx.generation.logprobs import TokenLogprobs
from flashmoe_mlx.server.errors import ApiError

EndReason = Literal["stop", "stop_string", "length", "context", "tool_calls", "cancelled"]
"""What ended an answer: the model, a stop string, ``max_tokens``, a full context, calls of tools, or the client."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens.

    Attributes:
        prompt: tokens of the prompt, including ``cached``.
        cached: tokens of the prompt whose state was kept from earlier requests.
        completion: generated tokens, including ``reasoning``.
        reasoning: tokens of the model's thinking.
    """

    prompt: int
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The request has left the queue."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Progress through the prompt, at most once a second, in tokens."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The log probabilities of the prompt's tokens after the first one, for requests that ask for them."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next part of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """The next part of the answer, with the log probabilities of its tokens if they were asked for."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The beginning of call number ``index``, from 0, with an id that is unique over all conversations."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the JSON text of the arguments of call number ``index``."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The end of call number ``index``."""

    index: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of the answer; ``stop`` is the stop string that ended it."""

    reason: EndReason
    usage: Usage
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of an answer that failed."""

    error: ApiError


Event = (
    Started | Prefilled | PromptScored | Reasoning | Text | CallStarted | CallArguments | CallEnded | Finished | Failed
)


def joined(events: Iterable[Event]) -> list[Event]:
    """Return ``events`` with neighbors that continue the same text joined to one event."""
    found: list[Event] = []
    for event in events:
        match found[-1] if found else None, event:
            case Text(before, logprobs), Text(text, more):
                found[-1] = Text(before + text, logprobs + more)
            case Reasoning(before), Reasoning(text):
                found[-1] = Reasoning(before + text)
            case CallArguments(index, before), CallArguments(same, text) if index == same:
                found[-1] = CallArguments(index, before + text)
            case _:
                found.append(event)
    return found
