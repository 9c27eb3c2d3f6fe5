"""Errors of this package; ``str(error)`` is the one or two lines that the command line prints."""

from typing import ClassVar

__all__ = ["CheckpointError", "EngineBusyError", "FlashMoeError", "InputError", "PackError"]


class FlashMoeError(Exception):
    """Base class of all errors of this package.

    Args:
        message: one or two lines for people: what is wrong, where, and how to fix it. The wording may change.
        code: the kind of failure in snake_case, for programs; None for the default code of the class. docs/errors.md
            lists all codes.
    """

    exit_code: ClassVar[int] = 1
    """Exit status of the command line: 1 for a failure, 2 for a mistake in the request."""
    default_code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code: str = code or self.default_code


class InputError(FlashMoeError):
    """A mistake in the request: a wrong option, path, prompt, or file."""

    exit_code = 2
    default_code = "invalid_input"


def missing_extra(what: str, extra: str) -> InputError:
    """Return the error of ``what``, a task, option or function that needs the packages of an ``extra``."""
    return InputError(
        f"{what} needs the extra {extra}: pip install 'flashmoe_mlx[{extra}]'",
        code="missing_extra",
    )


class PackError(InputError):
    """A pack that is missing, incomplete, damaged, or in another format."""

    default_code = "invalid_pack"


class CheckpointError(InputError):
    """A published checkpoint that is incomplete, damaged, or not supported."""

    default_code = "invalid_checkpoint"


class EngineBusyError(FlashMoeError):
    """A call to an engine while another thread runs a forward pass of that engine."""

    default_code = "engine_busy"
