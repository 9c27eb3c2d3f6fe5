"""Models with random sizes equal transformers: ``pytest -m oracle``, with the ``oracle`` extra installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import native

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch", reason="needs the oracle extra", exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason="needs the oracle extra", exc_type=ImportError)

from oracle.random_models import FAMILIES, random_model  # noqa: E402  (it imports torch)

PROMPT, STEPS = 34, 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 40), marks=pytest.mark.nightly)], ids=str)
def test_logits(family: str, seeds: range, tmp_path: Path) -> None:
    """For prompts at once and in parts, and for single steps, with and without room for all experts."""
    for seed in seeds:
        model = random_model(family, seed)
        tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, PROMPT + STEPS).astype(np.int32)
        expected = transformers_logits(model, tokens)
        folder = tmp_path / str(seed)
        model.save_pretrained(folder, save_original_format=bool(seed % 2))
        slots = {"slots": model.config.num_experts} if seed % 2 else {}
        with flashmoe_mlx.load(folder, **slots) as engine:
            cache = engine.new_cache()
            rows = [engine.forward(part, cache) for part in parts_of(tokens)]
            for got in (np.concatenate(rows), engine.logits(tokens, prefill_chunk=7)):
                assert np.abs(got - expected).max() < 2e-3, seed
                assert (got.argmax(-1) == expected.argmax(-1)).all(), seed


def transformers_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        parts = [torch.from_numpy(part.astype(np.int64))[None] for part in parts_of(tokens)]
        rows = [model(part, cache=cache, use_cache=True).logits[0].numpy() for part in parts]
    return np.concatenate(rows)


def parts_of(tokens: np.ndarray) -> list[np.ndarray]:
    """Return the prompt, and each further token."""
    return np.split(tokens, range(PROMPT, len(tokens)))


@pytest.mark.parametrize("columns", [3, 30, 400, 4000])
def test_equal_values_are_chosen_as_by_torch(columns: int) -> None:
    random = np.random.default_rng(columns)
    for count in {1, 2, columns // 100 or 1, columns // 2, columns}:
        values = np.maximum(random.normal(-1, 1, (60, columns)), 0).astype(np.float32)
        lengths = random.integers(count, columns + 1, len(values)).astype(np.int32)
        indices = native.largest(values, lengths, count)
        for row, length, own in zip(values, lengths, indices, strict=True):
            theirs = torch.from_numpy(row[:length]).topk(count).indices
            assert set(own.tolist()) == set(theirs.tolist())
