"""Routing traces: the experts that every token chose in every layer.

The file, all numbers little-endian::

    8 bytes     "MOETRACE"
    4 bytes     version of the format, 1
    4 bytes     length of the header
    header      JSON: {"tokens": ..., "layers": ..., "experts_per_token": ..., "num_experts": ...,
                "prompt_tokens": ..., "model": "...", "prompt_xxh3": "..."}, and "record_bytes" where it is known
    choices     2 bytes for each expert, by token, then layer, in the order of the router
    8 bytes     64-bit XXH3 of all preceding bytes

Files are untrusted: ``RoutingTrace.load`` checks every byte and allocates at most a few times the size of the file.
"""

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.untrusted import parse_object, read_file

__all__ = ["MAX_CHOICES", "MAX_EXPERTS", "RoutingTrace"]

_MAGIC = b"MOETRACE"
_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_CHECKSUM = struct.Struct("<Q")
_SIZES = ("tokens", "layers", "experts_per_token")
MAX_EXPERTS = 2**16
"""Maximum number of experts in a layer."""
_MAX_FILE_BYTES = 2**30  # 890,000 tokens of 60 layers with 10 experts
_MAX_HEADER_BYTES = 2**16
MAX_CHOICES = (_MAX_FILE_BYTES - _MAX_HEADER_BYTES) // 2
"""Number of choices, over all tokens and layers, that certainly fit into a file."""
_MAX_NAME = 1024
_BLOCK = 2**20
"""Choices checked at once."""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The experts that each token chose.

    Attributes:
        experts: uint16 [tokens, layers, K], distinct along K and in the order of the router.
        num_experts: number of experts in each layer.
        prompt_tokens: length of the prompt, whose tokens come first.
        model: name of the model, for people.
        prompt_xxh3: 64-bit XXH3 of the token ids of the prompt as little-endian uint32, in 16 hexadecimal digits;
            empty if there was no prompt.
        record_bytes: size of an expert in bytes; 0 if it is unknown.

    Raises:
        InputError: the attributes contradict each other (code "invalid_trace"), or a token chose an expert twice, or an
            expert that does not exist ("invalid_choice").
    """

    experts: npt.NDArray[np.uint16]
    num_experts: int
    prompt_tokens: int
    model: str
    prompt_xxh3: str
    record_bytes: int = 0

    def __post_init__(self) -> None:
        if fault := self._contradiction():
            raise InputError(f"not a routing trace: {fault}", code="invalid_trace")
        if fault := self._invalid_choice():
            raise InputError(f"not a routing trace: {fault}", code="invalid_choice")

    def _contradiction(self) -> str | None:
        if self.experts.dtype != np.uint16 or self.experts.ndim != 3 or self.experts.size == 0:
            return f"experts are {self.experts.dtype} {list(self.experts.shape)}, not uint16 [tokens, layers, K]"
        tokens, _, k = self.experts.shape
        if not k <= self.num_experts <= MAX_EXPERTS:
            return f"{k} of {self.num_experts} experts for each token; the maximum is {MAX_EXPERTS}"
        if not 0 <= self.prompt_tokens <= tokens:
            return f"a prompt of {self.prompt_tokens} tokens among {tokens} tokens"
        if not self.model.isprintable() or len(self.model) > _MAX_NAME:
            return "the name of the model is too long or not printable"
        if not re.fullmatch("(?:[0-9a-f]{16})?", self.prompt_xxh3):
            return "the hash of the prompt is not 16 hexadecimal digits"
        if not 0 <= self.record_bytes < 2**32:
            return f"experts of {self.record_bytes} bytes"
        return None

    def _invalid_choice(self) -> str | None:
        _, layers, k = self.experts.shape
        choices = self.experts.reshape(-1, k)
        step = max(1, _BLOCK // k)
        for start in range(0, len(choices), step):
            ordered = np.sort(choices[start : start + step], axis=-1)
            outside = ordered[:, -1] >= self.num_experts
            wrong = outside | (ordered[:, 1:] == ordered[:, :-1]).any(axis=-1)
            if wrong.any():
                row = int(wrong.argmax())
                choice = f"an expert not among the {self.num_experts}" if outside[row] else "an expert twice"
                token, layer = divmod(start + row, layers)
                return f"token {token} chose {choice} in layer {layer}"
        return None

    def save(self, path: Path) -> None:
        """Write the trace to the file ``path``, which is replaced if it exists.

        Raises:
            InputError: the file cannot be written (code "cannot_write_trace"), or it would be larger than 1 GiB
                ("trace_too_large").
        """
        sizes = dict(zip(_SIZES, self.experts.shape, strict=True))
        header = {
            "num_experts": self.num_experts,
            "prompt_tokens": self.prompt_tokens,
            "model": self.model,
            "prompt_xxh3": self.prompt_xxh3,
        }
        if self.record_bytes:
            header["record_bytes"] = self.record_bytes
        encoded = json.dumps(sizes | header).encode()
        data = _PREFIX.pack(_MAGIC, _VERSION, len(encoded)) + encoded + self.experts.astype("<u2").tobytes()
        data += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(data))
        if len(data) > _MAX_FILE_BYTES:
            raise InputError(
                f"{path}: a trace of {len(data)} bytes is too large; record fewer tokens", code="trace_too_large"
            )
        try:
            write_atomically(path, data)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: the trace cannot be written there ({_reason(error)})", code="cannot_write_trace"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the trace in the file ``path``.

        Raises:
            InputError: the file cannot be read (code "cannot_read_trace"), is too large ("trace_too_large"), has
                another format ("not_a_trace") or version ("unsupported_version"), is damaged ("damaged_trace"), or has
                invalid content ("invalid_trace", "invalid_choice").
        """
        data = _file(path)
        try:
            return cls(*_parsed(data))
        except InputError as error:
            raise InputError(f"{path}: {error}; record the trace again", code=error.code) from None

    def decode_requests(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the requests of decoding in order: (layer, experts) for each layer of each token after the prompt."""
        for token in self.experts[self.prompt_tokens :]:
            for layer, experts in enumerate(token.tolist()):
                yield layer, tuple(experts)

    def hot_experts(self, layer: int) -> list[int]:
        """Return all experts of ``layer``, most used first; the prompt counts too, and ties are in order of index."""
        counts = np.bincount(self.experts[:, layer].ravel(), minlength=self.num_experts)
        order: list[int] = np.argsort(-counts, kind="stable").tolist()
        return order


def _file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the trace cannot be read ({_reason(error)})", code="cannot_read_trace") from error
    if size > _MAX_FILE_BYTES:
        raise InputError(f"{path}: {size} bytes are too large for a routing trace", code="trace_too_large")
    try:
        data = read_file(path, size)
    except InputError as error:  # a folder, a device, or a file without permission to read
        raise InputError(str(error), code="cannot_read_trace") from error
    if data is None:
        raise InputError(f"{path}: the trace has just disappeared", code="cannot_read_trace")
    return data


def _parsed(data: bytes) -> tuple[npt.NDArray[np.uint16], int, int, str, str, int]:
    """Return the arguments of ``RoutingTrace`` from the bytes of a file, whose sizes and checksum are checked.

    Raises:
        InputError: the bytes are not a valid trace; the message does not name the file.
    """
    if len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise InputError("not a routing trace", code="not_a_trace")
    _, version, header_bytes = _PREFIX.unpack_from(data)
    if version != _VERSION:
        raise InputError(
            f"the routing trace has version {version}, this program reads version {_VERSION}",
            code="unsupported_version",
        )
    start = _PREFIX.size + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or start > len(data):
        raise InputError("the routing trace is truncated, or its header is damaged", code="damaged_trace")
    try:
        about = parse_object(data[_PREFIX.size : start].decode())
    except ValueError as error:
        raise InputError(f"the header of the routing trace {error}", code="invalid_trace") from None
    numbers = {name: _number(about, name) for name in (*_SIZES, "num_experts", "prompt_tokens")}
    shape = tuple(numbers[name] for name in _SIZES)
    end = start + 2 * math.prod(shape)
    if end + _CHECKSUM.size != len(data):
        raise InputError(
            f"the routing trace has {len(data)} bytes, its header needs {end + _CHECKSUM.size}", code="damaged_trace"
        )
    if _CHECKSUM.unpack_from(data, end) != (xxhash.xxh3_64_intdigest(memoryview(data)[:end]),):
        raise InputError("the routing trace is damaged: its checksum differs", code="damaged_trace")
    if not all(shape):
        raise InputError("the routing trace is empty", code="invalid_trace")
    experts = np.frombuffer(data, "<u2", math.prod(shape), start).reshape(shape).astype(np.uint16)
    record_bytes = _number(about, "record_bytes") if "record_bytes" in about else 0
    names = _text(about, "model"), _text(about, "prompt_xxh3")
    return experts, numbers["num_experts"], numbers["prompt_tokens"], *names, record_bytes


def _number(about: dict[str, Any], name: str) -> int:
    value = about.get(name)
    if type(value) is not int or not 0 <= value < 2**32:
        raise _invalid(name)
    return value


def _text(about: dict[str, Any], name: str) -> str:
    value = about.get(name)
    if not isinstance(value, str):
        raise _invalid(name)
    return value


def _invalid(name: str) -> InputError:
    return InputError(f"the header of the routing trace has no valid {name}", code="invalid_trace")


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
