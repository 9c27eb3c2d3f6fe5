"""Kernels are checked at load, on every code path that a model takes, and reports name the implementations that run."""

import json
import logging
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import metal_on_cpu
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY
from systems import needs_linux

import flashmoe_mlx
from flashmoe_mlx import custom_kernels
from flashmoe_mlx.cli.application import run as run_command_line
from flashmoe_mlx.custom_kernels import AttentionInputs, DeltaInputs, UncheckedPathWarning, kernel, native
from flashmoe_mlx.custom_kernels.checks import CheckedKernel, CodePath, Sample, check_kernels
from flashmoe_mlx.custom_kernels.routed_experts import cpu as routed_experts_cpu
from flashmoe_mlx.custom_kernels.shapes import ModelShapes
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.models.code_paths import model_shapes
from flashmoe_mlx.models.weights import ResidentWeights
from flashmoe_mlx.research.bench import engine_bench as bench

KERNELS = ("attention", "gated_delta_net", "routed_experts", "quantized_matvec", "rms_norm")
"""Operations with kernels in the extension."""

NO_MODEL: Any = None

# --- one operation ----------------------------------------------------------------------------------------------------


def doubling(custom: Callable[[mx.array], mx.array]) -> CheckedKernel[[mx.array], mx.array]:
    """Return a kernel that doubles vectors: one path for a single element, another for several, none for matrices."""

    def path(x: mx.array) -> CodePath | None:
        return ("one" if len(x) == 1 else "several",) if x.ndim == 1 else None

    def samples(_: ModelShapes) -> Iterator[Sample]:
        for size in (1, 3, 5):
            x = mx.arange(1, size + 1, dtype=mx.float32)
            yield Sample((x,), (x[:2],), lambda results: [results[0][:2]])

    return CheckedKernel("doubling", lambda x: 2 * x, lambda x: x + x, custom, path, samples)


def report_of(kernel: CheckedKernel[Any, Any]) -> custom_kernels.KernelReport:
    return check_kernels([kernel], NO_MODEL, {"doubling": "mx.add", "other": "mx.multiply"}, None)


