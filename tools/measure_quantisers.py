"""Compare least-squares with min-max quantization: errors of weights, expert outputs and logits of the demo model.

python tools/measure_quantisers.py <demo pack> <empty folder>
"""

import shutil
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

import flashmoe_mlx
from flashmoe_mlx.formats.arrays import MLX_DTYPES
from flashmoe_mlx.formats.components import dense_projection, record_views
from flashmoe_mlx.formats.manifest import PackedExperts
from flashmoe_mlx.formats.record import PROJECTIONS
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.quantize import QUANTIZERS
from flashmoe_mlx.pack.writer import add_variants

GROUP_SIZE = 64
HIDDEN, WIDTH = 4096, 1024  # an expert of the 397B


def main(demo: Path, scratch: Path) -> None:
    """Print all tables."""
    random = np.random.default_rng(0)
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    experts = {
        "normal, 397B size": _make_expert({name: random.standard_normal(shape) for name, shape in shapes.items()}),
        "Student t (5), 397B size": _make_expert({name: random.standard_t(5, shape) for name, shape in shapes.items()}),
        "demo model, from 4 bits": _demo_expert(open_pack(demo).experts["q4"]),
    }
    print(f"{'expert':26} bits  weights: min-max  least squares  output: min-max  least squares")
    for name, dense in experts.items():
        for bits in (2, 3, 4):
            if name.startswith("demo") and bits == 4:
                continue
            (w0, y0), (w1, y1) = (_errors(dense, quantizer, bits) for quantizer in ("minmax", "least_squares"))
            print(f"{name:26} {bits:4}  {w0:16.4f}  {w1:13.4f}  {y0:15.4f}  {y1:13.4f}")
    for quantizer, quantize in QUANTIZERS.items():
        start = time.perf_counter()
        for weight in experts["normal, 397B size"].values():
            mx.eval(quantize(weight, 2, GROUP_SIZE))
        print(f"{quantizer}: {time.perf_counter() - start:.2f} s for a record of the 397B, {mx.default_device()}")
    _logits(demo, scratch)


def _make_expert(parts: dict[str, npt.NDArray[np.float64]]) -> dict[str, mx.array]:
    """Convert weights to bf16, scaled to a standard deviation of 1 / sqrt(inputs)."""
    return {
        name: mx.array((part / part.std() / part.shape[1] ** 0.5).astype(np.float32)).astype(mx.bfloat16)
        for name, part in parts.items()
    }


def _demo_expert(source: PackedExperts) -> dict[str, mx.array]:
    """Return the dequantized weights of expert 0 in layer 0."""
    extent = source.extents(0, 0)[0]
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        record = mx.array(np.frombuffer(file.read(extent.nbytes), np.uint8)).view(MLX_DTYPES["U8"])
    parts = record_views(record, source.layout[0])
    return {projection: dense_projection(parts, projection, source.layout[0]) for projection in PROJECTIONS}


def _errors(dense: dict[str, mx.array], quantizer: str, bits: int) -> tuple[float, float]:
    """Return the relative errors of the weights, and of the expert's output for normal inputs, computed in f32."""
    exact = {name: weight.astype(mx.float32) for name, weight in dense.items()}
    quantized = {}
    for name, weight in dense.items():
        codes, scales, biases = QUANTIZERS[quantizer](weight, bits, GROUP_SIZE)
        scales_f32, biases_f32 = scales.astype(mx.float32), biases.astype(mx.float32)
        quantized[name] = mx.dequantize(codes, scales_f32, biases_f32, group_size=GROUP_SIZE, bits=bits)
    x = mx.array(np.random.default_rng(1).standard_normal((32, exact["gate"].shape[1])).astype(np.float32))
    weights = _relative([exact[name] for name in exact], [quantized[name] for name in exact])
    return weights, _relative([_output(x, exact)], [_output(x, quantized)])


def _output(x: mx.array, weights: dict[str, mx.array]) -> mx.array:
    """Return the output of an expert with dense weights."""
    gate = x @ weights["gate"].T
    return (gate * mx.sigmoid(gate) * (x @ weights["up"].T)) @ weights["down"].T


def _relative(exact: list[mx.array], quantized: list[mx.array]) -> float:
    """Return the Frobenius norm of the difference, relative to ``exact``, over all arrays."""
    pairs = zip(exact, quantized, strict=True)
    squares = [(mx.square(a - b).sum().item(), mx.square(a).sum().item()) for a, b in pairs]
    return float((sum(error for error, _ in squares) / sum(size for _, size in squares)) ** 0.5)


def _logits(demo: Path, scratch: Path) -> None:
    """Print the KL divergence from the 4-bit experts, and the top-1 agreement with them, over 256 random tokens."""
    folder = scratch / "demo"
    shutil.copytree(demo, folder)
    pack = add_variants(open_pack(folder), [2, 3])
    add_variants(pack, [2], quantiser="minmax")
    add_variants(pack, [3], quantiser="least_squares")
    tokens = np.random.default_rng(2).integers(0, 256, 256).tolist()

    def log_probabilities(variant: str) -> npt.NDArray[np.float64]:
        with flashmoe_mlx.load(folder, variant=variant, prompt_cache_gib=0) as engine:
            logits = engine.logits(tokens).astype(np.float64)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)  # type: ignore[no-any-return]

    exact = log_probabilities("q4")
    for variant in ("q3", "q3-least_squares", "q2-minmax", "q2"):
        found = log_probabilities(variant)
        kl = (np.exp(exact) * (exact - found)).sum(-1).mean()
        agreement = (exact.argmax(-1) == found.argmax(-1)).mean()
        print(f"demo model, {variant:17} against q4: KL {kl:.4f} nats, same most probable token {agreement:.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
