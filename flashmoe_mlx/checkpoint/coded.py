"""Weights that a checkpoint stores as codes of another package: block FP8, GPTQ and AWQ.

Sources of the formats: transformers ``integrations/finegrained_fp8.py`` (``weight_scale_inv``), AutoGPTQ and GPTQModel
(``qweight``, ``qzeros``, ``scales``, ``g_idx``), AutoAWQ ``WQLinear_GEMM``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.arrays import MLX_DTYPES, array_from, bytes_of
from flashmoe_mlx.formats.safetensors_header import TensorInfo, element_bytes

Read = Callable[[TensorInfo, int, int], bytearray]
"""Reads bytes of a tensor: (tensor, first byte, number of bytes)."""
Tensors = Mapping[str, TensorInfo]
"""Tensors by their published names."""
Floats = npt.NDArray[np.float32]
_AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)
"""The place in a word of AWQ of each of eight neighboring outputs."""
_WORD_BITS = 32


def _e4m3_values() -> Floats:
    """Return the value of each code of FP8 E4M3: 4 bits of exponent, no infinity, NaN where all bits are set."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, codes & 7
    sizes = np.where(exponents, np.ldexp(1 + fractions / 8, exponents - 7), np.ldexp(fractions / 8, -6))
    sizes[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -sizes, sizes).astype(np.float32)


_E4M3 = _e4m3_values()


class CodedMatrix(Protocol):
    """A matrix [out, in], or a stack of matrices whose rows follow each other, in codes."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The stored tensors."""
        ...

    def dense(self, read: Read, first: int, count: int) -> Floats:
        """Return ``count`` rows [count, in] from row ``first``, in the values that the codes stand for."""
        ...

    def affine(self, read: Read, first: int, count: int) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
        """Return the codes [count, in], and the scales and biases [count, groups], of rows in MLX's affine format.

        Only matrices with equal groups of neighboring inputs have such a form.
        """
        ...


@dataclass(frozen=True, slots=True)
class Float8Matrix:
    """FP8 E4M3 with a scale for each block.

    Attributes:
        weight: codes [..., out, in].
        scales: [..., blocks of rows, blocks of columns], or a single number for the whole matrix.
        block: rows and columns of a block; blocks at the ends may be smaller.
    """

    weight: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The stored tensors."""
        return self.weight, self.scales

    def dense(self, read: Read, first: int, count: int) -> Floats:
        """Return ``count`` rows [count, in] from row ``first``."""
        height, width = self.weight.shape[-2:]
        codes = np.frombuffer(read(self.weight, first * width, count * width), np.uint8).reshape(count, width)
        values: Floats = _E4M3[codes]
        scales = _floats(read, self.scales)
        if scales.size == 1:
            values *= scales.reshape(1, 1)
            return values
        rows, columns = self.block
        matrix, row = np.divmod(np.arange(first, first + count), height)
        of_rows = scales.reshape(-1, scales.shape[-1])[matrix * -(-height // rows) + row // rows]
        values *= np.repeat(of_rows, columns, axis=1)[:, :width]
        return values

    def affine(self, read: Read, first: int, count: int) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
        """Refuse: values are not equally spaced."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """Integer codes of GPTQ or AWQ: ``(code - zero) * scale``.

    Attributes:
        codes: ``qweight``: GPTQ packs neighboring inputs in words [in * bits / 32, out], AWQ outputs [in, out / 8].
        zeros: ``qzeros`` [groups, out * bits / 32].
        scales: ``scales`` [groups, out].
        groups: ``g_idx``, the group of each input; None where groups are neighboring inputs.
        bits: the width of a code.
        added: the number that is added to each stored zero.
        interleaved: whether words have AWQ's order.
        ordered: whether ``groups`` may only be the groups of neighboring inputs.
    """

    codes: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    groups: TensorInfo | None
    bits: int
    added: int
    interleaved: bool
    ordered: bool

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The stored tensors."""
        own = (self.codes, self.zeros, self.scales)
        return own if self.groups is None else (*own, self.groups)

    @property
    def shape(self) -> tuple[int, int]:
        """The dense shape [out, in]."""
        rows = self.codes.shape[0]
        inputs = rows if self.interleaved else rows * _WORD_BITS // self.bits
        return self.scales.shape[1], inputs

    def dense(self, read: Read, first: int, count: int) -> Floats:
        """Return ``count`` rows [count, in] from row ``first``."""
        codes, scales, zeros = self._rows(read, first, count)
        group = self._group(read)
        values: Floats = (codes.astype(np.float32) - zeros[:, group]) * scales[:, group]
        return values

    def affine(self, read: Read, first: int, count: int) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
        """Return the codes [count, in], and the scales and biases [count, groups], of rows."""
        self._group(read)
        codes, scales, zeros = self._rows(read, first, count)
        return codes, scales, -zeros * scales

    def _rows(self, read: Read, first: int, count: int) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
        """Return codes [count, in], scales and zeros [count, groups] of rows."""
        rows, inputs = slice(first, first + count), self.shape[1]
        scales = _floats(read, self.scales)[:, rows].T
        words, zeros = _words(read, self.codes), _words(read, self.zeros)
        if self.interleaved:
            return _interleaved(words, first, count).T, scales, _interleaved(zeros, first, count).T.astype(np.float32)
        codes = _unpacked(words[:, rows], self.bits, inputs).T
        unpacked = _unpacked(zeros.T, self.bits, self.shape[0])[rows]
        return codes, scales, ((unpacked.astype(np.int32) + self.added) % 2**self.bits).astype(np.float32)

    def _group(self, read: Read) -> npt.NDArray[np.int64]:
        """Return the group of each input.

        Raises:
            CheckpointError: a group does not exist, or the groups contradict ``desc_act``.
        """
        inputs, number = self.shape[1], self.scales.shape[0]
        neighbors = np.arange(inputs, dtype=np.int64) // -(-inputs // number)
        if self.groups is None:
            return neighbors
        found = np.frombuffer(read(self.groups, 0, self.groups.nbytes), np.int32).astype(np.int64)
        if found.min() < 0 or found.max() >= number:
            raise CheckpointError(f"{self.groups.shard}: g_idx names groups beyond the {number} that have scales")
        if self.ordered and not np.array_equal(found, neighbors):
            raise CheckpointError(
                f"{self.groups.shard}: g_idx orders inputs by their activations, but config.json states "
                "desc_act false; set desc_act to true there",
                code="contradicting_quantisation",
            )
        return found


