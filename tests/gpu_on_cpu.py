"""An engine that takes the branches of a GPU, on a CPU: MLX says that a GPU is there, and kernels run on a machine.

All seams are here. What the product asks MLX is answered as on a GPU, so no branch of the product needs a name here;
arrays stay on the CPU, where MLX's own operations run. A kernel that is replaced by MLX's operations, which would give
right numbers, fails the test. ``docs/faults.md`` lists what this cannot show.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import cuda_on_cpu
import metal_on_cpu
import mlx.core as mx
import pytest

from flashmoe_mlx.custom_kernels import nvidia, precision

Launches = Counter[str]
"""How many times each kernel ran, by name."""

HOPPER = nvidia.Gpu(multiprocessors=3, capability=9, shared_memory=120_000)
AMPERE = nvidia.Gpu(multiprocessors=3, capability=8, shared_memory=160_000)
"""Has tensor cores and no copy engine."""
FREE_MEMORY = 2**32


@contextmanager
def metal(dtype: mx.Dtype = mx.bfloat16) -> Iterator[Launches]:
    """As on a Mac, activations of ``dtype``; the kernels' Metal text runs on ``metal_on_cpu``."""
    launches: Launches = Counter()
    with _gpu(dtype, {"device_name": "Metal on a CPU"}) as patch, metal_on_cpu.writable("keys", "values"):
        patch.setattr(mx.metal, "is_available", lambda: True)
        patch.setattr(mx.fast, "metal_kernel", _counting(metal_on_cpu.metal_kernel, launches))
        yield launches


@contextmanager
def cuda(dtype: mx.Dtype = mx.bfloat16, gpu: nvidia.Gpu = HOPPER, at_once: int = 2) -> Iterator[Launches]:
    """As with an NVIDIA GPU, activations of ``dtype``; the kernels' CUDA text runs on ``cuda_on_cpu``."""
    launches: Launches = Counter()
    capability = {"compute_capability_major": gpu.capability, "compute_capability_minor": 0}
    with _gpu(dtype, {"device_name": "CUDA on a CPU", "free_memory": FREE_MEMORY, **capability}) as patch:
        patch.setattr(mx.cuda, "is_available", lambda: True)
        _everywhere(patch, nvidia.gpu, lambda: gpu)
        machine = cuda_on_cpu.Machine(at_once, seed=1)
        patch.setattr(mx.fast, "cuda_kernel", _counting(machine.cuda_kernel, launches))
        yield launches


@contextmanager
def _gpu(dtype: mx.Dtype, information: dict[str, Any]) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for library in (mx.metal, mx.cuda):
            patch.setattr(library, "is_available", lambda: False)
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        patch.setattr(mx, "device_info", lambda *device: information)
        _everywhere(patch, precision.activation_type, lambda: dtype)
        patch.setattr(mx, "quantized_matmul", _in_f32(mx.quantized_matmul))
        patch.setattr(mx.fast, "scaled_dot_product_attention", _in_f32(mx.fast.scaled_dot_product_attention))
        _forget_kernels()
        with _no_warnings():
            yield patch
    _forget_kernels()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Fail if the package warns, as it does of a kernel that differs from its reference and was replaced."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flashmoe_mlx")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert warned == []


def _forget_kernels() -> None:
    """Clear what is made once a process, so that no kernel outlives the machine that it was made for."""
    for name, module in list(sys.modules.items()):
        if name.startswith("flashmoe_mlx.custom_kernels") and ".native" not in name:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _everywhere(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], other: Callable[..., Any]) -> None:
    """``other`` in place of ``function`` in every module of the package that has it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("flashmoe_mlx"):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, attribute, other)


def _in_f32(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``product`` with sums in f32, as on a GPU: on a CPU MLX adds up in the type of what it is given."""

    def wide(value: Any) -> Any:
        return value.astype(mx.float32) if isinstance(value, mx.array) and value.dtype == mx.bfloat16 else value

    def exact(x: mx.array, *rest: Any, **options: Any) -> mx.array:
        wider = {name: wide(value) for name, value in options.items()}
        return product(wide(x), *map(wide, rest), **wider).astype(x.dtype)

    return exact


def _counting(make: Callable[..., Any], launches: Launches) -> Callable[..., Any]:
    """``make`` returns kernels that count their calls."""

    @wraps(make)
    def made(name: str, *rest: Any, **options: Any) -> Callable[..., list[mx.array]]:
        run = make(name, *rest, **options)

        def counted(**call: Any) -> list[mx.array]:
            launches[name] += 1
            results: list[mx.array] = run(**call)
            return results

        return counted

    return made
