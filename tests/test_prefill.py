"""Prompts: blocks of tokens, one pass over their experts, chunks chosen by free memory."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

import flashmoe_mlx
from flashmoe_mlx.custom_kernels.cases import GEOMETRIES
from flashmoe_mlx.custom_kernels.dense_experts import reference as dense_reference
from flashmoe_mlx.custom_kernels.random_inputs import RandomInputs
from flashmoe_mlx.custom_kernels.routed_experts import grouped
from flashmoe_mlx.custom_kernels.routed_experts import reference as routed_reference
from flashmoe_mlx.custom_kernels.routed_experts.samples import format_of
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation import prefill_chunk
from flashmoe_mlx.generation.prefill_chunk import choose_chunk
from flashmoe_mlx.layers.sequences import BLOCK, blocks
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.models.prompt_memory import MOST_TOKENS

TOKENS = list(range(5, 145))


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pack with more experts than two groups have."""
    sizes = {**TINY.__dict__, "num_experts": 40, "num_layers": 2, "max_context": 512}
    return synthetic_pack("many", type(TINY)(**sizes), tmp_path_factory.mktemp("cache")).folder


BACKENDS: list[tuple[str, dict[str, Any]]] = [
    ("pread", {}),
    ("pread", {"slots": 3, "direct": True}),
    ("pread", {"slots": 40}),
    ("io_uring", {"registered": True, "slots": 7}),
    ("mmap", {"slots": 5}),
    ("ram_hybrid", {"budget_gib": 0.0015, "slots": 40}),
    ("ram_hybrid", {"budget_gib": 1.0, "reader": "io_uring", "direct": True}),
]