@dataclass(frozen=True, slots=True)
class CodedTensor(TensorInfo):
    """A tensor that is decoded from codes when it is read.

    Attributes:
        matrix: the codes.
        part: "weight", "scales" or "biases" of MLX's affine format; "dense" for the decoded weight.
        bits: the width of the codes of "weight".
        repeats: the number of groups that each group of the codes becomes.
    """

    matrix: CodedMatrix
    part: str = "dense"
    bits: int = 0
    repeats: int = 1

    @classmethod
    def of(
        cls,
        matrix: CodedMatrix,
        dtype: str,
        shape: tuple[int, ...],
        part: str = "dense",
        bits: int = 0,
        repeats: int = 1,
    ) -> "CodedTensor":
        """Return the tensor; see the attributes of the class and of ``TensorInfo``."""
        nbytes = int(np.prod(shape, dtype=object)) * element_bytes(dtype)
        return cls(max(part.shard for part in matrix.parts), dtype, shape, 0, nbytes, matrix, part, bits, repeats)

    @property
    def shards(self) -> set[str]:
        """The names of the shards that hold its codes."""
        return {part.shard for part in self.matrix.parts}

    def read(self, read: Read, start: int, nbytes: int) -> bytearray:
        """Decode ``nbytes`` bytes from byte ``start``."""
        width = self.shape[-1] * element_bytes(self.dtype)
        first, count = self._rows(start, nbytes)
        skipped = start - first * width
        return bytearray(bytes_of(self._decoded(read, first, count))[skipped : skipped + nbytes])

    def exact(self, read: Read, start: int, nbytes: int) -> Floats:
        """Return the dense rows [rows, in] of the matrix to which bytes from ``start`` belong, without rounding."""
        return self.matrix.dense(read, *self._rows(start, nbytes))

    def _rows(self, start: int, nbytes: int) -> tuple[int, int]:
        width = self.shape[-1] * element_bytes(self.dtype)
        first = start // width
        return first, -(-(start + nbytes) // width) - first

    def _decoded(self, read: Read, first: int, count: int) -> mx.array:
        if self.part == "dense":
            return mx.array(self.matrix.dense(read, first, count)).astype(MLX_DTYPES[self.dtype])
        codes, scales, biases = self.matrix.affine(read, first, count)
        if self.part == "weight":
            return mx.array(_packed(codes, self.bits))
        groups = np.repeat(scales if self.part == "scales" else biases, self.repeats, axis=1)
        return mx.array(groups).astype(MLX_DTYPES[self.dtype])


def shards_of(tensor: TensorInfo) -> set[str]:
    """Return the names of the shards that hold the bytes of ``tensor``."""
    return tensor.shards if isinstance(tensor, CodedTensor) else {tensor.shard}


def _floats(read: Read, tensor: TensorInfo) -> Floats:
    """Return a tensor of a float type in f32; F8_E8M0 holds powers of two."""
    data = read(tensor, 0, tensor.nbytes)
    if tensor.dtype == "F8_E8M0":
        exponents = np.frombuffer(data, np.uint8).astype(np.int32) - 127
        return np.ldexp(np.float32(1), exponents).astype(np.float32).reshape(tensor.shape)
    return np.array(array_from(data, tensor.dtype, tensor.shape).astype(mx.float32))


def _words(read: Read, tensor: TensorInfo) -> npt.NDArray[np.uint32]:
    return np.frombuffer(read(tensor, 0, tensor.nbytes), np.uint32).reshape(tensor.shape)


def _unpacked(words: npt.NDArray[np.uint32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Return the first ``count`` codes [count, columns] of each column of ``words`` [words, columns].

    Codes follow each other from the least significant bit on, also across words.
    """
    word, shift = np.divmod(np.arange(count) * bits, _WORD_BITS)
    codes: npt.NDArray[np.uint32] = words[word] >> shift.astype(np.uint32)[:, None]
    (split,) = np.nonzero(shift + bits > _WORD_BITS)
    codes[split] |= words[word[split] + 1] << (_WORD_BITS - shift[split]).astype(np.uint32)[:, None]
    return (codes & ((1 << bits) - 1)).astype(np.uint8)


def _interleaved(words: npt.NDArray[np.uint32], first: int, count: int) -> npt.NDArray[np.uint8]:
    """Return codes [rows, count] from output ``first`` of words [rows, out / 8] of AWQ."""
    start, end = first // 8, -(-(first + count) // 8)
    codes = ((words[:, start:end, None] >> (4 * _AWQ_PLACES)) & 15).astype(np.uint8)
    whole: npt.NDArray[np.uint8] = codes.reshape(len(words), -1)
    return whole[:, first - 8 * start :][:, :count]


def _packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Return ``codes`` [rows, in] as words [rows, in * bits / 32], least significant bit first."""
    single = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(single.reshape(len(codes), -1), axis=-1, bitorder="little").view(np.uint32)
