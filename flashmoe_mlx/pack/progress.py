"""The interface through which long jobs report progress."""

from typing import Protocol


class Progress(Protocol):
    """A listener for the progress of a job, which consists of stages."""

    def stage(self, description: str, total: int) -> None:
        """Begin a stage in which ``total`` bytes are processed."""

    def advance(self, nbytes: int) -> None:
        """Report ``nbytes`` more processed bytes."""


class Silent:
    """A listener that ignores all reports."""

    def stage(self, description: str, total: int) -> None:
        """Do nothing."""

    def advance(self, nbytes: int) -> None:
        """Do nothing."""
