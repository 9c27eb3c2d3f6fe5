"""Measure a decode step of one layer of each kind with and without custom kernels; print a table in Markdown.

    python tools/measure_layers.py            # 397B geometry, K=4 and K=10, experts resident
    python tools/measure_layers.py --small    # a check of this script on any machine

Both models use the same pack, and their steps alternate. A time is the wall time of one layer from its input to its
evaluated output, including router, store and launches. The context is short and consists of single steps, since the
compilation of products with many rows takes more than a minute.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

import flashmoe_mlx
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.research.estimate.probe_models import SIZES

_BIG = replace(SIZES["large"], num_experts=16, experts_per_token=4, max_context=2048)
_SMALL = replace(
    _BIG,
    hidden_size=128,
    expert_size=128,
    shared_expert_size=128,
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    linear_key_heads=1,
    linear_value_heads=4,
    linear_key_dim=32,
    linear_value_dim=32,
)
_CONTEXT = 16
_STEPS = 60


def main() -> None:
    """Make a model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    sizes = _SMALL if arguments.small else _BIG
    print("| layer | K | custom kernels, ms | MLX's, ms | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pack = synthetic_pack("layers", sizes, Path(folder)).folder
        for k in (4, 10):
            with Models(pack, k) as models:
                for line in models.measured():
                    print(line, flush=True)


class Models:
    """One model loaded twice, with custom kernels and with MLX's, ready for a step."""

    def __init__(self, pack: Path, k: int) -> None:
        self.k = k
        self.engines = {
            kernels: flashmoe_mlx.load(pack, "resident", experts_k=k, kernels=kernels, prompt_cache_gib=0)
            for kernels in ("auto", "mlx")
        }
        self.caches = {kernels: engine.new_cache() for kernels, engine in self.engines.items()}
        for kernels, engine in self.engines.items():
            for token in range(_CONTEXT):
                engine.forward([token], self.caches[kernels])

    def __enter__(self) -> "Models":
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self.engines.values():
            engine.close()

    def measured(self) -> Iterator[str]:
        """Yield the rows of the table, then the names of the kernels that ran."""
        engines, caches = self.engines, self.caches
        x = mx.random.normal((1, engines["auto"].model.norm.size)).astype(engines["auto"].model.norm.dtype)
        mx.eval(x)
        for number, title in ((0, "GatedDeltaNet"), (3, "full attention")):
            times: dict[str, list[float]] = {kernels: [] for kernels in engines}
            for step in range(_STEPS):
                order = list(engines) if step % 2 else list(engines)[::-1]
                for kernels in order:
                    layer, cache = engines[kernels].model.layers[number], caches[kernels].layers[number]
                    start = time.perf_counter()
                    mx.eval(layer(x, cache, ForwardContext(PhaseClock())))
                    times[kernels].append(1e3 * (time.perf_counter() - start))
            ours, mlx = (statistics.median(times[kernels][10:]) for kernels in ("auto", "mlx"))
            yield f"| {title} | {self.k} | {ours:.2f} | {mlx:.2f} | {mlx / ours:.2f} |"
        yield f"\n{engines['auto'].setup['kernels']}\n"


if __name__ == "__main__":
    main()