@pytest.mark.parametrize(("backend", "options"), BACKENDS)
def test_a_prompt_reads_each_of_its_experts_once(backend: str, options: dict[str, Any], many_experts: Path) -> None:
    chosen: dict[int, set[int]] = {}
    with flashmoe_mlx.load(many_experts) as plain:
        plain.runner.meter.observer = lambda layer, experts: chosen.setdefault(layer, set()).update(
            experts.ravel().tolist()
        )
        expected = plain.logits(TOKENS)
    experts = sum(map(len, chosen.values()))
    with flashmoe_mlx.load(many_experts, backend, **options) as engine:
        np.testing.assert_array_equal(engine.logits(TOKENS), expected)
        stats = engine.store.stats()
        assert (stats.requests, stats.hits, stats.misses) == (experts, 0, experts)
        assert stats.bytes_read == experts * engine.store.layout.record_bytes
        assert experts > 2 * 32


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=6), most=st.sampled_from([64, 128, 1024]))
def test_blocks_cover_every_row_once(lengths: list[int], most: int) -> None:
    total, row, done = sum(lengths), 0, [0] * len(lengths)
    for block in blocks(lengths, most):
        assert block.rows.start == row < block.rows.stop <= min(total, row + most)
        assert block.rows.stop == total or block.rows.stop % 64 == 0
        row = block.rows.stop
        assert sum(block.lengths) == row - block.rows.start
        for sequence, length in zip(range(len(lengths))[block.sequences], block.lengths, strict=True):
            assert done[:sequence] == lengths[:sequence]
            assert length > 0
            done[sequence] += length
    assert done == lengths


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the tokens of a pass into blocks of 64."""
    for module in ("models.decoder", "moe.experts", "moe.router"):
        monkeypatch.setattr(f"flashmoe_mlx.{module}.BLOCK", 64)


@pytest.mark.parametrize("kernels", ["auto", "mlx"])
def test_blocks_do_not_change_logits(kernels: str, many_experts: Path, request: pytest.FixtureRequest) -> None:
    with flashmoe_mlx.load(many_experts, kernels=kernels) as engine:
        whole = engine.logits(TOKENS)
        request.getfixturevalue("small_blocks")
        divided = engine.logits(TOKENS)
        cache = engine.new_cache()
        following = np.concatenate([engine.forward(part, cache) for part in (TOKENS[:70], TOKENS[70:])])
    if kernels == "auto":
        np.testing.assert_array_equal(divided, whole)
    for logits in (divided, following):
        np.testing.assert_allclose(logits, whole, rtol=0, atol=2e-4)


@pytest.mark.usefixtures("small_blocks")
def test_a_long_chunk_reports_progress_and_ends_inside_a_layer(many_experts: Path) -> None:
    reports: list[int] = []
    with flashmoe_mlx.load(many_experts) as engine:
        generation = engine.generate("a" * 150, raw=True, max_tokens=1, on_prefill=lambda done, _: reports.append(done))
        list(generation)
        assert reports == sorted(reports)
        assert len(set(reports)) > 2 * engine.model.config.num_layers

        def cancel(done: int, _: int) -> None:
            if done >= 100:  # of 150 in the second of two layers
                cancelled.cancel()

        cancelled = engine.generate("a" * 150, raw=True, max_tokens=1, on_prefill=cancel)
        assert [piece.finish_reason for piece in cancelled] == ["cancelled"]
        assert cancelled.stats()["prefill"]["tokens"] == 0
        np.testing.assert_array_equal(engine.logits(TOKENS), engine.logits(TOKENS))


@pytest.fixture(scope="module")
def engine(many_experts: Path) -> Iterator[Engine]:
    with flashmoe_mlx.load(many_experts) as loaded:
        yield loaded


def test_the_chunk_depends_on_free_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    need = engine.model.prompt_memory
    chunks = []
    for free in (0, 2**24, 2**25, 2**27, 2**40):
        monkeypatch.setattr(prefill_chunk, "available_memory", lambda free=free: free)
        assert choose_chunk(need, 100) == BLOCK
        chunks.append(choose_chunk(need, 20_000))
    assert chunks[0] == 1000, "20 chunks of similar size"
    assert chunks == sorted(chunks)
    assert BLOCK < chunks[2] < chunks[-1] == 20_000
    assert choose_chunk(need, MOST_TOKENS + 2) == MOST_TOKENS // 2 + 1
    chosen = engine.generate("a" * 150, raw=True, max_tokens=1)
    explicit = engine.generate("a" * 150, raw=True, max_tokens=1, prefill_chunk=77)
    assert (chosen.stats()["prefill_chunk"], explicit.stats()["prefill_chunk"]) == (BLOCK, 77)


def test_a_block_is_written_in_place(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = engine.model.layers[0]
    x = mx.zeros((4 * BLOCK, layer.input_norm.size))
    mx.eval(x)
    before, mx_peak = mx.get_active_memory(), mx.reset_peak_memory
    mx_peak()
    monkeypatch.setattr(type(layer.mixer), "__call__", lambda self, projected, caches, lengths, residual: residual + 1)
    monkeypatch.setattr(type(layer), "project", lambda self, rows: ())
    context = flashmoe_mlx.moe.context.ForwardContext(engine.runner.clock)  # type: ignore[attr-defined]
    mixed = layer._mix(x, [layer.mixer.new_cache()], [len(x)], context)
    assert (np.array(mixed) == 1).all()
    assert mx.get_peak_memory() - before < x.nbytes


@pytest.mark.usefixtures("small_blocks")
def test_states_are_kept_inside_and_between_blocks(engine: Engine) -> None:
    cache, offsets = engine.new_cache(), [30, 64, 100, len(TOKENS)]
    cache.keep_states(offsets)
    engine.forward(TOKENS, cache)
    for offset, kept in zip(offsets, cache.take_states(len(offsets)), strict=True):
        alone = engine.new_cache()
        engine.forward(TOKENS[:offset], alone)
        for state, expected in zip(kept, alone.state(), strict=True):
            assert (state is None) == (expected is None)
            if state is not None:
                for array, other in zip(state.arrays(), expected.arrays(), strict=True):
                    np.testing.assert_allclose(array, other, rtol=0, atol=1e-5)


def test_experts_of_few_and_of_many_tokens_are_applied_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = grouped._batches(np.array([5000, 4900, 2000, 30, 20, *[8] * 20]))
    assert list(batches) == [(0, 2), (2, 4), (4, 20), (20, 25)]
    assert list(grouped._batches(np.array([2**15, 1]))) == [(0, 1), (1, 2)]

    form, _ = format_of(GEOMETRIES["small"], mx.float32, 4, 32)
    inputs, random = RandomInputs(mx.float32, 0), np.random.default_rng(0)
    slab = inputs.slab(form, 6)
    x, weights = inputs.normal(40, form.hidden_size), mx.softmax(inputs.normal(40, 2), axis=-1)
    rows = np.stack([np.zeros(40), random.integers(-1, 6, 40)], axis=1).astype(np.int32)
    rows[rows[:, 1] == 0, 1] = -1
    arguments = (x, slab, rows, weights, form, dense_reference.dense_experts, grouped.RowKernels())
    together = grouped.grouped_experts(*arguments)
    monkeypatch.setattr(grouped, "_MOST_PADDING", 4)
    apart = grouped.grouped_experts(*arguments)
    expected = routed_reference.routed_experts(x, slab, mx.array(rows), weights, form)
    for found in (together, apart):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "tokens", [pytest.param(8192, marks=pytest.mark.nightly), pytest.param(12_000, marks=pytest.mark.thorough)]
)
def test_peak_memory_is_as_estimated(tokens: int, tmp_path: Path) -> None:
    """The peak of a process that reads a long prompt is within 10 % of the estimate of ``task=estimate``."""
    sizes = replace(
        TINY, num_layers=4, hidden_size=4096, num_heads=2, num_kv_heads=1, expert_size=128, shared_expert_size=128,
        max_context=40_000,
    )  # fmt: skip
    pack = synthetic_pack("long", sizes, tmp_path).folder
    tool = Path(__file__).parents[1] / "tools" / "measure_prefill.py"
    command = [sys.executable, str(tool), "--pack", str(pack), "--tokens", str(tokens), "--memory"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count, _, _, peak, estimate, ratio, _ = [float(cell) for cell in shown.splitlines()[2].strip("| ").split("|")]
    assert count == tokens
    assert estimate > 0.3, "the program itself takes most of the memory"
    assert 0.9 <= ratio <= 1.1, f"{peak} GB, estimated {estimate} GB"
