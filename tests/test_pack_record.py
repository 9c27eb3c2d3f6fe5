"""Record layouts equal those of flash-moe at the published geometries, and add up at any geometry."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_mlx.errors import PackError
from flashmoe_mlx.formats.record import DTYPE_BYTES, GROUP_SIZES, QUANTIZED_BITS, MatrixFormat, RecordLayout

PARTS = [f"{projection}.{part}" for projection in ("gate", "up", "down") for part in ("weight", "scales", "biases")]


@pytest.mark.parametrize(
    ("bits", "record_bytes", "offsets", "shapes"),
    [
        (
            4,
            7_077_888,
            [0, 2097152, 2228224, 2359296, 4456448, 4587520, 4718592, 6815744, 6946816],
            [(1024, 512), (1024, 64), (1024, 64)] * 2 + [(4096, 128), (4096, 16), (4096, 16)],
        ),
        (
            2,
            3_932_160,
            [0, 1048576, 1179648, 1310720, 2359296, 2490368, 2621440, 3670016, 3801088],
            [(1024, 256), (1024, 64), (1024, 64)] * 2 + [(4096, 64), (4096, 16), (4096, 16)],
        ),
    ],
)
def test_397b_records_equal_the_records_of_flash_moe(
    bits: int, record_bytes: int, offsets: list[int], shapes: list[tuple[int, int]]
) -> None:
    layout = RecordLayout.uniform(hidden_size=4096, intermediate_size=1024, bits=bits, group_size=64, dtype="BF16")
    assert layout.record_bytes == layout.payload_bytes == record_bytes
    assert [component.name for component in layout.components] == PARTS
    assert [component.offset for component in layout.components] == offsets
    assert [component.shape for component in layout.components] == shapes
    assert [component.dtype for component in layout.components] == ["U32", "BF16", "BF16"] * 3


def test_35b_records() -> None:
    assert RecordLayout.uniform(2048, 512, 4, 64, "BF16").record_bytes == 1_769_472


@st.composite
def layouts(draw: st.DrawFn) -> RecordLayout:
    formats = []
    for _ in range(3):
        bits = draw(st.sampled_from((None, *QUANTIZED_BITS)))
        group_size = None if bits is None else draw(st.sampled_from(GROUP_SIZES))
        formats.append(MatrixFormat(bits, group_size, draw(st.sampled_from(("BF16", "F16", "F32")))))
    whole = max(form.group_size or 1 for form in formats)
    hidden, inner = (draw(st.integers(1, 200)) * whole for _ in range(2))
    return RecordLayout(hidden, inner, *formats)


@given(layouts())
def test_components_follow_each_other_and_add_up(layout: RecordLayout) -> None:
    end = 0
    for component in layout.components:
        assert component.offset == end
        assert component.nbytes == component.shape[0] * component.shape[1] * DTYPE_BYTES[component.dtype]
        end += component.nbytes
    weights = 3 * layout.hidden_size * layout.intermediate_size
    expected = 0
    for form in layout.formats:
        if form.bits is None:
            expected += weights // 3 * DTYPE_BYTES[form.dtype]
        else:
            assert form.group_size is not None
            scales = 2 * (weights // 3 // form.group_size) * DTYPE_BYTES[form.dtype]
            expected += weights // 3 * form.bits // 8 + scales
    assert layout.payload_bytes == end == expected
    assert layout.record_bytes % 16384 == 0
    assert 0 <= layout.record_bytes - layout.payload_bytes < 16384


@pytest.mark.parametrize(
    ("sizes", "fact"),
    [
        ((64, 64, 7, 64, "BF16"), "7-bit"),
        ((64, 64, 4, 48, "BF16"), "group size 48"),
        ((64, 64, 4, None, "BF16"), "group size None"),
        ((96, 64, 4, 64, "BF16"), "rows of 96"),
        ((64, 96, 4, 64, "BF16"), "rows of 96"),
        ((64, 64, 4, 64, "I8"), "type I8"),
    ],
)
def test_unsupported_layouts_are_refused(sizes: tuple[int, int, int, int, str], fact: str) -> None:
    with pytest.raises(PackError) as caught:
        RecordLayout.uniform(*sizes)
    assert caught.value.code == "unsupported_layout"
    assert fact in str(caught.value)
