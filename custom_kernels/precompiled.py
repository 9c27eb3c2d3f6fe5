"""Kernels for CUDA that are compiled once for all processes, several at a time."""

import logging
import os
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import cache
from importlib.metadata import version
from queue import Empty, SimpleQueue
from threading import Thread

import mlx.core as mx

from flashmoe_mlx.custom_kernels import code_cache, nvrtc
from flashmoe_mlx.custom_kernels.cuda_text import cuda_text
from flashmoe_mlx.custom_kernels.nvidia import gpu
from flashmoe_mlx.progress import report

_log = logging.getLogger(__name__)
_MOST_THREADS = 16


class MachineCode:
    """Machine code of one kernel, or the error of its compilation.

    No lock protects it. An interrupt can leave the lock of a ``Future`` locked, and every later call of the kernel
    would wait forever. Two threads may therefore compile the same text, with the same result.
    """

    def __init__(self, name: str, text: str) -> None:
        """Prepare to compile ``text``, whose function is ``name``."""
        self._name, self._text = name, text
        self._made: bytes | Exception | None = None

    def get(self) -> bytes | Exception:
        """Return the machine code, which is compiled at the first call or read from the result of another process."""
        if self._made is None:
            try:
                self._made = _code(self._name, self._text)
            except Exception as error:
                self._made = error
        return self._made


_plan: ContextVar[dict[MachineCode, None] | None] = ContextVar("plan", default=None)
"""Kernels to compile at the end of ``compile_together``."""


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
        code = MachineCode("probe", text).get()
        if isinstance(code, Exception):
            raise code
        (y,) = mx.fast.precompiled_cuda_kernel(
            name="probe",
            compiled_source=code,
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


def compile_together(calls: Callable[[], object]) -> None:
    """Compile the kernels that ``calls`` runs, all at the same time, without running them.

    Inside ``calls``, a kernel returns arrays of zeros. A kernel with an error is compiled by MLX at its first call,
    which then raises the error.
    """
    plan: dict[MachineCode, None] = {}

    def planning() -> None:
        _plan.set(plan)
        calls()

    copy_context().run(planning)  # an interrupt cannot leave the plan behind, as it could leave a ``with`` block
    _compile_all(list(plan))


def planned(code: MachineCode) -> bool:
    """Return whether the caller is inside ``compile_together``, which then compiles ``code``."""
    plan = _plan.get()
    if plan is not None:
        plan[code] = None
    return plan is not None


def _compile_all(codes: list[MachineCode]) -> None:
    """Compile ``codes`` in several threads; an interrupt leaves the rest to the first calls of the kernels."""
    waiting: SimpleQueue[MachineCode] = SimpleQueue()
    finished: SimpleQueue[None] = SimpleQueue()
    for code in codes:
        waiting.put(code)

    def work() -> None:
        while (code := _next(waiting)) is not None:
            code.get()
            finished.put(None)

    threads = [Thread(target=work, name=f"compile-{n}", daemon=True) for n in range(min(_most_threads(), len(codes)))]
    try:
        for thread in threads:
            thread.start()
        for number in range(len(codes)):
            finished.get()
            report(f"compiling kernels: {number + 1} of {len(codes)}")
    except BaseException:
        while _next(waiting) is not None:
            pass
        raise
    for thread in threads:
        thread.join()


def _most_threads() -> int:
    return min(_MOST_THREADS, os.cpu_count() or 1)


def _next(queue: SimpleQueue[MachineCode]) -> MachineCode | None:
    try:
        return queue.get_nowait()
    except Empty:
        return None
