"""Frames of the observatory: what the experts did in the passes of a fifth of a second, small enough to send.

A frame lists the experts of each decoded token, as long as it has room, and adds up all other tokens: those of prompts,
and those of an engine that decodes faster than a page can draw.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.generation.pass_meter import WatchedPass
from flashmoe_mlx.generation.sequence import Sequence as GeneratedSequence

MOST_CHOICES = 2**15
"""The largest number of choices that a frame lists."""
MOST_TOKENS = 128
"""The largest number of tokens that a frame lists."""
Token = tuple[GeneratedSequence, int]
"""A sequence and the position of a token in it."""


@dataclass(frozen=True)
class Shape:
    """The routed experts of a model.

    Attributes:
        layers: the number of layers.
        num_experts: the number of experts in each layer.
        experts_k: the experts that a token uses in each layer.
    """

    layers: int
    num_experts: int
    experts_k: int

    @property
    def room(self) -> int:
        """The number of tokens that a frame lists."""
        return min(MOST_TOKENS, MOST_CHOICES // (self.layers * self.experts_k))


def frame(passes: Sequence[WatchedPass], shape: Shape) -> tuple[dict[str, Any], list[Token]]:
    """Return the content of a frame, for JSON, and the tokens that it lists.

    The latest tokens are listed. The content has these keys:

    - ``experts``: the experts of each listed token, [tokens, layers, K], one or two bytes each, in base64.
    - ``missed``: a bit for each of these choices, the first one lowest: whether the expert was read for its pass.
    - ``positions``: the position of each listed token in its sequence.
    - ``passes``: columns with one entry for each decode pass with listed tokens: ``tokens``, ``seconds``, its parts
      ``io``, ``compute`` and ``sample``, and the store's counters ``requests``, ``misses`` and ``bytes_read``.
    - ``rest``: all other passes together, None without any: the same columns as sums, the numbers of their tokens by
      ``prompt`` and ``decoded``, and for each expert of each layer the numbers of tokens that used it (``used``) and
      of reads (``read``), two bytes each, in base64.
    """
    listed, rest, left = [], [], shape.room
    for watched in reversed(passes):
        tokens = sum(watched.parts.values())
        if watched.decoding and tokens <= left:
            listed.append(watched)
            left -= tokens
        else:
            rest.append(watched)
            left = 0 if watched.decoding else left
    listed.reverse()
    content: dict[str, Any] = {"passes": _columns(listed), "rest": _sums(rest, shape) if rest else None}
    tokens_of = [
        (sequence, position)
        for watched in listed
        for sequence, count in watched.parts.items()
        for position in range(watched.positions[sequence], watched.positions[sequence] + count)
    ]
    content["positions"] = [position for _, position in tokens_of]
    if listed:
        experts = np.concatenate([_choices(watched, shape) for watched in listed])
        missed = np.concatenate(
            [_missed(watched, experts_of, shape) for watched, experts_of in _split(listed, experts)]
        )
        kind = np.uint8 if shape.num_experts <= 256 else np.dtype("<u2")
        content["experts"] = _encoded(experts.astype(kind))
        content["missed"] = _encoded(np.packbits(missed.ravel(), bitorder="little"))
    else:
        content["experts"] = content["missed"] = ""
    return content, tokens_of


def _split(
    listed: Sequence[WatchedPass], experts: npt.NDArray[np.integer]
) -> list[tuple[WatchedPass, npt.NDArray[np.integer]]]:
    """Return each pass with its part of ``experts``."""
    counts = [sum(watched.parts.values()) for watched in listed]
    return list(zip(listed, np.split(experts, np.cumsum(counts)[:-1]), strict=True))


def _choices(watched: WatchedPass, shape: Shape) -> npt.NDArray[np.integer]:
    """Return the choices of a pass, [T, layers, K]."""
    tokens = sum(watched.parts.values())
    layers = [experts for _, experts in sorted(watched.choices, key=lambda choice: choice[0])]
    return np.stack(layers).reshape(shape.layers, tokens, shape.experts_k).swapaxes(0, 1)


def _missed(watched: WatchedPass, experts: npt.NDArray[np.integer], shape: Shape) -> npt.NDArray[np.bool_]:
    """Return for each of the choices ``experts``, [T, layers, K], whether its expert was read."""
    if watched.store.misses in (0, watched.store.requests):
        return np.full(experts.shape, watched.store.misses > 0)
    read = np.zeros(shape.layers * shape.num_experts, np.bool_)
    read[[layer * shape.num_experts + expert for layer, found in watched.misses for expert in found]] = True
    places = experts + (np.arange(shape.layers) * shape.num_experts)[:, None]
    return np.asarray(read[places])


def _columns(passes: Sequence[WatchedPass]) -> dict[str, list[float]]:
    rows = [_row(watched) for watched in passes]
    return {name: [row[name] for row in rows] for name in _NAMES}


_NAMES = ("tokens", "seconds", "io", "compute", "sample", "requests", "misses", "bytes_read")


def _row(watched: WatchedPass) -> dict[str, float]:
    io, sample = watched.phases.get("io", 0.0), watched.phases.get("sample", 0.0)
    return {
        "tokens": sum(watched.parts.values()),
        "seconds": round(watched.seconds, 7),
        "io": round(io, 7),
        "compute": round(sum(watched.phases.values()) - io - sample, 7),
        "sample": round(sample, 7),
        "requests": watched.store.requests,
        "misses": watched.store.misses,
        "bytes_read": watched.store.bytes_read,
    }


def _sums(passes: Sequence[WatchedPass], shape: Shape) -> dict[str, Any]:
    used = np.zeros((shape.layers, shape.num_experts), np.int64)
    read = np.zeros((shape.layers, shape.num_experts), np.int64)
    for watched in passes:
        for layer, experts in watched.choices:
            used[layer] += np.bincount(experts.ravel(), minlength=shape.num_experts)
        for layer, found in watched.misses:
            read[layer, list(found)] += 1
    columns = _columns(passes)
    decoded = [tokens for watched, tokens in zip(passes, columns["tokens"], strict=True) if watched.decoding]
    return {
        **{name: sum(values) for name, values in columns.items()},
        "prompt": sum(columns["tokens"]) - sum(decoded),
        "decoded": sum(decoded),
        "used": _encoded(np.minimum(used, 2**16 - 1).astype("<u2")),
        "read": _encoded(np.minimum(read, 2**16 - 1).astype("<u2")),
    }


def _encoded(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()