def test_a_kernel_that_agrees_runs_on_every_path() -> None:
    calls: list[int] = []
    operation = doubling(lambda x: (calls.append(len(x)), x * 2)[1])
    report = report_of(operation)
    assert calls == [1, 3, 5]
    assert operation(mx.array([1.0, 2.0])).tolist() == [2, 4]
    assert calls == [1, 3, 5, 2]
    assert operation(mx.array([[1.0]])).tolist() == [[2]]
    assert len(calls) == 4, "MLX handles unsupported arguments"
    assert report.names == {
        "other": "mx.multiply",
        "doubling: one": "custom kernel doubling",
        "doubling: several": "custom kernel doubling",
    }
    assert (report.replaced, report.note) == ([], None)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda x: x * 2.1, "differs from its reference by 5.0e-02"),
        (lambda x: x * float("nan"), "differs from its reference by nan"),
        (lambda x: 1 / 0, "cannot run: division by zero"),
        (lambda x: mx.zeros((1, 1, 1)), "differs from its reference by inf"),
    ],
    ids=["differs", "not a number", "raises", "shape"],
)
def test_a_kernel_that_fails_on_one_path_is_replaced_only_there(
    wrong: Callable[[mx.array], mx.array], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    operation = doubling(lambda x: x * 2 if len(x) == 1 else wrong(x))
    with caplog.at_level(logging.WARNING):
        report = report_of(operation)
    assert report.replaced == ["doubling: several"]
    assert report.names["doubling: one"] == "custom kernel doubling"
    assert report.names["doubling: several"].startswith(f"MLX: the custom kernel doubling {says}")
    assert report.note is not None
    assert says in report.note
    assert [record.message for record in caplog.records] == [report.note]
    assert operation(mx.array([1.0, 2.0])).tolist() == [2, 4]


@pytest.mark.parametrize("bad", [3, 5])
def test_one_bad_sample_of_a_path_is_enough(bad: int) -> None:
    """A good sample may come before or after it."""
    assert report_of(doubling(lambda x: x if len(x) == bad else x * 2)).replaced == ["doubling: several"]


def test_a_kernel_whose_reference_fails_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """For example for lack of memory: the model runs without the kernel, and the user is told."""
    operation = doubling(lambda x: x * 2)

    def failing(x: mx.array) -> mx.array:
        raise RuntimeError("no memory\nwhere")

    operation.reference = failing
    with caplog.at_level(logging.WARNING):
        report = report_of(operation)
    assert report.replaced == ["doubling: one", "doubling: several"]
    assert "cannot be checked: no memory" in (report.note or "")
    assert len(caplog.records) == 1
    assert operation(mx.array([1.0, 2.0])).tolist() == [2, 4]


def test_checks_for_several_models_add_up() -> None:
    operation = doubling(lambda x: x * 2)
    report_of(operation)

    def none_of_several(_: ModelShapes) -> Iterator[Sample]:
        yield Sample((mx.array([1.0]),), (mx.array([1.5]),))

    operation.samples = none_of_several
    report = report_of(operation)
    assert report.replaced == ["doubling: one"]
    assert "doubling: several" not in report.names
    operation.mlx = lambda x: 1 / 0
    assert operation(mx.array([1.0, 2.0])).tolist() == [2, 4], "the kernel, as checked before"


def test_an_unchecked_path_runs_mlx_and_warns_once() -> None:
    operation = doubling(lambda x: 1 / 0)
    with pytest.warns(UncheckedPathWarning, match="doubling: several: .* not checked"):
        assert operation(mx.array([1.0, 2.0])).tolist() == [2, 4]
    assert operation(mx.array([1.0, 2.0])).tolist() == [2, 4], "no second warning, which would be an error here"


# --- engines ----------------------------------------------------------------------------------------------------------


def tokens_of(arguments: Sequence[Any]) -> int:
    (first, *_) = arguments
    if isinstance(first, AttentionInputs):
        return len(first.k)
    return len(first.qkv if isinstance(first, DeltaInputs) else first)


def most_tokens_of_an_expert(arguments: Sequence[Any]) -> int:
    rows = np.array(arguments[2])
    return int(np.bincount(rows[rows >= 0]).max())


@contextmanager
def spoiled(
    operation: str, when: Callable[[Sequence[Any]], bool], calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Make the kernel of ``operation`` wrong by half for arguments that ``when`` selects; count its calls."""
    folder = getattr(custom_kernels, operation)
    original = folder.OPERATION.cpu

    def wrong(*arguments: Any, **options: Any) -> Any:
        calls["one token" if tokens_of(arguments) == 1 else "several"] += 1
        spoil = when(arguments)
        result = original.run(*arguments, **options)
        if not spoil:
            return result
        parts = [result] if isinstance(result, mx.array) else list(result)
        parts[0] = parts[0] * 1.5
        return parts[0] if isinstance(result, mx.array) else tuple(parts)

    with monkeypatch.context() as patched:
        patched.setattr(folder, "OPERATION", replace(folder.OPERATION, cpu=replace(original, run=wrong)))
        yield


def ran(engine: Engine) -> np.ndarray:
    """Return the logits of a prompt with experts that have more than 8 tokens, and of decode steps."""
    cache = engine.new_cache()
    tokens = [3] * 30 + list(range(30))  # equal tokens, which choose the same experts
    return np.concatenate([engine.forward(tokens, cache), *(engine.forward([token], cache) for token in (5, 6, 7))])


@pytest.fixture(scope="module")
def expected_logits(tiny_pack: Path) -> np.ndarray:
    """The logits of the references."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    with flashmoe_mlx.load(tiny_pack, kernels="reference") as engine:
        logits = ran(engine)
    mx.set_default_device(before)
    return logits


DECODE = "wrong in decode steps"
PROMPT = "wrong in prompts"
RIGHT = "right"


@pytest.mark.parametrize("fault", [DECODE, PROMPT, RIGHT])
@pytest.mark.parametrize("operation", KERNELS)
@pytest.mark.sampled(8)
def test_a_wrong_kernel_is_replaced_on_its_path_and_the_report_is_true(
    operation: str, fault: str, tiny_pack: Path, expected_logits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report about a path must match the calls when that path runs, not the outcome of a check."""
    calls: Counter[str] = Counter()

    def when(arguments: Sequence[Any]) -> bool:
        several = tokens_of(arguments) > 1
        if operation == "routed_experts" and several:
            several = most_tokens_of_an_expert(arguments) > 8
        return fault != RIGHT and several == (fault == PROMPT)

    if operation == "routed_experts" and fault == DECODE:

        def when(arguments: Sequence[Any]) -> bool:
            return tokens_of(arguments) == 1

    # A store that reads delivers experts in parts, which the extension applies by another function.
    with spoiled(operation, when, calls, monkeypatch), flashmoe_mlx.load(tiny_pack, "resident") as engine:
        calls.clear()
        got = ran(engine)
        setup = json.loads(json.dumps(engine.setup, default=str))
    np.testing.assert_allclose(got, expected_logits, rtol=0, atol=1e-3)

    names = {path: runs for path, runs in setup["kernels"].items() if path.startswith(f"{operation}: ")}
    shown = {
        "one token": {runs for path, runs in names.items() if "one token" in path},
        "several": {runs for path, runs in names.items() if "more than 8 tokens" in path or "several tokens" in path},
    }
    for tokens, all_runs in shown.items():
        assert len(all_runs) == 1
        (runs,) = all_runs
        assert runs.startswith("native kernel ") == (calls[tokens] > 0)
        replaced = fault == (DECODE if tokens == "one token" else PROMPT)
        assert runs.startswith(f"MLX: the native kernel {operation} differs") == replaced
    assert sorted(setup["replaced_kernels"]) == sorted(path for path, runs in names.items() if runs.startswith("MLX: "))
    assert (setup["note"] is None) == (fault == RIGHT)
    assert all(runs.startswith("native") for path, runs in setup["kernels"].items()
               if ": " in path and path not in names)  # fmt: skip


def test_few_tokens_of_an_expert_are_a_path_with_a_check(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def when(arguments: Sequence[Any]) -> bool:
        return 1 < len(arguments[0]) <= 8

    with spoiled("routed_experts", when, Counter(), monkeypatch), flashmoe_mlx.load(tiny_pack) as engine:
        assert engine.setup["replaced_kernels"]
        assert all("2 to 8 tokens" in path for path in engine.setup["replaced_kernels"])


@pytest.mark.parametrize(
    ("prefetch", "changes", "options"),
    [
        pytest.param("none", {}, {}, id="all slots"),
        pytest.param("early_router", {}, {"slots": 3}, id="few slots"),
        pytest.param("previous_token", {}, {"experts_k": 1, "slots": 1}, id="one expert"),
        pytest.param("next_router", {"bits": 2}, {}, id="2 bits"),
        pytest.param("next_router", {"bits": 3, "shared_expert_size": 256}, {"slots": 2}, id="3 bits"),
        pytest.param("none", {"bits": 8, "hidden_size": 320, "expert_size": 192, "num_kv_heads": 2}, {}, id="8 bits"),
    ],
)
@pytest.mark.sampled(3)
def test_no_call_takes_an_unchecked_path(
    prefetch: str, changes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """Warnings are errors: an engine runs with every number of tokens, and load must have checked every path."""
    folder = synthetic_pack("model", replace(TINY, **changes), tmp_path).folder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with flashmoe_mlx.load(folder, prefetch=prefetch, **options) as engine:
            before = dict(engine.setup["kernels"])
            for tokens in (1, 2, 8, 9, 65):
                cache = engine.new_cache()
                engine.forward(range(tokens), cache)
                engine.forward([1], cache)
            assert engine.setup["kernels"] == before
            assert engine.setup["replaced_kernels"] == []


@pytest.mark.skipif(native.extension() is None, reason="kernels of the extension")
@pytest.mark.parametrize(("experts", "k"), [(20, 1), (64, 4), (300, 1)])
def test_groups_of_experts_are_checked_wherever_slots_can_run_out(
    experts: int, k: int, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every number of tokens and of slots: only the last group includes the shared expert."""
    monkeypatch.setattr(CheckedKernel, "_disagreement", lambda *_: None)
    with flashmoe_mlx.load(tiny_pack) as engine:
        shapes = replace(model_shapes(engine.model), num_experts=experts, experts_k=k)
        operation = engine.model.kernels.routed_experts_cpu
    assert isinstance(operation, CheckedKernel)
    (form,) = shapes.experts
    for slots in range(k, experts + 1):
        operation._reasons.clear()
        checked = {verdict.path for verdict in operation.check(operation.samples(replace(shapes, slots=slots)))}
        for tokens in range(1, 2 * experts):
            if min(experts, tokens * k) > slots:
                path = routed_experts_cpu.code_path(mx.zeros((tokens, 1)), [], *[mx.zeros(0)] * 2, form)
                assert path in checked, (tokens, slots)


def test_nan_weights_are_not_reported_as_a_bad_kernel(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken = ResidentWeights._take

    def spoiled_weights(self: Any, name: str, dtype: Any) -> mx.array:
        array = taken(self, name, dtype)
        return array * float("nan") if mx.issubdtype(array.dtype, mx.floating) else array

    monkeypatch.setattr(ResidentWeights, "_take", spoiled_weights)
    with caplog.at_level(logging.WARNING), flashmoe_mlx.load(tiny_pack) as engine:
        assert engine.setup["replaced_kernels"] == []
    assert not caplog.records


def test_a_check_changes_neither_the_store_nor_its_counters(tiny_pack: Path) -> None:
    with flashmoe_mlx.load(tiny_pack) as engine:
        assert engine.store.stats().requests == 0


# --- messages to the user ---------------------------------------------------------------------------------------------


def test_a_program_that_loads_a_model_sees_a_warning_on_stderr(tiny_pack: Path) -> None:
    script = f"""
import flashmoe_mlx
from dataclasses import replace
from flashmoe_mlx.custom_kernels import routed_experts
right = routed_experts.OPERATION
wrong = replace(right.cpu, run=lambda *arguments: right.cpu.run(*arguments) * 1.5)
routed_experts.OPERATION = replace(right, cpu=wrong)
flashmoe_mlx.load({str(tiny_pack)!r}).close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "the native kernel routed_experts differs from its reference by 5.0e-01" in done.stderr


def command_line(folder: Path, *arguments: str) -> int:
    prompt = [] if "task=evaluate" in arguments else ["prompt=Hello", "raw=true"]
    return run_command_line([f"model.path={folder}", *prompt, *arguments])


@pytest.mark.parametrize(
    ("task", "wrong"),
    [("generate", True), ("bench", True), ("trace", True), ("evaluate", True), ("generate", False), ("bench", False)],
)
@pytest.mark.sampled(2)
def test_a_person_is_told_that_a_kernel_was_replaced(
    task: str,
    wrong: bool,
    demo_pack: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {
        "generate": ["max_tokens=2"],
        "trace": ["task=trace", "max_tokens=2"],
        "bench": ["task=bench", "tokens=2", "rounds=1", "conditions=[cold]", "plot=false"],
        "evaluate": ["task=evaluate", "limit=1", "kinds=[json]", "answers=false", "reference_kernels=mlx"],
    }[task]
    with spoiled("routed_experts", lambda _: wrong, Counter(), monkeypatch):
        assert command_line(demo_pack, f"hydra.run.dir={tmp_path / 'run'}", *options) == 0
    shown = capsys.readouterr().err
    assert ("the native kernel routed_experts differs from its reference by 5.0e-01" in shown) == wrong
    assert "MLX's own operations, which are slower, run in its place" in " ".join(shown.split()) or not wrong
    if task in ("bench", "evaluate"):
        name = "pread" if task == "bench" else "4 bits"
        assert (f"{name} *" in shown) == wrong
    if task == "bench":
        (one,) = json.loads((tmp_path / "run" / "bench.json").read_text())["passes"]
        assert bool(one["record"]["replaced_kernels"]) == wrong


def test_no_check_runs_inside_the_clock_of_a_cold_pass(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks and references run while a pass loads its engine, not while it generates."""
    events: list[str] = []
    check, generate = CheckedKernel._disagreement, bench._generate

    def checked(self: Any, sample: Any) -> Any:
        events.append("check")
        return check(self, sample)

    def generated(*arguments: Any) -> Any:
        events.append("clock starts")
        result = generate(*arguments)
        events.append("clock stops")
        return result

    monkeypatch.setattr(CheckedKernel, "_disagreement", checked)
    monkeypatch.setattr(bench, "_generate", generated)
    setting = bench.Configuration("pread", {"_target_": "flashmoe_mlx.backends.pread.PreadStore"}, 2, "none")
    plan = bench.Plan(tiny_pack, [setting], ["cold"], ["Hello, experts"], True, 5, 2, "auto")
    passes = list(bench.run_trials(plan, [], str, {}))
    assert len(passes) == 2
    within = [event for event, running in zip(events, _running(events), strict=True) if running]
    assert events.count("check") > 20
    assert events.count("clock starts") == 2
    assert "check" not in within


def _running(events: Sequence[str]) -> Iterator[bool]:
    running = False
    for event in events:
        running = (running or event == "clock starts") and event != "clock stops"
        yield running


# --- kernels for GPUs, by emulation -----------------------------------------------------------------------------------


@needs_linux
def test_metal_kernels_pass_their_check_and_every_path_was_checked(
    tiny_pack: Path, expected_logits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ("attention", "gated_delta_net", "quantized_matvec", "routed_experts")
    gpus = (getattr(custom_kernels, folder).gpu for folder in folders)
    for module in (kernel, custom_kernels, custom_kernels.gated_delta_net.mlx, *gpus):
        monkeypatch.setattr(module, "dialect", lambda: "metal")
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_on_cpu.metal_kernel)
    kernel.compiled.cache_clear()
    try:
        with metal_on_cpu.writable("keys", "values"), flashmoe_mlx.load(tiny_pack) as engine:
            got = ran(engine)
            setup = engine.setup
    finally:
        kernel.compiled.cache_clear()
    assert setup["replaced_kernels"] == []
    for operation in ("attention", "gated_delta_net", "routed_experts", "quantized_matvec"):
        assert any(path.startswith(f"{operation}: one token") for path in setup["kernels"])
    np.testing.assert_allclose(got, expected_logits, rtol=0, atol=1e-3)
