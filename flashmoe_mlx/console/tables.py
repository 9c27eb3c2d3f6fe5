"""Table and lines that summarize the measurements of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from flashmoe_mlx.generation.metrics import ratio

_LONG = 1024
"""Prompts of more tokens get a line about their passes over the experts."""
_PHASE_NAMES = {
    "compute": "attention + router + experts",
    "router_wait": "router wait",
    "io": "I/O",
    "sample": "sampling",
    "nodes": "other nodes",
}


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Make the closing table.

    "ms" is the time of a forward pass; "hits" are experts that the store held; "page cache" is the share of the bytes
    read that the page cache held before; "I/O hidden" is the share of the time of fetches in which experts that had
    arrived were computed; "weights GB/s" counts every weight that a pass uses, from memory or storage.

    Args:
        metrics: the result of ``RunMetrics.to_json``.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (
        "",
        "tokens",
        "tok/s",
        "ms p5/p50/p95",
        "MB/token",
        "hits",
        "page cache",
        "I/O hidden",
        "read GB/s",
        "weights GB/s",
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
            _shown(stage["page_cache_hit_rate"], ".0%"),
            _shown(stage["io_hidden"], ".0%"),
            _shown(stage["read_gb_per_second"], ".2f"),
            _shown(stage["weights_gb_per_second"], ".2f"),
        )
    return table


def metrics_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines about the first token, the phases of a pass, prefetching, sampling and memory."""
    first = metrics["time_to_first_token"]
    reasons = {"stop": "the model ended its answer", "length": "max_tokens reached, or the context is full"}
    if first is None:
        yield "interrupted before the first token"
    else:
        yield f"first token after {first:.3g} s; {reasons.get(metrics['finish_reason'], 'interrupted')}"
    known = metrics["prompt"]
    if known["reused"]:
        place = {"disk": "cache_dir", "live": "the latest conversation"}.get(known["reused_from"], "memory")
        counts = f"{known['reused']:,} reused from {place}, {known['computed']:,} computed"
        yield f"prompt: {known['tokens']:,} tokens, {counts}"
    prompt, chunk = metrics["prefill"]["tokens"], metrics["prefill_chunk"]
    if chunk is not None and prompt > chunk:
        yield f"prefill: {chunk:,} tokens through a layer at once, {-(-prompt // chunk)} passes over the experts"
    elif prompt > _LONG:
        yield f"prefill: all {prompt:,} tokens through a layer at once, one pass over the experts"
    for name in ("prefill", "decode"):
        stage = metrics[name]
        if stage["seconds"]:
            shares = sorted(stage["phase_seconds"].items(), key=lambda item: -item[1])
            parts = (f"{_PHASE_NAMES.get(phase, phase)} {seconds / stage['seconds']:.0%}" for phase, seconds in shares)
            yield f"{name} time: {', '.join(parts)}"
    guesses, decode = metrics["guesses"], metrics["decode"]
    if guesses is not None and guesses["predicted"]:
        useful = ratio(decode["prefetched"], decode["misses"])
        wasted = ratio(decode["bytes_wasted"] / 1e6, decode["tokens"])
        yield (
            f"prefetch: {guesses['accuracy']:.0%} of the predictions correct, {_shown(useful, '.0%')} of the reads "
            f"started early, {_shown(wasted, '.3g')} MB/token wasted"
        )
    if metrics["forced_tokens"]:
        yield f"constraint: {metrics['forced_tokens']} tokens were forced, and needed no decode step"
    if metrics["sampling"] is not None:
        yield f"sampling: {metrics['sampling']['description']}"
    yield f"peak memory {metrics['process_peak_bytes'] / 1e9:.2f} GB"


def _spread(steps: Mapping[str, float]) -> str:
    """Format percentiles (given in seconds) in milliseconds; equal values appear once."""
    shown = [f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}" for seconds in steps.values()]
    return "/".join(dict.fromkeys(shown))


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)
