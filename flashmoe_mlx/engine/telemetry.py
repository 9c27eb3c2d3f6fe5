"""Measurements of a run, for people and for notebooks."""

import json
import platform
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
from rich.table import Table

from flashmoe_mlx.expert_store import ExpertStore, StoreStats
from flashmoe_mlx.model.phases import PhaseClock
from flashmoe_mlx.model.prefetch import Guesses
from flashmoe_mlx.paths import name_in_errors

METRICS_VERSION = 1
_PACKAGES = ("flashmoe_mlx", "mlx", "numpy", "hydra-core", "huggingface-hub", "tokenizers")


@dataclass
class Stage:
    """Measurements of prefill or decode: wall time in ``seconds``, and of each forward pass in ``steps``."""

    tokens: int = 0
    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    store: StoreStats = field(default_factory=StoreStats)
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def step(self, tokens: int, store: ExpertStore, clock: PhaseClock) -> Iterator[None]:
        """Count the enclosed code as one forward pass of ``tokens`` tokens; a pass that fails counts nothing."""
        before, phases, start = store.stats(), dict(clock.seconds), perf_counter()
        yield
        seconds = perf_counter() - start
        self.tokens += tokens
        self.seconds += seconds
        self.steps.append(seconds)
        self.store += store.stats() - before
        for name, total in dict(clock.seconds).items():
            self.phases[name] += total - phases.get(name, 0.0)

    def to_json(self, resident_bytes: int, record_bytes: int) -> dict[str, Any]:
        """Return rates and counters; None where nothing was measured.

        ``read_gb_per_second`` divides the bytes read on demand by the time spent fetching; ``weights_gb_per_second``
        divides all weights that the passes touched, resident and routed, by the whole time. ``prefetched`` counts the
        misses that had been hinted, ``bytes_wasted`` the bytes read because of wrong hints.
        """
        store, requests = self.store, self.store.requests
        read_on_demand = store.bytes_read - record_bytes * store.prefetched
        touched = resident_bytes * len(self.steps) + record_bytes * requests
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": _ratio(self.tokens, self.seconds),
            "step_seconds": _percentiles(self.steps),
            "bytes_read": store.bytes_read,
            "bytes_per_token": _ratio(store.bytes_read, self.tokens),
            "experts_requested": requests,
            "hits": store.hits,
            "hit_rate": _ratio(store.hits, requests),
            "misses": store.misses,
            "evictions": store.evictions,
            "reads": store.reads,
            "prefetched": store.prefetched,
            "bytes_wasted": store.bytes_wasted,
            "fetch_seconds": store.fetch_seconds,
            "read_gb_per_second": _ratio(read_on_demand / 1e9, store.fetch_seconds),
            "weights_gb_per_second": _ratio(touched / 1e9, self.seconds),
            "phase_seconds": {**self.phases, "other": self.seconds - sum(self.phases.values())},
        }


@dataclass
class RunMetrics:
    """Measurements of one generation."""

    prefill: Stage = field(default_factory=Stage)
    decode: Stage = field(default_factory=Stage)
    time_to_first_token: float | None = None
    """Seconds from the call to the first sampled token."""
    finish_reason: str | None = None
    guesses: Guesses | None = None
    """Guesses of the prefetcher, if there is one."""
    sampling: Mapping[str, Any] | None = None
    """How tokens were chosen, as from ``ChosenSampling.to_json``."""

    def to_json(self, resident_bytes: int, record_bytes: int) -> dict[str, Any]:
        """Return everything in the form of ``metrics.json``; in seconds, bytes and tokens."""
        return {
            "metrics_version": METRICS_VERSION,
            "time_to_first_token": self.time_to_first_token,
            "finish_reason": self.finish_reason,
            "sampling": self.sampling,
            "guesses": None if self.guesses is None else self.guesses.to_json(),
            "prefill": self.prefill.to_json(resident_bytes, record_bytes),
            "decode": self.decode.to_json(resident_bytes, record_bytes),
            "process_peak_bytes": process_peak_bytes(),
            "mlx_peak_bytes": mx.get_peak_memory(),
            "resident_bytes_touched": resident_bytes,
            "page_cache": "as found",
        }


_PHASE_NAMES = {"compute": "attention + router + experts", "router_wait": "router wait", "io": "I/O"}


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Make the closing table from ``RunMetrics.to_json``; "ms" is per pass, "all" counts every weight touched."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (
        "",
        "tokens",
        "tok/s",
        "ms p5/p50/p95",
        "MB/token",
        "hits",
        "read GB/s",
        "all GB/s",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in ("prefill", "decode"):
        stage = metrics[name]
        steps = stage["step_seconds"]
        table.add_row(
            name,
            str(stage["tokens"]),
            _shown(stage["tokens_per_second"], ".2f"),
            _spread(steps) if steps else "-",
            _shown(stage["bytes_per_token"], ".3g", 1e-6),
            _shown(stage["hit_rate"], ".0%"),
            _shown(stage["read_gb_per_second"], ".2f"),
            _shown(stage["weights_gb_per_second"], ".2f"),
        )
    return table


def metrics_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the table has no room for: the first token, where the time went, sampling, memory."""
    first = metrics["time_to_first_token"]
    ended = {"stop": "the model ended its answer", "length": "max_tokens reached, or the context is full"}
    if first is None:
        yield "interrupted before the first token"
    else:
        yield f"first token after {first:.3g} s; {ended.get(metrics['finish_reason'], 'interrupted')}"
    for name in ("prefill", "decode"):
        stage = metrics[name]
        if stage["seconds"]:
            shares = sorted(stage["phase_seconds"].items(), key=lambda item: -item[1])
            parts = (f"{_PHASE_NAMES.get(phase, phase)} {seconds / stage['seconds']:.0%}" for phase, seconds in shares)
            yield f"{name} time: {', '.join(parts)}"
    guesses, decode = metrics["guesses"], metrics["decode"]
    if guesses is not None and guesses["predicted"]:
        useful = _ratio(decode["prefetched"], decode["misses"])
        wasted = _ratio(decode["bytes_wasted"] / 1e6, decode["tokens"])
        yield (
            f"prefetch: {guesses['accuracy']:.0%} of the guesses right, {_shown(useful, '.0%')} of the reads begun "
            f"ahead, {_shown(wasted, '.3g')} MB/token wasted"
        )
    if metrics["sampling"] is not None:
        yield f"sampling: {metrics['sampling']['description']}"
    yield f"peak memory {metrics['process_peak_bytes'] / 1e9:.2f} GB"


def environment() -> dict[str, Any]:
    """Return the machine and the software, so that a number can be understood later."""
    device = mx.default_device()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "mlx_device": str(device),
        "mlx_device_info": dict(mx.device_info(device)),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "command": sys.orig_argv,
    }


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None; this package may run from a checkout, uninstalled."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one file of a run directory.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    with name_in_errors(path):
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def process_peak_bytes() -> int:
    """Return the peak memory of this process, without page cache; earlier runs of a sweep count too."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{p}": float(np.percentile(values, p)) for p in (5, 50, 95)}


def _spread(steps: Mapping[str, float]) -> str:
    """Percentiles in milliseconds, or the one value there is."""
    shown = [f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}" for seconds in steps.values()]
    return "/".join(dict.fromkeys(shown))


def _ratio(amount: float, per: float) -> float | None:
    return amount / per if per > 0 else None


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)
