"""An engine on a GPU gives the same logits as an engine on a CPU: all branches for GPUs, from the choice of kernels to
slots in a GPU's memory, with the kernels' Metal and CUDA texts on a CPU (``gpu_on_cpu``).
"""

import ctypes
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from conftest import TINY
from gpu_on_cpu import Launches
from hyper_checkpoints import HYPER_GEOMETRIES
from systems import needs_linux
from tiny_checkpoints import OLDER_GEOMETRIES, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import choose, nvidia
from flashmoe_mlx.custom_kernels.cases import Geometry
from flashmoe_mlx.custom_kernels.nvidia import Gpu
from flashmoe_mlx.custom_kernels.precision import activation_type
from flashmoe_mlx.custom_kernels.routed_experts import gpu as routed_experts
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.made_models.synthetic import SyntheticSizes, synthetic_pack
from flashmoe_mlx.research.decode_probe import DecodeFinding
from flashmoe_mlx.research.estimate import probe
from flashmoe_mlx.stores import memory
from flashmoe_mlx.tasks import doctor

pytestmark = needs_linux

Logits = npt.NDArray[np.float32]
Device = Callable[..., AbstractContextManager[Launches]]

PROMPT = [int(token) for token in np.random.default_rng(7).integers(5, 250, 20)]
"""A prompt longer than the limit of any kernel for decode steps; ``most_tokens`` lowers CUDA's limit of 256."""
STEPS = (65, 66, 67)
EXACT = 1e-4
"""Largest difference of logits in f32, relative to the largest logit; correct kernels give 3e-6."""
ROUNDED = 0.05
"""Largest relative difference in bf16 between kernels and references, which both round; correct kernels give 0.01."""

WHOLE_CHUNKS = SyntheticSizes(
    num_layers=4,
    hidden_size=512,
    num_experts=8,
    experts_per_token=4,
    expert_size=512,
    shared_expert_size=512,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    linear_key_heads=1,
    linear_value_heads=4,
    linear_key_dim=32,
    linear_value_dim=32,
    max_context=256,
    bits=4,
    seed=0,
)
"""The smallest model all of whose products use tensor cores and the copy engine."""


@pytest.fixture(autouse=True)
def most_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower CUDA's limit of 256 tokens, so that short prompts exceed it."""
    monkeypatch.setitem(routed_experts.MOST_TOKENS, "cuda", 12)


@pytest.fixture(scope="module")
def whole_chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_pack("whole-chunks", WHOLE_CHUNKS, tmp_path_factory.mktemp("cache")).folder


def compute_logits(
    pack: Path,
    prompt: list[int] = PROMPT,
    steps: tuple[int, ...] = STEPS,
    launches: Launches | None = None,
    **options: Any,
) -> Logits:
    """Return the logits of a prompt and of each step after it; ``launches`` excludes launches during loading."""
    with flashmoe_mlx.load(pack, **options) as engine:
        if launches is not None:
            launches.clear()
        return steps_of(engine, prompt, steps)


def steps_of(engine: Engine, prompt: list[int] = PROMPT, steps: tuple[int, ...] = STEPS) -> Logits:
    cache = engine.new_cache()
    return np.concatenate([engine.forward(prompt, cache), *(engine.forward([token], cache) for token in steps)])


def difference(got: Logits, expected: Logits) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def expected(tiny_pack: Path) -> Logits:
    """The logits of the references on a CPU."""
    return compute_logits(tiny_pack, kernels="reference")


def ran(launches: Launches, *kernels: str) -> bool:
    return set(kernels) <= set(launches)


SPLIT = ("routed_experts_gate_up", "routed_experts_down")
SHARED = tuple(f"{name}_with_shared_expert" for name in SPLIT)
MIXERS = ("gated_delta_net_step", "attention_prepare", "attention_decode", "attention_merge")
PRODUCTS = ("quantized_matvec_body_with_norm", "quantized_matvec_body_with_residual")
RECORD_BYTES = 32768


