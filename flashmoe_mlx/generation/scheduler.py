"""Several requests at once: answers share their passes, and new prompts are processed between their tokens."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.runner import Runner
from flashmoe_mlx.generation.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Progress:
    """The change of a sequence in a step.

    Attributes:
        sequence: the sequence that has a new token or has ended.
        error: the error that ended it; None without an error.
    """

    sequence: Sequence
    error: Exception | None = None


class Scheduler:
    """Sequences that wait or run; ``step`` advances them.

    All methods are called from one thread, ``step`` inside ``Runner.exclusive``.

    Waiting sequences are admitted in the order in which they came, between two tokens of the running sequences. A
    step processes at most ``prefill_tokens`` tokens of prompts while answers are in progress, so that a long prompt
    delays the next tokens by one such part rather than by the whole prompt.

    Args:
        runner: runs the passes.
        together: the largest number of sequences that run at once; each keeps its caches in memory.
        prefill_tokens: the largest number of prompt tokens in a step while answers are in progress.
    """

    def __init__(self, runner: Runner, together: int = 16, prefill_tokens: int = 512) -> None:
        for name, value in (("together", together), ("prefill_tokens", prefill_tokens)):
            if type(value) is not int or value < 1:
                raise InputError(f"{name}={value!r}: must be a whole number, at least 1", code="out_of_range")
        self._runner = runner
        self._together = together
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has no tokens yet."""
        self._waiting.append(sequence)

    @property
    def unfinished(self) -> int:
        """The number of sequences that wait or run."""
        return len(self._waiting) + len(self._running)

    def step(self) -> list[Progress]:
        """Process parts of prompts, then decode one token of each answer in progress; return the changed sequences.

        An error that ends some sequences does not end the other sequences. It is returned with the sequences it ended.
        """
        while self._waiting and len(self._running) < self._together:
            self._running.append(self._waiting.popleft())
        decoding = [sequence for sequence in self._running if sequence.status is Status.DECODING]
        waiting = [sequence for sequence in self._running if sequence.status is Status.WAITING]
        changed: list[Progress] = []
        if waiting:
            most_tokens = self._prefill_tokens if decoding else waiting[0].prefill_chunk
            changed += _changes(waiting, lambda: self._runner.prefill_part(waiting, most_tokens))
        if decoding:
            changed += _changes(decoding, lambda: self._runner.decode(decoding))
        ended = [done.sequence for done in changed if done.error is not None]
        self._running = [
            sequence for sequence in self._running if sequence not in ended and sequence.status is not Status.FINISHED
        ]
        return changed


def _changes(sequences: Listed[Sequence], run_pass: Callable[[], None]) -> list[Progress]:
    """Run a pass over ``sequences``; return the sequences that have a new token or have ended."""
    before = [len(sequence.token_ids) for sequence in sequences]
    failure: Exception | None = None
    try:
        run_pass()
    except Exception as error:
        if not any(sequence.cache.broken for sequence in sequences):
            raise  # the pass was refused: a mistake of the caller
        failure = error
    return [
        Progress(sequence, failure if sequence.cache.broken else None)
        for sequence, count in zip(sequences, before, strict=True)
        if len(sequence.token_ids) > count or sequence.status is Status.FINISHED or sequence.cache.broken
    ]
