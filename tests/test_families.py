"""Model families: the protocol, the example in docs/extend/family.md, and sizes against the caches of real models."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY
from hyper_checkpoints import HYPER_GEOMETRIES
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import GEOMETRIES, OLDER_GEOMETRIES, Geometry, dense_weights, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx import models
from flashmoe_mlx.checkpoint.resident import ResidentTensor
from flashmoe_mlx.checkpoint.support import why_not
from flashmoe_mlx.errors import CheckpointError, InputError
from flashmoe_mlx.formats.safetensors_header import TensorInfo
from flashmoe_mlx.made_models.byte_tokenizer import BYTE_TOKENS, write_byte_tokenizer
from flashmoe_mlx.made_models.synthetic import synthetic_config, synthetic_pack
from flashmoe_mlx.models.registry import families, family_of, find_family, parse_config
from flashmoe_mlx.pack import resident
from flashmoe_mlx.pack.writer import pack_checkpoint
from flashmoe_mlx.research.estimate.sizes import memory_need

ROOT = Path(__file__).parents[1]
TOKENS = np.arange(7, 200, 13, dtype=np.int32) % 173
ATTENTION_ONLY = replace(
    GEOMETRIES["text"], layer_types="FF", vocab_size=BYTE_TOKENS, rotary_fraction=1.0, rope_theta=1e6
)
ALL = {**GEOMETRIES, **OLDER_GEOMETRIES, **HYPER_GEOMETRIES}
PUBLISHED = {hub_id: config for family in families() for hub_id, config in family.published.items()}


def example() -> str:
    """Return the source of the family in docs/extend/family.md."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "extend" / "family.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return next(block for block in blocks if "FAMILY = " in block)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add the example as one more file of the package ``models``."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "toy_moe.py").write_text(example())
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    families.cache_clear()
    yield
    families.cache_clear()
    sys.modules.pop("flashmoe_mlx.models.toy_moe", None)


def toy_config(geometry: Geometry) -> dict[str, object]:
    return {
        "model_type": "toy_moe",
        "num_hidden_layers": geometry.num_layers,
        "hidden_size": geometry.hidden_size,
        "vocab_size": geometry.vocab_size,
        "max_position_embeddings": geometry.context,
        "num_local_experts": geometry.experts,
        "num_experts_per_tok": geometry.top_k,
        "intermediate_size": geometry.expert_size,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "shared_intermediate_size": geometry.shared_expert_size,
        "rope_theta": geometry.rope_theta,
    }


def write_toy(source: Path, folder: Path, geometry: Geometry) -> Path:
    """Write the checkpoint ``source`` of a Qwen3.5-MoE, with one tensor for each expert, as a checkpoint of the toy."""
    data = (source / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8:end]), bytearray(data[end:])
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    renamed = {}
    for name, entry in header.items():
        if name.endswith(("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")):
            begin, stop = entry["data_offsets"]
            values[begin:stop] = (np.frombuffer(values[begin:stop], "<f4") + np.float32(1)).tobytes()
        renamed[re.sub(r"(\.experts\.\d+\.)(\w+)", lambda match: match[1] + names[match[2]], name)] = entry
    text = json.dumps(renamed).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values)
    (folder / "config.json").write_text(json.dumps(toy_config(geometry)))
    return folder


def logits(folder: Path, **options: object) -> np.ndarray:
    with flashmoe_mlx.load(folder, **options) as engine:
        return engine.logits(TOKENS)


