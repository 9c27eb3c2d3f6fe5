"""The choice between implementations in the extension, by measurement on this machine.

Flags of a CPU say what it can execute, not what it executes fast. A ``Contest`` names several implementations of one
operation; ``settle`` times all of them and makes the extension use the fastest whose result is correct. Calls read
weights from memory in place of the cache, as a model does. A choice holds for the process, and is kept in the user's
cache folder for later processes on the same CPU with as many threads, so that a machine computes the same bits every
time; implementations may round differently.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import code_cache, native
from flashmoe_mlx.custom_kernels.checks import TOLERANCE, relative_difference

_log = logging.getLogger(__name__)

MARGIN = 1.05
"""Another implementation replaces the first if it is faster by this factor; smaller differences may be noise."""
_ROUNDS = 7
_CACHES = 3
"""Size of the memory for weights, in caches of the last level."""
_LEAST_BYTES, _MOST_BYTES = 2**26, 2**28
_LINE = 64
_settled: dict[str, "Choice"] = {}
"""The choices of this process, by the name of the contest."""


class Memory:
    """Memory larger than the CPU's cache whose bits are valid codes, and valid scales of f32, bf16 and f16."""

    def __init__(self, nbytes: int) -> None:
        random = np.random.default_rng(0).integers(0, 2**16, 2**18, np.uint16)
        words = (random & 0x83FF | 0x3C00).view(np.uint32)  # exponents of small numbers
        self._words = mx.array(np.tile(words, -(-nbytes // words.nbytes)))
        address = np.frombuffer(self._words, np.uint8).ctypes.data  # type: ignore[call-overload]  # arrays are buffers
        self._start = -address % _LINE // self._words.itemsize
        self.nbytes: int = self._words.nbytes - _LINE

    def place(self, offset: int, shape: tuple[int, int], dtype: mx.Dtype) -> tuple[mx.array, int]:
        """Return an array at byte ``offset``, a multiple of a cache line, and the offset of the next line behind it."""
        nbytes = shape[0] * shape[1] * dtype.size
        first, size = self._start + offset // self._words.itemsize, -(-nbytes // self._words.itemsize)
        array = self._words[first : first + size].view(dtype)[: shape[0] * shape[1]].reshape(shape)
        mx.eval(array)
        return array, offset + -(-nbytes // _LINE) * _LINE


@dataclass(frozen=True)
class Trial:
    """What a contest times.

    Attributes:
        calls: calls of the operation, each with other weights, which return the result.
        expected: the correct result of the first call, or of its first columns.
        tolerance: largest accepted difference, relative to the largest value.
    """

    calls: Sequence[Callable[[], mx.array]]
    expected: mx.array
    tolerance: float = TOLERANCE[mx.float32]


@dataclass(frozen=True)
class Contest:
    """Implementations of one operation, of which the fastest is to be used.

    Attributes:
        name: the operation and the form of its arguments. One process settles a name once.
        candidates: names of implementations, the one for unmeasured machines first.
        use: make the extension use a candidate for this operation.
        trial: make the trial, with weights in the given memory.
    """

    name: str
    candidates: Sequence[str]
    use: Callable[[str], None]
    trial: Callable[[Memory], Trial]


@dataclass(frozen=True)
class Choice:
    """The outcome of a contest: microseconds of a call by candidate, the chosen one first, incorrect ones left out."""

    contest: str
    microseconds: Mapping[str, float]

    @property
    def chosen(self) -> str:
        """The candidate in use."""
        return next(iter(self.microseconds))

    def __str__(self) -> str:
        """Return a phrase such as "avx512: 1.70 times as fast as avx512_vnni, 2.00 times avx2"."""
        own, *others = self.microseconds.values()
        rest = [
            f"{time / own:.2f} times {name}" for name, time in zip(list(self.microseconds)[1:], others, strict=True)
        ]
        return (
            self.chosen if not rest else f"{self.chosen}: {', '.join(rest).replace(' times ', ' times as fast as ', 1)}"
        )


def settle(contests: Iterable[Contest]) -> list[Choice]:
    """Make the extension use the fastest correct candidate of each contest; measure where no choice is known.

    Nothing is measured or changed if the environment names an instruction set.
    """
    if os.environ.get("FLASHMOE_INSTRUCTIONS"):
        return []
    memory: Memory | None = None
    choices = []
    for contest in contests:
        choice = _settled.get(contest.name) or _stored(contest)
        if choice is None:
            memory = memory or Memory(_memory_bytes())
            choice = _measured(contest, memory)
        contest.use(choice.chosen)
        _settled[contest.name] = choice
        choices.append(choice)
    return choices


def _measured(contest: Contest, memory: Memory) -> Choice:
    """Time all candidates in turns; the time of a candidate is its shortest call, which other load disturbs least."""
    trial = contest.trial(memory)
    correct = [name for name in contest.candidates if _is_correct(contest, name, trial)] or [contest.candidates[0]]
    shortest = dict.fromkeys(correct, float("inf"))
    number = 1
    for _ in range(_ROUNDS):
        for name in correct:
            contest.use(name)
            start = time.perf_counter()
            trial.calls[number % len(trial.calls)]()
            shortest[name] = min(shortest[name], 1e6 * (time.perf_counter() - start))
            number += 1
    first, best = correct[0], min(correct, key=shortest.__getitem__)
    if shortest[first] <= MARGIN * shortest[best]:
        best = first
    rest = sorted((name for name in correct if name != best), key=shortest.__getitem__)
    choice = Choice(contest.name, {name: round(shortest[name], 1) for name in (best, *rest)})
    _log.info("%s: %s", contest.name, choice)
    code_cache.store(_key(contest), json.dumps(choice.microseconds).encode())
    return choice


def _is_correct(contest: Contest, name: str, trial: Trial) -> bool:
    contest.use(name)
    got = trial.calls[0]()[:, : trial.expected.shape[1]]
    if relative_difference(got, trial.expected) <= trial.tolerance:
        return True
    _log.warning("%s: %s computes a wrong result on this machine and is not used", contest.name, name)
    return False


def _stored(contest: Contest) -> Choice | None:
    data = code_cache.load(_key(contest))
    if data is None:
        return None
    microseconds = json.loads(data)  # intact: the cache has compared its digest
    return Choice(contest.name, microseconds) if microseconds.keys() <= set(contest.candidates) else None


def _key(contest: Contest) -> str:
    threads = str(native.loaded().threads())
    return code_cache.key_of("fastest", _processor(), _build(), threads, contest.name, *contest.candidates)


@cache
def _processor() -> str:
    """Return the CPU's model and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.partition("\t")[0] in ("model name", "flags", "Features", "CPU part")]
    return "\n".join((platform.machine(), platform.processor(), *kept))


@cache
def _build() -> str:
    """Return the digest of the compiled part."""
    file = native.loaded().__file__
    assert file is not None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _memory_bytes() -> int:
    """Return a size several times as large as the CPU's cache, as far as the system tells."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return min(max(_CACHES * max(sizes, default=0), _LEAST_BYTES), _MOST_BYTES)
