"""Prompt of a configuration: text on the command line, a file, or stdin."""

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
"""Upper bound on the length of a token in published vocabularies, from which the longest prompt that fits follows."""
AnyConfig = TypeVar("AnyConfig", bound=PromptConfig)


def with_prompt(config: AnyConfig, folder: Path) -> AnyConfig:
    """Return ``config`` with the text of the prompt in ``prompt``, for the model in ``folder``.

    ``prompt=-`` and ``prompt_file=-`` read stdin, once for all jobs of a sweep. A line break at the end of the file is
    removed.

    Raises:
        InputError: the file cannot be read, is empty, is not UTF-8, or is too long for the model's context.
    """
    name = config.prompt_file if config.prompt_file is not None else config.prompt if config.prompt == _STDIN else None
    if name is None:
        return config
    source = f"prompt_file={name}" if config.prompt_file is not None else f"prompt={name}"
    context = open_model(folder).config.max_context
    limit = context * _BYTES_PER_TOKEN
    data = _from_stdin(sys.stdin, source, limit) if name == _STDIN else _from_file(expand_path(name), source, limit)
    if len(data) > limit:
        raise InputError(
            f"{source}: larger than {limit:,} bytes; this model's context holds {context:,} tokens",
            code="prompt_too_long",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: byte {error.start} is not UTF-8; convert the file", code="invalid_prompt"
        ) from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise InputError(f"{source}: is empty", code="invalid_prompt")
    return replace(config, prompt=text, prompt_file=None)


def _from_file(path: Path, source: str, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            return _Input(file).up_to(limit + 1)
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})", code="invalid_prompt") from error


def _from_stdin(stream: TextIO | None, source: str, limit: int) -> bytes:
    if stream is None:
        raise InputError(f"{source}: stdin is closed", code="invalid_prompt")
    try:
        return _input_of(stream).up_to(limit + 1)
    except OSError as error:
        raise InputError(f"{source}: stdin cannot be read ({error.strerror})", code="invalid_prompt") from error


class _Input:
    """Bytes of a stream, kept so that later jobs of a sweep get them again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._data = bytearray()
        self._ended = False

    def up_to(self, count: int) -> bytes:
        """Return the first ``count`` bytes, or fewer if the stream ends; leave the rest unread."""
        while len(self._data) < count and not self._ended:
            block = self._stream.read(min(_BLOCK, count - len(self._data)))
            self._data += block or b""  # a non-blocking stream without data returns None
            self._ended = not block
        return bytes(self._data[:count])


@cache
def _input_of(stream: TextIO) -> _Input:
    if stream.isatty():
        say("reading the prompt from the terminal; press Ctrl-D at the beginning of a line to end it")
    return _Input(stream.buffer)