@pytest.mark.usefixtures("toy")
def test_example_family_is_found_without_a_list() -> None:
    assert [family.model_types[0] for family in families()] == [
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen4_exp",
        "toy_moe",
    ]
    assert why_not(toy_config(ATTENTION_ONLY)) is None
    config = parse_config(toy_config(ATTENTION_ONLY))
    assert family_of(config).series == ("Toy",)
    assert "Qwen3.8-Flash-Next and Toy" in str(why_not({"model_type": "step3p7", "num_experts": 64}))
    with pytest.raises(CheckpointError) as caught:
        parse_config({**toy_config(ATTENTION_ONLY), "hidden_act": "gelu"})
    assert caught.value.code == "unsupported_arithmetic"
    with pytest.raises(CheckpointError) as caught:
        find_family({"model_type": "toy_moe", "text_config": {"model_type": "qwen3_5_moe_text", "num_experts": 4}})
    assert caught.value.code == "unsupported_model"


@pytest.mark.parametrize(
    "lines",
    [
        "FAMILY = replace(FAMILY, config=Other)",
        "FAMILY = replace(FAMILY, model_types=('new_moe',))",
    ],
    ids=["model_type", "config"],
)
def test_two_families_of_one_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    """Otherwise the first family or operation in the order of files would hide the second."""
    (tmp_path / "a_copy.py").write_text(
        "from dataclasses import replace\nfrom flashmoe_mlx.models.qwen3_5_moe import FAMILY\n"
        f"class Other(FAMILY.config): pass\n{lines}\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    families.cache_clear()
    try:
        with pytest.raises(ValueError, match="several families"):
            families()
    finally:
        families.cache_clear()
        sys.modules.pop("flashmoe_mlx.models.a_copy", None)


@pytest.mark.usefixtures("toy")
def test_example_family_equals_the_same_qwen(tmp_path: Path) -> None:
    qwen = write_checkpoint(tmp_path / "qwen", ATTENTION_ONLY, seed=0, layout="per_expert")
    toy = write_toy(qwen, tmp_path / "toy", ATTENTION_ONLY)
    np.testing.assert_array_equal(logits(toy), logits(qwen))


@pytest.mark.usefixtures("toy")
def test_example_family_is_packed_and_generates(tmp_path: Path) -> None:
    qwen = write_checkpoint(tmp_path / "qwen", ATTENTION_ONLY, seed=0, layout="per_expert")
    toy = write_toy(qwen, tmp_path / "toy", ATTENTION_ONLY)
    write_byte_tokenizer(toy)
    packs = [tmp_path / "qwen-pack", tmp_path / "toy-pack"]
    for source, pack in zip((qwen, toy), packs, strict=True):
        pack_checkpoint(source, pack, bits=(4,), group_size=32)
    expected, found = (logits(pack, backend="pread") for pack in packs)
    np.testing.assert_array_equal(found, expected)
    with flashmoe_mlx.load(packs[1], backend="pread") as engine:
        pieces = list(engine.generate("a toy", raw=True, max_tokens=5, temperature=0))
    assert sum(len(piece.token_ids) for piece in pieces) in range(1, 6)
    assert pieces[-1].finish_reason in ("stop", "length")


@pytest.mark.usefixtures("toy")
def test_example_family_writes_the_config_that_it_reads() -> None:
    config = replace(parse_config(toy_config(ATTENTION_ONLY)), rms_norm_eps=1e-6)
    family = family_of(config)
    assert family.parse_config(family.write_config(asdict(config))) == config


OTHER_ARITHMETIC = [
    ("qwen3_moe", {"use_sliding_window": True}),
    ("qwen3_moe", {"attn_output_gate": True}),
    ("qwen3_moe", {"qkv_bias": True}),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}),
    ("qwen3_moe", {"hidden_act": "gelu"}),
    ("qwen3_next", {"scoring_func": "sigmoid"}),
    ("qwen3_next", {"attn_output_gate": False}),
]
MALFORMED = [
    ("qwen3_moe", {"mlp_only_layers": [-1]}, "invalid_config"),
    ("qwen3_moe", {"mlp_only_layers": "all"}, "invalid_config"),
    ("qwen3_moe", {"num_local_experts": 7}, "invalid_config"),
    ("qwen3_moe", {"decoder_sparse_step": 99}, "dense_model"),
    ("qwen3_next", {"mlp_only_layers": [0, 1, 2, 3]}, "dense_model"),
    ("qwen3_next", {"num_experts_per_tok": 17}, "invalid_config"),
]


