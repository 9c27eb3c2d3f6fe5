"""Logits equal those of transformers in the recordings of ``oracle/``, which can be read without torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from oracle.recorded import (
    CASES,
    DECODE_STEPS,
    FIXTURES,
    HYPER_CASES,
    LONG_CASES,
    LONG_PROMPT_LENGTH,
    LONG_ROWS,
    OLDER_CASES,
    PROMPT_LENGTH,
    TOLERANCE,
    Case,
    LongCase,
    Recording,
)
from tiny_checkpoints import GEOMETRIES, Geometry, Layout, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.pack.writer import pack_checkpoint

EVERYDAY_NAMES = (
    "moe-mlp-seed0-dense-f32",
    "moe-yarn-seed0-mlx4-bf16",
    "next-mlp-seed0-dense-f32",
    "next-yarn-seed0-mlx4-bf16",
    "hyper-seed0-dense-f32",
    "hyper-seed0-mlx4-bf16",
)
SAME_ENGINE_TOLERANCE = 1e-4
"""Largest difference between two divisions of the same tokens into passes: only the order of float32 sums differs."""


@dataclass(frozen=True)
class Opened:
    """An engine with the weights of a case, and the recording of transformers."""

    case: Case
    engine: flashmoe_mlx.Engine
    recording: Recording

    def check(self, logits: np.ndarray, first_row: int = 0) -> None:
        expected = self.recording.logits[first_row : first_row + len(logits)]
        assert logits.dtype == np.float32
        assert logits.shape == expected.shape
        difference = np.abs(logits - expected).max(axis=-1)
        worst = int(difference.argmax())
        assert difference[worst] <= TOLERANCE, f"logits differ by {difference[worst]:.1e} at token {first_row + worst}"
        np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def open_case(case: Case, folder: Path) -> flashmoe_mlx.Engine:
    """Open an engine on the checkpoint, or on a pack of it if the checkpoint is quantized."""
    source = case.write_checkpoint(folder / "checkpoint")
    if case.encoding == "mlx4":
        pack_checkpoint(source, folder / "pack", bits=(4,))
        source = folder / "pack"
    return flashmoe_mlx.load(source, experts_k=case.experts_k)


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    """Let engines compute in f32 if they serve a whole module, since they are opened before the fixtures of a test."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


EVERYDAY = [
    pytest.param(
        case,
        marks=[pytest.mark.thorough]
        if case in (*OLDER_CASES, *HYPER_CASES) and case.name not in EVERYDAY_NAMES
        else [],
    )
    for case in CASES
]


@pytest.fixture(scope="module", params=EVERYDAY, ids=lambda case: case.name)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    case: Case = request.param
    with open_case(case, tmp_path_factory.mktemp(case.name)) as engine:
        yield Opened(case, engine, case.load())


