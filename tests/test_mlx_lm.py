"""Every model of mlx-lm with routed experts, through this package and in memory: ``pytest -m oracle``.

``python tests/test_mlx_lm.py`` writes the table in ``docs/mlx-lm.md``.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from coded_checkpoints import e4m3, write_tensors
from oracle.mlx_lm_models import NOT_TRIED, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.adapters import library
from flashmoe_mlx.adapters.model import AdaptedModel
from flashmoe_mlx.errors import CheckpointError, InputError, PackError
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.pack.writer import pack_checkpoint

pytestmark = pytest.mark.oracle
pytest.importorskip("mlx_lm.utils", reason="needs the oracle extra", exc_type=ImportError)

DOCUMENT = Path(__file__).parent.parent / "docs" / "mlx-lm.md"
BACKENDS = ("checkpoint", "pread", "ram_hybrid", "resident")
PACK_BACKENDS = ("pread", "mmap", "io_uring", "ram_hybrid", "resident")
NATIVE = ("qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next")
"""Files whose models run natively, and dense models."""
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


def assert_equal(expected: tuple[Any, Any], folder: Path, *options: dict[str, Any]) -> None:
    """Assert that logits with each of ``options`` equal ``expected``."""
    for own in options:
        for ours, theirs in zip(streamed(folder, **own), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", TRIED)
def test_logits_equal_those_of_mlx_lm_in_every_bit(name: str, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path)
    expected = in_memory(tmp_path)
    assert_equal(expected, tmp_path, {"backend": "checkpoint", "slots": 3}, {"backend": "resident"})
    pack_checkpoint(tmp_path, tmp_path / "pack", None)
    assert_equal(expected, tmp_path / "pack", {"backend": "mmap"})


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h"])
def test_dense_experts_and_other_backends(name: str, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path, bits=None)
    expected = in_memory(tmp_path)
    assert_equal(expected, tmp_path, *({"backend": backend} for backend in BACKENDS))
    pack = pack_checkpoint(tmp_path, tmp_path / "pack", None)
    assert verify_pack(pack) == []
    assert_equal(expected, pack.folder, *({"backend": backend} for backend in PACK_BACKENDS))


def test_experts_that_mlx_lm_computes_come_from_a_pack(tmp_path: Path) -> None:
    """The class of DeepSeek-V3 decodes FP8 and stacks the experts when it loads a checkpoint."""
    write_checkpoint("deepseek_v3", tmp_path, bits=None)
    encode_float8(tmp_path)
    expected = in_memory(tmp_path)
    with pytest.raises(CheckpointError, match="task=pack") as refused:
        flashmoe_mlx.load(tmp_path, "checkpoint")
    assert refused.value.code == "needs_pack"
    pack_checkpoint(tmp_path, tmp_path / "pack", None)
    assert_equal(expected, tmp_path / "pack", {"backend": "pread"}, {"backend": "resident"})


def encode_float8(folder: Path) -> None:
    """Write the projections of a checkpoint of DeepSeek-V3 in FP8, each with a scale, one tensor an expert."""
    values = np.array([e4m3(code) for code in range(256)], np.float32)
    values[np.isnan(values)] = np.inf
    (path,) = folder.glob("*.safetensors")
    stored: dict[str, tuple[str, Any]] = {}
    for name, array in mx.load(str(path)).items():
        dense = np.array(array.astype(mx.float32))
        before, stacked, part = name.partition(".switch_mlp.")
        experts = range(len(dense)) if stacked else ()
        named = {f"{before}.experts.{expert}.{part}": dense[expert] for expert in experts} or {name: dense}
        for own, weight in named.items():
            stored[own] = ("F32", weight)
            if weight.ndim == 2 and "proj" in own and "kv_b" not in own:
                scale = np.abs(weight).max() / np.float32(448)
                codes = np.abs(weight[..., None] / scale - values).argmin(-1).astype(np.uint8)
                stored |= {own: ("F8_E4M3", codes), f"{own}_scale_inv": ("F32", np.full((1, 1), scale, np.float32))}
    write_tensors(path, stored)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("options", [{"bits": 2}, {"group_size": 32}, {"resident_bits": 8}, {"quantiser": "minmax"}])
def test_packs_keep_the_weights(options: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint("olmoe", tmp_path / "checkpoint")
    with pytest.raises(InputError, match="mlx-lm") as refused:
        pack_checkpoint(tmp_path / "checkpoint", tmp_path / "pack", **{"bits": None, **options})
    assert refused.value.code == "not_for_mlx_lm"


def test_an_interrupted_pack_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("olmoe", tmp_path / "checkpoint")
    whole = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "whole", None)
    with monkeypatch.context() as patched:
        patched.setattr("flashmoe_mlx.pack.adapted.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack_checkpoint(tmp_path / "checkpoint", tmp_path / "pack", None)
    written = (tmp_path / "pack" / "experts-published" / "layer_00.bin").stat().st_mtime_ns
    pack = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "pack", None)
    assert (tmp_path / "pack" / "experts-published" / "layer_00.bin").stat().st_mtime_ns == written
    assert pack.manifest == whole.manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["layouts"][0]["components"].clear(),
        lambda entry: entry["layouts"][0]["components"][0].update(dtype="F8"),
        lambda entry: entry["layouts"][0]["components"][0].update(shape=[-1, 8]),
        lambda entry: entry["layouts"][0]["components"][0].update(shape=[2**30, 2**30]),
        lambda entry: entry["layouts"][0]["components"][0].update(offset=4),
        lambda entry: entry["layouts"][0].update(bits="4"),
        lambda entry: entry["layers"].pop(),
        lambda entry: entry.update(layouts=[None]),
    ],
)
def test_layouts_in_manifests_are_checked(change: Any, tmp_path: Path) -> None:
    write_checkpoint("olmoe", tmp_path / "checkpoint")
    pack = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "pack", None)
    manifest = json.loads((pack.folder / "pack.json").read_text())
    change(manifest["variants"]["published"])
    (pack.folder / "pack.json").write_text(json.dumps(manifest))
    with pytest.raises(PackError) as refused:
        open_pack(pack.folder)
    assert refused.value.code == "invalid_manifest"
    assert "\n" not in str(refused.value)


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
    lines = ["| file of mlx-lm | runs | backends of the checkpoint | backends of a pack |", "| --- | --- | --- | --- |"]
    for name in files():
        if name in NATIVE:
            lines.append(f"| `{name}` | not needed: it runs natively, or is dense | | |")
        elif name in NOT_TRIED:
            lines.append(f"| `{name}` | not tried: {NOT_TRIED[name]} | | |")
        else:
            lines.append(
                f"| `{name}` | equal to mlx-lm in every bit | {', '.join(BACKENDS)} | {', '.join(PACK_BACKENDS)} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    head, mark, _ = DOCUMENT.read_text().partition("<!-- table -->\n")
    DOCUMENT.write_text(f"{head}{mark}\n{table()}")
