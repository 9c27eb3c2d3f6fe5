"""Write ``resident.safetensors``, all weights but the routed experts, shard by shard at offsets known in advance."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import xxhash

from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.checkpoint.coded import CodedTensor, shards_of
from flashmoe_mlx.checkpoint.resident import Matrix, ResidentTensor
from flashmoe_mlx.checkpoint.tensors import CheckpointTensors
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.arrays import array_from, bytes_of
from flashmoe_mlx.formats.files import write_exactly
from flashmoe_mlx.formats.record import AFFINE, FLOAT_MODES
from flashmoe_mlx.formats.safetensors_header import element_bytes
from flashmoe_mlx.models.parameters import quantization_of
from flashmoe_mlx.pack.inspection import all_finite
from flashmoe_mlx.pack.quantize import quantize

_BLOCK_BYTES = 32 * 2**20
_CODES = mx.array([12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0], mx.uint8)
"""Twice the value of each code of mxfp4, plus 12."""


@dataclass(frozen=True, slots=True)
class _Output:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * element_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class _Job:
    """A source tensor and its outputs.

    ``bits`` and ``group_size`` if it is quantized, else None; ``matrix`` if it is in one of MLX's float modes.
    """

    source: ResidentTensor
    outputs: tuple[_Output, ...]
    bits: int | None = None
    group_size: int | None = None
    matrix: Matrix | None = None


class ResidentPlan:
    """The place of every resident tensor in the file.

    Dense matrices are quantized to ``bits`` in groups of ``group_size``, or kept if ``bits`` is None.
    """

    def __init__(self, tensors: CheckpointTensors, bits: int | None, group_size: int) -> None:
        self._jobs: list[_Job] = []
        self._end = 0
        self._settings = bits, group_size
        self._coded = [matrix for matrix in tensors.matrices if isinstance(matrix.weight.source, CodedTensor)]
        for matrix in tensors.matrices:
            self._add_matrix(matrix, bits, group_size)
        for tensor in (*tensors.vectors, *tensors.kept):
            self._copy(tensor)
        self._header = self._make_header()

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> _Output:
        output = _Output(name, dtype, shape, self._end)
        self._end += output.nbytes
        return output

    def _copy(self, tensor: ResidentTensor) -> None:
        # 1 + w needs more precision than w has, and the tensor is small.
        dtype = "F32" if tensor.add_one else tensor.source.dtype
        self._jobs.append(_Job(tensor, (self._place(tensor.name, dtype, tensor.shape),)))

    def _add_matrix(self, matrix: Matrix, bits: int | None, group_size: int) -> None:
        rows, columns = matrix.shape
        if matrix.mode != AFFINE:
            self._add_floats(matrix)
            return
        if not _is_quantized(matrix, bits, group_size):
            for part in matrix.parts:
                self._copy(part)
            return
        assert bits is not None
        bits = max(bits, matrix.least_bits)
        dtype, groups = matrix.weight.source.dtype, (rows, columns // group_size)
        outputs = (
            self._place(f"{matrix.name}.weight", "U32", (rows, columns * bits // 32)),
            self._place(f"{matrix.name}.scales", dtype, groups),
            self._place(f"{matrix.name}.biases", dtype, groups),
        )
        self._jobs.append(_Job(matrix.weight, outputs, bits, group_size))

    def _add_floats(self, matrix: Matrix) -> None:
        """Place a matrix in one of MLX's float modes; see ``without_floats``."""
        assert matrix.scales is not None
        if matrix.weight.source.shard != matrix.scales.source.shard:
            raise CheckpointError(
                f"{matrix.name}: its weight and its scales in {matrix.mode} lie in two files, which cannot be packed; "
                "run the checkpoint as it is, with backend=checkpoint",
                code="unsupported_format",
            )
        rows, columns = matrix.shape
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {"weight": ("BF16", (rows, columns))}
        if matrix.mode == "mxfp4":
            groups = ("BF16", matrix.scales.shape)
            shapes = {"weight": ("U32", (rows, columns // 4)), "scales": groups, "biases": groups}
        outputs = tuple(self._place(f"{matrix.name}.{part}", *entry) for part, entry in shapes.items())
        self._jobs.append(_Job(matrix.weight, outputs, matrix=matrix))

    def _make_header(self) -> bytes:
        entries = {
            output.name: {
                "dtype": output.dtype,
                "shape": list(output.shape),
                "data_offsets": [output.offset, output.offset + output.nbytes],
            }
            for job in self._jobs
            for output in job.outputs
        }
        text = json.dumps({"__metadata__": {"format": "mlx"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """The size of the finished file in bytes."""
        return len(self._header) + self._end

    @property
    def shards(self) -> tuple[str, ...]:
        """The shards that hold resident tensors, in order."""
        return tuple(sorted({job.source.source.shard for job in self._jobs}))

    def needs(self, shard: str) -> set[str]:
        """Return the shards that ``write_shard`` reads: codes and their scales may lie in several."""
        return set().union(*(shards_of(job.source.source) for job in self._of(shard)))

    def errors(self, checkpoint: Checkpoint, shard: str) -> dict[str, list[float]]:
        """Return the relative errors of the decoded matrices in ``shard``, by the last part of their names."""
        found: dict[str, list[float]] = {}
        for matrix in self._coded:
            if matrix.weight.source.shard == shard:
                name = matrix.name.rpartition(".")[2]
                found.setdefault(name, []).append(_error(checkpoint, matrix, *self._settings))
        return found

    def shard_bytes(self, shard: str) -> int:
        """Return the number of bytes that ``write_shard`` writes."""
        return sum(output.nbytes for job in self._of(shard) for output in job.outputs)

    def _of(self, shard: str) -> Sequence[_Job]:
        return [job for job in self._jobs if job.source.source.shard == shard]

    def write_shard(self, checkpoint: Checkpoint, shard: str, path: Path, progress: Callable[[int], None]) -> None:
        """Write the tensors of ``shard`` into the file at ``path`` and sync it; one block is in memory at a time.

        Args:
            checkpoint: the checkpoint.
            shard: the name of its shard.
            path: the file, which other shards may have written before.
            progress: receives the number of bytes of each block.

        Raises:
            CheckpointError: a tensor holds NaN or infinity.
        """
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            write_exactly(fd, self._header, 0)
            for job in self._of(shard):
                for output, start, data in _blocks(checkpoint, job):
                    _refuse_not_finite(checkpoint, job, data, output.dtype)
                    write_exactly(fd, data, len(self._header) + output.offset + start)
                    progress(len(data))
            os.fsync(fd)
        finally:
            os.close(fd)

    def shard_hash(self, shard: str, path: Path) -> str:
        """Return the XXH3 hash of the header of ``path`` and its tensors from ``shard``; it may be truncated."""
        digest = xxhash.xxh3_64()
        with path.open("rb") as file:
            digest.update(file.read(len(self._header)))
            for job in self._of(shard):
                for output in job.outputs:
                    file.seek(len(self._header) + output.offset)
                    for start in range(0, output.nbytes, _BLOCK_BYTES):
                        digest.update(file.read(min(_BLOCK_BYTES, output.nbytes - start)))
        return digest.hexdigest()


def read_resident(checkpoint: Checkpoint, tensor: ResidentTensor) -> mx.array:
    """Read a resident tensor in the form that the model uses; in f32 if 1 had to be added."""
    array = array_from(_read(checkpoint, tensor, 0, tensor.nbytes), tensor.source.dtype, tensor.shape)
    return array.astype(mx.float32) + 1.0 if tensor.add_one else array


def _read(checkpoint: Checkpoint, tensor: ResidentTensor, start: int, nbytes: int) -> bytearray:
    """Read ``nbytes`` bytes from byte ``start`` of ``tensor``, as they are published."""
    data = bytearray()
    for first, count in tensor.places(start, nbytes):
        data += checkpoint.read(tensor.source, first, count)
    return data


def without_floats(checkpoint: Checkpoint, matrix: Matrix) -> dict[str, mx.array]:
    """Read a matrix in one of MLX's float modes in a form that every kernel supports, without rounding.

    The values of mxfp4 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 times a power of two, and their negatives: with half of that
    scale they are code - 12, where the codes are 0 to 24, in MLX's affine format of 8 bits. The values of nvfp4 and
    mxfp8 have few enough digits for bf16.

    Returns:
        The tensors of the matrix by name: weight, scales and biases; or the dense weight in bf16.
    """
    assert matrix.scales is not None
    weight, scales = read_resident(checkpoint, matrix.weight), read_resident(checkpoint, matrix.scales)
    if matrix.mode != "mxfp4":
        bits, group_size = FLOAT_MODES[matrix.mode]
        dense = mx.dequantize(weight, scales, None, group_size, bits, matrix.mode, dtype=mx.bfloat16)
        return {f"{matrix.name}.weight": dense}
    pairs = weight.view(mx.uint8)
    codes = mx.stack([_CODES[pairs & 15], _CODES[pairs >> 4]], -1).reshape(matrix.shape).view(mx.uint32)
    halves = mx.power(mx.array(2.0), scales.astype(mx.float32) - 128)
    return {
        f"{matrix.name}.weight": codes,
        f"{matrix.name}.scales": halves.astype(mx.bfloat16),
        f"{matrix.name}.biases": (-12 * halves).astype(mx.bfloat16),
    }


def _blocks(checkpoint: Checkpoint, job: _Job) -> Iterator[tuple[_Output, int, memoryview]]:
    """Yield pieces of the outputs of a job: (output, first byte in it, data)."""
    source, nbytes = job.source, job.source.nbytes
    if job.matrix is not None:
        arrays = without_floats(checkpoint, job.matrix)
        for output in job.outputs:
            yield output, 0, bytes_of(arrays[output.name])
        return
    if job.bits is None:
        (output,) = job.outputs
        if job.source.add_one:
            yield output, 0, bytes_of(read_resident(checkpoint, job.source))
            return
        for start in range(0, nbytes, _BLOCK_BYTES):
            yield output, start, memoryview(_read(checkpoint, source, start, min(_BLOCK_BYTES, nbytes - start)))
        return
    assert job.group_size is not None
    rows, columns = source.shape
    row_bytes, dtype = nbytes // rows, source.source.dtype
    step = max(1, _BLOCK_BYTES // row_bytes)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        data = _read(checkpoint, source, row * row_bytes, count * row_bytes)
        _refuse_not_finite(checkpoint, job, data, dtype)  # MLX quantizes a NaN to an ordinary number
        dense = array_from(data, dtype, (count, columns))
        for output, made in zip(job.outputs, quantize(dense, job.bits, job.group_size), strict=True):
            yield output, row * (output.nbytes // rows), bytes_of(made)


def _is_quantized(matrix: Matrix, bits: int | None, group_size: int) -> bool:
    """Return whether a matrix in MLX's affine mode is quantized to ``bits`` bits, rather than copied."""
    return matrix.scales is None and bits is not None and matrix.shape[1] % group_size == 0


def _error(checkpoint: Checkpoint, matrix: Matrix, bits: int | None, group_size: int) -> float:
    """Return the relative error of a matrix in the form in which it is packed; a block is in memory at a time."""
    source = matrix.weight.source
    assert isinstance(source, CodedTensor)
    difference = total = 0.0
    step = max(1, _BLOCK_BYTES // (4 * matrix.shape[1]))
    for row in range(0, matrix.shape[0], step):
        count = min(step, matrix.shape[0] - row)
        parts = [_row_block(checkpoint, part, row, count) for part in matrix.parts]
        if _is_quantized(matrix, bits, group_size):
            assert bits is not None
            width = max(bits, matrix.least_bits)
            made = _dequantized(quantize(parts[0], width, group_size), width, group_size)
        elif matrix.scales is None:
            made = parts[0]
        else:
            shapes = matrix.shape, matrix.weight.shape, matrix.scales.shape
            made = _dequantized(parts, *quantization_of(matrix.name, *shapes))
        row_bytes = matrix.weight.nbytes // matrix.shape[0]
        places = matrix.weight.places(row * row_bytes, count * row_bytes)
        exact = np.concatenate([source.exact(checkpoint.read, *place) for place in places])
        difference += float(np.square(np.array(made.astype(mx.float32)) - exact).sum(dtype=np.float64))
        total += float(np.square(exact).sum(dtype=np.float64))
    return math.sqrt(difference / total) if total else math.sqrt(difference)


def _dequantized(parts: Sequence[mx.array], bits: int, group_size: int) -> mx.array:
    weight, scales, biases = parts
    return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)


def _row_block(checkpoint: Checkpoint, tensor: ResidentTensor, row: int, count: int) -> mx.array:
    """Read ``count`` rows of a tensor from row ``row``."""
    row_bytes = tensor.nbytes // tensor.shape[0]
    data = _read(checkpoint, tensor, row * row_bytes, count * row_bytes)
    return array_from(data, tensor.source.dtype, (count, *tensor.shape[1:]))


def _refuse_not_finite(checkpoint: Checkpoint, job: _Job, data: bytearray | memoryview, dtype: str) -> None:
    if not all_finite(data, dtype):
        path = checkpoint.folder / job.source.source.shard
        raise CheckpointError(
            f"{path}: {job.source.name} holds NaN or infinity: the file or the published model is damaged; compare "
            "the file's checksum with that on the hub",
            code="not_finite",
        )
