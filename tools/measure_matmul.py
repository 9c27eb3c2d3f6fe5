"""Measure quantized products with many vectors on this CPU; compare them with NumPy's product of floats.

    python tools/measure_matmul.py
    python tools/measure_matmul.py --instructions avx2 --tokens 256

The matrix has 4096 x 4096 codes in groups of 64 with bf16 scales. For each number of vectors, all programs alternate,
A B C ... C B A. The figures are 10^9 multiplications and additions per second. NumPy multiplies as many vectors of f32
by a dense matrix. "Error" is ||result - exact|| / ||exact||, with the exact product in f64.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.quantized_matvec.cpu import products
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight

_SIZE, _GROUP = 4096, 64
_ENOUGH = 1024
"""Vectors of one measurement, in one or more calls."""


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16,64,256,1024", help="numbers of vectors")
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds of A B ... B A")
    parser.add_argument("--instructions", default="auto", help="an instruction set of this machine")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    extension = native.extension()
    if extension is None:
        sys.exit(native.MISSING)
    extension.use_instruction_set(arguments.instructions)
    types = [name for name in native.ACTIVATIONS if native.has_activations(name)]
    inputs = RandomInputs(mx.float32, 0, mx.bfloat16)
    weights = {bits: inputs.quantized(_SIZE, _SIZE, bits, _GROUP) for bits in native.BITS}
    print(f"{native.description()}; medians of {2 * arguments.rounds} rounds\n")
    print(f"| vectors | bits | {' | '.join(types)} | sgemm |" + "".join(f" error, {name} |" for name in types))
    print("|---" * (3 + 2 * len(types)) + "|")
    for tokens in map(int, arguments.tokens.split(",")):
        x = inputs.normal(tokens, _SIZE)
        for bits, weight in weights.items():
            print(_row(x, bits, weight, types, arguments.rounds), flush=True)


def _row(x: mx.array, bits: int, weight: QuantizedWeight, types: list[str], rounds: int) -> str:
    vectors, dense = np.array(x), np.array(weight.dense())
    exact = vectors.astype(np.float64) @ dense.astype(np.float64).T
    sides: dict[str, Callable[[], object]] = {
        name: lambda name=name: products(x, [weight], None, name) for name in types
    }
    sides["sgemm"] = lambda: vectors @ dense.T
    calls = max(1, _ENOUGH // len(x))
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name in (*sides, *reversed(sides)):
            start = time.perf_counter()
            for _ in range(calls):
                sides[name]()
            speeds[name].append(2 * calls * len(x) * _SIZE**2 / (time.perf_counter() - start) / 1e9)
    errors = [np.linalg.norm(products(x, [weight], None, name)[0] - exact) / np.linalg.norm(exact) for name in types]
    cells = [str(len(x)), str(bits), *(f"{median(speeds[name]):.0f}" for name in sides), *(f"{e:.1e}" for e in errors)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
