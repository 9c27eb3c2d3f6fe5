"""Routing traces: which experts every token chose in every layer, recorded or drawn at random.

The file, all numbers little-endian::

    8 bytes     "MOETRACE"
    4 bytes     version of the format, 1
    4 bytes     length of the header
    header      JSON: {"tokens": ..., "layers": ..., "experts_per_token": ..., "num_experts": ...,
                "prompt_tokens": ..., "model": "...", "prompt_xxh3": "..."}, and "record_bytes" where it is known
    choices     2 bytes each, by token, then layer, in the router's order
    8 bytes     XXH3 (64 bits) of all the bytes before

A file is untrusted: ``RoutingTrace.load`` checks all of it, and allocates no more than a few times what the file has.
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
from flashmoe_mlx.pack.files import write_atomically
from flashmoe_mlx.untrusted import parse_object, read_file

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

    ``experts`` is uint16 [tokens, layers, K], distinct along K and in the router's order. The first ``prompt_tokens``
    tokens were prefill. ``prompt_xxh3`` is the 64-bit XXH3 of the prompt's token ids as little-endian uint32, in 16
    hexadecimal digits, or empty if there was no prompt. ``record_bytes`` is the size of an expert, 0 if
    it is not known.

    Raises:
        InputError: the parts do not make a trace.
    """

    experts: npt.NDArray[np.uint16]
    num_experts: int
    prompt_tokens: int
    model: str
    prompt_xxh3: str
    record_bytes: int = 0

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise InputError(f"not a routing trace: {fault}")

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
        return self._wrong_choice()

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
        """Write the trace to ``path``, replacing what is there.

        Raises:
            InputError: it cannot be written there, or is larger than a gigabyte.
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
            raise InputError(f"{path}: a trace of {len(data)} bytes is too large; record fewer tokens")
        try:
            write_atomically(path, data)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: the trace cannot be written there ({_reason(error)})") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """The trace in the file ``path``.

        Raises:
            InputError: there is none, it cannot be read, or it is damaged.
        """
        data = _file(path)
        try:
            return cls(*_parsed(data))
        except (InputError, ValueError) as error:
            raise InputError(f"{path}: {error}; record the trace again") from None

    def decode_requests(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(layer, distinct experts) of every layer of every token after the prompt, in the order of decoding."""
        for token in self.experts[self.prompt_tokens :]:
            for layer, experts in enumerate(token.tolist()):
                yield layer, tuple(experts)

    def hot_experts(self, layer: int) -> list[int]:
        """All experts of ``layer`` by how many tokens chose them, prompt included; the most first, ties by index."""
        counts = np.bincount(self.experts[:, layer].ravel(), minlength=self.num_experts)
        order: list[int] = np.argsort(-counts, kind="stable").tolist()
        return order


def uniform_trace(tokens: int, layers: int, num_experts: int, k: int, seed: int) -> RoutingTrace:
    """A trace, all of it decode, in which every choice of ``k`` among ``num_experts`` is equally likely.

    Raises:
        InputError: a size is less than 1, ``k`` is more than ``num_experts``, or the trace is too large for a file.
    """
    return _drawn(f"uniform seed={seed}", (tokens, layers, k), num_experts, 0.0, seed)


def zipf_trace(tokens: int, layers: int, num_experts: int, k: int, exponent: float, seed: int) -> RoutingTrace:
    """A trace, all of it decode, with experts drawn one after the other by Zipf's law, without replacement.

    In each layer the experts are ranked at random from 1, and weigh ``rank ** -exponent``. The first tokens do not
    depend on how many there are.

    Raises:
        InputError: as ``uniform_trace``, or ``exponent`` is negative or not finite.
    """
    if not (math.isfinite(exponent) and exponent >= 0):
        raise InputError(f"a Zipf exponent of {exponent} gives no trace; it must be at least 0")
    return _drawn(f"zipf exponent={exponent} seed={seed}", (tokens, layers, k), num_experts, exponent, seed)


def _drawn(name: str, shape: tuple[int, int, int], num_experts: int, exponent: float, seed: int) -> RoutingTrace:
    tokens, layers, k = shape
    if min(shape) < 1 or not k <= num_experts <= _MOST_EXPERTS or seed < 0:
        raise InputError(
            f"{tokens} tokens, {layers} layers, {k} of {num_experts} experts, seed {seed} give no trace; sizes must be "
            f"at least 1, experts at most {_MOST_EXPERTS}, the seed at least 0"
        )
    if 2 * math.prod(shape) + _LARGEST_HEADER > _LARGEST_FILE or layers * num_experts > _BLOCK:
        raise InputError(f"{name}: {tokens} tokens of {layers} layers with {num_experts} experts are too many")
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
    """[tokens, layers, k] draws without replacement by the weights [layers, experts], in the order of drawing.

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
        raise InputError(f"{path}: the trace cannot be read ({_reason(error)})") from error
    if size > _LARGEST_FILE:
        raise InputError(f"{path}: {size} bytes are too large for a routing trace")
    data = read_file(path, size)
    if data is None:
        raise InputError(f"{path}: the trace has just disappeared")
    return data


def _parsed(data: bytes) -> tuple[npt.NDArray[np.uint16], int, int, str, str, int]:
    """What the bytes say, sizes and checksum checked; raises ValueError if they contradict each other."""
    if len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise ValueError("not a routing trace")
    _, version, header_bytes = _PREFIX.unpack_from(data)
    if version != _VERSION:
        raise ValueError(f"routing trace of version {version}, this program reads version {_VERSION}")
    start = _PREFIX.size + header_bytes
    if header_bytes > _LARGEST_HEADER or start > len(data):
        raise ValueError("the routing trace is cut short or damaged in its header")
    try:
        about = parse_object(data[_PREFIX.size : start].decode())
    except ValueError as error:
        raise ValueError(f"the header of the routing trace {error}") from None
    numbers = {name: _number(about, name) for name in (*_SIZES, "num_experts", "prompt_tokens")}
    shape = tuple(numbers[name] for name in _SIZES)
    end = start + 2 * math.prod(shape)
    if end + _CHECKSUM.size != len(data):
        raise ValueError(f"the routing trace has {len(data)} bytes, its header needs {end + _CHECKSUM.size}")
    if _CHECKSUM.unpack_from(data, end) != (xxhash.xxh3_64_intdigest(memoryview(data)[:end]),):
        raise ValueError("the routing trace is damaged: its checksum differs")
    experts = np.frombuffer(data, "<u2", math.prod(shape), start).reshape(shape).astype(np.uint16)
    record_bytes = _number(about, "record_bytes") if "record_bytes" in about else 0
    names = _text(about, "model"), _text(about, "prompt_xxh3")
    return experts, numbers["num_experts"], numbers["prompt_tokens"], *names, record_bytes


def _number(about: dict[str, Any], name: str) -> int:
    value = about.get(name)
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"the header of the routing trace has no valid {name}")
    return value


def _text(about: dict[str, Any], name: str) -> str:
    value = about.get(name)
    if not isinstance(value, str):
        raise ValueError(f"the header of the routing trace has no valid {name}")  # noqa: TRY004  # of the file, not of ours
    return value


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
