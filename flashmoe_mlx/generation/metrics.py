"""Measurements of a run, for people and for notebooks."""

import contextlib
import resource
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from flashmoe_mlx.moe.prefetch import Guesses
from flashmoe_mlx.stores.contract import StoreStats

METRICS_VERSION = 1
ReusedFrom = Literal["live", "ram", "disk"]
"""The most recent conversation, another one in memory, or the disk."""


@dataclass
class Stage:
    """Measurements of prefill or decode of one sequence.

    Attributes:
        tokens: the number of tokens processed.
        seconds: the wall time of all passes.
        steps: the wall time of each pass, in seconds.
        store: the store's counters over the passes.
        phases: seconds by phase, as measured by a ``PhaseClock``.
    """

    tokens: int = 0
    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    store: StoreStats = field(default_factory=StoreStats)
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def to_json(self, resident_bytes: int, record_bytes: float) -> dict[str, Any]:
        """Return rates and counters; None where nothing was measured.

        ``record_bytes`` is the mean size of a record over the layers.

        ``read_gb_per_second`` divides the bytes read on demand by the time spent fetching; ``weights_gb_per_second``
        divides all weights that the passes touched, resident and routed, by the whole time. ``prefetched`` counts the
        misses that had been hinted, ``bytes_wasted`` the bytes read because of wrong hints. ``page_cache_hit_rate`` is
        the share of the bytes read that the page cache held before, from a sample. ``io_hidden`` is the share of the
        time of fetches in which experts were computed while others were read.
        """
        store, requests = self.store, self.store.requests
        read_on_demand = store.bytes_read - record_bytes * store.prefetched
        touched = resident_bytes * len(self.steps) + record_bytes * requests
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": ratio(self.tokens, self.seconds),
            "step_seconds": _percentiles(self.steps),
            "bytes_read": store.bytes_read,
            "bytes_per_token": ratio(store.bytes_read, self.tokens),
            "experts_requested": requests,
            "hits": store.hits,
            "hit_rate": ratio(store.hits, requests),
            "page_cache_hit_rate": store.page_cache_hit_rate,
            "sampled_bytes": store.sampled_bytes,
            "sampled_cached_bytes": store.sampled_cached_bytes,
            "misses": store.misses,
            "evictions": store.evictions,
            "reads": store.reads,
            "prefetched": store.prefetched,
            "bytes_wasted": store.bytes_wasted,
            "fetch_seconds": store.fetch_seconds,
            "overlapped_seconds": store.overlapped_seconds,
            "io_hidden": store.io_hidden,
            "read_gb_per_second": ratio(read_on_demand / 1e9, store.fetch_seconds),
            "weights_gb_per_second": ratio(touched / 1e9, self.seconds),
            "phase_seconds": {**self.phases, "other": self.seconds - sum(self.phases.values())},
        }


@dataclass
class RunMetrics:
    """Measurements of one generation."""

    prefill_chunk: int | None = None
    """The number of prompt tokens that went through a layer together; None without a prompt."""
    prefill: Stage = field(default_factory=Stage)
    decode: Stage = field(default_factory=Stage)
    time_to_first_token: float | None = None
    """Seconds from the call to the first sampled token."""
    finish_reason: str | None = None
    forced_tokens: int = 0
    """The number of generated tokens that a constraint left no choice about, so that no pass chose them."""
    guesses: Guesses | None = None
    """The guesses of the prefetcher; None without a prefetcher."""
    sampling: Mapping[str, Any] | None = None
    """The sampling options, in the form of ``ChosenSampling.to_json``."""
    prompt_tokens: int = 0
    """Tokens of the prompt."""
    reused_tokens: int = 0
    """Tokens of the prompt that came from the prompt cache."""
    reused_from: ReusedFrom | None = None
    """The place of these tokens; None if there are none."""

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that were computed."""
        return self.prefill.tokens

    def to_json(self, resident_bytes: int, record_bytes: float) -> dict[str, Any]:
        """Return all measurements in the form of ``metrics.json``, in seconds, bytes and tokens."""
        return {
            "metrics_version": METRICS_VERSION,
            "time_to_first_token": self.time_to_first_token,
            "finish_reason": self.finish_reason,
            "forced_tokens": self.forced_tokens,
            "prefill_chunk": self.prefill_chunk,
            "sampling": self.sampling,
            "prompt": {
                "tokens": self.prompt_tokens,
                "reused": self.reused_tokens,
                "reused_from": self.reused_from,
                "computed": self.computed_tokens,
            },
            "guesses": None if self.guesses is None else self.guesses.to_json(),
            "prefill": self.prefill.to_json(resident_bytes, record_bytes),
            "decode": self.decode.to_json(resident_bytes, record_bytes),
            "process_peak_bytes": process_peak_bytes(),
            "mlx_peak_bytes": mx.get_peak_memory(),
            "resident_bytes_touched": resident_bytes,
            "page_cache": "as found",
        }


def process_peak_bytes() -> int:
    """Return the peak memory of this process, without page cache; earlier runs of a sweep count too."""
    # The peak of getrusage(2) on Linux begins with the peak of the program that started this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{p}": float(np.percentile(values, p)) for p in (5, 50, 95)}


def ratio(amount: float, per: float) -> float | None:
    return amount / per if per > 0 else None
