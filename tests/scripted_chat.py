"""A command line whose model says given texts: ``python scripted_chat.py ANSWERS.json task=chat ...``.

The file maps words to answers. The model gives the answer whose word is the last one in the prompt. Words that begin
with "slow" delay each token, and ``slowprefill`` delays each layer of the prompt. The backend mmap takes
half a minute to open.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashmoe_mlx.__main__ import main
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation import sequence as sequence_module
from flashmoe_mlx.tasks import chat

ANSWERS: Mapping[str, str] = json.loads(Path(sys.argv[1]).read_text())
END_OF_TURN = 258
MARKUP = {"<think>": 259, "</think>": 260}
"""Tokens that are not bytes."""
load = chat.load


def encode(text: str) -> Iterator[int]:
    """Yield the tokens of ``text``."""
    for part in re.split("(</?think>)", text):
        yield from [MARKUP[part]] if part in MARKUP else part.encode()


class Sampler:
    """A sampler that ignores logits. Token ids below 256 are bytes."""

    can_choose_on_device = False

    def __init__(self, options: object, seed: object, prompt_ids: list[int], *rest: object) -> None:
        prompt = bytes(token for token in prompt_ids if token < 256).decode()
        word = max(ANSWERS, key=prompt.rfind)
        self._delay = 0.01 if word.startswith("slow") else 0.0
        self._tokens: Iterator[int] = iter([*encode(ANSWERS[word]), END_OF_TURN])

    def __call__(self, logits: object, *rest: object) -> int:
        time.sleep(self._delay)
        return next(self._tokens)

    def return_number(self, number: object) -> None:
        """Do nothing."""


class Sequence(sequence_module.Sequence):
    """A sequence whose prompt may take long."""

    def report(self, done: int) -> None:
        """Wait before each layer."""
        if b"slowprefill" in bytes(token for token in self.request.prompt_ids if token < 256):
            time.sleep(0.3)
        super().report(done)


def slow_load(folder: Path, backend: Mapping[str, Any], *arguments: Any, **options: Any) -> Engine:
    """Load a model; with the backend mmap this takes long."""
    if "mmap" in backend["_target_"]:
        time.sleep(30)
    return load(folder, backend, *arguments, **options)


if __name__ == "__main__":
    from flashmoe_mlx.generation import runner

    sequence_module.Sampler = Sampler  # type: ignore[misc,assignment]
    runner.Sequence = Sequence  # type: ignore[misc]
    chat.load = slow_load  # type: ignore[assignment]
    sys.exit(main(sys.argv[2:]))
