"""The text of an answer outside tool calls."""

_TAIL = 64
"""Number of characters that ``ends_with`` can examine."""


class AnswerText:
    """The text of an answer, without the whitespace before, between and after calls, which is markup."""

    def __init__(self) -> None:
        self._ready: list[str] = []
        self._space: list[str] = []
        self._tail = ""
        self._has_text = self._has_call = False

    def add(self, text: str) -> None:
        """Append ``text``; whitespace at its end is held back."""
        self._tail = (self._tail + text[-_TAIL:])[-_TAIL:]
        body = text.rstrip()
        if body:
            body = "".join(self._space) + body
            self._ready.append(body if self._has_text or not self._has_call else body.lstrip())
            self._space = []
            self._has_text = True
        if len(text.rstrip()) < len(text):
            self._space.append(text[len(text.rstrip()) :])

    def ends_with(self, tag: str) -> bool:
        """Tell whether the text, without trailing whitespace, ends with ``tag``."""
        return self._tail.rstrip().endswith(tag)

    def skip_to_call(self) -> None:
        """Drop the whitespace that was held back, because a call or its end follows."""
        self._space = []
        self._has_call = True

    def finish(self, has_calls: bool) -> None:
        """End the answer; keep the whitespace at its end unless the answer ``has_calls``."""
        if not has_calls:
            self._ready += self._space
        self._space = []

    def flush(self) -> str:
        """Return the text added since the last call, without whitespace that is held back."""
        ready, self._ready = self._ready, []
        return "".join(ready)
