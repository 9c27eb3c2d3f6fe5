"""Decode steps that begin before they are requested, where nothing between two steps needs the host.

A step chooses its token on the device, and the next step begins with that token before the host has read it. The device
therefore never waits for Python. The last steps may be unnecessary; ``Sequence.settle`` discards them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.generation.logits import checked_logits
from flashmoe_mlx.generation.pass_meter import PassMeter
from flashmoe_mlx.generation.sequence import Sequence, Step
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.models.steps import TracedSteps
from flashmoe_mlx.moe.in_memory import UsedExperts
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.stores.contract import ExpertStore

_IN_FLIGHT = 2
"""Steps under way on one machine while the host waits for the first of them."""
_MOST_STEPS = 8
"""Largest number of steps in an order of node 0."""
_LONGEST = 0.1
"""Seconds that the steps of an order should take at most: steps that are not needed cannot be stopped."""
_STATE_BYTES = 2**29
"""Memory for recurrent states before steps that may be discarded."""


@dataclass(frozen=True, slots=True)
class StepAlone(Step):
    """A step of one sequence.

    Attributes:
        token: the token, uint32 [1].
        logits: the logits by which it is chosen, f32 [vocabulary].
        used: counts the experts used, which ``report`` has after the token and 1 if all logits are finite, else 0, in
            one array int32.
    """

    token: mx.array
    logits: mx.array
    used: UsedExperts


class StepsAhead:
    """Decodes one sequence at a time, one or several steps ahead.

    Args:
        model: the model.
        store: the store of its experts.
        clock: measures the phases of passes.
        meter: measures passes.
        nodes: the nodes that share the experts, of which node 0 chooses the tokens; None for one machine.
    """

    def __init__(
        self, model: RunnableModel, store: ExpertStore, clock: PhaseClock, meter: PassMeter, nodes: Nodes | None = None
    ) -> None:
        self._model = model
        self._store = store
        self._clock = clock
        self._meter = meter
        self._nodes = nodes
        self._steps: TracedSteps | None = None

    @property
    def ready(self) -> bool:
        """Whether the store holds all layers in memory. A layer that the store has offered stays there."""
        return self.traced() is not None

    @property
    def most_sequences(self) -> int:
        """The largest number of sequences that a step can have; 1 unless ``ready``, and where several nodes run it."""
        steps = self.traced() if self._nodes is None else None
        return 1 if steps is None else steps.most_sequences

    def traced(self) -> TracedSteps | None:
        """Return the steps of the model; None unless ``ready``."""
        if self._steps is None:
            self._steps = TracedSteps.of(self._model)
        return self._steps

    def close(self) -> None:
        """Drop the experts of the store, which is about to be closed."""
        self._steps = None

    def to_begin(self, sequence: Sequence) -> int:
        """Return the number of steps of ``sequence`` that ``decode`` should begin now.

        On one machine, one step is under way while another one is taken. Node 0 of several orders several steps at
        once, since an order waits for the steps before it.
        """
        most = _IN_FLIGHT
        if self._nodes is not None:
            if len(sequence.ahead) > 1:
                return 0
            recent = sequence.metrics.decode.steps[-_MOST_STEPS:]
            by_time = int(_LONGEST * len(recent) / max(sum(recent), 1e-6)) if recent else _IN_FLIGHT
            by_memory = _STATE_BYTES // max(1, self._model.state_bytes)
            most = max(_IN_FLIGHT, min(by_time, by_memory, _MOST_STEPS) + len(sequence.ahead))
        return max(0, min(most, sequence.tokens_left) - len(sequence.ahead))

    def decode(self, sequence: Sequence, steps: int, refuse_cancelled: Callable[[], None]) -> None:
        """Append a token to ``sequence``: the token of the first step under way.

        Args:
            sequence: decodes alone, and can choose its tokens on the device.
            steps: the number of steps to begin before; at least 1 if none is under way.
            refuse_cancelled: called before each step begins; may raise to end it. The sequence can then be settled.
        """
        with self._meter.measured({sequence: 1}, decoding=True):
            self.begin(sequence, steps, refuse_cancelled)
            self._take(sequence)

    def begin(self, sequence: Sequence, steps: int, refuse_cancelled: Callable[[], None]) -> None:
        """Begin ``steps`` steps of ``sequence``; see ``decode``."""
        for _ in range(steps):
            latest = sequence.ahead[-1] if sequence.ahead else None
            assert latest is None or isinstance(latest, StepAlone)
            if latest is not None and sequence.cache.must_grow(1):
                self._clock.evaluate("head", latest.report)  # the copy must not be made while the step writes
            token = mx.array(sequence.token_ids[-1:], mx.uint32) if latest is None else latest.token
            sequence.ahead.append(self._begin(sequence, token, refuse_cancelled))

    def take(self, sequence: Sequence) -> None:
        """Append the token of the first step under way to ``sequence``, and begin no other step."""
        with self._meter.measured({sequence: 1}, decoding=True):
            self._take(sequence)

    def _begin(self, sequence: Sequence, token: mx.array, refuse_cancelled: Callable[[], None]) -> StepAlone:
        """Begin a decode step with ``token`` uint32 [1], the latest of ``sequence``, and do not wait for it.

        If this fails, the cache of ``sequence`` is as it was.
        """
        steps = self.traced()
        assert steps is not None
        mark = sequence.cache.mark()
        used = UsedExperts(self._store)
        try:
            refuse_cancelled()
            with self._clock.computing("head"):
                logits, finite = steps.logits(token, sequence.cache, used)
                chosen, number = sequence.choose_on_device(logits)
                if self._nodes is not None:
                    chosen = self._nodes.of_first(chosen)
                report = mx.concatenate([chosen.astype(mx.int32), finite, used.listed])
                refuse_cancelled()
                mx.async_eval(report, chosen, *sequence.cache.arrays())  # type: ignore[no-untyped-call]
                if self._nodes is not None:
                    self._nodes.under_way = report
        except BaseException:
            sequence.cache.rewind(mark)
            raise
        return StepAlone(report, mark, number, chosen, logits, used)

    def count(self, step: StepAlone) -> npt.NDArray[np.int32]:
        """Wait for ``step``, count the experts that it used, and return its report."""
        report = self._clock.read("head", step.report)
        step.used.count(report[2:], self._meter.chosen_in_memory)
        return report

    def _take(self, sequence: Sequence) -> None:
        """Wait for the first step under way of ``sequence`` and append its token."""
        step = sequence.ahead.pop(0)
        assert isinstance(step, StepAlone)
        report = self.count(step)
        with self._clock.phase("sample"):
            if not report[1]:
                checked_logits(np.array(step.logits))  # -inf is allowed: it excludes a token
            sequence.accept(int(report[0]))
