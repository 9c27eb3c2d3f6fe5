"""The speed model, sizes of models, estimates, the probe, and task=estimate."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY
from huggingface_hub.errors import HFValidationError
from pack_oracle import assert_one_line
from tiny_checkpoints import GEOMETRIES, write_checkpoint

from flashmoe_mlx.checkpoint import hub
from flashmoe_mlx.checkpoint.published import is_plain_name, known_config, published_configs
from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.custom_kernels import choose
from flashmoe_mlx.engine import load
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.made_models.synthetic import synthetic_config
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.registry import parse_config
from flashmoe_mlx.research.estimate import probe as probe_module
from flashmoe_mlx.research.estimate.automatic import choose_backend
from flashmoe_mlx.research.estimate.machine_profile import (
    AHEAD,
    HALF,
    MEMORY,
    WAYS,
    MachineProfile,
    Point,
    machine_identity,
)
from flashmoe_mlx.research.estimate.prediction import Machine, Model, estimates, what_ifs
from flashmoe_mlx.research.estimate.probe import EXPERTS, probe
from flashmoe_mlx.research.estimate.probe_models import SIZES
from flashmoe_mlx.research.estimate.several_nodes import most_on_a_node
from flashmoe_mlx.research.estimate.sizes import (
    expert_weights,
    memory_need,
    record_bytes,
    resident_bytes,
    touched_weights,
)
from flashmoe_mlx.research.estimate.speed_model import SpeedModel, certainly
from flashmoe_mlx.research.traces.random_traces import uniform_trace
from flashmoe_mlx.stores.registry import AUTO, backend_settings
from flashmoe_mlx.tasks import estimate as estimate_module
from flashmoe_mlx.tasks.shared import automatic as automatic_module
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.backend_list import listed_backends
from flashmoe_mlx.tasks.shared.keys import ModelChoice

PUBLISHED = published_configs()
GIB = 2**30
LAYER, WEIGHT, EXPERT, EXPERT_WEIGHT = 200e-6, 3e-11, 50e-6, 4e-11
SETUP, BYTE = 300e-6, 1 / 4e9
OVERLAP = 0.6
SLOWNESS = {"pread warm": 0.2, "pread cold": 3.0, "pread direct": 1.1, "io_uring direct": 1.0, "mmap warm": 0.1}


def computing(config: ModelConfig, k: int, bits: int = 4) -> float:
    per_weight = EXPERT_WEIGHT * (1.0 if bits == 4 else 0.7)
    per_expert = EXPERT + per_weight * expert_weights(config)
    return config.num_layers * (LAYER + k * per_expert) + WEIGHT * touched_weights(config)


def reading(config: ModelConfig, experts: float, way: str, bits: int = 4) -> float:
    return config.num_layers * experts * SLOWNESS[way] * (SETUP + BYTE * record_bytes(config, bits))


def hidden(config: ModelConfig, read: float, in_memory: float) -> float:
    """Return the seconds of computing with experts in memory that reads hide."""
    expert = EXPERT + EXPERT_WEIGHT * expert_weights(config)
    return OVERLAP * min(reading(config, read, "io_uring direct"), config.num_layers * in_memory * expert)


@pytest.fixture
def profile() -> MachineProfile:
    """A profile of a machine whose times equal those of the speed model."""
    points = []
    for name, sizes in SIZES.items():
        config = parse_config(synthetic_config(sizes))
        shape = (config.num_layers, touched_weights(config), expert_weights(config))
        for bits in (4, 2) if name == "large" else (4,):
            size = record_bytes(config, bits)
            for k in EXPERTS:
                base = computing(config, k, bits)
                points.append(Point(name, bits, k, MEMORY, *shape, size, (base,) * 3, (0.0,) * 3, 0.0, 0.0))
                for way in WAYS if bits == 4 else ():
                    added = reading(config, k, way)
                    seconds = (base + added,) * 3, (added,) * 3, added
                    points.append(Point(name, bits, k, way, *shape, size, *seconds, k))
                if bits == 4:
                    added = reading(config, k / 2, "io_uring direct") - hidden(config, k / 2, k / 2)
                    seconds = (base + added,) * 3, (added,) * 3, added
                    points.append(Point(name, bits, k, HALF, *shape, size, *seconds, k / 2))
    return MachineProfile(machine_identity(), datetime.now(UTC), 40.0, tuple(points), {})


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("k", [2, 6, 10])
@pytest.mark.parametrize("bits", [4, 2])
def test_costs_are_recovered_from_the_profile(name: str, k: int, bits: int, profile: MachineProfile) -> None:
    config = parse_config(PUBLISHED[name])
    found = SpeedModel(profile).predict(config, bits, k, {"io_uring direct": certainly(k)})
    assert found.reading == pytest.approx(reading(config, k, "io_uring direct", bits), rel=1e-6)
    assert found.seconds == pytest.approx(computing(config, k, bits) + found.reading, rel=1e-6)
    assert (found.low, found.high) == (found.seconds, found.seconds)


def test_predictions_from_distributions_of_misses(profile: MachineProfile) -> None:
    config = parse_config(PUBLISHED["Qwen3.5-35B-A3B"])
    halves = {"pread cold": np.array([0.5, 0, 0.5]), "pread warm": np.array([0.0, 0.0, 0.5, 0.0, 0.5])}
    found = SpeedModel(profile, faster_reads=2).predict(config, 4, 4, halves)
    assert found.reading == pytest.approx((reading(config, 1, "pread cold") + reading(config, 3, "pread warm")) / 2)


@pytest.mark.parametrize("name", ["Qwen3.5-35B-A3B", "Qwen3.5-397B-A17B"])
@pytest.mark.parametrize("read", [0, 1, 7, 8])
def test_reads_hide_the_experts_in_memory(name: str, read: int, profile: MachineProfile) -> None:
    config = parse_config(PUBLISHED[name])
    found = SpeedModel(profile).predict(config, 4, 8, {"io_uring direct": certainly(read)})
    added = reading(config, read, "io_uring direct") - hidden(config, read, 8 - read)
    assert found.seconds == pytest.approx(computing(config, 8) + added, rel=1e-6)
    # Experts of a page cache are read as well, so that none is in memory.
    both = {"pread cold": certainly(read), "pread warm": certainly(8 - read)}
    added = reading(config, read, "pread cold") + reading(config, 8 - read, "pread warm")
    assert SpeedModel(profile).predict(config, 4, 8, both).reading == pytest.approx(added, rel=1e-6)
    points = tuple(point for point in profile.points if point.way != HALF)
    without = SpeedModel(replace(profile, points=points)).predict(config, 4, 8, {"io_uring direct": certainly(read)})
    assert without.reading == pytest.approx(reading(config, read, "io_uring direct"), rel=1e-6)


def test_a_missing_way_of_reading_is_an_error(profile: MachineProfile) -> None:
    config = parse_config(PUBLISHED["Qwen3.5-35B-A3B"])
    points = tuple(point for point in profile.points if point.way != "io_uring direct")
    without = replace(profile, points=points, missing={"io_uring direct": "no io_uring on this system"})
    with pytest.raises(ValueError, match="no io_uring on this system"):
        SpeedModel(without).predict(config, 4, 4, {"io_uring direct": certainly(4)})


# Sizes


def test_sizes_equal_those_of_a_pack(tiny_pack: Path) -> None:
    files = open_model(tiny_pack)
    with load(tiny_pack) as engine:
        config = engine.model.config
        stored = resident_bytes(config, 4)
        on_disk = (tiny_pack / "resident.safetensors").stat().st_size
        assert stored <= on_disk <= 1.1 * stored + 20_000  # names and shapes
        in_memory = resident_bytes(config, 4, 2 if choose("auto").accepts_any_scale_dtype else 4)
        assert engine.model.touched_bytes == pytest.approx(in_memory - engine.model.embedding.nbytes, rel=0.05)
        assert record_bytes(config, 4) == files.variant(None).layout.record_bytes


def test_sizes_of_a_published_model() -> None:
    config = parse_config(PUBLISHED["Qwen3.5-397B-A17B"])
    assert record_bytes(config, 4) == 7_077_888
    assert record_bytes(config, 2) == 3_932_160
    # 15 attention layers, 2 heads of 256 for keys and for values, in bf16.
    assert memory_need(config, 4, 4, 1000, 2, 2).keys_and_values == 15 * 2 * 2 * 256 * 1000 * 2
    weights = touched_weights(config) + config.vocab_size * config.hidden_size
    weights += config.num_layers * config.num_experts * expert_weights(config)
    assert weights == pytest.approx(397e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen3.5-35B-A3B", True),
        ("mlx-community/Qwen3.5-397B-A17B-4bit", True),
        ("qwen3.5-122b-a10b", True),
        ("x/Qwen3.5-35B-A3B-bf16", True),
        ("x/Qwen3.5-35B-A3B-Heretic", True),
        ("Qwen/Qwen3.5-35B-A3Bx", False),
        ("Qwen/Qwen3-30B-A3B", True),
        ("Qwen/Qwen3-30B-A3Bx", False),
    ],
)
def test_names_of_known_models(name: str, known: bool) -> None:
    assert (known_config(name) is not None) == known
    assert is_plain_name(name) == (known and "Heretic" not in name)


# Estimates


def model(name: str = "Qwen3.5-397B-A17B", **changes: Any) -> Model:
    made = Model(parse_config(PUBLISHED[name]), 4, 4, 10, 8192, 2, 2)
    return replace(made, **changes)


def test_more_memory_is_faster_until_everything_fits(profile: MachineProfile) -> None:
    speeds = []
    for gib in (16, 64, 256):
        best = estimates(model(), Machine(profile, gib * GIB))[0]
        assert best.low < best.tokens_per_second < best.high
        speeds.append(best.tokens_per_second)
    assert speeds == sorted(speeds)
    assert best.backend == "resident"
    assert best.tokens_per_second == pytest.approx(1 / computing(model().config, 10))
    assert estimates(model(), Machine(profile, 4 * GIB)) == []


# backend=auto


@pytest.mark.parametrize(("share", "names"), [(1.5, ["resident"]), (0.4, ["ram_hybrid", "pread"])])
def test_the_chosen_backend_is_the_fastest_by_its_own_estimate(
    profile: MachineProfile, tiny_pack: Path, share: float, names: list[str]
) -> None:
    files = open_model(tiny_pack)
    source = files.variant(None)
    experts = source.num_layers * source.num_experts * source.layout.record_bytes
    need = memory_need(files.config, 4, 4, files.config.max_context, 4, 4)
    made = choose_backend(files, profile, int(need.total + share * experts))
    assert made.estimate.name in names
    assert all(slower.tokens_per_second <= made.estimate.tokens_per_second for slower in made.slower)
    with load(tiny_pack, made.settings) as engine:
        assert list(engine.generate("Hello", raw=True, max_tokens=2))


@pytest.mark.parametrize(
    ("factors", "policy"),
    [
        ({"early_router": 0.9}, "early_router"),
        ({"early_router": 0.9, "next_router": 0.8}, "next_router"),
        ({"early_router": 0.99, "next_router": 1.2}, "none"),
    ],
)
def test_guesses_are_chosen_where_they_were_clearly_faster(
    factors: dict[str, float], policy: str, profile: MachineProfile, tiny_pack: Path
) -> None:
    ahead = [
        replace(point, way=AHEAD[name], seconds=tuple(factor * seconds for seconds in point.seconds))
        for name, factor in factors.items()
        for point in profile.points
        if point.way == HALF
    ]
    measured = replace(profile, points=(*profile.points, *ahead))
    files = open_model(tiny_pack)
    need = memory_need(files.config, 4, 4, files.config.max_context, 4, 4).total
    experts = files.variant(None).layout.bytes_in_all_layers * files.config.num_experts
    made = choose_backend(files, measured, int(need + 0.4 * experts))
    assert (made.estimate.name, made.prefetch) == ("ram_hybrid", policy)
    assert choose_backend(files, measured, 2 * int(need + experts)).prefetch == "none"  # in memory
    assert profile.faster_prefetch(1) == "none"  # not measured


def test_no_backend_is_chosen_for_a_model_that_does_not_fit(profile: MachineProfile, tiny_pack: Path) -> None:
    with pytest.raises(InputError) as caught:
        choose_backend(open_model(tiny_pack), profile, 10**6)
    assert caught.value.code == "not_enough_memory"
    assert_one_line(caught.value)


def test_auto_on_the_command_line(
    profile: MachineProfile, tmp_path: Path, demo_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The choice is shown with its speed, recorded, and made from stored measurements."""
    profile.save(tmp_path / "cache" / "probe.json")
    choice = ModelChoice(name="demo", path=str(demo_pack), cache_dir=str(tmp_path / "cache"))
    settings = chosen_backend({"_target_": AUTO, "variant": "q4", "mirrors": []}, demo_pack, choice, 4)
    assert settings["_target_"].endswith("ResidentStore")
    assert settings["variant"] == "q4"
    assert "backend=auto: resident" in capsys.readouterr().err
    plain = backend_settings("pread")
    assert chosen_backend(plain, demo_pack, choice, 4) == plain
    assert list(listed_backends([AUTO, "pread"], plain)) == ["auto", "pread"]


