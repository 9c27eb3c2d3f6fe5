"""The header of a safetensors file (https://github.com/huggingface/safetensors#format).

The header is untrusted. ``read_header`` checks that every tensor lies inside its file and has as many bytes as its
shape and type need.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from flashmoe_mlx.errors import CheckpointError
from flashmoe_mlx.formats.fields import shown
from flashmoe_mlx.formats.untrusted import parse_object

_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 16
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


def element_bytes(dtype: str) -> int:
    """Return the size of an element of the type with the safetensors name ``dtype``."""
    return _DTYPE_BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a shard.

    Attributes:
        shard: file name of the shard.
        dtype: safetensors name of the element type.
        shape: sizes of the dimensions.
        begin: first byte, counted from the start of the data of the shard.
        nbytes: size in bytes.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Return the tensors of the safetensors file ``path`` by name, and the byte at which its data starts.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is truncated, or its header is not valid.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing or not a regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: not a complete safetensors file{_pointer(path, size)}")
            header = parse_object(file.read(length).decode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise CheckpointError(f"{path}: its safetensors header is damaged") from None
    _check_metadata(path, header.pop("__metadata__", None))
    tensors = {name: tensor_info(path, name, entry) for name, entry in header.items()}
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.nbytes)):
        if tensor.begin != end:
            raise CheckpointError(f"{path}: its tensors overlap or leave gaps")
        end += tensor.nbytes
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: {size} bytes long, but its header needs {8 + length + end}")
    return tensors, 8 + length


def _pointer(path: Path, size: int) -> str:
    """Return the end of the message for a pointer of git-lfs; empty if ``path`` is something else."""
    small = size < 1024 and path.read_bytes().startswith(b"version https://git-lfs")
    return ", but a pointer of git-lfs (git lfs pull fetches the file itself)" if small else ""


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:  # absent, or null, which MLX writes
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: its __metadata__ does not map names to strings")


def tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    """Check the entry of the tensor ``name`` in the header of ``path``.

    Raises:
        CheckpointError: the entry is not valid; code "unsupported_tensor_type" for an unknown element type.
    """

    def refuse(problem: str, code: str | None = None) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {shown(name)}: {problem}", code=code)

    if not name.isprintable():
        raise refuse("its name has characters that cannot be shown")
    if not isinstance(entry, Mapping):
        raise refuse("its entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        # A newer version of the format may have this type: the file is not damaged, and a new download would not help.
        raise refuse(f"type {shown(dtype)} is not supported", "unsupported_tensor_type" if dtype else None)
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS:
        raise refuse("its shape or offsets are not short lists of natural numbers")
    nbytes = math.prod(shape) * _DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != nbytes:
        raise refuse(f"{offsets[1] - offsets[0]} bytes do not hold shape {shape} of {dtype}")
    return TensorInfo(path.name, dtype, tuple(shape), offsets[0], nbytes)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
