"""Measure errors and speeds of the custom kernels on this machine's GPU; print tables in Markdown.

    MLX_ENABLE_TF32=0 MLX_MAX_OPS_PER_BUFFER=100000 MLX_MAX_MB_PER_BUFFER=1000000 python tools/measure_kernels.py

Speeds come from a chain of operations, each on the result of the previous one, over sets of weights that exceed the
GPU's cache several times. With the two settings above MLX makes one CUDA graph of a chain. Two kernels inside the graph
read the GPU's clock before and after the chain, so that neither Python nor the launches count. A norm between the
operations keeps values in range; it is measured alone in the same way and subtracted. The two routes alternate.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels import cases
from flashmoe_mlx.custom_kernels.attention import gpu as attention_gpu
from flashmoe_mlx.custom_kernels.attention import mlx as attention_mlx
from flashmoe_mlx.custom_kernels.gated_delta_net import gpu as delta_gpu
from flashmoe_mlx.custom_kernels.gated_delta_net import mlx as delta_mlx
from flashmoe_mlx.custom_kernels.quantized_matvec import gpu as matvec_gpu
from flashmoe_mlx.custom_kernels.quantized_matvec import mlx as matvec_mlx
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts import gpu as experts_gpu
from flashmoe_mlx.custom_kernels.routed_experts.samples import format_of

_STAMP = """
    unsigned long long now;
    for (int i = threadIdx.x; i < x_shape[0] * x_shape[1]; i += blockDim.x) {
        y[i] = x[i];
    }
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (threadIdx.x == 0) {
        at[0] = now;
    }
"""
_CACHE_BYTES = 300e6
_LENGTH = 48


def stamp(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return ``x`` [T, width] and the GPU's clock in nanoseconds."""
    kernel = mx.fast.cuda_kernel("stamp", ["x"], ["y", "at"], _STAMP)
    y, at = kernel(
        inputs=[x],
        output_shapes=[x.shape, (1,)],
        output_dtypes=[x.dtype, mx.uint64],
        grid=(1024, 1, 1),
        threadgroup=(1024, 1, 1),
    )
    return y, at


def microseconds(step: Callable[[mx.array, int], mx.array], first: mx.array, length: int = _LENGTH) -> float:
    """Measure the GPU time of one ``step``: the median over passes of a chain of ``length``."""
    times = []
    for _ in range(9):
        x, begin = stamp(first)
        for number in range(length):
            x = step(x, number)
        _, end = stamp(x)
        mx.eval(x, begin, end)
        times.append((end.item() - begin.item()) / 1e3 / length)
    return statistics.median(times[2:])


def compare(
    routes: Sequence[tuple[str, Callable[[mx.array, int], mx.array]]], glue: Callable[[mx.array], mx.array], x: mx.array
) -> dict[str, float]:
    """Measure the microseconds of each route without the glue: the best of two alternating passes."""
    found: dict[str, list[float]] = {name: [] for name, _ in routes}
    alone = microseconds(lambda value, _: glue(value), x)
    for _ in range(2):
        for name, step in routes:
            found[name].append(microseconds(lambda value, number, step=step: glue(step(value, number)), x) - alone)
    return {name: min(values) for name, values in found.items()}


def copy_bandwidth() -> float:
    """Measure the rate of copying 1 GiB in bytes per second, counting reads and writes."""
    sets = [mx.random.normal((1024, 2**18)) for _ in range(2)]
    mx.eval(sets)

    def step(x: mx.array, number: int) -> mx.array:
        return (sets[number % 2] + x[0, 0])[:1, :8]  # waits for the previous copy

    return 2 * 2**30 / microseconds(step, mx.zeros((1, 8)), 8) * 1e6


_EXPERTS = {  # bits, group, tokens, K, shared expert
    "397B": ((4, 64, 1, 4, True), (4, 64, 1, 10, False), (4, 64, 8, 3, True), (2, 64, 1, 4, True), (3, 64, 1, 4, True),
             (8, 64, 1, 4, True), (4, 32, 1, 4, True), (4, 128, 1, 4, True)),
    "122B": ((4, 64, 1, 8, True), (2, 64, 1, 4, True)),
    "35B": ((4, 64, 1, 8, True), (2, 64, 1, 4, True)),
    "small": tuple((bits, 32, *rest) for bits in (2, 3, 4, 8) for rest in ((1, 4, True), (5, 3, False))),
}  # fmt: skip


