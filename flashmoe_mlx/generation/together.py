"""Decode steps of several sequences by one submission to the device, where nothing between two steps needs the host.

The caches of the sequences are rows of shared arrays, so the number of kernels of a step does not depend on the number
of sequences. As in ``ahead``, a step chooses its tokens on the device, and the next one begins before the host has read
them. A sequence that ends leaves a row that is computed in vain until enough of them are worth new arrays.
"""

import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.attention.reference import on_device
from flashmoe_mlx.generation.ahead import StepsAhead
from flashmoe_mlx.generation.device_sampling import choose_each
from flashmoe_mlx.generation.logits import checked_logits
from flashmoe_mlx.generation.pass_meter import PassMeter
from flashmoe_mlx.generation.passes import ending_alone
from flashmoe_mlx.generation.sequence import Sequence, Step
from flashmoe_mlx.layers.cache import SequenceCache, own_contents
from flashmoe_mlx.layers.kv_cache import rounded_up
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.layers.shared_arrays import share_arrays
from flashmoe_mlx.layers.shared_row import SharedRow
from flashmoe_mlx.moe.in_memory import UsedExperts
from flashmoe_mlx.stores.contract import ExpertStore

_IN_FLIGHT = 2
"""Steps under way while the host waits for the first of them."""
STATES = _IN_FLIGHT + 1
"""Copies of the states of recurrences in memory: those before each step under way, and the latest."""
_EXACT = 8
"""Up to this number of sequences, every sequence that ends causes new arrays; of more, every eighth."""
_PADDING = 2
"""Largest size of shared keys and values in relation to those of each sequence by itself."""
_SPARE = 8
"""Rows have room for this part of the longest sequence beyond it, so that they are seldom copied."""


@dataclass(slots=True)
class SharedStep:
    """A step of several sequences under way on the device.

    Attributes:
        tokens: the token chosen for each row, uint32 [R].
        positions: the positions of these tokens, int32 [max(4, R)].
        logits: the logits by which they are chosen, f32 [R, vocabulary].
        report: int32: the tokens; for each row 1 if all logits are finite, else 0; the experts used.
        used: counts the experts used.
        capacity: the number of tokens that a row has room for.
    """

    tokens: mx.array
    positions: mx.array
    logits: mx.array
    report: mx.array
    used: UsedExperts
    capacity: int


@dataclass(frozen=True, slots=True)
class StepTogether(Step):
    """The part of one sequence, the row ``row``, in the step ``shared``."""

    shared: SharedStep
    row: int


