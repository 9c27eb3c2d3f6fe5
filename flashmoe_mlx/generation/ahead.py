"""Decode steps that begin before they are requested, where nothing between two steps needs the host.

A step chooses its token on the device, and the next step begins with that token before the host has read it. The device
therefore never waits for Python. The last step may be unnecessary; ``Sequence.settle`` discards it.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from flashmoe_mlx.generation.logits import checked_logits
from flashmoe_mlx.generation.pass_meter import PassMeter
from flashmoe_mlx.generation.sequence import Sequence, Step
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.models.steps import TracedSteps
from flashmoe_mlx.moe.in_memory import UsedExperts
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.stores.contract import ExpertStore


class StepsAhead:
    """Decodes one sequence at a time, one step ahead.

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
        return self._traced() is not None

    def _traced(self) -> TracedSteps | None:
        if self._steps is None:
            self._steps = TracedSteps.of(self._model)
        return self._steps

    def close(self) -> None:
        """Drop the experts of the store, which is about to be closed."""
        self._steps = None

    def decode(self, sequence: Sequence, refuse_cancelled: Callable[[], None]) -> None:
        """Append a token to ``sequence``: finish the step under way, or begin one, after the next one has begun.

        Args:
            sequence: decodes alone, and can choose its tokens on the device.
            refuse_cancelled: called before each step begins; may raise to end it. The sequence can then be settled.
        """
        with self._meter.measured({sequence: 1}, decoding=True):
            step = sequence.ahead or self._begin(
                sequence, mx.array(sequence.token_ids[-1:], mx.uint32), refuse_cancelled
            )
            sequence.ahead = step
            following = None
            if not sequence.one_token_left:
                if sequence.cache.must_grow(1):
                    self._clock.evaluate("head", step.report)  # the copy must not be made while the step writes
                following = self._begin(sequence, step.token, refuse_cancelled)
            sequence.ahead = following
            self._take(sequence, step)

    def take(self, sequence: Sequence) -> None:
        """Append the token of the step under way to ``sequence``, and begin no other step."""
        assert sequence.ahead is not None
        with self._meter.measured({sequence: 1}, decoding=True):
            step, sequence.ahead = sequence.ahead, None
            self._take(sequence, step)

    def _begin(self, sequence: Sequence, token: mx.array, refuse_cancelled: Callable[[], None]) -> Step:
        """Begin a decode step with ``token`` uint32 [1], the latest of ``sequence``, and do not wait for it.

        If this fails, the cache of ``sequence`` is as it was.
        """
        steps = self._traced()
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
        except BaseException:
            sequence.cache.rewind(mark)
            raise
        return Step(chosen, logits, report, used, mark, number)

    def _take(self, sequence: Sequence, step: Step) -> None:
        """Wait for ``step`` and append its token to ``sequence``."""
        report = self._clock.read("head", step.report)
        step.used.count(report[2:], self._meter.chosen_in_memory)
        with self._clock.phase("sample"):
            if not report[1]:
                checked_logits(np.array(step.logits))  # -inf is allowed: it excludes a token
            sequence.accept(int(report[0]))