def hybrid(slots_a_layer: int, **options: Any) -> dict[str, Any]:
    budget = TINY.num_layers * slots_a_layer * RECORD_BYTES / 2**30
    return {"backend": "ram_hybrid", "budget_gib": budget, **options}


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "pread", "slots": 3, "prefetch": "previous_token"},
        {"backend": "mmap", "slots": 16},
        hybrid(9, slots=4, prefetch="next_router"),
    ],
    ids=lambda options: options["backend"],
)
def test_stores_serve_metal(options: dict[str, Any], tiny_pack: Path, expected: Logits) -> None:
    with gpu_on_cpu.metal(mx.float32) as launches, flashmoe_mlx.load(tiny_pack, **options) as engine:
        launches.clear()  # the launches of the checks
        assert difference(steps_of(engine), expected) < EXACT
        assert ran(launches, *SPLIT, *MIXERS, *PRODUCTS)
        assert engine.setup["kernels"]["gated_delta_net of prompts"] == "mx.fast.gated_delta_update"


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "pread", "slots": 3, "prefetch": "next_router"},
        {"backend": "mmap", "slots": 5, "prefetch": "previous_token"},
        {"backend": "resident"},
        hybrid(5, slots=3, preload=True),
        hybrid(9, slots=4, prefetch="previous_token"),
        hybrid(9, slots=4, prefetch="early_router"),
    ],
    ids=lambda options: options["backend"] + "-" + options.get("prefetch", "none"),
)
@pytest.mark.sampled(2)
def test_stores_serve_cuda(options: dict[str, Any], tiny_pack: Path, expected: Logits) -> None:
    with gpu_on_cpu.cuda(mx.float32) as launches, flashmoe_mlx.load(tiny_pack, **options) as engine:
        filled = "fill_slots_body" in launches  # stores that keep everything fill their slots when opened
        launches.clear()  # the launches of the checks
        assert difference(steps_of(engine), expected) < EXACT
        assert ran(launches, *SPLIT, *MIXERS, *PRODUCTS, "dense_experts_body")
        assert "custom kernel dense_experts" in engine.setup["kernels"].values()
        assert type(engine.store.fetch(0, [1])).__name__ == "GpuBatch"
        assert filled or "fill_slots_body" in launches
        if options.get("prefetch", "none") != "none" and options["backend"] != "mmap":
            assert engine.store.stats().prefetched > 0


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, gpu_on_cpu.cuda])
@pytest.mark.sampled(1)
def test_other_families(device: Device, tmp_path: Path) -> None:
    """A model without output gates and shared experts."""
    pack = synthetic_pack("moe", replace(TINY, num_layers=2, num_heads=8), tmp_path, family="qwen3_moe").folder
    expected = compute_logits(pack, kernels="reference")
    for options in ({"backend": "pread", "slots": 5, "prefetch": "next_router"}, {"backend": "resident"}):
        with device(mx.float32) as launches:
            assert difference(compute_logits(pack, launches=launches, **options), expected) < EXACT
            assert ran(launches, *SPLIT, *MIXERS[1:], *PRODUCTS)
            assert not ran(launches, *SHARED)


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, pytest.param(gpu_on_cpu.cuda, marks=pytest.mark.thorough)])
def test_layers_without_experts(device: Device, tmp_path: Path) -> None:
    """And routers whose weights do not sum to 1."""
    geometry = replace(OLDER_GEOMETRIES["moe-mlp"], hidden_size=128, expert_size=128, experts=16, group_size=64)
    checkpoint = write_checkpoint(tmp_path, geometry, seed=0, layout="mlx4", dtype="F32")
    prompt, steps = [token % geometry.vocab_size for token in PROMPT], STEPS[:2]
    expected = compute_logits(checkpoint, prompt, steps, kernels="reference")
    for backend in ("pread", "resident"):
        with device(mx.float32):
            assert difference(compute_logits(checkpoint, prompt, steps, backend=backend), expected) < EXACT


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, pytest.param(gpu_on_cpu.cuda, marks=pytest.mark.thorough)])
def test_hyper_connections(device: Device, tmp_path: Path) -> None:
    """And sparse attention behind dense attention, and a sigmoid in place of SiLU behind the kernel's recurrence."""
    geometry = replace(
        HYPER_GEOMETRIES["hyper"],
        layer_types="LLF",
        hidden_size=128,
        expert_size=128,
        group_size=64,
        heads=8,
        value_heads=8,
        ngram_size=512,  # no further matrix has the shape of the outputs' matrices
    )
    checkpoint = write_checkpoint(tmp_path, geometry, seed=0, layout="mlx4", dtype="F32")
    prompt, steps = [token % geometry.vocab_size for token in 2 * PROMPT[:15]], STEPS[:1]
    expected = compute_logits(checkpoint, prompt, steps, kernels="reference")
    with device(mx.float32) as launches:
        assert difference(compute_logits(checkpoint, prompt, steps, launches=launches), expected) < EXACT
        assert ran(launches, *MIXERS[:1], *SPLIT)


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, pytest.param(gpu_on_cpu.cuda, marks=pytest.mark.thorough)])
def test_one_wait_for_each_layer_that_reads(device: Device, tiny_pack: Path) -> None:
    """And one for the logits; with all experts in memory only that."""
    for options, expected in (
        ({"backend": "pread", "slots": 5}, TINY.num_layers + 1),
        ({"backend": "pread", "slots": 5, "prefetch": "next_router"}, TINY.num_layers + 1),
        ({"backend": "resident"}, 1),
    ):
        with device(mx.float32), flashmoe_mlx.load(tiny_pack, **options) as engine:
            cache = engine.new_cache()
            engine.forward([1], cache)
            before = engine.runner.clock.waits
            engine.forward([2], cache)
            assert engine.runner.clock.waits - before == expected


