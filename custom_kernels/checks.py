"""Kernels that are checked before they are used.

A kernel has several code paths: one for a decode step, and more for prompts, bit widths and so on.
``code_path`` names the path that given arguments take. Calls and checks use the same function, so a path counts as
checked only if a check took exactly that path. ``CheckedKernel.check`` runs at load, on samples, before anything is
timed. MLX's implementation replaces a path that fails; the other paths keep the kernel. A path that no check took is a
bug in the samples: MLX's implementation runs there too, and one ``UncheckedPathWarning`` is issued.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import precompiled
from flashmoe_mlx.custom_kernels.kernel import dialect
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.progress import report

__all__ = [
    "ROUNDED_TOLERANCE",
    "TOLERANCE",
    "CheckedKernel",
    "CodePath",
    "KernelReport",
    "Sample",
    "UncheckedPathWarning",
    "Verdict",
    "check_kernels",
    "relative_difference",
    "tokens_phrase",
]

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R", mx.array, tuple[mx.array, mx.array, mx.array], tuple[mx.array, ...])
CodePath = tuple[str, ...]
"""Phrases that name a code path, such as ("one token", "4 bits in groups of 64"); empty phrases are not shown."""

TOLERANCE = {mx.float32: 2e-3, mx.bfloat16: 5e-2}
"""Largest accepted difference between a kernel and its reference in the same types, relative to the largest value.

Wide enough for CUDA's TF32 products and for bf16 between the reference's operations; a wrong kernel is far outside.
"""
ROUNDED_TOLERANCE = 5e-2
"""As ``TOLERANCE``, for a kernel that rounds its vectors to 8 bits."""
_UNCHECKED = "not checked"


def tokens_phrase(tokens: int) -> str:
    """Return the phrase for the number of tokens in the names of code paths."""
    return "one token" if tokens == 1 else "several tokens"


class UncheckedPathWarning(RuntimeWarning):
    """A call took a code path of a kernel that no check took at load; MLX's implementation runs in its place."""


