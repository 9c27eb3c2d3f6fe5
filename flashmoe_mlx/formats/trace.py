"""Routing traces: which experts every token chose in every layer, recorded or drawn at random.

The file, all numbers little-endian::

    8 bytes     "MOETRACE"
    4 bytes     version of the format, 1
    4 bytes     length of the header
    header      JSON: {"tokens": ..., "layers": ..., "experts_per_token": ..., "num_experts": ...,
                "prompt_tokens": ..., "model": "...", "prompt_xxh3": "..."}, and "record_bytes" where it is known
    choices     2 bytes each, by token, then layer, in the router's order
    8 bytes     XXH3 (64 bits) of all the bytes before

A file is untrusted: ``RoutingTrace.load`` checks all of it, and allocates at most a few times the size of the file.
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

_MAGIC = b"MOETRACE"
_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_CHECKSUM = struct.Struct("<Q")
_SIZES = ("tokens", "layers", "experts_per_token")
_LARGEST_FILE = 2**30  # 890,000 tokens of 60 layers with 10 experts
_LARGEST_HEADER = 2**16
_MOST_EXPERTS = 2**16
_LONGEST_NAME = 1024
_BLOCK = 2**20  # random numbers drawn at once: 8 MB


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The experts that each token chose.

    Attributes:
        experts: uint16 [tokens, layers, K], distinct along K and in the router's order.
        num_experts: experts in each layer.
        prompt_tokens: length of the prompt; these tokens come first and were prefill.
        model: name of the model, for people.
        prompt_xxh3: 64-bit XXH3 of the prompt's token ids as little-endian uint32, in 16 hexadecimal digits; empty if
            there was no prompt.
        record_bytes: bytes of one expert; 0 if unknown.

    Raises:
        InputError: the parts contradict each other; code "invalid_trace", or "invalid_choice" for an expert that does
            not exist or occurs twice.
    """

    experts: npt.NDArray[np.uint16]
    num_experts: int
    prompt_tokens: int
    model: str
    prompt_xxh3: str
    record_bytes: int = 0

    def __post_init__(self) -> None:
        if fault := self._fault():
            raise InputError(f"not a routing trace: {fault}", code="invalid_trace")
        if fault := self._wrong_choice():
            raise InputError(f"not a routing trace: {fault}", code="invalid_choice")

    def _fault(self) -> str | None:
        if self.experts.dtype != np.uint16 or self.experts.ndim != 3 or self.experts.size == 0:
            return f"experts are {self.experts.dtype} {list(self.experts.shape)}, not uint16 [tokens, layers, K]"
        tokens, _, k = self.experts.shape
        if not k <= self.num_experts <= _MOST_EXPERTS:
            return f"{k} of {self.num_experts} experts a token; there may be {_MOST_EXPERTS} at most"
        if not 0 <= self.prompt_tokens <= tokens:
            return f"{self.prompt_tokens} tokens of prompt among {tokens} tokens"
        if not self.model.isprintable() or len(self.model) > _LONGEST_NAME:
            return "the model's name cannot be shown"
        if not re.fullmatch("(?:[0-9a-f]{16})?", self.prompt_xxh3):
            return "the prompt's hash is not 16 hexadecimal digits"
        if not 0 <= self.record_bytes < 2**32:
            return f"experts of {self.record_bytes} bytes"
        return None

    def _wrong_choice(self) -> str | None:
        _, layers, k = self.experts.shape
        choices = self.experts.reshape(-1, k)
        step = max(1, _BLOCK // k)
        for start in range(0, len(choices), step):
            ordered = np.sort(choices[start : start + step], axis=-1)
            outside = ordered[:, -1] >= self.num_experts
            wrong = outside | (ordered[:, 1:] == ordered[:, :-1]).any(axis=-1)
            if wrong.any():
                row = int(wrong.argmax())
                what = f"an expert outside of {self.num_experts}" if outside[row] else "an expert twice"
                token, layer = divmod(start + row, layers)
                return f"token {token} chose {what} in layer {layer}"
        return None

    def save(self, path: Path) -> None:
        """Write the trace to ``path``, replacing any file there.

        Raises:
            InputError: the file cannot be written (code "cannot_write_trace"), or the trace is larger than a gigabyte
                ("trace_too_large").
        """
        sizes = dict(zip(_SIZES, self.experts.shape, strict=True))
        about = {
            "num_experts": self.num_experts,
            "prompt_tokens": self.prompt_tokens,
            "model": self.model,
            "prompt_xxh3": self.prompt_xxh3,
        }
        if self.record_bytes:
            about["record_bytes"] = self.record_bytes
        header = json.dumps(sizes | about).encode()
        data = _PREFIX.pack(_MAGIC, _VERSION, len(header)) + header + self.experts.astype("<u2").tobytes()
        data += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(data))
        if len(data) > _LARGEST_FILE:
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
            InputError: the file cannot be read (code "cannot_read_trace"), is too large ("trace_too_large"), of another
                kind ("not_a_trace") or version ("unsupported_version"), damaged ("damaged_trace"), or says something
                that no trace can say ("invalid_trace", "invalid_choice").
        """
        data = _file(path)
        try:
            return cls(*_parsed(data))
        except InputError as error:
            raise InputError(f"{path}: {error}; record the trace again", code=error.code) from None

    def decode_requests(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield (layer, distinct experts) of every layer of every token after the prompt, in the order of decoding."""
        for token in self.experts[self.prompt_tokens :]:
            for layer, experts in enumerate(token.tolist()):
                yield layer, tuple(experts)

    def hot_experts(self, layer: int) -> list[int]:
        """Rank all experts of ``layer``, most chosen first, prompt included; ties by index."""
        counts = np.bincount(self.experts[:, layer].ravel(), minlength=self.num_experts)
        order: list[int] = np.argsort(-counts, kind="stable").tolist()
        return order