@pytest.mark.parametrize(
    ("device", "slots"),
    [
        pytest.param(gpu_on_cpu.cuda, 5, marks=pytest.mark.thorough),
        (gpu_on_cpu.metal, 16),
        pytest.param(gpu_on_cpu.cuda, 16, marks=pytest.mark.thorough),
        pytest.param(gpu_on_cpu.metal, 5, marks=pytest.mark.thorough),
    ],
)
def test_the_shared_expert_is_fused_with_routed_experts(device: Device, slots: int, tiny_pack: Path) -> None:
    """In bf16, the type of scales. Every token uses all experts, because rounding a score may change a choice."""
    options = {"slots": slots, "experts_k": TINY.num_experts, "steps": STEPS[:2]}
    with device() as launches:
        got = compute_logits(tiny_pack, launches=launches, **options)
        assert ran(launches, *SHARED)
        assert ran(launches, *SPLIT) == (slots < TINY.num_experts), "the first group takes it along"
        rounded = compute_logits(tiny_pack, kernels="reference", **options)
    assert difference(got, rounded) < ROUNDED


@pytest.mark.parametrize(
    ("gpu", "kernels"),
    [
        pytest.param(
            gpu_on_cpu.HOPPER,
            (
                "routed_experts_fused_with_shared_expert_chooses",
                "quantized_matvec_stream_with_norm",
                "attention_decode_tensor",
            ),
            id="hopper",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            gpu_on_cpu.AMPERE,
            ("routed_experts_gate_up_tensor_with_shared_expert", "quantized_matvec_tensor", "attention_decode_tensor"),
            id="ampere",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_tensor_cores(gpu: Gpu, kernels: tuple[str, ...], whole_chunks: Path) -> None:
    options = {"backend": "resident", "prompt": PROMPT[:2], "steps": STEPS[:2]}
    with gpu_on_cpu.cuda(gpu=gpu) as launches:
        got = compute_logits(whole_chunks, launches=launches, **options)
        assert ran(launches, *kernels)
        rounded = compute_logits(whole_chunks, kernels="reference", **options)
    assert difference(got, rounded) < ROUNDED


def test_dispatches_of_a_step_on_hopper(whole_chunks: Path) -> None:
    """Every operation of a layer is a kernel of ours: 5 in a layer with a recurrence, 6 in a layer with attention."""
    with gpu_on_cpu.cuda() as launches, flashmoe_mlx.load(whole_chunks, backend="resident") as engine:
        cache = engine.new_cache()
        engine.forward([1], cache)
        launches.clear()
        engine.forward([2], cache)
        attention = [isinstance(layer.mixer, Attention) for layer in engine.model.layers]
    assert launches == Counter(
        embedding_body=1,
        quantized_matvec_stream_with_norm=2 * len(attention),  # projections and router; MLX multiplies with 265 rows
        gated_delta_net_step=attention.count(False),
        attention_decode_tensor=attention.count(True),
        attention_merge=attention.count(True),
        quantized_matvec_stream_with_residual=attention.count(True),
        quantized_matvec_body_with_residual=attention.count(False),  # outputs of 128 columns
        routed_experts_fused_with_shared_expert_chooses=len(attention),
    )


def test_cuda_launches_kernels_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct launches are faster than MLX's graphs; the environment may choose otherwise."""
    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS", raising=False)
    with gpu_on_cpu.cuda():
        choose("auto")
        assert os.environ["MLX_USE_CUDA_GRAPHS"] == "0"
        monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "1")
        choose("auto")
    assert os.environ["MLX_USE_CUDA_GRAPHS"] == "1"


def test_a_cache_that_grows_while_kernels_write_into_it(tmp_path: Path) -> None:
    pack = synthetic_pack("long", replace(TINY, max_context=512), tmp_path).folder
    prompt = (PROMPT * 13)[:254]
    expected = compute_logits(pack, prompt=prompt, kernels="mlx")
    with gpu_on_cpu.metal(mx.float32):
        assert difference(compute_logits(pack, prompt=prompt), expected) < EXACT


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, gpu_on_cpu.cuda])
@pytest.mark.sampled(1)
def test_an_answer_is_the_same(device: Device, tiny_pack: Path) -> None:
    def answer(**how: Any) -> list[int]:
        with flashmoe_mlx.load(tiny_pack, **how) as engine:
            pieces = engine.generate("Question: what is 17 plus 25?", max_tokens=5, raw=True)
            return [token for piece in pieces for token in piece.token_ids]

    expected = answer(kernels="reference")
    assert len(set(expected)) > 1
    with device(mx.float32):
        assert answer(slots=7, prefetch="early_router") == expected


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, pytest.param(gpu_on_cpu.cuda, marks=pytest.mark.thorough)])
@pytest.mark.thorough
def test_sequences_together(device: Device, tiny_pack: Path) -> None:
    """Steps of 3 rows and of more than every kernel's limit take checked paths only: warnings are errors.

    The first sequence is taken back to a snapshot between them, into which no kernel may have written.
    """
    with device(mx.float32), flashmoe_mlx.load(tiny_pack) as engine:
        runner = engine.runner
        count = 10

        def begun(index: int, max_tokens: int) -> Sequence:
            request = Request([index + 1, 17, 42], ChosenSampling(SamplingOptions()), max_tokens)
            sequence = runner.begin(request)
            runner.prefill(sequence)
            return sequence

        def decoded(sequences: list[Sequence]) -> list[list[int]]:
            while running := [sequence for sequence in sequences if sequence.finish_reason is None]:
                runner.decode(running)
            return [sequence.token_ids for sequence in sequences]

        with runner.exclusive():
            expected = [decoded([begun(index, 3)])[0] for index in range(count)]
            sequences = [begun(index, 3) for index in range(count)]
            snapshot = sequences[0].cache.snapshot()
            runner.decode(sequences[:3])
            sequences[0].cache.restore(snapshot)
            del sequences[0].token_ids[1:]
            assert decoded(sequences) == expected


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, gpu_on_cpu.cuda])
def test_scales_have_the_type_of_activations(device: Device, tiny_pack: Path) -> None:
    """Kernels for GPUs need scales in the type of activations; kernels for CPUs accept the scales of the file."""
    with device(mx.float32):
        assert not choose("auto").accepts_any_scale_dtype
        with flashmoe_mlx.load(tiny_pack) as engine:
            assert engine.model.head.scales is not None
            assert engine.model.head.scales.dtype == mx.float32


