"""Kernels for CUDA that are compiled once for all processes, several at a time."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version

import mlx.core as mx

from flashmoe_mlx.custom_kernels import code_cache, nvrtc
from flashmoe_mlx.custom_kernels.cuda_text import cuda_text
from flashmoe_mlx.custom_kernels.nvidia import gpu
from flashmoe_mlx.progress import report

_log = logging.getLogger(__name__)
_MOST_THREADS = 16


class _Plan:
    """Kernels that are compiled together."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads
        self.codes: set[Future[bytes]] = set()


_plan: ContextVar[_Plan | None] = ContextVar("plan", default=None)


def compiled(name: str, text: str) -> Future[bytes]:
    """Compile ``text``, whose function is ``name``, or read the result of an earlier process.

    Inside ``planning`` other threads do so; else the result is ready.
    """
    plan = _plan.get()
    if plan is not None:
        return plan.threads.submit(_code, name, text)
    code: Future[bytes] = Future()
    try:
        code.set_result(_code(name, text))
    except Exception as error:
        code.set_exception(error)
    return code


def _code(name: str, text: str) -> bytes:
    made, architecture = nvrtc.compiler(), gpu().architecture
    key = code_cache.key_of(text, *nvrtc.OPTIONS, architecture, made.version, version("mlx"))
    code = code_cache.load(key)
    if code is None:
        code = made.compile(text, name, architecture)
        code_cache.store(key, code)
    return code


@cache
def refusal() -> str | None:
    """Return why kernels cannot be compiled ahead on this machine; None if they can.

    A driver may be older than the compiler, so a kernel is compiled and run.
    """
    try:
        text = cuda_text("probe", [], [("y", mx.uint8)], "", "y[threadIdx.x] = 1;", [])
        (y,) = mx.fast.precompiled_cuda_kernel(
            name="probe",
            compiled_source=compiled("probe", text).result(),
            inputs=[],
            output_shapes=[(32,)],
            output_dtypes=[mx.uint8],
            scalars=[],
            ensure_row_contiguous=True,
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )
        mx.eval(y)
    except Exception as error:  # of the compiler, of the driver, or of an MLX with another interface
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _log.warning("kernels are compiled again in each process, which takes some seconds: %s", reason)
        return reason
    return None


@contextmanager
def planning() -> Iterator[None]:
    """Compile the kernels that the block calls, all at the same time, without running them.

    Inside, a kernel returns arrays of zeros. The block is left when all kernels are compiled. A kernel with an error is
    compiled by MLX at its first call, which then raises the error.
    """
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "compile") as threads:
        plan = _Plan(threads)
        token = _plan.set(plan)
        try:
            yield
        finally:
            _plan.reset(token)
        for number, _ in enumerate(as_completed(plan.codes)):
            report(f"compiling kernels: {number + 1} of {len(plan.codes)}")


def planned(code: Future[bytes]) -> bool:
    """Return whether the caller is inside ``planning``, which then waits for ``code``."""
    plan = _plan.get()
    if plan is not None:
        plan.codes.add(code)
    return plan is not None