def uniform_trace(tokens: int, layers: int, num_experts: int, k: int, seed: int) -> RoutingTrace:
    """Draw a trace without a prompt in which every choice of ``k`` among ``num_experts`` is equally likely.

    Raises:
        InputError: a size is less than 1 or ``k`` more than ``num_experts`` (code "out_of_range"), or the trace
            is too large for a file ("trace_too_large").
    """
    return _drawn(f"uniform seed={seed}", (tokens, layers, k), num_experts, 0.0, seed)


def zipf_trace(tokens: int, layers: int, num_experts: int, k: int, exponent: float, seed: int) -> RoutingTrace:
    """Draw a trace without a prompt in which experts are chosen by Zipf's law, without replacement.

    In each layer the experts get random ranks from 1 and weights ``rank ** -exponent``. A longer trace with the same
    seed begins with the same tokens.

    Raises:
        InputError: as ``uniform_trace``, or ``exponent`` is negative or not finite (code "out_of_range").
    """
    if not (math.isfinite(exponent) and exponent >= 0):
        raise InputError(f"a Zipf exponent of {exponent} gives no trace; it must be at least 0", code="out_of_range")
    return _drawn(f"zipf exponent={exponent} seed={seed}", (tokens, layers, k), num_experts, exponent, seed)


def _drawn(name: str, shape: tuple[int, int, int], num_experts: int, exponent: float, seed: int) -> RoutingTrace:
    tokens, layers, k = shape
    if min(shape) < 1 or not k <= num_experts <= _MOST_EXPERTS or seed < 0:
        raise InputError(
            f"{tokens} tokens, {layers} layers, {k} of {num_experts} experts, seed {seed} give no trace; sizes must be "
            f"at least 1, experts at most {_MOST_EXPERTS}, the seed at least 0",
            code="out_of_range",
        )
    if 2 * math.prod(shape) + _LARGEST_HEADER > _LARGEST_FILE or layers * num_experts > _BLOCK:
        raise InputError(
            f"{name}: {tokens} tokens of {layers} layers with {num_experts} experts are too many",
            code="trace_too_large",
        )
    random = np.random.default_rng(seed)
    ranks = np.stack([random.permutation(num_experts) for _ in range(layers)]) + 1
    log_weights = -exponent * np.log(ranks)
    experts = np.empty(shape, np.uint16)
    step = _BLOCK // log_weights.size
    for start in range(0, tokens, step):
        block = experts[start : start + step]
        block[:] = _weighted_choices(log_weights, len(block), k, random)
    return RoutingTrace(experts, num_experts, 0, name, "")


def _weighted_choices(
    log_weights: npt.NDArray[np.float64], tokens: int, k: int, random: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Draw [tokens, layers, k] without replacement by the weights [layers, experts], in the order of drawing.

    The k largest sums of log weight and Gumbel noise, largest first, have exactly this distribution: Kool et al.,
    "Stochastic beams and where to find them", ICML 2019.
    """
    scores = log_weights + random.gumbel(size=(tokens, *log_weights.shape))
    largest = np.argpartition(-scores, k - 1, axis=-1)[..., :k]
    order = np.argsort(-np.take_along_axis(scores, largest, axis=-1), axis=-1)
    return np.take_along_axis(largest, order, axis=-1)


def _file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the trace cannot be read ({_reason(error)})", code="cannot_read_trace") from error
    if size > _LARGEST_FILE:
        raise InputError(f"{path}: {size} bytes are too large for a routing trace", code="trace_too_large")
    try:
        data = read_file(path, size)
    except InputError as error:  # a folder, a device, or a file that nobody may read
        raise InputError(str(error), code="cannot_read_trace") from error
    if data is None:
        raise InputError(f"{path}: the trace has just disappeared", code="cannot_read_trace")
    return data


def _parsed(data: bytes) -> tuple[npt.NDArray[np.uint16], int, int, str, str, int]:
    """Parse a file into the arguments of ``RoutingTrace``, checking sizes and checksum; raises InputError."""
    if len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise InputError("not a routing trace", code="not_a_trace")
    _, version, header_bytes = _PREFIX.unpack_from(data)
    if version != _VERSION:
        raise InputError(
            f"routing trace of version {version}, this program reads version {_VERSION}", code="unsupported_version"
        )
    start = _PREFIX.size + header_bytes
    if header_bytes > _LARGEST_HEADER or start > len(data):
        raise InputError("the routing trace is cut short or damaged in its header", code="damaged_trace")
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
        raise _no_valid(name)
    return value


def _text(about: dict[str, Any], name: str) -> str:
    value = about.get(name)
    if not isinstance(value, str):
        raise _no_valid(name)
    return value


def _no_valid(name: str) -> InputError:
    return InputError(f"the header of the routing trace has no valid {name}", code="invalid_trace")


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
