"""Counters of the server, in the text format of Prometheus. No label holds text of a client.

Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

import threading
from collections import Counter
from collections.abc import Iterator

from flashmoe_mlx.server.events import Usage
from flashmoe_mlx.stores.contract import StoreStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Upper bounds of the buckets of histograms, in seconds."""
_STORE = {
    "requests": "Experts requested from the store.",
    "hits": "Requested experts that were in memory.",
    "misses": "Requested experts that were read.",
    "evictions": "Experts that lost their place in memory.",
    "reads": "Reads of storage or page cache.",
    "bytes_read": "Bytes of these reads.",
    "prefetched": "Misses whose read had begun before the request.",
    "bytes_wasted": "Bytes read ahead that were not used.",
}


class Histogram:
    """Seconds in buckets."""

    def __init__(self) -> None:
        self.counts: list[int] = [0] * (len(_BOUNDS) + 1)
        self.sum: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[sum(seconds > bound for bound in _BOUNDS)] += 1
        self.sum += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield the samples."""
        total = 0
        for bound, count in zip((*_BOUNDS, None), self.counts, strict=True):
            total += count
            limit = "+Inf" if bound is None else f"{bound:g}"
            yield f'{name}_bucket{{{labels},le="{limit}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self.sum:.6f}"
        yield f"{name}_count{{{labels}}} {total}"


class Metrics:
    """All counters of one server; threads may share it.

    Attributes:
        backend: the name of the expert store, a label.
        refused: requests refused because the queue was full.
        taken_over: repeated requests that took over an answer in progress.
    """

    def __init__(self) -> None:
        self.backend = ""
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._queue = Histogram()
        self._first_token = Histogram()
        self._seconds = Histogram()
        self.refused = self.taken_over = 0

    @property
    def _labels(self) -> str:
        return f'backend="{"".join(c for c in self.backend if c.isalnum() or c in "_.-")}"'

    def began(self, seconds: float) -> None:
        """Count an answer that left the queue after ``seconds``."""
        with self._lock:
            self._queue.add(seconds)

    def ended(self, reason: str, seconds: float, first_token: float | None, usage: Usage | None) -> None:
        """Count an answer that has ended."""
        with self._lock:
            self._requests[reason] += 1
            self._seconds.add(seconds)
            if first_token is not None:
                self._first_token.add(first_token)
            if usage is not None:
                self._tokens += Counter(
                    prompt=usage.prompt, cached=usage.cached, completion=usage.completion, reasoning=usage.reasoning
                )

    def text(self, waiting: int, running: int, store: StoreStats | None) -> str:
        """Return all counters."""
        lines: list[str] = []
        with self._lock:
            lines += _family("requests_total", "counter", "Answers by the reason of their end.")
            lines += [
                f'flashmoe_requests_total{{{self._labels},finish_reason="{reason}"}} {count}'
                for reason, count in sorted(self._requests.items())
            ]
            for name, kind, about, value in (
                ("requests_refused_total", "counter", "Requests refused because the queue was full.", self.refused),
                ("requests_taken_over_total", "counter", "Repeated requests given earlier work.", self.taken_over),
                ("requests_waiting", "gauge", "Requests in the queue.", waiting),
                ("requests_running", "gauge", "Answers in progress.", running),
                ("prompt_tokens_total", "counter", "Tokens of prompts.", self._tokens["prompt"]),
                (
                    "prompt_tokens_cached_total",
                    "counter",
                    "Tokens reused from earlier prompts.",
                    self._tokens["cached"],
                ),
                ("completion_tokens_total", "counter", "Generated tokens.", self._tokens["completion"]),
                ("reasoning_tokens_total", "counter", "Generated tokens of thinking.", self._tokens["reasoning"]),
            ):
                lines += [*_family(name, kind, about), f"flashmoe_{name}{{{self._labels}}} {value}"]
            for name, about, histogram in (
                ("queue_seconds", "From the request to the queue's end.", self._queue),
                ("time_to_first_token_seconds", "From the queue's end to the first token.", self._first_token),
                ("request_seconds", "From the request to the end of its answer.", self._seconds),
            ):
                lines += [*_family(name, "histogram", about), *histogram.lines(f"flashmoe_{name}", self._labels)]
        if store is not None:
            for name, about in _STORE.items():
                full = f"expert_{name}_total"
                lines += [*_family(full, "counter", about), f"flashmoe_{full}{{{self._labels}}} {getattr(store, name)}"]
            stalled = "Seconds during which the engine waited for experts."
            latency = store.fetch_seconds / store.reads if store.reads else 0.0
            lines += [
                *_family("expert_stall_seconds_total", "counter", stalled),
                f"flashmoe_expert_stall_seconds_total{{{self._labels}}} {store.fetch_seconds:.6f}",
                *_family("expert_read_latency_seconds", "gauge", "Seconds of stall per read, on average."),
                f"flashmoe_expert_read_latency_seconds{{{self._labels}}} {latency:.9f}",
            ]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP flashmoe_{name} {about}", f"# TYPE flashmoe_{name} {kind}"]