def test_auto_is_a_choice_of_the_command_line_alone(tiny_pack: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tiny_pack, AUTO)
    assert caught.value.code == "unknown_backend"
    assert_one_line(caught.value)


def test_a_trace_replaces_assumptions_about_routing(profile: MachineProfile) -> None:
    trace = uniform_trace(80, 60, 512, 10, seed=0)
    ranged, known = (estimates(model(trace=source), Machine(profile, 32 * GIB))[0] for source in (None, trace))
    assert len(set(known.hit_rates)) == 1 < len(set(ranged.hit_rates))
    assert known.high / known.low < ranged.high / ranged.low


def test_changes_make_the_model_faster(profile: MachineProfile) -> None:
    machine = Machine(profile, 32 * GIB)
    now = estimates(model(), machine)[0].tokens_per_second
    gains = {change: estimates(*changed)[0].tokens_per_second / now for change, *changed in what_ifs(model(), machine)}
    assert all(gain > 1 for gain in gains.values())
    assert gains["experts_k=2"] > gains["experts_k=4"] > gains["bits=[2]"]


# The probe


@pytest.fixture
def tiny_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    larger = replace(TINY, hidden_size=256, num_experts=24)
    monkeypatch.setattr(probe_module, "SIZES", {"large": larger, "small": replace(TINY, num_experts=24)})
    monkeypatch.setattr(probe_module, "_COPIED", 2**16)


