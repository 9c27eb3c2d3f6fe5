"""An operation with a plain reference, MLX's implementation and a custom kernel that is checked before it is used.

A kernel has several code paths: one for a decode step, others for prompts, for other bit widths and so on. ``path``
names the one that given arguments lead to; calls and checks use the same function, so a path counts as checked only if
a check went down exactly that path. ``Operation.check`` runs at load, on samples, before anything is timed. A path that
fails is replaced by MLX's operation; the other paths keep the kernel. A path that no check went down is a bug of
``code_paths``: MLX's operation runs there too, and one ``UncheckedPathWarning`` is issued.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.shapes import ModelShapes

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R", mx.array, tuple[mx.array, mx.array, mx.array], tuple[mx.array, ...])
CodePath = tuple[str, ...]
"""Phrases that name a code path, such as ("one token", "4 bits in groups of 64"); empty ones are not shown."""

TOLERANCE = {mx.float32: 2e-3, mx.bfloat16: 5e-2}
"""Largest accepted difference between a kernel and its reference in the same types, relative to the largest value.

Wide enough for CUDA's TF32 products and for bf16 between the reference's operations; a wrong kernel is far outside.
"""


class UncheckedPathWarning(RuntimeWarning):
    """A call led to a code path of a kernel that was not checked at load; MLX's operation runs in its place."""


@dataclass(frozen=True)
class Sample:
    """Inputs for one code path.

    ``arguments`` are the kernel's, which may write to them; ``expected`` the reference's, possibly for fewer tokens or
    rows. ``compared`` selects from the kernel's results what the reference returns.
    """

    arguments: tuple[Any, ...]
    expected: tuple[Any, ...]
    compared: Callable[[list[mx.array]], list[mx.array]] = lambda results: results


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: ``runs`` says what runs on ``path``, ``replaced`` why it is not the kernel, if so."""

    operation: str
    path: CodePath
    runs: str
    replaced: str | None = None

    @property
    def label(self) -> str:
        """The operation and the path in words."""
        return ": ".join(filter(None, (self.operation, ", ".join(filter(None, self.path)))))


@dataclass
class Operation(Generic[P, R]):
    """One operation; calling it runs ``custom`` where that passed its check, else ``mlx``.

    Attributes:
        name: as in the records of runs.
        reference: the truth, in elementary operations.
        mlx: MLX's implementation.
        custom: the kernel.
        path: the code path of ``custom`` that arguments lead to, or None if it does not take them.
        code_paths: samples for every code path that a model takes; several may belong to one path.
        maker: the kind of kernel, for records.
        built_for: what it runs on, for records.
    """

    name: str
    reference: Callable[P, R]
    mlx: Callable[P, R]
    custom: Callable[P, R]
    path: Callable[P, CodePath | None]
    code_paths: Callable[[ModelShapes], Iterable[Sample]]
    maker: str = "custom kernel"
    built_for: str = ""
    _reasons: dict[CodePath, str | None] = field(default_factory=dict)
    """Why a path was replaced, or None where the kernel runs; by checked path."""
    _warned: set[CodePath] = field(default_factory=set)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation that the check chose for these arguments."""
        path = self.path(*args, **kwargs)
        if path is None:
            return self.mlx(*args, **kwargs)
        if path not in self._reasons:
            self._warn_unchecked(path)
        elif self._reasons[path] is None:
            return self.custom(*args, **kwargs)
        return self.mlx(*args, **kwargs)

    def check(self, model: ModelShapes) -> list[Verdict]:
        """Compare the kernel with its reference on every code path that ``model`` takes.

        A path fails with the first of its samples that does. Verdicts on other paths, of an earlier check for a model
        with the same weights, stay.
        """
        reasons: dict[CodePath, str | None] = {}
        path_of: Callable[..., CodePath | None] = self.path
        for sample in self.code_paths(model):
            path = path_of(*sample.arguments)
            if path is None:
                raise AssertionError(f"{self.name}: a sample leads to no code path")
            if reasons.get(path) is None:
                reasons[path] = self._disagreement(sample)
        self._reasons |= reasons
        return [self._verdict(path, reason) for path, reason in reasons.items()]

    def _disagreement(self, sample: Sample) -> str | None:
        """Say what is wrong with the kernel's results; None if nothing is."""
        reference: Callable[..., R] = self.reference
        custom: Callable[..., R] = self.custom
        try:
            expected = _arrays(reference(*sample.expected))
            mx.eval(expected)
        except Exception as error:  # no memory, perhaps; a model can run without this kernel
            return f"cannot be checked: {_first_line(error)}"
        try:
            got = sample.compared(_arrays(custom(*sample.arguments)))
            mx.eval(got)
        except Exception as error:  # whatever a compiler or a driver raises
            return f"cannot run: {_first_line(error)}"
        # A state in f32 that comes out of inputs in bf16 is no more exact than they are.
        accepted = max(TOLERANCE[array.dtype] for array in got)
        for ours, theirs in zip(got, expected, strict=True):
            difference = relative_difference(ours, theirs)
            if not difference <= accepted:  # not a number fails as well
                return f"differs from its reference by {difference:.1e} of the largest value"
        return None

    def _verdict(self, path: CodePath, reason: str | None) -> Verdict:
        if reason is None:
            built_for = f" ({self.built_for})" if self.built_for else ""
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
    """What runs in a model: ``names`` by operation and code path, ``replaced`` the labels of paths that failed.

    ``note`` is one text for a person, or None where everything is as it should be.
    """

    names: dict[str, str]
    replaced: list[str]
    note: str | None


def check_operations(
    operations: Sequence[Operation[Any, Any]], model: ModelShapes, others: Iterable[tuple[str, str]], note: str | None
) -> KernelReport:
    """Check every operation on every code path of ``model``; log a warning for each operation with a failure.

    Args:
        operations: those with custom kernels.
        model: the sizes and formats of the model's parts.
        others: names of operations and what runs where no custom kernel does.
        note: what a person should know besides.
    """
    verdicts = [verdict for operation in operations for verdict in operation.check(model)]
    mx.clear_cache()  # samples are as large as parts of the model
    checked = {verdict.operation for verdict in verdicts}
    names = {operation: runs for operation, runs in others if operation not in checked}
    names |= {verdict.label: verdict.runs for verdict in verdicts}
    failures = list(_failures(operations, verdicts))
    for failure in failures:
        _log.warning("%s", failure)
    notes = [*filter(None, [note]), *failures]
    return KernelReport(
        names, [verdict.label for verdict in verdicts if verdict.replaced is not None], "; ".join(notes) or None
    )


def _failures(operations: Sequence[Operation[Any, Any]], verdicts: Sequence[Verdict]) -> Iterator[str]:
    """One line for each operation with replaced paths."""
    for operation in operations:
        failed = [one for one in verdicts if one.operation == operation.name and one.replaced is not None]
        if failed:
            paths = "; ".join(", ".join(filter(None, one.path)) for one in failed)
            yield (
                f"the {operation.maker} {operation.name} {failed[0].replaced} ({paths}); MLX's own operations, which "
                "are slower, run in its place"
            )


def relative_difference(got: mx.array, expected: mx.array) -> float:
    """Return max |got - expected| / max |expected|, or NaN if any value is NaN; infinite if shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    wide = expected.astype(mx.float32)
    difference = mx.abs(got.astype(mx.float32) - wide).max() / mx.maximum(mx.abs(wide).max(), 1e-30)
    return float(np.array(difference))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _arrays(result: mx.array | tuple[mx.array, ...]) -> list[mx.array]:
    return [result] if isinstance(result, mx.array) else list(result)
