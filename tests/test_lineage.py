"""The places in files of tensors that a model rearranges, compared with the tensors that MLX computes."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_mlx.adapters.lineage import Joined, Region, UntraceableError, pieces_of, row, trace
from flashmoe_mlx.formats.safetensors_header import TensorInfo, read_header

Tensors = dict[str, mx.array]
EXPERTS = 4


def gate_up(tensors: Tensors) -> Tensors:
    gate, up = mx.split(tensors["gate_up"], 2, axis=1)
    return {"gate": gate, "up": up, "down": tensors["down"].reshape(EXPERTS, 6, 16)}


def stacked(tensors: Tensors) -> Tensors:
    return {"w1": mx.stack([tensors[f"{expert}.w1"] for expert in range(EXPERTS)])}


def joined_by_rows(tensors: Tensors) -> Tensors:
    both = [mx.concatenate([tensors[f"{expert}.w1"], tensors["row"]]) for expert in range(EXPERTS)]
    return {"both": mx.stack(both), "parts": mx.stack(both)[:, 3:9]}


def interleaved(tensors: Tensors) -> Tensors:
    return {"gate": tensors["gate_up"][:, ::2], "up": mx.unflatten(tensors["gate_up"], 1, (-1, 2))[:, :, 1]}


def transposed(tensors: Tensors) -> Tensors:
    return {"again": tensors["gate_up"].swapaxes(1, 2).transpose(0, 2, 1)}


FUNCTIONS = (gate_up, stacked, joined_by_rows, interleaved, transposed)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lineage") / "model.safetensors"
    mx.random.seed(0)
    tensors = {f"{expert}.w1": mx.random.normal((8, 16)) for expert in range(EXPERTS)}
    tensors |= {"gate_up": mx.random.normal((EXPERTS, 12, 16)).astype(mx.bfloat16), "row": mx.random.normal((2, 16))}
    mx.save_safetensors(str(path), tensors | {"down": mx.random.normal((EXPERTS, 96))})
    return path


def typed(file: Path) -> dict[str, tuple[TensorInfo, mx.Dtype]]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return {name: (info, loaded[name].dtype) for name, info in read_header(file)[0].items()}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_places_hold_the_bytes_that_mlx_computes(file: Path, function: Callable[[Tensors], Tensors]) -> None:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    expected = function(dict(loaded))
    nodes = trace(function, typed(file), list(expected))
    data, start = file.read_bytes(), read_header(file)[1]
    for name, array in expected.items():
        node = nodes[name]
        assert not isinstance(node, str), node
        assert node.shape == array.shape
        for expert in range(EXPERTS):
            pieces = pieces_of(row(node, expert))
            found = b"".join(data[start + info.begin + at :][:size] for info, at, size in pieces)
            assert found == bytes(memoryview(mx.contiguous(array[expert]).view(mx.uint8)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda tensors: {"x": tensors["down"] * 2}, "computed"),
        (lambda tensors: {"x": tensors["down"].astype(mx.float16)}, "computed"),
        (lambda tensors: {"x": mx.zeros((EXPERTS, 3))}, "computed"),
        (lambda tensors: {"x": tensors["down"] + float(tensors["down"].sum().item())}, "cannot list"),
    ],
)
def test_computed_tensors_have_no_place(file: Path, function: Callable[[Tensors], Tensors], reason: str) -> None:
    found = trace(function, typed(file), ["x"])["x"]
    assert isinstance(found, str)
    assert reason in found


def test_columns_of_a_matrix_lie_apart() -> None:
    whole = Region.whole(TensorInfo("shard", "F32", (2, 5000, 3), 0, 120_000))
    with pytest.raises(UntraceableError, match="apart"):
        pieces_of(whole.on(lambda array: array.transpose(0, 2, 1)[0]))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_a_row_of_joined_tensors_is_a_row_of_one_of_them(sizes: list[int], data: st.DataObject) -> None:
    parts = [Region.whole(TensorInfo(str(place), "F32", (size, 2), 0, size * 8)) for place, size in enumerate(sizes)]
    index = data.draw(st.integers(0, sum(sizes) - 1))
    ((tensor, at, size),) = pieces_of(row(Joined(0, parts), index))
    ends = np.cumsum(sizes)
    place = int(np.searchsorted(ends, index, side="right"))
    assert (tensor.shard, at, size) == (str(place), (index - (ends[place] - sizes[place])) * 8, 8)
