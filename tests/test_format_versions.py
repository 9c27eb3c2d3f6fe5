"""Packs and traces of every released format version: each can still be opened and gives the recorded result."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from format_versions.record import TOKENS

import flashmoe_mlx
from flashmoe_mlx.formats.manifest import FORMAT_VERSION, MIXED_FORMAT_VERSION
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_pack

FOLDER = Path(__file__).parent / "format_versions"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("version", range(1, max(FORMAT_VERSION, MIXED_FORMAT_VERSION) + 1))
def test_packs_of_every_version_open(version: int, tmp_path: Path) -> None:
    name = f"pack-{version}"
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert verify_pack(open_pack(tmp_path / name)) == []
    with flashmoe_mlx.load(tmp_path / name) as engine:
        np.testing.assert_allclose(engine.logits(TOKENS)[-1], EXPECTED[name], atol=2e-3)


def test_traces_of_every_version_open() -> None:
    traces = sorted(FOLDER.glob("trace-*.moetrace"))
    assert traces
    for path in traces:
        trace = RoutingTrace.load(path)
        assert trace.experts.tolist() == EXPECTED[path.stem]
        assert (trace.num_experts, trace.prompt_tokens, trace.model) == (4, 2, "tiny")
