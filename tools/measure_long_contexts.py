"""Measure decode steps after 262,144 tokens on the geometry of attention of a 397B model; print a table in Markdown.

    python tools/measure_long_contexts.py
    python tools/measure_long_contexts.py --tokens 2000 --folder /tmp/packs   # quick, to test this script

The model has the sizes of the 397B model in 4 layers, one of them with full attention, but 8 experts a layer. To read
so long a prompt would take hours on a small CPU, so keys and values are random numbers in place of those of a prompt:
time and memory of a step do not depend on their values. The difference is the largest of all logits from those with f32
caches, relative to the largest logit.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_mlx import Engine, load
from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.kv_cache import KVCache
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.research.estimate import probe_models
from flashmoe_mlx.research.estimate.sizes import memory_need

SIZES = replace(probe_models.SIZES["large"], num_experts=8, experts_per_token=4, max_context=262144)
_BLOCK = 4096


def filled(engine: Engine, length: int) -> SequenceCache:
    """Return caches as after ``length`` tokens: the recurrences saw ten, and keys and values are random."""
    cache = engine.new_cache()
    engine.forward(list(range(10)), cache)
    random = np.random.default_rng(0)
    for layer, state in zip(engine.model.layers, cache.layers, strict=True):
        if isinstance(layer.mixer, Attention) and isinstance(state, KVCache):
            weights = layer.mixer.weights
            keys, values = layer.mixer.room(state, length - 10, mx.float32)
            for start in range(0, length, _BLOCK):
                shape = (1, weights.kv_heads, min(_BLOCK, length - start), weights.head_dim)
                for rows in (keys, values):
                    drawn = mx.array(random.standard_normal(shape, np.float32))
                    rows[:, :, start : start + shape[2]] = weights.rows.pack(drawn, mx.float32)
                mx.eval(keys, values)
            state.keys, state.values, state.length = keys, values, length
    cache.length = length
    return cache


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keeps the model; a temporary folder otherwise")
    arguments = parser.parse_args()
    length = arguments.tokens - arguments.steps - 1
    with tempfile.TemporaryDirectory() as temporary:
        pack = synthetic_pack("397b-4-layers", SIZES, arguments.folder or Path(temporary))
        print("| kv_bits | keys and values, MB | estimate, MB | step, ms | step after 10 tokens, ms | difference |")
        print("|---|---|---|---|---|---|")
        exact = None
        for kv_bits in (None, 16, 8, 4):
            with load(pack.folder, "resident", kv_bits=kv_bits) as engine:
                short = engine.new_cache()
                engine.forward(list(range(10)), short)
                cache = filled(engine, length)
                times: dict[str, list[float]] = {"long": [], "short": []}
                logits = []
                for step in range(arguments.steps + 1):
                    for name, state in (("long", cache), ("short", short)):
                        start = time.perf_counter()
                        found = engine.forward([100 + step], state)
                        times[name].append(time.perf_counter() - start)
                        logits += [found] if name == "long" else []
                held = sum(layer.nbytes for layer in cache.layers if isinstance(layer, KVCache))
                need = memory_need(engine.model.config, 4, 4, arguments.tokens, 4, 2, kv_bits=kv_bits)
                exact = exact or logits
                scale = max(np.abs(rows).max() for rows in exact)
                difference = max(np.abs(a - b).max() for a, b in zip(exact, logits, strict=True)) / scale
                ms = {name: statistics.median(seconds[1:]) * 1e3 for name, seconds in times.items()}
                print(
                    f"| {kv_bits or 'none (f32)'} | {held / 1e6:.0f} | {need.keys_and_values / 1e6:.0f} "
                    f"| {ms['long']:.1f} | {ms['short']:.1f} | {difference:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