@pytest.mark.parametrize(
    ("chunk", "tokens"),
    # Small chunks take long; test_oracle.py tests all of them, and decoding takes single tokens as well.
    [
        pytest.param(None, 96, id="one-shot"),
        pytest.param(64, 96, id="chunks-of-64"),
        pytest.param(7, 29, id="chunks-of-7"),
        pytest.param(1, 12, id="chunks-of-1", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.sampled(40)
def test_prefill_equals_transformers(opened: Opened, chunk: int | None, tokens: int) -> None:
    opened.check(opened.engine.logits(opened.recording.tokens[:tokens], prefill_chunk=chunk))


@pytest.mark.sampled(16)
def test_cached_decode_equals_transformers(opened: Opened) -> None:
    tokens, cache = opened.recording.tokens, opened.engine.new_cache()
    opened.check(opened.engine.forward(tokens[:PROMPT_LENGTH], cache))
    steps = range(PROMPT_LENGTH, PROMPT_LENGTH + DECODE_STEPS)
    decoded = np.concatenate([opened.engine.forward(tokens[step : step + 1], cache) for step in steps])
    opened.check(decoded, PROMPT_LENGTH)


@pytest.mark.thorough
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_past_4096_tokens(case: LongCase, tmp_path: Path) -> None:
    """A prompt in the chunks that the engine chooses by itself, then single steps, across every growth of a cache."""
    recording = case.load()
    with open_case(case, tmp_path) as engine:
        cache = engine.new_cache()
        prompt = recording.tokens[:LONG_PROMPT_LENGTH]
        rows = [engine.forward(chunk, cache) for chunk in np.split(prompt, range(1024, LONG_PROMPT_LENGTH, 1024))]
        steps = range(LONG_PROMPT_LENGTH, LONG_PROMPT_LENGTH + DECODE_STEPS)
        rows += [engine.forward(recording.tokens[step : step + 1], cache) for step in steps]
    Opened(case, engine, recording).check(np.concatenate(rows)[LONG_ROWS])


def test_every_recording_is_used() -> None:
    assert {path.stem for path in FIXTURES.iterdir()} == {case.name for case in (*CASES, *LONG_CASES)}


def some_tokens(geometry: Geometry, count: int = 24) -> np.ndarray:
    return np.arange(7, 7 + 13 * count, 13, dtype=np.int32) % geometry.vocab_size


def logits_of(folder: Path, geometry: Geometry, experts_k: int | None = None) -> np.ndarray:
    with flashmoe_mlx.load(folder, experts_k=experts_k) as engine:
        return engine.logits(some_tokens(geometry))


@pytest.fixture(params=GEOMETRIES.values(), ids=lambda geometry: geometry.name)
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return request.param


def test_chunks_and_decode_agree(geometry: Geometry, tmp_path: Path) -> None:
    tokens = some_tokens(geometry)
    with flashmoe_mlx.load(write_checkpoint(tmp_path, geometry, seed=0)) as engine:
        whole = engine.logits(tokens)
        chunked = engine.logits(tokens, prefill_chunk=9)
        cache = engine.new_cache()
        mixed = [engine.forward(part, cache) for part in np.split(tokens, [1, 2, 14, 15, 16, 21])]
    np.testing.assert_allclose(chunked, whole, rtol=0, atol=SAME_ENGINE_TOLERANCE)
    np.testing.assert_allclose(np.concatenate(mixed), whole, rtol=0, atol=SAME_ENGINE_TOLERANCE)


def test_caches_do_not_share_state(tmp_path: Path) -> None:
    geometry = GEOMETRIES["plain"]
    with flashmoe_mlx.load(write_checkpoint(tmp_path, geometry, seed=0)) as engine:
        first, second = some_tokens(geometry), some_tokens(geometry)[::-1]
        caches = engine.new_cache(), engine.new_cache()
        rows: tuple[list[np.ndarray], ...] = ([], [])
        for parts in zip(np.split(first, 4), np.split(second, 4), strict=True):
            for sequence in (0, 1):
                rows[sequence].append(engine.forward(parts[sequence], caches[sequence]))
        for tokens, parts in zip((first, second), rows, strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), engine.logits(tokens, prefill_chunk=len(tokens) // 4))


def test_one_tensor_per_expert_is_the_same_as_fused(geometry: Geometry, tmp_path: Path) -> None:
    fused = write_checkpoint(tmp_path / "fused", geometry, seed=0, layout="fused")
    separate = write_checkpoint(tmp_path / "separate", geometry, seed=0, layout="per_expert")
    np.testing.assert_array_equal(logits_of(separate, geometry), logits_of(fused, geometry))


@pytest.mark.parametrize("layout", get_args(Layout))
def test_shards_and_tensors_of_other_parts_change_nothing(layout: Layout, tmp_path: Path) -> None:
    geometry = GEOMETRIES["plain"]
    whole = write_checkpoint(tmp_path / "whole", geometry, seed=0, layout=layout)
    sharded = write_checkpoint(tmp_path / "sharded", geometry, seed=0, layout=layout, shards=5, extras=True)
    np.testing.assert_array_equal(logits_of(sharded, geometry), logits_of(whole, geometry))


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_pack_is_the_same_as_its_checkpoint(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", geometry, seed=0, layout="mlx4", shards=3, extras=True)
    pack_checkpoint(checkpoint, tmp_path / "pack", bits=(4,))
    np.testing.assert_array_equal(logits_of(tmp_path / "pack", geometry), logits_of(checkpoint, geometry))


def test_as_many_experts_as_the_model_asks_for_is_the_default(tmp_path: Path) -> None:
    geometry = GEOMETRIES["plain"]
    folder = write_checkpoint(tmp_path, geometry, seed=0)
    np.testing.assert_array_equal(logits_of(folder, geometry, geometry.top_k), logits_of(folder, geometry))
