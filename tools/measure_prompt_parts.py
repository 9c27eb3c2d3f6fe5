"""Measure the operations of a prompt on this CPU one by one, by number of threads.

    python tools/measure_prompt_parts.py --folder /tmp/parts                              # one thread, and all threads
    python tools/measure_prompt_parts.py --folder /tmp/parts --threads 1,4,16 --tokens 256 --activations int8

The model has random weights and the geometry of the 397B (4 layers of 64 experts: 2 GB), with all experts in memory.
Each round passes the prompt with each number of threads, A B C ... C B A, and times every call of the C++ extension.
"Memory for results" is the time to allocate and clear it, and "outside" is the rest: Python and MLX. Each figure is a
median; "times" is the speed relative to the first number of threads. The last row is NumPy's product of as many
vectors with a matrix of 4096 x 4096 in f32, on as many threads.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.estimate.probe_models import SIZES

_EXPERTS_PER_TOKEN = 4
_SGEMM = 4096
_ALL, _MEMORY, _OUTSIDE, _NUMPY = "whole prompt", "memory for results", "outside", "sgemm"
_ADDED = 4
"""Place of the argument of ``products`` that says whether results are added to a residual."""


@dataclass
class Clock:
    """Seconds and floating-point operations of one pass, by operation.

    Attributes:
        sizes: the geometry of the model.
        seconds: time by operation.
        operations: multiplications and additions by operation, of products alone.
    """

    sizes: SyntheticSizes
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    operations: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def watch(self, extension: ModuleType) -> None:
        """Put timers around the functions of the extension."""
        for name in ("products", "experts", "rms_norm", "delta_net", "attention"):
            setattr(extension, name, self._timed(name, getattr(extension, name)))
        native.Output.__init__ = self._timed(_MEMORY, native.Output.__init__)  # type: ignore[method-assign]

    def _timed(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any, **options: Any) -> None:
            start = time.perf_counter()
            function(*arguments, **options)
            passed = time.perf_counter() - start
            key = name
            if name == "products":
                tokens, matrices = arguments[1], arguments[2]
                key = "products: " + ", ".join(f"{matrix[3]}x{matrix[4]}" for matrix in matrices)
                key += " added" if arguments[_ADDED] else ""
                self.operations[key] += sum(2 * tokens * matrix[3] * matrix[4] for matrix in matrices)
            elif name == "experts":
                inner = _EXPERTS_PER_TOKEN * self.sizes.expert_size + self.sizes.shared_expert_size
                self.operations[key] += 6 * arguments[1] * self.sizes.hidden_size * inner
            self.seconds[key] += passed

        return timed


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is written")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt")
    parser.add_argument("--activations", default="auto", help="as the key activations=")
    parser.add_argument("--threads", help="numbers of threads, separated by commas; default: 1 and all")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    extension = native.extension()
    if extension is None:
        sys.exit(native.MISSING)
    cores = native.usable_cores()
    threads = list(map(int, arguments.threads.split(","))) if arguments.threads else [1, cores]
    counts = list(dict.fromkeys(count for count in threads if count <= cores))
    sizes = replace(
        SIZES["large"], num_layers=arguments.layers, num_experts=arguments.experts, experts_per_token=_EXPERTS_PER_TOKEN
    )
    pack = synthetic_pack("parts", sizes, arguments.folder).folder
    prompt = [random.Random(number).randrange(256) for number in range(arguments.tokens)]  # noqa: S311
    vectors, matrix = (np.random.default_rng(0).standard_normal((n, _SGEMM), np.float32) for n in (len(prompt), _SGEMM))
    clock = Clock(sizes)
    found: dict[int, defaultdict[str, list[float]]] = {count: defaultdict(list) for count in counts}
    with flashmoe_mlx.load(pack, "resident", activations=arguments.activations, prompt_cache_gib=0) as engine:
        clock.watch(extension)
        engine.forward(prompt, engine.new_cache())
        for _ in range(arguments.rounds):
            for count in (*counts, *reversed(counts)):
                extension.use_threads(count)
                clock.seconds.clear()
                clock.operations.clear()
                start = time.perf_counter()
                engine.forward(prompt, engine.new_cache())
                whole = time.perf_counter() - start
                with threadpool_limits(count, "blas"):
                    start = time.perf_counter()
                    vectors @ matrix.T
                    by_numpy = time.perf_counter() - start
                outside = whole - sum(clock.seconds.values())
                for name, value in {**clock.seconds, _OUTSIDE: outside, _ALL: whole, _NUMPY: by_numpy}.items():
                    found[count][name].append(value)
        operations = dict(clock.operations)
    operations[_ALL] = sum(operations.values())
    operations[_NUMPY] = 2 * len(prompt) * _SGEMM**2
    print(f"{environment()['processor']}, {cores} cores, {' and '.join(extension.instruction_sets_in_use())}")
    print(f"{len(prompt)} tokens, activations={arguments.activations}; medians of {2 * arguments.rounds} rounds\n")
    header = [f"{count} threads, ms | share | GFLOP/s | times" for count in counts]
    print(f"| operation | {' | '.join(header)} |\n|---{'|---' * 4 * len(counts)}|")
    last = found[counts[-1]]
    for name in sorted(last, key=lambda name: (name in (_OUTSIDE, _ALL, _NUMPY), -median(last[name]))):
        cells = [name]
        for count in counts:
            own, whole = median(found[count][name]), median(found[count][_ALL])
            cells += [
                f"{1e3 * own:.1f}",
                f"{own / whole:.1%}" if name != _NUMPY else "",
                f"{operations[name] / own / 1e9:.0f}" if name in operations else "",
                f"{median(found[counts[0]][name]) / own:.1f}",
            ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
