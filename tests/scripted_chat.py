"""A command line whose model says given texts: ``python scripted_chat.py ANSWERS.json task=chat ...``.

The file maps words to answers. The model gives the answer whose word is the last one in the prompt. Words that begin
with "slow" delay each token, and ``slowprefill`` delays each layer of the prompt. The backend mmap takes
half a minute to open.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripted_model import scripted_sampler

from flashmoe_mlx.__main__ import main
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation import sequence as sequence_module
from flashmoe_mlx.tasks import chat

ANSWERS: Mapping[str, str] = json.loads(Path(sys.argv[1]).read_text())
load = chat.load


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

    sequence_module.Sampler = scripted_sampler(ANSWERS)  # type: ignore[misc,assignment]
    runner.Sequence = Sequence  # type: ignore[misc]
    chat.load = slow_load  # type: ignore[assignment]
    sys.exit(main(sys.argv[2:]))
