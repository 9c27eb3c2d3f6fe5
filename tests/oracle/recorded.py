"""Logits of transformers, recorded by ``record.py``; reading them needs neither torch nor transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tiny_checkpoints import (
    GEOMETRIES,
    SEEDS,
    YARN,
    Dtype,
    Geometry,
    Layout,
    Tensors,
    dense_weights,
    dequantised_weights,
    weights_hash,
    write_checkpoint,
)

PROMPT_LENGTH = 64
DECODE_STEPS = 32
TOLERANCE = 2e-3
"""Largest difference of a logit from transformers'; logits have an rms of 1."""

Encoding = Literal["dense", "mlx4"]

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Recording:
    """A prompt, then the tokens of greedy decoding one at a time; the logits after each of them."""

    tokens: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Case:
    """One recorded run: which weights, in which encoding, and with how many experts a token (None: the model's own)."""

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
        return YARN if self.geometry_name == YARN.name else GEOMETRIES[self.geometry_name]

    @property
    def path(self) -> Path:
        return FIXTURES / f"{self.name}.npz"

    def weights(self) -> Tensors:
        """What an engine computes with when it opens the checkpoint, by canonical names."""
        make = dense_weights if self.encoding == "dense" else dequantised_weights
        return make(self.geometry, self.seed, self.dtype)

    def write_checkpoint(self, folder: Path, layout: Layout = "fused") -> Path:
        layout = "mlx4" if self.encoding == "mlx4" else layout
        return write_checkpoint(folder, self.geometry, self.seed, layout, dtype=self.dtype)

    def load(self) -> Recording:
        """The recording, once it is sure that the weights of today are those it was made with."""
        with np.load(self.path, allow_pickle=False) as stored:
            recording = Recording(stored["tokens"].astype(np.int32), stored["logits"])
            recorded_hash, made_by = str(stored["weights_sha256"]), str(stored["made_by"])
        today = weights_hash(self.weights())
        assert today == recorded_hash, (
            f"{self.name}: tests/tiny_checkpoints.py makes other weights than {made_by} was given"
            f" ({today[:12]}, not {recorded_hash[:12]}); record anew: python tests/oracle/record.py"
        )
        return recording


DENSE_CASES = tuple(Case(name, seed, "dense", "F32") for name in GEOMETRIES for seed in SEEDS)
MLX4_CASES = (
    *(Case(name, 0, "mlx4", "BF16") for name in GEOMETRIES),
    # Published checkpoints have bfloat16 scales; MLX writes float32 ones as readily.
    Case("plain", 1, "mlx4", "F32"),
)
OTHER_CASES = (
    Case("plain", 0, "dense", "BF16"),
    Case("plain", 0, "dense", "F32", experts_k=2),
    Case("text", 0, "mlx4", "BF16", experts_k=1),
    Case(YARN.name, 0, "dense", "F32"),
)
CASES = (*DENSE_CASES, *MLX4_CASES, *OTHER_CASES)

LONG_PROMPT_LENGTH = 4200
LONG_CONTEXT = 8192


@dataclass(frozen=True)
class LongCase(Case):
    """A run past 4,096 tokens: a prompt of ``LONG_PROMPT_LENGTH`` tokens and ``DECODE_STEPS`` greedy steps.

    Only the logits of ``LONG_ROWS`` are recorded: around the borders of KV cache growth and of prefill chunks, and
    every decode step. So many tokens always include some whose experts are chosen by a narrow margin; the recording
    holds that margin, and float32 implementations agree on the choice as long as it stays far above their rounding.
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
"""Positions whose logits a long recording holds."""

LONG_CASES = (LongCase("plain", 0, "dense", "F32"), LongCase("pattern", 1, "dense", "F32"))