@dataclass(frozen=True)
class Sample:
    """Inputs for one code path.

    Attributes:
        arguments: arguments of the kernel, which may write to them.
        expected: arguments of the reference, possibly for fewer tokens or rows; None if they are ``arguments``.
        compared: select the part of the kernel's results that the reference returns.
        of_both: select the results to compare, of the kernel and of the reference.
    """

    arguments: tuple[Any, ...]
    expected: tuple[Any, ...] | None = None
    compared: Callable[[list[mx.array]], list[mx.array]] = lambda results: results
    of_both: Callable[[list[mx.array]], list[mx.array]] = lambda results: results


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check.

    Attributes:
        operation: name of the operation.
        path: the code path.
        runs: name of the implementation that runs on ``path``.
        replaced: the reason why MLX's implementation runs instead of the kernel; None if the kernel runs.
    """

    operation: str
    path: CodePath
    runs: str
    replaced: str | None = None

    @property
    def label(self) -> str:
        """The operation and the path in words."""
        return ": ".join(filter(None, (self.operation, ", ".join(filter(None, self.path)))))


@dataclass
class CheckedKernel(Generic[P, R]):
    """A kernel; a call runs ``kernel`` on code paths that passed their check, else ``mlx``.

    Attributes:
        name: name of the operation.
        reference: the truth, in elementary operations.
        mlx: MLX's implementation.
        kernel: the kernel.
        code_path: name the code path of ``kernel`` for given arguments; None if it does not support them.
        samples: yield samples for every code path that a model takes.
        maker: kind of the kernel, for records.
        built_for: return what the kernel runs on, for records; empty to leave it out.
        rounded: the phrase of code paths on which the kernel rounds its vectors to 8 bits; empty if there are none.
    """

    name: str
    reference: Callable[P, R]
    mlx: Callable[P, R]
    kernel: Callable[P, R]
    code_path: Callable[P, CodePath | None]
    samples: Callable[[ModelShapes], Iterable[Sample]]
    maker: str = "custom kernel"
    built_for: Callable[[], str] = str
    rounded: str = ""
    _reasons: dict[CodePath, str | None] = field(default_factory=dict)
    """The reason why each checked path was replaced; None where the kernel runs."""
    _warned: set[CodePath] = field(default_factory=set)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation that the check chose for these arguments."""
        path = self.code_path(*args, **kwargs)
        if path is None:
            return self.mlx(*args, **kwargs)
        reason = self._reasons.get(path, _UNCHECKED)
        if reason is None:
            return self.kernel(*args, **kwargs)
        if reason is _UNCHECKED:
            self._warn_unchecked(path)
        return self.mlx(*args, **kwargs)

    def runs(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Return whether ``kernel`` runs for these arguments."""
        path = self.code_path(*args, **kwargs)
        return path is not None and self._reasons.get(path, _UNCHECKED) is None

    def check(self, samples: Iterable[Sample]) -> list[Verdict]:
        """Compare the kernel with its reference on the code paths of ``samples``.

        A path fails with its first failing sample. Verdicts of an earlier check on other paths remain valid.
        """
        reasons: dict[CodePath, str | None] = {}
        path_of: Callable[..., CodePath | None] = self.code_path
        for sample in samples:
            path = path_of(*sample.arguments)
            if path is None:
                raise AssertionError(f"{self.name}: the kernel does not support the arguments of a sample")
            if reasons.get(path) is None:
                reasons[path] = self._disagreement(sample)
        self._reasons |= reasons
        return [self._verdict(path, reason) for path, reason in reasons.items()]

    def _disagreement(self, sample: Sample) -> str | None:
        """Describe the error in the kernel's results; return None if they are correct."""
        reference: Callable[..., R] = self.reference
        kernel: Callable[..., R] = self.kernel
        path_of: Callable[..., CodePath | None] = self.code_path
        try:
            arguments = sample.arguments if sample.expected is None else sample.expected
            expected = sample.of_both(_arrays(reference(*arguments)))
            mx.eval(expected)
        except Exception as error:  # such as too little memory; a model can run without this kernel
            return f"cannot be checked: {_first_line(error)}"
        try:
            got = sample.of_both(sample.compared(_arrays(kernel(*sample.arguments))))
            mx.eval(got)
        except Exception as error:  # a compiler or a driver may raise anything
            return f"cannot run: {_first_line(error)}"
        # A state in f32 that is computed from inputs in bf16 is only as exact as the inputs.
        accepted = max(TOLERANCE[array.dtype] for array in got if array.dtype in TOLERANCE)
        if self.rounded and self.rounded in (path_of(*sample.arguments) or ()):
            accepted = max(accepted, ROUNDED_TOLERANCE)
        for result, exact in zip(got, expected, strict=True):
            difference = relative_difference(result, exact)
            if not difference <= (accepted if result.dtype in TOLERANCE else 0):  # NaN fails; integers must be equal
                return f"differs from its reference by {difference:.1e} of the largest value"
        return None

    def _verdict(self, path: CodePath, reason: str | None) -> Verdict:
        if reason is None:
            built_for = self.built_for()
            built_for = f" ({built_for})" if built_for else ""
            return Verdict(self.name, path, f"{self.maker} {self.name}{built_for}")
        return Verdict(self.name, path, f"MLX: the {self.maker} {self.name} {reason}", reason)

    def _warn_unchecked(self, path: CodePath) -> None:
        if path in self._warned:
            return
        self._warned.add(path)
        shown = Verdict(self.name, path, "").label
        warnings.warn(
            f"{shown}: the {self.maker} was not checked on this code path at load, so MLX's own operation runs in its "
            "place; please report this",
            UncheckedPathWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class KernelReport:
    """The implementations that run in a model.

    Attributes:
        names: names of the implementations by operation and code path.
        replaced: labels of the code paths whose kernels failed their check.
        note: a message for the user; None if there is nothing to tell.
    """

    names: dict[str, str]
    replaced: list[str]
    note: str | None


def check_kernels(
    kernels: Sequence[CheckedKernel[Any, Any]], model: ModelShapes, standard: Mapping[str, str], note: str | None
) -> KernelReport:
    """Check every kernel on every code path of ``model``; log a warning for each kernel with a failure.

    Args:
        kernels: custom kernels.
        model: the sizes and formats of the model's parts.
        standard: names of the implementations that run where no custom kernel does, by operation.
        note: an earlier message for the user, or None.
    """
    drawn = [(kernel, list(kernel.samples(model))) for kernel in kernels]
    if dialect() == "cuda":
        precompiled.compile_together(lambda: _run_all(drawn))
    verdicts: list[Verdict] = []
    while drawn:  # samples are freed after their check
        kernel, samples = drawn.pop(0)
        report(f"checking kernels: {kernel.name}")
        verdicts += kernel.check(samples)
    mx.clear_cache()  # samples are as large as parts of the model
    checked = {verdict.operation for verdict in verdicts}
    names = {operation: runs for operation, runs in standard.items() if operation not in checked}
    names |= {verdict.label: verdict.runs for verdict in verdicts}
    failures = list(_failures(kernels, verdicts))
    for failure in failures:
        _log.warning("%s", failure)
    notes = [*filter(None, [note]), *failures]
    return KernelReport(
        names, [verdict.label for verdict in verdicts if verdict.replaced is not None], "; ".join(notes) or None
    )


def _run_all(drawn: Iterable[tuple[CheckedKernel[Any, Any], Iterable[Sample]]]) -> None:
    """Call every kernel with every sample; errors are left to the checks."""
    for kernel, samples in drawn:
        for sample in samples:
            with contextlib.suppress(Exception):
                kernel.kernel(*sample.arguments)


def _failures(kernels: Sequence[CheckedKernel[Any, Any]], verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield one line for each kernel with replaced paths."""
    for kernel in kernels:
        failed = [verdict for verdict in verdicts if verdict.operation == kernel.name and verdict.replaced is not None]
        if failed:
            paths = "; ".join(", ".join(filter(None, verdict.path)) for verdict in failed)
            yield (
                f"the {kernel.maker} {kernel.name} {failed[0].replaced} ({paths}); MLX's own operations, which are "
                "slower, run in its place"
            )


def relative_difference(got: mx.array, expected: mx.array) -> float:
    """Return max |got - expected| / max |expected|, or NaN if any value is NaN; infinite if shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    exact = expected.astype(mx.float32)
    difference = mx.abs(got.astype(mx.float32) - exact).max() / mx.maximum(mx.abs(exact).max(), 1e-30)
    return float(np.array(difference))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _arrays(result: mx.array | tuple[mx.array, ...]) -> list[mx.array]:
    return [result] if isinstance(result, mx.array) else list(result)
