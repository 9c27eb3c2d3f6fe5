"""Numbers that the options of stores accept; anything else is refused before it reaches a file or an allocation."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from flashmoe_mlx.errors import InputError


@dataclass(frozen=True, slots=True)
class Limit:
    """Numbers from ``least`` to ``most``: integers if ``whole``, without ``least`` itself if ``above``."""

    least: float
    most: float
    whole: bool = True
    above: bool = False
    hint: str = ""
    """Appended to the range in messages."""

    def __str__(self) -> str:
        if self.whole:
            return f"an integer from {self.least} to {self.most}{self.hint}"
        if self.above:
            return f"a number greater than {self.least} and at most {self.most}{self.hint}"
        return f"a number from {self.least} to {self.most}{self.hint}"

    def check(self, option: str, value: Any) -> None:
        """Raise InputError, with the allowed range, unless ``value`` of ``option`` is such a number."""
        if not self._allows(value):
            raise InputError(f"backend.{option}={_shortened(value)}: must be {self}", code="option_out_of_range")

    def _allows(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value
        # Comparisons with NaN are false.
        return bool(number <= self.most and (number > self.least if self.above else number >= self.least))


def _shortened(value: Any) -> str:
    try:
        text = str(value) if not isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        return "a number of more than 4300 digits"
    return text if len(text) <= 40 else f"{text[:40]}..."


SLOTS = Limit(1, 2**16)
"""As many as the most experts that a model may have."""
THREADS = Limit(1, 1024)
DEPTH = Limit(1, 4096)
"""Reads under way at once in a ring; ``THREADS`` limits them where each takes a thread."""
CHUNK_MIB = Limit(1 / 256, 1024, whole=False, hint=" (1/256 is 4 KiB, a page), or null for whole experts")
BUDGET_GIB = Limit(0, 2**40, whole=False, above=True, hint=", or null for memory_share")
MEMORY_SHARE = Limit(0, 1, whole=False, above=True)
