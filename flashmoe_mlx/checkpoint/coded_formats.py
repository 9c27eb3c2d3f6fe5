"""Find block FP8, GPTQ and AWQ in a checkpoint, and describe their weights as dense or affine tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.checkpoint.coded import CodedTensor, Float8Matrix, IntegerMatrix, Tensors
from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import shown
from flashmoe_mlx.formats.record import GROUP_SIZES
from flashmoe_mlx.formats.safetensors_header import TensorInfo

_BLOCK = (128, 128)
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
_SCALE_TYPES = ("BF16", "F16", "F32", "F8_E8M0")
_SCALE = "_scale_inv"
_UNUSED = ("activation_scale", "input_scale")
"""Scales of activations, which are computed in full precision."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A format of codes that can be decoded.

    Attributes:
        method: "fp8", "gptq" or "awq".
        settings: the settings in ``config.json``.
    """

    method: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the format for people."""
        return {"fp8": "FP8 in blocks", "gptq": "GPTQ", "awq": "AWQ"}[self.method]

    def unreadable(self) -> str | None:
        """Return the variant of the format if it cannot be decoded, else None."""
        settings = self.settings
        if self.method == "fp8":
            form = settings.get("fmt", "e4m3")
            if form not in ("e4m3", "float8_e4m3fn"):
                return f"FP8 ({shown(form)})"
            block = settings.get("weight_block_size")
            if block is not None and not _is_block(block):
                return f"FP8 (weight_block_size {shown(block)})"
            return None
        bits = settings.get("bits", settings.get("w_bit", 4))
        if self.method == "awq":
            version = settings.get("version", "gemm")
            if not isinstance(version, str) or version.lower() != "gemm":
                return f"AWQ (version {shown(version)})"
            return None if bits == _AWQ_BITS else f"AWQ ({shown(bits)} bits)"
        form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if form not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
            return f"GPTQ (format {shown(form if form != 'gptq' else 'marlin')})"
        return None if bits in _GPTQ_BITS else f"GPTQ ({shown(bits)} bits)"

    def decoded(self, tensors: Tensors, where: str) -> dict[str, TensorInfo]:
        """Return ``tensors`` with decoded weights in place of codes.

        Args:
            tensors: the tensors of a checkpoint, by published name.
            where: the beginning of messages.

        Raises:
            CheckpointError: a part of a weight is missing, or has another shape or type than the weight needs.
        """
        find = self._floats if self.method == "fp8" else self._integers
        found: dict[str, TensorInfo] = {}
        used: set[str] = set()
        for names, made in find(tensors, where):
            used |= names
            found |= made
        return {name: tensor for name, tensor in tensors.items() if name not in used} | found

    def _floats(self, tensors: Tensors, where: str) -> Iterator[tuple[set[str], dict[str, TensorInfo]]]:
        block = self.settings.get("weight_block_size") or _BLOCK
        for name, tensor in tensors.items():
            scales = tensors.get(name + _SCALE)
            if tensor.dtype != "F8_E4M3" or scales is None or len(tensor.shape) < len(_BLOCK):
                continue
            rows, columns = block
            height, width = tensor.shape[-2:]
            grid = (*tensor.shape[:-2], -(-height // rows), -(-width // columns))
            if scales.shape not in (grid, (), (1,)) or scales.dtype not in _SCALE_TYPES:
                raise _wrong(where, name + _SCALE, scales, grid)
            names = {name, name + _SCALE, *(f"{name.rpartition('.')[0]}.{unused}" for unused in _UNUSED)}
            yield names, {name: CodedTensor.of(Float8Matrix(tensor, scales, (rows, columns)), "BF16", tensor.shape)}

    def _integers(self, tensors: Tensors, where: str) -> Iterator[tuple[set[str], dict[str, TensorInfo]]]:
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part == "qweight":
                matrix = self._integer_matrix(tensors, module, where)
                parts = ("qweight", "qzeros", "scales", "g_idx")
                yield {f"{module}.{own}" for own in parts}, dict(_described(module, matrix))

    def _integer_matrix(self, tensors: Tensors, module: str, where: str) -> IntegerMatrix:
        """Check the parts of a matrix; their shapes tell its sizes and the width of its codes."""
        for part in ("qzeros", "scales"):
            if f"{module}.{part}" not in tensors:
                raise CheckpointError(f"{where}: tensor {module}.{part} is missing", code="missing_tensor")
        codes, zeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        groups = tensors.get(f"{module}.g_idx")
        awq = self.method == "awq"
        if len(scales.shape) != len(_BLOCK) or scales.dtype not in _SCALE_TYPES[:3] or 0 in scales.shape:
            raise _wrong(where, f"{module}.scales", scales, ("groups", "out"))
        number, out = scales.shape
        bits = _AWQ_BITS if awq else zeros.shape[-1] * 32 // out if zeros.shape else 0
        words = out * bits // 32
        if zeros.shape != (number, words) or words * 32 != out * bits or bits not in _GPTQ_BITS or not _whole(zeros):
            raise _wrong(where, f"{module}.qzeros", zeros, (number, "out * bits / 32"))
        inputs = codes.shape[0] * (1 if awq else 32) // (1 if awq else bits) if codes.shape else 0
        wanted = (inputs, words) if awq else (inputs * bits // 32, out)
        if codes.shape != wanted or not inputs or not _whole(codes):
            raise _wrong(where, f"{module}.qweight", codes, ("in", words) if awq else ("in * bits / 32", out))
        if groups is not None and (groups.shape != (inputs,) or groups.dtype != "I32"):
            raise _wrong(where, f"{module}.g_idx", groups, (inputs,))
        if groups is None and inputs % number:
            raise _wrong(where, f"{module}.scales", scales, ("groups that divide the inputs", out))
        form = self.settings.get("checkpoint_format") or self.settings.get("format")
        added = 0 if awq or form == "gptq_v2" else 1
        ordered = groups is None or not self.settings.get("desc_act")
        return IntegerMatrix(codes, zeros, scales, groups, bits, added, awq, ordered)


def _described(module: str, matrix: IntegerMatrix) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the tensors of a matrix by name: in MLX's affine format if its groups allow, else dense."""
    out, inputs = matrix.shape
    dtype, group = matrix.scales.dtype, inputs // matrix.scales.shape[0]
    size = next((size for size in reversed(GROUP_SIZES) if group % size == 0), None)
    if not matrix.ordered or size is None or inputs % size:
        yield f"{module}.weight", CodedTensor.of(matrix, dtype, matrix.shape)
        return
    bits, repeats = matrix.bits, group // size
    yield f"{module}.weight", CodedTensor.of(matrix, "U32", (out, inputs * bits // 32), "weight", bits)
    for part in ("scales", "biases"):
        yield f"{module}.{part}", CodedTensor.of(matrix, dtype, (out, inputs // size), part, bits, repeats)


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list) and len(block) == len(_BLOCK) and all(type(size) is int and size > 0 for size in block)
    )


def _whole(tensor: TensorInfo) -> bool:
    return tensor.dtype in ("I32", "U32")


def _wrong(where: str, name: str, tensor: TensorInfo, wanted: tuple[object, ...]) -> CheckpointError:
    needed = ", ".join(map(str, wanted))
    return CheckpointError(
        f"{where}: tensor {name} has shape {list(tensor.shape)} and type {tensor.dtype}, which does not fit its "
        f"weight: expected [{needed}]",
        code="wrong_shape",
    )
