"""A reference run: the log-probabilities with which other runs are compared."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import name_in_errors
from flashmoe_mlx.research.quality.items import Item
from flashmoe_mlx.research.quality.passages import log_probabilities, passage

Progress = Callable[[str, int, int], None]
"""A function to call with the name of a stage, the number of finished items, and the number of all items."""


class Reference:
    """The log-probabilities of a reference run over items, in a temporary file that ``close`` deletes.

    Each token takes one f32 per entry of the vocabulary: 8 KB for the demo model, 1 MB for Qwen3.5.

    Attributes:
        values: f32 [scored tokens of all items, vocabulary].
        setup: the configuration of the reference run, as in ``Engine.setup``.
    """

    def __init__(self, folder: tempfile.TemporaryDirectory[str], values: npt.NDArray[np.float32], setup: Any) -> None:
        self._folder = folder
        self.values: npt.NDArray[np.float32] = values
        self.setup = setup

    @classmethod
    def record(cls, engine: Engine, items: Sequence[Item], progress: Progress | None = None) -> "Reference":
        """Run ``engine`` over ``items`` and keep its log-probabilities.

        Raises:
            InputError: no item has a token to score (code "nothing_to_score"), or an item exceeds the context
                ("prompt_too_long").
        """
        passages = [passage(engine, item) for item in items]
        most = engine.model.config.max_context
        for item, tokens in zip(items, passages, strict=True):
            if (length := len(tokens.given) + len(tokens.scored)) > most:
                raise InputError(
                    f"an item of kind {item.kind} has {length} tokens; this model's context holds {most}; name other "
                    "kinds by kinds=[...], or other items by items=<file>",
                    code="prompt_too_long",
                )
        total = sum(len(tokens.scored) for tokens in passages)
        if not total:
            raise InputError(
                "no item has a token to score, because all texts and answers are too short", code="nothing_to_score"
            )
        folder = tempfile.TemporaryDirectory(prefix="flashmoe-reference-")
        shape = (total, engine.model.config.vocab_size)
        path = Path(folder.name) / "log_probabilities.f32"
        try:
            with name_in_errors(path):
                values = np.memmap(path, np.float32, "w+", shape=shape)
            row = 0
            for index, tokens in enumerate(passages):
                if progress:
                    progress("reference", index, len(passages))
                for distribution in log_probabilities(engine, tokens):
                    values[row] = distribution
                    row += 1
        except BaseException:
            folder.cleanup()
            raise
        return cls(folder, values, engine.setup)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file. Repeated calls have no effect."""
        self.values = np.empty((0, 0), np.float32)
        self._folder.cleanup()
