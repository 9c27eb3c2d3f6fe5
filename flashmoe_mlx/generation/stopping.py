"""Stop strings: texts that end an answer and are not part of it."""

from collections.abc import Sequence


class StopStrings:
    """A search for ``stop`` in a text that arrives in pieces.

    The joined results do not depend on the division of the text into pieces: the occurrence that is complete first ends
    the text, and the longest of several occurrences that end together. Text is held back only while it may begin a stop
    string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = sorted(set(stop), key=len, reverse=True)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def add(self, text: str) -> str:
        """Take the next piece; return the text that cannot be part of a stop string, or "" after a stop string."""
        if not self._stop:
            return text
        if self.found is not None:
            return ""
        text = self._held + text
        ends = {stop: text.find(stop) + len(stop) for stop in self._stop if stop in text}
        if ends:
            self.found = min(ends, key=lambda stop: (ends[stop], -len(stop)))
            self._held = ""
            return text[: ends[self.found] - len(self.found)]
        held = self._beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """End the text, and return the part that was held back."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), len(self._stop[0]) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
