"""Models with hyper-connections: tables in storage, sparse attention, caches; ``test_parity.py`` has their logits."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hyper_checkpoints import HYPER_GEOMETRIES
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.checkpoint.checkpoint import Checkpoint
from flashmoe_mlx.errors import CheckpointError, FlashMoeError, InputError, PackError
from flashmoe_mlx.formats.extents import Extent
from flashmoe_mlx.formats.safetensors_header import read_header
from flashmoe_mlx.formats.tables import StoredTensor, TablePart
from flashmoe_mlx.layers.ngrams import NgramHash
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.models.registry import families, parse_config
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.verify import verify_pack
from flashmoe_mlx.pack.writer import pack_checkpoint
from flashmoe_mlx.research.estimate.sizes import table_bytes
from flashmoe_mlx.stores.rows import RowStore

GEOMETRY = HYPER_GEOMETRIES["hyper"]
TOKENS = np.arange(5, 5 + 17 * 60, 17, dtype=np.int32) % GEOMETRY.vocab_size


def add_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Add a shard with ``tensors`` to the checkpoint in ``folder``, which has no index."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    mx.save_safetensors(
        str(folder / "model-00002-of-00002.safetensors"), {name: mx.array(values) for name, values in tensors.items()}
    )
    shards = sorted(folder.glob("model-*.safetensors"))
    weight_map = {name: shard.name for shard in shards for name in read_header(shard)[0]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hyper"), GEOMETRY, seed=0)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[flashmoe_mlx.Engine]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    with flashmoe_mlx.load(checkpoint) as opened:
        yield opened
    mx.set_default_device(before)


def table_in(folder: Path, values: np.ndarray, parts: int, bits: int | None) -> list[TablePart]:
    """Write ``values`` as a table of several parts, dense or quantized."""
    found = []
    for number, rows in enumerate(np.array_split(values, parts)):
        arrays = {"weight": mx.array(rows)}
        if bits is not None:
            arrays = dict(zip(("weight", "scales", "biases"), mx.quantize(mx.array(rows), 32, bits), strict=True))
        path = folder / f"part-{number}"
        mx.save_safetensors(str(path), arrays)
        path = path.with_suffix(".safetensors")
        tensors, start = read_header(path)
        stored = [tensors[name] for name in ("weight", "scales", "biases") if name in tensors]
        own = [StoredTensor(Extent(path, start + one.begin, one.nbytes), one.dtype, one.shape) for one in stored]
        found.append(TablePart(own, bits, None if bits is None else 32))
    return found


@pytest.mark.parametrize("bits", [None, 4])
def test_rows_of_a_table(bits: int | None, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    parts = table_in(tmp_path, values, 4, bits)
    store = RowStore(parts)
    if bits is not None:
        values = np.array(mx.dequantize(*mx.quantize(mx.array(values), 32, bits), group_size=32, bits=bits))

    @given(st.lists(st.integers(0, 49), min_size=1, max_size=20))
    def check(rows: list[int]) -> None:
        before = store.rows_read
        found = store.fetch(np.array(rows), mx.float32)
        np.testing.assert_array_equal(np.array(found), values[rows])
        assert store.rows_read - before == len(set(rows))

    check()
    assert store.rows == 50
    assert store.bytes_read == store.rows_read * sum(tensor.row_bytes for tensor in parts[0].tensors)


def test_rows_of_a_damaged_table(tmp_path: Path) -> None:
    store = RowStore(table_in(tmp_path, np.ones((8, 64), np.float32), 2, None))
    path = tmp_path / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.fetch(np.array([0, 6]), mx.float32).shape == (2, 64)
    for broken in (lambda: None, path.unlink):
        broken()
        with pytest.raises(FlashMoeError) as caught:
            RowStore(store._parts).fetch(np.array([7]), mx.float32)
        assert caught.value.code == "unreadable_row"
        assert str(path) in str(caught.value)


def test_no_ngram_crosses_a_separator() -> None:
    words = NgramHash(most=3, heads=2, vocab_size=100, base=50, index=0, seed=1, separator=9)
    after = words.rows(np.array([5, 9]), np.array([7, 8, 9, 6]))
    assert after.shape == (4, 4)
    fresh = words.rows(words.nothing(), np.array([7, 8, 9, 6]))
    np.testing.assert_array_equal(after, fresh)
    other = words.rows(np.array([5, 4]), np.array([7, 8, 9, 6]))
    assert (other[0] != fresh[0]).any()
    assert (other[1, 2:] != fresh[1, 2:]).any()
    np.testing.assert_array_equal(other[1, :2], fresh[1, :2])
    np.testing.assert_array_equal(other[3], fresh[3])
    assert [*words.sizes] == [53, 59, 61, 67]


def test_sequences_of_a_batch_equal_single_sequences(engine: flashmoe_mlx.Engine) -> None:
    lengths = [40, 3, 17]
    ends = np.cumsum(lengths)
    model, caches = engine.model, [engine.new_cache() for _ in lengths]
    context = ForwardContext(PhaseClock())
    together = np.array(model.logits(model.forward(mx.array(TOKENS), lengths, caches, context)))
    last = np.array(model.logits(model.forward(mx.array(TOKENS[:3]), [1, 1, 1], caches, context)))
    for number, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        own = TOKENS[end - length : end]
        expected = engine.logits([*own, TOKENS[number]])
        np.testing.assert_allclose(together[end - length : end], expected[:-1], atol=1e-4)
        np.testing.assert_allclose(last[number], expected[-1], atol=1e-4)


def test_a_sequence_continues_from_its_parts(engine: flashmoe_mlx.Engine) -> None:
    """States, index keys and the inputs of n-grams are kept, as the prompt cache needs."""
    expected = engine.logits(TOKENS)
    cache = engine.new_cache()
    cache.keep_states([10, 41])
    engine.forward(TOKENS[:50], cache)
    states = cache.take_states(2)
    parts = [cache.part(0, 30), cache.part(30, 50)]
    for state, length in zip(states, (10, 41), strict=True):
        again = engine.new_cache()
        again.assemble(parts, state, length)
        np.testing.assert_allclose(engine.forward(TOKENS[length:], again), expected[length:], atol=1e-4)
    snapshot = cache.snapshot()
    for _ in range(2):
        np.testing.assert_allclose(engine.forward(TOKENS[50:], cache), expected[50:], atol=1e-4)
        cache.restore(snapshot)


@pytest.mark.parametrize("backend", ["resident", "ram_hybrid"])
def test_other_backends_and_kernels_compute_the_same(backend: str, checkpoint: Path, tmp_path: Path) -> None:
    pack_checkpoint(checkpoint, tmp_path / "pack", bits=(4,), group_size=32)
    found = []
    for chosen, kernels in ((backend, "auto"), ("pread", "reference")):
        with flashmoe_mlx.load(tmp_path / "pack", backend=chosen, kernels=kernels) as engine:
            found.append(engine.logits(TOKENS))
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def test_tables_and_further_tensors_stay_in_a_pack(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", GEOMETRY, seed=0)
    config = parse_config(GEOMETRY.config())
    block = config.ngrams(1)  # type: ignore[attr-defined]
    hashes = "model.language_model.layers.1.ple.ple_embedding."
    more = {
        "mtp.layers.0.mlp.experts.gate_up_proj": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        f"{hashes}layer_multipliers": block.hash.multipliers,
        f"{hashes}ngram_heads_offsets": block.hash.offsets,
    }
    add_tensors(folder, more)
    pack_checkpoint(folder, tmp_path / "pack", bits=(4,), group_size=32)
    pack = open_pack(tmp_path / "pack")
    assert not verify_pack(pack)
    source, packed = Checkpoint.open(folder), mx.load(str(pack.resident_path))
    assert isinstance(packed, dict)
    for name in more:
        np.testing.assert_array_equal(np.array(packed[name.replace("language_model.", "")]), more[name])
    for part in range(GEOMETRY.parts):
        name = f"layers.1.ple.ple_embedding.ngram_embedding.shard_{part}.weight"
        tensor = source.tensors[f"model.language_model.{name}"]
        assert bytes(source.read(tensor, 0, tensor.nbytes)) == np.array(packed[f"model.{name}"]).tobytes()
    with flashmoe_mlx.load(pack.folder) as engine:
        assert np.isfinite(engine.logits(TOKENS)).all()


def test_a_checkpoint_with_other_hashes_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, GEOMETRY, seed=0)
    name = "model.language_model.layers.1.ple.ple_embedding.layer_multipliers"
    add_tensors(folder, {name: np.array([1, 3, 5])})
    with pytest.raises(PackError) as caught:
        flashmoe_mlx.load(folder)
    assert caught.value.code == "unsupported_arithmetic"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"hc_count": 1}, "invalid_config"),
        ({"indexer_budget": 25}, "invalid_config"),
        ({"indexer_head_dim": 8}, "invalid_config"),
        ({"indexer_kv_heads": 2}, "unsupported_arithmetic"),
        ({"output_gate_type": "tanh"}, "unsupported_arithmetic"),
        ({"ple_layer_ids": [4]}, "invalid_config"),
        ({"ple_layer_ids": [9]}, "invalid_config"),
        ({"ple_embed_dim": 250}, "invalid_config"),
        ({"eos_token_id": None}, "invalid_config"),
        ({"hc_mixing": "sinkhorn"}, "unsupported_arithmetic"),
    ],
)
def test_configs_that_are_refused(change: dict[str, object], code: str) -> None:
    config = GEOMETRY.config()
    with pytest.raises(CheckpointError) as caught:
        parse_config({**config, "text_config": {**config["text_config"], **change}})
    assert caught.value.code == code


def test_guesses_by_routers_are_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError) as caught:
        flashmoe_mlx.load(checkpoint, prefetch="next_router")
    assert caught.value.code == "invalid_value"
    with flashmoe_mlx.load(checkpoint, prefetch="previous_token") as engine:
        assert np.isfinite(engine.logits(TOKENS)).all()


def test_an_estimate_counts_the_table() -> None:
    published = next(family.published for family in families() if "qwen4_exp" in family.model_types)
    assert table_bytes(parse_config(published["Qwen/Qwen3.8-Flash-Next"])) == 320_001_536 * 160 * 2


def test_missing_rows_of_a_table_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, GEOMETRY, seed=0)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["ngram_vocab_size_base"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        flashmoe_mlx.load(folder)
    assert caught.value.code == "wrong_shape"
