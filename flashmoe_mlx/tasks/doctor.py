"""``task=doctor``: compare every kernel with its reference on this machine, time it, and time decode steps.

The output is for an issue.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from flashmoe_mlx.console.output import activity, show
from flashmoe_mlx.custom_kernels import cases, dialect, native
from flashmoe_mlx.custom_kernels.cases import GEOMETRIES, TOLERANCE, Case, Results
from flashmoe_mlx.custom_kernels.native.fastest import Choice, settle
from flashmoe_mlx.custom_kernels.precompiled import compile_together
from flashmoe_mlx.custom_kernels.quantized_matvec.instructions import Form, contests
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.research.decode_probe import DecodeFinding, measure_decoding
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.tasks.shared.keys import CommonConfig

DOCTOR_VERSION = 2
_CALLS = 20
_REPEATS = 7
_GPU_TYPES = (mx.float32, mx.bfloat16)


@dataclass
class Config(CommonConfig):
    """Keys of ``task=doctor``, which has no options."""


@dataclass(frozen=True)
class Finding:
    """Result of one kernel: its error, the accepted error, and microseconds per call (None if it could not run)."""

    kernel: str
    case: str
    geometry: str
    dtype: str
    error: float | None
    accepted: float
    microseconds: float | None
    mlx_microseconds: float | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is acceptable."""
        return self.error is not None and self.error <= self.accepted


