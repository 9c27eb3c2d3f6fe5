"""Separation of a model's thinking, ``<think>...</think>``, from its answer, token by token."""

from collections.abc import Sequence

from flashmoe_mlx.text.tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Splits the tokens generated after ``prompt_ids`` into reasoning and content.

    Tags are found in the text, and may be cut anywhere. A tag counts where it changes the state before the answer has
    begun; all others are text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        prompt = tokenizer.decode(list(prompt_ids))
        self._open = prompt.rfind(_OPEN) > prompt.rfind(_CLOSE) and not prompt.rpartition(_OPEN)[2].strip()
        self._held = ""
        """Text that may be the beginning of a tag, or whitespace between thinking and answer."""
        self._closed = False
        self._answered = False

    @property
    def open(self) -> bool:
        """Whether the model is thinking now."""
        return self._open

    def add(self, token_id: int, text: str) -> tuple[str, str]:  # noqa: ARG002  # tags are found by their text
        """Take a token and the text that the detokenizer gave for it; returns new reasoning and new content."""
        self._held += text
        reasoning = content = ""
        while self._held:
            if self._answered:
                content, self._held = content + self._held, ""
            elif self._open:
                before, tag, after = self._held.partition(_CLOSE)
                if not tag:
                    keep = _possible_tag(before, _CLOSE)
                    reasoning, self._held = reasoning + before[: len(before) - keep], before[len(before) - keep :]
                    break
                reasoning, self._held, self._open, self._closed = reasoning + before, after, False, True
            else:
                start = self._held.lstrip()
                if not start or (_OPEN.startswith(start) and start != _OPEN):
                    break
                if start.startswith(_OPEN):
                    self._held, self._open = start.removeprefix(_OPEN).lstrip("\n"), True
                else:
                    self._answered = True
                    self._held = self._held.lstrip("\n") if self._closed else self._held
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """End the output; returns the reasoning and the content that were held back."""
        held, self._held = self._held, ""
        return (held, "") if self._open else ("", held)


def _possible_tag(text: str, tag: str) -> int:
    """Return the length of the longest end of ``text`` with which ``tag`` may begin."""
    return next((length for length in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:length])), 0)
