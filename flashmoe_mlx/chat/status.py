"""The one-line status of a chat: context, speed, hits, storage."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from flashmoe_mlx.generation.metrics import RunMetrics, ratio

_LATEST = 16
"""Number of tokens over which the speed is averaged."""


@dataclass(frozen=True)
class Status:
    """Figures about the state of a chat; None where nothing was measured.

    Attributes:
        context: the number of tokens in the model's context.
        max_context: the number of tokens that the context can hold.
        speed: tokens per second, over the latest tokens of an answer.
        hit_rate: the share of requested experts that the store held.
        gb_per_second: bytes read on demand per second of waiting for them.
        activity: the current activity.
    """

    context: int
    max_context: int
    speed: float | None = None
    hit_rate: float | None = None
    gb_per_second: float | None = None
    activity: str = ""

    def line(self, width: int) -> str:
        """Return the status in at most ``width`` cells; the least important parts are left out first."""
        parts = [f"{self.context:,}/{self.max_context:,} tokens"]
        if self.speed is not None:
            parts.append(f"{self.speed:.3g} tok/s")
        if self.hit_rate is not None:
            parts.append(f"hits {self.hit_rate:.0%}")
        if self.gb_per_second is not None:
            parts.append(f"{self.gb_per_second:.2f} GB/s")
        kept = [*([self.activity] if self.activity else []), *parts]
        while len(kept) > 1 and cell_len(" · ".join(kept)) > width:
            kept.pop()
        return " · ".join(kept)[: max(0, width)]


def measured(metrics: RunMetrics, context: int, max_context: int, activity: str | None = None) -> Status:
    """Return the status that ``metrics`` of an answer show.

    Args:
        metrics: the measurements so far.
        context: the number of tokens in the context.
        max_context: the number of tokens that the context can hold.
        activity: the current activity; None to tell waiting for storage from computing, by the latest pass.
    """
    stage = metrics.decode if metrics.decode.tokens else metrics.prefill
    steps: Sequence[float] = metrics.decode.steps[-_LATEST:]
    store = stage.store
    waited = stage.phases.get("io", 0.0)
    if activity is None:
        activity = "waiting for storage" if waited > stage.seconds / 2 else "computing"
    return Status(
        context,
        max_context,
        ratio(len(steps), sum(steps)),
        ratio(store.hits, store.requests),
        ratio(store.bytes_read / 1e9, store.fetch_seconds) if store.bytes_read else None,
        activity,
    )
