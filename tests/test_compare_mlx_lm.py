"""The comparison with mlx-lm gives both engines the same weights: on a CPU, in f32, both generate the same tokens."""

import sys
from pathlib import Path

import pytest

from flashmoe_mlx.made_models.synthetic import synthetic_pack

pytestmark = pytest.mark.oracle
pytest.importorskip("mlx_lm.generate", reason="needs the oracle extra", exc_type=ImportError)
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import compare_mlx_lm  # noqa: E402


@pytest.mark.parametrize("k", [4, 2])
def test_both_engines_say_the_same_tokens(k: int, tmp_path: Path) -> None:
    pack = synthetic_pack("compare", compare_mlx_lm.TINY, tmp_path)
    found = compare_mlx_lm.compare(pack, k, prompt=20, tokens=12, rounds=2)
    assert compare_mlx_lm.equal_tokens(found) == 12
    for rounds in found.values():
        assert [len(seconds) for seconds in rounds.seconds] == [12, 12]
        assert len(rounds.milliseconds(skip=4)) == 2
