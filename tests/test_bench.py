"""task=bench: order of the trials, summaries, refused arguments, and resumed runs."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from pack_oracle import assert_one_line
from test_generation import checkpoint

from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.writer import add_variants
from flashmoe_mlx.research.bench import engine_bench as bench
from flashmoe_mlx.research.bench.engine_bench import Configuration, Plan, Trial, run_trials
from flashmoe_mlx.research.bench.engine_summary import summarize
from flashmoe_mlx.stores.contract import ExpertReadError
from flashmoe_mlx.tasks.shared.backend_list import listed_backends

FAST = ["raw=true", "prompt=Hello", "tokens=4"]


def make_trial(setting: str, number: int, seconds: float, condition: str = "cold", **changes: Any) -> Trial:
    stage = {
        "seconds": 2 * seconds, "tokens": 2, "bytes_read": 100, "bytes_wasted": 20, "hits": 1, "misses": 3,
        "sampled_bytes": 8, "sampled_cached_bytes": 6, "fetch_seconds": 3.0, "overlapped_seconds": 1.0,
        "experts_requested": 4, "prefetched": 1, "tokens_per_second": 1 / seconds, "read_gb_per_second": 2.0,
        "weights_gb_per_second": 3.0, "phase_seconds": {"compute": seconds, "io": seconds},
    }  # fmt: skip
    record = {
        "experts_k": 4,
        "decode": stage,
        "prefill": stage,
        "guesses": {"predicted": 8, "right": 6},
        "time_to_first_token": 0.5,
    }
    made = Trial(setting, condition, number, "Hello", 0.0, "pack/q4", (1, 2, 3), (seconds, seconds), record)
    return replace(made, **changes)


@pytest.fixture
def plan(tiny_pack: Path) -> Plan:
    settings = [
        Configuration(label, backend, 2, "none") for label, backend in listed_backends(["pread", "mmap"], {}).items()
    ]
    return Plan(tiny_pack, settings, ["cold", "warm", "rotating"], ["Hi", "Yes"], True, 3, 2, "auto")


def test_the_order_is_reversed_in_every_second_round(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench,
        "_run",
        lambda _, configuration, condition, number: make_trial(configuration.label, number, 1.0, condition),
    )
    ran = list(run_trials(plan, [], str, {}))
    assert [trial.setting for trial in ran] == ["pread", "mmap"] * 3 + ["mmap", "pread"] * 3
    assert [trial.condition for trial in ran] == ["cold", "cold", "warm", "warm", "rotating", "rotating"] * 2
    again = list(run_trials(plan, ran[:5], str, {}))
    assert [trial.place for trial in again] == [trial.place for trial in ran[5:]]


def test_prompts_and_evictions_of_each_condition(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial evicts first; a warm trial then continues the measured prompt, a rotating trial the other prompt."""
    events: list[str] = []
    original = bench.evict

    def evict(paths: Sequence[Path]) -> None:
        events.append("evict")
        original(paths)

    generate = bench._generate

    def generated(engine: Any, prompt: str, plan: Plan) -> list[int]:
        events.append(prompt)
        return generate(engine, prompt, plan)

    monkeypatch.setattr(bench, "evict", evict)
    monkeypatch.setattr(bench, "_generate", generated)
    ran = list(run_trials(replace(plan, settings=plan.settings[:1]), [], str, {}))
    assert " ".join(events) == ("evict Hi evict Hi Hi evict Yes Hi evict Yes evict Yes Yes evict Hi Yes")
    cold, warm, rotating = ran[:3]
    assert cold.cached == 0
    assert warm.cached > 0
    assert rotating.cached > 0
    assert [len(trial.token_ids) for trial in ran] == [3] * 6
    assert [len(trial.decode_steps) for trial in ran] == [2] * 6
    assert cold.token_ids == warm.token_ids == rotating.token_ids


def test_different_tokens_are_an_error(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: Plan, configuration: Configuration, condition: str, number: int) -> Trial:
        return make_trial(
            configuration.label, number, 1.0, condition, token_ids=(1, 2, 3 if configuration.label == "pread" else 4)
        )

    monkeypatch.setattr(bench, "_run", wrong)
    with pytest.raises(FlashMoeError) as caught:
        list(run_trials(plan, [], str, {}))
    assert caught.value.code == "different_tokens"
    assert_one_line(caught.value)


def test_different_experts_may_lead_to_different_tokens(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Plan, configuration: Configuration, condition: str, number: int) -> Trial:
        pread = configuration.label == "pread"
        return make_trial(
            configuration.label,
            number,
            1.0,
            condition,
            token_ids=(1, 2 if pread else 3),
            experts=f"pack/{configuration.label}",
        )

    monkeypatch.setattr(bench, "_run", run)
    assert len(list(run_trials(plan, [], str, {}))) == 12