def errors(geometries: Sequence[str]) -> Iterator[str]:
    """Yield a table of the error of every kernel against its reference in f64."""
    yield "| kernel | case | geometry | f32 | bf16 |\n|---|---|---|---|---|"
    for name in geometries:
        geometry = cases.GEOMETRIES[name]
        makers: list[Callable[[mx.Dtype], cases.Case]] = [
            partial(cases.routed_experts, geometry, bits=bits, group_size=group_size, tokens=tokens, k=k, shared=shared)
            for bits, group_size, tokens, k, shared in _EXPERTS[name]
        ]
        makers += [partial(cases.gated_delta_net, geometry, tokens=tokens) for tokens in (1, 2, 9)]
        makers += [
            partial(cases.attention, geometry, context=context, tokens=tokens)
            for context, tokens in ((1, 1), (37, 1), (1000, 1), (4097, 1), (70, 9))
        ]
        makers += [
            partial(_matvec_case, 4 * geometry.hidden, geometry.hidden, bits=bits, tokens=tokens)
            for bits, tokens in ((2, 1), (3, 1), (4, 1), (8, 1), (4, 5))
        ]
        for make in makers:
            single, half = make(mx.float32), make(mx.bfloat16)
            yield f"| {single.operation} | {single.title} | {name} | {single.error():.1e} | {half.error():.1e} |"


def _matvec_case(rows: int, columns: int, dtype: mx.Dtype, *, bits: int, tokens: int) -> cases.Case:
    return cases.quantized_matvec(rows, columns, dtype, bits=bits, group_size=32, tokens=tokens)


_OPERATIONS = ("routed_experts", "gated_delta_net", "attention", "quantized_matvec")


def speeds(bandwidth: float, operations: Sequence[str]) -> Iterator[str]:
    """Yield a table of the speed of the kernels of ``operations`` and of MLX's, for 397B shapes in bf16."""
    yield "| operation | ours, us | of the copy bandwidth | MLX, us | ratio |\n|---|---|---|---|---|"
    big, dtype = cases.GEOMETRIES["397B"], mx.bfloat16
    weight = mx.ones((big.hidden,), dtype)
    mx.random.seed(0)
    x = mx.random.normal((1, big.hidden)).astype(dtype)
    mx.eval(x, weight)

    def norm(value: mx.array) -> mx.array:
        return mx.fast.rms_norm(value, weight, 1e-6)

    def row(title: str, nbytes: int, times: dict[str, float]) -> str:
        share = nbytes / times["ours"] * 1e6 / bandwidth
        return (
            f"| {title} | {times['ours']:.1f} | {share:.0%} | {times['MLX']:.1f} | {times['MLX'] / times['ours']:.1f} |"
        )

    for bits, k in ((4, 4), (4, 10), (2, 4), (3, 4), (8, 4)) if "routed_experts" in operations else ():
        form, sets, nbytes, gathered = _expert_sets(bits, k)
        routes = [
            ("ours", lambda value, n, sets=sets, form=form: experts_gpu.routed_experts(
                value, sets[n % len(sets)][0], sets[n % len(sets)][1], sets[n % len(sets)][2], form)),
            ("MLX", lambda value, n, gathered=gathered, bits=bits: _gathered(value, gathered[n % len(gathered)], bits)),
        ]  # fmt: skip
        yield row(f"routed experts, {bits} bit, K={k}, beside mx.gather_qmm", nbytes, compare(routes, norm, x))
        del sets, gathered, routes
        mx.clear_cache()

    if "gated_delta_net" in operations:
        yield row(*_delta(big, dtype))
    for context in (1024, 4096, 32768) if "attention" in operations else ():
        yield row(*_attention(big, dtype, context))
    shapes = ((4096, 4096), (12288, 4096), (1024, 4096), (4096, 1024), (248320, 4096))
    for rows, columns in shapes if "quantized_matvec" in operations else ():
        yield row(*_matvec(rows, columns, dtype))


