"""Many requests, as many at once as memory holds and as makes them faster."""

import time
from collections.abc import Iterator

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.runner import Runner
from flashmoe_mlx.generation.scheduler import Progress, Scheduler
from flashmoe_mlx.generation.sequence import Sequence, Status
from flashmoe_mlx.generation.together import STATES, tokens_of_rows
from flashmoe_mlx.stores.memory import available_memory

_MOST = 128
"""The largest number of sequences at once: more gain little, and each delays the answers of all others."""
_SHARE = 0.5
"""Share of the free memory for the caches of all sequences."""
_STEPS = 6
"""Decode steps by which the speed of a number of sequences is measured; one step before them is not measured."""


class Concurrency:
    """The number of sequences that run at once.

    A fixed number, or as many as memory holds. If experts are read from storage, sequences that need different experts
    could slow each other down, so the number begins with 1 and doubles while more tokens a second come out.

    Args:
        runner: runs the passes.
        together: the fixed number; None to choose it.

    Attributes:
        limit: the largest number of sequences at present.
        most: the largest number of sequences that ran at once.
    """

    def __init__(self, runner: Runner, together: int | None = None) -> None:
        if together is not None and (type(together) is not int or together < 1):
            raise InputError(f"together={together!r}: must be a whole number, at least 1", code="out_of_range")
        self._need = runner.model.prompt_memory
        self._ahead = runner.ahead
        reserved = 0 if runner.prompt_cache is None else runner.prompt_cache.room
        self._room = None if together is not None else int(_SHARE * (available_memory() - reserved))
        self._grows = together is None and runner.store.reads
        self.limit: int = together or (1 if self._grows else _MOST)
        self.most: int = 0
        self._best = 0.0
        self._begin_measurement()

    def admits(self, sequence: Sequence, running: set[Sequence]) -> bool:
        """Return whether ``sequence`` may join the ``running`` sequences; one sequence always runs."""
        if not running:
            return True
        if len(running) >= self.limit:
            return False
        return self._room is None or self._bytes([*running, sequence]) <= self._room

    def measured(self, tokens: int, seconds: float) -> None:
        """Take the time of a step that decoded ``tokens`` sequences, and nothing else, into account."""
        if not self._grows or tokens < self.limit:
            return
        self._steps += 1
        if self._steps == 0:
            return
        self._seconds += seconds
        if self._steps < _STEPS:
            return
        rate = _STEPS * self.limit / self._seconds
        if rate <= self._best:
            self._grows, self.limit = False, self.limit // 2
        else:
            self._best, self.limit = rate, min(2 * self.limit, _MOST)
            self._grows = self.limit < _MOST
        self._begin_measurement()

    def _begin_measurement(self) -> None:
        self._steps, self._seconds = -1, 0.0

    def _bytes(self, sequences: list[Sequence]) -> int:
        """Return the bytes of the caches of ``sequences`` at their ends."""
        tokens = [len(sequence.request.prompt_ids) + sequence.request.max_tokens for sequence in sequences]
        states, total = len(tokens), sum(tokens)
        if self._ahead.most_sequences > 1:
            states, total = STATES * states, tokens_of_rows(tokens)
        return self._need.cache_fixed * states + self._need.cache_per_token * total


def run_all(runner: Runner, sequences: Iterator[Sequence], concurrency: Concurrency) -> Iterator[Progress]:
    """Run ``sequences`` to their ends, and yield their changes; each is taken when there is room for it."""
    scheduler = Scheduler(runner, max(concurrency.limit, _MOST))
    running: set[Sequence] = set()
    held: Sequence | None = None
    while True:
        while True:
            if len(running) < concurrency.limit:
                held = held or next(sequences, None)
            if held is None or not concurrency.admits(held, running):
                break
            scheduler.add(held)
            running.add(held)
            held = None
        if not running:
            return
        concurrency.most = max(concurrency.most, len(running))
        decodes = all(sequence.status is Status.DECODING for sequence in running)
        start = time.perf_counter()
        with runner.exclusive():
            changed = scheduler.step()
        if decodes:
            concurrency.measured(len(running), time.perf_counter() - start)
        yield from changed
        failed = {change.sequence for change in changed if change.error is not None}
        # A stop string in the text of a change ends its sequence only while the change is handled.
        running = {sequence for sequence in running if sequence not in failed and sequence.finish_reason is None}
