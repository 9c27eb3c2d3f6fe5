"""``task=tune`` keeps the fastest configuration, which ``backend=auto`` then takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.research import tuning
from flashmoe_mlx.research.bench.engine_bench import Configuration, Plan, Trial
from flashmoe_mlx.research.tuning import Tuned, TunedFile, candidates, search
from flashmoe_mlx.stores.memory import GIB


def settings(*labels: str) -> list[Configuration]:
    return [Configuration(label, {"_target_": label}, None, "none") for label in labels]


def test_the_result_is_taken_by_auto(tiny_pack: Path, tmp_path: Path) -> None:
    common = [f"model.path={tiny_pack}", f"model.cache_dir={tmp_path}"]
    tuned = ["task=tune", *common, "backend=pread", "backend.threads=2", "prefetch=early_router", "tokens=3"]
    assert run_command_line([*tuned, f"hydra.run.dir={tmp_path / 'tune'}"]) == 0
    record = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert record["best"]["prefetch"] == "early_router"
    run = [*common, "backend=auto", "raw=true", "prompt=Hello", "max_tokens=2", f"hydra.run.dir={tmp_path / 'run'}"]
    assert run_command_line(run) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["backend"]["threads"], metrics["prefetch"]) == (2, "early_router")


def test_the_faster_half_runs_longer_and_the_finalists_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, plans = {"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0}, []

    def ran(plan: Plan, _: object, __: object, failures: dict[str, str]) -> list[Trial]:
        plans.append(([setting.label for setting in plan.settings], plan.tokens, plan.rounds))
        failures["d"] = "broken"
        return [
            Trial(setting.label, "rotating", number, "", 0.0, "", (), (1 / rates[setting.label],), {})
            for number in range(plan.rounds)
            for setting in plan.settings
            if setting.label not in failures
        ]

    monkeypatch.setattr(tuning, "run_trials", ran)
    plan = Plan(Path(), settings(*rates), ["rotating"], ["x", "y"], True, 8, 1, "auto")
    best, rate, _ = search(plan, 60, str, {})
    assert (best.label, rate) == ("b", pytest.approx(4.0))
    assert plans == [(["a", "b", "c", "d"], 8, 1), (["b", "c"], 16, 2)]
    with pytest.raises(FlashMoeError) as caught:
        search(replace(plan, settings=settings("d")), 60, str, {})
    assert caught.value.code == "nothing_ran"


def test_results_of_another_machine_or_version_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tuned = TunedFile(tmp_path / "tuned.json"), Tuned.now(settings("pread")[0], 2.0)
    file.put(tmp_path, None, 4, tuned)
    assert file.get(tmp_path, None, 4) == tuned
    assert file.get(tmp_path, None, 2) is file.get(tmp_path, "q2", 4) is None
    with monkeypatch.context() as context:
        context.setattr(tuning, "machine_identity", lambda: {"cores": -1})
        assert file.get(tmp_path, None, 4) is None
    (tmp_path / "tuned.json").write_text("{")
    assert file.get(tmp_path, None, 4) is None


def test_candidates_fit_into_memory() -> None:
    names: Any = lambda size: {each.label.split()[0] for each in candidates(None, None, size, 8 * GIB)}  # noqa: E731
    assert names(7 * GIB) == {"resident", "mmap", "pread"}
    assert "resident" not in names(9 * GIB)
    budgets = [each.backend.get("budget_gib", 0) for each in candidates(None, None, 9 * GIB, 8 * GIB)]
    assert max(budgets) <= 8


@pytest.mark.parametrize("keys", [["prefetch=none"], ["tokens=1"], ["backend=pread", "memory_gib=4"]])
def test_keys_without_effect_are_refused(keys: list[str], tiny_pack: Path, tmp_path: Path) -> None:
    common = [f"model.path={tiny_pack}", f"model.cache_dir={tmp_path}", f"hydra.run.dir={tmp_path}"]
    assert run_command_line(["task=tune", *common, *keys]) == 2
