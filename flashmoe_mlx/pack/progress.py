"""How long jobs tell where they are."""

from typing import Protocol


class Progress(Protocol):
    """Told what is being done and how many bytes of it are behind."""

    def stage(self, description: str, total: int) -> None:
        """A new stage of ``total`` bytes begins."""

    def advance(self, nbytes: int) -> None:
        """``nbytes`` more are done."""


class Silent:
    """Says nothing."""

    def stage(self, description: str, total: int) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""
