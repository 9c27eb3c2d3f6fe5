"""The instruction sets for products of vectors with quantized matrices, chosen by measurement."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.checks import ROUNDED_TOLERANCE, TOLERANCE
from flashmoe_mlx.custom_kernels.expert_format import PROJECTIONS
from flashmoe_mlx.custom_kernels.native.fastest import Contest, Memory, Trial
from flashmoe_mlx.custom_kernels.quantized_matvec.cpu import products
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.custom_kernels.weights import QuantizedWeight
from flashmoe_mlx.formats.record import AFFINE

_BYTES = 2**22
"""Largest matrix of a call in bytes; larger matrices only repeat the same work."""
_MULTIPLICATIONS = 2**27
"""Most multiplications of a call: one to three milliseconds on two cores."""
_MANY = 128
"""Vectors of a call with many vectors."""
_CHECKED_ROWS = 32
_PAIRS = "avx512_bf16"
"""The instruction set for products of pairs in bf16."""


@dataclass(frozen=True)
class Form:
    """A matrix [rows, columns] as the kernels see it."""

    rows: int
    columns: int
    bits: int
    group_size: int
    dtype: mx.Dtype

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return self.columns * self.bits // 8 + 2 * self.columns // self.group_size * self.dtype.size


def forms(model: ModelShapes) -> Iterator[Form]:
    """Yield the forms of the model's matrices in MLX's affine format that the extension supports.

    Matrices in mxfp4 take the instructions of the affine format of their width.
    """
    matrices = [weight for projection in model.projections for weight in projection.weights]
    matrices += [matrix for shared in model.shared for matrix in shared.matrices]
    for weight in matrices:
        if (
            weight.mode == AFFINE
            and native.supports_weight(weight)
            and weight.scales is not None
            and weight.bits
            and weight.group_size
        ):
            rows, groups = weight.scales.shape
            yield Form(rows, groups * weight.group_size, weight.bits, weight.group_size, weight.scales.dtype)
    for expert in model.experts:
        for projection in PROJECTIONS:
            own = expert.format_of(projection)
            if own.mode == AFFINE and native.supports_matrix(own.bits, own.group_size, own.dtype):
                yield Form(*expert.shape(projection), own.bits, own.group_size, own.dtype)


def contests(of: Iterable[Form], activations: str = "f32") -> Iterator[Contest]:
    """Yield the contests for one, several and many vectors, for every width and group size, on the largest such matrix.

    Many vectors are rounded to ``activations``, a member of ``native.ACTIVATIONS``. Of vectors in bf16, ``avx512_bf16``
    multiplies pairs, and the other instruction sets multiply as floats, which is faster on CPUs with a slow
    instruction for pairs. The portable instruction set takes part only where there is no other.
    """
    largest: dict[tuple[int, int], Form] = {}
    for form in of:
        known = largest.get((form.bits, form.group_size))
        if known is None or form.rows * form.row_bytes > known.rows * known.row_bytes:
            largest[form.bits, form.group_size] = form
    extension = native.loaded()
    candidates = [name for name in extension.instruction_sets() if name != "portable"] or ["portable"]
    number = native.ACTIVATIONS.index(activations)
    for (bits, group_size), form in sorted(largest.items()):
        for vectors in (1, 4, _MANY):
            in_pairs = [_PAIRS] if vectors == _MANY and activations == "bf16" else []
            phrases = ", ".join(filter(None, native.tokens_phrases(vectors, activations)))
            yield Contest(
                f"instructions for {phrases}, {bits} bits in groups of {group_size}",
                [*candidates, *in_pairs],
                partial(extension.use_for_products, vectors, number, bits, group_size),
                partial(_trial, form, vectors, activations),
            )


def _trial(form: Form, vectors: int, activations: str, memory: Memory) -> Trial:
    rows = max(1, min(form.rows, _BYTES // form.row_bytes, _MULTIPLICATIONS // (vectors * form.columns)))
    x = RandomInputs(mx.float32, 0).normal(vectors, form.columns)
    mx.eval(x)
    calls: list[Callable[[], mx.array]] = []
    offset, expected = 0, None
    groups = form.columns // form.group_size
    while not calls or offset + 2 * rows * form.row_bytes < memory.nbytes:
        codes, offset = memory.place(offset, (rows, form.columns * form.bits // 32), mx.uint32)
        scales, offset = memory.place(offset, (rows, groups), form.dtype)
        biases, offset = memory.place(offset, (rows, groups), form.dtype)
        weight = QuantizedWeight(codes, scales, biases, form.bits, form.group_size)
        calls.append(partial(_product, x, weight, activations))
        if expected is None:
            few = [part[:_CHECKED_ROWS] for part in (codes, scales, biases)]
            expected = x @ QuantizedWeight(few[0], few[1], few[2], form.bits, form.group_size).dense().T
            mx.eval(expected)
    assert expected is not None
    rounded = activations != "f32" and vectors > native.few_tokens()
    return Trial(calls, expected, ROUNDED_TOLERANCE if rounded else TOLERANCE[mx.float32])


def _product(x: mx.array, weight: QuantizedWeight, activations: str) -> mx.array:
    return products(x, [weight], None, activations)[0]
