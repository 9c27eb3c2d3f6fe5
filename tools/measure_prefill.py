"""Measure the operations that have different code paths for prompts and single tokens; print tables in Markdown.

    python tools/measure_prefill.py                # 397B shapes on the default device
    python tools/measure_prefill.py --small        # tiny sizes, to test this script
    python tools/measure_prefill.py --pack <folder> --tokens 4096 --options backend=pread,direct=true
    python tools/measure_prefill.py --pack <folder> --tokens 32768 --memory

A time is the median wall time per call, issued back to back, including launch overhead. Activations are bf16 on GPUs
and f32 on CPUs. On CUDA the script also measures a layer whose 512 experts are all in memory, with 10 random experts
per token. With ``--one-by-one`` it also measures each expert separately through ``mx.quantized_matmul``, whose first
use compiles for more than a minute.

With ``--pack`` it measures a prompt on a pack instead: computing alone (``backend=resident``, so the pack must fit into
memory), one pass of reads alone, and both, in chunks of 1,024 without reading ahead and as by default. ``--options``
select the backend that reads; choose direct reads, or evict the pack from the page cache before. With ``--memory`` it
compares the peak memory of one prompt with ``task=estimate``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import cases, dialect
from flashmoe_mlx.custom_kernels.add_rows import gpu as add_rows
from flashmoe_mlx.custom_kernels.dense_experts import gpu as dense_experts
from flashmoe_mlx.custom_kernels.expert_mlp import mlx as expert_mlp
from flashmoe_mlx.custom_kernels.gated_delta_net import chunked, gpu, mlx, reference
from flashmoe_mlx.custom_kernels.gather_rows import gpu as gather_rows
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts import gpu as routed_experts
from flashmoe_mlx.custom_kernels.routed_experts.grouped import RowKernels, grouped_experts
from flashmoe_mlx.custom_kernels.routed_experts.samples import format_of
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.generation.metrics import process_peak_bytes
from flashmoe_mlx.layers.sequences import BLOCK
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.research.estimate.sizes import memory_need

_SLOTS = 16
_ROW_KERNELS = RowKernels(gather_rows.gather_rows, add_rows.add_rows)


def milliseconds(function: Callable[[], object], calls: int, repeats: int = 5) -> float:
    """Measure the median milliseconds of one call."""
    mx.eval(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval([function() for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def recurrence(geometry: cases.Geometry, lengths: list[int]) -> Iterator[str]:
    """Yield the lines of a table of GatedDeltaNet, from the projections to the gated norm."""
    device = dialect()
    rule = chunked.gated_delta if device else chunked.gated_delta_on_host
    dispatch = "one dispatch, ms | " if device else ""
    yield f"| tokens | MLX's recurrence, ms | chunks, ms | {dispatch}without recurrence, ms |"
    yield f"|---|---|---|---|{'---|' if device else ''}"
    for tokens in lengths:
        made = cases.delta_inputs(geometry, mx.bfloat16 if device else mx.float32, tokens=tokens)
        calls = 4 if device else 1

        def without_recurrence(*arrays: mx.array) -> tuple[mx.array, mx.array]:
            return arrays[2], arrays[5]

        routes: list[Callable[[], object]] = [
            lambda made=made: mlx.gated_delta_net(made),
            lambda made=made: reference.gated_delta_net(made, rule),
        ]
        routes += [lambda made=made: gpu.gated_delta_net(made)] if device else []
        routes += [lambda made=made: reference.gated_delta_net(made, without_recurrence)]
        slow_repeats = 2 if tokens > 100 else 5
        times = [
            milliseconds(route, calls if number else 1, 5 if number else slow_repeats)
            for number, route in enumerate(routes)
        ]
        yield f"| {tokens} | {' | '.join(f'{value:.2f}' for value in times)} |"


def experts(geometry: cases.Geometry, available: int, k: int, lengths: list[int], one_by_one: bool) -> Iterator[str]:
    """Yield the lines of a table of routed experts, in one slab and in groups of 16.

    Args:
        geometry: sizes of the layer.
        available: experts of the layer.
        k: experts per token.
        lengths: numbers of tokens.
        one_by_one: whether to measure each expert separately as well.
    """
    form, _ = format_of(geometry, mx.bfloat16, 4, 64)
    record = RandomInputs(mx.bfloat16, 0).slab(form, 1)
    slab = mx.contiguous(mx.broadcast_to(record, (available, record.shape[1])))
    random = np.random.default_rng(0)
    titles = ["a token at a time", "dense", *(["one by one"] if one_by_one else [])]
    yield f"| tokens | distinct | {' | '.join(f'{title}, ms | in groups of 16' for title in titles)} | difference |"
    yield f"|---|---|{'---|---|' * len(titles)}---|"
    for tokens in lengths:
        rows = np.sort(np.argsort(random.random((tokens, available)), axis=1)[:, :k], axis=1).astype(np.int32)
        x = mx.random.normal((tokens, geometry.hidden)).astype(mx.bfloat16)
        routing_weights = mx.softmax(mx.random.normal((tokens, k)), axis=-1)
        mx.eval(slab, x, routing_weights)
        distinct = np.unique(rows)

        def in_place(chosen: np.ndarray, x: mx.array = x, routing_weights: mx.array = routing_weights) -> mx.array:
            return routed_experts.routed_experts(x, slab, mx.array(chosen), routing_weights, form)

        def dense(chosen: np.ndarray, x: mx.array = x, routing_weights: mx.array = routing_weights) -> mx.array:
            return grouped_experts(x, slab, chosen, routing_weights, form, dense_experts.dense_experts, _ROW_KERNELS)

        def singly(chosen: np.ndarray, x: mx.array = x, routing_weights: mx.array = routing_weights) -> mx.array:
            y = mx.zeros(x.shape)
            for row in np.unique(chosen[chosen >= 0]):
                places, ranks = (mx.array(found) for found in np.nonzero(chosen == row))
                out = expert_mlp.expert_mlp(x[places], form.expert(slab[row : row + 1].reshape(-1)))
                y = y.at[places].add(routing_weights[places, ranks][:, None] * out)
            return y

        def by_groups(
            route: Callable[[np.ndarray], mx.array], rows: np.ndarray = rows, distinct: np.ndarray = distinct
        ) -> mx.array:
            y = mx.zeros((len(rows), geometry.hidden))
            for start in range(0, len(distinct), _SLOTS):
                y = y + route(np.where(np.isin(rows, distinct[start : start + _SLOTS]), rows, -1).astype(np.int32))
                mx.eval(y)
            return y

        cells = []
        for route in (in_place, dense, *((singly,) if one_by_one else ())):
            cells += [
                f"{milliseconds(lambda route=route, rows=rows: route(rows), 2, 3):.2f}",
                f"{milliseconds(lambda route=route, by_groups=by_groups: by_groups(route), 1, 3):.2f}",
            ]
        outputs = [np.array(route(rows).astype(mx.float32)) for route in (in_place, dense)]
        difference = np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1])
        yield f"| {tokens} | {len(distinct)} | {' | '.join(cells)} | {difference:.1e} |"


def prompt(engine: Engine, tokens: list[int], prefill_chunk: int | None = None) -> tuple[float, int]:
    """Process a prompt; return the seconds and the bytes read."""
    text = bytes(tokens).decode("latin1")
    generation = engine.generate(text, raw=True, max_tokens=1, prefill_chunk=prefill_chunk)
    list(generation)
    stage = generation.metrics.prefill
    return stage.seconds, stage.store.bytes_read


def one_pass_of_reads(engine: Engine) -> tuple[float, int]:
    """Fetch all experts in the groups of a prompt; return the seconds and the bytes read."""
    store, start, before = engine.store, time.perf_counter(), engine.store.stats().bytes_read
    experts = range(store.source.num_experts)
    for layer in range(store.source.num_layers):
        for first in range(0, len(experts), _SLOTS):
            store.fetch(layer, experts[first : first + _SLOTS])
            store.prefetch(layer, experts[first + _SLOTS : first + 2 * _SLOTS])
    return time.perf_counter() - start, store.stats().bytes_read - before


def reading_and_computing(pack: str, count: int, options: dict[str, Any], rounds: int) -> Iterator[str]:
    """Yield the lines of a table of a prompt of ``count`` tokens on ``pack``."""
    random = np.random.default_rng(0)
    tokens = random.integers(32, 127, count).tolist()
    times: dict[str, list[float]] = {}
    read: dict[str, int] = {}
    with load(pack, "resident", prompt_cache_gib=0) as resident, load(pack, prompt_cache_gib=0, **options) as reading:
        hint = reading.store.prefetch

        def before() -> tuple[float, int]:
            reading.store.prefetch = lambda *_: None  # type: ignore[method-assign]
            try:
                return prompt(reading, tokens, 1024)
            finally:
                reading.store.prefetch = hint  # type: ignore[method-assign]

        ways: dict[str, Callable[[], tuple[float, int]]] = {
            "computing alone": lambda: prompt(resident, tokens),
            "one pass of reads alone": lambda: one_pass_of_reads(reading),
            "chunks of 1,024, fetches that block": before,
            "as by default": lambda: prompt(reading, tokens),
        }
        for number in range(rounds):
            for way, measure in list(ways.items())[:: -1 if number % 2 else 1]:
                seconds, read[way] = measure()
                times.setdefault(way, []).append(seconds)
                phases = {
                    name: round(spent, 2)
                    for name, spent in (
                        resident if way == "computing alone" else reading
                    ).metrics.prefill.phases.items()
                }
                print(f"{way}: {seconds:.2f} s", phases if "reads" not in way else "", flush=True)
    alone = max(statistics.median(times[way]) for way in list(ways)[:2])
    yield "| | s | GB read | of the larger of the first two |"
    yield "|---|---|---|---|"
    for way in ways:
        seconds = statistics.median(times[way])
        yield f"| {way} | {seconds:.2f} | {read[way] / 1e9:.2f} | {seconds / alone:.2f} |"


def peak_memory(pack: str, count: int, options: dict[str, Any]) -> Iterator[str]:
    """Yield the peak memory of a prompt of ``count`` tokens on ``pack`` beside its estimate."""
    config, layout = open_model(Path(pack)).config, open_model(Path(pack)).variant(None).layout
    tokens = np.random.default_rng(0).integers(32, 127, count).tolist()
    with load(pack, prompt_cache_gib=0, **options) as engine:
        engine.logits(tokens[:BLOCK])
        opened = process_peak_bytes()
        start = time.perf_counter()
        prompt(engine, tokens)
        seconds, size = time.perf_counter() - start, engine.model.norm.dtype.size
        chunk = engine.metrics.prefill_chunk
    need = memory_need(config, 4, round(layout.code_bits), count, size, 2, slot_bytes=layout.record_bytes)
    found = process_peak_bytes()
    yield "| tokens | chunk | GB at 1,024 tokens | peak, GB | estimate, GB | ratio | s |"
    yield "|---|---|---|---|---|---|---|"
    yield (
        f"| {count} | {chunk} | {opened / 1e9:.2f} | {found / 1e9:.2f} | {need.total / 1e9:.2f} | "
        f"{found / need.total:.2f} | {seconds:.0f} |"
    )
    yield json.dumps(vars(need))


def options_of(text: str) -> dict[str, Any]:
    """Parse options of a backend, such as ``backend=pread,direct=true``."""
    found = {}
    for item in filter(None, text.split(",")):
        key, value = item.split("=")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--one-by-one", action="store_true", help="also measure each expert separately")
    parser.add_argument("--pack", help="measure a prompt on this pack")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--options", default="backend=pread,direct=true", help="the backend that reads")
    parser.add_argument("--rounds", type=int, default=1, help="rounds in turns")
    parser.add_argument("--memory", action="store_true", help="measure peak memory in place of time")
    arguments = parser.parse_args()
    if arguments.pack is not None:
        options = options_of(arguments.options)
        lines = (
            peak_memory(arguments.pack, arguments.tokens, options)
            if arguments.memory
            else reading_and_computing(arguments.pack, arguments.tokens, options, arguments.rounds)
        )
        for line in lines:
            print(line, flush=True)
        return
    small = arguments.small
    geometry = cases.GEOMETRIES["small" if small else "397B"]
    print(mx.device_info(mx.default_device()).get("device_name"), "MLX", mx.__version__, flush=True)
    for line in recurrence(geometry, [1, 40] if small else [1, 2, 16, 64, 256, 1024 if dialect() else 512]):
        print(line, flush=True)
    if dialect() == "cuda":
        print()
        lengths = [40] if small else [16, 32, 64, 128, 256, 1024]
        for line in experts(geometry, 32 if small else 512, 10, lengths, arguments.one_by_one):
            print(line, flush=True)


if __name__ == "__main__":
    main()