def run(config: Config, run_dir: Path) -> None:  # noqa: ARG001  # the form of a task
    """Check and time all kernels, print the table, and write ``doctor.json`` to ``run_dir``.

    Raises:
        FlashMoeError: a kernel cannot run or differs from its reference.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # 10 bits of a product do not prove a kernel; MLX reads this once
    gpu = dialect()
    on_cpu = gpu is None and native.extension() is not None
    findings: list[Finding] = []
    with activity() as announce:
        announce("timing instruction sets")
        choices = settle(contests(_standard_forms())) if on_cpu else []
        kernels = f"kernels for CPUs ({native.in_use()})" if on_cpu else gpu
        if gpu == "cuda":
            announce("compiling kernels")
            compile_together(_run_all)
        for geometry, make in _cases(gpu is not None, on_cpu):
            for dtype in _GPU_TYPES if gpu else (mx.float32,):
                case = make(dtype)
                announce(f"{case.operation} {case.title}, {geometry} shape")
                findings.append(_examined(case, geometry, kernels is not None))
        announce("decode steps of the demo model")
        decoding = measure_decoding()
    write_json(run_dir / "doctor.json", _record(gpu, kernels, choices, findings) | {"decoding": asdict(decoding)})
    for line in _report(kernels, choices, findings):
        show(line)
    show("")
    show(_decode_line(decoding))
    failed = [f"{bad.kernel} ({bad.case}, {bad.geometry}, {bad.dtype})" for bad in findings if not bad.passed]
    if failed:
        raise FlashMoeError(
            f"{len(failed)} of {len(findings)} checks failed: {'; '.join(failed)}. Runs use MLX's own operations in "
            "place of these kernels; please report the table above",
            code="kernels_failed",
        )


def _cases(on_gpu: bool, on_cpu: bool) -> Iterator[tuple[str, Callable[[mx.Dtype], Case]]]:
    for name in ("397B", "35B") if on_gpu else ("35B",):
        geometry = GEOMETRIES[name]
        experts = partial(cases.routed_experts, geometry)
        makers: list[Callable[..., Case]] = [
            partial(experts, k=4),
            partial(experts, k=8, tokens=2),
            *(partial(experts, k=4, bits=bits) for bits in (2, 3, 8)),
            partial(cases.gated_delta_net, geometry),
            partial(cases.gated_delta_net, geometry, tokens=5),
            partial(cases.attention, geometry, context=1000),
            partial(cases.attention, geometry, context=100, tokens=7),
            partial(cases.quantized_matvec, geometry.hidden, geometry.hidden),
            partial(cases.quantized_matvec, geometry.hidden, geometry.hidden, bits=8, tokens=4),
        ]
        for make in makers:
            yield name, partial(make, on_cpu=on_cpu)
        if on_gpu:
            yield name, partial(cases.normed_matvec, geometry.hidden, geometry.hidden)
            yield (
                name,
                partial(cases.quantized_matvec, geometry.hidden, geometry.hidden, with_residual=True),
            )


def _run_all() -> None:
    """Call the kernel of every case for GPUs; errors are left to the examination."""
    for _, make in _cases(on_gpu=True, on_cpu=False):
        for dtype in _GPU_TYPES:
            with suppress(RuntimeError, ValueError):
                make(dtype).custom()


def _examined(case: Case, geometry: str, custom: bool) -> Finding:
    examined = case if custom else _standard(case)
    about = (case.operation, case.title, geometry, str(case.dtype).rpartition(".")[2])
    try:
        error = examined.error()
    except (RuntimeError, ValueError) as failure:
        return Finding(*about, None, TOLERANCE[case.dtype], None, None, _reason(failure))
    ours = _microseconds(case.custom) if custom else None
    return Finding(*about, error, TOLERANCE[case.dtype], ours, _microseconds(case.standard))


def _reason(failure: Exception) -> str:
    """Return the first line of the message, escaped for a cell of the table."""
    first, *_ = str(failure).splitlines() or [type(failure).__name__]
    return first.replace("|", "\\|")


def _standard(case: Case) -> Case:
    return Case(case.operation, case.title, case.dtype, case.nbytes, case.standard, case.standard, case.reference)


def _microseconds(function: Callable[[], Results]) -> float:
    """Return the median wall time of a call in a batch of calls, launches included."""
    mx.eval(function())
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        mx.eval([function() for _ in range(_CALLS)])
        times.append((time.perf_counter() - start) / _CALLS * 1e6)
    return median(times)


def _standard_forms() -> Iterator[Form]:
    size = GEOMETRIES["397B"].hidden
    return (Form(size, size, bits, 64, mx.bfloat16) for bits in native.BITS)


def _record(gpu: str | None, kernels: str | None, choices: list[Choice], findings: list[Finding]) -> dict[str, Any]:
    return {
        "version": DOCTOR_VERSION,
        "environment": environment(),
        "device": {str(key): str(value) for key, value in mx.device_info(mx.default_device()).items()},
        "dialect": gpu,
        "kernels": kernels,
        "choices": [asdict(choice) for choice in choices],
        "findings": [asdict(found) | {"passed": found.passed} for found in findings],
    }


def _report(kernels: str | None, choices: list[Choice], findings: list[Finding]) -> Iterator[str]:
    """Yield the lines of a report in Markdown."""
    described = ", ".join(f"{key} {value}" for key, value in environment().items() if isinstance(value, str))
    yield f"{described}, {mx.device_info(mx.default_device()).get('device_name', mx.default_device())}"
    if kernels is None:
        yield "MLX finds no GPU, and the kernels for CPUs are not installed: this table checks MLX's operations."
    else:
        yield f"Custom kernels: {kernels}. Times: microseconds per call, launch included; weights mostly in cache."
    yield from (f"- {choice.contest}: {choice}" for choice in choices)
    yield ""
    yield "| kernel | case | shape | type | error | kernel, us | MLX, us | |"
    yield "|---|---|---|---|---|---|---|---|"
    for found in findings:
        error = "-" if found.error is None else f"{found.error:.1e}"
        verdict = "ok" if found.passed else found.reason or f"FAILED: over {found.accepted:.0e}"
        yield (
            f"| {found.kernel} | {found.case} | {found.geometry} | {found.dtype} | {error} "
            f"| {_shown(found.microseconds)} | {_shown(found.mlx_microseconds)} | {verdict} |"
        )


def _decode_line(found: DecodeFinding) -> str:
    dispatches = "-" if found.dispatches is None else str(found.dispatches)
    return (
        f"Demo model, all experts in memory: {found.milliseconds:.2f} ms a token, {found.waits:.1f} waits a token, "
        f"{dispatches} dispatches a token"
    )


def _shown(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:.0f}"
