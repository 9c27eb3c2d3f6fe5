"""Ranges of the numeric options of stores, checked before any file is opened or any memory allocated."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from flashmoe_mlx.errors import InputError

__all__ = ["BUDGET_GIB", "CHUNK_MIB", "DEPTH", "MEMORY_SHARE", "SLOTS", "THREADS", "Limit"]


@dataclass(frozen=True, slots=True)
class Limit:
    """A range of numbers.

    Attributes:
        minimum: the smallest allowed number, or if ``exclusive`` the largest number below the range.
        maximum: the largest allowed number.
        integer: whether only integers are allowed.
        exclusive: whether ``minimum`` itself is not allowed.
        note: text that follows the range in messages.
    """

    minimum: float
    maximum: float
    integer: bool = True
    exclusive: bool = False
    note: str = ""

    def __str__(self) -> str:
        if self.integer:
            return f"an integer from {self.minimum} to {self.maximum}{self.note}"
        if self.exclusive:
            return f"a number greater than {self.minimum} and at most {self.maximum}{self.note}"
        return f"a number from {self.minimum} to {self.maximum}{self.note}"

    def check(self, option: str, value: Any) -> None:
        """Raise InputError, code "option_out_of_range", unless ``value`` of ``option`` is a number in this range."""
        if not self._allows(value):
            raise InputError(f"backend.{option}={_shortened(value)}: must be {self}", code="option_out_of_range")

    def _allows(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.integer else Real):
            return False
        number: Any = value
        # Comparisons with NaN are false.
        return bool(number <= self.maximum and (number > self.minimum if self.exclusive else number >= self.minimum))


def _shortened(value: Any) -> str:
    try:
        text = str(value) if not isinstance(value, str) else repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "a number of more than 4300 digits"
    return text if len(text) <= 40 else f"{text[:40]}..."


SLOTS = Limit(1, 2**16)
"""The maximum is the largest number of experts in a layer."""
THREADS = Limit(1, 1024)
DEPTH = Limit(1, 4096)
"""Simultaneous reads of a ring; ``THREADS`` applies where each read needs a thread."""
CHUNK_MIB = Limit(1 / 256, 1024, integer=False, note=" (1/256 is 4 KiB, a page), or null for whole experts")
"""The largest read, in MiB."""
BUDGET_GIB = Limit(0, 2**40, integer=False, exclusive=True, note=", or null for memory_share")
"""Memory for experts, in GiB."""
MEMORY_SHARE = Limit(0, 1, integer=False, exclusive=True)
"""The share of the free memory that experts take."""
