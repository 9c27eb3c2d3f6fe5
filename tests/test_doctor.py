"""``task=doctor`` reports every kernel, and fails when one does."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from flashmoe_mlx.config import Config
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.tasks import doctor
from flashmoe_mlx.custom_kernels import cases as kernel_cases

MATVEC = partial(kernel_cases.quantised_matvec, 32, 128, on_cpu=True)


def wrong(dtype: mx.Dtype) -> kernel_cases.Case:
    case = MATVEC(dtype)
    return replace(case, custom=lambda: (case.custom()[0] * 1.1,))


def broken(dtype: mx.Dtype) -> kernel_cases.Case:
    def fail() -> kernel_cases.Results:
        raise RuntimeError("no such device\nlong log")

    return replace(MATVEC(dtype), custom=fail)


def test_a_table_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_cases", lambda *_: iter([("tiny", MATVEC)]))
    doctor.run(Config(), tmp_path)
    shown = capsys.readouterr()
    assert "| quantised_matvec | 32x128 4 bit g64 T=1 | tiny | float32 |" in shown.out + shown.err
    record = json.loads((tmp_path / "doctor.json").read_text())
    (finding,) = record["findings"]
    assert finding["passed"]
    assert finding["error"] <= finding["accepted"]
    assert finding["microseconds"] > 0
    assert finding["mlx_microseconds"] > 0
    assert record["kernels"].startswith("kernels for CPUs (")


@pytest.mark.parametrize(("make", "reason"), [(wrong, "FAILED: over 1e-05"), (broken, "no such device")])
def test_what_fails_is_named_and_recorded(
    make: partial[kernel_cases.Case],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "_cases", lambda *_: iter([("tiny", MATVEC), ("tiny", make)]))
    with pytest.raises(FlashMoeError, match=r"1 of 2 checks failed: quantised_matvec \(32x128"):
        doctor.run(Config(), tmp_path)
    shown = capsys.readouterr()
    assert reason in shown.out + shown.err
    assert [one["passed"] for one in json.loads((tmp_path / "doctor.json").read_text())["findings"]] == [True, False]


def test_the_cases_cover_every_kernel() -> None:
    operations = {make(mx.float32).operation for name, make in doctor._cases(on_gpu=False, on_cpu=True)}
    assert operations == {"routed_experts", "gated_delta_net", "attention", "quantised_matvec"}
