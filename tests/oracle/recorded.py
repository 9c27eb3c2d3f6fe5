"""Logits of transformers, recorded by ``record.py``. Reading them requires neither torch nor transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from hyper_checkpoints import HYPER_GEOMETRIES
from tiny_checkpoints import (
    GEOMETRIES,
    OLDER_GEOMETRIES,
    SEEDS,
    YARN,
    Dtype,
    Geometry,
    Layout,
    Tensors,
    dense_weights,
    dequantized_weights,
    weights_hash,
    write_checkpoint,
)

PROMPT_LENGTH = 64
DECODE_STEPS = 32
TOLERANCE = 2e-3
"""Largest allowed difference between logits; logits have an rms of 1."""

Encoding = Literal["dense", "mlx4"]

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Recording:
    """A prompt followed by greedily decoded tokens, and the logits after each token."""

    tokens: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Case:
    """A recorded run: weights, their encoding, and experts per token (None for the model's own number)."""

    geometry_name: str
    seed: int
    encoding: Encoding
    dtype: Dtype
    experts_k: int | None = None

    @property
    def name(self) -> str:
        parts = [self.geometry_name, f"seed{self.seed}", self.encoding, self.dtype.lower()]
        return "-".join(parts if self.experts_k is None else [*parts, f"k{self.experts_k}"])

    @property
    def geometry(self) -> Geometry:
        return {**GEOMETRIES, **OLDER_GEOMETRIES, **HYPER_GEOMETRIES, YARN.name: YARN}[self.geometry_name]

    @property
    def path(self) -> Path:
        return FIXTURES / f"{self.name}.npz"

    def weights(self) -> Tensors:
        """Return the weights that an engine uses when it opens the checkpoint, by canonical name."""
        make = dense_weights if self.encoding == "dense" else dequantized_weights
        return make(self.geometry, self.seed, self.dtype)

    def write_checkpoint(self, folder: Path, layout: Layout = "fused") -> Path:
        layout = "mlx4" if self.encoding == "mlx4" else layout
        return write_checkpoint(folder, self.geometry, self.seed, layout, dtype=self.dtype)

    def load(self) -> Recording:
        """Return the recording, after checking that it was made with the present weights."""
        with np.load(self.path, allow_pickle=False) as stored:
            recording = Recording(stored["tokens"].astype(np.int32), stored["logits"])
            recorded_hash, made_by = str(stored["weights_sha256"]), str(stored["made_by"])
        today = weights_hash(self.weights())
        assert today == recorded_hash, (
            f"{self.name}: tests/tiny_checkpoints.py now makes different weights than {made_by} used"
            f" ({today[:12]}, not {recorded_hash[:12]}); to record again: python tests/oracle/record.py"
        )
        return recording


DENSE_CASES = tuple(Case(name, seed, "dense", "F32") for name in GEOMETRIES for seed in SEEDS)
MLX4_CASES = (
    *(Case(name, 0, "mlx4", "BF16") for name in GEOMETRIES),
    # Published checkpoints have bfloat16 scales; MLX can also write float32 scales.
    Case("plain", 1, "mlx4", "F32"),
)
OTHER_CASES = (
    Case("plain", 0, "dense", "BF16"),
    Case("plain", 0, "dense", "F32", experts_k=2),
    Case("text", 0, "mlx4", "BF16", experts_k=1),
    Case(YARN.name, 0, "dense", "F32"),
)
OLDER_CASES = (
    *(Case(name, seed, "dense", "F32") for name in OLDER_GEOMETRIES for seed in SEEDS),
    *(Case(name, 0, "mlx4", "BF16") for name in OLDER_GEOMETRIES),
    Case("moe", 1, "dense", "BF16"),
    Case("moe-mlp", 1, "dense", "F32", experts_k=2),
)
"""Cases of Qwen3-MoE and Qwen3-Next."""
HYPER_CASES = (
    *(Case(name, seed, "dense", "F32") for name in HYPER_GEOMETRIES for seed in SEEDS),
    Case("hyper", 0, "mlx4", "BF16"),
)
"""Cases of Qwen3.8-Flash-Next."""
CASES = (*DENSE_CASES, *MLX4_CASES, *OTHER_CASES, *OLDER_CASES, *HYPER_CASES)

LONG_PROMPT_LENGTH = 4200
LONG_CONTEXT = 8192


@dataclass(frozen=True)
class LongCase(Case):
    """A run past 4,096 tokens: a prompt of ``LONG_PROMPT_LENGTH`` tokens and ``DECODE_STEPS`` greedy steps.

    Only the logits of ``LONG_ROWS`` are recorded: near the boundaries of KV cache growth and prefill chunks, and in
    every decode step. Among so many tokens, some always choose experts by a narrow margin. The recording contains this
    margin; float32 implementations make the same choices if it is far above their rounding errors.
    """

    @property
    def name(self) -> str:
        return f"{super().name}-long"

    @property
    def geometry(self) -> Geometry:
        return replace(super().geometry, context=LONG_CONTEXT)


_BORDERS = (256, 512, 1024, 2048, 3072, 4096)
LONG_ROWS = np.array(
    [
        0,
        *(border + offset for border in _BORDERS for offset in (-1, 0, 1)),
        *range(LONG_PROMPT_LENGTH - 1, LONG_PROMPT_LENGTH + DECODE_STEPS),
    ]
)
"""Positions whose logits are in a long recording."""

LONG_CASES = (LongCase("plain", 0, "dense", "F32"), LongCase("pattern", 1, "dense", "F32"))
