"""Measure products in mxfp4 on this CPU, beside the affine format of 4 bits and MLX's product.

    python tools/measure_mxfp4.py

All calls read their weights from memory; the programs alternate, A B C C B A.
"""

import time
from collections.abc import Callable
from statistics import median

import mlx.core as mx

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.quantized_matvec.cpu import products
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight

_SIZE, _GROUP, _SETS, _ROUNDS = 4096, 32, 12, 3


def main() -> None:
    """Print a table in Markdown: microseconds of a call by instruction set, medians of six rounds."""
    mx.set_default_device(mx.cpu)
    affine, floats = _matrices("affine"), _matrices("mxfp4")
    print("| instructions | tokens | affine, 4 bits | mxfp4 | mxfp4 by MLX |\n|---|---|---|---|---|")
    for name in native.loaded().instruction_sets():
        native.loaded().use_instruction_set(name)
        for tokens in (1, 4):
            x = mx.random.normal((tokens, _SIZE))
            mx.eval(x)

            def ours(weight: QuantizedWeight, x: mx.array = x) -> None:
                products(x, [weight])

            def by_mlx(weight: QuantizedWeight, x: mx.array = x) -> None:
                mx.eval(mx.quantized_matmul(x, weight.weight, weight.scales, None, True, _GROUP, 4, "mxfp4"))

            sides = [(ours, affine), (ours, floats), (by_mlx, floats[:2])]
            times: list[list[float]] = [[] for _ in sides]
            for _ in range(_ROUNDS):
                for side in (0, 1, 2, 2, 1, 0):
                    times[side].append(_seconds(*sides[side]))
            print(f"| {name} | {tokens} | {' | '.join(f'{1e6 * median(own):.0f}' for own in times)} |", flush=True)


def _matrices(mode: str) -> list[QuantizedWeight]:
    """Return matrices that together exceed the cache."""
    made = []
    for _ in range(_SETS):
        weight, scales, *biases = mx.quantize(mx.random.normal((_SIZE, _SIZE)), group_size=_GROUP, bits=4, mode=mode)
        mx.eval(weight, scales, *biases)
        made.append(QuantizedWeight(weight, scales, biases[0] if biases else None, 4, _GROUP, mode=mode))
    return made


def _seconds(run: Callable[[QuantizedWeight], None], matrices: list[QuantizedWeight]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    for matrix in matrices:
        run(matrix)
    return (time.perf_counter() - start) / len(matrices)


if __name__ == "__main__":
    main()