@pytest.mark.parametrize(
    ("family", "more", "code"), [*((*case, "unsupported_arithmetic") for case in OTHER_ARITHMETIC), *MALFORMED]
)
def test_configs_that_are_refused(family: str, more: dict[str, object], code: str) -> None:
    name = {"qwen3_moe": "moe", "qwen3_next": "next"}[family]
    with pytest.raises(CheckpointError) as caught:
        parse_config({**OLDER_GEOMETRIES[name].config(), **more})
    assert caught.value.code == code


def test_layers_without_experts_as_transformers_counts_them() -> None:
    config = {**OLDER_GEOMETRIES["moe-mlp"].config(), "num_hidden_layers": 7, "mlp_only_layers": [5, 40]}
    assert parse_config({**config, "decoder_sparse_step": 2}).moe_layers == (1, 3)


def test_number_of_experts_under_the_name_of_transformers_5() -> None:
    config = OLDER_GEOMETRIES["moe"].config()
    renamed = {**config, "num_local_experts": config["num_experts"]}
    del renamed["num_experts"]
    assert parse_config(renamed) == parse_config(config)


@pytest.mark.parametrize("name", ["moe", "moe-mlp", "next", "next-mlp"])
def test_all_layouts_are_the_same_model(name: str, tmp_path: Path) -> None:
    geometry = OLDER_GEOMETRIES[name]
    fused = logits(write_checkpoint(tmp_path / "fused", geometry, seed=0))
    separate = write_checkpoint(tmp_path / "separate", geometry, seed=0, layout="per_expert", shards=3)
    np.testing.assert_array_equal(logits(separate), fused)
    stacked = write_checkpoint(tmp_path / "stacked", geometry, seed=0, layout="mlx4", shards=3)
    pack_checkpoint(stacked, tmp_path / "pack", bits=(4,))
    np.testing.assert_array_equal(logits(tmp_path / "pack"), logits(stacked))


def rows_by_key_head(matrix: np.ndarray, heads: int, sizes: list[int]) -> list[np.ndarray]:
    """Return the rows of each part of a matrix that has, for each key head, its rows of all parts in turn."""
    parts = np.split(matrix.reshape(heads, -1, matrix.shape[1]), np.cumsum(sizes)[:-1], axis=1)
    return [part.reshape(-1, matrix.shape[1]) for part in parts]