def test_a_prompt_that_fills_the_context_is_a_failure(plan: Plan) -> None:
    full = replace(plan, settings=plan.settings[:1], conditions=["cold"], prompts=["x" * TINY.max_context])
    failures: dict[str, str] = {}
    assert list(run_trials(full, [], str, failures)) == []
    assert "the prompt fills the context of 256 tokens" in failures["pread"]


def test_trials_are_greedy_despite_published_sampling(plan: Plan, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", settings={"do_sample": True, "repetition_penalty": 1.3})
    settings = [replace(plan.settings[0], backend={"_target_": "flashmoe_mlx.backends.checkpoint.CheckpointStore"})]
    (trial,) = run_trials(
        replace(plan, folder=folder, settings=settings, conditions=["cold"], rounds=1), [], str, failures := {}
    )
    assert not failures
    assert trial.record["sampling"]["description"] == "greedy"


def test_a_failed_configuration_is_skipped_afterwards(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Plan, configuration: Configuration, condition: str, number: int) -> Trial:
        if configuration.label == "mmap" and condition == "warm":
            raise ExpertReadError(Path("x"), 1, 2, 3, "broken")
        return make_trial(configuration.label, number, 1.0, condition)

    monkeypatch.setattr(bench, "_run", run)
    failures: dict[str, str] = {}
    ran = list(run_trials(plan, [], str, failures))
    assert [trial.place for trial in ran if trial.setting == "mmap"] == [("mmap", "cold", 0)]
    assert [trial.setting for trial in ran].count("pread") == 6
    assert failures == {"mmap": "warm, round 1: cannot read layer 1 expert 2: x at byte 3: broken"}


def test_summaries_hold_medians_intervals_and_ratios() -> None:
    trials = [make_trial("a", n, 1.0) for n in range(4)] + [make_trial("b", n, 0.5 + n / 10) for n in range(4)]
    first, second = summarize(trials)
    assert (first.setting, first.rounds, first.tokens_per_second, first.ratio) == ("a", 4, 1.0, 1.0)
    assert first.interval == (1.0, 1.0)
    assert second.tokens_per_second == pytest.approx((1 / 0.6 + 1 / 0.7) / 2)
    assert second.ratio == second.tokens_per_second
    assert second.ratio_interval is not None
    assert second.ratio_interval[0] < second.ratio < second.ratio_interval[1]
    assert first.step_ms == (1000, 1000, 1000)
    assert (first.bytes_per_token, first.wasted_bytes_per_token, first.hit_rate) == (50, 10, 0.25)
    assert (first.page_cache_hit_rate, first.io_hidden) == (0.75, 0.25)
    assert (first.accuracy, first.prefetched) == (0.75, pytest.approx(1 / 3))
    assert first.shares == {"compute": 0.5, "io": 0.5}
    assert summarize([make_trial("a", 0, 1.0)])[0].interval is None


@pytest.fixture(scope="module")
def recorded(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run with two values of every list. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("recorded")
    arguments = [
        f"model.path={tiny_pack}", f"hydra.run.dir={folder}", "task=bench", *FAST, "rounds=1", "experts_ks=[2,4]",
        "backends=[pread,{name:pread,direct:true}]", "prefetches=[none,next_router]",
    ]  # fmt: skip
    assert run_command_line(arguments) == 0
    return folder


@pytest.fixture
def record(recorded: Path) -> dict[str, Any]:
    """The record of that run."""
    return json.loads((recorded / "bench.json").read_text())


def test_every_combination_is_recorded_and_drawn(record: dict[str, Any], recorded: Path) -> None:
    settings = [
        f"{b} K={k} {p}" for k in (2, 4) for b in ("pread", "pread direct=true") for p in ("none", "next_router")
    ]
    assert [trial["setting"] for trial in record["passes"]] == settings * 2
    assert [(summary["setting"], summary["condition"]) for summary in record["summary"]] == [
        (setting, condition) for condition in ("cold", "warm") for setting in settings
    ]
    for trial in record["passes"]:
        assert trial["record"]["decode"]["tokens"] == 3
        assert (trial["record"]["guesses"] is None) == (trial["record"]["prefetch"] == "none")
    assert (recorded / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert record["environment"]["cores"]


@pytest.mark.thorough
def test_resuming_keeps_earlier_rounds(
    record: dict[str, Any], recorded: Path, tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"model.path={tiny_pack}", "task=bench", *FAST, "experts_ks=[2,4]", f"resume={recorded}"]
    arguments += ["backends=[pread,{name:pread,direct:true}]", "prefetches=[none,next_router]"]
    assert run_command_line([*arguments, "rounds=2", "plot=false", f"hydra.run.dir={tmp_path / 'second'}"]) == 0
    later = json.loads((tmp_path / "second" / "bench.json").read_text())
    assert later["passes"][:16] == record["passes"]
    assert [trial["round"] for trial in later["passes"]] == [0] * 16 + [1] * 16
    assert not (tmp_path / "second" / "bench.png").exists()
    capsys.readouterr()
    assert run_command_line([*arguments, "tokens=5", f"hydra.run.dir={tmp_path / 'third'}"]) == 2
    assert "that run had different tokens; only rounds= may change" in capsys.readouterr().err
    shutil.copytree(recorded, tmp_path / "used")
    assert run_command_line([*arguments, f"hydra.run.dir={tmp_path / 'used'}"]) == 2
    assert "holds the record of another run" in capsys.readouterr().err


def test_two_bits_and_four_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import TINY

    from flashmoe_mlx.made_models.synthetic import synthetic_pack

    folder = synthetic_pack("tiny", TINY, tmp_path).folder
    add_variants(open_pack(folder), [2])
    run_dir = tmp_path / "run"
    arguments = [f"model.path={folder}", f"hydra.run.dir={run_dir}", "experiment=two_bit", *FAST, "rounds=1"]
    assert run_command_line([*arguments, "conditions=[warm]"]) == 0
    first, second, *_ = json.loads((run_dir / "bench.json").read_text())["summary"]
    assert second["setting"] == "pack2"
    assert second["bytes_per_token"] < 0.6 * first["bytes_per_token"]


@pytest.mark.parametrize("policy", ["lru", pytest.param("lfu", marks=pytest.mark.thorough)])
def test_a_larger_cache_reads_less(policy: str, tiny_pack: Path, tmp_path: Path) -> None:
    """More slots never mean more reads, and each budget has an effect, up to the whole model in memory."""
    source = open_model(tiny_pack).variant(None)
    column, experts = source.layout.bytes_in_all_layers, source.num_experts
    counts = [2, 6, experts, experts + 4]
    listed = ",".join(f"{{name:ram_hybrid,policy:{policy},budget_gib:{count * column / 2**30!r}}}" for count in counts)
    arguments = [f"backends=[{listed}]", "conditions=[rotating]", "rounds=1", "tokens=12", "plot=false"]
    common = ["task=bench", f"model.path={tiny_pack}", f"hydra.run.dir={tmp_path}", "raw=true", "prompt=Hello"]
    assert run_command_line([*common, *arguments]) == 0
    stages = [one["record"]["decode"] for one in json.loads((tmp_path / "bench.json").read_text())["passes"]]
    read = [stage["bytes_read"] for stage in stages]
    assert read == sorted(read, reverse=True)
    assert read[2] < read[1] < read[0]
    assert read[2] == read[3]  # nothing to gain beyond all experts
    hits = [stage["hits"] for stage in stages]
    assert hits == sorted(hits)
    assert 0 < hits[0] < hits[-1]
    assert all(stage["hits"] + stage["misses"] == stages[0]["hits"] + stages[0]["misses"] for stage in stages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens=0"], "tokens=0: must be at least 1"),
        (["rounds=0"], "rounds=0: must be at least 1"),
        (["conditions=[hot]"], "conditions=[hot]: choose from cold, warm, rotating"),
        (["conditions=[]"], "conditions=[]: choose from"),
        (
            ["conditions=[rotating]", "prompts=[a]"],
            "prompts= needs at least one text, or two for conditions=[rotating]",
        ),
        (["backends=[pread,pread]"], "backends: pread is repeated"),
        (["backends=[]"], "backends=[]: name at least one"),
        (["backends=[pred]"], "backend=pred: no such backend"),
        (["backends=[{threads:3}]"], "is neither a name nor a mapping"),
        (["backends=[pread,pack2]"], "pack2: "),
        (["backends=[pack2]", "skip_unavailable=true"], "no configuration can run here: pack2: "),
        (["experts_ks=[2,2]"], "a value is repeated"),
        (["experts_ks=[2,99]"], "experts_k=99: there are 16 experts"),
        (["backends=[{name:pread,thread:3}]"], "backend.thread: no such option"),
        (["prefetches=[oracle]"], "prefetch=oracle: unknown policy"),
        (["memory_gib=0"], "memory_gib=0: must be more than 0 and less than"),
        (["memory_gib=100000"], "memory_gib=100000: must be"),
        (["memory_gib=0.0001"], "memory_gib=0.0001: too small for this model, which needs at least 0.04"),
        (["resume=/nowhere"], "resume=/nowhere: no readable record"),
        (["experts_ks=2"], "experts_ks=2: must be a list such as [4,2]"),
    ],
)
@pytest.mark.sampled(8)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: list[str], message: str, tiny_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_command_line([f"model.path={tiny_pack}", f"hydra.run.dir={tmp_path}", "task=bench", *FAST, *arguments])
    shown = capsys.readouterr().err.strip()
    assert message in shown
    assert shown.count("\n") == 0
    assert code == 2
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(
    "experiment",
    # "tune" is a sweep of task=tune, which needs the extra "sweep"; "cluster" needs Ray (test_remote_jobs.py).
    sorted({path.stem for path in (Path(__file__).parents[1] / "configs/experiment").iterdir()} - {"tune", "cluster"}),
)
@pytest.mark.sampled(1)
def test_every_experiment_runs(experiment: str, tiny_pack: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={tiny_pack}", f"hydra.run.dir={tmp_path}", f"+experiment={experiment}", *FAST, "rounds=1"]
    assert run_command_line([*arguments, "tokens=2", "plot=false"]) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["passes"]


def test_a_missing_matplotlib_is_reported(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    arguments = [f"model.path={tiny_pack}", f"hydra.run.dir={tmp_path}", "task=bench", *FAST, "conditions=[warm]"]
    assert run_command_line([*arguments, "rounds=1"]) == 0
    assert "no plot: a figure needs the extra research: pip install 'flashmoe_mlx[research]'" in capsys.readouterr().err


def test_an_empty_record_is_not_resumed(tiny_pack: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    arguments = [f"model.path={tiny_pack}", f"hydra.run.dir={tmp_path / 'run'}", "task=bench", *FAST]
    assert run_command_line([*arguments, f"resume={tmp_path}"]) == InputError.exit_code


def test_one_token_measures_the_prompt() -> None:
    trials = [make_trial(label, 0, seconds, decode_steps=()) for label, seconds in (("a", 2.0), ("b", 1.0))]
    first, second = summarize(trials)
    assert (first.stage, first.tokens_per_second, second.tokens_per_second, second.ratio) == ("prefill", 0.5, 1.0, 2.0)
    assert first.step_ms == (4000, 4000, 4000)
    assert first.bytes_per_token == 50
    assert summarize([make_trial("a", 0, 1.0)])[0].stage == "decode"


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        "{}",
        '{"setup": [], "passes": []}',
        '{"setup": {}, "passes": 3}',
        '{"setup": {}, "passes": [3]}',
        '{"setup": {}, "passes": [{"token_ids": 5}]}',
        "\udcff",
    ],
)
def test_damaged_records_are_not_resumed(damage: str, tiny_pack: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_bytes(damage.encode(errors="surrogateescape"))
    run_dir = tmp_path / "run"
    arguments = [f"model.path={tiny_pack}", f"hydra.run.dir={run_dir}", "task=bench", *FAST, f"resume={tmp_path}"]
    assert run_command_line(arguments) == 2
    assert json.loads((run_dir / "failure.json").read_text())["code"] == "invalid_record"


def test_trials_without_measurements_are_not_resumed(record: dict[str, Any], tiny_pack: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={tiny_pack}", "task=bench", *FAST, "experts_ks=[2,4]", f"resume={tmp_path}"]
    arguments += ["backends=[pread,{name:pread,direct:true}]", "prefetches=[none,next_router]"]
    for number, change in enumerate(({"record": {}}, {"decode_steps": [None]}, {"cached": "x"})):
        passes = [{**record["passes"][0], **change}, *record["passes"][1:]]
        (tmp_path / "bench.json").write_text(json.dumps({**record, "passes": passes}))
        assert run_command_line([*arguments, "rounds=1", f"hydra.run.dir={tmp_path / str(number)}"]) == 2


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ("experts_ks=[]", "empty_list"),
        ("prefetches=[]", "empty_list"),
        ("conditions=[cold,cold]", "repeated_value"),
        ("experts_ks=[2,2]", "repeated_value"),
        ("prefetches=[none,none]", "repeated_value"),
        ("conditions=[]", "unknown_choice"),
        ("backends=[]", "empty_list"),
        ("backends=[pread,pread]", "repeated_value"),
    ],
)
def test_lists_are_checked(argument: str, code: str, tiny_pack: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={tiny_pack}", f"hydra.run.dir={tmp_path}", "task=bench", *FAST, argument]
    assert run_command_line(arguments) == 2
    assert json.loads((tmp_path / "failure.json").read_text())["code"] == code