def _expert_sets(bits: int, k: int) -> tuple[object, list[tuple[mx.array, mx.array, mx.array]], int, list[object]]:
    form, payload_bytes = format_of(cases.GEOMETRIES["397B"], mx.bfloat16, bits, 64)
    count = max(2, int(_CACHE_BYTES // (k * form.record_bytes)) + 1)
    sets, gathered = [], []
    for number in range(count):
        slab = RandomInputs(mx.bfloat16, number).slab(form, k)
        rows, weights = mx.array([list(range(k))], mx.int32), mx.full((1, k), 1 / k)
        experts = [form.expert(slab[i : i + 1].reshape(-1)) for i in range(k)]
        stacked = [
            [mx.stack([getattr(getattr(expert, name), part) for expert in experts]) for part in _PARTS]
            for name in ("gate", "up", "down")
        ]
        mx.eval(slab, rows, weights, stacked)
        sets.append((slab, rows, weights))
        gathered.append((stacked, rows.astype(mx.uint32), weights.astype(mx.bfloat16)))
    return form, sets, k * payload_bytes, gathered


_PARTS = ("weight", "scales", "biases")


def _gathered(x: mx.array, experts: tuple[list[list[mx.array]], mx.array, mx.array], bits: int) -> mx.array:
    """Compute the routed experts as mlx-lm does."""
    (gate, up, down), rows, weights = experts

    def product(value: mx.array, parts: list[mx.array]) -> mx.array:
        return mx.gather_qmm(value, *parts, rhs_indices=rows, transpose=True, group_size=64, bits=bits)

    wide = x[:, None, None, :]
    gated = product(wide, gate)
    hidden = gated * mx.sigmoid(gated) * product(wide, up)
    return (product(hidden, down).squeeze(-2) * weights[..., None]).sum(-2)


def _delta(big: cases.Geometry, dtype: mx.Dtype) -> tuple[str, int, dict[str, float]]:
    sets = [cases.delta_inputs(big, dtype, seed=seed) for seed in range(40)]
    width = sets[0].qkv.shape[1]
    unit = mx.ones((width,), dtype)

    def step(implementation: Callable[..., tuple[mx.array, mx.array, mx.array]]) -> Callable[..., mx.array]:
        def run(qkv: mx.array, number: int) -> mx.array:
            return implementation(replace(sets[number % len(sets)], qkv=qkv))[0]

        return run

    def glue(value: mx.array) -> mx.array:
        return mx.fast.rms_norm(mx.concatenate([value, value], axis=-1)[:, :width], unit, 1e-6)

    routes = [("ours", step(delta_gpu.gated_delta_net)), ("MLX", step(delta_mlx.gated_delta_net))]
    title = "GatedDeltaNet step, beside gated_delta_update and the operations around it"
    return title, 2 * sets[0].recurrent_state.nbytes, compare(routes, glue, sets[0].qkv)


def _attention(big: cases.Geometry, dtype: mx.Dtype, context: int) -> tuple[str, int, dict[str, float]]:
    count = max(2, int(_CACHE_BYTES // (context * 2048)) + 1)
    sets = [cases.attention_inputs(big, dtype, context=context, seed=seed) for seed in range(min(count, 64))]

    def step(implementation: Callable[..., tuple[mx.array, mx.array, mx.array]]) -> Callable[..., mx.array]:
        def run(q_and_gate: mx.array, number: int) -> mx.array:
            return implementation(replace(sets[number % len(sets)], q_and_gate=q_and_gate))[0]

        return run

    def glue(value: mx.array) -> mx.array:
        y = value[:, : big.heads * big.head_dim]
        return mx.concatenate([y, y], axis=-1)

    routes = [("ours", step(attention_gpu.gated_attention)), ("MLX", step(attention_mlx.gated_attention))]
    times = compare(routes, glue, sets[0].q_and_gate)
    return f"attention decode, context {context}", 2 * context * big.kv_heads * big.head_dim * dtype.size, times


def _matvec(rows: int, columns: int, dtype: mx.Dtype) -> tuple[str, int, dict[str, float]]:
    count = max(2, int(_CACHE_BYTES // (rows * columns * 0.56)) + 1)
    weights = [RandomInputs(dtype, seed).quantized(rows, columns, 4, 64) for seed in range(count)]
    mx.eval([[w.weight, w.scales, w.biases] for w in weights])
    unit = mx.ones((columns,), dtype)

    def glue(value: mx.array) -> mx.array:
        repeated = mx.concatenate([value] * -(-columns // value.shape[1]), axis=-1)[:, :columns]
        return mx.fast.rms_norm(repeated, unit, 1e-6)

    def step(implementation: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def run(value: mx.array, number: int) -> mx.array:
            weight = weights[number % len(weights)]
            return implementation(value, weight.weight, weight.scales, weight.biases, 4, 64)

        return run

    routes = [("ours", step(matvec_gpu.quantized_matvec)), ("MLX", step(matvec_mlx.quantized_matvec))]
    x = mx.random.normal((1, columns)).astype(dtype)
    nbytes = sum(part.nbytes for part in (weights[0].weight, weights[0].scales, weights[0].biases) if part is not None)
    return f"quantized matvec {rows}x{columns}, 4 bit", nbytes, compare(routes, glue, x)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometries", default=",".join(cases.GEOMETRIES), help="whose errors to print; may be empty")
    parser.add_argument("--operations", default=",".join(_OPERATIONS), help="whose speeds to print")
    arguments = parser.parse_args()
    mx.set_default_device(mx.gpu)
    print(mx.device_info().get("device_name"), "MLX", mx.__version__)
    start = time.perf_counter()
    for line in errors([name for name in arguments.geometries.split(",") if name]):
        print(line, flush=True)
    bandwidth = copy_bandwidth()
    print(f"\ncopy: {bandwidth / 1e12:.2f} TB/s\n")
    for line in speeds(bandwidth, arguments.operations.split(",")):
        print(line, flush=True)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
