"""Reports of long steps: none from a short one, and the current activity as soon as a step is long."""

import time
from pathlib import Path
from typing import Any

import pytest

import flashmoe_mlx
from flashmoe_mlx import engine as engine_module
from flashmoe_mlx import progress
from flashmoe_mlx.progress import report, reports_to


def test_a_short_step_reports_nothing() -> None:
    heard: list[str] = []
    with reports_to(heard.append, after=60):
        report("reading")
    report("nobody listens")
    assert heard == []


def test_a_long_step_reports_its_activity_and_then_each_one() -> None:
    heard: list[str] = []
    with reports_to(heard.append, after=0.05):
        report("opening")
        report("reading")
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
        for number in range(100):
            report(f"checking: {number}")
    assert heard == ["reading", "checking: 0"]


def test_a_system_without_threads_has_no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(progress.Timer, "start", refuse)
    heard: list[str] = []
    with reports_to(heard.append, after=0):
        report("reading")
    assert heard == []


def test_a_load_says_what_it_does(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "reports_to", lambda listener: progress.reports_to(listener, after=0))
    heard: list[str] = []
    real = engine_module.check_model

    def slow(*arguments: Any, **options: Any) -> object:
        time.sleep(0.2)
        return real(*arguments, **options)

    monkeypatch.setattr(engine_module, "check_model", slow)
    with flashmoe_mlx.load(tiny_pack, "resident", on_load=heard.append):
        pass
    assert any(line.startswith(("reading", "checking kernels")) for line in heard)
