"""Every model of mlx-lm with routed experts, through this package and in memory: ``pytest -m oracle``.

``python tests/test_mlx_lm.py`` writes the table in ``docs/mlx-lm.md``.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracle.mlx_lm_models import NOT_TRIED, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.adapters import library
from flashmoe_mlx.adapters.model import AdaptedModel
from flashmoe_mlx.errors import InputError

pytestmark = pytest.mark.oracle
pytest.importorskip("mlx_lm.utils", reason="needs the oracle extra", exc_type=ImportError)

DOCUMENT = Path(__file__).parent.parent / "docs" / "mlx-lm.md"
BACKENDS = ("checkpoint", "pread", "ram_hybrid", "resident")
NATIVE = ("qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next")
"""Files whose models run natively or are dense."""
PROMPT = np.random.default_rng(0).integers(0, 299, 40).tolist()


def files() -> list[str]:
    """Return the names of the files of mlx-lm with routed experts."""
    folder = Path(library.mlx_lm("models").__path__[0])
    names = [path.stem for path in folder.glob("*.py") if path.stem not in ("switch_layers", "__init__")]
    return sorted(name for name in names if library._imports_switch(folder, name, set()))


TRIED = [name for name in files() if name not in (*NATIVE, *NOT_TRIED)]


def in_memory(folder: Path) -> tuple[Any, Any]:
    """Return mlx-lm's logits of ``PROMPT`` and of one more token, with everything in memory."""
    model, _ = library.mlx_lm("utils").load_model(folder)
    cache = library.mlx_lm("models.cache").make_prompt_cache(model)
    return tuple(np.array(model(mx.array([tokens]), cache=cache)[0].astype(mx.float32)) for tokens in (PROMPT, [5]))


def streamed(folder: Path, backend: str, **options: Any) -> tuple[Any, Any]:
    """Return the same logits through this package."""
    with flashmoe_mlx.load(folder, backend, **options) as engine:
        assert isinstance(engine.model, AdaptedModel)
        cache = engine.new_cache()
        return engine.forward(PROMPT, cache), engine.forward([5], cache)


@pytest.mark.parametrize("name", TRIED)
def test_logits_equal_those_of_mlx_lm_in_every_bit(name: str, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path)
    expected = in_memory(tmp_path)
    for options in ({"backend": "checkpoint", "slots": 3}, {"backend": "resident"}):
        for ours, theirs in zip(streamed(tmp_path, **options), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h"])
def test_dense_experts_and_other_backends(name: str, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path, bits=None)
    expected = in_memory(tmp_path)
    for backend in BACKENDS:
        for ours, theirs in zip(streamed(tmp_path, backend), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_models_answer_without_states_of_earlier_prompts_where_these_cannot_be_kept(tmp_path: Path) -> None:
    write_checkpoint("gpt_oss", tmp_path)
    with flashmoe_mlx.load(tmp_path, "checkpoint") as engine:
        assert "prompts are computed whole" in engine.setup["note"]
        assert engine.runner.prompt_cache is None


def test_another_number_of_experts_is_that_of_the_model(tmp_path: Path) -> None:
    write_checkpoint("olmoe", tmp_path)
    chosen = []
    with flashmoe_mlx.load(tmp_path, "checkpoint", 3) as engine:
        engine.observe_routing(lambda layer, experts: chosen.append(experts.shape))
        engine.logits(PROMPT)
    assert set(chosen) == {(len(PROMPT), 3)}


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"prefetch": "next_router"}, {"cache_dir": "conversations"}])
def test_options_without_effect_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint("olmoe", tmp_path)
    with pytest.raises(InputError, match="mlx-lm") as refused:
        flashmoe_mlx.load(tmp_path, "checkpoint", **options)
    assert refused.value.code == "not_for_mlx_lm"


def test_types_that_messages_name_are_those_of_mlx_lm() -> None:
    named = {type_ for type_ in library.MODEL_TYPES if library.has_experts(type_)}
    assert named == set(library.MODEL_TYPES)
    assert set(files()) - {"qwen3_5", "qwen3_5_moe", "bailing_moe_v3"} <= named


def test_the_document_lists_every_file() -> None:
    assert table() in DOCUMENT.read_text(), "run: python tests/test_mlx_lm.py"


def table() -> str:
    """Return the table of ``docs/mlx-lm.md``."""
    lines = ["| file of mlx-lm | runs | backends |", "| --- | --- | --- |"]
    for name in files():
        if name in NATIVE:
            lines.append(f"| `{name}` | not needed: it runs natively, or is dense | |")
        elif name in NOT_TRIED:
            lines.append(f"| `{name}` | not tried: {NOT_TRIED[name]} | |")
        else:
            lines.append(f"| `{name}` | equal to mlx-lm in every bit | {', '.join(BACKENDS)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    head, mark, _ = DOCUMENT.read_text().partition("<!-- table -->\n")
    DOCUMENT.write_text(f"{head}{mark}\n{table()}")