@pytest.mark.usefixtures("tiny_probe")
@pytest.mark.thorough
def test_the_probe_measures_and_deletes_its_models(tmp_path: Path) -> None:
    announced: list[str] = []
    found = probe(tmp_path / "cache", 0.1, announced.append)
    assert list((tmp_path / "cache").iterdir()) == []
    measured = {(point.size, point.bits, point.way, point.experts_k) for point in found.points}
    assert {("large", 2, MEMORY, 10), ("large", 4, "pread warm", 1), ("small", 4, "mmap warm", 4)} <= measured
    assert set(found.ways) | set(found.missing) == set(WAYS)
    for point in found.points:
        assert 0 < point.seconds[0] <= point.seconds[1] <= point.seconds[2]
    assert found.memory_gb_per_second > 0
    assert any("round 3" in text for text in announced)
    found.save(tmp_path / "probe.json")
    assert MachineProfile.load(tmp_path / "probe.json") == found


def test_damaged_profiles_are_ignored(profile: MachineProfile, tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    assert MachineProfile.load(path) is None
    whole = profile.to_json()
    first = whole["points"][0]
    damaged: list[dict[str, Any]] = [
        {"points": [{}]},
        {"points": []},
        {"points": [first | {"seconds": "abc"}]},
        {"points": [first | {"seconds": [1.0, 2.0]}]},
        {"points": [first | {"layers": None}]},
        {"created": "2026-01-01T00:00:00"},
        {"identity": None},
        {"missing": 5},
    ]
    for text in ("", "[]", "{}", *(json.dumps(whole | change) for change in damaged)):
        path.write_text(text)
        assert MachineProfile.load(path) is None
    path.write_text(json.dumps(profile.to_json() | {"probe_version": 0}))
    assert MachineProfile.load(path) is None


# task=estimate


class Unreachable:
    """A hub client without a network, which checks only the form of a name."""

    def model_info(self, name: str, **_: Any) -> None:
        if name.count("/") != 1:
            raise HFValidationError(name)
        raise ConnectionError("no network")


@pytest.fixture
def cache(profile: MachineProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HfApi", Unreachable)
    profile.save(tmp_path / "cache" / "probe.json")
    return tmp_path / "cache"


def estimate(folder: Path, *arguments: str) -> dict[str, Any]:
    assert run_command_line(["task=estimate", *arguments, f"hydra.run.dir={folder / 'run'}"]) == 0
    found = json.loads((folder / "run" / "estimate.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.usefixtures("cache")
@pytest.mark.thorough
def test_a_known_model_is_estimated_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate(tmp_path, "model=Qwen/Qwen3.5-397B-A17B", "memory_gib=32", "experts_k=4")
    shown = capsys.readouterr().err
    for text in (
        "a pack takes 223.0 GB",
        "the model fits",
        "this machine was measured just now",
        "would help: ",
        "bits=[2]",
    ):
        assert text in shown
    assert found["estimates"][0]["low"] < found["estimates"][0]["tokens_per_second"]
    assert found["expert_bytes"] == 60 * 512 * 7_077_888


@pytest.mark.usefixtures("cache")
def test_a_model_that_does_not_fit_gets_no_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "estimates" not in estimate(tmp_path, "model=Qwen/Qwen3.5-397B-A17B", "memory_gib=4")
    assert "the model does not fit: 4.0 GiB are usable" in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_configs_packs_and_synthetic_models_are_estimated(tiny_pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "some.json"
    config.write_text(json.dumps(PUBLISHED["Qwen3.5-35B-A3B"]))
    assert estimate(tmp_path, f"model={config}")["expert_bytes"] == 40 * 256 * 1_769_472
    assert estimate(tmp_path, f"model={tiny_pack}")["estimates"][0]["backend"] == "resident"
    assert estimate(tmp_path, "model=synthetic")["expert_bytes"] == 4 * 512 * 7_077_888


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("model=some/model-that-is-not-known",), 1, "the hub cannot be reached"),
        (("model=a/b/c",), 2, "not a hub id"),
        (("model=Qwen/Qwen3.5-35B-A3B", "bits=[7]"), 2, "choose from"),
        (("model=Qwen/Qwen3.5-35B-A3B", "experts_k=300"), 2, "from 1 to 256"),
        (("model=Qwen/Qwen3.5-35B-A3B", "experts_k=0"), 2, "from 1 to 256"),
        (("model=Qwen/Qwen3.5-35B-A3B", "resident_bits=0"), 2, "resident_bits=0: choose from"),
        (("model=Qwen/Qwen3.5-35B-A3B", "context=0"), 2, "from 1 to 262144"),
        (("model=Qwen/Qwen3.5-35B-A3B", "memory_gib=0"), 2, "greater than 0"),
        (("model=Qwen/Qwen3.5-35B-A3B", "probe_seconds=-1"), 2, "probe_seconds=-1.0: must be"),
        (("model=Qwen/Qwen3.5-35B-A3B", "trace={trace}"), 2, "recorded with 2 layers"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: tuple[str, ...], code: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uniform_trace(4, 2, 8, 2, 0).save(tmp_path / "a.moetrace")
    filled = [argument.format(trace=tmp_path / "a.moetrace", empty=tmp_path / "empty") for argument in arguments]
    assert run_command_line(["task=estimate", *filled, f"hydra.run.dir={tmp_path / 'run'}"]) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in line
    assert_one_line(Exception(line))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("Qwen/Qwen3.5-35B-A3B-NVFP4", "NVFP4"),
        ("unsloth/Qwen3.6-35B-A3B-GGUF", "Qwen/Qwen3.6-35B-A3B"),
        ("{folder}/nvfp4.json", "NVFP4"),
        ("{folder}/dense.json", "nothing to stream"),
        ("{folder}/model.gguf", "GGUF"),
        ("{folder}/gguf", "GGUF"),
        ("{folder}/gguf/x.bin", "config.json"),
    ],
)
def test_models_that_cannot_be_packed_are_refused(
    model: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nvfp4 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    (tmp_path / "nvfp4.json").write_text(json.dumps({**PUBLISHED["Qwen3.5-35B-A3B"], **nvfp4}))
    (tmp_path / "dense.json").write_text('{"model_type": "qwen3_5"}')
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "config.json").write_text(json.dumps(PUBLISHED["Qwen3.5-35B-A3B"]))
    for name in ("model.gguf", "x.bin"):
        (tmp_path / "gguf" / name).write_bytes(b"\xff")
    argument = f"model={model.format(folder=tmp_path)}"
    assert run_command_line(["task=estimate", argument, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    shown = capsys.readouterr().err
    assert reason in shown
    assert "a pack takes" not in shown


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["Qwen/Qwen3.6-35B-A3B", "mlx-community/Qwen3.8-2.4T-A95B-4bit"])
def test_later_models_are_estimated_without_a_network(name: str, tmp_path: Path) -> None:
    found = estimate(tmp_path, f"model={name}", "memory_gib=1")
    per_expert = {"Qwen/Qwen3.6-35B-A3B": 40 * 256 * 1_769_472}.get(name, 92 * 512 * 28_311_552)
    assert found["expert_bytes"] == per_expert


def test_the_hub_is_asked_about_ambiguous_names(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model=x/Qwen3.5-35B-A3B-compressed"
    assert estimate(tmp_path, name, "memory_gib=1")["expert_bytes"] == 40 * 256 * 1_769_472
    assert "the hub cannot be reached" in capsys.readouterr().err
    published = {**PUBLISHED["Qwen3.5-35B-A3B"], "quantization_config": {"quant_method": "compressed-tensors"}}
    monkeypatch.setattr(estimate_module, "remote_config", lambda *_: published)
    assert run_command_line(["task=estimate", name, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert "compressed-tensors" in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_weights_in_a_folder_determine_the_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Widths, format and support come from the weights; before they are downloaded, the config is used."""
    folder = write_checkpoint(tmp_path / "model", GEOMETRIES["plain"], 0, "mlx4", shards=3)
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {"group_size": 64, "bits": 8, "mode": "affine"}  # the shapes say 4 bits
    (folder / "config.json").write_text(json.dumps(config))
    assert estimate(tmp_path, f"model={folder}")["expert_bytes"]
    assert "4 bits" in capsys.readouterr().err
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].rename(tmp_path / "away")
    assert estimate(tmp_path, f"model={folder}")["expert_bytes"]
    shown = capsys.readouterr().err
    assert "8 bits" in shown
    assert "1 of 3 shards missing" in shown
    (tmp_path / "away").rename(shards[0])
    for shard in shards:
        renamed = mx.load(str(shard))
        assert isinstance(renamed, dict)
        mx.eval(renamed)
        mx.save_safetensors(
            str(shard), {name.replace("switch_mlp", "other_mlp"): array for name, array in renamed.items()}
        )
    (folder / "model.safetensors.index.json").unlink()
    assert run_command_line(["task=estimate", f"model={folder}", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert "a pack takes" not in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_widths_come_from_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "eight.json"
    settings = {"bits": 8, "group_size": 32, "mode": "affine"}
    config.write_text(json.dumps({**PUBLISHED["Qwen3.5-35B-A3B"], "quantization": settings}))
    expert = 3 * 2048 * 512 * 9 // 8  # 8 bits per weight, and 32 bits of scale and bias per 32 weights
    assert estimate(tmp_path, f"model={config}", "memory_gib=1")["expert_bytes"] == 40 * 256 * expert
    assert "8 bits" in capsys.readouterr().err
    named = "model=mlx-community/Qwen3.5-35B-A3B-8bit"
    assert estimate(tmp_path, named, "memory_gib=1")["expert_bytes"] == 40 * 256 * (3 * 2048 * 512 * 17 // 16)
    assert estimate(tmp_path, f"model={config}", "bits=[4]", "memory_gib=1")["expert_bytes"] == 40 * 256 * 1_769_472
    settings["bits"] = float("nan")
    config.write_text(json.dumps({**PUBLISHED["Qwen3.5-35B-A3B"], "quantization": settings}))
    assert estimate(tmp_path, f"model={config}", "memory_gib=1")["expert_bytes"] == 40 * 256 * 1_769_472


@pytest.mark.usefixtures("cache")
def test_without_a_profile_only_sizes_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("model=Qwen/Qwen3.5-35B-A3B", f"model.cache_dir={tmp_path / 'empty'}", "memory_gib=64", "probe=false")
    found = estimate(tmp_path, *arguments)
    assert "estimates" not in found
    assert found["need_bytes"]
    shown = capsys.readouterr().err
    assert "a pack takes 19.5 GB" in shown
    assert "remove probe=false" in shown


def test_a_machine_is_measured_once(
    cache: Path,
    profile: MachineProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    probed: list[tuple[Path, float]] = []

    def fake(folder: Path, seconds: float, announce: Callable[[str], object]) -> MachineProfile:
        probed.append((folder, seconds))
        return profile

    monkeypatch.setattr(automatic_module, "probe", fake)
    arguments = ("model=Qwen/Qwen3.5-35B-A3B", "probe_seconds=7")
    old = replace(profile, created=datetime.now(UTC) - timedelta(days=40))
    old.save(cache / "probe.json")
    estimate(tmp_path, *arguments)
    assert "measured 40 days ago; probe=true measures it again" in capsys.readouterr().err
    assert not probed
    estimate(tmp_path, *arguments, "probe=true")
    assert probed == [(cache, 7.0)]
    assert MachineProfile.load(cache / "probe.json") == profile
    replace(old, identity={**old.identity, "processor": "another"}).save(cache / "probe.json")
    estimate(tmp_path, *arguments)
    assert len(probed) == 2


def test_a_failed_probe_deletes_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_probe: None) -> None:
    def fail(*_: object) -> None:
        raise FlashMoeError("no")

    monkeypatch.setattr(probe_module, "synthetic_pack", fail)
    with pytest.raises(FlashMoeError):
        probe(tmp_path / "cache", 0.1, lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_busiest_of_several_nodes_decides() -> None:
    """Against random owners; the factors are those of a published calculation for 10 and 4 experts."""
    random = np.random.default_rng(0)
    for k, nodes, factor in ((10, 2, 1.61), (10, 4, 2.38), (4, 3, 1.69)):
        drawn = random.multinomial(k, [1 / nodes] * nodes, 20_000).max(axis=1)
        most = most_on_a_node(certainly(k), nodes)
        np.testing.assert_allclose(most, np.bincount(drawn, minlength=k + 1) / len(drawn), atol=0.02)
        assert k / float(most @ np.arange(k + 1)) == pytest.approx(factor, abs=0.02)
    mixed = 0.25 * np.eye(1, 5, 1)[0] + 0.75 * np.eye(1, 5, 4)[0]
    np.testing.assert_allclose(most_on_a_node(mixed, 2), [0, 0.25, 0.75 * 6 / 16, 0.75 * 8 / 16, 0.75 * 2 / 16])
    assert most_on_a_node(mixed, 1) is mixed


@pytest.mark.usefixtures("cache")
@pytest.mark.thorough
def test_several_nodes_are_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("model=Qwen/Qwen3.5-397B-A17B", "memory_gib=32")
    one, two = estimate(tmp_path, *model), estimate(tmp_path, *model, "nodes=2")
    shown = capsys.readouterr().err
    assert "on each of 2 machines, a pack with shard= takes 11" in shown
    assert "of 10 experts of a token, the busiest machine has 6.2 on average; sums over TCP take 18 ms" in shown
    assert two["node_expert_bytes"] == one["expert_bytes"] / 2 == two["expert_bytes"] / 2
    gain = two["estimates"][0]["tokens_per_second"] / one["estimates"][0]["tokens_per_second"]
    assert one["helps"]["nodes=2"] == two["estimates"][0]["tokens_per_second"]
    assert 1.2 < gain < 2.6
    assert run_command_line(["task=estimate", "nodes=65", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
