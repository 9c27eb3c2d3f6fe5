"""Errors that reach a person: str(error) is the one or two lines that the command line prints."""

from typing import ClassVar


class FlashMoeError(Exception):
    """A failure with a message fit for a person: what is wrong, where, and how to fix it.

    ``code`` names the kind of failure in snake_case for programs, which must not depend on the wording. A class has a
    default; a ``raise`` may name a more specific one.
    """

    exit_code: ClassVar[int] = 1
    """Exit status of the command line: 1 for failures, 2 for mistakes of the user."""
    default_code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code


class InputError(FlashMoeError):
    """A request that is itself at fault: a wrong option, path, prompt, or file."""

    exit_code = 2
    default_code = "invalid_input"


class PackError(InputError):
    """A pack that is missing, incomplete, foreign, or damaged."""

    default_code = "invalid_pack"


class CheckpointError(InputError):
    """A published checkpoint that is missing a part, damaged, or of an unsupported kind."""

    default_code = "invalid_checkpoint"


class EngineBusyError(FlashMoeError):
    """A call into an engine while another thread is running a forward pass of it."""

    default_code = "engine_busy"
