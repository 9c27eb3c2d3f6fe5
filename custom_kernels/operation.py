"""An operation: a plain reference, MLX's implementation, and kernels for GPUs and CPUs.

A new operation takes one folder in ``custom_kernels/`` whose ``__init__.py`` defines ``OPERATION``, an ``Operation``.
``custom_kernels.operations`` finds it there; only the wheel's list of packages in ``pyproject.toml`` needs its name.
By convention the folder holds

- ``reference.py``: the operation in elementary MLX operations, which is the truth;
- ``mlx.py``: the fastest implementation out of MLX's own operations;
- ``gpu.py`` and bodies ``*.h``: a kernel for Metal and CUDA (see ``kernel.py``), the names of its code paths, samples;
- ``cpu.py``: the same for a function of the C++ extension (see ``native/``).

``reference`` and ``mlx`` are required; each kernel is optional. CONTRIBUTING.md has a complete example.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import mlx.core as mx

from flashmoe_mlx.custom_kernels.checks import CheckedKernel, CodePath, Sample
from flashmoe_mlx.custom_kernels.native import in_use, rounded_phrase
from flashmoe_mlx.custom_kernels.shapes import ModelShapes

__all__ = ["Implementation", "Operation", "Target"]

P = ParamSpec("P")
R = TypeVar("R", mx.array, tuple[mx.array, mx.array, mx.array], tuple[mx.array, ...])

Target = Literal["reference", "mlx", "metal", "cuda", "cpu", "fallback"]
"""An implementation that ``Operation.on`` returns.

The references, MLX's operations, custom kernels on an Apple GPU, on an NVIDIA GPU or on a CPU; or, on a CPU without the
C++ extension, the fastest implementation without custom kernels.
"""


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """A kernel for one kind of device, and its code paths.

    Attributes:
        run: the kernel; it may require arguments that ``code_path`` names a path for.
        code_path: name the code path of ``run`` for given arguments; None if ``run`` does not support them.
        samples: yield samples for every code path that a model takes; a path may have several samples.
        adapt: give the reference and MLX's implementation the arguments of ``run``, where these differ.
        dialects: GPUs on which the kernel runs.
        rounds: whether ``run`` and ``code_path`` take ``activations``, a member of ``native.ACTIVATIONS``.
    """

    run: Callable[P, R]
    code_path: Callable[P, CodePath | None]
    samples: Callable[[ModelShapes], Iterable[Sample]]
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    dialects: tuple[str, ...] = ("metal", "cuda")
    rounds: bool = False


@dataclass(frozen=True)
class Operation(Generic[P, R]):
    """One operation with all of its implementations.

    Attributes:
        name: name in the records of runs.
        reference: the truth, in elementary operations.
        mlx: MLX's implementation, for ``kernels=mlx``.
        mlx_name: name of ``mlx`` in the records of runs; None leaves it out of records without custom kernels.
        gpu: the custom kernel for GPUs, or None.
        cpu: the custom kernel in the C++ extension, or None.
        fallback: the implementation for ``kernels=auto`` where no custom kernel runs; None stands for ``mlx``.
        prompts: name of the implementation that prompts take, on targets where they take another one.
    """

    name: str
    reference: Callable[P, R]
    mlx: Callable[P, R]
    mlx_name: str | None
    gpu: Implementation[..., Any] | None = None
    cpu: Implementation[..., Any] | None = None
    fallback: Callable[P, R] | None = None
    prompts: Mapping[Target, str] = field(default_factory=dict)

    def on(self, target: Target, activations: str = "f32") -> Callable[..., Any]:
        """Return the implementation for ``target``; a kernel as a ``CheckedKernel``, to be checked before its use.

        ``activations`` is the type to which kernels for CPUs round the vectors of products of many vectors.
        """
        if target == "reference":
            return self.reference
        if target == "mlx":
            return self.mlx
        fallback = self.fallback or self.mlx
        if target == "cpu" and self.cpu is not None:
            return self._checked(self.cpu, fallback, "native kernel", in_use, activations)
        if self.gpu is not None and target in self.gpu.dialects:
            return self._checked(self.gpu, fallback, "custom kernel", str)
        return fallback

    def names(self, target: Target) -> dict[str, str]:
        """Return the names of the implementations that run on ``target`` where no custom kernel does."""
        if self.mlx_name is None:
            return {}
        names = {self.name: "reference" if target == "reference" else self.mlx_name}
        if target in self.prompts:
            names[f"{self.name} of prompts"] = self.prompts[target]
        return names

    def _checked(
        self,
        kernel: Implementation[..., Any],
        fallback: Callable[..., Any],
        maker: str,
        built_for: Callable[[], str],
        activations: str = "f32",
    ) -> CheckedKernel[..., Any]:
        run, code_path, rounded = kernel.run, kernel.code_path, ""
        if kernel.rounds and activations != "f32":
            run, code_path = partial(run, activations=activations), partial(code_path, activations=activations)
            rounded = rounded_phrase(activations)
        return CheckedKernel(
            self.name,
            kernel.adapt(self.reference),
            kernel.adapt(fallback),
            run,
            code_path,
            kernel.samples,
            maker,
            built_for,
            rounded,
        )