class StepsTogether:
    """Decodes several sequences at a time, one or two steps ahead.

    Args:
        ahead: decodes single sequences.
        store: the store of the experts.
        clock: measures the phases of passes.
        meter: measures passes.
    """

    def __init__(self, ahead: StepsAhead, store: ExpertStore, clock: PhaseClock, meter: PassMeter) -> None:
        self._ahead = ahead
        self._store = store
        self._clock = clock
        self._meter = meter
        self._sharing: weakref.WeakSet[SequenceCache] = weakref.WeakSet()
        """The caches that may be rows of shared arrays."""

    def decode(
        self,
        sequences: Listed[Sequence],
        able: Callable[[Sequence], bool],
        failures: list[Exception],
    ) -> set[Sequence]:
        """Append a token to those of ``sequences`` that decode together now, and return them.

        Args:
            sequences: all sequences that are to decode.
            able: whether the next steps of a sequence need nothing from the host.
            failures: takes the errors of single sequences.
        """
        under_way: dict[int, list[Sequence]] = {}
        for sequence in sequences:
            if under_way_together(sequence):
                under_way.setdefault(id(sequence.ahead[0].report), []).append(sequence)
        alike = self._alike([one for one in sequences if (not one.ahead or under_way_together(one)) and able(one)])
        groups = list(under_way.values()) or ([alike] if len(alike) > 1 else [])
        # Other sequences join once the steps under way are taken.
        begins = len(groups) == 1 and len(alike) > 1 and set(alike) <= set(groups[0])
        for group in groups:
            self._decode(group, failures, begins=begins)
        return {sequence for group in groups for sequence in group}

    def _alike(self, sequences: Listed[Sequence]) -> list[Sequence]:
        """Return those of ``sequences`` that can share arrays: without the longest, for which all others would grow."""
        if len(sequences) < 2 or _rows(len(sequences)) > self._ahead.most_sequences:
            return []
        ordered = sorted(sequences, key=lambda sequence: sequence.cache.length)
        own = [rounded_up(sequence.cache.length + 1) for sequence in ordered]
        while len(own) > 1 and len(own) * own[-1] > _PADDING * sum(own):
            own.pop()
        return ordered[: len(own)]

    def _decode(self, group: list[Sequence], failures: list[Exception], *, begins: bool) -> None:
        """Append a token to each sequence of ``group``; their first steps under way are one, or ``begins`` is true."""
        with self._meter.measured(dict.fromkeys(group, 1), decoding=True):
            for steps in range(_IN_FLIGHT) if begins else ():
                # Steps of a sequence with fewer tokens left are already under way.
                going_on = [one for one in group if len(one.ahead) == steps and one.tokens_left > steps]
                if going_on:
                    self._begin(going_on)
            self._take(group, failures)

    def _begin(self, sequences: Listed[Sequence]) -> None:
        """Begin a step with the latest token of each of ``sequences``, and do not wait for it."""
        steps = self._ahead.traced()
        assert steps is not None
        rows, tokens, positions, capacity = self._inputs(sequences)
        first = sequences[0].cache.shared
        assert first is not None
        used = UsedExperts(self._store)
        with self._clock.computing("head"):
            logits, finite, states = steps.logits_together(tokens, positions, first, used)
            choices = {row: sequence.take_number() for row, sequence in rows.items()}
            chosen = choose_each(logits, choices)
            report = mx.concatenate([chosen.astype(mx.int32), finite, used.listed])
            following = mx.minimum(positions + 1, capacity - 1)  # rows without a sequence stay in their arrays
            mx.async_eval(report, chosen, following, *(one for pair in states.values() for one in pair))  # type: ignore[no-untyped-call]
        step = SharedStep(chosen, following, logits, report, used, capacity)
        for row, sequence in rows.items():
            cache = sequence.cache
            sequence.ahead.append(StepTogether(report, cache.mark(), choices[row][1], step, row))
            cache.shared = SharedRow(first.tokens, row, states, row, report)
            cache.length += 1

    def _inputs(self, sequences: Listed[Sequence]) -> tuple[Mapping[int, Sequence], mx.array, mx.array, int]:
        """Return the sequence of each row, the tokens and the positions of all rows, and their capacity.

        The caches of ``sequences`` are rows of shared arrays afterwards, with room for a token.
        """
        longest = max(sequence.cache.length for sequence in sequences) + 2  # one place is for rows without a sequence
        caches = [sequence.cache for sequence in sequences]
        self._part(caches)
        latest = sequences[0].ahead[-1] if sequences[0].ahead else None
        assert latest is None or isinstance(latest, StepTogether)
        if latest is not None:
            step, count = latest.shared, _rows(len(sequences))
            stays = all(cache.shared is not None for cache in caches)
            if stays and len(step.tokens) == count and longest <= step.capacity:
                return {_row(sequence): sequence for sequence in sequences}, step.tokens, step.positions, step.capacity
            self._clock.evaluate("head", step.report)  # nothing may be copied while the step writes
        token_ids = [_latest_token(sequence) for sequence in sequences]
        capacity, count = rounded_up(longest + longest // _SPARE), _rows(len(sequences))
        order = share_arrays(caches, count, capacity)
        self._sharing.update(caches)
        tokens = [token_ids[at] for at in order] + [0] * (count - len(order))
        positions = [sequences[at].cache.length for at in order] + [0] * (count - len(order))
        rows = {row: sequences[at] for row, at in enumerate(order)}
        return rows, mx.array(tokens, mx.uint32), on_device(positions), capacity

    def _part(self, caches: Listed[SequenceCache]) -> None:
        """Give caches that share arrays with ``caches`` their own: a row would keep all arrays of a step in memory."""
        others = self._sharing.difference(caches)
        if not others:
            return
        arrays = {id(cache.shared.tokens) for cache in caches if cache.shared is not None}
        own_contents([cache for cache in others if cache.shared is not None and id(cache.shared.tokens) in arrays])
        self._sharing = weakref.WeakSet(cache for cache in self._sharing if cache.shared is not None)

    def _take(self, group: Listed[Sequence], failures: list[Exception]) -> None:
        """Wait for the first step under way of ``group`` and append its tokens."""
        parts = {sequence: sequence.ahead.pop(0) for sequence in group}
        step = next(part.shared for part in parts.values() if isinstance(part, StepTogether))
        report, rows = self._clock.read("head", step.report), len(step.tokens)
        counted = []
        with self._clock.phase("sample"):
            for sequence, part in parts.items():
                assert isinstance(part, StepTogether)
                counted.append(part.row)
                with ending_alone(sequence, failures):
                    if not report[rows + part.row]:
                        checked_logits(np.array(step.logits[part.row]))  # -inf is allowed: it excludes a token
                    sequence.accept(int(report[part.row]))
        step.used.count(report[2 * rows :], self._meter.chosen_in_memory, counted, rows)


def tokens_of_rows(tokens: Listed[int]) -> int:
    """Return the tokens that shared arrays have room for, at most, for sequences of ``tokens`` tokens."""
    rows, longest = _rows(len(tokens)), max(tokens)
    room = rounded_up(longest + longest // _SPARE)
    return min(rows * room, _PADDING * sum(map(rounded_up, tokens)) + rows * (room - longest))


def under_way_together(sequence: Sequence) -> bool:
    """Return whether the next step of ``sequence`` has begun together with other sequences."""
    return bool(sequence.ahead) and isinstance(sequence.ahead[0], StepTogether)


def _latest_token(sequence: Sequence) -> int:
    """Return the latest token of ``sequence``, that of its last step under way, which is complete."""
    latest = sequence.ahead[-1] if sequence.ahead else None
    return int(np.array(latest.report)[latest.row]) if isinstance(latest, StepTogether) else sequence.token_ids[-1]


def _row(sequence: Sequence) -> int:
    assert sequence.cache.shared is not None
    return sequence.cache.shared.row


def _rows(sequences: int) -> int:
    """Return the number of rows for ``sequences`` sequences."""
    return sequences if sequences <= _EXACT else -(-sequences // _EXACT) * _EXACT
