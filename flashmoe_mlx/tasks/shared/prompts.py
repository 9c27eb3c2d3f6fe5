"""The prompt that a configuration means: its text, a file, or what stdin gives."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

from flashmoe_mlx.console.streams import say
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.tasks.shared.keys import PromptConfig

_STDIN = "-"
_BLOCK = 2**20
_BYTES_PER_TOKEN = 256
"""No token of a published vocabulary is longer, so a prompt of more bytes than that for each token cannot fit."""
AnyConfig = TypeVar("AnyConfig", bound=PromptConfig)


def with_prompt(config: AnyConfig, folder: Path) -> AnyConfig:
    """Return ``config`` with the text of its prompt in ``prompt``, for the model in ``folder``.

    ``prompt=-`` and ``prompt_file=-`` read stdin, once for all jobs of a sweep. The line break at the end of a file is
    not a part of the prompt.

    Raises:
        InputError: the file cannot be read, is empty, is not UTF-8, or is larger than any prompt that fits.
    """
    name = config.prompt_file if config.prompt_file is not None else config.prompt if config.prompt == _STDIN else None
    if name is None:
        return config
    what = f"prompt_file={name}" if config.prompt_file is not None else f"prompt={name}"
    context = open_model(folder).config.max_context
    most = context * _BYTES_PER_TOKEN
    data = _from_stdin(sys.stdin, what, most) if name == _STDIN else _from_file(expand_path(name), what, most)
    if len(data) > most:
        raise InputError(
            f"{what}: more than {most:,} bytes; this model's context holds {context:,} tokens", code="prompt_too_long"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: byte {error.start} is not UTF-8; convert the file", code="invalid_prompt") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise InputError(f"{what}: is empty", code="invalid_prompt")
    return replace(config, prompt=text, prompt_file=None)


def _from_file(path: Path, what: str, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            return _Input(file).up_to(most + 1)
    except OSError as error:
        raise InputError(f"{what}: cannot be read ({error.strerror})", code="invalid_prompt") from error


def _from_stdin(stream: TextIO | None, what: str, most: int) -> bytes:
    if stream is None:
        raise InputError(f"{what}: stdin is closed", code="invalid_prompt")
    try:
        return _input_of(stream).up_to(most + 1)
    except OSError as error:
        raise InputError(f"{what}: stdin cannot be read ({error.strerror})", code="invalid_prompt") from error


class _Input:
    """The bytes of a stream, kept: later jobs of a sweep get the same ones again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._data = bytearray()
        self._ended = False

    def up_to(self, most: int) -> bytes:
        """Return the first ``most`` bytes, or as many as there are; what follows stays unread."""
        while len(self._data) < most and not self._ended:
            block = self._stream.read(min(_BLOCK, most - len(self._data)))
            self._data += block or b""  # nothing yet, of a stream that does not wait
            self._ended = not block
        return bytes(self._data[:most])


@cache
def _input_of(stream: TextIO) -> _Input:
    if stream.isatty():
        say("reading the prompt from the terminal; end it with Ctrl-D at the beginning of a line")
    return _Input(stream.buffer)
