"""Rotary embeddings of published configs: frequencies as in transformers, and every path through attention."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.recorded import TOLERANCE, Case
from pack_oracle import assert_one_line
from tiny_checkpoints import YARN

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import AttentionWeights, dialect, native
from flashmoe_mlx.custom_kernels.attention import gpu, mlx, reference
from flashmoe_mlx.errors import CheckpointError, InputError
from flashmoe_mlx.layers.rope import Rope, read_rope
from flashmoe_mlx.models.registry import parse_config

OF_TRANSFORMERS = [
    # Results of its ROPE_INIT_FUNCTIONS["yarn"]: head dim, context, settings, attention factor, some frequencies.
    (
        256,
        262144,
        {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "factor": 4.0, "original_max_position_embeddings": 262144},
        1.138629436111989,
        {0: 1.0, 8: 0.017782794311642647, 16: 0.00025693507632240653, 24: 1.405853367941745e-06},
    ),
    (
        256,
        262144,
        {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "factor": 2.5},
        1.0916290731874154,
        {0: 1.0, 16: 0.0002687936066649854, 24: 2.249365252282587e-06},
    ),
    (
        64,
        8192,
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "factor": 8.0,
            "original_max_position_embeddings": 1024,
            "truncate": False,
            "beta_fast": 16,
            "beta_slow": 2,
        },
        1.2079441541679836,
        {0: 1.0, 2: 0.3162277638912201, 4: 0.10000000149011612, 6: 0.016548309475183487},
    ),
    (
        32,
        4096,
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 0.5,
        },
        0.5,
        {0: 1.0, 2: 0.10000000149011612, 4: 0.00624999962747097, 6: 0.0002500000118743628},
    ),
    (
        32,
        16384,
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
        },
        0.964326914892074,
        {6: 0.02823462337255478},
    ),
    # Within 16 positions no pair rotates often enough to be kept: both bounds meet.
    (
        32,
        64,
        {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "factor": 4.0, "original_max_position_embeddings": 16},
        1.138629436111989,
        {0: 1.0, 2: 0.007905694656074047, 6: 7.905693564680405e-06},
    ),
]


@pytest.mark.parametrize(("head_dim", "context", "settings", "factor", "expected"), OF_TRANSFORMERS)
def test_yarn_equals_transformers(
    head_dim: int, context: int, settings: dict[str, Any], factor: float, expected: dict[int, float]
) -> None:
    rope = read_rope({"rope_parameters": {"rope_type": "yarn", **settings}}, head_dim, context, 0.25)
    assert rope.yarn is not None
    assert rope.yarn.attention_factor == pytest.approx(factor, rel=1e-9)
    found = rope.frequencies()
    assert len(found) == rope.dim // 2
    for pair, frequency in expected.items():
        assert found[pair] == pytest.approx(frequency, rel=2e-7)


def test_plain_frequencies_are_powers_of_theta() -> None:
    for named in ({"rope_type": "default"}, {"type": "default"}, {"type": "mrope"}, {}):
        rope = read_rope({"rope_parameters": {**named, "rope_theta": 1e4, "factor": 7}}, 32, 100, 0.25)
        assert rope == Rope(8, 1e4)
        np.testing.assert_allclose(rope.frequencies(), [1.0, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "unsupported_arithmetic"),
        ({"rope_type": "dynamic", "factor": 2.0}, "unsupported_arithmetic"),
        ({"rope_type": "longrope"}, "unsupported_arithmetic"),
        ({"type": "llama3"}, "unsupported_arithmetic"),
        ({"rope_type": ["yarn"]}, "unsupported_arithmetic"),
        ({"rope_type": "yarn", "factor": 4.0, "interleaved": True}, "unsupported_arithmetic"),
        ({"rope_type": "default", "scaling_beta\n": 4.0}, "unsupported_arithmetic"),
        ({"rope_type": "yarn", "factor": 0.5}, "invalid_config"),
        ({"rope_type": "yarn", "factor": float("nan")}, "invalid_config"),
        ({"rope_type": "yarn", "factor": float("inf")}, "invalid_config"),
        ({"rope_type": "yarn", "factor": "4"}, "invalid_config"),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}, "invalid_config"),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1.5}, "invalid_config"),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}, "invalid_config"),
        ({"rope_type": "yarn", "factor": 4, "attention_factor": -1}, "invalid_config"),
        ({"rope_type": "yarn", "factor": 4, "truncate": "no"}, "invalid_config"),
        ({"rope_type": "yarn", "factor": 4, "rope_theta": 1.0}, "invalid_config"),
        ({"partial_rotary_factor": float("nan")}, "invalid_config"),
        ({"rope_theta": float("inf")}, "invalid_config"),
        ({"rope_theta": None}, "invalid_config"),
    ],
)
def test_other_rotations_are_refused(settings: dict[str, Any], code: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_rope({"rope_parameters": {"rope_theta": 1e4, **settings}}, 32, 4096, 0.25)
    assert caught.value.code == code
    assert_one_line(caught.value)


YARN_4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
PLAIN = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}


def both(new: Any, old: Any, **beside: Any) -> Rope:
    return read_rope({"rope_parameters": new, "rope_scaling": old, **beside}, 256, 262144, 0.25)


def test_settings_given_twice_must_agree() -> None:
    """The library transformers prefers ``rope_scaling``, mlx-lm prefers ``rope_parameters``."""
    plain = both(PLAIN, None)
    assert plain == both(None, PLAIN) == both(PLAIN, PLAIN) == both(PLAIN, {}) == Rope(64, 1e7)
    assert plain == both(PLAIN, {"type": "mrope", "mrope_section": [11, 11, 10]})
    yarn = both(None, {**PLAIN, **YARN_4})
    assert yarn == both({**PLAIN, **YARN_4}, YARN_4)
    assert yarn.yarn is not None
    for new, old in (
        (PLAIN, YARN_4),
        ({**PLAIN, **YARN_4}, {**YARN_4, "factor": 2.0}),
        (PLAIN, {"rope_theta": 1e4}),
        ({**PLAIN, **YARN_4}, {"type": "linear", "factor": 4.0}),
        (PLAIN, {"rope_type": "default", "mrope_section": [16, 8, 8]}),
    ):
        with pytest.raises(CheckpointError) as caught:
            both(new, old)
        assert caught.value.code == "contradicting_rope"
        assert_one_line(caught.value)
    for odd in (5, "yarn", [1]):
        with pytest.raises(CheckpointError) as caught:
            both(PLAIN, odd)
        assert caught.value.code == "invalid_config"


def test_settings_beside_the_sizes_fill_gaps_in_nested_settings() -> None:
    """Configs that transformers saved hold some settings in both places."""
    assert both(PLAIN, None, rope_theta=1e4, partial_rotary_factor=0.5) == Rope(64, 1e7)
    assert both({"rope_type": "default"}, None, rope_theta=1e4, partial_rotary_factor=0.5) == Rope(128, 1e4)


NUMBERS = st.one_of(st.integers(-2, 2**25), st.floats(), st.none(), st.booleans(), st.text(max_size=3))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "factor",
                "rope_theta",
                "original_max_position_embeddings",
                "beta_fast",
                "beta_slow",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
                "truncate",
                "partial_rotary_factor",
            ]
        ),
        NUMBERS,
    )
)
def test_accepted_yarn_settings_give_finite_frequencies(settings: dict[str, Any]) -> None:
    try:
        rope = read_rope({"rope_parameters": {"rope_theta": 1e4, **settings, "rope_type": "yarn"}}, 64, 4096, 0.25)
    except InputError as error:
        assert_one_line(error)
        return
    assert rope.yarn is not None
    assert all(0 < frequency <= 1 for frequency in rope.frequencies())
    assert 0 < rope.yarn.attention_factor < float("inf")


def test_yarn_extends_the_context() -> None:
    config = YARN.text_config()
    assert parse_config(config).max_context == 4 * 4096
    config["max_position_embeddings"] = 100_000  # stated, and longer
    assert parse_config(config).max_context == 100_000


# Attention


@pytest.mark.parametrize(
    ("rotated", "accepted"),
    [(reference.rotate, 1e-5), (mlx.rotate, 0.15)],  # MLX's own operation has angles in f32, as transformers has
)
def test_positions_near_a_million(rotated: Any, accepted: float) -> None:
    """The published settings for 1,010,000 tokens, against angles in f64."""
    rope = both({**PLAIN, **YARN_4}, None)
    frequencies = rope.frequencies()
    half = len(frequencies)
    norm = mx.ones((256,))
    weights = AttentionWeights(2, 1, 256, rope.dim, rope.theta, norm, norm, 1e-6, frequencies)
    x = mx.random.normal((1, 2, 6, 256), key=mx.random.key(0))
    for offset in (262_140, 1_009_994):
        angles = np.arange(offset, offset + 6)[:, None] * np.array(frequencies, np.float64)
        expected = np.array(x, np.float64)
        first, second = expected[..., :half].copy(), expected[..., half : 2 * half].copy()
        expected[..., :half] = first * np.cos(angles) - second * np.sin(angles)
        expected[..., half : 2 * half] = second * np.cos(angles) + first * np.sin(angles)
        np.testing.assert_allclose(np.array(rotated(x, weights, offset)), expected, rtol=0, atol=accepted)


@pytest.mark.parametrize("kernels", ["auto", "mlx", "reference"])
def test_every_path_through_attention_rotates_as_transformers(kernels: str, tmp_path: Path) -> None:
    case = Case(YARN.name, 0, "dense", "F32")
    recording = case.load()
    count = 24 if kernels == "reference" else 96
    with flashmoe_mlx.load(case.write_checkpoint(tmp_path), kernels=kernels) as engine:
        prompt = engine.logits(recording.tokens[:count])
        cache = engine.new_cache()
        engine.forward(recording.tokens[: count - 1], cache)
        last = engine.forward(recording.tokens[count - 1 : count], cache)
        names = engine.setup["kernels"]
    np.testing.assert_allclose(prompt, recording.logits[:count], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(last, recording.logits[count - 1 : count], rtol=0, atol=TOLERANCE)
    if kernels == "auto" and native.extension() is not None and dialect() is None:
        assert all("native" in names[f"attention: {path}"] for path in ("one token", "several tokens"))


def test_ignoring_yarn_would_change_logits(tmp_path: Path) -> None:
    case = Case(YARN.name, 0, "dense", "F32")
    recording = case.load()
    folder = case.write_checkpoint(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"yarn"', '"default"'))
    with flashmoe_mlx.load(folder) as engine:
        assert np.abs(engine.logits(recording.tokens) - recording.logits).max() > 10 * TOLERANCE


def test_given_frequencies_replace_powers_of_theta() -> None:
    """In the table that kernels for GPUs read, and on the path through MLX."""
    plain = Rope(16, 1e4).frequencies()
    table, given_table = (gpu._rotary(16, 1e4, given) for given in (None, plain))
    np.testing.assert_allclose(np.array(table), np.array(given_table), rtol=1e-6, atol=1e-12)
    norm = mx.ones((32,))
    weights = [AttentionWeights(2, 1, 32, 16, 1e4, norm, norm, 1e-6, given) for given in (None, plain)]
    x = mx.random.normal((1, 2, 5, 32), key=mx.random.key(0))
    for rotated in (mlx.rotate, reference.rotate):
        ours, theirs = (np.array(rotated(x, layer, 1000)) for layer in weights)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)  # f32 angles at position 1000
