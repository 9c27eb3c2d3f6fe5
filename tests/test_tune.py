"""``task=tune`` keeps the fastest configuration, which ``backend=auto`` then takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import MissingConfigException

from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.cli.error_reports import message
from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.research import tuning
from flashmoe_mlx.research.bench.engine_bench import Configuration, Plan, Trial
from flashmoe_mlx.research.tuning import Tuned, TunedFile, candidates, search
from flashmoe_mlx.stores.memory import GIB
from flashmoe_mlx.stores.registry import AUTO, backend_settings
from flashmoe_mlx.tasks.shared import automatic
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.keys import ModelChoice


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


@pytest.mark.parametrize(("options", "kept"), [({"budget_gib": 5.0}, 5.0), ({"memory_share": 0.7}, None)])
def test_slots_leave_memory_to_the_prompt_cache(
    options: dict[str, float], kept: float | None, tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt cache takes memory from the slots of a result; without any left, the speed model chooses."""
    settings = {**backend_settings("ram_hybrid"), **options}
    k = open_model(tiny_pack).config.experts_per_token
    TunedFile(tmp_path / "tuned.json").put(
        tiny_pack, None, k, Tuned.now(Configuration("tuned", settings, None, "early_router"), 2.0)
    )
    for module, name in ((automatic, "available_memory"), (automatic, "usable_memory"), (tuning, "available_memory")):
        monkeypatch.setattr(module, name, lambda: 8 * GIB)
    monkeypatch.setattr(automatic, "machine_profile", lambda _: pytest.fail("the speed model chooses"))

    def budget(prompt_cache_gib: float) -> float:
        choice = ModelChoice(cache_dir=str(tmp_path))
        return float(chosen_backend({"_target_": AUTO}, tiny_pack, choice, None, prompt_cache_gib)["budget_gib"] or 0)

    assert budget(0) == (kept or 0)
    assert 3.5 < budget(4.0) < 4
    assert budget(4.0) == pytest.approx(budget(3.5) - 0.5)
    with pytest.raises(pytest.fail.Exception, match="the speed model chooses"):
        budget(8.0)


def test_a_model_in_memory_needs_room_for_all_experts() -> None:
    tuned = Tuned.now(Configuration("resident", backend_settings("resident"), None, "none"), 2.0)
    assert tuned.within(room=9, least=1, expert_bytes=9) == tuned
    assert tuned.within(room=8, least=1, expert_bytes=9) is None
    tuned = Tuned.now(Configuration("pread", backend_settings("pread"), None, "none"), 2.0)
    assert tuned.within(room=0, least=1, expert_bytes=9) == tuned


def test_a_missing_sweeper_names_its_extra() -> None:
    error = MissingConfigException("no config", "hydra/sweeper/optuna", ["basic"])
    assert "flashmoe_mlx[sweep]" in message(error)


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")  # those of Optuna and its libraries
def test_optuna_searches(tiny_pack: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra sweep")
    keys = [f"model.path={tiny_pack}", f"model.cache_dir={tmp_path}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    keys += ["tokens=2", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1"]
    assert run_command_line(["-m", "experiment=tune", *keys]) == 0
    rates = [json.loads(path.read_text())["tokens_per_second"] for path in tmp_path.glob("sweep/*/tune.json")]
    tuned = TunedFile(tmp_path / "tuned.json").get(tiny_pack, None, open_model(tiny_pack).config.experts_per_token)
    assert tuned is not None
    assert len(rates) == 2
    assert tuned.tokens_per_second == max(rates)


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
