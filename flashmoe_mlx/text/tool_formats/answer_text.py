"""The text of an answer around its calls."""

_TAIL = 64
"""Characters that ``ends_with`` can look back."""


class AnswerText:
    """Text of the answer; whitespace before, between and after calls is markup."""

    def __init__(self) -> None:
        self._ready: list[str] = []
        self._space: list[str] = []
        self._tail = ""
        self._said = self._called = False

    def add(self, text: str) -> None:
        self._tail = (self._tail + text[-_TAIL:])[-_TAIL:]
        body = text.rstrip()
        if body:
            body = "".join(self._space) + body
            self._ready.append(body if self._said or not self._called else body.lstrip())
            self._space = []
            self._said = True
        if len(text.rstrip()) < len(text):
            self._space.append(text[len(text.rstrip()) :])

    def ends_with(self, tag: str) -> bool:
        return self._tail.rstrip().endswith(tag)

    def meet_call(self) -> None:
        """Drop the whitespace since the last text, as a call or its end comes next."""
        self._space = []
        self._called = True

    def finish(self, called: bool) -> None:
        if not called:
            self._ready += self._space
        self._space = []

    def take(self) -> str:
        ready, self._ready = self._ready, []
        return "".join(ready)
