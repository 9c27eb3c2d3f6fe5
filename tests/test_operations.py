"""Operations are found by their folders, including the example in docs/extend/operation.md."""

import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from gpu_on_cpu import Launches
from systems import needs_linux

from flashmoe_mlx import custom_kernels
from flashmoe_mlx.custom_kernels import ModelShapes, check_kernels, choose, operations

ROOT = Path(__file__).parents[1]
MODEL = ModelShapes(mx.float32, 200, (), (), (), (), (), 1, 1, 1)


def block_of_document(language: str, word: str) -> str:
    """Return the block of code in ``language`` that contains ``word``."""
    text = (ROOT / "docs" / "extend" / "operation.md").read_text()
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return next(textwrap.dedent(block) for block in blocks if word in block)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the example's folder beside those of the other operations."""
    folder = tmp_path / "soft_cap"
    folder.mkdir()
    (folder / "__init__.py").write_text(block_of_document("python", "OPERATION = Operation("))
    (folder / "body.h").write_text(block_of_document("cpp", "tanh"))
    monkeypatch.setattr(custom_kernels, "__path__", [*custom_kernels.__path__, str(tmp_path)])
    yield
    name = f"{custom_kernels.__name__}.soft_cap"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(custom_kernels, "soft_cap", raising=False)


def test_the_operations_of_the_package() -> None:
    found = operations()
    assert set(found) == {
        "add_rows",
        "attention",
        "attention_batch",
        "choose_experts",
        "chosen_experts",
        "dense_experts",
        "embedding",
        "expert_mlp",
        "gated_delta_net",
        "gated_delta_net_batch",
        "gather_rows",
        "normed_matvec",
        "quantized_matvec",
        "rms_norm",
        "routed_experts",
    }


def test_two_operations_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_copy").mkdir()
    (tmp_path / "a_copy" / "__init__.py").write_text("from flashmoe_mlx.custom_kernels.attention import OPERATION\n")
    monkeypatch.setattr(custom_kernels, "__path__", [*custom_kernels.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match="attention"):
        operations()
    sys.modules.pop(f"{custom_kernels.__name__}.a_copy", None)


@pytest.mark.usefixtures("example")
def test_the_example_runs_by_mlx_on_a_cpu() -> None:
    x = mx.array([[-100.0, 0.5, 100.0]])
    expected = 30 * np.tanh(np.array(x) / 30)
    for preference in ("auto", "mlx", "reference"):
        kernels = choose(preference)
        np.testing.assert_allclose(np.array(kernels.implementations["soft_cap"](x, 30.0)), expected, rtol=1e-6)
        name = "reference" if preference == "reference" else "mx.tanh"
        assert check_kernels(kernels, MODEL).names["soft_cap"] == name


@needs_linux
@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("device", [gpu_on_cpu.metal, gpu_on_cpu.cuda])
def test_the_example_runs_its_kernel_on_a_gpu(device: Callable[..., AbstractContextManager[Launches]]) -> None:
    with device(mx.float32) as launches:
        kernels = choose("auto")
        report = check_kernels(kernels, MODEL)
        assert report.replaced == []
        assert {report.names[f"soft_cap: {tokens}"] for tokens in ("one token", "several tokens")} == {
            "custom kernel soft_cap"
        }
        launches.clear()
        x = mx.random.normal((3, 300), scale=60.0, key=mx.random.key(0))
        y = kernels.implementations["soft_cap"](x, 30.0)
        assert launches == {"soft_cap_body": 1}
        np.testing.assert_allclose(np.array(y), 30 * np.tanh(np.array(x) / 30), rtol=1e-5, atol=1e-5)
