"""Progress of long jobs."""

from typing import Protocol


class Progress(Protocol):
    """A listener to the progress of a job, in stages of so many bytes."""

    def stage(self, description: str, total: int) -> None:
        """Begin a new stage of ``total`` bytes."""

    def advance(self, nbytes: int) -> None:
        """Count ``nbytes`` more as done."""


class Silent:
    """A listener that does nothing."""

    def stage(self, description: str, total: int) -> None:
        """Do nothing."""

    def advance(self, nbytes: int) -> None:
        """Do nothing."""