def test_the_properties_of_a_gpu() -> None:
    with gpu_on_cpu.cuda():
        assert memory.slots_on_gpu()
        assert memory.available_memory() == gpu_on_cpu.FREE_MEMORY
        assert activation_type() == mx.bfloat16
        assert choose("auto").dense_experts is not None
    with gpu_on_cpu.metal():
        assert not memory.slots_on_gpu()
        assert choose("auto").dense_experts is None
    assert activation_type() == mx.float32


@pytest.mark.parametrize("device", [gpu_on_cpu.metal, pytest.param(gpu_on_cpu.cuda, marks=pytest.mark.thorough)])
@pytest.mark.thorough
def test_the_probe_checks_kernels_for_every_k_that_it_measures(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an unchecked path the probe would measure MLX's operation as the kernel; warnings are errors."""
    sizes = replace(TINY, num_layers=2)
    monkeypatch.setattr(probe, "SIZES", {"large": sizes, "small": sizes})
    monkeypatch.setattr(probe, "EXPERTS", (1, 4))
    monkeypatch.setattr(probe, "WAYS", {"pread warm": ("pread", {})})
    monkeypatch.setattr(probe, "_COPIED", 2**8)
    monkeypatch.setattr(probe, "_LEAST_ROUNDS", 1)
    with device() as launches:
        found = probe.probe(tmp_path, 0, lambda _: None)
        assert any(ran(launches, name) for name in SHARED)
    assert {point.experts_k for point in found.points} == {1, 4}


@pytest.mark.parametrize(
    ("dialect", "device"),
    [("metal", gpu_on_cpu.metal), pytest.param("cuda", gpu_on_cpu.cuda, marks=pytest.mark.thorough)],
)
def test_doctor_examines_the_kernels_of_a_gpu(
    dialect: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both types, with small sizes and one call: emulation is slow."""
    small = Geometry(256, 128, 4, 1, 64, 16, 1, 2, 64, 16)
    monkeypatch.setattr(doctor, "GEOMETRIES", {"397B": small, "35B": small})
    monkeypatch.setattr(doctor, "_CALLS", 1)
    monkeypatch.setattr(doctor, "_REPEATS", 1)
    monkeypatch.setattr(doctor, "measure_decoding", lambda: DecodeFinding(1.0, 1.0, 7))
    with device() as launches:
        doctor.run(doctor.Config(), tmp_path)
        assert ran(launches, *SHARED, *MIXERS, *PRODUCTS)
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert record["dialect"] == record["kernels"] == dialect
    found = {(f["kernel"], f["geometry"], f["dtype"]) for f in record["findings"] if f["passed"]}
    operations = ("routed_experts", "gated_delta_net", "attention", "quantized_matvec", "normed_matvec")
    assert found == set(product(operations, ("397B", "35B"), ("float32", "bfloat16")))
    shown = capsys.readouterr().err
    assert f"Custom kernels: {dialect}." in shown
    assert "1.00 ms a token, 1.0 waits a token, 7 dispatches a token" in shown


class Driver:
    """The functions of NVIDIA's driver that the package calls; every call returns ``status``."""

    def __init__(self, status: int) -> None:
        self._status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._status

    def cuDeviceGet(self, device: object, ordinal: int) -> int:  # noqa: N802
        return self._status

    def cuDeviceGetAttribute(self, value: Any, number: int, device: object) -> int:  # noqa: N802
        value._obj.value = {16: 132, 75: 9, 76: 0, 97: 232448}[number]  # cuda.h
        return self._status


def test_the_properties_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(0))
    assert nvidia.gpu.__wrapped__() == Gpu(multiprocessors=132, capability=9, shared_memory=232448)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(3))
    with pytest.raises(RuntimeError, match="reports error 3"):
        nvidia.gpu.__wrapped__()


def test_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(RuntimeError, match="does not load"):
        nvidia.gpu.__wrapped__()
