"""Load the resident weights of a model in the types that it computes with."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.errors import PackError
from flashmoe_mlx.formats.extents import read_extents
from flashmoe_mlx.formats.tables import StoredTensor, TablePart
from flashmoe_mlx.layers.linear import Linear, join
from flashmoe_mlx.models.parameters import Kind, Parameter, Table, part_names, quantization_of
from flashmoe_mlx.stores.allocation import align_to_cache_line
from flashmoe_mlx.stores.rows import RowStore

_SCALES = (mx.float32, mx.bfloat16, mx.float16)


class ResidentTensors(Protocol):
    """The resident tensors of a model on disk, under the names of ``parameters``."""

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        ...

    def take(self, name: str) -> mx.array:
        """Read a tensor; each may be taken once, so that no tensor stays in memory twice."""
        ...

    def stored(self, name: str) -> StoredTensor:
        """Locate a tensor without reading it."""
        ...


class ResidentWeights:
    """The resident weights of a model in memory, by the names of ``parameters``.

    Args:
        tensors: the tensors on disk.
        parameters: the names and shapes of the weights.
        dtype: the type of activations.
        kernels: the kernels that will use the weights.

    Raises:
        PackError: a tensor is missing or has the wrong shape or type.
    """

    def __init__(
        self, tensors: ResidentTensors, parameters: Iterable[Parameter], dtype: mx.Dtype, kernels: Kernels
    ) -> None:
        self._tensors = tensors
        self._kernels = kernels
        self.dtype = dtype
        """The type of activations."""
        self._matrices: dict[str, Linear] = {}
        self._vectors: dict[str, mx.array] = {}
        self.nbytes: int = 0
        """Bytes of all weights."""
        for parameter in parameters:
            if parameter.kind is Kind.MATRIX:
                self._matrices[parameter.name] = self._load_matrix(parameter.name, parameter.shape)
            else:
                self._vectors[parameter.name] = self._load_vector(parameter)

    def linear(self, name: str) -> Linear:
        """Return the matrix ``name``, with its bias if it has one."""
        matrix, bias = self._matrices[name], self._vectors.get(f"{name}.bias")
        return matrix if bias is None else replace(matrix, bias=bias)

    def join(self, *names: str) -> Linear | None:
        """Return the matrices ``names`` as one, with rows of zeros below, or None; see ``layers.linear.join``.

        ``linear`` then returns views of it, so that no weight is in memory twice.
        """
        joined = join([self.linear(name) for name in names])
        if joined is None:
            return None
        matrix, views = joined
        self._matrices |= zip(names, views, strict=True)
        return matrix

    def table(self, table: Table) -> RowStore:
        """Return a store of the rows of ``table``, which stays on disk."""
        parts = []
        for name in part_names(table, self._tensors.names):
            tensors = [self._tensors.stored(f"{name}.weight")]
            if f"{name}.scales" not in self._tensors.names:
                parts.append(TablePart(tensors))
                continue
            tensors += [self._tensors.stored(f"{name}.{part}") for part in ("scales", "biases")]
            dense = (tensors[0].shape[0], table.columns)
            parts.append(TablePart(tensors, *quantization_of(name, dense, tensors[0].shape, tensors[1].shape)))
        if not parts:
            raise PackError(f"table {table.name} is missing; delete the pack and make it again")
        return RowStore(parts)

    def check_integers(self, name: str, expected: npt.NDArray[np.int64]) -> None:
        """Raise PackError if there is a tensor ``name`` whose 64-bit integers are not ``expected``."""
        if name not in self._tensors.names:
            return
        tensor = self._tensors.stored(name)
        found = np.frombuffer(read_extents([tensor.extent]), np.int64) if tensor.dtype == "I64" else None
        if found is None or not np.array_equal(found, expected):
            raise PackError(
                f"{name}: its values do not follow from config.json; the checkpoint needs another version",
                code="unsupported_arithmetic",
            )

    def vector(self, name: str) -> mx.array:
        """Return the vector ``name``."""
        return self._vectors[name]

    def _take(self, name: str, dtype: mx.Dtype | None) -> mx.array:
        if name not in self._tensors.names:
            raise PackError(f"resident weights: tensor {name} is missing; delete the pack and make it again")
        array = self._tensors.take(name)
        if dtype is not None:
            array = array.astype(dtype)
        mx.eval(array)
        self.nbytes += array.nbytes
        return array

    def _load_vector(self, parameter: Parameter) -> mx.array:
        array = self._take(parameter.name, mx.float32 if parameter.kind is Kind.EXACT else self.dtype)
        _check_shape(parameter.name, array, parameter.shape)
        return array

    def _load_matrix(self, name: str, shape: tuple[int, ...]) -> Linear:
        if f"{name}.scales" not in self._tensors.names:
            weight = self._take(f"{name}.weight", self.dtype)
            _check_shape(f"{name}.weight", weight, shape)
            return Linear(weight)
        weight = self._take(f"{name}.weight", None)
        # MLX converts scales in every product unless activations have their type; the kernels for CPUs take any type.
        dtype = None if self._kernels.accepts_any_scale_dtype else self.dtype
        scales, biases = (self._take(f"{name}.{part}", dtype) for part in ("scales", "biases"))
        bits, group_size = quantization_of(f"resident weights: {name}", shape, weight.shape, scales.shape)
        _check_shape(f"{name}.biases", biases, scales.shape)
        if weight.dtype != mx.uint32 or scales.dtype != biases.dtype or scales.dtype not in _SCALES:
            types = ", ".join(str(part.dtype).rpartition(".")[2] for part in (weight, scales, biases))
            raise PackError(
                f"resident weights: {name} has weight, scales and biases of types {types}; the weight must be uint32, "
                "scales and biases one floating-point type; delete the pack and make it again",
                code="wrong_types",
            )
        if self._kernels.routed_experts_cpu is not None:  # kernels for CPUs read in place
            weight, scales, biases = map(align_to_cache_line, (weight, scales, biases))
        return Linear(weight, scales, biases, bits, group_size, None, self._kernels.products, self._kernels.embedding)


def _check_shape(name: str, array: mx.array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise PackError(f"resident weights: {name} has shape {list(array.shape)}, config.json needs {list(shape)}")
