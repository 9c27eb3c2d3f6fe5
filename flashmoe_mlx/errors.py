"""Errors that reach a person: str(error) is the one or two lines that the command line prints."""


class FlashMoeError(Exception):
    """A failure with a message fit for a person: what is wrong, where, and what mends it."""

    exit_code = 1


class InputError(FlashMoeError):
    """The request itself is at fault: a wrong option, path, prompt or file."""

    exit_code = 2


class PackError(InputError):
    """A pack that is missing, incomplete, foreign or damaged."""


class CheckpointError(InputError):
    """A published checkpoint that is missing a part, damaged, or of a kind not supported."""
