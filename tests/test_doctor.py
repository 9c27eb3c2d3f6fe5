"""``task=doctor`` reports every kernel, and fails when one does."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_on_cpu
import mlx.core as mx
import pytest

from flashmoe_mlx.custom_kernels import cases
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.research import decode_probe
from flashmoe_mlx.research.decode_probe import DecodeFinding
from flashmoe_mlx.tasks import doctor

MATVEC = partial(cases.quantized_matvec, 32, 128, on_cpu=True)


def wrong(dtype: mx.Dtype) -> cases.Case:
    case = MATVEC(dtype)
    return replace(case, custom=lambda: (case.custom()[0] * 1.1,))


def broken(dtype: mx.Dtype) -> cases.Case:
    def fail() -> cases.Results:
        raise RuntimeError("no such device\nlong log")

    return replace(MATVEC(dtype), custom=fail)


def test_a_table_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_cases", lambda *_: iter([("tiny", MATVEC)]))
    doctor.run(doctor.Config(), tmp_path)
    shown = capsys.readouterr()
    assert "| quantized_matvec | 32x128 4 bit g64 T=1 | tiny | float32 |" in shown.out + shown.err
    assert "9.0 waits a token, - dispatches a token" in shown.out + shown.err  # eight layers and the logits
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert record["decoding"]["milliseconds"] > 0
    (finding,) = record["findings"]
    assert finding["passed"]
    assert finding["error"] <= finding["accepted"]
    assert finding["microseconds"] > 0
    assert finding["mlx_microseconds"] > 0
    assert record["kernels"].startswith("kernels for CPUs (")


@pytest.mark.parametrize(("make", "reason"), [(wrong, "FAILED: over 1e-05"), (broken, "no such device")])
def test_failed_checks_are_named_and_recorded(
    make: partial[cases.Case],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "_cases", lambda *_: iter([("tiny", MATVEC), ("tiny", make)]))
    monkeypatch.setattr(doctor, "measure_decoding", lambda: DecodeFinding(1.0, 1.0, 7))
    with pytest.raises(FlashMoeError) as caught:
        doctor.run(doctor.Config(), tmp_path)
    assert caught.value.code == "kernels_failed"
    assert "quantized_matvec (32x128" in str(caught.value)
    shown = capsys.readouterr()
    assert reason in shown.out + shown.err
    assert [finding["passed"] for finding in json.loads((tmp_path / "doctor.json").read_text())["findings"]] == [
        True,
        False,
    ]


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, pytest.param(gpu_on_cpu.cuda, marks=pytest.mark.thorough)])
def test_decode_steps_on_an_emulated_gpu(device: Any, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wait a token. Emulated kernels run at once, so the graph has only what follows the last one."""
    monkeypatch.setattr(decode_probe, "demo_folder", lambda: tiny_pack)
    monkeypatch.setattr(decode_probe, "_TOKENS", 6)
    monkeypatch.setattr(decode_probe, "_SKIPPED", 2)
    with device():
        found = decode_probe.measure_decoding()
    assert found.waits == 1
    assert found.dispatches is not None


def test_dispatches_are_counted_in_the_graph() -> None:
    x = mx.zeros((4, 4))
    mx.eval(x)
    assert decode_probe.count_dispatches(mx.exp(x + x).reshape(-1)[:3]) == 2
    assert decode_probe.count_dispatches(x.T, mx.exp(x), x * 2) == 2


def test_the_cases_cover_every_kernel() -> None:
    operations = {make(mx.float32).operation for name, make in doctor._cases(on_gpu=False, on_cpu=True)}
    assert operations == {"routed_experts", "gated_delta_net", "attention", "quantized_matvec"}


def test_it_runs_after_the_plain_install(tmp_path: Path) -> None:
    """README's install brings neither pytest nor hypothesis."""
    script = """
import sys
sys.modules["pytest"] = sys.modules["_pytest"] = sys.modules["hypothesis"] = None
from functools import partial
from flashmoe_mlx.custom_kernels import cases
from flashmoe_mlx.tasks import doctor
doctor._cases = lambda *_: iter([("tiny", partial(cases.quantized_matvec, 32, 128, on_cpu=True))])
from flashmoe_mlx.__main__ import main
sys.exit(main(["task=doctor"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| quantized_matvec | 32x128 4 bit g64 T=1 | tiny | float32 |" in done.stdout + done.stderr


def test_only_the_testing_package_imports_test_dependencies() -> None:
    root = Path(__file__).parent.parent
    files = [
        path for folder in ("flashmoe_mlx", "backends", "custom_kernels") for path in (root / folder).rglob("*.py")
    ]
    assert len(files) > 100
    found = [
        f"{path.relative_to(root)}: {name}"
        for path in files
        if "testing" not in path.parts
        for name in _imported(ast.parse(path.read_text()))
        if name.split(".")[0] in ("pytest", "hypothesis") or name.startswith("flashmoe_mlx.testing")
    ]
    assert found == []


def _imported(tree: ast.AST) -> list[str]:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return names + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
