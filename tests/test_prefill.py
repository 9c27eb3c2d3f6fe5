"""Prompts: one pass over their experts, reads during computation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY

import flashmoe_mlx
from flashmoe_mlx.made_models.synthetic import synthetic_pack

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
        plain.runner.observer = lambda layer, experts: chosen.setdefault(layer, set()).update(experts.ravel().tolist())
        expected = plain.logits(TOKENS)
    experts = sum(map(len, chosen.values()))
    with flashmoe_mlx.load(many_experts, backend, **options) as engine:
        np.testing.assert_array_equal(engine.logits(TOKENS), expected)
        stats = engine.store.stats()
        assert (stats.requests, stats.hits, stats.misses) == (experts, 0, experts)
        assert stats.bytes_read == experts * engine.store.layout.record_bytes
        assert experts > 2 * 32
