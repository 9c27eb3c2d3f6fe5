"""Emulate a GPU on a CPU: MLX reports a GPU, so an engine takes the branches for GPUs, and kernels run on a machine.

All patches are in this module. They answer the questions that the package asks MLX, so they need no names of its
branches. Arrays stay on the CPU, where MLX's operations run. Replacing a kernel by MLX's operations, which would give
correct numbers, fails the test. ``docs/faults.md`` lists the limits of emulation.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import cuda_on_cpu
import gpu_slots_on_cpu
import metal_on_cpu
import mlx.core as mx
import pytest

from flashmoe_mlx.custom_kernels import code_cache, nvidia, nvrtc, precision
from flashmoe_mlx.stores import pinned

Launches = Counter[str]
"""The number of calls of each kernel, by name."""

HOPPER = nvidia.Gpu(multiprocessors=3, capability=9, shared_memory=120_000)
AMPERE = nvidia.Gpu(multiprocessors=3, capability=8, shared_memory=160_000)
"""A GPU with tensor cores and without a copy engine."""
FREE_MEMORY = 2**32


@pytest.fixture(name="device", autouse=True, scope="module")
def device_of_module() -> Iterator[None]:
    """Run a module on the CPU, in place of the fixture for each test; for modules whose emulation outlives a test."""
    default = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(default)


@contextmanager
def metal(dtype: mx.Dtype = mx.bfloat16) -> Iterator[Launches]:
    """Emulate a Mac with activations of ``dtype``; the kernels' Metal text runs on ``metal_on_cpu``."""
    launches: Launches = Counter()
    with _gpu(dtype, {"device_name": "Metal on a CPU"}) as patch, metal_on_cpu.writable("keys", "values"):
        patch.setattr(mx.metal, "is_available", lambda: True)
        patch.setattr(mx.fast, "metal_kernel", _counting(metal_on_cpu.metal_kernel, launches))
        yield launches


@contextmanager
def cuda(dtype: mx.Dtype = mx.bfloat16, gpu: nvidia.Gpu = HOPPER, at_once: int = 2) -> Iterator[Launches]:
    """Emulate an NVIDIA GPU with activations of ``dtype``; the kernels' CUDA text runs on ``cuda_on_cpu``."""
    launches: Launches = Counter()
    capability = {"compute_capability_major": gpu.capability, "compute_capability_minor": 0}
    with _gpu(dtype, {"device_name": "CUDA on a CPU", "free_memory": FREE_MEMORY, **capability}) as patch:
        patch.setattr(mx.cuda, "is_available", lambda: True)
        _everywhere(patch, nvidia.gpu, lambda: gpu)
        patch.setattr(pinned, "driver", gpu_slots_on_cpu.Memory)
        machine = cuda_on_cpu.Machine(at_once, seed=1)
        patch.setattr(mx.fast, "cuda_kernel", _counting(machine.cuda_kernel, launches))

        def precompiled(*, name: str, **call: Any) -> list[mx.array]:
            launches[name] += name != "probe"  # it tells whether this way of launching works
            return machine.precompiled_cuda_kernel(name=name, **call)

        patch.setattr(mx.fast, "precompiled_cuda_kernel", precompiled)
        patch.setattr(nvrtc, "compiler", lambda: _NoCompiler())
        patch.setattr(code_cache, "load", lambda _: None)
        patch.setattr(code_cache, "store", lambda *_: None)
        patch.setenv("MLX_PTX_CACHE_DIR", "unused")
        yield launches


class _NoCompiler:
    """A compiler whose machine code is the text itself, which ``cuda_on_cpu`` runs."""

    version = ""

    def compile(self, text: str, name: str, architecture: str) -> bytes:
        assert f" {name}(" in text
        assert architecture.startswith("sm_")
        return text.encode()


@contextmanager
def _gpu(dtype: mx.Dtype, information: dict[str, Any]) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for library in (mx.metal, mx.cuda):
            patch.setattr(library, "is_available", lambda: False)
        patch.setattr(mx, "compile", lambda function, **_: function)  # emulated kernels run when they are called
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
    """Fail if the package logs a warning, for example about a kernel that differs from its reference."""
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
    """Clear the caches of kernels, so that no kernel outlives its machine."""
    for name, module in list(sys.modules.items()):
        if name.startswith("flashmoe_mlx.custom_kernels") and ".native" not in name:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _everywhere(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Replace ``function`` by ``replacement`` in every module of the package."""
    for name, module in list(sys.modules.items()):
        if name.startswith("flashmoe_mlx"):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, attribute, replacement)


def _in_f32(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return ``product`` with sums in f32, as on a GPU; on a CPU, MLX accumulates in the type of the inputs."""

    def wide(value: Any) -> Any:
        return value.astype(mx.float32) if isinstance(value, mx.array) and value.dtype == mx.bfloat16 else value

    def exact(x: mx.array, *rest: Any, **options: Any) -> mx.array:
        wider = {name: wide(value) for name, value in options.items()}
        return product(wide(x), *map(wide, rest), **wider).astype(x.dtype)

    return exact


def _counting(make: Callable[..., Any], launches: Launches) -> Callable[..., Any]:
    """Return ``make`` with kernels that count their calls."""

    @wraps(make)
    def made(name: str, *rest: Any, **options: Any) -> Callable[..., list[mx.array]]:
        run = make(name, *rest, **options)

        def counted(**call: Any) -> list[mx.array]:
            launches[name] += 1
            results: list[mx.array] = run(**call)
            return results

        return counted

    return made