@pytest.mark.parametrize("block_bytes", [2**25, 3000])
def test_rows_of_joint_projections_are_sorted_in_a_pack(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = OLDER_GEOMETRIES["next"]
    source = write_checkpoint(tmp_path / "source", geometry, seed=0)
    monkeypatch.setattr(resident, "_BLOCK_BYTES", block_bytes)
    pack_checkpoint(source, tmp_path / "pack", bits=(8,), resident_bits=8)
    stored = mx.load(str(tmp_path / "pack" / "resident.safetensors"))
    weights = dense_weights(geometry, 0)
    name = "layers.0.linear_attn.in_proj_"
    values = geometry.value_heads // geometry.key_heads
    wide, deep = values * geometry.value_dim, geometry.key_dim
    q, k, v, z = rows_by_key_head(weights[f"{name}qkvz.weight"], geometry.key_heads, [deep, deep, wide, wide])
    b, a = rows_by_key_head(weights[f"{name}ba.weight"], geometry.key_heads, [values, values])
    for part, expected in {"qkv": np.concatenate([q, k, v]), "z": z, "b": b, "a": a}.items():
        parts = [stored[f"model.{name}{part}.{which}"] for which in ("weight", "scales", "biases")]
        found = np.array(mx.dequantize(*parts, group_size=64, bits=8).astype(mx.float32))
        np.testing.assert_allclose(found, expected, atol=0.01)


@given(st.data())
def test_places_of_rows(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    ranges = tuple(
        (first, data.draw(st.integers(1, height - first)))
        for first in data.draw(st.lists(st.integers(0, height - 1), min_size=1, max_size=4))
    )
    source = np.arange(width * height, dtype=np.uint8)
    expected = np.concatenate([source[first * width : (first + count) * width] for first, count in ranges])
    info = TensorInfo("shard", "U8", (height, width), 0, source.size)
    tensor = ResidentTensor("w", (0, width), info, rows=ranges)
    start = data.draw(st.integers(0, tensor.nbytes - 1))
    nbytes = data.draw(st.integers(1, tensor.nbytes - start))
    found = [source[first : first + count] for first, count in tensor.places(start, nbytes)]
    assert tensor.nbytes == len(expected)
    np.testing.assert_array_equal(np.concatenate(found), expected[start : start + nbytes])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ('<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>', "hermes"),
        ("<tool_call>\n<function=name>\n<parameter=name>\n</tool_call>", "qwen_xml"),
        ("no tools", "hermes"),
    ],
)
def test_the_template_decides_the_format_of_calls(template: str, expected: str, tmp_path: Path) -> None:
    """Qwen3-Coder writes its calls in another format than Qwen3-235B, of the same family."""
    folder = write_checkpoint(tmp_path, replace(OLDER_GEOMETRIES["moe-yarn"], vocab_size=BYTE_TOKENS), seed=0)
    write_byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    with flashmoe_mlx.load(folder) as engine:
        assert engine.tool_format == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen4_exp"])
def test_synthetic_models_of_every_family(family: str, tmp_path: Path) -> None:
    pack = synthetic_pack("tiny", replace(TINY, num_layers=2), tmp_path, family=family)
    assert family in {name.removesuffix("_text") for name in family_of(pack.config).model_types}
    with flashmoe_mlx.load(pack.folder, backend="ram_hybrid", budget_gib=0.001) as engine:
        assert np.isfinite(engine.logits(TOKENS)).all()
    with pytest.raises(InputError) as caught:
        synthetic_config(TINY, "qwen3")
    assert caught.value.code == "unknown_family"


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_families_write_the_configs_that_they_read(config: dict[str, object]) -> None:
    parsed = parse_config(config)
    assert family_of(parsed).parse_config(family_of(parsed).write_config(asdict(parsed))) == parsed


def test_tool_formats_of_families_exist() -> None:
    for family in families():
        assert import_module(f"flashmoe_mlx.text.tool_formats.{family.tool_format}").READER


def test_model_types_belong_to_one_family() -> None:
    model_types = [kind for family in families() for kind in family.model_types]
    assert len(set(model_types)) == len(model_types)


def test_no_other_module_names_fields_of_a_family() -> None:
    """No other module has names of a family's config.json; synthetic models name a default."""
    families = {f"models/{name}.py" for name in ("qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen4_exp", "hybrid")}
    allowed = {*families, "models/other_models.py", "adapters/library.py"}
    package = ROOT / "flashmoe_mlx"
    knowing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(
            r"qwen3_5_moe|qwen3_moe|qwen3_next|qwen4_exp|linear_num_|full_attention_interval", path.read_text()
        )
    }
    assert knowing - allowed == {"made_models/synthetic.py"}


@pytest.mark.parametrize("name", [*GEOMETRIES, "moe-mlp", "next-mlp", "hyper", "hyper-tables"])
def test_estimated_caches_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    with flashmoe_mlx.load(write_checkpoint(tmp_path, ALL[name], seed=0)) as engine:
        cache = engine.new_cache()
        engine.forward(TOKENS[:1] % 97, cache)
        config = engine.model.config
        itemsize = engine.model.norm.dtype.size
        need = memory_need(config, 8, 8, 256, itemsize, 2, group_size=32)  # a cache grows by 256 tokens
        assert need.keys_and_values + need.state == cache.nbytes
